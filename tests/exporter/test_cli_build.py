"""`mllama build` as a process: what it says, what `mllama inspect` shows of it, and what interrupting it leaves."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from mllama_runtime.bundle import Bundle
from mllama_runtime.cli import main

pytest.importorskip("tensorrt_rtx")

ARGS = ("--backend", "tensorrt-rtx", "--max-seq-len", "64", "--prefill-chunk", "16", "--max-batch", "1")
SAID = [
    "checking the bundle",
    "building the vision engine",
    "building the decoder engine",
    "building the greedy sampler's engine",
    "building the sampler's engine",
]


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def start(*args: object) -> subprocess.Popen[str]:
    script = "from mllama_runtime.cli import main; main()"
    command = [sys.executable, "-W", "default", "-c", script, "build", *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def folder(bundle_of: Callable[..., Path], tmp_path: Path) -> Path:
    return shutil.copytree(bundle_of("bf16"), tmp_path / "my bundle")


def test_a_build_and_what_inspect_shows(folder: Path) -> None:
    with start(folder, *ARGS, "--json", "--timing-cache", folder.parent / "unused") as process:
        stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    notice = (
        f"notice: TensorRT-RTX times nothing while it builds; --timing-cache {folder.parent / 'unused'} is not used"
    )
    assert stderr.splitlines() == [*SAID, notice]
    assert stdout.count("\n") == 1
    result = json.loads(stdout)
    assert (result["bundle"], result["already_built"]) == (str(folder), False)
    assert list(result["seconds"]) == ["checking", "vision", "decoder", "greedy", "sampler"]
    assert result["peak_memory_bytes"] > 0
    record = result["record"]

    again = run("build", folder, *ARGS)
    assert again.exit_code == 0, again.output
    assert again.stdout.splitlines()[0] == f"already built: {folder}/engines/{record['key']}"
    assert "    caches     8 caches updated in place" in again.stdout.splitlines()

    shown = run("inspect", folder)
    assert shown.exit_code == 0, shown.output
    words = [line.split() for line in shown.stdout.splitlines()]
    for expected in (
        f"engines {record['key'][:12]} (tensorrt-rtx)",
        f"engine {record['key'][:12]}",
        f"built by tensorrt-rtx {record['inputs']['version']}",
        "built for every GPU the back end supports",
        "limits batch 1, 64 tokens, chunks of 16, 4 tiles",
        "attention 6 attentions, each one kernel",
        "positions 4 attentions know which cache entries are written",
        "inputs all 18 inputs are used",
    ):
        assert expected.split() in words, shown.stdout
    assert any("20 attention" in line for line in shown.stdout.splitlines())  # six twice, and four twice for text
    assert json.loads(run("inspect", folder, "--json").stdout)["engines"] == [record]
    assert run("verify", folder).exit_code == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("times", [1, 2])
def test_an_interrupt_leaves_nothing(number: signal.Signals, code: int, times: int, folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    with start(folder, *ARGS) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.strip() == SAID[1]:
                for _ in range(times):  # the impatient press Ctrl-C again while the builder is stopping
                    process.send_signal(number)
                    time.sleep(0.02)
                break
        stderr = process.stderr.read()
        # Once all is cleaned up, the second signal ends the process itself: a shell says the same code.
        assert process.wait(timeout=60) in ((code, -number) if times > 1 else (code,)), stderr
    assert not any(word in stderr for word in ("Traceback", "FATAL"))
    assert sorted(folder.rglob("*")) == before


def test_after_a_kill_the_next_build_lands(folder: Path) -> None:
    with start(folder, *ARGS) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.strip() == SAID[2]:
                process.kill()
                break
    assert list((folder / "engines").iterdir()) != []
    Bundle.open(folder)
    result = run("build", folder, *ARGS)
    assert result.exit_code == 0, result.output
    (entry,) = Bundle.open(folder, full=True).manifest.engines
    assert len(entry.files) == 5


def test_a_missing_package_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mllama_runtime.backends.private_trt import tensorrt_from_backend

    tensorrt_from_backend.cache_clear()
    monkeypatch.setitem(sys.modules, "tensorrt", None)  # as if not installed
    result = run("build", folder, "--backend", "tensorrt")
    assert result.exit_code == 4
    message = 'tensorrt: TensorRT is not installed; run: pip install "mllama-deploy[trt]"'
    assert result.stderr.splitlines()[-1].startswith(f"mllama: error: {message}")


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("--backend", "tensorrt-rtx", "--max-seq-len", "200000"), 2, "longer than the model's positions"),
        (("--backend", "tensorrt-rtx", "--compute-capability", "9.9"), 2, "builds for no such GPU"),
        (("--backend", "cuda"), 2, "Invalid value for '--backend'"),
        ((), 2, "Missing option '--backend'"),
        (("--backend", "tensorrt-rtx", "--max-batch", "0"), 2, "0 is not in the range"),
    ],
)
def test_mistakes_are_one_line(args: tuple[str, ...], code: int, message: str, folder: Path) -> None:
    result = run("build", folder, *args)
    assert result.exit_code == code
    assert message in result.stderr.splitlines()[-1] or message in result.stderr
    assert run("build", folder.parent, *ARGS).exit_code == 3
