"""`mllama quantize`: a bundle in, a smaller one out. torch and onnx are imported when the work begins."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any, get_args

import click
from mllama_runtime.bundle import Bundle
from mllama_runtime.cli import example, json_option
from mllama_runtime.errors import UsageError
from mllama_runtime.fields import printable, to_plain
from mllama_runtime.manifest import QuantizedPrecision

from mllama_exporter.cli.steps import Steps, peak_memory_bytes, shown_bytes

_EXAMPLE = example(
    "mllama quantize my-bundle my-int8 --scheme int8 --calibration photos/",
    "mllama quantize my-bundle my-int4 --scheme int4 --calibration questions.jsonl --keep lm_head",
    "mllama quantize my-bundle my-w8 --scheme int8-weight",
)
_STEPS = {
    "reading": "reading the bundle",
    "calibrating": "measuring activations",
    "scaling": "choosing scales",
    "weights": "writing the weights",
    "saving": "saving the bundle",
}
_SCHEMES = click.Choice(get_args(QuantizedPrecision))
_WITHOUT = "none"
_FEW_SAMPLES = 100  # 64 were too few for int8 on the miniature, 128 were enough


@click.command(epilog=_EXAMPLE)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("output", metavar="OUT", type=click.Path(path_type=Path))
@click.option(
    "--scheme",
    type=_SCHEMES,
    help="int8: weights and activations. int8-weight, int4: weights alone. fp8: both, for Ada, Hopper and later.",
)
@click.option(
    "--calibration",
    metavar="FOLDER|FILE.jsonl|none",
    help="Pictures, or questions about pictures as `mllama eval` reads them, some hundreds, like those the model will "
    "see: with some about no picture, if it will see these. int8 and fp8 need them; int4 chooses better scales with "
    'them, and does without for "none".',
)
@click.option(
    "--vision",
    type=_SCHEMES,
    help="Quantise the vision graph too.  [default: it keeps its precision]",
)
@click.option(
    "--keep",
    multiple=True,
    metavar="PATTERN",
    help="Leave these weights as they are, such as lm_head or layers.0.*; may be repeated.",
)
@click.option(
    "--recipe",
    "recipe_path",
    metavar="FILE.yaml",
    type=click.Path(path_type=Path),
    help="Read scheme, vision and keep from a file; options given here come on top.",
)
@json_option
def command(
    bundle: Path,
    output: Path,
    scheme: QuantizedPrecision | None,
    calibration: str | None,
    vision: QuantizedPrecision | None,
    keep: tuple[str, ...],
    recipe_path: Path | None,
    as_json: bool,
) -> None:
    """Make OUT, a new bundle, from BUNDLE, which is in FP32, FP16 or BF16; what is not quantised keeps that precision.

    Norms, gates, embeddings and the vision graph are kept, the language head is not. Needs no GPU. Without calibration
    memory stays small; calibration runs BUNDLE on the CPU, with its weights in float32.
    """
    with Steps(_STEPS) as steps:
        from mllama_exporter.quantize import QuantizeOptions, calibration_samples, quantized_bundle_from_bundle
        from mllama_exporter.quantize.recipe import Recipe, recipe_from_yaml

        recipe = Recipe() if recipe_path is None else recipe_from_yaml(recipe_path)
        chosen = scheme or recipe.scheme
        if chosen is None:
            raise UsageError("no scheme", where="--scheme", expected=" or ".join(get_args(QuantizedPrecision)))
        options = QuantizeOptions(chosen, vision or recipe.vision, (*recipe.keep, *keep))
        if calibration is None and chosen == "int4":
            hint = f'give --calibration pictures with questions, or "{_WITHOUT}" to round to nearest'
            raise UsageError("int4 chooses its scales by what the model sees", where="--calibration", hint=hint)
        samples = None if calibration is None or calibration == _WITHOUT else calibration_samples(Path(calibration))
        quantized = quantized_bundle_from_bundle(Bundle.open(bundle), output, options, samples, steps)
    result = _result(quantized, steps)
    click.echo(json.dumps(result) if as_json else _summary(quantized, bundle, result))


def _result(bundle: Bundle, steps: Steps) -> dict[str, Any]:
    manifest = bundle.manifest
    return {
        "bundle": str(bundle.root),
        "precision": manifest.precision,
        "quantization": to_plain(manifest.quantization),
        "size_bytes": sum(entry.size_bytes for entry in manifest.files.values()),
        "seconds": {step: round(seconds, 3) for step, seconds in steps.seconds.items()},
        "peak_memory_bytes": peak_memory_bytes(),
    }


def _summary(bundle: Bundle, source: Path, result: dict[str, Any]) -> str:
    made = bundle.manifest.quantization
    if made is None:
        raise RuntimeError("a quantised bundle without its quantization")
    data = made.calibration
    seen = f"{data.num_samples} questions, {data.num_images} pictures, {data.num_tokens} tokens" if data else "none"
    if data and data.num_samples < _FEW_SAMPLES:
        seen += "; few: what they do not reach is cut off, so give some hundreds"
    took, memory = sum(result["seconds"].values()), shown_bytes(result["peak_memory_bytes"])
    validate = shlex.join(["mllama", "validate", str(bundle.root), "--reference"])
    lines = (
        f"{bundle.root}",
        f"  precision    {bundle.manifest.precision} on {made.base}; vision {made.vision or f'kept in {made.base}'}",
        f"  kept         {len(made.kept)} matrices" + (f": {', '.join(made.kept[:3])} ..." if made.kept else ""),
        f"  calibration  {seen}",
        f"  size         {shown_bytes(result['size_bytes'])}",
        f"  took         {took:.1f} s, at most {memory} of memory",
        f"Next: {validate} CHECKPOINT, the folder {source} was exported from",
    )
    return "\n".join(map(printable, lines))
