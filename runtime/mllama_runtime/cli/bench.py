"""`mllama bench`: how fast a bundle runs on this machine."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click

from mllama_runtime.backends import BACKENDS, Backend, backend_from_bundle
from mllama_runtime.bench import DecodeCase, decode_seconds, prefill_seconds, sample_tiles, vision_seconds
from mllama_runtime.bundle import Bundle
from mllama_runtime.cli import example, json_option
from mllama_runtime.config import ModelConfig

_COLUMNS = ("what", "ms", "tokens/s")


@click.command(epilog=example("mllama bench my-bundle", "mllama bench my-bundle --batch 4 --cache-len 8192 --json"))
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--batch", type=click.IntRange(1, 1024), default=1, show_default=True, help="Rows decoded together.")
@click.option(
    "--cache-len", type=click.IntRange(64), default=1024, show_default=True, help="Cache positions of each row."
)
@click.option("--prompt-len", type=click.IntRange(1), default=256, show_default=True, help="Tokens of a prefill.")
@click.option("--steps", type=click.IntRange(1), default=32, show_default=True, help="Decode steps measured.")
@click.option("--backend", type=click.Choice(BACKENDS), default="auto", show_default=True, help="What runs the graphs.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads; by default all there are.")
@json_option
def command(
    bundle: Path,
    batch: int,
    cache_len: int,
    prompt_len: int,
    steps: int,
    backend: str,
    threads: int | None,
    as_json: bool,
) -> None:
    """Measure vision, prefill and decode of a bundle.

    Every time is the median of several repetitions. Machines differ and are shared: compare within one run.
    """
    opened = Bundle.open(bundle)
    model = opened.manifest.model
    cache_len = min(cache_len, model.text.max_seq_len)
    with backend_from_bundle(opened, backend, threads) as session:
        rows = _rows(session, model, batch, cache_len, min(prompt_len, cache_len), steps)
    if as_json:
        environment = {
            "backend": session.name,
            "threads": threads or len(os.sched_getaffinity(0)),
            "precision": opened.manifest.precision,
        }
        click.echo(json.dumps({"bundle": str(opened.root), **environment, "measured": rows}))
        return
    width = max(len(row["what"]) for row in rows)
    click.echo(f"{_COLUMNS[0]:<{width}}  {_COLUMNS[1]:>9}  {_COLUMNS[2]:>9}")
    for row in rows:
        rate = f"{row['tokens_per_second']:9.1f}" if "tokens_per_second" in row else ""
        click.echo(f"{row['what']:<{width}}  {row['ms']:9.2f}  {rate}".rstrip())


def _rows(
    backend: Backend, model: ModelConfig, batch: int, cache_len: int, prompt_len: int, steps: int
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{"what": "vision, one picture", "ms": vision_seconds(backend, model) * 1e3}]
    seconds = prefill_seconds(backend, model, prompt_len)
    rows.append(
        {"what": f"prefill, {prompt_len} tokens", "ms": seconds * 1e3, "tokens_per_second": prompt_len / seconds}
    )
    for num_tiles in sorted({0, 1, model.vision.max_num_tiles}):
        features = [backend.encode(sample_tiles(model, num_tiles))] if num_tiles else []
        case = DecodeCase(batch, cache_len // 2, cache_len, features)
        seconds = decode_seconds(backend, case, steps=steps)
        picture = f"picture of {num_tiles} tiles" if num_tiles else "text only"
        rows.append(
            {
                "what": f"decode, batch {batch}, {case.num_cached} of {cache_len} cached, {picture}",
                "ms": seconds * 1e3,
                "tokens_per_second": batch / seconds,
            }
        )
    return rows
