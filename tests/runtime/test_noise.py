"""Noise that is made ahead: the same numbers, whatever was made before and for whom."""

from __future__ import annotations

import numpy as np
import pytest
from mllama_runtime import SamplingParams
from mllama_runtime.backends import noise
from mllama_runtime.backends.noise import NoiseAhead
from mllama_runtime.sampling import Sampler, write_gumbel_noise
from numpy.typing import NDArray

VOCAB = 70_000


def sampler(seed: int) -> Sampler:
    return Sampler(SamplingParams(temperature=1.0, seed=seed), VOCAB)


def expected(seed: int, step: int) -> NDArray[np.float32]:
    row = np.empty(VOCAB, np.float32)
    write_gumbel_noise(row, seed, step)
    return row


def test_the_noise_of_every_step_and_slot() -> None:
    ahead, out = NoiseAhead(3, VOCAB), np.empty(VOCAB, np.float32)
    for step in range(1, 5):
        for slot in range(3):
            ahead.write(out, slot, sampler(slot), step)
            assert np.array_equal(out, expected(slot, step))
            ahead.draw(slot, sampler(slot), step + 1)


def test_what_was_made_for_another_request_or_step_is_not_used() -> None:
    ahead, out = NoiseAhead(1, VOCAB), np.empty(VOCAB, np.float32)
    ahead.draw(0, sampler(1), 5)
    for seed, step in ((2, 5), (1, 6), (2, 1)):
        ahead.write(out, 0, sampler(seed), step)
        assert np.array_equal(out, expected(seed, step))


def test_nothing_is_drawn_in_the_step_that_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ahead, out = NoiseAhead(1, VOCAB), np.empty(VOCAB, np.float32)
    ahead.draw(0, sampler(7), 3)
    wanted = expected(7, 3)

    def none(*arguments: object) -> None:
        raise AssertionError("drawn in the step")

    ahead._threads.shutdown(wait=True)
    monkeypatch.setattr(noise, "write_gumbel_noise", none)
    ahead.write(out, 0, sampler(7), 3)
    assert np.array_equal(out, wanted)
