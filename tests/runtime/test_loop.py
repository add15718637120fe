"""Requests that join, leave and are cancelled at random over a few slots: each gets what it gets alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from host_device import HostDevice, host_backend
from mllama_runtime import Engine, Request, SamplingParams
from mllama_runtime.bundle import Bundle
from mllama_runtime.decode import Row
from mllama_runtime.engine import Stream
from mllama_runtime.engine_record import Limits
from mllama_runtime.loop import Loop
from PIL import Image

NUM_SLOTS, NUM_REQUESTS = 8, 1000
LIMITS = Limits(max_batch=NUM_SLOTS, max_seq_len=200, prefill_chunk=48, max_tiles=8)


def requests() -> list[Request]:
    """Forty that differ in length, pictures, and how tokens are chosen."""
    rng = np.random.default_rng(0)
    shapes = [(40, 40), (100, 60), (60, 250), (300, 300)]
    made = []
    for seed in range(40):
        images = [
            Image.fromarray(rng.integers(0, 255, (*shapes[(seed + each) % 4][::-1], 3), np.uint8))
            for each in range((0, 1, 0, 1, 2)[seed % 5])
        ]
        options: dict[str, object] = {}
        if seed % 3 == 1:
            options = {"temperature": 1.2, "top_k": 30, "top_p": 0.9, "seed": seed, "repetition_penalty": 1.1}
        elif seed % 7 == 2:
            options = {"min_new_tokens": 1 + seed * 7 % 23, "frequency_penalty": 0.4}
        sampling = SamplingParams(max_new_tokens=1 + seed * 7 % 23, **options)
        made.append(Request("What is this? " * (1 + seed % 9), images=images, sampling=sampling))
    return made


@pytest.fixture(scope="module")
def bundle(bundle_of: Callable[..., Path]) -> Bundle:
    return Bundle.open(bundle_of())


@pytest.fixture(scope="module")
def expected(bundle: Bundle) -> list[tuple[int, ...]]:
    with Engine.load(bundle.root, backend="cpu", num_threads=1) as plain:
        return [plain.generate_batch([each])[0].token_ids for each in requests()]


@pytest.fixture
def engine(bundle: Bundle) -> Iterator[Engine]:
    with Engine(bundle, host_backend(bundle, limits=LIMITS)) as opened:
        yield opened


def rows_of(engine: Engine, chosen: list[Request]) -> list[Row]:
    return Stream(engine, chosen)._rows


def test_a_thousand_requests_through_eight_slots(engine: Engine, expected: list[tuple[int, ...]]) -> None:
    """Arrivals in bursts and lulls; one in ten is cancelled, waiting, in its prompt or in its answer."""
    rng, kinds = random.Random(0), requests()
    images = [[engine.encode_image(image) for image in each.images] for each in kinds]
    kinds = [Request(each.prompt, images=own, sampling=each.sampling) for each, own in zip(kinds, images, strict=True)]
    tokens = engine._backend.tokens(num_slots=NUM_SLOTS, cache_len=LIMITS.max_seq_len, num_tiles=LIMITS.max_tiles)
    loop = Loop(tokens, NUM_SLOTS, "hf")
    active: list[tuple[int, Row]] = []
    cancelled: list[tuple[int, Row]] = []
    done: list[tuple[int, Row]] = []
    submitted = 0
    while submitted < NUM_REQUESTS or active:
        for _ in range(min(rng.choice((0, 0, 1, 1, 2, 12)), NUM_REQUESTS - submitted)):
            kind = rng.randrange(len(kinds))
            (row,) = rows_of(engine, [kinds[kind]])
            loop.submit(row)
            active.append((kind, row))
            submitted += 1
        if active and rng.random() < 0.1:
            victim = active.pop(rng.randrange(len(active)))
            loop.cancel(victim[1])
            cancelled.append(victim)
        loop.step()
        done += [each for each in active if each[1].is_over]
        active = [each for each in active if not each[1].is_over]
    while not loop.is_idle:
        loop.step()

    assert len(done) + len(cancelled) == NUM_REQUESTS
    assert len(cancelled) > 50
    for kind, row in done:
        assert row.error is None
        assert tuple(row.generated) == expected[kind]
    for kind, row in cancelled:  # what they had got until then is right too
        assert tuple(row.generated) == expected[kind][: len(row.generated)]
    assert sorted(loop._free) == list(range(NUM_SLOTS))
    assert loop.num_steps < sum(len(row.generated) for _, row in done) / 2  # they did share steps
    slots = engine._backend.slots(num_slots=1, cache_len=1, num_tiles=0)
    assert not slots._tiles.any()
    assert not slots.positions.any()


def test_those_who_run_are_not_kept_waiting_by_a_long_prompt(engine: Engine) -> None:
    """A prompt of several chunks is fed between steps, one chunk at a time."""
    tokens = engine._backend.tokens(num_slots=NUM_SLOTS, cache_len=LIMITS.max_seq_len, num_tiles=LIMITS.max_tiles)
    loop = Loop(tokens, NUM_SLOTS, "hf")
    short, long = rows_of(
        engine,
        [
            Request("Hello", sampling=SamplingParams(max_new_tokens=40, min_new_tokens=40)),
            Request("a " * 90, sampling=SamplingParams(max_new_tokens=2)),
        ],
    )
    loop.submit(short)
    loop.step()
    loop.submit(long)
    counts = []
    while not long.generated and not long.is_over:
        loop.step()
        counts.append(len(short.generated))
    num_chunks = -(-len(long.token_ids) // LIMITS.prefill_chunk)
    assert num_chunks >= 2
    assert all(count >= step for step, count in enumerate(counts, start=1))
    assert counts[-1] >= num_chunks


def test_the_lowest_slot_is_taken_first(engine: Engine) -> None:
    tokens = engine._backend.tokens(num_slots=NUM_SLOTS, cache_len=LIMITS.max_seq_len, num_tiles=LIMITS.max_tiles)
    loop = Loop(tokens, NUM_SLOTS, "hf")
    rows = rows_of(engine, [Request("Hello", sampling=SamplingParams(max_new_tokens=30, min_new_tokens=30))] * 3)
    for row in rows:
        loop.submit(row)
    while not all(row.generated or row.is_over for row in rows):
        loop.step()
    assert [row.slot for row in rows] == [0, 1, 2]
    loop.cancel(rows[1])
    (late,) = rows_of(engine, [Request("Hello", sampling=SamplingParams(max_new_tokens=3))])
    loop.submit(late)
    loop.step()
    assert late.slot == 1


def test_cancelling_twice_or_afterwards_does_nothing(engine: Engine) -> None:
    tokens = engine._backend.tokens(num_slots=NUM_SLOTS, cache_len=LIMITS.max_seq_len, num_tiles=LIMITS.max_tiles)
    loop = Loop(tokens, NUM_SLOTS, "hf")
    waiting, running = rows_of(engine, [Request("Hello", sampling=SamplingParams(max_new_tokens=3))] * 2)
    loop.submit(running)
    while not running.is_over:
        loop.step()
    loop.submit(waiting)
    for row in (waiting, running, waiting, running):
        loop.cancel(row)
    while not loop.is_idle:
        loop.step()
    assert not waiting.generated
    assert sorted(loop._free) == list(range(NUM_SLOTS))


def test_the_host_reads_a_step_behind_the_device(bundle: Bundle) -> None:
    """The next step is on its way before the result of the one before is read."""
    device = HostDevice()
    with Engine(bundle, host_backend(bundle, limits=LIMITS, device=device)) as engine:
        tokens = engine._backend.tokens(num_slots=NUM_SLOTS, cache_len=LIMITS.max_seq_len, num_tiles=LIMITS.max_tiles)
        loop = Loop(tokens, NUM_SLOTS, "hf")
        (row,) = rows_of(engine, [Request("Hello", sampling=SamplingParams(max_new_tokens=9, min_new_tokens=9))])
        loop.submit(row)
        for _ in range(5):
            loop.step()
        assert row.num_asked == len(row.generated) + 1
