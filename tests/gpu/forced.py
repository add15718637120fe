"""Teacher-forced logits of any back end: a prompt, then the tokens of an answer that is known, one a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from mllama_runtime.backends import Backend, Features, Slots
from mllama_runtime.bundle import Bundle
from mllama_runtime.decode import Row, prefill
from mllama_runtime.prompt import image_visibility
from mllama_runtime.sampling import Sampler, SamplingParams
from mllama_runtime.streaming import TextStream
from numpy.typing import NDArray

Logits = NDArray[np.float32]


def forced_logits(
    backend: Backend,
    bundle: Bundle,
    token_ids: Sequence[int],
    answer: Sequence[int],
    features: Sequence[Features],
    text: TextStream,
) -> Logits:
    """[1 + len(answer), vocab]: behind the prompt, and behind each token of the answer."""
    model = bundle.manifest.model
    visibility = image_visibility(token_ids, model.image_token_id, [each.num_tiles for each in features])
    sampler = Sampler(SamplingParams(), model.text.vocab_size)
    row = Row(np.array(token_ids, np.int64), visibility, features, sampler, text, 1)
    cache_len, num_tiles = len(token_ids) + len(answer), visibility.shape[1]
    slots: Slots = backend.slots(num_slots=1, cache_len=cache_len, num_tiles=num_tiles)
    logits = [prefill(slots, 0, row, bundle.manifest.mask_semantics).copy()]
    for position, token_id in enumerate(answer, start=len(token_ids)):
        logits.append(slots.decode(np.array([token_id]), np.array([position]))[0].copy())
    return np.stack(logits)


def compared(found: Logits, expected: Logits) -> dict[str, Any]:
    """How far logits [N, vocab] are from those expected: relative L2, largest difference, top-1, KL divergence."""
    wanted, seen = expected.astype(np.float64), found.astype(np.float64)
    p, q = _log_softmax(wanted), _log_softmax(seen)
    spread = wanted - wanted.mean(axis=1, keepdims=True)
    return {
        "num_rows": len(wanted),
        "finite": bool(np.isfinite(seen).all()),
        "relative_l2": float(np.linalg.norm(seen - wanted) / np.linalg.norm(spread)),
        "max_error": float(np.abs(seen - wanted).max()),
        "largest": float(np.abs(wanted).max()),
        "top1": float((seen.argmax(axis=1) == wanted.argmax(axis=1)).mean()),
        "kl_mean": float((np.exp(p) * (p - q)).sum(axis=1).mean()),
    }


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))
