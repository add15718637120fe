"""The back end of static memory, on the host double: what it allocates, captures and moves, and how it fails."""

from __future__ import annotations

import gc
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from host_device import HostDevice, HostProgram, HostSession, HostStream, host_backend
from mllama_runtime import Engine, EnvironmentFault, Request, ResourceError, SamplingParams, UsageError
from mllama_runtime.backends import noise
from mllama_runtime.bundle import Bundle
from mllama_runtime.decode import prefill
from mllama_runtime.engine import Stream
from mllama_runtime.engine_record import Limits
from mllama_runtime.memory import memory_plan
from mllama_runtime.sampling import write_gumbel_noise
from numpy.typing import NDArray
from PIL import Image

LIMITS = Limits(max_batch=4, max_seq_len=160, prefill_chunk=32, max_tiles=8)
ASK = "How many shapes are there?"
KINDS = ("prefill", "decode")
HOST_RUN = HostSession.run


@pytest.fixture
def bundle(bundle_of: Callable[..., Path]) -> Bundle:
    return Bundle.open(bundle_of())


@pytest.fixture
def device() -> HostDevice:
    return HostDevice()


@pytest.fixture
def engine(bundle: Bundle, device: HostDevice) -> Iterator[Engine]:
    with Engine(bundle, host_backend(bundle, limits=LIMITS, device=device)) as opened:
        yield opened


@pytest.fixture
def plain(bundle: Bundle) -> Iterator[Engine]:
    with Engine.load(bundle.root, backend="cpu", num_threads=1) as opened:
        yield opened


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8))


def one_tile(seed: int) -> Image.Image:
    return picture(40, 40, seed)


def four_tiles(seed: int) -> Image.Image:
    return picture(300, 300, seed)


def test_what_is_planned_is_what_is_allocated(engine: Engine, device: HostDevice) -> None:
    plan = engine.memory()
    assert device.device_bytes == plan.device_bytes
    assert device.pinned_bytes == plan.pinned_bytes
    assert str(plan).startswith(f"{plan.device_bytes / 1e6:.1f} MB")


def test_the_plan_of_an_11b(bundle: Bundle) -> None:
    """Against arithmetic of its own: 2 bytes, 8 key/value heads of 128, 32 self- and 8 cross-attention layers."""
    model = bundle.manifest.model
    text = replace(
        model.text,
        hidden_size=4096,
        num_heads=32,
        num_kv_heads=8,
        num_layers=40,
        vocab_size=128256,
        cross_attention_layers=(3, 8, 13, 18, 23, 28, 33, 38),
    )
    vision = replace(model.vision, image_size=560, patch_size=14, max_num_tiles=4)
    limits = Limits(max_batch=4, max_seq_len=8192, prefill_chunk=512, max_tiles=4)
    plan = memory_plan(replace(model, text=text, vision=vision), limits, cache_dtype="float16")
    parts = plan.device_parts()
    assert parts["self-attention caches"] == 4 * 8192 * 2 * 32 * 8 * 128 * 2
    assert parts["pictures' keys and values"] == 4 * 4 * 1601 * 2 * 8 * 8 * 128 * 2
    assert parts["encoded picture 0"] == parts["encoded picture 1"] == 4 * 1601 * 2 * 8 * 8 * 128 * 2
    assert parts["pixels 0"] == pytest.approx(4 * 3 * 560 * 560 * 4, abs=1024)
    assert parts["logits"] == 4 * 128256 * 4


def test_no_step_allocates_anything(engine: Engine, device: HostDevice) -> None:
    """Counted from entering the engine on, over prompts, pictures, joins, sampling and captured steps."""
    before = device.num_allocations
    sampled = SamplingParams(max_new_tokens=12, temperature=1.0, seed=1, repetition_penalty=1.1)
    requests = [Request(ASK, images=[one_tile(i)] if i % 2 else [], sampling=sampled) for i in range(9)]
    engine.generate_batch(requests)
    engine.generate_batch(requests[:2])
    assert device.num_captures > 0
    assert device.num_allocations == before


def test_steps_are_captured_and_text_alone_skips_cross_attention(engine: Engine, device: HostDevice) -> None:
    device.runs.clear()
    engine.generate("Hello", sampling=SamplingParams(max_new_tokens=30, min_new_tokens=30, temperature=1.0, seed=0))
    counts = Counter(device.runs)
    assert counts == {"decoder text_prefill": 2, "decoder text_decode": 29, "sampler rows": 30}  # a prompt of 2 chunks
    assert device.num_captures == 1
    device.runs.clear()
    engine.generate(ASK, images=[one_tile(0)], sampling=SamplingParams(max_new_tokens=3))
    assert {"vision images", "decoder prefill", "decoder decode", "greedy rows"} == set(device.runs)


@pytest.mark.parametrize(
    "fault",
    [
        EnvironmentFault("the GPU failed", found="CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"),
        ResourceError("not enough memory for a step", found="Failed to allocate"),  # as ONNX Runtime tells the same
    ],
    ids=lambda fault: type(fault).__name__,
)
def test_steps_that_cannot_be_captured_run_as_they_are(
    fault: Exception,
    bundle: Bundle,
    plain: Engine,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def capture(stream: HostStream, work: Callable[[], None]) -> None:
        raise fault

    monkeypatch.setattr(HostStream, "capture", capture)
    requests = [Request(ASK, images=[one_tile(i)], sampling=SamplingParams(max_new_tokens=12)) for i in range(3)]
    with Engine(bundle, host_backend(bundle, limits=LIMITS)) as engine:
        found = [answer.token_ids for answer in engine.generate_batch(requests)]
        assert found == [plain.generate_batch([each])[0].token_ids for each in requests]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "cannot be captured" in caplog.text
    assert str(fault) in caplog.text


def test_a_picture_s_encoding_is_captured_for_each_way_through_memory(bundle: Bundle, plain: Engine) -> None:
    """Two blocks of pixels and three of keys and values: a session each, which runs twice before it is captured."""
    device, one_token = HostDevice(), SamplingParams(max_new_tokens=1)
    with Engine(bundle, host_backend(bundle, limits=LIMITS, device=device)) as engine:
        for seed in range(20):
            found = engine.generate(ASK, images=[one_tile(seed)], sampling=one_token).token_ids
            assert found == plain.generate(ASK, images=[one_tile(seed)], sampling=one_token).token_ids
            assert device.num_captures == min(max(0, seed + 1 - 2 * 6), 6)
        assert device.runs.count("vision images") == 20


def test_what_programs_allocate_by_themselves_is_measured(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each graph takes memory for activations in its first run, as ONNX Runtime does on a GPU."""
    device, activations = HostDevice(), 3 * 2**20
    taken: set[str] = set()

    def run(session: HostSession, stream: HostStream) -> None:
        if session._name not in taken:
            taken.add(session._name)
            device.allocate(activations)
        HOST_RUN(session, stream)

    monkeypatch.setattr(HostSession, "run", run)
    monkeypatch.setattr(HostProgram, "workspace_bytes", None)
    with Engine(bundle, host_backend(bundle, limits=LIMITS, device=device)) as engine:
        plan = engine.memory()
        assert plan.device_parts()["activations"] == len(taken) * activations
        assert plan.device_bytes == device.device_bytes
        decoder = {f"decoder {prefix}{kind}" for prefix in ("", "text_") for kind in KINDS}
        assert taken == decoder | {"vision images", "greedy rows", "sampler rows"}
    device = HostDevice(total_bytes=plan.device_bytes - activations)
    taken.clear()
    backend = host_backend(bundle, limits=LIMITS, device=device)
    loaded: list[weakref.ref[HostProgram]] = []
    made = HostProgram.__init__

    def init(program: HostProgram, *arguments: Any) -> None:
        made(program, *arguments)
        loaded.append(weakref.ref(program))

    monkeypatch.setattr(HostProgram, "__init__", init)
    with pytest.raises(
        ResourceError, match=r"not enough memory: expected .*, and activations of the largest"
    ) as caught:
        backend.__enter__()
    assert device.is_closed
    gc.collect()
    assert caught.value is not None  # it holds the frames that held the programs, and with them the weights
    assert [program() for program in loaded] == [None] * 4


def test_noise_is_drawn_in_other_threads_but_for_the_first_two_tokens(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first token's, and the one behind it, are asked for at once; of those that follow the step before knows."""
    drawn: list[tuple[int, bool]] = []

    def draw(out: NDArray[np.float32], seed: int, step: int) -> None:
        drawn.append((step, threading.current_thread() is threading.main_thread()))
        write_gumbel_noise(out, seed, step)

    monkeypatch.setattr(noise, "write_gumbel_noise", draw)
    sampling = SamplingParams(max_new_tokens=8, min_new_tokens=8, temperature=1.0, seed=3)
    engine.generate("Hello", sampling=sampling)
    assert [step for step, is_here in drawn if is_here] == [1]
    assert {step for step, is_here in drawn if not is_here} >= set(range(2, 8))


def test_a_picture_is_encoded_once_while_it_is_remembered(engine: Engine, device: HostDevice) -> None:
    def encodings(*images: Image.Image) -> int:
        device.runs.clear()
        engine.generate_batch(
            [Request(ASK, images=[image], sampling=SamplingParams(max_new_tokens=2)) for image in images]
        )
        return device.runs.count("vision images")

    assert encodings(one_tile(0)) == 1
    assert encodings(one_tile(0), one_tile(0)) == 0
    assert encodings(four_tiles(1), one_tile(2), one_tile(3)) == 3  # three places: the first picture is forgotten
    assert encodings(one_tile(0)) == 1


def test_a_larger_picture_moves_the_others_apart(engine: Engine, plain: Engine) -> None:
    """Slots 1 and 3 hold pictures of one and two tiles when a request of eight joins, and one of two pictures later."""
    requests = [
        Request(ASK, sampling=SamplingParams(max_new_tokens=40, min_new_tokens=40)),
        Request(ASK, images=[one_tile(1)], sampling=SamplingParams(max_new_tokens=40, min_new_tokens=40)),
        Request("Hello", sampling=SamplingParams(max_new_tokens=2)),
        Request(ASK, images=[picture(100, 60)], sampling=SamplingParams(max_new_tokens=40, min_new_tokens=40)),
        Request(ASK, images=[four_tiles(2)], sampling=SamplingParams(max_new_tokens=9, min_new_tokens=9)),
        Request("Which?", images=[four_tiles(3), four_tiles(4)], sampling=SamplingParams(max_new_tokens=9)),
        Request("Which?", images=[one_tile(5)], sampling=SamplingParams(max_new_tokens=9)),
    ]
    expected = [plain.generate_batch([each])[0].token_ids for each in requests]
    assert [answer.token_ids for answer in engine.generate_batch(requests)] == expected


def test_too_little_memory_is_told_with_the_plan(bundle: Bundle) -> None:
    small = HostDevice(total_bytes=10**6)
    backend = host_backend(bundle, limits=LIMITS, device=small)
    with pytest.raises(ResourceError, match=r"not enough memory: expected [\d.]+ MB.*found 1.0 MB") as caught:
        backend.__enter__()
    assert caught.value.exit_code == 5
    assert small.is_closed


@pytest.mark.parametrize("operations", [0, 3, 40, 90])
def test_a_device_that_fails_ends_every_request_and_hangs_none(bundle: Bundle, operations: int) -> None:
    """Wherever it fails: loading aside, in a prompt, in a step, while a result is awaited."""
    device = HostDevice()
    backend = host_backend(bundle, limits=LIMITS, device=device)
    sampling = SamplingParams(max_new_tokens=40, min_new_tokens=40)
    requests = [Request(ASK, images=[one_tile(i)], sampling=sampling) for i in range(6)]
    with Engine(bundle, backend) as engine:
        streams = [Stream(engine, [each]) for each in requests]
        device.fail_after = device.num_operations + operations
        for stream in streams:
            with pytest.raises(EnvironmentFault, match="the device failed") as caught:
                for _ in stream:
                    pass
            assert caught.value.exit_code == 4
        with pytest.raises(EnvironmentFault, match="the device failed"):  # and it stays so
            engine.generate("Hello")
    assert device.is_closed


def test_a_row_that_cannot_be_sampled_ends_alone(engine: Engine, plain: Engine) -> None:
    """Every token of one request is forbidden; its neighbour does not notice."""
    vocab_size = engine.model.text.vocab_size
    from mllama_runtime import RequestError

    nothing = SamplingParams(stop_token_ids=tuple(range(vocab_size)), min_new_tokens=2, max_new_tokens=4)
    bad = Stream(engine, [Request("Hello", sampling=nothing)])
    good = Stream(engine, [Request(ASK, sampling=SamplingParams(max_new_tokens=6))])
    with pytest.raises(RequestError, match="no token is left to choose"):
        next(bad)
    found = [event.token_id for event in good]
    assert tuple(found) == plain.generate(ASK, sampling=SamplingParams(max_new_tokens=6)).token_ids


def test_more_than_it_was_built_for_is_refused(engine: Engine) -> None:
    for sizes, what in (((5, 10, 0), "slots"), ((1, 161, 0), "tokens"), ((1, 10, 9), "tiles")):
        num_slots, cache_len, num_tiles = sizes
        with pytest.raises(ResourceError, match=f"too many {what}: expected at most"):
            engine._backend.slots(num_slots=num_slots, cache_len=cache_len, num_tiles=num_tiles)


def test_a_closed_back_end_is_said_to_be_closed(bundle: Bundle) -> None:
    backend = host_backend(bundle, limits=LIMITS)
    with pytest.raises(UsageError, match="the engine is closed"):
        backend.slots(num_slots=1, cache_len=8, num_tiles=0)
    with backend:
        pass
    backend.__exit__(None, None, None)
    with pytest.raises(UsageError, match="the engine is closed"):
        backend.memory()


def test_a_picture_kept_keeps_nothing_on_the_device(bundle: Bundle) -> None:
    """The programs, and so the weights, go with the engine; not when the last picture does."""
    backend = host_backend(bundle, limits=LIMITS)
    with Engine(bundle, backend) as engine:
        kept = engine.encode_image(one_tile(0))
        assert kept.features.arrays()
        engine.generate(ASK, images=[kept], sampling=SamplingParams(max_new_tokens=3))
        program = weakref.ref(backend._opened().loaded.programs["decoder"])
    gc.collect()
    assert program() is None
    with pytest.raises(UsageError, match="the engine is closed"):
        kept.features.arrays()


def test_the_cpu_back_end_plans_no_memory(plain: Engine) -> None:
    with pytest.raises(UsageError, match="takes memory as it goes"):
        plain.memory()


def test_a_picture_of_another_back_end_is_refused(engine: Engine, plain: Engine) -> None:
    row = Stream(plain, [Request(ASK, images=[one_tile(0)])])._rows[0]
    slots = engine._backend.slots(num_slots=1, cache_len=100, num_tiles=1)
    with pytest.raises(UsageError, match="another back end"):
        prefill(slots, 0, row, "hf")
