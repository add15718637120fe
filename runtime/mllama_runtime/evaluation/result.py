"""The file that keeps an evaluation: every answer with its score, their mean, and how they came about.

Schema version 1. The same run gives the same bytes: sorted keys, no timestamps, no durations. Reports read it to show
the accuracy of several precisions side by side.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mllama_runtime import __version__
from mllama_runtime.config import MaskSemantics, VisionStates
from mllama_runtime.engine import Engine
from mllama_runtime.errors import InputError
from mllama_runtime.evaluation.asking import AskOptions
from mllama_runtime.evaluation.intervals import Interval, IntervalKind, mean_interval, paired_interval
from mllama_runtime.evaluation.metrics import MetricName
from mllama_runtime.evaluation.questions import Task
from mllama_runtime.fields import Prose, dump_json, load_json, parse, show
from mllama_runtime.manifest import Precision

SCHEMA_VERSION = 2  # 1 had no vision_states, and was of bundles that take them as transformers 4.56 does
_ROUNDING = 1e-9
_TOOLS = ("numpy", "onnxruntime", "onnxruntime-gpu", "pillow", "tokenizers")


@dataclass(frozen=True, slots=True)
class TaskInfo:
    """Which questions: the file's name and SHA-256, and how many of them were asked, from the first on."""

    name: str
    sha256: str
    num_questions: int


@dataclass(frozen=True, slots=True)
class GroupScore:
    """The mean score of the questions of one group."""

    score: float
    num_questions: int


@dataclass(frozen=True, slots=True)
class Answered:
    """What was answered to one question, and what it is worth, from 0 to 1."""

    id: str
    answer: Prose
    score: float


@dataclass(frozen=True, slots=True)
class Result:
    """A bundle's score on a task; `interval` is the 95% confidence interval of `score`, from 0 to 1."""

    bundle: str
    precision: Precision
    mask_semantics: MaskSemantics
    vision_states: VisionStates
    backend: str
    metric: MetricName
    task: TaskInfo
    score: float
    interval: tuple[float, float]
    interval_kind: IntervalKind
    groups: Mapping[str, GroupScore]
    questions: tuple[Answered, ...]
    options: AskOptions
    tools: Mapping[str, str]
    schema_version: int = SCHEMA_VERSION

    @classmethod
    def from_file(cls, path: Path) -> Result:
        """Read and check a result. Raises InputError naming file and field."""
        try:
            data = path.read_bytes()
        except OSError as error:
            raise InputError("cannot be read", where=path, found=error.strerror) from error
        value = load_json(data, where=path, error=InputError)
        if isinstance(value, dict) and value.get("schema_version") == 1 and type(value["schema_version"]) is int:
            value = {"vision_states": "transformers-4.56", **value, "schema_version": SCHEMA_VERSION}
        version = value.get("schema_version", SCHEMA_VERSION) if isinstance(value, dict) else SCHEMA_VERSION
        if type(version) is int and version != SCHEMA_VERSION:
            where, hint = f"{path}: schema_version", "run `mllama eval` again"
            raise InputError("unknown version", where=where, expected=SCHEMA_VERSION, found=show(version), hint=hint)
        result = parse(cls, value, where=path, error=InputError)
        _check(result, path)
        return result

    def to_json(self) -> bytes:
        """The file's bytes, the same for equal results."""
        return dump_json(self)


@dataclass(frozen=True, slots=True)
class Difference:
    """Two results on the same questions: the mean of score minus baseline's, and its interval over the questions."""

    score: float
    interval: tuple[float, float]
    interval_kind: IntervalKind
    num_scores_changed: int


def result_from_answers(
    engine: Engine,
    task: Task,
    *,
    metric: MetricName,
    answers: Sequence[str],
    scores: Sequence[float],
    options: AskOptions,
) -> Result:
    """What an engine answered to a task, scored, as a result."""
    manifest, values = engine.bundle.manifest, np.array(scores, np.float64)
    interval, tools = mean_interval(values), {"mllama-deploy": __version__}
    for name in _TOOLS:
        with suppress(importlib.metadata.PackageNotFoundError):
            tools[name] = importlib.metadata.version(name)
    return Result(
        bundle=manifest.name,
        precision=manifest.precision,
        mask_semantics=manifest.mask_semantics,
        vision_states=manifest.vision_states,
        backend=engine.backend_name,
        metric=metric,
        task=TaskInfo(task.name, task.sha256, len(task.questions)),
        score=float(values.mean()),
        interval=(interval.low, interval.high),
        interval_kind=interval.kind,
        groups=_groups(task, values),
        questions=tuple(
            Answered(question.id, Prose(answer), float(score))
            for question, answer, score in zip(task.questions, answers, scores, strict=True)
        ),
        options=options,
        tools=tools,
    )


def require_same_questions(baseline: Result, where: Path, task: Task, metric: MetricName) -> None:
    """Raises InputError unless the baseline, read from `where`, answers these questions, scored by this metric."""
    asked = TaskInfo(task.name, task.sha256, len(task.questions))
    for field, expected, found in (
        ("metric", metric, baseline.metric),
        ("task.sha256", asked.sha256, baseline.task.sha256),
        ("task.num_questions", asked.num_questions, baseline.task.num_questions),
    ):
        if expected != found:
            hint = "a baseline answers the same questions, scored by the same metric"
            raise InputError("another task", where=f"{where}: {field}", expected=expected, found=found, hint=hint)


def difference(result: Result, baseline: Result) -> Difference:
    """How far a result is from a baseline; see `require_same_questions`."""
    scores, before = _scores(result), _scores(baseline)
    interval: Interval = paired_interval(scores, before)
    changed = int((scores != before).sum())
    return Difference(float((scores - before).mean()), (interval.low, interval.high), interval.kind, changed)


def _groups(task: Task, scores: NDArray[np.float64]) -> dict[str, GroupScore]:
    rows: dict[str, list[int]] = {}
    for index, question in enumerate(task.questions):
        if question.group is not None:
            rows.setdefault(question.group, []).append(index)
    return {group: GroupScore(float(scores[chosen].mean()), len(chosen)) for group, chosen in sorted(rows.items())}


def _scores(result: Result) -> NDArray[np.float64]:
    return np.array([question.score for question in result.questions], np.float64)


def _check(result: Result, where: Path) -> None:
    """What the types of the fields do not say."""

    def need(right: bool, what: str, field: str, *, expected: object = None, found: object = None) -> None:
        if not right:
            raise InputError(what, where=f"{where}: {field}", expected=expected, found=found)

    scores, (low, high) = _scores(result), result.interval
    need(len(scores) > 0, "no questions", "questions")
    need(bool(((scores >= 0) & (scores <= 1)).all()), "a score is out of range", "questions", expected="0 to 1")
    ids = {question.id for question in result.questions}
    need(len(ids) == len(scores), "an id stands twice", "questions")
    num_questions = result.task.num_questions
    need(num_questions == len(scores), "not all are there", "questions", expected=num_questions, found=len(scores))
    mean = float(scores.mean())
    need(abs(result.score - mean) < _ROUNDING, "not the mean of the scores", "score", expected=mean, found=result.score)
    ends = (0.0, low, result.score, high, 1.0)
    right = all(before <= after + _ROUNDING for before, after in pairwise(ends))
    need(
        right,
        "impossible interval",
        "interval",
        expected="ends from 0 to 1, around the score",
        found=f"{low} to {high}",
    )
    for name, group in result.groups.items():
        right = 0 <= group.score <= 1 and 0 < group.num_questions <= num_questions
        need(right, "impossible group", f"groups[{show(name)}]")
