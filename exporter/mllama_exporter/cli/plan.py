"""`mllama plan`: what a model takes and which GPU it fits, from its dimensions alone."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from mllama_runtime.bundle import Bundle
from mllama_runtime.cli import example, json_option
from mllama_runtime.config import ModelConfig
from mllama_runtime.engine_record import Limits, default_limits
from mllama_runtime.errors import UsageError
from mllama_runtime.fields import printable, to_plain
from mllama_runtime.manifest import MANIFEST_NAME
from mllama_runtime.memory import gigabytes
from mllama_runtime.roofline import cache_bytes

if TYPE_CHECKING:
    from mllama_exporter.sizing import Fit, Gpu

_EXAMPLE = example(
    "mllama plan 11b", "mllama plan 90b --gpu h200", "mllama plan my-bundle --memory 16GB --max-batch 8 --json"
)
_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@click.command(epilog=_EXAMPLE)
@click.argument("model")
@click.option(
    "--gpu", metavar="NAME", help="A GPU by name, such as l40s, h100 or rtx4090.  [default: all that are known]"
)
@click.option("--memory", metavar="SIZE", help="A GPU by its memory, such as 16GB or 24GiB.")
@click.option("--max-batch", type=click.IntRange(1, 4096), help="Rows to plan for.  [default: 4]")
@click.option("--max-seq-len", type=click.IntRange(1), help="Tokens of a row.  [default: 8192, or the model's]")
@click.option("--max-tiles", type=click.IntRange(1, 4096), help="Tiles of a row's pictures.  [default: one picture's]")
@json_option
def command(
    model: str,
    gpu: str | None,
    memory: str | None,
    max_batch: int | None,
    max_seq_len: int | None,
    max_tiles: int | None,
    as_json: bool,
) -> None:
    """Say what MODEL takes: a bundle, a checkpoint folder, its config.json, or 11b or 90b for the published models.

    No weights are read. Weights and caches are exact; activations are an estimate, and so is what CUDA itself takes.
    Tokens a second are what the memory's bandwidth allows, which no engine reaches.
    """
    from mllama_exporter.sizing import PRECISIONS, fit

    config = _model(model)
    default = default_limits(config)
    limits = Limits(
        max_batch or default.max_batch,
        max_seq_len or default.max_seq_len,
        min(default.prefill_chunk, max_seq_len or default.max_seq_len),
        max_tiles or default.max_tiles,
    )
    if limits.max_seq_len > config.text.max_seq_len:
        raise UsageError(
            "longer than the model's positions",
            where="--max-seq-len",
            expected=f"at most {config.text.max_seq_len}",
            found=max_seq_len,
        )
    if limits.max_tiles % (num_tiles := config.vision.max_num_tiles):
        expected = f"a multiple of {num_tiles}, the tiles of one picture with its padding"
        raise UsageError("not whole pictures", where="--max-tiles", expected=expected, found=max_tiles)
    gpus = _gpus(gpu, memory)
    fits = {name: [fit(config, limits, precision, each) for precision in PRECISIONS] for name, each in gpus.items()}
    if as_json:
        click.echo(json.dumps(_result(model, config, limits, gpus, fits)))
        return
    lines = _sizes(model, config, limits)
    lines += _one_gpu(*next(iter(fits.items())), limits) if len(fits) == 1 else _all_gpus(fits, limits)
    click.echo("\n".join(printable(line) for line in lines))


def _model(name: str) -> ModelConfig:
    from mllama_exporter.checkpoints.hf_config import model_config_from_hf
    from mllama_exporter.sizing import PUBLISHED

    path = Path(name)
    if (path / MANIFEST_NAME).is_file():
        return Bundle.read(path).manifest.model
    if path.name == "config.json" and path.is_file():
        return model_config_from_hf(path.parent)
    if path.is_dir():
        return model_config_from_hf(path)
    if name.lower() not in PUBLISHED:
        expected = f"a bundle, a checkpoint folder, a config.json, or {' or '.join(PUBLISHED)}"
        raise UsageError("no such model", where="MODEL", expected=expected, found=repr(name))
    return PUBLISHED[name.lower()]


def _gpus(name: str | None, memory: str | None) -> dict[str, Gpu]:
    from mllama_exporter.sizing import GPUS, Gpu

    if name is not None and memory is not None:
        raise UsageError("one or the other", where="--gpu, --memory")
    if memory is not None:
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", memory.strip().lower())
        if found is None or found[2] not in _UNITS:
            raise UsageError("not a size", where="--memory", expected="such as 16GB or 24GiB", found=repr(memory))
        return {memory: Gpu(int(float(found[1]) * _UNITS[found[2]]), None)}
    if name is None:
        return dict(GPUS)
    key = re.sub(r"[\s_]|nvidia|geforce", "", name.lower())
    if key not in GPUS:
        raise UsageError(
            "unknown GPU", where="--gpu", expected=", ".join(GPUS), found=repr(name), hint="or give --memory"
        )
    return {key: GPUS[key]}


def _sizes(model: str, config: ModelConfig, limits: Limits) -> list[str]:
    from mllama_exporter.sizing import PRECISIONS, cache_dtype, weights_of

    def tiles(count: int) -> str:
        return gigabytes(cache_bytes(config, num_cached=0, num_tiles=count, dtype="float16"))

    rows = [f"  {precision:<12} {gigabytes(weights_of(config, precision).total_bytes):>9}" for precision in PRECISIONS]
    row = cache_bytes(config, num_cached=limits.max_seq_len, num_tiles=0, dtype=cache_dtype("fp16"))
    lines = [
        f"{model}: {len(config.text.self_attention_layers)} layers and {len(config.cross_layers)} of cross-attention",
        "weights",
        *rows,
        f"keys and values of a row of {limits.max_seq_len} tokens: {gigabytes(row)} (in fp32 twice that)",
    ]
    if not config.is_text_only:
        shown = ", ".join(f"{count}: {tiles(count)}" for count in range(1, config.vision.max_num_tiles + 1))
        lines.append(f"keys and values of a picture, by tiles: {shown}")
    return [*lines, ""]


def _one_gpu(name: str, fits: Sequence[Fit], limits: Limits) -> list[str]:
    titles = (f"{limits.max_batch} rows", "fits", "rows", "one row", "text/s", "picture/s", "to build")
    lines = [
        f"on {name}, rows of {limits.max_seq_len} tokens and {limits.max_tiles} tiles",
        "  {:<12} {:>9}  {:<4} {:>5} {:>9} {:>7} {:>9} {:>9}".format("precision", *titles),
    ]
    for each in fits:
        rates = (each.text_tokens_per_second, each.picture_tokens_per_second)
        text, picture = ("" if rate is None else f"{rate:.0f}" for rate in rates)
        lines.append(
            f"  {each.precision:<12} {gigabytes(each.memory.device_bytes):>9}  {'yes' if each.fits else 'no':<4} "
            f"{each.batch:>5} {each.seq_len:>9} {text:>7} {picture:>9} {gigabytes(each.build_bytes):>9}".rstrip()
        )
    lines.append("rows: the most that fit; one row: its most tokens; a second: tokens at batch 1 that bandwidth allows")
    return [*lines, f"to build: memory of the machine that builds the engines; {_largest(fits)}"]


def _largest(fits: Sequence[Fit]) -> str:
    first = next((each for each in fits if each.fits), None)
    return "nothing fits" if first is None else f"{first.precision} takes {first.memory}"


def _all_gpus(fits: dict[str, list[Fit]], limits: Limits) -> list[str]:
    precisions = [each.precision for each in next(iter(fits.values()))]
    lines = [
        f"rows of {limits.max_seq_len} tokens and {limits.max_tiles} tiles that fit",
        f"  {'':<12}" + "".join(f"{precision:>12}" for precision in precisions),
    ]
    for name, row in fits.items():
        lines.append(f"  {name:<12}" + "".join(f"{each.batch or '-':>12}" for each in row))
    return lines


def _result(
    model: str, config: ModelConfig, limits: Limits, gpus: dict[str, Gpu], fits: dict[str, list[Fit]]
) -> dict[str, Any]:
    def plain(each: Fit) -> dict[str, Any]:
        fields: dict[str, Any] = {name: getattr(each, name) for name in each.__slots__}
        memory = {"device_bytes": each.memory.device_bytes, "pinned_bytes": each.memory.pinned_bytes}
        return fields | {"memory": memory | {"parts": each.memory.device_parts()}}

    return {
        "model": model,
        "limits": to_plain(limits),
        "row_bytes": cache_bytes(config, num_cached=limits.max_seq_len, num_tiles=0, dtype="float16"),
        "picture_bytes": [
            cache_bytes(config, num_cached=0, num_tiles=tiles + 1, dtype="float16")
            for tiles in range(0 if config.is_text_only else config.vision.max_num_tiles)
        ],
        "gpus": {
            name: {"gpu": to_plain(gpus[name]), "fits": [plain(each) for each in row]} for name, row in fits.items()
        },
    }
