"""`mllama validate`: is the bundle still the model? A gate for pipelines: exit 1 when it is not."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import click
from mllama_runtime.backends import BACKENDS
from mllama_runtime.bundle import Bundle
from mllama_runtime.cli import example, json_option
from mllama_runtime.errors import GateError, InputError
from mllama_runtime.evaluation.result import Result
from mllama_runtime.fields import dump_json

_EXAMPLE = example(
    "mllama validate my-bundle --reference Llama-3.2-11B-Vision-Instruct",
    "mllama validate my-bundle --reference my-checkpoint --task questions.jsonl --json",
)


@click.command(epilog=_EXAMPLE)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--reference",
    required=True,
    metavar="CHECKPOINT",
    type=click.Path(path_type=Path),
    help="The checkpoint folder the bundle was exported from.",
)
@click.option(
    "--adapter", type=click.Path(path_type=Path), help="The LoRA adapter that was merged into it, for such a bundle."
)
@click.option(
    "--backend",
    type=click.Choice(BACKENDS),
    default="cpu",
    show_default=True,
    help="What runs the bundle. What each layer adds is measured on the CPU in any case.",
)
@click.option(
    "--task",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help='Questions to score both on, one JSON object a line: {"image": path or null, "question", "answer"}.',
)
@click.option(
    "--steps",
    "max_steps",
    type=click.IntRange(1, 1024),
    default=32,
    show_default=True,
    help="Tokens to generate for each built-in sample, at most.",
)
@click.option(
    "--accuracy",
    "accuracy_files",
    metavar="FILE",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A result of `mllama eval`, of this bundle or of another precision, to be shown side by side. Repeatable.",
)
@click.option("--layers", "with_layers", is_flag=True, help="Print the first-divergence table: every layer's error.")
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    bundle: Path,
    reference: Path,
    adapter: Path | None,
    backend: str,
    task: Path | None,
    max_steps: int,
    accuracy_files: tuple[Path, ...],
    with_layers: bool,
    as_json: bool,
) -> None:
    """Compare BUNDLE with its checkpoint in transformers, and stamp the verdict into the bundle.

    Preprocessing, tokens, every key, value and cache tensor, logits, decoding and generation are measured on built-in
    samples, and held to the thresholds of the bundle's precision. What every layer adds is measured too, so that a
    failure names the layer it begins in. The reports are reports/validation.json and, for people, validation.html.

    With the results of `mllama eval` for this bundle and for FP32 on the same task, the drop in accuracy is checked.

    A reference whose vision tower takes other states than the bundle is corrected, and the report says so: transformers
    4.55 and newer do not take those that the published weights were trained with.

    The reference is loaded in float32: 4 bytes of memory a parameter, 43 GB for the 11B model, 355 GB for the 90B one.
    It is freed before the bundle itself is loaded.
    """
    opened = Bundle.open(bundle)
    if not os.access(opened.root, os.W_OK):
        raise InputError("is read-only, and the verdict goes into it", where=opened.root, hint="validate a copy")
    click.echo("loading transformers", err=True)
    from mllama_exporter.validate import (
        PAGE_NAME,
        REPORT_NAME,
        page_from_report,
        questions_from_jsonl,
        report_from_bundle,
    )

    accuracy = [Result.from_file(path) for path in accuracy_files]
    questions = [] if task is None else questions_from_jsonl(task)
    report = report_from_bundle(
        opened,
        reference,
        adapter=adapter,
        backend=backend,
        task=questions,
        max_steps=max_steps,
        accuracy=accuracy,
        progress=_show,
    )
    plain = report.to_plain()
    opened.stamp(report.validation(), {REPORT_NAME: dump_json(plain), PAGE_NAME: page_from_report(plain)})
    if with_layers and not as_json:
        click.echo(f"{report.layers_to_text()}\n")
    click.echo(json.dumps(plain) if as_json else report.to_text())
    if report.failed:
        ctx.exit(GateError.exit_code)


def _show(step: str, done: int, total: int) -> None:
    """A line a step on stderr; on a terminal it counts."""
    if sys.stderr.isatty():
        click.echo(f"\r{step}: {done} of {total}", err=True, nl=done == total)
    elif done == 0:
        click.echo(f"{step}: {total} samples", err=True)
