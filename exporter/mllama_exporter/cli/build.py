"""`mllama build`: a bundle's graphs become TensorRT engines inside it. onnx is imported when the work begins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from mllama_runtime.backends.private_trt import TENSORRT_BACKENDS
from mllama_runtime.cli import example, json_option
from mllama_runtime.fields import printable, to_plain

from mllama_exporter.cli.steps import Steps, peak_memory_bytes, shown_bytes

if TYPE_CHECKING:
    from mllama_exporter.engines import BuiltEngine

_EXAMPLE = example(
    "mllama build my-bundle --backend tensorrt-rtx --max-batch 8 --max-seq-len 4096",
    "mllama build my-bundle --backend tensorrt-rtx --compute-capability 8.9 --compute-capability 12.0",
    "mllama build my-bundle --backend tensorrt --timing-cache ~/.cache/mllama.timing --json",
)

_STEPS = {
    "checking": "checking the bundle",
    "vision": "building the vision engine",
    "decoder": "building the decoder engine",
    "greedy": "building the greedy sampler's engine",
    "sampler": "building the sampler's engine",
}


@click.command(epilog=_EXAMPLE)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--backend",
    type=click.Choice(TENSORRT_BACKENDS),
    required=True,
    help="tensorrt: for data-centre GPUs, built on the GPU that will serve. "
    "tensorrt-rtx: for workstation GPUs, built anywhere.",
)
@click.option(
    "--max-batch",
    type=click.IntRange(1, 4096),
    default=4,
    show_default=True,
    help="Rows of a step, and pictures encoded at once. Each row has its own cache.",
)
@click.option(
    "--max-seq-len",
    type=click.IntRange(1),
    help="Tokens of a conversation, which is the length of every cache row.  [default: 8192, or the model's]",
)
@click.option(
    "--prefill-chunk",
    type=click.IntRange(1),
    default=512,
    show_default=True,
    help="Tokens of a prompt that one step takes; longer prompts take several. More is faster, and takes more memory.",
)
@click.option(
    "--max-tiles",
    type=click.IntRange(1, 4096),
    help="Tiles of all pictures of a conversation, padding tiles included.  [default: those of one picture]",
)
@click.option(
    "--compute-capability",
    "compute_capabilities",
    multiple=True,
    metavar="X.Y",
    help="For tensorrt-rtx: build for these GPUs alone, such as 8.9 or 12.0.  [default: every GPU from Ampere on]",
)
@click.option(
    "--strip-weights",
    is_flag=True,
    help="Leave the weights out of the engines; they are filled in from the bundle when the engine is loaded. "
    "Takes a GPU to build.",
)
@click.option(
    "--weight-streaming",
    is_flag=True,
    help="Let the runtime keep part of the weights in host memory, for models larger than the GPU's.",
)
@click.option(
    "--timing-cache",
    type=click.Path(path_type=Path, dir_okay=False),
    help="For tensorrt: kernel timings of earlier builds, read and written, which make the next build faster.",
)
@json_option
def command(bundle: Path, as_json: bool, **options: Any) -> None:
    """Build the graphs of BUNDLE into engines, check their structure, and keep them in BUNDLE.

    An engine depends on the graphs, the weights, the TensorRT version and these options: building again with the same
    does nothing. The graphs stay as they are, and so does the verdict of `mllama validate`.
    """
    with Steps(_STEPS) as steps:
        from mllama_exporter.engines import EngineOptions, engine_for_bundle

        built = engine_for_bundle(bundle, EngineOptions(**options), steps)
    engines = built.record.engines
    said = [f"{graph}: {warning}" for graph, engine in engines.items() for warning in engine.warnings]
    for notice in (*built.notices, *(said if not built.already_built else ())):
        click.echo(f"notice: {printable(notice)}", err=True)
    if as_json:
        result = {
            "bundle": str(built.bundle.root),
            "already_built": built.already_built,
            "seconds": {step: round(seconds, 3) for step, seconds in steps.seconds.items()},
            "peak_memory_bytes": peak_memory_bytes(),
            "record": to_plain(built.record),
        }
        click.echo(json.dumps(result))
    else:
        click.echo(_summary(built, steps))


def _summary(built: BuiltEngine, steps: Steps) -> str:
    lines = [f"{'already built' if built.already_built else 'built'}: {built.bundle.root}/engines/{built.record.key}"]
    for graph, engine in built.record.engines.items():
        profiles = ", ".join(profile.name for profile in engine.profiles)
        lines.append(f"  {graph}: {shown_bytes(engine.size_bytes)}, {len(engine.kernels)} kernels for {profiles}")
        lines += [f"    {finding.check:<9}  {finding.detail}" for finding in engine.findings]
    if not built.already_built:
        took, memory = sum(steps.seconds.values()), shown_bytes(peak_memory_bytes())
        lines.append(f"  took {took:.1f} s, at most {memory} of memory; built, not run")
    return "\n".join(map(printable, lines))
