"""The miniature's bundles on a back end: the same tokens as the CPU's, whatever way they are asked for.

`expectation` runs where the CPU back end is, `check` where the GPU is; between them goes a file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gpu.forced import compared, forced_logits
from gpu.record import Recorder
from mllama_runtime import Engine, Request, SamplingParams
from mllama_runtime.backends import Backend, backend_from_bundle
from mllama_runtime.bundle import Bundle
from mllama_runtime.engine_record import Limits
from mllama_runtime.streaming import TextStream
from numpy.typing import NDArray

PICTURES = Path(__file__).parents[2] / "recipes" / "miniature" / "pictures"
LIMITS = Limits(max_batch=4, max_seq_len=512, prefill_chunk=256, max_tiles=4)
_TEXTS = ("What is the capital of France?", "Hello!", "Who are you?", "How are you today?")
_DATE, _MAX_NEW = "01 Jan 2026", 24
_GREEDY = SamplingParams(max_new_tokens=_MAX_NEW)
Arrays = dict[str, NDArray[Any]]


def requests(sampling: Callable[[int], SamplingParams]) -> list[Request]:
    """Every canvas shape, several questions each, and some about no picture; `sampling` by a request's number."""
    lines = [json.loads(line) for line in (PICTURES / "questions.jsonl").read_text(encoding="utf-8").splitlines()]
    asked: list[tuple[str, list[Any]]] = [(line["question"], [PICTURES / line["image"]]) for line in lines]
    asked[3:3] = [(text, []) for text in _TEXTS]  # so that batches are mixed
    return [
        Request(text, images=images, sampling=sampling(index), date_string=_DATE)
        for index, (text, images) in enumerate(asked)
    ]


def seeded(index: int) -> SamplingParams:
    return SamplingParams(temperature=0.8, top_p=0.95, seed=1000 + index, max_new_tokens=_MAX_NEW)


def penalised(index: int) -> SamplingParams:
    return SamplingParams(
        temperature=1.0, top_k=40, min_p=0.02, repetition_penalty=1.2, seed=index, max_new_tokens=_MAX_NEW
    )


WAYS: Mapping[str, Callable[[int], SamplingParams]] = {
    "greedy": lambda _: _GREEDY,
    "seeded": seeded,
    "penalised": penalised,
}


def expectation(bundle: Path) -> Arrays:
    """Token ids of every way, and teacher-forced logits of the greedy answers, on the CPU."""
    arrays: Arrays = {}
    opened = Bundle.open(bundle)
    backend = backend_from_bundle(opened, "cpu", None)
    with Engine(opened, backend) as engine:
        for way, sampling in WAYS.items():
            for index, answer in enumerate(_answers(engine, requests(sampling), 4)):
                arrays[f"{way}/{index}"] = np.array(answer, np.int32)
        for index, request in enumerate(requests(WAYS["greedy"])):
            forced = arrays[f"greedy/{index}"][:-1].tolist()
            arrays[f"logits/{index}"] = _forced(engine, backend, request, forced).astype(np.float16)
    return arrays


def check(bundle: Path, expected: Arrays, record: Recorder, backend_name: str = "cuda") -> None:
    """One precision: batches, single requests, steps that are not captured, logits."""
    opened = Bundle.open(bundle)
    limits = LIMITS if backend_name == "cuda" else None
    given: dict[str, list[tuple[int, ...]]] = {}
    for captured in (True, False):
        backend = backend_from_bundle(opened, backend_name, None, limits=limits)
        with Engine(opened, backend) as engine:
            if not captured and not without_capture(backend):
                break
            name = "captured" if captured else "not captured"
            for way in WAYS:
                for batch in (1, 4):
                    work = partial(_answered, engine, way, batch, expected, given, f"{way}, batch {batch}, {name}")
                    record.try_(f"{way}, batch {batch}, {name}", work)
            if captured:
                record.try_("teacher-forced logits", partial(_logits, engine, backend, expected))
                record.try_("captured steps", partial(_some_captured, backend))
    record.try_("captured or not, together or alone", partial(_consistency, given))


def _answered(
    engine: Engine, way: str, batch: int, expected: Arrays, given: dict[str, list[tuple[int, ...]]], name: str
) -> dict[str, Any]:
    given[name] = list(_answers(engine, requests(WAYS[way]), batch))
    return _agreement(given[name], expected, way)


def _consistency(given: Mapping[str, Sequence[tuple[int, ...]]]) -> dict[str, Any]:
    """Of each way, how many answers are the same however they were asked for."""
    found = {}
    for way in WAYS:
        runs = [answers for name, answers in given.items() if name.startswith(way)]
        equal = sum(len(set(answers)) == 1 for answers in zip(*runs, strict=False))
        found[way] = f"{equal} of {max(map(len, runs), default=0)} in {len(runs)} runs"
    return found


def _some_captured(backend: Backend) -> dict[str, Any]:
    if not (steps := captured_steps(backend)):
        raise RuntimeError("no step was captured: what stands above is of steps run one by one")
    return {"steps": steps}


def _answers(engine: Engine, asked: Sequence[Request], batch: int) -> Iterator[tuple[int, ...]]:
    for start in range(0, len(asked), batch):
        yield from (answer.token_ids for answer in engine.generate_batch(asked[start : start + batch]))


def _agreement(answers: Sequence[tuple[int, ...]], expected: Arrays, way: str) -> dict[str, Any]:
    """How many answers are the CPU's to the token; of the others, the first token that differs."""
    wrong: list[str] = []
    for index, answer in enumerate(answers):
        wanted = tuple(expected[f"{way}/{index}"].tolist())
        if answer != wanted:
            pairs = enumerate(zip(answer, wanted, strict=False))
            first = next((place for place, (one, other) in pairs if one != other), min(len(answer), len(wanted)))
            wrong.append(f"{index}@{first}")
    return {"equal": len(answers) - len(wrong), "of": len(answers), "differ": " ".join(wrong) or None}


def _logits(engine: Engine, backend: Backend, expected: Arrays) -> dict[str, Any]:
    found, wanted = [], []
    for index, request in enumerate(requests(WAYS["greedy"])):
        answer = expected[f"greedy/{index}"][:-1].tolist()
        found.append(_forced(engine, backend, request, answer))
        wanted.append(expected[f"logits/{index}"].astype(np.float32))
    return compared(np.concatenate(found), np.concatenate(wanted))


def _forced(engine: Engine, backend: Backend, request: Request, answer: Sequence[int]) -> NDArray[np.float32]:
    prompt = engine.prompt(request)
    features = [backend.encode(engine.tiles(image)) for image in prompt.images]
    text = TextStream(engine.tokenizer.backend, ())
    return forced_logits(backend, engine.bundle, prompt.token_ids, answer, features, text)


def without_capture(backend: Backend) -> bool:
    """Let an entered back end run every step call by call; False where it captures nothing anyway."""
    slots: Any = backend.slots(num_slots=1, cache_len=1, num_tiles=1)
    if not getattr(slots, "_captured", None):
        return False
    slots._captured._can_capture = False
    slots._captured._captured.clear()
    return True


def captured_steps(backend: Backend) -> str:
    """Which steps are captured by now, and which are not."""
    slots: Any = backend.slots(num_slots=1, cache_len=1, num_tiles=1)
    steps = slots._captured._captured if hasattr(slots, "_captured") else {}
    return " ".join(f"{'x'.join(map(str, key))}:{type(made).__name__}" for key, made in steps.items())
