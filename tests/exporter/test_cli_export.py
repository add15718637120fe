"""`mllama export`: one real export as a process, what it says while it works, and every mistake in one line."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from mllama_exporter.export import ExportOptions, Progress
from mllama_runtime.bundle import Bundle
from mllama_runtime.cli import main

STEPS = [
    "reading the checkpoint",
    "tracing the graphs",
    "writing the weights",
    "saving the bundle",
]


def run(*args: object) -> Result:
    return CliRunner().invoke(main, ["export", *map(str, args)])


def start(*args: object, warnings: str = "default") -> subprocess.Popen[str]:
    script = "from mllama_runtime.cli import main; main()"
    command = [sys.executable, "-W", warnings, "-c", script, "export", *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_whole_export(miniature: Path, tmp_path: Path) -> None:
    """Nothing but what is ours comes out, although every warning is shown; names may hold what they like."""
    output = tmp_path / "mein Bündel 模型"
    args = ("--dtype", "bf16", "--mask-semantics", "meta", "--vision-states", "transformers-4.56")
    args += ("--layers", "4", "--clamp", "--json")
    with start(miniature, output, *args, warnings="always") as process:
        stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert stderr.splitlines() == STEPS
    assert stdout.count("\n") == 1
    result = json.loads(stdout)

    bundle = Bundle.open(output)
    assert bundle.verify(full=True).problems == ()
    manifest = bundle.manifest
    assert (manifest.precision, manifest.mask_semantics, manifest.model.text.num_layers) == ("bf16", "meta", 4)
    assert manifest.vision_states == "transformers-4.56"
    assert dict(manifest.options) == {"num_layers": 4, "clamp": True, "adapter": None}

    seconds, peak = result.pop("seconds"), result.pop("peak_memory_bytes")
    assert result == {
        "bundle": str(output),
        "precision": "bf16",
        "mask_semantics": "meta",
        "vision_states": "transformers-4.56",
        "num_parameters": manifest.source.num_parameters,
        "num_clamped": 0,
        "num_files": len(manifest.files),
        "size_bytes": sum(path.stat().st_size for path in output.rglob("*") if path.name != "manifest.json"),
    }
    assert list(seconds) == ["reading", "tracing", "weights", "saving"]
    assert all(value >= 0 for value in seconds.values())
    assert 1e8 < peak < 1.5e9  # importing torch takes more than the one, the promise is the other
    assert list(tmp_path.iterdir()) == [output]


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch, bundle_of: Callable[..., Path]) -> list[tuple[Any, ...]]:
    """Test double: stands in for the exporter, notes what it is asked for and answers with a bundle made before."""
    calls: list[tuple[Any, ...]] = []
    bundle = Bundle.open(bundle_of())

    def instant(folder: Path, output: Path, options: ExportOptions, progress: Progress) -> Bundle:
        calls.append((folder, output, options))
        for step, total in (("tracing", 2), ("weights", 3_000_000), ("saving", 1)):
            for done in (0, total // 2, total):
                progress(step, done, total)
        return bundle

    monkeypatch.setattr("mllama_exporter.export.bundle_from_checkpoint", instant)
    return calls


def test_the_summary(exporter: list[tuple[Any, ...]], bundle_of: Callable[..., Path]) -> None:
    result = run("my checkpoint", "out")
    assert result.exit_code == 0, result.output
    assert exporter == [(Path("my checkpoint"), Path("out"), ExportOptions())]
    assert result.stderr.splitlines() == STEPS
    bundle = Bundle.open(bundle_of())
    lines = result.stdout.splitlines()
    assert lines[0] == str(bundle.root)
    assert lines[1] == f"  parameters  {bundle.manifest.source.num_parameters:,}"
    assert lines[2] == "  precision   fp32, hf mask semantics, published vision states"
    assert lines[3].startswith("  size        ")
    assert lines[3].endswith(f" MB in {len(bundle.manifest.files)} files")
    assert lines[4].startswith("  took        ")
    assert lines[5] == f"Next: mllama validate {bundle.root} --reference 'my checkpoint'"
    assert len(lines) == 6


SAVED_BY = {
    "published": ("4.45.0.dev0", (), None),
    "the last before the change": ("4.54.1", (), None),
    "the first after it": ("4.55.0", (), "transformers 4.55.0 saved this checkpoint last."),
    "saved today": ("5.23.0", (), "transformers 5.23.0 saved this checkpoint last."),
    "unknown": (None, (), None),
    "not a version": (["5.0"], (), None),
    "a very long one": ("5." + "9" * 5000, (), f"transformers 5.{24 * '9'} saved this checkpoint last."),
    "another format": ("main", (), None),
    "chosen": ("5.23.0", ("--vision-states", "published"), None),
    "an adapter": (
        "4.45.0.dev0",
        ("--adapter", "lora"),
        "no file says which transformers the adapter was",
    ),
    "an adapter, chosen": ("5.23.0", ("--adapter", "lora", "--vision-states", "transformers-4.56"), None),
}


@pytest.mark.parametrize(("version", "options", "expected"), SAVED_BY.values(), ids=SAVED_BY)
def test_who_saved_a_checkpoint_is_noticed(
    version: object, options: tuple[str, ...], expected: str | None, exporter: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"transformers_version": version} if version else {}))
    result = run(tmp_path, "out", *options)
    assert result.exit_code == 0, result.output
    notices = [line for line in result.stderr.splitlines() if line.startswith("notice: ")]
    if expected is None:
        assert not notices
    else:
        (notice,) = notices
        assert notice.startswith(f"notice: {expected}")
        assert notice.endswith("compare both with `mllama eval`; for those trained with 4.55, neither is.")
        assert "--vision-states transformers-4.56" in notice


def test_lowered_indices_are_noticed(exporter: list[tuple[Any, ...]], tmp_path: Path) -> None:
    """Whoever has repaired config.json for transformers 4.56 and newer wants its states."""
    vision = {"intermediate_layers_indices": [2, 6, 14, 22, 29]}
    (tmp_path / "config.json").write_text(json.dumps({"vision_config": vision, "transformers_version": "5.23.0"}))
    (notice,) = [line for line in run(tmp_path, "out").stderr.splitlines() if line.startswith("notice: ")]
    assert "one lower than published" in notice
    assert notice.endswith("Export with --vision-states transformers-4.56.")
    assert "notice: " not in run(tmp_path, "out", "--text-only").stderr
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / "params.json").write_text("{}")
    assert notice in run(tmp_path / "original", "out").stderr


BARS = """
import sys
from mllama_exporter.cli.export import _STEPS
from mllama_exporter.cli.steps import Steps
try:
    with Steps(_STEPS) as steps:
        steps("tracing", 0, 2)
        steps("tracing", 2, 2)
        for done in range(0, 1_500_001, 1000):
            steps("weights", done, 3_000_000)
        raise KeyError
except KeyError:
    print("after", file=sys.stderr)
"""


def test_bars_on_a_terminal() -> None:
    """Each step ends its line, the one that fails too; a bar shows bytes, and is not drawn for every block."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", BARS], stderr=theirs, env={**os.environ, "TERM": "dumb"})
    os.close(theirs)
    output = b""
    while data := _read(ours):
        output += data
    os.close(ours)
    assert process.wait(timeout=60) == 0
    lines = output.decode().split("\r\n")
    assert lines[0] == "reading the checkpoint"
    assert lines[3:] == ["after", ""]
    for line, label, share, amount in (
        (lines[1], "tracing the graphs ", "]  ", "2 of 2"),
        (lines[2], "writing the weights ", "]   50%  ", "1.5 MB of 3.0 MB"),
    ):
        assert line.endswith("\x1b[?25h")  # the cursor is back
        last_drawn = line.removesuffix("\x1b[?25h").rpartition("\r")[2].rstrip()
        assert last_drawn.startswith(f"\x1b[?25l{label}")
        assert share in last_drawn  # and the time left, once a second has passed
        assert last_drawn.endswith(amount)
        assert 1 < line.count(label) < 250  # it moves, and not for every block


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:  # EIO: the other side is closed
        return b""


def test_interrupted_while_tracing(miniature: Path, tmp_path: Path) -> None:
    # Python ignores ResourceWarning unless told otherwise; an import cut short by the signal leaves a file of its own.
    with start(miniature, tmp_path / "out", warnings="ignore::ResourceWarning") as process:
        assert process.stderr is not None
        while process.stderr.readline() != "tracing the graphs\n":
            assert process.poll() is None
        assert len(list(tmp_path.iterdir())) == 1
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == "mllama: interrupted\n"
        assert process.wait(timeout=60) == 130
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def files(miniature: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to be in: a checkpoint, a link to it, and outputs that are wrong in one way each."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(miniature, tmp_path / "checkpoint")
    (tmp_path / "link").symlink_to("checkpoint")
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    return tmp_path


MISTAKES = [
    (("checkpoint",), 2, "BUNDLE"),
    (("checkpoint", "out", "--dtype", "fp8"), 2, "--dtype"),
    (("checkpoint", "out", "--mask-semantics", "none"), 2, "--mask-semantics"),
    (("checkpoint", "out", "--vision-states", "4.56"), 2, "'published', 'transformers-4.56'"),
    (("checkpoint", "out", "--layers", "0"), 2, "--layers"),
    (("checkpoint", "out", "--layers", "1"), 2, "layers"),
    (("checkpoint", "out", "--layers", "99"), 2, "found 99"),
    (("absent", "out"), 3, "absent: no such folder"),
    (("file", "out"), 3, "file: no such folder"),
    (("full", "out"), 3, "full: no weights"),
    (("checkpoint", "checkpoint"), 3, "the checkpoint's own folder"),
    (("link", "checkpoint"), 3, "the checkpoint's own folder"),
    (("checkpoint", "link"), 3, "the checkpoint's own folder"),
    (("link", "checkpoint/new"), 3, "the checkpoint's own folder"),
    (("checkpoint", "full"), 3, "full: the output folder is not empty"),
    (("checkpoint", "file"), 3, "file: the output is a file"),
    (("checkpoint", "absent/out"), 3, "absent: no such folder to put the bundle in"),
    (("checkpoint", "/proc/out"), 3, "/proc/out: cannot be written"),
]


@pytest.mark.parametrize(("args", "code", "message"), MISTAKES, ids=[" ".join(case[0]) for case in MISTAKES])
def test_a_mistake_is_one_line(files: Path, args: tuple[str, ...], code: int, message: str) -> None:
    before = sorted(files.rglob("*"))
    result = run(*args, "--json")
    assert result.exit_code == code, result.output
    error = json.loads(result.stdout)["error"]
    assert error["exit_code"] == code
    assert message in error["message"]
    lines = [line for line in result.stderr.splitlines() if line not in STEPS]
    assert message in lines[-1]
    assert lines[0].startswith(("mllama: error: ", "Usage: "))  # click shows the usage before what is wrong with it
    assert len(lines) == (1 if lines[0].startswith("mllama") else 4)
    assert sorted(files.rglob("*")) == before


def test_a_package_that_is_missing_is_named(miniature: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "mllama_exporter.export")
    monkeypatch.setitem(sys.modules, "torch", None)
    result = run(miniature, tmp_path / "out")
    assert result.exit_code == 4
    assert result.stderr.splitlines()[-1].startswith("mllama: error: torch: a package is missing")
    assert 'pip install "mllama-deploy[export]"' in result.stderr
    assert list(tmp_path.iterdir()) == []
    assert run("--help").exit_code == 0


def test_help_needs_no_torch() -> None:
    script = "import sys; sys.modules['torch'] = None; from mllama_runtime.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", script, "export", "--help"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "mllama export " in done.stdout
