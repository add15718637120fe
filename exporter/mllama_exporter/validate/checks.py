"""From numbers measured on samples to checks against thresholds; a check says enough to be read on its own."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mllama_exporter.validate.thresholds import Bound, Bounds, family

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Observation:
    """One number about one sample; infinite where a tensor was not finite or of another shape."""

    name: str  # of the check
    value: float
    sample: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Check:
    """A value and its threshold; `value` is None when it is not finite."""

    name: str
    value: float | None
    threshold: float
    at_least: bool
    detail: str

    @property
    def passed(self) -> bool:
        if self.value is None:
            return False
        return self.value >= self.threshold if self.at_least else self.value <= self.threshold


def checks_from_observations(observations: Iterable[Observation], bounds: Bounds, *, prefix: str = "") -> list[Check]:
    """One check for every name observed; the names get `prefix`.

    They stand in the order of `bounds`, and of the layers: the first that fails is nearest to the cause.
    """
    grouped: dict[str, list[Observation]] = {}
    for observation in observations:
        grouped.setdefault(observation.name, []).append(observation)
    families = list(bounds)

    def place(name: str) -> tuple[int, int, str]:
        return families.index(family(name)), _layer(name), name

    return [_check(name, grouped[name], bounds[family(name)], prefix) for name in sorted(grouped, key=place)]


def relative_error(found: Array, expected: Array) -> float:
    """max |found - expected| / max |expected|: the largest error, on the scale of the whole tensor.

    A tensor of zeros is compared absolutely; infinite when the shapes differ or a value is not finite.
    """
    scale = float(np.abs(expected).max(initial=0.0))
    return absolute_error(found, expected) / (scale or 1.0)


def absolute_error(found: Array, expected: Array) -> float:
    """max |found - expected|; infinite when the shapes differ or a value is not finite."""
    if found.shape != expected.shape:
        return math.inf
    with np.errstate(invalid="ignore"):
        error = float(np.abs(found - expected).max(initial=0.0))
    return error if math.isfinite(error) else math.inf


def kl_divergences(found: Array, expected: Array) -> NDArray[np.float64]:
    """KL(expected || found) in nats for rows of logits: [N, vocab], [N, vocab] -> [N]."""
    with np.errstate(invalid="ignore"):
        log_q, log_p = (_log_softmax(logits.astype(np.float64)) for logits in (found, expected))
        divergences = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
    # Rounding makes a divergence of nothing a tiny negative number.
    return np.where(np.isfinite(divergences), np.maximum(divergences, 0.0), np.inf)


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def _layer(name: str) -> int:
    last = name.rpartition("_")[2]
    return int(last) if last.isdecimal() else -1


def _check(name: str, observations: Sequence[Observation], bound: Bound, prefix: str) -> Check:
    values = [observation.value for observation in observations]
    worst = (min if bound.at_least else max)(observations, key=lambda observation: observation.value)
    if bound.of == "first":
        worst = next((each for each in observations if each.value > bound.limit), worst)
    value = sum(values) / (len(values) if bound.of == "mean" else 1) if bound.of in ("mean", "sum") else worst.value
    where = ", ".join(filter(None, (worst.sample, worst.note)))
    detail = where if worst.value != bound.perfect else f"{len(observations)} values"
    return Check(prefix + name, value if math.isfinite(value) else None, bound.limit, bound.at_least, detail)
