"""The mid-size model side by side with transformers, in one run: `make bench`.

Both decode the same number of tokens from the same number of cached ones, in FP32 on the same number of threads, in
turns, so that a busy machine slows both. What counts are the ratios; absolute times are of the moment.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
import transformers
from mllama_exporter.export import ExportOptions, bundle_from_checkpoint
from mllama_runtime.backends.ort import OrtBackend
from mllama_runtime.bench import DecodeCase, decode_step, sample_tiles
from mllama_runtime.bundle import Bundle
from random_checkpoint import MIDSIZE, write_random_checkpoint
from transformers import DynamicCache, MllamaForConditionalGeneration

Step = Callable[[], object]


class Theirs:
    """transformers, driven without the overhead of `generate`: the model's forward on a dynamic cache."""

    def __init__(self, checkpoint: Path) -> None:
        self.model = MllamaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self.text = self.model.config.text_config

    def cache(self, num_cached: int, rows: int) -> DynamicCache:
        """Arbitrary keys and values: num_cached of text in self-attention layers, `rows` of patches in cross layers."""
        cache = DynamicCache(config=self.text)
        head_dim = self.text.hidden_size // self.text.num_attention_heads
        for layer in range(self.text.num_hidden_layers):
            length = rows if layer in self.text.cross_attention_layers else num_cached
            if length:
                shape = (1, self.text.num_key_value_heads, length, head_dim)
                cache.update(torch.randn(shape), torch.randn(shape), layer)
        return cache

    def decode_step(self, num_cached: int, num_tiles: int, num_patches: int) -> Step:
        cache = self.cache(num_cached, 4 * num_patches if num_tiles else 0)
        mask = torch.zeros(1, 1, 1, 4, dtype=torch.int64)
        mask[..., :num_tiles] = 1
        position = torch.tensor([[num_cached]])
        token = torch.zeros(1, 1, dtype=torch.int64)

        @torch.no_grad()
        def step() -> None:
            self.model(
                input_ids=token,
                position_ids=position,
                cross_attention_mask=mask if num_tiles else None,
                past_key_values=cache,
                use_cache=True,
            )
            position.add_(1)

        return step

    def prefill(self, num_tokens: int) -> Step:
        tokens = torch.arange(num_tokens)[None]

        @torch.no_grad()
        def work() -> None:
            self.model(input_ids=tokens, use_cache=True, logits_to_keep=1)

        return work


def in_turns(ours: Step, theirs: Step, rounds: int, steps: int) -> dict[str, float]:
    """Median milliseconds of each over all steps, and the median over rounds of their ratio."""
    ours(), theirs()
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    ratios = []
    for _ in range(rounds):
        medians = {}
        for name, step in (("ours", ours), ("theirs", theirs)):
            samples = []
            for _ in range(steps):
                start = time.perf_counter()
                step()
                samples.append(time.perf_counter() - start)
            times[name] += samples
            medians[name] = median(samples)
        ratios.append(medians["theirs"] / medians["ours"])
    return {
        "ours_ms": median(times["ours"]) * 1e3,
        "theirs_ms": median(times["theirs"]) * 1e3,
        "ratio": median(ratios),
    }


def measure(checkpoint: Path, bundle: Path, threads: int, rounds: int) -> list[dict[str, object]]:
    torch.set_num_threads(threads)
    theirs, rows = Theirs(checkpoint), []
    num_patches = MIDSIZE.vision.num_patches
    with OrtBackend(Bundle.open(bundle), threads) as backend:
        for num_cached, cache_len, num_tiles in (
            (256, 512, 0),
            (256, 8192, 0),
            (256, 512, 4),
            (256, 8192, 4),
            (8000, 8192, 0),
        ):
            features = [backend.encode(sample_tiles(MIDSIZE, num_tiles))] if num_tiles else []
            ours = decode_step(backend, MIDSIZE, DecodeCase(1, num_cached, cache_len, features))
            found = in_turns(ours, theirs.decode_step(num_cached, num_tiles, num_patches), rounds, 8)
            picture = f"{num_tiles} tiles" if num_tiles else "text"
            rows.append({"what": f"decode, {num_cached} cached of {cache_len}, {picture}", **found})
        for num_tokens in (64, 256):
            slots = backend.slots(num_slots=1, cache_len=num_tokens, num_tiles=0)
            nothing = np.zeros((num_tokens, 0), np.bool_)

            def ours(slots=slots, nothing=nothing, ids=np.arange(num_tokens)) -> None:
                slots.prefill(0, ids, 0, nothing, (), with_padding_tiles=False)

            rows.append({"what": f"prefill, {num_tokens} tokens", **in_turns(ours, theirs.prefill(num_tokens), rounds, 2)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, help="keep checkpoint and bundle here for the next run")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        checkpoint, bundle = work / "checkpoint", work / "bundle"
        if not checkpoint.exists():
            write_random_checkpoint(checkpoint, MIDSIZE)
        if not bundle.exists():
            bundle_from_checkpoint(checkpoint, bundle, ExportOptions())
        rows = measure(checkpoint, bundle, arguments.threads, arguments.rounds)
    if arguments.json:
        print(json.dumps({"threads": arguments.threads, "measured": rows}))
        return
    print(
        f"FP32, {arguments.threads} threads, {platform.machine()}, transformers {transformers.__version__}, "
        f"torch {torch.__version__}\n"
    )
    print("| what | ours, ms | transformers, ms | transformers / ours |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row['what']} | {row['ours_ms']:.1f} | {row['theirs_ms']:.1f} | {row['ratio']:.2f} |")


if __name__ == "__main__":
    main()
