"""`mllama eval`: how many questions does a bundle answer right, and is it fewer than before?"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import click

from mllama_runtime.cli import example, json_option
from mllama_runtime.cli.answers import engine_options, open_engine
from mllama_runtime.disk import disk_faults, write_whole
from mllama_runtime.errors import InputError
from mllama_runtime.evaluation.asking import AskOptions, answers_from_engine
from mllama_runtime.evaluation.metrics import METRIC_NAMES, MetricName, default_metric, metric_of
from mllama_runtime.evaluation.questions import task_from_jsonl
from mllama_runtime.evaluation.result import Difference, Result, difference, require_same_questions, result_from_answers
from mllama_runtime.fields import Prose, printable, to_plain
from mllama_runtime.tokenizer import checked_text

_DEFAULTS = AskOptions()
_EXAMPLE = example(
    "mllama eval my-bundle --task recipes/miniature/pictures/questions.jsonl",
    "mllama eval my-bundle --task chartqa.jsonl --metric relaxed --output fp16.json",
    "mllama eval my-int8-bundle --task chartqa.jsonl --metric relaxed --baseline fp16.json",
)


@click.command(epilog=_EXAMPLE)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--task",
    "task_file",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help='The questions, one JSON object a line: {"image": path or null, "question", "answer"}; or "images": [...], '
    '"answers": [...]; with "options": [...] for a multiple choice; perhaps "id" and "group".',
)
@click.option(
    "--metric",
    type=click.Choice(METRIC_NAMES),
    help="exact; relaxed: numbers within 5%, as ChartQA; anls: edit distance, as DocVQA; vqa: answers of ten people, "
    "as VQAv2; choice: the letter of an option, as MMMU and AI2D. By default choice if every question has options, "
    "otherwise exact.",
)
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Ask the first N questions only.")
@click.option(
    "--batch",
    type=click.IntRange(1, 1024),
    default=_DEFAULTS.batch,
    show_default=True,
    metavar="N",
    help="Questions answered together; more need more memory.",
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(1),
    default=_DEFAULTS.max_new_tokens,
    show_default=True,
    metavar="N",
    help="End an answer after N tokens.",
)
@click.option("--system", metavar="TEXT", help="A system message, put before every question.")
@click.option(
    "--baseline",
    "baseline_file",
    type=click.Path(path_type=Path),
    metavar="RESULT",
    help="The result of another run on the same questions: show the difference, with its interval.",
)
@click.option("--output", type=click.Path(path_type=Path), metavar="RESULT", help="Keep the result as a JSON file.")
@engine_options
@json_option
def command(
    bundle: Path,
    task_file: Path,
    metric: str | None,
    limit: int | None,
    batch: int,
    max_new_tokens: int,
    system: str | None,
    baseline_file: Path | None,
    output: Path | None,
    as_json: bool,
    **engine_arguments: Any,
) -> None:
    """Ask BUNDLE the questions of a file, and score its answers from 0 to 1, with a 95% confidence interval."""
    task = task_from_jsonl(task_file, limit=limit)
    name = cast(MetricName, metric) if metric else default_metric(task.questions)
    score = metric_of(name, task.questions, where=task_file)
    baseline = None
    if baseline_file is not None:
        baseline = Result.from_file(baseline_file)
        require_same_questions(baseline, baseline_file, task, name)
    if output is not None:
        _require_writable(output)
    options = AskOptions(
        system=None if system is None else Prose(checked_text(system, "--system")),
        max_new_tokens=max_new_tokens,
        batch=batch,
    )
    with open_engine(bundle, **engine_arguments) as engine:
        start = time.perf_counter()
        with _progress(len(task.questions)) as advance:
            answers = answers_from_engine(engine, task.questions, options, advance)
        seconds = time.perf_counter() - start
        scores = [score(answer, question) for answer, question in zip(answers, task.questions, strict=True)]
        result = result_from_answers(engine, task, metric=name, answers=answers, scores=scores, options=options)
    if output is not None:
        with disk_faults(output):
            write_whole(output, result.to_json())
    change = None if baseline is None else difference(result, baseline)
    click.echo(_json(result, change, seconds) if as_json else _text(result, baseline, change, seconds))


def _require_writable(path: Path) -> None:
    """Said before hours of work, and not after them."""
    if path.is_dir():
        raise InputError("is a folder", where=path, expected="a file to write")
    if not os.access(path.parent, os.W_OK):
        raise InputError("cannot be written: its folder is absent or read-only", where=path)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, otherwise a line after every tenth of the questions, on stderr."""
    if sys.stderr.isatty():
        with click.progressbar(length=total, label="eval", show_pos=True, file=sys.stderr) as bar:
            yield bar.update
        return
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        before, done = done, done + count
        if before * 10 // total < done * 10 // total:
            click.echo(f"eval: {done} of {total} questions", err=True)

    yield advance


def _json(result: Result, change: Difference | None, seconds: float) -> str:
    value = cast(dict[str, Any], to_plain(result))
    value |= {"seconds": round(seconds, 3), "questions_per_second": round(len(result.questions) / seconds, 3)}
    if change is not None:
        value["difference"] = asdict(change)
    return json.dumps(value)


def _text(result: Result, baseline: Result | None, change: Difference | None, seconds: float) -> str:
    rows = [("group", "score", "questions")] if result.groups else []
    rows += [(name, f"{group.score:.2%}", f"{group.num_questions}") for name, group in result.groups.items()]
    rows += [("all", f"{result.score:.2%}", f"{len(result.questions)}")]
    width = max(len(name) for name, _, _ in rows)
    lines = [f"{name:<{width}}  {score:>8}  {count:>9}" for name, score, count in rows]
    low, high = result.interval
    bundle = f"{result.bundle} ({_kind(result)}, {result.backend})"
    lines.append(
        f"{bundle}: {result.metric} {result.score:.2%} (95% {result.interval_kind} interval {low:.2%} to {high:.2%})"
    )
    if baseline is not None and change is not None:
        low, high = (100 * end for end in change.interval)
        lines.append(
            f"against {baseline.bundle} ({_kind(baseline)}, {baseline.score:.2%}): {100 * change.score:+.2f} points "
            f"(95% paired {change.interval_kind} interval {low:+.2f} to {high:+.2f}); "
            f"{change.num_scores_changed} scores changed"
        )
    lines.append(
        f"{len(result.questions)} questions in {seconds:.1f} s, {len(result.questions) / seconds:.1f} a second"
    )
    return "\n".join(printable(line) for line in lines)


def _kind(result: Result) -> str:
    return f"{result.precision}, {result.mask_semantics} mask, {result.vision_states} vision states"
