"""`mllama export`: a checkpoint folder in, a bundle out. torch and onnx are imported when the work begins."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any, get_args

import click
from click.core import ParameterSource
from mllama_runtime.bundle import Bundle
from mllama_runtime.cli import example, json_option
from mllama_runtime.config import VisionStates
from mllama_runtime.fields import printable

from mllama_exporter.cli.steps import Steps, peak_memory_bytes, shown_bytes

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
    "--vision-states",
    type=click.Choice(get_args(VisionStates)),
    default="published",
    show_default=True,
    help="Which states of the vision tower the decoder sees. published: those before each listed block, as Llama 3.2 "
    "Vision was trained. transformers-4.56: those after it, for weights that were trained with 4.56 or newer.",
)
@click.option(
    "--layers",
    "num_layers",
    type=click.IntRange(1),
    metavar="N",
    help="Keep the first N decoder layers only, to debug.",
)
@click.option(
    "--text-only",
    is_flag=True,
    help="Leave out the vision tower and the cross-attention layers: a text model, which takes no pictures.",
)
@click.option(
    "--weights",
    type=click.Choice(["copy", "move"]),
    default="copy",
    show_default=True,
    help="move: the checkpoint's own files become the bundle's, which takes no room and leaves it without them.",
)
@click.option(
    "--adapter",
    type=click.Path(path_type=Path),
    help="A folder with a PEFT LoRA adapter, merged into the weights as they are written.",
)
@click.option("--clamp", is_flag=True, help="Cut weights beyond FP16's range to its limit instead of refusing them.")
@json_option
def command(checkpoint: Path, bundle: Path, as_json: bool, **options: Any) -> None:
    """Make BUNDLE, a new folder, from CHECKPOINT: a Hugging Face folder of an mllama model, or Meta's files in the
    folder `original` inside it.

    Needs no GPU, and little memory whatever the size of the checkpoint.
    """
    source = click.get_current_context().get_parameter_source("vision_states")
    with Steps(_STEPS) as steps:
        from mllama_exporter.checkpoints.vision_states import vision_states_notice
        from mllama_exporter.export import ExportOptions, bundle_from_checkpoint

        is_open = source is ParameterSource.DEFAULT and not options["text_only"]
        if is_open and (notice := vision_states_notice(checkpoint, options["adapter"])):
            click.echo(f"notice: {printable(notice)}", err=True)
        exported = bundle_from_checkpoint(checkpoint, bundle, ExportOptions(**options), steps)
    from mllama_exporter.licence import licence_notices

    for notice in licence_notices(exported.manifest, lambda name: exported.path(name).read_bytes()):
        click.echo(f"notice: {printable(notice)}", err=True)
    result = _result(exported, steps)
    if as_json:
        click.echo(json.dumps(result))
    else:
        click.echo(_summary(exported, checkpoint, result))


def _result(bundle: Bundle, steps: Steps) -> dict[str, Any]:
    manifest = bundle.manifest
    return {
        "bundle": str(bundle.root),
        "precision": manifest.precision,
        "mask_semantics": manifest.mask_semantics,
        "vision_states": manifest.vision_states,
        "num_parameters": manifest.source.num_parameters,
        "num_clamped": manifest.weights.num_clamped,
        "num_files": len(manifest.files),
        "size_bytes": sum(entry.size_bytes for entry in manifest.files.values()),
        "seconds": {step: round(seconds, 3) for step, seconds in steps.seconds.items()},
        "peak_memory_bytes": peak_memory_bytes(),
    }


def _summary(bundle: Bundle, checkpoint: Path, result: dict[str, Any]) -> str:
    clamped = f", {result['num_clamped']} of them clamped" if result["num_clamped"] else ""
    took, memory = sum(result["seconds"].values()), shown_bytes(result["peak_memory_bytes"])
    kind = f"{result['mask_semantics']} mask semantics, {result['vision_states']} vision states"
    if bundle.manifest.model.is_text_only:
        kind = "text only"
    validate = shlex.join(["mllama", "validate", str(bundle.root), "--reference", str(checkpoint)])
    return "\n".join(
        printable(line)
        for line in (
            f"{bundle.root}",
            f"  parameters  {result['num_parameters']:,}{clamped}",
            f"  precision   {result['precision']}, {kind}",
            f"  size        {shown_bytes(result['size_bytes'])} in {result['num_files']} files",
            f"  took        {took:.1f} s, at most {memory} of memory",
            f"Next: {validate}",
        )
    )
