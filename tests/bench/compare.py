"""The mid-size model side by side with transformers, in one run: `make bench`.

Both decode the same number of tokens from the same number of cached ones, in FP32 on the same number of threads, in
turns, so that a busy machine slows both. What counts are the ratios; absolute times are of the moment. "decode" and
"prefill" drive the models' forward alone; "answer" compares `Engine.generate` with `model.generate`, a token of the
answer at a time. A decode step of a batch of one reads every weight once, so its share of the memory bandwidth,
measured in the same run, says how much is left to gain.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
import transformers
from mllama_exporter.checkpoint import expected_tensors
from mllama_exporter.export import ExportOptions, bundle_from_checkpoint
from mllama_runtime import Engine, Request, SamplingParams
from mllama_runtime.backends.ort import OrtBackend
from mllama_runtime.bench import DecodeCase, decode_step, sample_tiles
from mllama_runtime.bundle import Bundle
from mllama_runtime.config import ModelConfig
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

    def answer(self, prompt: list[int], num_new: int) -> None:
        self.model.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=num_new,
            min_new_tokens=num_new,
            do_sample=False,
            pad_token_id=0,
        )

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


def answers(engine: Engine, theirs: Theirs, rounds: int, num_prompt: int = 128, num_new: int = 32) -> dict[str, float]:
    """Milliseconds a token of the answer: what num_new more tokens cost beyond the first."""
    text = " a" * num_prompt
    prompt = list(engine.prompt(Request(text, raw=True)).token_ids)

    def ours(count: int) -> None:
        engine.generate(text, raw=True, sampling=SamplingParams(max_new_tokens=count, min_new_tokens=count))

    def seconds(work: Callable[[int], None]) -> float:
        spans = []
        for count in (1, 1 + num_new):
            start = time.perf_counter()
            work(count)
            spans.append(time.perf_counter() - start)
        return (spans[1] - spans[0]) / num_new

    pairs = [(seconds(ours), seconds(lambda count: theirs.answer(prompt, count))) for _ in range(rounds)]
    return {
        "ours_ms": median(pair[0] for pair in pairs) * 1e3,
        "theirs_ms": median(pair[1] for pair in pairs) * 1e3,
        "ratio": median(pair[1] / pair[0] for pair in pairs),
    }


def bandwidth(threads: int) -> float:
    """Bytes a second that `threads` threads read from memory, the best of many sums over 512 MiB."""
    array = torch.ones(2**27)
    torch.set_num_threads(threads)
    times = []
    for _ in range(40):
        start = time.perf_counter()
        array.sum()
        times.append(time.perf_counter() - start)
    return array.nbytes / min(times)


def decode_bytes(config: ModelConfig, *, has_image: bool) -> int:
    """Bytes of weights one FP32 decode step reads: not the embedding table; cross layers only for pictures."""
    unread = ["embed_tokens", "cross_attn.k_", "cross_attn.v_"]
    if not has_image:
        unread += [f"layers.{layer}." for layer in config.text.cross_attention_layers]
    read = {
        name: shape
        for name, shape in expected_tensors(config).items()
        if name.startswith("language_model.") and not any(part in name for part in unread)
    }
    return 4 * sum(map(math.prod, read.values()))


def prefill_step(backend: OrtBackend, num_tokens: int) -> Step:
    slots = backend.slots(num_slots=1, cache_len=num_tokens, num_tiles=0)
    nothing, token_ids = np.zeros((num_tokens, 0), np.bool_), np.arange(num_tokens)
    return lambda: slots.prefill(0, token_ids, 0, nothing, (), with_padding_tiles=False)


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
            ours = decode_step(backend, DecodeCase(1, num_cached, cache_len, features))
            found = in_turns(ours, theirs.decode_step(num_cached, num_tiles, num_patches), rounds, 8)
            picture = f"{num_tiles} tiles" if num_tiles else "text"
            rows.append({"what": f"decode, {num_cached} cached of {cache_len}, {picture}", **found})
        for num_tokens in (64, 256):
            found = in_turns(prefill_step(backend, num_tokens), theirs.prefill(num_tokens), rounds, 2)
            rows.append({"what": f"prefill, {num_tokens} tokens", **found})
    with Engine.load(bundle, num_threads=threads, verify="quick") as engine:
        rows.append({"what": "answer, 32 tokens after 128, text", **answers(engine, theirs, rounds)})
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
        before = bandwidth(arguments.threads)
        rows = measure(checkpoint, bundle, arguments.threads, arguments.rounds)
    rate = max(before, bandwidth(arguments.threads))
    for row in rows:
        if row["what"].startswith(("decode", "answer")):
            size = decode_bytes(MIDSIZE, has_image="tiles" in row["what"])
            row["bandwidth_share"] = size / (row["ours_ms"] / 1e3) / rate
    if arguments.json:
        print(json.dumps({"threads": arguments.threads, "bytes_per_second": rate, "measured": rows}))
        return
    print(
        f"FP32, {arguments.threads} threads, {platform.machine()}, transformers {transformers.__version__}, "
        f"torch {torch.__version__}\n"
    )
    sizes = [decode_bytes(MIDSIZE, has_image=has_image) / 1e9 for has_image in (False, True)]
    print(
        f"memory read at {rate / 1e9:.1f} GB/s; a decode step reads {sizes[0]:.2f} GB of weights, "
        f"{sizes[1]:.2f} GB with pictures\n"
    )
    print("| what | ours, ms | transformers, ms | transformers / ours | our share of the bandwidth |")
    print("|---|---|---|---|---|")
    for row in rows:
        share = f"{row['bandwidth_share']:.0%}" if "bandwidth_share" in row else ""
        print(f"| {row['what']} | {row['ours_ms']:.1f} | {row['theirs_ms']:.1f} | {row['ratio']:.2f} | {share} |")


if __name__ == "__main__":
    main()
