"""What every back end must do, whatever it runs on: the same tests, the same tokens as the plain CPU back end.

The host double runs everywhere; the others take an NVIDIA GPU and come with `tests/gpu/run.sh`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from gpu.environment import environment
from host_device import host_backend
from mllama_runtime import Engine, Request, RequestError, SamplingParams
from mllama_runtime.backends import Backend, Chunk, backend_from_bundle
from mllama_runtime.bundle import Bundle
from mllama_runtime.decode import prefill
from mllama_runtime.engine import Stream
from mllama_runtime.engine_record import Limits
from mllama_runtime.evaluation.asking import AskOptions, answers_from_engine
from mllama_runtime.evaluation.questions import task_from_jsonl
from numpy.typing import NDArray
from PIL import Image

LIMITS = Limits(max_batch=4, max_seq_len=160, prefill_chunk=32, max_tiles=8)
ON_GPU = ("cuda", "tensorrt", "tensorrt-rtx")
# On the CPU both sides compute in FP32 from the same weights, in another order; on a GPU from FP16 ones, in FP16: what
# that adds is of the size that `mllama validate` holds FP16 to.
TOLERANCE = {"host double": 1e-4, "cpu": 1e-4}
FP16_TOLERANCE = 0.02


@pytest.fixture(
    scope="module", params=["cpu", "host double", *(pytest.param(name, marks=pytest.mark.gpu) for name in ON_GPU)]
)
def pair(request: pytest.FixtureRequest, bundle_of, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """An engine on the back end under test, beside the plain one; both open."""
    name = request.param
    if name in ON_GPU and (missing := environment()["backends"][name]["missing"]):
        pytest.skip(missing)
    bundle = bundle_of("fp32" if name in TOLERANCE else "fp16")
    if name.startswith("tensorrt"):
        from mllama_exporter.engines import EngineOptions, engine_for_bundle

        bundle = shutil.copytree(bundle, tmp_path_factory.mktemp(name) / "bundle")
        limits = {"max_batch": 4, "max_seq_len": 160, "prefill_chunk": 32, "max_tiles": 8}
        engine_for_bundle(bundle, EngineOptions(name, **limits))
    opened = Bundle.open(bundle)
    if name == "host double":
        backend: Backend = host_backend(opened, limits=LIMITS)
    else:
        backend = backend_from_bundle(opened, name, 1, limits=LIMITS if name == "cuda" else None)
    with Engine.load(bundle, backend="cpu", num_threads=1) as plain, Engine(opened, backend) as engine:
        yield Pair(name, engine, backend, plain)


class Pair:
    def __init__(self, name: str, engine: Engine, backend: Backend, plain: Engine) -> None:
        self.name, self.engine, self.backend, self.plain = name, engine, backend, plain
        self.tolerance = TOLERANCE.get(name, FP16_TOLERANCE)

    def assert_same(self, requests: list[Request]) -> None:
        """Together on one side, alone on the other."""
        expected = [self.plain.generate_batch([each])[0] for each in requests]
        for theirs, ours in zip(expected, self.engine.generate_batch(requests), strict=True):
            assert ours.token_ids == theirs.token_ids
            assert (ours.text, ours.finish_reason, ours.usage) == (theirs.text, theirs.finish_reason, theirs.usage)


def picture(seed: int, width: int = 100, height: int = 60) -> Image.Image:
    """Noise whose canvas has one to four tiles, by its shape."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8))


ASK = "How many shapes are there?"


def greedy(count: int) -> SamplingParams:
    return SamplingParams(max_new_tokens=count)


def mixed() -> list[Request]:
    """More rows than slots, of every kind: text alone, one and two pictures of different canvases, text before them."""
    turns = [
        {"role": "user", "content": "What comes after three?"},
        {"role": "assistant", "content": "four"},
        {"role": "user", "content": [{"type": "text", "text": "And here?"}, {"type": "image"}]},
    ]
    return [
        Request(ASK, images=[picture(0)], sampling=greedy(9)),
        Request("Hello", sampling=greedy(3)),
        Request("Which?", images=[picture(1, 40, 40), picture(2, 50, 200)], sampling=greedy(12)),
        Request("a " * 70, sampling=greedy(1)),
        Request(turns, images=[picture(3, 210, 50)], sampling=greedy(5)),
        Request("text before<|image|>", raw=True, images=[picture(5)], sampling=greedy(7)),
        Request(ASK, images=[picture(4, 300, 300)], system="Be short.", date_string="26 Jul 2024", sampling=greedy(20)),
        Request("What comes after six?", sampling=greedy(30)),
    ]


def test_features_are_those_of_the_vision_graph(pair: Pair) -> None:
    from mllama_runtime.images import load_image
    from mllama_runtime.preprocessing import preprocess

    for image in (picture(0), picture(1, 60, 60), picture(2, 300, 300), picture(3, 30, 90)):
        tiles = preprocess(load_image(image), pair.engine.preprocessor)
        ours, theirs = pair.backend.encode(tiles), pair.plain._backend.encode(tiles)
        assert (ours.key, ours.num_tiles) == (theirs.key, theirs.num_tiles)
        assert ours.arrays().keys() == theirs.arrays().keys()
        for name, expected in theirs.arrays().items():
            assert relative_error(ours.arrays()[name], expected) < pair.tolerance, name


def relative_error(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    assert found.shape == expected.shape
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("index", range(8))
def test_logits_and_caches_after_a_prompt_and_after_steps(pair: Pair, index: int) -> None:
    request, logits, caches = mixed()[index], [], []
    for engine in (pair.engine, pair.plain):
        row = Stream(engine, [request])._rows[0]
        slots = engine._backend.slots(num_slots=1, cache_len=120, num_tiles=row.visibility.shape[1])
        found = [prefill(slots, 0, row, "hf")]
        for step in range(3):
            positions = np.array([len(row.token_ids) + step])
            found.append(slots.decode(np.array([70 + step]), positions)[0].copy())
        logits.append(np.stack(found))
        caches.append(slots.cached(0, len(row.token_ids) + 3))
    assert relative_error(*logits) < pair.tolerance
    for name, expected in caches[1].items():
        assert relative_error(caches[0][name], expected) < pair.tolerance, name


def test_logits_of_several_tokens_are_those_of_single_steps(pair: Pair) -> None:
    for request in (mixed()[0], mixed()[1]):
        row = Stream(pair.engine, [request])._rows[0]
        slots = pair.backend.slots(num_slots=1, cache_len=120, num_tiles=row.visibility.shape[1])
        answer, position = np.array([70, 71, 72, 73]), len(row.token_ids)
        prefill(slots, 0, row, "hf")
        alone = [slots.decode(answer[i : i + 1], np.array([position + i]))[0].copy() for i in range(4)]
        prefill(slots, 0, row, "hf")
        visibility = np.tile(row.visibility[-1], (4, 1))
        together = slots.prefill(0, Chunk(answer, position, visibility, row.features), num_logits=4)
        assert relative_error(together, np.stack(alone)) < pair.tolerance


def test_a_mixed_batch_of_more_rows_than_slots(pair: Pair) -> None:
    pair.assert_same(mixed())
    pair.assert_same(mixed()[::-1])


def test_text_alone(pair: Pair) -> None:
    pair.assert_same([Request(f"What comes after {name}?", sampling=greedy(8)) for name in ("one", "two", "seven")])


def test_every_way_to_sample(pair: Pair) -> None:
    options: list[dict[str, object]] = [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 5},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.1, "repetition_penalty": 1.3},
        {"repetition_penalty": 1.2, "frequency_penalty": 0.5, "presence_penalty": 0.3},
        {"logit_bias": {70: 5.0, 71: -100.0}, "temperature": 1.0},
        {"min_new_tokens": 6, "stop_token_ids": (11, 13)},
        {"min_new_tokens": 3, "temperature": 2.0, "top_k": 50, "top_p": 0.9},
        {},
    ]
    requests = [
        Request(
            ASK, images=[picture(0)] if seed % 3 else [], sampling=SamplingParams(max_new_tokens=12, seed=seed, **each)
        )
        for seed, each in enumerate(options)
    ]
    pair.assert_same(requests)


def test_logprobs(pair: Pair) -> None:
    sampling = SamplingParams(max_new_tokens=6, logprobs=3)
    requests = [Request(ASK, images=[picture(0)], sampling=sampling), Request("Hello", sampling=greedy(9))]
    ours, theirs = (engine.generate_batch(requests) for engine in (pair.engine, pair.plain))
    assert [answer.token_ids for answer in ours] == [answer.token_ids for answer in theirs]
    assert ours[1].logprobs is None
    for (found, top), (expected, their_top) in zip(ours[0].logprobs or (), theirs[0].logprobs or (), strict=True):
        assert found == pytest.approx(expected, abs=10 * pair.tolerance)
        assert [token_id for token_id, _ in top] == [token_id for token_id, _ in their_top]


def test_streams_that_cross_one_another(pair: Pair) -> None:
    """Two are read by turns, a third is dropped in the middle, a fourth is never read."""
    requests = mixed()
    expected = [pair.plain.generate_batch([each])[0].token_ids for each in requests]
    streams = [Stream(pair.engine, [each]) for each in requests[:4]]
    found: list[list[int]] = [[], []]
    for _ in range(4):
        found[0].append(next(streams[0]).token_id)
    next(streams[2])
    streams[2].close()
    assert streams[2].generation().finish_reason == "cancelled"
    for index in (1, 0):
        found[index] += [event.token_id for event in streams[index]]
    assert [tuple(each) for each in found] == expected[:2]
    del streams
    pair.assert_same(requests)


def test_a_picture_is_encoded_once_for_many_prompts(pair: Pair) -> None:
    images = [pair.engine.encode_image(picture(seed)) for seed in range(4)]
    plain = [pair.plain.encode_image(picture(seed)) for seed in range(4)]
    for _ in range(2):
        for ours, theirs in zip(images, plain, strict=True):
            found = pair.engine.generate(ASK, images=[ours], sampling=greedy(6))
            assert found.token_ids == pair.plain.generate(ASK, images=[theirs], sampling=greedy(6)).token_ids


def test_a_full_cache_ends_the_answer(pair: Pair) -> None:
    if pair.backend.limits is None:
        pytest.skip("its slots are made to measure")
    answer = pair.engine.generate("a " * 60, sampling=SamplingParams(max_new_tokens=1000, min_new_tokens=1000))
    assert answer.finish_reason == "length"
    assert answer.usage.prompt_tokens + answer.usage.completion_tokens == pair.backend.limits.max_seq_len
    other = [Request(ASK, images=[picture(0)], sampling=greedy(9))]
    pair.assert_same(other)


def test_requests_beyond_the_limits_are_refused(pair: Pair) -> None:
    limits = pair.backend.limits
    if limits is None:
        pytest.skip("its slots are made to measure")
    with pytest.raises(RequestError, match=r"the prompt is too long.*at most 159 tokens"):
        pair.engine.generate("a " * 200)
    with pytest.raises(RequestError, match=r"too many pictures: expected at most 2.*found 3.*--max-tiles"):
        pair.engine.generate(ASK, images=[picture(0)] * 3)
    pair.assert_same(mixed()[:2])


def test_accuracy_on_held_out_questions(pair: Pair, questions_of: Callable[[str, int], Path]) -> None:
    task = task_from_jsonl(questions_of("held_out", 60))
    options = AskOptions(max_new_tokens=12)
    ours, theirs = (answers_from_engine(engine, task.questions, options) for engine in (pair.engine, pair.plain))
    assert ours == theirs
