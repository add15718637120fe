"""What an answer is worth, from 0 to 1: the metrics of the benchmarks that the model card reports."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Literal, get_args

from mllama_runtime.errors import InputError
from mllama_runtime.evaluation.choice import chosen_letter
from mllama_runtime.evaluation.questions import Question
from mllama_runtime.evaluation.vqa import NUM_PEOPLE, vqa_accuracy

MetricName = Literal["exact", "relaxed", "anls", "vqa", "choice"]
METRIC_NAMES: tuple[MetricName, ...] = get_args(MetricName)

RELAXED_TOLERANCE = 0.05
ANLS_THRESHOLD = 0.5
_NUMBER = re.compile(r"[+-]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)%?", re.ASCII)


def exact(answer: str, accepted: Sequence[str]) -> float:
    """1 when the answer is an accepted one, but for case and the blanks around it."""
    return float(_key(answer) in map(_key, accepted))


def relaxed(answer: str, accepted: Sequence[str]) -> float:
    """Relaxed accuracy of ChartQA: a number within 5% of an accepted one is right; other answers as in `exact`.

    Masry et al. 2022, section 5.1 (https://arxiv.org/abs/2203.10244), after Methani et al. 2020
    (https://arxiv.org/abs/1909.00997). As in the usual implementations a percent sign divides by 100, so "52%" is
    not "52"; commas between thousands are passed over; of zero, only zero is within 5%.
    """
    return float(any(_is_close(answer, other) for other in accepted) or exact(answer, accepted))


def anls(answer: str, accepted: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity of DocVQA: 1 - distance / longer length, and 0 where below 0.5.

    The best over the accepted answers, in lower case, runs of blanks as one. Biten et al. 2019, equation 1
    (https://arxiv.org/abs/1905.13648). A similarity of exactly 0.5 counts, as in the challenge's own script
    (https://rrc.cvc.uab.es/?ch=17), where the equation has 0. There surplus blanks count in the longer length, here not
    at all.
    """
    return max(_similarity(" ".join(answer.lower().split()), " ".join(other.lower().split())) for other in accepted)


def metric_of(
    name: MetricName, questions: Sequence[Question], *, where: object = "task"
) -> Callable[[str, Question], float]:
    """The function that scores an answer to one of the questions; `where` is the file they are from, for errors.

    Raises:
        InputError: naming the first question that the metric cannot score.
    """
    for question in questions:
        place = f"{where}: {question.id}"
        if name == "choice" and not question.options:
            raise InputError("has no options", where=place, hint="the metric choice is for multiple choice")
        if name != "choice" and question.options:
            raise InputError("has options", where=place, hint="multiple choice is scored by the metric choice")
        if name == "vqa" and len(question.answers) != NUM_PEOPLE:
            found = f"{len(question.answers)} answers"
            raise InputError(
                "is not a VQA question", where=place, expected=f"answers of {NUM_PEOPLE} people", found=found
            )
    if name == "choice":
        return lambda answer, question: float(chosen_letter(answer, question.options) in question.answers)
    score = {"exact": exact, "relaxed": relaxed, "anls": anls, "vqa": vqa_accuracy}[name]
    return lambda answer, question: score(answer, question.answers)


def default_metric(questions: Sequence[Question]) -> MetricName:
    """`choice` where every question has options, otherwise `exact`."""
    return "choice" if all(question.options for question in questions) else "exact"


def _key(text: str) -> str:
    return text.strip().casefold()


def _is_close(answer: str, accepted: str) -> bool:
    found, expected = _number(answer), _number(accepted)
    if found is None or expected is None:
        return False
    return abs(found - expected) <= RELAXED_TOLERANCE * abs(expected)


def _number(text: str) -> float | None:
    text = text.strip()
    if not _NUMBER.fullmatch(text):
        return None
    value = float(text.replace(",", "").removesuffix("%"))
    return value / 100 if text.endswith("%") else value


def _similarity(found: str, expected: str) -> float:
    longer = max(len(found), len(expected))
    if longer == 0:
        return 1.0
    if min(len(found), len(expected)) < ANLS_THRESHOLD * longer:  # the distance is the difference in length at least
        return 0.0
    similarity = 1 - edit_distance(found, expected) / longer
    return similarity if similarity >= ANLS_THRESHOLD else 0.0


def edit_distance(first: str, second: str) -> int:
    """Levenshtein's distance: insertions, deletions and replacements of a character that turn one into the other."""
    row = list(range(len(second) + 1))  # of the part of `first` read so far to every beginning of `second`
    for count, letter in enumerate(first, start=1):
        diagonal, row[0] = row[0], count
        for index, other in enumerate(second, start=1):
            diagonal, row[index] = row[index], min(row[index] + 1, row[index - 1] + 1, diagonal + (letter != other))
    return row[-1]
