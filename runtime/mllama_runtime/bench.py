"""Measures a back end's vision, prefill and decode; caches hold arbitrary numbers, since time does not depend on them.

Times are the median over repetitions on a machine that may be shared: compare them within one run only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from mllama_runtime.backends import Backend, Features
from mllama_runtime.config import ModelConfig
from mllama_runtime.preprocessing import ImageTiles


@dataclass(frozen=True, slots=True)
class DecodeCase:
    """A state to decode from: batch rows, each with num_cached tokens in a cache of cache_len, and its pictures."""

    batch: int
    num_cached: int
    cache_len: int
    features: Sequence[Features] = ()


def vision_seconds(backend: Backend, model: ModelConfig, *, repeats: int = 5) -> float:
    """Seconds to encode one picture; the tower's work is the same for any number of tiles."""
    tiles = sample_tiles(model)
    return _median_seconds(lambda: backend.encode(tiles), repeats)


def prefill_seconds(backend: Backend, model: ModelConfig, num_tokens: int, *, repeats: int = 5) -> float:
    """Seconds to prefill one row of text."""
    slots = backend.slots(num_slots=1, cache_len=num_tokens, num_tiles=0)
    token_ids = np.arange(num_tokens) % model.text.vocab_size
    visibility = np.zeros((num_tokens, 0), np.bool_)
    return _median_seconds(lambda: slots.prefill(0, token_ids, 0, visibility, (), with_padding_tiles=False), repeats)


def decode_step(backend: Backend, case: DecodeCase) -> Callable[[], object]:
    """A function that decodes one token a row; calling it again decodes the next one, until the cache is full."""
    num_tiles = sum(feature.num_tiles for feature in case.features)
    slots = backend.slots(num_slots=case.batch, cache_len=case.cache_len, num_tiles=num_tiles)
    token_ids = np.zeros(case.batch, np.int64)
    sees_all = np.ones((1, num_tiles), np.bool_)
    for slot in range(case.batch):  # one token stands for the whole prompt: what is cached does not change the time
        slots.prefill(slot, token_ids[:1], 0, sees_all, case.features, with_padding_tiles=False)
    positions = np.full(case.batch, case.num_cached, np.int64)

    def step() -> None:
        slots.decode(token_ids, positions)
        positions[:] = np.minimum(positions + 1, case.cache_len - 1)

    return step


def decode_seconds(backend: Backend, case: DecodeCase, *, steps: int = 32) -> float:
    """Seconds of one decode step, which gives `case.batch` tokens."""
    return _median_seconds(decode_step(backend, case), steps)


def sample_tiles(model: ModelConfig, num_tiles: int | None = None) -> ImageTiles:
    """A picture of noise with that many real tiles, all of them by default."""
    vision, count = model.vision, num_tiles or model.vision.max_num_tiles
    shape = (vision.max_num_tiles, vision.num_channels, vision.image_size, vision.image_size)
    ratio_ids = [index + 1 for index, (high, wide) in enumerate(vision.supported_aspect_ratios) if high * wide == count]
    return ImageTiles(
        pixel_values=np.random.default_rng(0).standard_normal(shape, np.float32),
        aspect_ratio_id=ratio_ids[0],
        aspect_ratio_mask=(np.arange(vision.max_num_tiles) < count).astype(np.int64),
        num_tiles=count,
        key="sample",
    )


def _median_seconds(work: Callable[[], object], repeats: int) -> float:
    work()  # the first call pays for memory and kernels chosen late
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return median(times)
