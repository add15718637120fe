"""Steps one after the other, each in a process of its own with a time limit; what each found is a JSON file.

A step whose file is there is not run again. One that fails, is too slow or lacks something leaves its reason in its
file, and the run goes on.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from mllama_runtime.disk import write_whole

Row = dict[str, Any]
"""What one line of a table is made from; `reason` says why a line has no figure."""
Status = Literal["done", "failed", "skipped", "timed out"]
STEP_SECONDS = 9 * 60
_GRACE_SECONDS = 20  # of these, for a step that is too slow to remove what it has half done
_MAX_REASON = 600  # characters


class SkipError(Exception):
    """A piece is missing; the text says which."""


class FailError(Exception):
    """What was run went wrong; the text says how."""


@dataclass(frozen=True, slots=True)
class Context:
    """Where a run keeps its results, and what steps leave for later ones."""

    out: Path

    @property
    def work(self) -> Path:
        return self.out / "work"

    def result(self, name: str) -> Result | None:
        """What a step has found; None if it was not run."""
        path = self.path(name)
        return Result(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None

    def path(self, name: str) -> Path:
        return self.out / "results" / f"{name}.json"

    def write(self, result: Result) -> None:
        path = self.path(result.step)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(asdict(result), indent=2).encode())


@dataclass(frozen=True, slots=True)
class Step:
    """One piece of a run. section: of the table. work: gives rows; raises SkipError, FailError, or anything."""

    name: str
    section: str
    work: Callable[[Context], list[Row]]


@dataclass(frozen=True, slots=True)
class Result:
    """A step's file."""

    step: str
    section: str
    status: Status
    seconds: float
    date: str
    reason: str | None
    rows: list[Row]


def run_steps(
    steps: Sequence[Step],
    context: Context,
    names: Sequence[str],
    command: Callable[[Step], list[str]],
    *,
    limit_seconds: float = STEP_SECONDS,
) -> None:
    """Run the named steps; without names, those that have no result. `command` is the process for a step."""
    chosen = [step for step in steps if step.name in names] if names else list(steps)
    for number, step in enumerate(chosen, start=1):
        if not names and context.result(step.name):
            continue
        print(f"[{number}/{len(chosen)}] {step.name} ...", file=sys.stderr, flush=True)
        context.path(step.name).unlink(missing_ok=True)
        began = time.monotonic()
        status, reason = _run(command(step), context.out / "logs" / f"{step.name}.log", limit_seconds)
        result = context.result(step.name)
        if result is None:  # the process could not write it itself
            result = _result(step, status, time.monotonic() - began, reason, [])
            context.write(result)
        print(f"    {result.status} in {result.seconds:.0f} s: {result.reason or 'ok'}", file=sys.stderr, flush=True)


def run_one(step: Step, context: Context) -> None:
    """The step itself, in its own process; whatever happens becomes its result."""
    began = time.monotonic()
    status: Status = "done"
    reason, rows = None, []
    try:
        rows = step.work(context)
    except SkipError as skipped:
        status, reason = "skipped", str(skipped)
    except Exception as error:
        traceback.print_exc()
        status, reason = "failed", str(error) if isinstance(error, FailError) else f"{type(error).__name__}: {error}"
    context.write(_result(step, status, time.monotonic() - began, reason, rows))


def _run(command: Sequence[str], log: Path, limit_seconds: float) -> tuple[Status, str]:
    """Run a process and everything it starts, at most so long."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(max(0.0, limit_seconds - _GRACE_SECONDS))
        except subprocess.TimeoutExpired:
            return "timed out", f"not done within {limit_seconds:.0f} s; see {log.name}"
        finally:
            _end(process)
    return "failed", f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}; see {log.name}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """The process and its children, which share its session: asked first, then not."""
    for number, seconds in ((signal.SIGTERM, _GRACE_SECONDS), (signal.SIGKILL, 1)):
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                os.killpg(process.pid, number)
            except ProcessLookupError:
                return
            process.poll()
            time.sleep(0.05)


def _result(step: Step, status: Status, seconds: float, reason: str | None, rows: list[Row]) -> Result:
    date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    short = None if reason is None else " ".join(reason.split())[:_MAX_REASON]
    return Result(step.name, step.section, status, round(seconds, 1), date, short, rows)
