"""Writes the sample pictures and `questions.jsonl` of the demonstration, with the trained checkpoint at hand.

Pictures come from the `demo` seeds, in six canvas shapes. A question is kept when the checkpoint answers it right, so
that whoever runs the demonstration on another back end knows what to expect.
"""

import argparse
import json
import random
from pathlib import Path

from evaluate import Answerer, picture_question
from pictures import QUESTION_KINDS, SPLITS, Scene, ask, render, scene_from_seed

HERE = Path(__file__).parent
CANVASES = ((1, 1), (1, 2), (2, 1), (2, 2), (1, 4), (3, 1))
QUESTIONS_PER_PICTURE = 3


def sample_scene(canvas: tuple[int, int]) -> Scene:
    """The first demonstration scene of this canvas with three things or more, and large enough to look at."""
    min_height = 56 * canvas[0] if canvas == (1, 1) else 112 * canvas[0]
    for seed in SPLITS["demo"]:
        scene = scene_from_seed(seed)
        if scene.canvas == canvas and len(scene.things) >= 3 and scene.height >= min_height:
            return scene
    raise ValueError(f"no demonstration scene has the canvas {canvas}")


def write_samples(checkpoint: Path, folder: Path) -> None:
    answer = Answerer(checkpoint)
    kinds = list(QUESTION_KINDS)
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index, scene in enumerate(map(sample_scene, CANVASES)):
        image = render(scene)
        name = "shapes-{}x{}.png".format(*scene.canvas)
        image.save(folder / name, optimize=True)
        rng = random.Random(f"samples {scene.seed}")
        for turn in range(QUESTIONS_PER_PICTURE):
            wanted = kinds[(index * QUESTIONS_PER_PICTURE + turn) % len(kinds)]
            others = tuple(kind for kind in kinds if kind != wanted)
            question = QUESTION_KINDS[wanted](scene, rng) or ask(scene, rng, others)
            if answer(picture_question(question.question), image) == question.answer:
                lines.append({"image": name, "question": question.question, "answer": question.answer})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "questions.jsonl").write_text(text, encoding="utf-8")
    print(f"{len(lines)} questions about {len(CANVASES)} pictures in {folder}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=HERE / "checkpoint")
    parser.add_argument("--out", type=Path, default=HERE / "pictures")
    arguments = parser.parse_args()
    write_samples(arguments.checkpoint, arguments.out)


if __name__ == "__main__":
    main()
