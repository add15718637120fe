"""`mllama chat`: the conversation that is kept, the commands, turns that fail, and how it feels on a terminal."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mllama_runtime.cli.chat as chat_module
import pytest
from click.testing import CliRunner, Result
from mllama_runtime import Engine, SamplingParams, Stream
from mllama_runtime.backends.ort import OrtBackend, OrtFeatures
from mllama_runtime.cli import main
from mllama_runtime.preprocessing import ImageTiles
from PIL import Image

from ._terminal import Terminal

SAMPLING = SamplingParams(max_new_tokens=5)


@pytest.fixture(scope="module")
def bundle(bundle_of: Callable[..., Path]) -> Path:
    return bundle_of()


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "rotes Bild.png"
    Image.new("RGB", (120, 50), "red").save(path)
    return path


def talk(bundle: Path, *lines: str | bytes, options: tuple[str, ...] = ("--max-new-tokens", "5")) -> Result:
    """A session whose stdin is these lines; it must end well."""
    stdin = b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines)
    args = ["chat", str(bundle), "--threads", "1", "--verify", "quick", *options]
    result = CliRunner().invoke(main, args, input=stdin)
    assert result.exit_code == 0, result.output
    return result


def answers(engine: Engine, *turns: list[dict[str, Any]], **options: Any) -> str:
    """What stdout must hold: the engine's answer to each message, given those before it."""
    messages: list[dict[str, Any]] = []
    texts = []
    for content in turns:
        messages.append({"role": "user", "content": content})
        texts.append(engine.generate(messages, sampling=SAMPLING, **options).text)
        messages.append({"role": "assistant", "content": texts[-1]})
    return "".join(f"{text}\n" for text in texts)


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def image(path: Path) -> dict[str, str]:
    return {"type": "image", "image": str(path)}


Asked = tuple[list[dict[str, Any]], str | None]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Asked]:
    """The messages and the system message of every call of `Engine.stream`, which does its work."""
    stream, calls = Engine.stream, []

    def recorded(self: Engine, prompt: list[dict[str, Any]], **options: Any) -> Any:
        calls.append((list(prompt), options["system"]))
        return stream(self, prompt, **options)

    monkeypatch.setattr(Engine, "stream", recorded)
    return calls


def user(words: str) -> dict[str, Any]:
    return {"role": "user", "content": [text(words)]}


def assistant(words: str) -> dict[str, Any]:
    return {"role": "assistant", "content": words}


def test_the_history_is_kept(bundle: Path, engine: Engine, asked: list[Asked]) -> None:
    lines = ["What is a circle?", " /image is a word here", "And a square?"]
    result = talk(bundle, lines[0], "", "  ", *lines[1:])
    one, two, _ = result.stdout.splitlines()
    conversation = [user(lines[0]), assistant(one), user(lines[1]), assistant(two), user(lines[2])]
    assert [messages for messages, _ in asked] == [conversation[:1], conversation[:3], conversation]
    assert result.stdout == answers(engine, *([text(line)] for line in lines))


def test_a_picture_is_encoded_once(
    bundle: Path, engine: Engine, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = answers(engine, [image(picture), text("What is this?")], [text("What colour?")])
    encode, calls = OrtBackend.encode, []

    def counted(self: OrtBackend, tiles: ImageTiles) -> OrtFeatures:
        calls.append(tiles)
        return encode(self, tiles)

    monkeypatch.setattr(OrtBackend, "encode", counted)
    result = talk(bundle, f"/image '{picture}'", "What is this?", "What colour?")
    assert result.stdout == expected
    assert len(calls) == 1
    assert result.stderr.startswith(f"attached {picture} (")


def test_pictures_keep_their_order(bundle: Path, engine: Engine, picture: Path, tmp_path: Path) -> None:
    other = tmp_path / "blue.png"
    Image.new("RGB", (40, 90), "blue").save(other)
    result = talk(bundle, f"/image {other}", f"/image {picture}", "Which is red?")
    assert result.stdout == answers(engine, [image(other), image(picture), text("Which is red?")])


def test_system_and_reset(bundle: Path, picture: Path, asked: list[Asked]) -> None:
    lines = ["/system Be brief.", "One", "Two", f"/image {picture}", "/reset", "Three", "/system", "Four"]
    result = talk(bundle, *lines)
    one, two, three, _ = result.stdout.splitlines()
    first = [user("One"), assistant(one), user("Two")]
    second = [user("Three"), assistant(three), user("Four")]
    assert asked == [(first[:1], "Be brief."), (first, "Be brief."), (second[:1], "Be brief."), (second, None)]
    assert two
    remarks = [line for line in result.stderr.splitlines() if not line.startswith(("attached", "cut off"))]
    assert remarks == ["system message set", "new conversation", "system message removed"]


def test_failed_turns_leave_no_trace(bundle: Path, engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    too_long = "many words " * (engine.model.text.max_seq_len // 2)
    lines = [
        "Hi",
        f"/image {tmp_path / 'text.png'}",
        "/image",
        "/image ~no.such.user/x",
        "/dance",
        too_long,
        b"\xff",
        "Bye",
    ]
    result = talk(bundle, *lines)
    assert result.stdout == answers(engine, [text("Hi")], [text("Bye")])
    errors = [line for line in result.stderr.splitlines() if line.startswith("mllama: error: ")]
    for line, expected in zip(
        errors,
        (
            "text.png: not a picture",
            "/image: names no picture",
            "~no.such.user/x: cannot be read",
            "/dance: no such command; see /help",
            "prompt: the prompt is too long",
            "the message: holds half of a surrogate pair",
        ),
        strict=True,
    ):
        assert expected in line


def test_a_turn_that_breaks_off_is_dropped_with_its_picture(
    bundle: Path, engine: Engine, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Test double: the first answer fails at its first token."""
    from mllama_runtime.errors import GateError

    expected = answers(engine, [text("Hi")])
    write, calls = chat_module.write_answer, []

    def fails(stream: Any) -> None:
        calls.append(stream)
        if len(calls) == 1:
            raise GateError("the model computed logits that cannot be sampled")
        write(stream)

    monkeypatch.setattr(chat_module, "write_answer", fails)
    assert talk(bundle, f"/image {picture}", "What is this?", "Hi").stdout == expected


@pytest.mark.parametrize("num_tokens", [0, 2])
def test_a_stopped_answer_is_kept_as_far_as_it_came(
    bundle: Path, engine: Engine, asked: list[Asked], monkeypatch: pytest.MonkeyPatch, num_tokens: int
) -> None:
    """Stand-in for a person: Ctrl-C after so many tokens of the first answer."""
    write = chat_module.write_answer

    def stopped(stream: Stream) -> None:
        monkeypatch.setattr(chat_module, "write_answer", write)
        for _ in range(num_tokens):
            next(stream)
        raise KeyboardInterrupt

    monkeypatch.setattr(chat_module, "write_answer", stopped)
    (token_id,) = engine.tokenizer.encode("s", special=False)
    result = talk(bundle, "One", "Two", options=("--max-new-tokens", "3", "--logit-bias", f"{token_id}=100"))
    kept = [user("One"), assistant("s" * num_tokens)] if num_tokens else []
    assert asked == [([user("One")], None), ([*kept, user("Two")], None)]
    assert result.stderr.splitlines()[0] == "stopped"


def test_special_tokens_are_text(bundle: Path, engine: Engine) -> None:
    words = "<|image|>What does <|eot_id|> mean?"
    assert talk(bundle, words).stdout == answers(engine, [text(words)])


def test_quit_help_and_the_end(bundle: Path) -> None:
    result = talk(bundle, "/help", "/quit", "Hi")
    assert result.stdout == ""
    for command in ("/image PATH", "/system TEXT", "/reset", "/help", "/quit"):
        assert command in result.stderr
        assert command in CliRunner().invoke(main, ["chat", "--help"]).stdout


def test_a_cut_answer_is_remarked(bundle: Path, engine: Engine) -> None:
    options = ("--max-new-tokens", "3", "--min-new-tokens", "3")
    assert talk(bundle, "Hi", options=options).stderr == "cut off after 3 tokens: see --max-new-tokens\n"


def test_a_bundle_without_template(bundle: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(bundle, base)
    manifest = json.loads((base / "manifest.json").read_text())
    del manifest["files"]["chat_template.jinja"]
    (base / "chat_template.jinja").unlink()
    (base / "manifest.json").write_text(json.dumps(manifest))
    result = CliRunner().invoke(main, ["chat", str(base)], input="Hi\n")
    assert result.exit_code == 3
    assert "has no chat template" in result.stderr


def test_a_bundle_that_is_absent(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["chat", str(tmp_path / "absent")])
    assert result.exit_code == 3
    assert result.stderr.endswith("absent: no such folder\n")


def test_on_a_terminal(bundle: Path, engine: Engine) -> None:
    """Ctrl-C stops an answer that would last for hours, and leaves at the prompt."""
    (token_id,) = engine.tokenizer.encode("s", special=False)
    args = ("chat", bundle, "--logit-bias", f"{token_id}=100", "--max-new-tokens", 10**9, "--verify", "quick")
    with Terminal(*args) as terminal:
        assert terminal.until("> ").endswith("type a message, or /help\n> ")
        terminal.send("Hi\n")
        terminal.until("sss")
        terminal.send("\x03")
        assert terminal.until("> ").endswith("\nstopped\n> ")
        terminal.send("Again\n")
        terminal.until("sss")
        terminal.send("\x03")
        terminal.until("> ")
        output, code = terminal.end("\x03")
    assert code == 130
    assert output.endswith("\nmllama: interrupted\n")


def test_ctrl_d_leaves_a_terminal(bundle: Path) -> None:
    with Terminal("chat", bundle, "--verify", "quick") as terminal:
        terminal.until("> ")
        assert terminal.end("\x04") == ("\n", 0)
