"""Runs a bundle over what the reference has run, and measures how far every tensor is from the reference's.

It takes the product's own path: preprocessing, back end, decode loop, engine. What it measures goes to `checks`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from mllama_runtime.backends import Backend, Features
from mllama_runtime.bundle import Bundle
from mllama_runtime.decode import Row, prefill
from mllama_runtime.engine import Engine, Generation, Request
from mllama_runtime.errors import GateError
from mllama_runtime.preprocessing import ImageTiles
from mllama_runtime.prompt import image_visibility
from mllama_runtime.sampling import Sampler, SamplingParams
from mllama_runtime.streaming import TextStream
from numpy.typing import NDArray

from mllama_exporter.feeds import joined, padded_visibility
from mllama_exporter.validate.checks import Observation, absolute_error, kl_divergences, relative_error
from mllama_exporter.validate.reference import ReferenceInputs, ReferenceRun

Array = NDArray[Any]
_BATCH = 4  # requests answered together: enough to mix lengths, and prompts with and without pictures


class Candidate:
    """A bundle on one back end; opened and closed by the caller."""

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        self.engine, self.backend, self.manifest = Engine(bundle, backend), backend, bundle.manifest

    def tiles(self, inputs: ReferenceInputs) -> list[ImageTiles]:
        return [self.engine.tiles(image) for image in inputs.sample.images]

    def visibility(self, inputs: ReferenceInputs, tiles: Sequence[ImageTiles]) -> NDArray[np.bool_]:
        """Which real tiles each of the reference's tokens sees: bool [seq, tiles of all pictures]."""
        num_tiles = [each.num_tiles for each in tiles]
        return image_visibility(inputs.token_ids, self.manifest.model.image_token_id, num_tiles)


def observations_from_inputs(candidate: Candidate, inputs: ReferenceInputs) -> Iterator[Observation]:
    """Preprocessing, tokenisation and masks, before any graph runs."""
    sample = inputs.sample
    raw = "chat_template.jinja" not in candidate.manifest.files
    prompt = candidate.engine.prompt(
        Request(sample.raw_text if raw else sample.messages, images=sample.images, raw=raw)
    )
    yield Observation("token_ids", _mismatches(prompt.token_ids, inputs.token_ids), sample.name)
    if not sample.images:
        return
    tiles = candidate.tiles(inputs)
    pixel_values = np.stack([each.pixel_values for each in tiles])
    yield Observation("pixel_values", absolute_error(pixel_values, inputs.pixel_values), sample.name)
    found = [(each.aspect_ratio_id, *each.aspect_ratio_mask.tolist()) for each in tiles]
    expected = np.column_stack([inputs.aspect_ratio_ids, inputs.aspect_ratio_mask]).tolist()
    yield Observation("aspect_ratios", _mismatches(found, list(map(tuple, expected))), sample.name)
    mask = padded_visibility(candidate.visibility(inputs, tiles), tiles)
    mismatches = int((mask != inputs.cross_attention_mask.reshape(mask.shape)).sum())
    yield Observation("cross_attention_mask", mismatches, sample.name)


def observations_from_run(candidate: Candidate, run: ReferenceRun) -> Iterator[Observation]:
    """Every tensor, fed with the reference's own token ids, so that what came before does not blur what comes after."""
    inputs, name = run.inputs, run.inputs.sample.name
    tiles = candidate.tiles(inputs)
    features = [candidate.backend.encode(each) for each in tiles]
    cross = joined([each.arrays() for each in features])
    logits, past = _teacher_forced(candidate, run, candidate.visibility(inputs, tiles), features)
    tensors = {**cross, **past}
    for key, expected in {**run.cross, **run.past}.items():
        yield Observation(key, relative_error(tensors.get(key, np.empty(0)), expected), name)
    yield Observation("prefill_logits", relative_error(logits[0], run.logits[0]), name)
    agreed = logits.argmax(axis=1) == run.logits.argmax(axis=1)
    divergences = kl_divergences(logits, run.logits)
    for step, (same, divergence) in enumerate(zip(agreed.tolist(), divergences.tolist(), strict=True)):
        yield Observation("teacher_forced_top1", float(same), name, f"step {step}")
        yield Observation("teacher_forced_kl_mean", divergence, name, f"step {step}")
        yield Observation("teacher_forced_kl", divergence, name, f"step {step}")
    num_nonfinite = sum(int((~np.isfinite(array)).sum()) for array in (logits, *tensors.values()))
    yield Observation("num_nonfinite", num_nonfinite, name)


@dataclass(frozen=True, slots=True)
class Generated:
    """A free-running greedy answer; `note` says where it leaves the reference's, or why there is none."""

    sample: str
    text: str
    diverges_at: int | None  # the first step of another token; None when all are the same
    note: str = ""

    @property
    def observation(self) -> Observation:
        return Observation("generation_identical", float(self.diverges_at is None), self.sample, self.note)


def generated_from_runs(candidate: Candidate, runs: Sequence[ReferenceRun], max_steps: int) -> list[Generated]:
    """Free-running greedy generation through the engine, in mixed batches."""
    sampling = SamplingParams(max_new_tokens=max_steps)
    requests = [Request(run.inputs.text, images=run.inputs.sample.images, sampling=sampling, raw=True) for run in runs]
    found: list[Generated] = []
    try:
        for start in range(0, len(requests), _BATCH):
            answers = candidate.engine.generate_batch(requests[start : start + _BATCH])
            found += [_generated(run, each) for run, each in zip(runs[start:], answers, strict=False)]
    except GateError as error:  # logits that are not numbers
        found += [Generated(run.inputs.sample.name, "", 0, error.what) for run in runs[len(found) :]]
    return found


def _generated(run: ReferenceRun, answer: Generation) -> Generated:
    name, token_ids = run.inputs.sample.name, tuple(answer.token_ids)
    if token_ids == run.continuation:
        return Generated(name, answer.text, None)
    pairs = list(zip(token_ids, run.continuation, strict=False))
    step = next((step for step, (found, expected) in enumerate(pairs) if found != expected), len(pairs))
    return Generated(name, answer.text, step, f"diverges at step {step}")


def _teacher_forced(
    candidate: Candidate, run: ReferenceRun, visibility: NDArray[np.bool_], features: Sequence[Features]
) -> tuple[Array, Mapping[str, Array]]:
    """Logits [N, vocab] and caches [1, G, S+N-1, D] when every step gets the reference's token."""
    prompt, model = run.inputs.token_ids, candidate.manifest.model
    row = Row(
        token_ids=np.array(prompt, np.int64),
        visibility=visibility,
        features=features,
        sampler=Sampler(SamplingParams(), model.text.vocab_size),
        text=TextStream(candidate.engine.tokenizer.backend),
        max_new_tokens=len(run.continuation),
    )
    slots = candidate.backend.slots(num_slots=1, cache_len=row.cache_len, num_tiles=visibility.shape[1])
    logits = [prefill(slots, 0, row, candidate.manifest.mask_semantics)]
    for position, token_id in enumerate(run.continuation[:-1], start=len(prompt)):
        logits.append(slots.decode(np.array([token_id]), np.array([position]))[0].copy())
    return np.stack(logits), slots.cached(0, row.cache_len)


def _mismatches(found: Sequence[object], expected: Sequence[object]) -> int:
    differing = sum(one != other for one, other in zip(found, expected, strict=False))
    return differing + abs(len(found) - len(expected))
