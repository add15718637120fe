"""A file of questions with known answers: reading it, and the share of right answers with its confidence interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mllama_runtime.errors import InputError
from mllama_runtime.fields import load_json, parse

from mllama_exporter.validate.checks import Check
from mllama_exporter.validate.samples import Sample, question

MAX_ANSWER_TOKENS = 128
_Z = 1.96  # a normal distribution has 95% within so many standard deviations


@dataclass(frozen=True, slots=True)
class TaskLine:
    """One line of the file: a picture's path, relative to the file, or null; a question; the right answer."""

    image: str | None
    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Question:
    sample: Sample
    answer: str


def questions_from_jsonl(path: Path) -> list[Question]:
    """Read a task. Raises InputError naming the line that is wrong, or whose picture is absent."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise InputError("cannot be read", where=path, found=error.strerror) from error
    questions = []
    for number, data in enumerate(lines, start=1):
        if not data.strip():
            continue
        where = f"{path}, line {number}"
        line = parse(TaskLine, load_json(data, where=where, error=InputError), where=where, error=InputError)
        image = None if line.image is None else path.parent / line.image
        if image is not None and not image.is_file():
            raise InputError("no such picture", where=where, found=image)
        questions.append(Question(question(f"line {number}", line.question, image), line.answer))
    if not questions:
        raise InputError("holds no questions", where=path)
    return questions


def accuracy_check(
    questions: Sequence[Question], found: Sequence[str], reference: Sequence[str], max_drop: float
) -> Check:
    """The bundle's accuracy against the reference's on the same questions: at most `max_drop` below it."""
    right, reference_right = (_num_right(questions, answers) for answers in (found, reference))
    total = len(questions)
    shares = " and ".join(
        f"{who} {count}/{total} (95% interval {low:.3f} to {high:.3f})"
        for who, count in (("bundle", right), ("reference", reference_right))
        for low, high in [wilson_interval(count, total)]
    )
    return Check("task_accuracy", right / total, reference_right / total - max_drop, at_least=True, detail=shares)


def wilson_interval(num_right: int, total: int) -> tuple[float, float]:
    """Wilson's 95% confidence interval of a proportion (https://doi.org/10.1080/01621459.1927.10502953)."""
    share, spread = num_right / total, _Z * _Z / total
    middle = share + spread / 2
    half = _Z * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    return max(0.0, (middle - half) / (1 + spread)), min(1.0, (middle + half) / (1 + spread))


def _num_right(questions: Sequence[Question], answers: Sequence[str]) -> int:
    pairs = zip(questions, answers, strict=True)
    return sum(answer.strip().casefold() == each.answer.strip().casefold() for each, answer in pairs)
