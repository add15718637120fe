"""`mllama export`: a checkpoint folder in, a bundle out. torch and onnx are imported when the work begins."""

from __future__ import annotations

import json
import resource
import shlex
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import click
from mllama_runtime.bundle import Bundle
from mllama_runtime.cli import example, json_option
from mllama_runtime.fields import printable

_EXAMPLE = example(
    "mllama export Llama-3.2-11B-Vision-Instruct my-bundle --dtype bf16",
    "mllama export my-checkpoint my-bundle --layers 5 --json",
)
_STEPS = {
    "reading": "reading the checkpoint",
    "tracing": "tracing the graphs",
    "weights": "writing the weights",
    "saving": "saving the bundle",
}
_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


@click.command(epilog=_EXAMPLE)
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--dtype",
    "precision",
    type=click.Choice(["fp32", "fp16", "bf16"]),
    default="fp32",
    show_default=True,
    help="Precision of the weights and of the graphs.",
)
@click.option(
    "--mask-semantics",
    type=click.Choice(["hf", "meta"]),
    default="hf",
    show_default=True,
    help="How text before a picture is treated: as transformers does it, or as Meta's own code does.",
)
@click.option(
    "--layers",
    "num_layers",
    type=click.IntRange(1),
    metavar="N",
    help="Keep the first N decoder layers only, to debug.",
)
@click.option("--clamp", is_flag=True, help="Cut weights beyond FP16's range to its limit instead of refusing them.")
@json_option
def command(checkpoint: Path, bundle: Path, as_json: bool, **options: Any) -> None:
    """Make BUNDLE, a new folder, from CHECKPOINT, a Hugging Face folder of an mllama model.

    Needs no GPU, and little memory whatever the size of the checkpoint.
    """
    with _Steps() as steps:
        from mllama_exporter.export import ExportOptions, bundle_from_checkpoint

        exported = bundle_from_checkpoint(checkpoint, bundle, ExportOptions(**options), steps)
    result = _result(exported, steps)
    if as_json:
        click.echo(json.dumps(result))
    else:
        click.echo(_summary(exported, checkpoint, result))


class _Steps:
    """What an export is doing, on stderr: a line a step, on a terminal with a bar; `seconds` is how long each took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._bar: Any = None
        self._done = 0
        self._begin("reading", 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def __call__(self, step: str, done: int, total: int) -> None:
        if step != self._step:
            self._end()
            self._begin(step, total)
        if self._bar:
            self._bar.update(done - self._done)
        self._done = done

    def _begin(self, step: str, total: int) -> None:
        self._step, self._started, self._done = step, time.perf_counter(), 0
        if sys.stderr.isatty() and total > 1:
            self._bar = _bar(step, total)
            self._bar.__enter__()
        else:
            click.echo(_STEPS[step], err=True)

    def _end(self) -> None:
        self.seconds[self._step] = time.perf_counter() - self._started
        if self._bar:
            self._bar.__exit__(None, None, None)
            self._bar = None


def _bar(step: str, total: int) -> Any:
    in_bytes = step == "weights"
    bar: Any = click.progressbar(
        length=total,
        label=_STEPS[step].ljust(max(map(len, _STEPS.values()))),
        item_show_func=lambda _: f"{_bytes(bar.pos)} of {_bytes(total)}" if in_bytes else f"{bar.pos} of {total}",
        show_percent=in_bytes,
        width=0,  # as wide as the terminal
        file=sys.stderr,
        update_min_steps=max(1, total // 200),
    )
    return bar


def _bytes(count: float) -> str:
    if count < 1000:
        return f"{count:.0f} bytes"
    return next(f"{count / size:.1f} {unit}" for size, unit in _UNITS if count >= size)


def _result(bundle: Bundle, steps: _Steps) -> dict[str, Any]:
    manifest = bundle.manifest
    return {
        "bundle": str(bundle.root),
        "precision": manifest.precision,
        "mask_semantics": manifest.mask_semantics,
        "num_parameters": manifest.source.num_parameters,
        "num_clamped": manifest.weights.num_clamped,
        "num_files": len(manifest.files),
        "size_bytes": sum(entry.size_bytes for entry in manifest.files.values()),
        "seconds": {step: round(seconds, 3) for step, seconds in steps.seconds.items()},
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,  # Linux counts in KiB
    }


def _summary(bundle: Bundle, checkpoint: Path, result: dict[str, Any]) -> str:
    clamped = f", {result['num_clamped']} of them clamped" if result["num_clamped"] else ""
    took, memory = sum(result["seconds"].values()), _bytes(result["peak_memory_bytes"])
    validate = shlex.join(["mllama", "validate", str(bundle.root), "--reference", str(checkpoint)])
    return "\n".join(
        printable(line)
        for line in (
            f"{bundle.root}",
            f"  parameters  {result['num_parameters']:,}{clamped}",
            f"  precision   {result['precision']}, {result['mask_semantics']} mask semantics",
            f"  size        {_bytes(result['size_bytes'])} in {result['num_files']} files",
            f"  took        {took:.1f} s, at most {memory} of memory",
            f"Next: {validate}",
        )
    )
