"""`tests/gpu/run.sh` as far as it goes without a GPU: its refusal, the runner on fake steps, sizes, the table."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from gpu import full, small
from gpu.command import mllama, need_disk, snapshot
from gpu.environment import environment
from gpu.runner import Context, FailError, Result, Row, SkipError, Step, run_one, run_steps
from gpu.steps import all_steps
from gpu.table import table_from_results
from mllama_runtime.backends.private_trt import gpu_compute_capabilities
from mllama_runtime.bundle import Bundle

RUN = Path(__file__).parent / "gpu" / "run.sh"
needs_no_gpu = pytest.mark.skipif(bool(gpu_compute_capabilities()), reason="there is a GPU")


@needs_no_gpu
@pytest.mark.parametrize("steps", [(), ("tests",)])
def test_without_a_gpu_it_says_so_at_once(steps: tuple[str, ...], tmp_path: Path) -> None:
    done = subprocess.run([RUN, tmp_path / "out", *steps], capture_output=True, text=True, timeout=2, check=False)
    assert done.returncode == 4
    assert done.stdout == ""
    assert done.stderr == "tests/gpu/run.sh: no NVIDIA GPU, or no driver for it: nothing was run\n"
    assert not (tmp_path / "out").exists()


def test_the_steps_have_names_that_can_be_files() -> None:
    names = [step.name for step in all_steps()]
    assert len(set(names)) == len(names)
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-") for name in names)
    assert names[:3] == ["runs-tensorrt", "runs-tensorrt-rtx", "runs-cuda"]
    for backend in ("tensorrt", "tensorrt-rtx", "cuda"):
        for precision in ("fp32", "fp16", "bf16", "int8-weight", "int8", "fp8", "int4"):
            assert f"validate-{backend}-{precision}" in names
            assert f"11b-{precision}-bundle" in names


# The runner, on fake steps.


def fake(name: str, rows: list[Row] | None = None, error: Exception | None = None) -> Step:
    def work(context: Context) -> list[Row]:
        if error is not None:
            raise error
        return rows or []

    return Step(name, "Fakes", work)


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (None, "done", None),
        (SkipError("there is\nno such thing"), "skipped", "there is no such thing"),
        (FailError("mllama build: error"), "failed", "mllama build: error"),
        (ValueError("seven"), "failed", "ValueError: seven"),
    ],
)
def test_whatever_a_step_does_is_its_result(
    error: Exception | None, status: str, reason: str | None, tmp_path: Path
) -> None:
    context = Context(tmp_path)
    run_one(fake("one", [{"what": "copy"}], error), context)
    result = context.result("one")
    assert (result.status, result.reason, result.section) == (status, reason, "Fakes")
    assert result.rows == ([] if error else [{"what": "copy"}])


def processes(context: Context, **scripts: str):
    """Steps and the command for each: a line of Python in the place of the step's own process."""
    write = f"import json; from pathlib import Path; results = Path({str(context.out / 'results')!r}); "
    steps = [fake(name) for name in scripts]
    return steps, lambda step: [sys.executable, "-c", write + scripts[step.name]]


DONE = (
    "results.mkdir(parents=True, exist_ok=True); "
    "(results / '{0}.json').write_text(json.dumps(dict(step='{0}', section='Fakes', status='done', seconds=1.0, "
    "date='', reason=None, rows=[dict(run={1})])))"
)


def test_a_run_goes_on_whatever_happens_and_is_resumed(tmp_path: Path) -> None:
    context = Context(tmp_path)
    steps, command = processes(
        context,
        breaks="raise SystemExit(3)",
        dies="import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        works=DONE.format("works", 1),
    )
    run_steps(steps, context, [], command)
    found = {name: context.result(name) for name in ("breaks", "dies", "works")}
    assert [result.status for result in found.values()] == ["failed", "failed", "done"]
    assert found["breaks"].reason == "exit code 3; see breaks.log"
    assert found["dies"].reason == "ended by SIGKILL"

    steps, command = processes(
        context, breaks=DONE.format("breaks", 2), dies=DONE.format("dies", 2), works=DONE.format("works", 2)
    )
    context.path("dies").unlink()
    run_steps(steps, context, [], command)  # what has a result is left alone, a failure too
    assert [context.result(name).status for name in ("breaks", "dies", "works")] == ["failed", "done", "done"]
    assert context.result("works").rows == [{"run": 1}]
    run_steps(steps, context, ["breaks"], command)  # unless it is named
    assert context.result("breaks").rows == [{"run": 2}]
    assert context.result("works").rows == [{"run": 1}]


def test_a_slow_step_ends_with_all_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked to end first, so that it can remove what is half done."""
    monkeypatch.setattr("gpu.runner._GRACE_SECONDS", 2)
    context, child = Context(tmp_path), tmp_path / "child"
    script = (
        "import subprocess, sys, signal; "
        f"subprocess.Popen(['bash', '-c', 'trap \"touch {child}; exit\" TERM; touch {child}.up; "
        "while true; do sleep 0.05; done']).wait()"
    )
    steps, command = processes(context, slow=script, next=DONE.format("next", 1))
    run_steps(steps, context, [], command, limit_seconds=4)
    slow = context.result("slow")
    assert (slow.status, slow.reason) == ("timed out", "not done within 4 s; see slow.log")
    assert child.with_name("child.up").exists()
    assert child.exists()
    assert context.result("next").status == "done"


# What the steps stand on.


@needs_no_gpu
def test_the_environment_says_what_is_missing() -> None:
    found = environment()
    json.dumps(found)
    assert found["compute_capability"] is None
    assert found["packages"]["numpy"]
    assert set(found["backends"]) == {"tensorrt", "tensorrt-rtx", "cuda"}
    for each in found["backends"].values():
        assert (each["version"] is None) != (each["missing"] is None)
    assert "onnxruntime-gpu" in found["backends"]["cuda"]["missing"]
    with pytest.raises(SkipError, match="onnxruntime-gpu"):
        small.need_backend("cuda")


def test_a_command_that_fails_is_quoted(tmp_path: Path, bundle_of) -> None:
    with pytest.raises(FailError, match=r"mllama inspect: .*absent: no such folder"):
        mllama("inspect", tmp_path / "absent")
    assert mllama("inspect", bundle_of())["manifest"]["precision"] == "fp32"


def test_a_snapshot_is_a_bundle_of_the_same_files(tmp_path: Path, bundle_of) -> None:
    made = bundle_of()
    try:
        copy = snapshot(made, tmp_path / "copy")
    except OSError:
        pytest.skip("the temporary folder is on two file systems")
    assert Bundle.open(copy, full=True).manifest == Bundle.open(made).manifest
    assert (copy / "weights.safetensors").samefile(made / "weights.safetensors")


def test_a_small_disk_is_told_with_the_arithmetic(tmp_path: Path) -> None:
    need_disk(tmp_path / "new", 1, "nothing to speak of")
    with pytest.raises(SkipError, match=r"engines take 1000000 GB, [0-9]+ GB are free"):
        need_disk(tmp_path, 1e15, "engines")


@pytest.mark.parametrize(
    ("name", "precision", "gigabytes"),
    [
        ("11b", "bf16", 21.3),
        ("11b", "fp32", 42.7),
        ("11b", "int8", 12.1),
        ("11b", "int4", 7.6),
        ("90b", "int4", 48.6),
    ],
)
def test_sizes(name: str, precision: str, gigabytes: float) -> None:
    """Two bytes a parameter; quantised, those of the decoder's matrices, 9.3e9 of the 11B model's 10.7e9."""
    model = next(each for each in full.MODELS if each.name == name)
    assert abs(model.bundle_bytes(precision) / 1e9 / gigabytes - 1) < 0.03


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8-weight"])
def test_sizes_are_those_of_bundles(precision: str, bundle_of) -> None:
    bundle = Bundle.open(bundle_of(precision))
    model = full.Model("miniature", bundle.manifest.model, ())
    real = bundle.manifest.files["weights.safetensors"].size_bytes
    assert abs(model.bundle_bytes(precision) / real - 1) < 0.03


def test_what_a_gpu_cannot_hold() -> None:
    small_one, large = full.MODELS
    assert full.beyond_memory(small_one, "bf16", 64, 80 * 10**9) is None
    assert full.beyond_memory(large, "int4", 1, 80 * 10**9) is None
    reason = full.beyond_memory(large, "fp8", 1, 80 * 10**9)
    assert reason.startswith("fp8 weights 9")
    assert reason.endswith("the GPU has 80 GB")


def test_calibration_of_the_large_model_is_beyond_memory() -> None:
    with pytest.raises(SkipError, match=r"fp8 is calibrated on the CPU, in float32, in two sessions: 709 GB"):
        full._need_memory(full.MODELS[1], "fp8")
    full._need_memory(full.MODELS[1], "int4")


def test_a_junit_report_is_counted() -> None:
    text = """<testsuites><testsuite>
        <testcase classname="a" name="good"/>
        <testcase classname="a" name="bad"><failure message="assert 1 == 2">...</failure></testcase>
        <testcase classname="b" name="left"><skipped message="no GPU"/></testcase>
        <testcase classname="c" name=""><error message="collection failure"/></testcase>
    </testsuite></testsuites>"""
    rows = small.rows_from_junit(text)
    assert rows[0] == {"test": "all", "passed": 1, "failed": 2, "skipped": 1, "reason": None}
    assert [(row["test"], row["reason"]) for row in rows[1:]] == [
        ("a::bad", "assert 1 == 2"),
        ("b::left", "no GPU"),
        ("c::", "collection failure"),
    ]


def result(step: str, section: str, *rows: Row, status: str = "done", reason: str | None = None) -> Result:
    return Result(step, section, status, 1.0, "2026-01-01", reason, list(rows))


def test_the_table_has_every_figure_with_its_share_and_every_gap_with_its_reason() -> None:
    """On numbers made up for it."""
    engine = {"precision": "fp16", "backend": "tensorrt", "max_batch": 64}
    decode = {**engine, "kind": "decode", "what": "decode, batch 4", "batch": 4, "num_tiles": 4, "num_tokens": 512}
    results = [
        result(
            "runs-tensorrt", "Does it run", {"backend": "tensorrt", "runs": True, "answer": "two | 2", "reason": None}
        ),
        result("runs-cuda", "Does it run", {"backend": "cuda", "runs": False, "at": "build", "reason": "no kernel"}),
        result("tests", "Tests", {"test": "all", "passed": 9, "failed": 0, "skipped": 1, "reason": None}),
        result(
            "roofline",
            "Roofline",
            {"what": "copy", "unit": "bytes/s", "rate": 4e12, "reason": None},
            {"what": "fp8", "unit": "operations/s", "rate": None, "reason": "no such kernel"},
        ),
        result(
            "bench",
            "11B",
            {**decode, "seconds": 0.01, "read_bytes": 20 * 10**9, "tokens_per_second": 400.0, "reason": None},
            {**decode, "seconds": None, "reason": "too many rows"},
            {**engine, "kind": "first token", "num_tiles": 1, "num_tokens": 128, "seconds": 0.05, "flops": 2 * 10**13},
        ),
        result("90b-a", "90B", status="skipped", reason="no room"),
        result("90b-b", "90B", status="skipped", reason="no room"),
        result("90b-c", "90B", status="timed out", reason="too slow"),
    ]
    found = {
        "date": "2026-01-01",
        "gpu": {"name": "GPU X", "driver_version": "600.1", "memory.total": "80000 MiB"},
        "compute_capability": "9.0",
        "cuda": "13.0",
        "backends": {"tensorrt": {"version": "11.0", "missing": None}, "cuda": {"version": None, "missing": "gone"}},
        "packages": {"torch": "2.11"},
    }
    lines = table_from_results(found, results, copy_rate=4e12, product_rate=8e14).splitlines()
    assert lines[0] == "# GPU X, 2026-01-01"
    assert lines[2] == (
        "Driver 600.1, CUDA 13.0, compute capability 9.0, 80000 MiB of memory. Back ends: tensorrt 11.0. "
        "Packages: torch 2.11."
    )
    assert "Steps: 5 done, 0 failed, 1 timed out, 2 skipped." in lines
    for line in (
        "| tensorrt | yes | two \\| 2 |",
        "| cuda | no | at build: no kernel |",
        "| 9 | 0 | 1 |",
        "| copy | 4.00 TB/s |",
        "| fp16 | tensorrt | 64 | 4 | 512 | 4 tiles | 400.0 | 10.00 | 2000 | 50% |",
        "| fp16 | tensorrt | 64 | 128 | 1 tiles | 50.00 | 50% |",
        "| roofline | fp8 | no such kernel |",
        "| bench | decode, batch 4 | too many rows |",
        "| 90b-a, 90b-b | skipped | no room |",
        "| 90b-c | timed out | too slow |",
    ):
        assert lines.count(line) == 1, line
    without = table_from_results(found, results, copy_rate=None, product_rate=None)
    assert without.count("| not measured |") == 2
