"""The miniature's questions as files are the ones that its accuracy is measured with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from mllama_runtime.evaluation.questions import task_from_jsonl
from PIL import Image

RECIPE = Path(__file__).parents[2] / "recipes" / "miniature"


@pytest.mark.parametrize("split", ["held_out", "calibration"])
def test_questions_are_those_of_the_split(split: str, pictures: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "a new" / "folder"
    command = [sys.executable, RECIPE / "task.py", folder, "--split", split, "--count", "12"]
    subprocess.run(command, check=True)
    task = task_from_jsonl(folder / "questions.jsonl")
    assert len(list(folder.iterdir())) == 13
    about_pictures = [each for each in task.questions if each.images]
    assert len(task.questions) - len(about_pictures) == (2 if split == "calibration" else 0)
    for found, example in zip(about_pictures, pictures.held_out(split, 12), strict=True):
        question = example.question
        assert (found.text, found.answers, found.group) == (question.question, (question.answer,), question.kind)
        with Image.open(found.images[0]) as image:
            assert np.array_equal(np.asarray(image), np.asarray(pictures.render(example.scene)))
    lines = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    assert {line["id"] for line in lines if line["image"]} <= set(pictures.SPLITS[split])
