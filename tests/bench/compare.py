"""The mid-size model side by side with transformers, in one run: `make bench`.

All decode the same number of tokens from the same number of cached ones on the same number of threads, transformers in
FP32 and ours in FP32 and with quantised weights, in turns, so that a busy machine slows all of them. What counts are
the ratios; absolute times are of the moment. "decode" and "prefill" drive the models' forward alone; "answer" compares
`Engine.generate` with `model.generate`, a token of the answer at a time. A decode step of a batch of one reads every
weight once, so its share of the memory bandwidth, measured in the same run, says how much is left to gain.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
import transformers
from mllama_exporter.export import ExportOptions, bundle_from_checkpoint
from mllama_exporter.quantize import QuantizeOptions, quantized_bundle_from_bundle
from mllama_runtime import Engine, Request, SamplingParams
from mllama_runtime.backends import Chunk
from mllama_runtime.backends.ort import OrtBackend
from mllama_runtime.bench import DecodeCase, Decoding
from mllama_runtime.bundle import Bundle
from mllama_runtime.manifest import QuantizedPrecision
from mllama_runtime.roofline import decode_weight_bytes
from random_checkpoint import MIDSIZE, write_random_checkpoint
from transformers import DynamicCache, MllamaForConditionalGeneration

Step = Callable[[], object]
THEIRS = "transformers"
PAUSE_SECONDS = (
    0.2  # threads of one runtime wait in a loop for more work before they sleep, on cores the next one needs
)
WEIGHT_ONLY: tuple[QuantizedPrecision, ...] = ("int8-weight", "int4")


@dataclass(frozen=True, slots=True)
class Row:
    """What was measured, of transformers and each precision; has_image is None where no share of bandwidth is due."""

    what: str
    has_image: bool | None
    found: dict[str, dict[str, float]]


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


def in_turns(steps: Mapping[str, Step], rounds: int, repeats: int) -> dict[str, dict[str, float]]:
    """Of each, median milliseconds over all repeats, and the median over rounds of the ratio of THEIRS to it."""
    for step in steps.values():
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    ratios: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        medians = {}
        for name, step in steps.items():
            time.sleep(PAUSE_SECONDS)
            step()
            samples = []
            for _ in range(repeats):
                start = time.perf_counter()
                step()
                samples.append(time.perf_counter() - start)
            times[name] += samples
            medians[name] = median(samples)
        for name in steps:
            ratios[name].append(medians[THEIRS] / medians[name])
    return {name: {"ms": median(times[name]) * 1e3, "ratio": median(ratios[name])} for name in steps}


def answer_of(engine: Engine, text: str) -> Callable[[int], None]:
    def answer(count: int) -> None:
        engine.generate(text, raw=True, sampling=SamplingParams(max_new_tokens=count, min_new_tokens=count))

    return answer


def answers_in_turns(
    ways: Mapping[str, Callable[[int], None]], rounds: int, num_new: int = 32
) -> dict[str, dict[str, float]]:
    """Milliseconds a token of the answer: what num_new more tokens cost beyond the first."""

    def seconds(work: Callable[[int], None]) -> float:
        spans = []
        time.sleep(PAUSE_SECONDS)
        for count in (1, 1 + num_new):
            start = time.perf_counter()
            work(count)
            spans.append(time.perf_counter() - start)
        return (spans[1] - spans[0]) / num_new

    found = [{name: seconds(way) for name, way in ways.items()} for _ in range(rounds)]
    return {
        name: {
            "ms": median(each[name] for each in found) * 1e3,
            "ratio": median(each[THEIRS] / each[name] for each in found),
        }
        for name in ways
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


def prefill_step(backend: OrtBackend, num_tokens: int) -> Step:
    slots = backend.slots(num_slots=1, cache_len=num_tokens, num_tiles=0)
    nothing, token_ids = np.zeros((num_tokens, 0), np.bool_), np.arange(num_tokens)
    return lambda: slots.prefill(0, Chunk(token_ids, 0, nothing))


def measure(checkpoint: Path, bundles: Mapping[str, Path], threads: int, rounds: int) -> list[Row]:
    torch.set_num_threads(threads)
    theirs, rows = Theirs(checkpoint), []
    num_patches = MIDSIZE.vision.num_patches
    with ExitStack() as stack:
        backends = {name: stack.enter_context(OrtBackend(Bundle.open(path), threads)) for name, path in bundles.items()}
        for num_cached, cache_len, num_tiles in (
            (256, 512, 0),
            (256, 8192, 0),
            (256, 512, 4),
            (256, 8192, 4),
            (8000, 8192, 0),
        ):
            steps: dict[str, Step] = {THEIRS: theirs.decode_step(num_cached, num_tiles, num_patches)}
            for name, backend in backends.items():
                steps[name] = Decoding(backend, MIDSIZE, DecodeCase(1, num_cached, cache_len, num_tiles)).step
            picture = f"{num_tiles} tiles" if num_tiles else "text"
            what = f"decode, {num_cached} cached of {cache_len}, {picture}"
            rows.append(Row(what, num_tiles > 0, in_turns(steps, rounds, 16)))
        for num_tokens in (64, 256):
            steps = {THEIRS: theirs.prefill(num_tokens)}
            steps |= {name: prefill_step(backend, num_tokens) for name, backend in backends.items()}
            rows.append(Row(f"prefill, {num_tokens} tokens", None, in_turns(steps, rounds, 2)))
    with ExitStack() as stack:
        text = " a" * 128
        ways: dict[str, Callable[[int], None]] = {}
        for name, path in bundles.items():
            engine = stack.enter_context(Engine.load(path, num_threads=threads, verify="quick"))
            ways[name] = answer_of(engine, text)
        prompt = list(engine.prompt(Request(text, raw=True)).token_ids)
        ways = {THEIRS: lambda count: theirs.answer(prompt, count), **ways}
        rows.append(Row("answer, 32 tokens after 128, text", False, answers_in_turns(ways, rounds)))
    return rows


def made_bundles(work: Path) -> tuple[Path, dict[str, Path]]:
    """The random checkpoint, and its bundle in every precision; what is there already is used again."""
    checkpoint, bundles = work / "checkpoint", {name: work / name for name in ("fp32", *WEIGHT_ONLY)}
    if not checkpoint.exists():
        write_random_checkpoint(checkpoint, MIDSIZE)
    if not bundles["fp32"].exists():
        bundle_from_checkpoint(checkpoint, bundles["fp32"], ExportOptions())
    for name in WEIGHT_ONLY:
        if not bundles[name].exists():
            quantized_bundle_from_bundle(Bundle.open(bundles["fp32"]), bundles[name], QuantizeOptions(name), None)
    return checkpoint, bundles


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, help="keep checkpoint and bundle here for the next run")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        checkpoint, bundles = made_bundles(arguments.work or Path(temporary))
        before = bandwidth(arguments.threads)
        rows = measure(checkpoint, bundles, arguments.threads, arguments.rounds)
        rate = max(before, bandwidth(arguments.threads))
        sizes = {
            (name, has_image): decode_weight_bytes(Bundle.open(path), batch=1, has_image=has_image)
            for name, path in bundles.items()
            for has_image in (False, True)
        }
    for row in rows:
        for name, found in row.found.items():
            if row.has_image is not None and name != THEIRS:
                found["bandwidth_share"] = sizes[name, row.has_image] / (found["ms"] / 1e3) / rate
    if arguments.json:
        measured = [{"what": row.what, "found": row.found} for row in rows]
        print(json.dumps({"threads": arguments.threads, "bytes_per_second": rate, "measured": measured}))
        return
    print(
        f"{arguments.threads} threads, {platform.machine()}, transformers {transformers.__version__} in FP32, "
        f"torch {torch.__version__}\n"
    )
    print(f"memory read at {rate / 1e9:.1f} GB/s; a decode step of text reads ", end="")
    print(", ".join(f"{sizes[name, False] / 1e9:.2f} GB in {name}" for name in bundles) + "\n")
    print(
        "| what | transformers, ms | "
        + " | ".join(f"{name}, ms (ratio, share of the bandwidth)" for name in bundles)
        + " |"
    )
    print("|---" * (2 + len(bundles)) + "|")
    for row in rows:
        cells = [f"{row.found[THEIRS]['ms']:.1f}", *(shown(row.found[name]) for name in bundles)]
        print(f"| {row.what} | " + " | ".join(cells) + " |")


def shown(found: Mapping[str, float]) -> str:
    share = f", {found['bandwidth_share']:.0%}" if "bandwidth_share" in found else ""
    return f"{found['ms']:.1f} ({found['ratio']:.2f}{share})"


if __name__ == "__main__":
    main()
