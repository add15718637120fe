"""Noise of the next step's draws, made by threads while the device works on this one.

It is a function of seed and step alone (`sampling.gumbel_noise`), so it can be made before the step is known to come;
what was made for a request that has ended is dropped.
"""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from mllama_runtime.sampling import Sampler, write_gumbel_noise

_MAX_THREADS = 8


class NoiseAhead:
    """One row of noise [vocab] a slot, for the step that comes next."""

    def __init__(self, num_slots: int, vocab_size: int) -> None:
        self._rows = np.empty((num_slots, vocab_size), np.float32)
        self._drawn: list[tuple[int, int, Future[None]] | None] = [None] * num_slots  # seed, step
        self._threads = ThreadPoolExecutor(min(num_slots, _MAX_THREADS, len(os.sched_getaffinity(0))), "noise")

    def write(self, out: NDArray[np.float32], slot: int, sampler: Sampler, step: int) -> None:
        """Write the noise of this step [vocab]: made ahead, or else now."""
        drawn, self._drawn[slot] = self._drawn[slot], None
        if drawn is not None:
            drawn[2].result()
            if drawn[:2] == (sampler.seed, step):
                out[:] = self._rows[slot]
                return
        write_gumbel_noise(out, sampler.seed, step)

    def draw(self, slot: int, sampler: Sampler, step: int) -> None:
        """Start drawing a later step's noise."""
        future = self._threads.submit(write_gumbel_noise, self._rows[slot], sampler.seed, step)
        self._drawn[slot] = sampler.seed, step, future
