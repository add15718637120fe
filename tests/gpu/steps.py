"""`python -m gpu.steps OUT [STEP...]`: all steps in order, the run over them, and the table at the end; see run.sh.

These steps have never been run on a GPU; `silicon.sh` has. The runner, the arithmetic and the table are tested.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from gpu import beside, full, roofline, small
from gpu.environment import environment
from gpu.runner import Context, Step, run_one, run_steps
from gpu.table import table_from_results
from mllama_runtime.disk import write_whole

_USAGE = 2


def all_steps() -> list[Step]:
    return [*small.steps(), *roofline.steps(), *beside.steps(), *full.steps()]


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests/gpu/run.sh", description=__doc__)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("steps", nargs="*", metavar="STEP")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--only", metavar="STEP", help=argparse.SUPPRESS)  # a step's own process
    arguments = parser.parse_args()
    steps = all_steps()
    if arguments.list:
        print("\n".join(step.name for step in steps))
        return 0
    if arguments.out is None:
        parser.error("give a folder for the results")
    context = Context(arguments.out.resolve())
    if arguments.only:
        run_one(next(step for step in steps if step.name == arguments.only), context)
        return 0
    if unknown := set(arguments.steps) - {step.name for step in steps}:
        parser.error(f"no such step: {', '.join(sorted(unknown))}; --list shows them")
    return _run(steps, context, arguments.steps)


def _run(steps: list[Step], context: Context, names: list[str]) -> int:
    context.out.mkdir(parents=True, exist_ok=True)
    path, found = context.out / "environment.json", environment()
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        if before["gpu"] != found["gpu"]:
            was = before["gpu"]["name"]
            print(f"{context.out}: results of another GPU or driver ({was}): give another folder", file=sys.stderr)
            return _USAGE
    write_whole(path, json.dumps(found, indent=2).encode())

    def command(step: Step) -> list[str]:
        return [sys.executable, "-m", "gpu.steps", str(context.out), "--only", step.name]

    try:
        run_steps(steps, context, names, command)
    finally:
        results = [result for step in steps if (result := context.result(step.name))]
        table = table_from_results(found, results, roofline.copy_rate(context), roofline.product_rate(context))
        write_whole(context.out / "table.md", table.encode())
        print(context.out / "table.md")
    return 0


def _interruptible() -> int:
    try:
        return main()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(_interruptible())
