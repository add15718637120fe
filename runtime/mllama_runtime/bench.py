"""Measures a back end: pictures, prompts and decode steps, on the path that requests take.

Caches hold arbitrary numbers, since time does not depend on them. Where steps overlap, the time of one is that from
result to result. Times are medians on a machine that may be shared: compare them within one run only.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, pairwise
from statistics import median
from typing import Literal

import numpy as np

from mllama_runtime.backends import Backend, Chunk, Features
from mllama_runtime.bundle import Bundle
from mllama_runtime.config import ModelConfig
from mllama_runtime.engine_record import Limits
from mllama_runtime.errors import UsageError
from mllama_runtime.preprocessing import ImageTiles, blank_tiles
from mllama_runtime.roofline import decode_bytes
from mllama_runtime.sampling import Sampler, SamplingParams
from mllama_runtime.tokens import Pending

_NUM_BEFORE_PICTURE = 5  # tokens of Llama 3.2's prompt format: begin of text, and a user's header
_WARM_UP = 3  # calls that pay for memory, kernels chosen late and captured steps


@dataclass(frozen=True, slots=True)
class DecodeCase:
    """A state to decode from: `batch` rows, each with num_cached tokens in a cache of cache_len, and a picture or none.

    num_tiles: of each row's picture; 0 for none.
    """

    batch: int
    num_cached: int
    cache_len: int
    num_tiles: int = 0


@dataclass(frozen=True, slots=True)
class Measured:
    """One line of a bench.

    num_tokens: of the prompt, or in the cache of each row. seconds: None where `reason` says why nothing was measured.
    read_bytes: what a decode step must read, see `roofline`.
    """

    kind: Literal["vision", "first token", "decode"]
    batch: int
    num_tiles: int
    num_tokens: int
    seconds: float | None = None
    read_bytes: int | None = None
    reason: str | None = None

    @property
    def what(self) -> str:
        picture = f"picture of {self.num_tiles} tile{'s' * (self.num_tiles > 1)}" if self.num_tiles else "text only"
        if self.kind == "vision":
            return f"vision, {picture}"
        if self.kind == "first token":
            return f"first token, {self.num_tokens} tokens, {picture}"
        return f"decode, batch {self.batch}, {self.num_tokens} cached, {picture}"

    @property
    def tokens_per_second(self) -> float | None:
        """New tokens of a decode step, prompt tokens otherwise; None for a picture alone."""
        if self.seconds is None or self.kind == "vision":
            return None
        return (self.batch if self.kind == "decode" else self.num_tokens) / self.seconds


def bench(
    bundle: Bundle,
    backend: Backend,
    *,
    batches: Sequence[int],
    tiles: Sequence[int],
    prompt_len: int,
    cache_len: int,
    steps: int,
) -> Iterator[Measured]:
    """Vision (where it runs by itself), first tokens at batch 1, and decode steps of every batch size.

    Args:
        tiles: of the pictures; 0 for text alone.
        cache_len: of a decode step's rows, half of which is filled.
        steps: decode steps to measure of each case.
    """
    model, limits = bundle.manifest.model, backend.limits
    if steps + _WARM_UP > cache_len - cache_len // 2:
        expected = f"at most half of the cache's {cache_len} positions, less {_WARM_UP}"
        raise UsageError("more steps than the cache has room for", where="steps", expected=expected, found=steps)
    largest = model.vision.max_num_tiles
    # Elsewhere the vision graph runs when a prompt needs the picture, and is part of that.
    if limits is None and not model.is_text_only:
        seconds = _median_seconds(lambda: backend.encode(sample_tiles(model)), repeats=5)
        yield Measured("vision", 1, largest, 0, seconds)
    for num_tiles in tiles:
        row = Measured("first token", 1, num_tiles, prompt_len)
        if reason := beyond(limits, batch=1, num_tokens=prompt_len, num_tiles=num_tiles):
            yield replace(row, reason=reason)
            continue
        semantics = bundle.manifest.mask_semantics
        num_before = min(_NUM_BEFORE_PICTURE, prompt_len - 1) if num_tiles and semantics == "hf" else 0
        yield replace(row, seconds=first_token_seconds(backend, model, prompt_len, num_tiles, num_before))
    for batch in batches:
        for num_tiles in tiles:
            case = DecodeCase(batch, cache_len // 2, cache_len, num_tiles)
            row = Measured("decode", batch, num_tiles, case.num_cached)
            if reason := beyond(limits, batch=batch, num_tokens=cache_len, num_tiles=num_tiles):
                yield replace(row, reason=reason)
                continue
            read = decode_bytes(
                bundle, batch=batch, num_cached=case.num_cached, num_tiles=num_tiles, on_cpu=backend.name == "cpu"
            )
            yield replace(row, seconds=decode_seconds(backend, model, case, steps=steps), read_bytes=read)


def beyond(limits: Limits | None, *, batch: int, num_tokens: int, num_tiles: int) -> str | None:
    """Why a back end with limits cannot take a case; None if it can."""
    if limits is None:
        return None
    sides = (
        ("rows", batch, limits.max_batch),
        ("tokens", num_tokens, limits.max_seq_len),
        ("tiles", num_tiles, limits.max_tiles),
    )
    return next((f"{asked} {what}: the engine takes {limit}" for what, asked, limit in sides if asked > limit), None)


def first_token_seconds(
    backend: Backend, model: ModelConfig, num_tokens: int, num_tiles: int, num_before: int, *, repeats: int = 5
) -> float:
    """Seconds from a picture's pixels, if there is one, and a prompt's token ids to the first token.

    num_before: tokens before the picture, which see its padding tiles.
    """
    tokens = backend.tokens(num_slots=1, cache_len=num_tokens, num_tiles=num_tiles)
    token_ids = np.arange(num_tokens) % model.text.vocab_size
    visibility = np.zeros((num_tokens, num_tiles), np.bool_)
    visibility[num_before:] = True
    starts = range(0, num_tokens, tokens.prefill_chunk)
    keys = count()

    def work() -> None:
        features: list[Features] = []
        if num_tiles:  # a new picture each time: one that is known is not encoded again
            features = [backend.encode(replace(sample, key=f"sample {next(keys)}"))]
        for start, stop in pairwise([*starts, num_tokens]):
            part = slice(start, stop)
            tokens.extend(0, Chunk(token_ids[part], start, visibility[part], features, start < num_before))
        tokens.first(0, Sampler(SamplingParams(), model.text.vocab_size)).read()
        tokens.leave(0)

    sample = sample_tiles(model, num_tiles or None)
    return _median_seconds(work, repeats)


class Decoding:
    """Rows that are being decoded; `step` gives each its next token. Up to cache_len - num_cached times."""

    def __init__(self, backend: Backend, model: ModelConfig, case: DecodeCase) -> None:
        self._tokens = backend.tokens(num_slots=case.batch, cache_len=case.cache_len, num_tiles=case.num_tiles)
        self._slots = range(case.batch)
        self._pending: deque[Pending] = deque()
        features = [backend.encode(sample_tiles(model, case.num_tiles))] if case.num_tiles else []
        visibility, token_ids = np.ones((1, case.num_tiles), np.bool_), np.zeros(1, np.int64)
        for slot in self._slots:  # two tokens stand for all that are cached
            for position in (0, case.num_cached - 1):
                self._tokens.extend(slot, Chunk(token_ids, position, visibility, features))
            self._tokens.first(slot, Sampler(SamplingParams(), model.text.vocab_size)).read()

    def step(self) -> None:
        """Ask for the next tokens, and wait for those that the back end does not work ahead of."""
        self._pending.append(self._tokens.step(self._slots))
        while len(self._pending) > self._tokens.max_pending:
            self._pending.popleft().read()

    def end(self) -> None:
        """Free the slots."""
        for pending in self._pending:
            pending.read()
        for slot in self._slots:
            self._tokens.leave(slot)


def decode_seconds(backend: Backend, model: ModelConfig, case: DecodeCase, *, steps: int) -> float:
    """Seconds of one decode step, which gives `case.batch` tokens."""
    decoding = Decoding(backend, model, case)
    try:
        return _median_seconds(decoding.step, steps)
    finally:
        decoding.end()


def sample_tiles(model: ModelConfig, num_tiles: int | None = None) -> ImageTiles:
    """A picture of noise with that many real tiles, all of them by default.

    Raises:
        UsageError: no canvas has so many.
    """
    vision, number = model.vision, num_tiles or model.vision.max_num_tiles
    sizes = [high * wide for high, wide in vision.supported_aspect_ratios]
    if number not in sizes:
        expected = " or ".join(map(str, sorted(set(sizes))))
        raise UsageError("no picture has so many tiles", where="tiles", expected=expected, found=number)
    blank = blank_tiles(vision, number)
    noise = np.random.default_rng(0).standard_normal(blank.pixel_values.shape, np.float32)
    return replace(blank, pixel_values=noise, key="sample")


def _median_seconds(work: Callable[[], object], repeats: int) -> float:
    for _ in range(_WARM_UP):
        work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return median(times)
