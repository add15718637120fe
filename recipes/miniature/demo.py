"""From the miniature's checkpoint to right answers, with the commands a user would type: `make demo`."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
OUTPUT = ROOT / "out" / "demo"
BUNDLE = OUTPUT / "bundle"
MLLAMA = Path(sys.executable).with_name("mllama")


def mllama(*arguments: str | Path, quiet: bool = False) -> str:
    """Run one command as shown; its answer is returned, and printed unless quiet."""
    shown = [str(Path(a).relative_to(ROOT)) if str(a).startswith(str(ROOT)) else str(a) for a in arguments]
    print("\n$ " + shlex.join(["mllama", *(word for word in shown if word != "--json")]), flush=True)
    result = subprocess.run([MLLAMA, *map(str, arguments)], stdout=subprocess.PIPE, text=True, check=False)
    if not quiet:
        print(result.stdout, end="", flush=True)
    if result.returncode:
        sys.exit(result.returncode)
    return result.stdout


def main() -> None:
    """Export, validate, then ask every sample question and compare the answers."""
    shutil.rmtree(OUTPUT, ignore_errors=True)
    OUTPUT.mkdir(parents=True)
    mllama("export", HERE / "checkpoint", BUNDLE)
    mllama("validate", BUNDLE, "--reference", HERE / "checkpoint")
    questions = [json.loads(line) for line in (HERE / "pictures" / "questions.jsonl").read_text().splitlines()]
    right = 0
    for item in questions:
        picture = ["--image", HERE / "pictures" / item["image"]] if item["image"] else []
        output = mllama("generate", BUNDLE, *picture, "--prompt", item["question"], "--json", quiet=True)
        answer = json.loads(output)["text"].strip()
        right += answer == item["answer"]
        print(answer if answer == item["answer"] else f"{answer}   (wrong: {item['answer']})")
    pictures = {item["image"] for item in questions if item["image"]}
    print(f"\n{right} of {len(questions)} answers about {len(pictures)} pictures are right.")
    sys.exit(right < len(questions))


if __name__ == "__main__":
    main()
