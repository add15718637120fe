"""Questions with known answers, put to bundle and reference: the share of right answers, with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mllama_runtime.evaluation.intervals import wilson_interval
from mllama_runtime.evaluation.metrics import default_metric, metric_of
from mllama_runtime.evaluation.questions import Question as TaskQuestion
from mllama_runtime.evaluation.questions import task_from_jsonl

from mllama_exporter.validate.checks import Check
from mllama_exporter.validate.samples import Part, Sample

MAX_ANSWER_TOKENS = 128


@dataclass(frozen=True, slots=True)
class Question:
    """A task's question, and the prompt that puts it: its pictures, then its text."""

    task: TaskQuestion
    sample: Sample


def questions_from_jsonl(path: Path) -> list[Question]:
    """Read a task as `mllama eval` does.

    Raises:
        InputError: naming the line that is wrong, or whose picture is absent.
    """
    tasks = task_from_jsonl(path).questions
    metric_of(default_metric(tasks), tasks, where=path)  # refuses what could not be scored at the end
    return [question_from_task(each) for each in tasks]


def question_from_task(each: TaskQuestion) -> Question:
    content: list[Part] = [{"type": "image"} for _ in each.images]
    content.append({"type": "text", "text": each.prompt})
    return Question(each, Sample(each.id, [{"role": "user", "content": content}], each.images))


def accuracy_check(
    questions: Sequence[Question], found: Sequence[str], reference: Sequence[str], max_drop: float
) -> Check:
    """The bundle's accuracy against the reference's on the same questions: at most `max_drop` below it.

    An answer is right as `mllama eval` has it by default: one of those accepted, or the letter of a right option.
    """
    right, reference_right = (_num_right(questions, answers) for answers in (found, reference))
    total = len(questions)
    shares = " and ".join(
        f"{who} {count}/{total} (95% interval {low:.3f} to {high:.3f})"
        for who, count in (("bundle", right), ("reference", reference_right))
        for low, high in [wilson_interval(count, total)]
    )
    return Check("task_accuracy", right / total, reference_right / total - max_drop, at_least=True, detail=shares)


def _num_right(questions: Sequence[Question], answers: Sequence[str]) -> int:
    tasks = [question.task for question in questions]
    score = metric_of(default_metric(tasks), tasks)
    return sum(score(answer, task) == 1 for task, answer in zip(tasks, answers, strict=True))
