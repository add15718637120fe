"""`mllama generate`: every option reaches the engine, every output is what it says, every mistake is one line."""

from __future__ import annotations

import json
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import mllama_runtime.cli.generate as generate_module
import pytest
from click.testing import CliRunner, Result
from mllama_runtime import Engine, SamplingParams
from mllama_runtime.cli import main
from mllama_runtime.cli.answers import open_engine, sampling_options
from PIL import Image

from ._terminal import Terminal

SHORT = ("--max-new-tokens", "6", "--threads", "1", "--verify", "quick")
QUESTION = "Which shape is largest?"


def run(*args: object, stdin: bytes = b"", charset: str = "utf-8") -> Result:
    return CliRunner(charset=charset).invoke(main, ["generate", *map(str, args)], input=stdin)


def answer(*args: object, **options: Any) -> dict[str, Any]:
    """The JSON object of a run that must succeed."""
    result = run(*args, *SHORT, "--json", **options)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    assert result.stdout.count("\n") == 1
    value: dict[str, Any] = json.loads(result.stdout)
    return value


def sampling(**options: Any) -> SamplingParams:
    return SamplingParams(**{"max_new_tokens": 6, **options})


@pytest.fixture(scope="module")
def bundle(bundle_of: Callable[..., Path]) -> Path:
    return bundle_of()


@pytest.fixture
def pictures(tmp_path: Path) -> tuple[Path, Path]:
    """A wide red one and a tall blue one; the name of the second is not everyone's."""
    red, blue = tmp_path / "red.png", tmp_path / "bläues Bild.png"
    Image.new("RGB", (120, 50), "red").save(red)
    Image.new("RGB", (40, 90), "blue").save(blue)
    return red, blue


def test_the_answer_is_the_engines(bundle: Path, engine: Engine, pictures: tuple[Path, Path]) -> None:
    expected = engine.generate(QUESTION, images=pictures, system="Be brief.", sampling=sampling(logprobs=2))
    args = (bundle, "--prompt", QUESTION, "--image", pictures[0], "--image", pictures[1], "--system", "Be brief.")
    found = answer(*args, "--logprobs", 2)
    assert set(found) == {"text", "token_ids", "finish_reason", "usage", "timings", "logprobs", "notices"}
    assert found["text"] == expected.text
    assert found["token_ids"] == list(expected.token_ids)
    assert found["finish_reason"] == expected.finish_reason
    usage = expected.usage
    assert found["usage"] == {
        "prompt_tokens": usage.prompt_tokens,
        "image_tokens": usage.image_tokens,
        "completion_tokens": usage.completion_tokens,
    }
    assert usage.image_tokens > 0
    assert set(found["timings"]) == {"preprocess_ms", "vision_ms", "prefill_ms", "decode_ms_per_token"}
    assert all(value > 0 for value in found["timings"].values())
    assert expected.logprobs is not None
    for step, token_id, (logprob, top) in zip(found["logprobs"], expected.token_ids, expected.logprobs, strict=True):
        assert (step["token_id"], step["logprob"]) == (token_id, pytest.approx(logprob, abs=1e-6))
        assert [pair["token_id"] for pair in step["top"]] == [other for other, _ in top]
        assert len(top) == 2
    swapped = answer(bundle, "--prompt", QUESTION, "--image", pictures[1], "--image", pictures[0], "--logprobs", 0)
    assert swapped["logprobs"][0]["logprob"] != found["logprobs"][0]["logprob"]


def test_text_streamed_or_not_is_the_same(bundle: Path, engine: Engine) -> None:
    expected = engine.generate(QUESTION, sampling=sampling()).text + "\n"
    for flags in ((), ("--stream",), ("--no-stream",)):
        result = run(bundle, "--prompt", QUESTION, *SHORT, *flags)
        assert (result.exit_code, result.stdout, result.stderr) == (0, expected, "")


def test_json_without_logprobs_has_none(bundle: Path) -> None:
    assert "logprobs" not in answer(bundle, "--prompt", QUESTION)


def test_every_sampling_parameter_has_an_option() -> None:
    values = SamplingParams(
        temperature=0.5,
        top_k=3,
        top_p=0.75,
        min_p=0.25,
        repetition_penalty=1.5,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias={7: -100.0, 9: 1.5},
        seed=2**64 - 1,
        stop=("one", " two\n"),
        stop_token_ids=(3, 4),
        min_new_tokens=2,
        max_new_tokens=5,
    )
    seen: list[SamplingParams] = []

    @click.command()
    @sampling_options
    def command(sampling: SamplingParams) -> None:
        seen.append(sampling)

    args = ["--logit-bias", "9=1.5", "--logit-bias=7=-100", "--stop", "one", "--stop", " two\n"]
    args += ["--stop-token-id", "3", "--stop-token-id", "4"]
    for field in fields(values):
        if field.name not in ("logit_bias", "stop", "stop_token_ids", "logprobs"):
            assert getattr(values, field.name) != field.default
            args += [f"--{field.name.replace('_', '-')}", str(getattr(values, field.name))]
    for arguments, expected in ((args, values), ([], SamplingParams())):
        result = CliRunner().invoke(command, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        assert seen.pop() == expected


def test_same_seed_same_answer(bundle: Path) -> None:
    args = (bundle, "--prompt", QUESTION, "--temperature", 2, "--max-new-tokens", 40, "--seed")
    one, again, other = (run(*args, seed, "--json") for seed in (1, 1, 2))
    ids = [json.loads(result.stdout)["token_ids"] for result in (one, again, other)]
    assert ids[0] == ids[1] != ids[2]


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_a_prompt_from_stdin_loses_its_last_newline(bundle: Path, engine: Engine, end: bytes) -> None:
    text = "Größe?\n\nzwei"
    expected = engine.generate(text, raw=True, sampling=sampling())
    found = answer(bundle, "--raw", "--prompt", "-", stdin=text.encode() + end)
    assert found["usage"]["prompt_tokens"] == expected.usage.prompt_tokens
    assert found["token_ids"] == list(expected.token_ids)


def test_raw_text_is_continued(bundle: Path, engine: Engine, pictures: tuple[Path, Path]) -> None:
    text = "<|image|>A picture of"
    expected = engine.generate(text, images=pictures[:1], raw=True, sampling=sampling())
    found = answer(bundle, "--raw", "--prompt", text, "--image", pictures[0])
    assert found["token_ids"] == list(expected.token_ids)
    assert found["usage"]["prompt_tokens"] == expected.usage.prompt_tokens


def test_special_tokens_in_a_prompt_are_text(bundle: Path, engine: Engine) -> None:
    text = "What does <|image|> mean?<|eot_id|>"
    expected = engine.generate(text, sampling=sampling())
    assert answer(bundle, "--prompt", text)["usage"]["prompt_tokens"] == expected.usage.prompt_tokens > len(text) // 2


def test_messages_name_pictures_relative_to_their_file(
    bundle: Path, engine: Engine, pictures: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def messages(*images: object) -> list[dict[str, Any]]:
        first, second, third = ({"type": "image", "image": image} for image in images)
        return [
            {"role": "user", "content": [first, {"type": "text", "text": "What is this?"}]},
            {"role": "assistant", "content": "Red."},
            {"role": "user", "content": [second, third, {"type": "text", "text": "And these?"}]},
        ]

    red, blue = pictures
    file = tmp_path / "messages.json"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    file.write_text(json.dumps(messages("red.png", str(blue), None)))
    expected = engine.generate(messages(red, blue, red), system="Be brief.", sampling=sampling(logprobs=0))
    found = answer(bundle, "--messages", file, "--image", red, "--system", "Be brief.", "--logprobs", 0)
    assert found["token_ids"] == list(expected.token_ids)
    assert expected.logprobs is not None
    assert found["logprobs"][0]["logprob"] == pytest.approx(expected.logprobs[0][0], abs=1e-6)


def test_a_bundle_anywhere(bundle: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "mein Bündel 模型"
    shutil.copytree(bundle, elsewhere)
    assert answer(elsewhere, "--prompt", QUESTION) | {"timings": 0} == answer(bundle, "--prompt", QUESTION) | {
        "timings": 0
    }


def biased(engine: Engine, text: str) -> tuple[str, ...]:
    """Options that make the model say one token for ever."""
    (token_id,) = engine.tokenizer.encode(text, special=False)
    return ("--logit-bias", f"{token_id}=100", "--verify", "quick", "--threads", "1")


def test_text_is_exact_in_a_pipe(bundle: Path, engine: Engine) -> None:
    assert run(bundle, "--prompt", "Hi", "--max-new-tokens", 3, *biased(engine, "\x1b")).stdout == "\x1b\x1b\x1b\n"


def test_a_character_that_stdout_lacks_is_no_reason_to_fail(bundle: Path, engine: Engine) -> None:
    token_id = engine.tokenizer.backend.token_to_id("ÿ")  # the byte 0xff, which never is a character
    args = (bundle, "--prompt", "Hi", "--max-new-tokens", 2, "--logit-bias", f"{token_id}=100")
    assert run(*args).stdout == "\ufffd\ufffd\n"
    result = run(*args, charset="latin-1")
    assert (result.exit_code, result.stdout_bytes) == (0, b"??\n")


def test_on_a_terminal(bundle: Path, engine: Engine, pictures: tuple[Path, Path]) -> None:
    """Streamed, with a summary; and nothing the model says can move the cursor."""
    with Terminal(
        *("generate", bundle, "--prompt", "Hi", "--image", pictures[0], "--max-new-tokens", 3),
        *biased(engine, "\x1b"),
    ) as terminal:
        output, code = terminal.end()
    assert code == 0
    assert output.startswith("loading the bundle ...\r")
    text, _, summary = output.rpartition("\r")[2].partition("\n")
    assert text == "\\x1b" * 3
    assert summary.startswith("mllama: ")
    assert "image tokens read in" in summary
    assert "; 3 tokens written at " in summary
    assert summary.endswith("per second, cut off at the length limit\n")


def test_ctrl_c_keeps_the_text(bundle: Path, engine: Engine) -> None:
    args = ("generate", bundle, "--prompt", "Hi", "--max-new-tokens", 10**9, *biased(engine, "s"))
    with Terminal(*args) as terminal:
        terminal.until("sss")  # it is streamed, or this would take hours
        terminal.send("\x03")
        output, code = terminal.end()
    assert code == 130
    text, *rest = output.replace("^C", "").splitlines()
    assert set(text) <= {"s"}
    assert rest == ["mllama: interrupted"]


def process(*args: object) -> subprocess.Popen[bytes]:
    script = "from mllama_runtime.cli import main; main()"
    command = [sys.executable, "-c", script, "generate", *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize(("event", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (None, 141)])
def test_signals_and_closed_pipes(bundle: Path, engine: Engine, event: signal.Signals | None, code: int) -> None:
    args = (bundle, "--prompt", "Hi", "--stream", "--max-new-tokens", 10**9, *biased(engine, "s"))
    with process(*args) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        assert running.stdout.read(3) == b"sss"
        if event is None:
            running.stdout.close()
        else:
            running.send_signal(event)
        error = running.stderr.read()
        assert running.wait(timeout=60) == code
    assert error == (b"mllama: interrupted\n" if event == signal.SIGINT else b"")


def test_closed_streams_are_no_reason_to_fail(bundle: Path) -> None:
    script = "from mllama_runtime.cli import main; main()"
    command = [sys.executable, "-c", script, "generate", str(bundle), "--prompt", "Hi", *SHORT]
    done = subprocess.run(["sh", "-c", '"$@" <&- >&-', "sh", *command], stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, b"")


def png_claiming(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.fixture
def files(tmp_path: Path, engine: Engine, pictures: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to be in, with a bundle and files that are wrong in one way each.

    Stand-in: "bundle" is an engine that is open already; to load one for every mistake would take most of the time.
    """

    @contextmanager
    def opened(bundle: Path, **options: Any) -> Iterator[Engine]:
        with nullcontext(engine) if bundle == Path("bundle") else open_engine(bundle, **options) as used:
            yield used

    monkeypatch.setattr(generate_module, "open_engine", opened)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "cut.png").write_bytes(pictures[0].read_bytes()[:-20])
    (tmp_path / "bomb.png").write_bytes(png_claiming(65535, 65535))
    (tmp_path / "nothing.png").touch()
    contents = {
        "text": "no json",
        "object": '{"role": "user", "content": "Hi"}',
        "string": '"Hi"',
        "empty": "[]",
        "role": '[{"role": "boss", "content": "Hi"}]',
        "number": '[{"role": "user", "content": [{"type": "image", "image": 7}]}]',
        "url": '[{"role": "user", "content": [{"type": "image", "image": "https://example.org/cat.png"}]}]',
        "absent": '[{"role": "user", "content": [{"type": "image", "image": "absent.png"}]}]',
        "open": '[{"role": "user", "content": [{"type": "image"}]}]',
        "system": '[{"role": "system", "content": "A"}, {"role": "user", "content": "B"}]',
    }
    for name, text in contents.items():
        (tmp_path / f"{name}.json").write_text(text)
    return tmp_path


ASK = ("bundle", "--prompt", "Hi")

MISTAKES = [
    (("absent", "--prompt", "Hi"), 3, "absent: no such folder"),
    (("text.png", "--prompt", "Hi"), 3, "text.png"),
    (("folder", "--prompt", "Hi"), 3, "not a bundle"),
    (("", "--prompt", "Hi"), 3, "not a bundle"),
    (("bundle",), 2, "--prompt TEXT or --messages FILE"),
    ((*ASK, "--messages", "object.json"), 2, "--prompt and --messages"),
    (("bundle", "--messages", "system.json", "--raw"), 2, "--raw and --messages"),
    (("bundle", "--messages", "system.json", "--system", "C"), 2, "system.json"),
    ((*ASK, "--temperature", "abc"), 2, "--temperature"),
    ((*ASK, "--temperature", "-1"), 3, "temperature: sampling option refused"),
    ((*ASK, "--temperature", "nan"), 3, "temperature"),
    ((*ASK, "--top-p", "0"), 3, "top_p"),
    ((*ASK, "--top-p", "1.01"), 3, "top_p"),
    ((*ASK, "--max-new-tokens", "0"), 3, "max_new_tokens"),
    ((*ASK, "--max-new-tokens", "-1"), 3, "max_new_tokens"),
    ((*ASK, "--max-new-tokens", "1", "--min-new-tokens", "2"), 3, "min_new_tokens"),
    ((*ASK, "--stop", ""), 3, "stop"),
    ((*ASK, "--stop-token-id", "99999999"), 3, "stop_token_ids"),
    ((*ASK, "--logit-bias", "5"), 2, "'5' is not a token id, '=' and a number"),
    ((*ASK, "--logit-bias", "5=x"), 2, "--logit-bias"),
    ((*ASK, "--logit-bias", "5=1", "--logit-bias", "5=2"), 3, "each id once"),
    ((*ASK, "--seed", "-1"), 3, "seed"),
    ((*ASK, "--threads", "0"), 2, "--threads"),
    ((*ASK, "--backend", "gpu"), 2, "--backend"),
    (("bundle", "--prompt", ""), 3, "prompt: is empty"),
    (("bundle", "--prompt", " \n"), 3, "prompt: is empty"),
    (("bundle", "--prompt", "", "--raw"), 3, "prompt: is empty"),
    (("bundle", "--prompt", "\udcff"), 3, "--prompt"),
    (("bundle", "--prompt", "<|image|><|image|>Hi", "--raw", "--image", "red.png"), 3, "expected 2, found 1"),
    (("bundle", "--prompt", "Hi", "--raw", "--image", "red.png"), 3, "expected 0, found 1"),
    ((*ASK, "--raw", "--system", "Be brief."), 3, "system"),
    ((*ASK, "--image", "absent.png"), 3, "absent.png: cannot be read (No such file or directory)"),
    ((*ASK, "--image", ""), 3, "the path is empty"),
    ((*ASK, "--image", "folder"), 3, "folder: not a regular file"),
    ((*ASK, "--image", "text.png"), 3, "text.png: not a picture"),
    ((*ASK, "--image", "cut.png"), 3, "cut.png: the picture is damaged"),
    ((*ASK, "--image", "bomb.png"), 3, "bomb.png: too many pixels"),
    ((*ASK, "--image", "nothing.png"), 3, "nothing.png: the file is empty"),
    ((*ASK, "--image", "https://example.org/cat.png"), 3, "URLs are never fetched"),
    (("bundle", "--messages", "absent.json.json"), 3, "absent.json.json: cannot be read"),
    (("bundle", "--messages", "folder"), 3, "folder: cannot be read (Is a directory)"),
    (("bundle", "--messages", "text.json"), 3, "text.json: not JSON"),
    (("bundle", "--messages", "object.json"), 3, "object.json: messages: has the wrong form: expected a list"),
    (("bundle", "--messages", "string.json"), 3, "string.json: messages: has the wrong form"),
    (("bundle", "--messages", "empty.json"), 3, "empty.json: messages: is empty"),
    (("bundle", "--messages", "role.json"), 3, "role.json: messages[0].role: is unknown"),
    (("bundle", "--messages", "number.json"), 3, "number.json: messages[0].content[0].image"),
    (("bundle", "--messages", "url.json"), 3, "https://example.org/cat.png: URLs are never fetched"),
    (("bundle", "--messages", "absent.json"), 3, "absent.png: cannot be read"),
    (("bundle", "--messages", "open.json"), 3, "expected 1, found 0"),
    (("bundle", "--messages", "system.json", "--image", "red.png"), 3, "expected 0, found 1"),
]


@pytest.mark.parametrize(("args", "code", "message"), MISTAKES, ids=[" ".join(case[0])[:60] for case in MISTAKES])
def test_a_mistake_is_one_line(files: Path, args: tuple[str, ...], code: int, message: str) -> None:
    result = run(*args, "--verify", "quick", "--json")
    assert result.exit_code == code, result.output
    error = json.loads(result.stdout)["error"]
    assert error["exit_code"] == code
    assert message in error["message"]
    assert message in result.stderr
    lines = result.stderr.splitlines()
    assert lines[0].startswith(("mllama: error: ", "Usage: "))  # click shows the usage before what is wrong with it
    assert len(lines) == (1 if lines[0].startswith("mllama") else 4)


@pytest.mark.parametrize(
    ("args", "message"),
    [((*ASK, "--logprobs", "1"), "--logprobs needs --json"), ((*ASK, "--stream", "--json"), "--stream and --json")],
)
def test_options_that_exclude_each_other(files: Path, args: tuple[str, ...], message: str) -> None:
    result = run(*args)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"mllama: error: {message}")


def test_stdin_that_is_not_text(files: Path) -> None:
    result = run("bundle", "--prompt", "-", stdin=b"a\xff")
    assert (result.exit_code, result.stdout) == (3, "")
    assert result.stderr.startswith("mllama: error: the prompt on stdin: is not UTF-8")


def test_a_failure_while_streaming_ends_the_line(files: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Test double: the second token cannot be sampled, as when a model overflows."""
    from mllama_runtime.errors import GateError
    from mllama_runtime.sampling import Sampled, Sampler

    sample = Sampler.sample

    def fails(self: Sampler, logits: Any) -> Sampled:
        if self.num_generated:
            raise GateError("the model computed logits that cannot be sampled")
        return sample(self, logits)

    monkeypatch.setattr(Sampler, "sample", fails)
    result = run(*ASK, "--stream", *biased(engine, "s"))
    assert (result.exit_code, result.stdout) == (1, "s\n")
    assert result.stderr == "mllama: error: the model computed logits that cannot be sampled\n"


def test_an_old_bundle_is_warned_of_once(bundle: Path, tmp_path: Path) -> None:
    """Of schema version 3, whose vision states are wrong for the published weights; stdout has the answer alone."""
    old = tmp_path / "old"
    shutil.copytree(bundle, old)
    manifest = json.loads((old / "manifest.json").read_text())
    del manifest["vision_states"]
    (old / "manifest.json").write_text(json.dumps(manifest | {"schema_version": 3}))
    script = "from mllama_runtime.cli import main; main()"
    command = [sys.executable, "-c", script, "generate", old, "--prompt", "Hi", "--max-new-tokens", "2", "--json"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    assert done.stderr.count("an older mllama-deploy made this bundle") == 1
    assert json.loads(done.stdout)["text"]
