"""Steps on the miniature: whether a back end runs at all, the tests that take a GPU, the verdict of every precision."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from functools import partial
from pathlib import Path

from gpu.command import mllama, snapshot
from gpu.environment import environment
from gpu.runner import Context, FailError, Row, SkipError, Step
from mllama_runtime.manifest import Precision

ROOT = Path(__file__).parents[2]
MINIATURE = ROOT / "recipes" / "miniature"
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "bf16", "int8-weight", "int8", "fp8", "int4")
BACKENDS = ("tensorrt", "tensorrt-rtx", "cuda")
_NUM_CALIBRATION = 128  # questions: what the tests calibrate the miniature on
_LIMITS = ("--max-batch", 4, "--max-seq-len", 2048, "--max-tiles", 8)  # what the samples of `mllama validate` need


def need_backend(backend: str) -> None:
    """Raises SkipError, saying what to install."""
    if missing := environment()["backends"][backend]["missing"]:
        raise SkipError(missing)


def steps() -> list[Step]:
    return [
        *(Step(f"runs-{backend}", "Does it run", partial(_runs, backend)) for backend in BACKENDS),
        Step("tests", "Tests", _tests),
        Step("miniature", "Miniature", _miniature),
        *(
            Step(f"validate-{backend}-{precision}", "Validation", partial(_validate, backend, precision))
            for backend in BACKENDS
            for precision in PRECISIONS
        ),
    ]


def _runs(backend: str, context: Context) -> list[Row]:
    """The first question of all: yes or no, and the error."""
    need_backend(backend)
    folder = context.work / f"runs-{backend}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    picture = MINIATURE / "pictures" / "shapes-2x1.png"
    ask = ("--prompt", "How many shapes are there?", "--image", picture)
    row: Row = {"backend": backend, "runs": False, "at": "export", "reason": None}
    try:
        mllama("export", MINIATURE / "checkpoint", folder / "bundle", "--dtype", "fp16")
        expected = mllama("generate", folder / "bundle", *ask, "--backend", "cpu")
        if backend != "cuda":
            row["at"] = "build"
            mllama("build", folder / "bundle", "--backend", backend, *_LIMITS)
        row["at"] = "generate"
        found = mllama("generate", folder / "bundle", *ask, "--backend", backend)
        if found["text"] != expected["text"]:
            raise FailError(f"it answers {found['text']!r}, and the CPU {expected['text']!r}")
        row |= {"runs": True, "at": "", "answer": found["text"]}
    except FailError as fault:
        row["reason"] = str(fault)
    shutil.rmtree(folder)
    return [row]


def _tests(context: Context) -> list[Row]:
    report = context.out / "logs" / "tests.xml"
    report.parent.mkdir(parents=True, exist_ok=True)
    options = ("-m", "gpu", "-q", "--continue-on-collection-errors", "-p", "no:cacheprovider", f"--junitxml={report}")
    report.unlink(missing_ok=True)
    done = subprocess.run([sys.executable, "-m", "pytest", *options, ROOT / "tests"], cwd=ROOT, check=False)
    if not report.exists():
        raise FailError(f"pytest gave no report: exit code {done.returncode}")
    return rows_from_junit(report.read_text(encoding="utf-8"))


def rows_from_junit(text: str) -> list[Row]:
    """A row of totals, and one for each test that did not pass."""
    rows: list[Row] = [{"test": "all", "passed": 0, "failed": 0, "skipped": 0, "reason": None}]
    for case in ElementTree.fromstring(text).iter("testcase"):
        faults = [child for child in case if child.tag in ("failure", "error", "skipped")]
        outcome = "passed" if not faults else "skipped" if faults[0].tag == "skipped" else "failed"
        rows[0][outcome] += 1
        if faults:
            name = f"{case.get('classname')}::{case.get('name')}"
            rows.append({"test": name, "outcome": outcome, "reason": faults[0].get("message", "")[:300]})
    return rows


def _miniature(context: Context) -> list[Row]:
    """The miniature's bundle in every precision; those that are there already stay."""
    folder, rows = context.work / "miniature", list[Row]()
    questions = folder / "calibration" / "questions.jsonl"
    if not questions.exists():
        task = [MINIATURE / "task.py", questions.parent, "--split", "calibration", "--count", str(_NUM_CALIBRATION)]
        subprocess.run([sys.executable, *task], check=True)
    for precision in PRECISIONS:
        bundle = folder / precision
        row: Row = {"precision": precision, "reason": None}
        try:
            if bundle.exists():
                pass
            elif precision in ("fp32", "fp16", "bf16"):
                mllama("export", MINIATURE / "checkpoint", bundle, "--dtype", precision)
            else:
                data = () if precision == "int8-weight" else ("--calibration", questions)
                mllama("quantize", folder / "fp16", bundle, "--scheme", precision, *data)
        except FailError as fault:
            row["reason"] = str(fault)
        rows.append(row)
    return rows


def _validate(backend: str, precision: Precision, context: Context) -> list[Row]:
    need_backend(backend)
    made = context.work / "miniature" / precision
    if not made.exists():
        raise SkipError(f"there is no {precision} bundle of the miniature: see the step miniature")
    bundle = snapshot(made, context.work / "validated")
    try:
        if backend != "cuda":
            mllama("build", bundle, "--backend", backend, *_LIMITS)
        reference = ("--reference", MINIATURE / "checkpoint")
        report = mllama("validate", bundle, *reference, "--backend", backend)
    finally:
        shutil.rmtree(bundle)
    checks = {check["name"]: check for check in report["checks"]}
    shown = ("teacher_forced_top1", "teacher_forced_kl_mean", "generation_identical", "num_nonfinite")
    (context.out / "reports").mkdir(exist_ok=True)
    path = context.out / "reports" / f"{backend}-{precision}.json"
    path.write_text(json.dumps(report), encoding="utf-8")
    return [
        {
            "backend": report["backend"],
            "precision": precision,
            "verdict": report["verdict"],
            "summary": report["summary"],
            "report": os.path.relpath(path, context.out),
            **{name: checks[f"device_{name}"]["value"] for name in shown},
            "reason": None if report["verdict"] == "pass" else report["summary"],
        }
    ]
