"""Writes questions of a split as pictures and `questions.jsonl`, as `mllama eval` and `mllama quantize` read them.

They are the questions that `evaluate.py` asks: for `held_out`, figures can be compared with `RESULTS.json`. For
`calibration` every sixth line is a question about no picture, since the model is asked such questions too.
"""

import argparse
import json
import random
from pathlib import Path

from conversations import text_pairs
from pictures import SPLITS, held_out, render


def write_task(folder: Path, split: str, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines: list[dict[str, object]] = []
    texts = random.Random(split).sample(text_pairs(), len(text_pairs()))
    for example in held_out(split, count):
        name, question = f"{example.scene.seed}.png", example.question
        render(example.scene).save(folder / name)
        lines.append({
            "id": example.scene.seed, "image": name, "question": question.question, "answer": question.answer,
            "group": question.kind,
        })  # fmt: skip
        if split == "calibration" and len(lines) % 6 == 5:
            question, answer, _ = texts[len(lines) // 6 % len(texts)]
            lines.append({"id": f"text {len(lines)}", "image": None, "question": question, "answer": answer})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "questions.jsonl").write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--split", choices=[split for split in SPLITS if split != "train"], default="held_out")
    parser.add_argument("--count", type=int, default=2000, help="questions about pictures, one each")
    arguments = parser.parse_args()
    write_task(arguments.folder, arguments.split, arguments.count)


if __name__ == "__main__":
    main()
