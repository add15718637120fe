"""The command: exit codes, one line an error, lazy verbs, and the two verbs that look at bundles."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import click
import mllama_runtime.cli as cli
import pytest
from click.testing import CliRunner, Result
from mllama_runtime.bundle import Bundle
from mllama_runtime.cli import VERBS, Verb, example, json_option, main
from mllama_runtime.errors import BundleError, EnvironmentFault, GateError, MllamaError, ResourceError, UsageError
from mllama_runtime.manifest import Validation

from ._bundle import make_bundle


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "bundle")


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def test_inspect_shows_everything(folder: Path) -> None:
    verdict = Validation("pass", "reports/validation.json", 3, 0, "the model")
    bundle = Bundle.open(folder).stamp(verdict, {"reports/validation.json": b"{}"})
    result = run("inspect", folder)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == "fake"
    words = [line.split() for line in lines]
    for expected in (
        "precision fp32",
        "mask semantics hf",
        "vision states published (before each listed block, as Llama 3.2 Vision was trained)",
        "source hf, 2 tensors, 32 parameters",
        "validation pass: 0 of 3 checks failed against the model; see reports/validation.json",
        "heads x size 1 x 64 3 x 64",
        "cross-attention 1, 3",
        "graph decoder: decoder.onnx",
        "in past_key_* float32 [batch, 1, 64] x 3",
        "out y float32 [batch, 4]",
        f"LICENSE 11 bytes {bundle.manifest.files['LICENSE'].sha256[:12]}",
    ):
        assert expected.split() in words, result.stdout
    sizes = [
        line for line in lines if line.endswith(tuple(entry.sha256[:12] for entry in bundle.manifest.files.values()))
    ]
    assert len({line.index(" bytes") for line in sizes}) == 1  # aligned


def test_inspect_json_is_the_manifest(folder: Path) -> None:
    result = run("inspect", folder, "--json")
    shown = json.loads(result.stdout)
    assert shown["manifest"] == json.loads((folder / "manifest.json").read_bytes())
    assert shown["bundle"] == str(folder)
    assert shown["total_size_bytes"] == sum(entry["size_bytes"] for entry in shown["manifest"]["files"].values())


def test_a_hostile_name_cannot_write_to_the_terminal(folder: Path) -> None:
    (folder / "evil\x1b[2J\n").touch()
    result = run("verify", folder)
    assert result.exit_code == 1
    assert "evil\\x1b[2J\\n: not listed" in result.stdout


def test_verify_passes_a_whole_bundle(folder: Path) -> None:
    for mode in ("--full", "--quick"):
        result = run("verify", folder, mode)
        assert result.exit_code == 0
        assert result.stdout.count("\n") == 1
        assert f"5 files, {mode[2:]} check" in result.stdout
        assert "all as exported" in result.stdout
        assert result.stderr == ""


def test_verify_names_each_wrong_file(folder: Path) -> None:
    (folder / "LICENSE").unlink()
    (folder / "new").touch()
    result = run("verify", folder)
    assert result.exit_code == GateError.exit_code == 1
    assert result.stdout.splitlines()[:2] == [
        "LICENSE: missing: expected 11 bytes",
        "new: not listed in the manifest: found a file",
    ]
    assert "2 problems" in result.stdout
    shown = json.loads(run("verify", folder, "--json").stdout)
    assert shown["ok"] is False
    assert shown["problems"][0] == {"path": "LICENSE", "what": "missing", "expected": "11 bytes", "found": None}


@pytest.mark.parametrize("verb", ["inspect", "verify"])
def test_bad_input_is_one_line_and_exit_3(tmp_path: Path, verb: str) -> None:
    result = run(verb, tmp_path / "absent")
    assert result.exit_code == BundleError.exit_code == 3
    assert result.stderr == f"mllama: error: {tmp_path}/absent: no such folder\n"
    assert result.stdout == ""


def test_bad_input_with_json(tmp_path: Path) -> None:
    make_bundle(tmp_path / "b")
    (tmp_path / "b/manifest.json").write_text("{}")
    result = run("verify", "--json", tmp_path / "b")
    assert result.exit_code == 3
    error = json.loads(result.stdout)["error"]
    assert error["type"] == "BundleError"
    assert error["exit_code"] == 3
    assert error["where"] == f"{tmp_path}/b/manifest.json: name"
    assert error["what"] == "the field is missing"
    assert result.stderr == f"mllama: error: {error['message']}\n"


def test_usage_errors_exit_2() -> None:
    for args in (["nope"], ["verify"], ["verify", "x", "--nope"], ["verify", "x", "y"]):
        result = run(*args)
        assert result.exit_code == UsageError.exit_code == 2
        assert "Error: " in result.stderr
        assert result.stdout == ""
    result = run("verify", "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["error"]["type"] == "MissingParameter"


def test_help_and_version() -> None:
    result = run("--help")
    assert result.exit_code == 0
    for name, verb in VERBS.items():
        assert f"  {name} " in result.stdout
        assert verb.help in result.stdout
    assert run("--version").stdout == "mllama, version 0.1.0\n"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_an_example_and_json(verb: str) -> None:
    result = run(verb, "--help")
    assert result.exit_code == 0, result.output
    assert f"  mllama {verb} " in result.stdout
    assert "--json" in result.stdout or verb == "chat"  # chat is for people alone


def failing(fault: BaseException) -> click.Command:
    """A verb that does nothing but raise."""

    @click.command(epilog=example("mllama fail"))
    @json_option
    def command(as_json: bool) -> None:
        raise fault

    return command


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch) -> object:
    """Runs a verb (a test double) that raises what it is given."""

    def run_failing(fault: BaseException, *args: str) -> Result:
        monkeypatch.setattr(cli, "_double", failing(fault), raising=False)
        monkeypatch.setitem(VERBS, "fail", Verb("mllama_runtime.cli:_double", "Fail.", "export"))
        return run("fail", *args)

    return run_failing


class UnusualError(MllamaError):
    exit_code = 42


@pytest.mark.parametrize(
    ("fault", "code", "line"),
    [
        (UnusualError("what", where="where", hint="do"), 42, "where: what; do"),
        (GateError("the gate"), 1, "the gate"),
        (ResourceError("no disk"), 5, "no disk"),
        (EnvironmentFault("no GPU"), 4, "no GPU"),
        (MemoryError(), 5, "out of memory"),
        (OSError(errno.ENOSPC, "No space", "/x/y"), 5, "/x/y: the disk is full; free some space, or write elsewhere"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 4, 'pip install "mllama-deploy[export]"'),
        (ImportError("libcuda.so: cannot open"), 4, "libcuda.so: cannot open"),
        (ModuleNotFoundError("No module", name="mllama_runtime.x"), 70, "internal error: ModuleNotFoundError"),
        (
            ValueError("two\nlines \x1b[2J"),
            70,
            "internal error: ValueError: two lines \\x1b[2J; set MLLAMA_TRACEBACK=1",
        ),
        (AssertionError(), 70, "internal error: AssertionError"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_every_failure_is_one_line_and_a_code(fail: object, fault: BaseException, code: int, line: str) -> None:
    result = fail(fault)
    assert result.exit_code == code
    assert line in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("mllama: ")
    assert "Traceback" not in result.stderr
    if code != 130:
        with_json = fail(fault, "--json")
        assert with_json.exit_code == code
        assert json.loads(with_json.stdout)["error"]["exit_code"] == code


def test_the_traceback_is_there_for_those_who_ask(fail: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLLAMA_TRACEBACK", "1")
    result = fail(ValueError("why"))
    assert result.exit_code == 70
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.endswith("mllama: error: internal error: ValueError: why\n")


def test_a_verb_whose_package_is_missing_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VERBS, "export", Verb("no_such_package.cli:command", "Export.", "export"))
    result = run("export", "--help")
    assert result.exit_code == EnvironmentFault.exit_code == 4
    assert 'pip install "mllama-deploy[export]"' in result.stderr
    assert "no_such_package" in result.stderr
    assert run("--help").exit_code == 0


def command_line(*args: object) -> list[str]:
    return [sys.executable, "-c", "from mllama_runtime.cli import main; main()", *map(str, args)]


def test_as_a_process(folder: Path) -> None:
    done = subprocess.run(command_line("verify", folder, "--json"), capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["ok"] is True
    assert done.stderr == ""
    (folder / "LICENSE").write_text("a licence.\n")
    done = subprocess.run(command_line("verify", folder), capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout.startswith("LICENSE: wrong content")


def test_a_full_stdout_is_one_line(folder: Path) -> None:
    with Path("/dev/full").open("w") as full:
        for verb, name, code in (("verify", folder, 5), ("verify", folder / "absent", 3), ("nosuch", folder, 2)):
            command = command_line(verb, name, "--json")
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
            assert done.returncode == code
            assert "Traceback" not in done.stderr
            assert done.stderr.count("rror: ") == 1


@pytest.mark.parametrize("write", ["click.echo('x')", "print('x')", "print('x' * 100_000)"])
def test_a_reader_that_goes_away_is_no_error(write: str) -> None:
    script = (
        f"import click, mllama_runtime.cli as cli; cli.double = click.command()(lambda: {write});"
        "cli.VERBS['write'] = cli.Verb('mllama_runtime.cli:double', 'Write.', 'cpu'); cli.main(['write'])"
    )
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = subprocess.Popen(
        [sys.executable, "-c", script], env=buffered, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 141
    process.stderr.close()


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys; from mllama_runtime.cli import main; main(['--help'], standalone_mode=False);"
        "print(*sorted({name.split('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.splitlines()[-1].split())
    heavy = {"numpy", "PIL", "onnxruntime", "tokenizers", "jinja2", "torch", "transformers", "onnx", "mllama_exporter"}
    assert "click" in loaded
    assert not loaded & heavy


VERB = """
import os, signal, sys, time
from pathlib import Path
import click
from mllama_runtime.bundle_writer import BundleWriter

@click.command()
@click.argument("output", type=click.Path(path_type=Path))
def command(output):
    with BundleWriter(output) as writer:
        (writer.path / "weights").write_bytes(b"w")
        print("ready", flush=True)
        time.sleep(60)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_removes_what_was_begun(tmp_path: Path, number: signal.Signals, code: int) -> None:
    (tmp_path / "slow_verb.py").write_text(VERB)
    (tmp_path / "out").mkdir()
    script = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from mllama_runtime.cli import VERBS, Verb, main;"
        "VERBS['slow'] = Verb('slow_verb:command', 'Be slow.', 'cpu'); main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, "slow", tmp_path / "out/b"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    assert len(list((tmp_path / "out").iterdir())) == 1
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in stderr
    assert list((tmp_path / "out").iterdir()) == []
