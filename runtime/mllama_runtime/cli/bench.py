"""`mllama bench`: how fast a bundle runs on this machine."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

import click

from mllama_runtime.backends import BACKENDS, PREFILL_CHUNK, backend_from_bundle
from mllama_runtime.bench import Measured, bench
from mllama_runtime.bundle import Bundle
from mllama_runtime.cli import example, json_option
from mllama_runtime.engine_record import Limits
from mllama_runtime.errors import UsageError

_COLUMNS = ("what", "ms", "tokens/s", "GB/s")
_EXAMPLE = example(
    "mllama bench my-bundle", "mllama bench my-bundle --batch 1 --batch 16 --tiles 0 --tiles 4 --cache-len 8192 --json"
)


@click.command(epilog=_EXAMPLE)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--batch",
    "batches",
    type=click.IntRange(1, 1024),
    multiple=True,
    default=(1,),
    show_default=True,
    help="Rows decoded together; repeatable.",
)
@click.option(
    "--tiles",
    type=click.IntRange(0, 64),
    multiple=True,
    help="Tiles of each row's picture, 0 for text alone; repeatable.  [default: 0, 1 and those of a whole picture]",
)
@click.option(
    "--cache-len", type=click.IntRange(64), default=1024, show_default=True, help="Cache positions of each row."
)
@click.option("--prompt-len", type=click.IntRange(1), default=256, show_default=True, help="Tokens of a prompt.")
@click.option("--steps", type=click.IntRange(1), default=28, show_default=True, help="Decode steps measured.")
@click.option("--backend", type=click.Choice(BACKENDS), default="auto", show_default=True, help="What runs the graphs.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads; by default all there are.")
@json_option
def command(
    bundle: Path,
    batches: tuple[int, ...],
    tiles: tuple[int, ...],
    cache_len: int,
    prompt_len: int,
    steps: int,
    backend: str,
    threads: int | None,
    as_json: bool,
) -> None:
    """Measure a bundle: the time to a prompt's first token, its picture included, and decode steps.

    A step's GB/s are of what it must read: weights, and keys and values of what is cached. Every time is the median of
    several repetitions. Machines differ and are shared: compare within one run.
    """
    opened = Bundle.open(bundle)
    model = opened.manifest.model
    cache_len = min(cache_len, model.text.max_seq_len)
    if model.is_text_only and any(tiles):
        raise UsageError("the model is text-only, and sees no pictures", where="--tiles", found=max(tiles))
    tiles = tiles or ((0,) if model.is_text_only else tuple(sorted({0, 1, model.vision.max_num_tiles})))
    asked = Limits(max(batches), cache_len, min(PREFILL_CHUNK, cache_len), model.vision.max_num_tiles)
    with backend_from_bundle(opened, backend, threads, limits=asked if backend == "cuda" else None) as session:
        rows = list(
            bench(
                opened,
                session,
                batches=batches,
                tiles=tiles,
                prompt_len=min(prompt_len, cache_len),
                cache_len=cache_len,
                steps=steps,
            )
        )
    if as_json:
        environment = {
            "backend": session.name,
            "threads": threads or len(os.sched_getaffinity(0)),
            "precision": opened.manifest.precision,
        }
        click.echo(json.dumps({"bundle": str(opened.root), **environment, "measured": [_plain(row) for row in rows]}))
    else:
        click.echo(_table(rows))


def _plain(row: Measured) -> dict[str, object]:
    return {"what": row.what, **asdict(row), "tokens_per_second": row.tokens_per_second}


def _table(rows: list[Measured]) -> str:
    width = max(len(row.what) for row in rows)
    lines = [f"{_COLUMNS[0]:<{width}}  {_COLUMNS[1]:>9}  {_COLUMNS[2]:>9}  {_COLUMNS[3]:>9}"]
    for row in rows:
        line = f"{row.what:<{width}}  "
        if row.seconds is None:
            line += f"left out: {row.reason}"
        else:
            rate = "" if row.tokens_per_second is None else f"{row.tokens_per_second:.1f}"
            read = "" if row.read_bytes is None else f"{row.read_bytes / row.seconds / 1e9:.1f}"
            line += f"{row.seconds * 1e3:9.2f}  {rate:>9}  {read:>9}"
        lines.append(line.rstrip())
    return "\n".join(lines)
