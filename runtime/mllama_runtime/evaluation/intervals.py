"""How sure is a mean score? 95% intervals of it, and of the difference of two runs on the same questions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

IntervalKind = Literal["bootstrap", "wilson"]

_Z = 1.96  # a normal distribution has 95% within so many standard deviations
_NUM_RESAMPLES = 10_000
_MAX_CELLS = 2**20  # of a table of random counts: 8 MiB
_SEED = 20240925


@dataclass(frozen=True, slots=True)
class Interval:
    """A 95% confidence interval and how it was found."""

    low: float
    high: float
    kind: IntervalKind


def mean_interval(scores: NDArray[np.float64]) -> Interval:
    """Of the mean of scores from 0 to 1 [N].

    Bootstrap; where all are 0 or all are 1 that is a point, which says nothing, and Wilson's interval stands instead.
    """
    if np.all(scores == 0) or np.all(scores == 1):
        return Interval(*wilson_interval(int(scores.sum()), len(scores)), "wilson")
    return Interval(*bootstrap_interval(scores), "bootstrap")


def paired_interval(scores: NDArray[np.float64], baseline: NDArray[np.float64]) -> Interval:
    """Of the mean difference `scores - baseline` [N], [N], question by question.

    Bootstrap over the questions' differences. Where no question differs that is a point; but a difference in the mean
    is at most the share of questions that differ, and Wilson's upper end for 0 of N bounds that share on either side.
    """
    differences = scores - baseline
    if not differences.any():
        bound = wilson_interval(0, len(differences))[1]
        return Interval(-bound, bound, "wilson")
    return Interval(*bootstrap_interval(differences), "bootstrap")


def bootstrap_interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """The 2.5th and 97.5th percentile of the means of 10,000 resamples, always the same ones (Efron 1979).

    A resample of N is drawn as how often it holds each distinct value, which is multinomial: the same distribution as
    drawing N times, and cheap where values repeat, as scores do.
    """
    distinct, counts = np.unique(values, return_counts=True)
    rng, shares = np.random.default_rng(_SEED), counts / counts.sum()
    means = np.empty(_NUM_RESAMPLES)
    step = max(1, _MAX_CELLS // len(distinct))
    for start in range(0, _NUM_RESAMPLES, step):
        size = min(step, _NUM_RESAMPLES - start)
        means[start : start + size] = rng.multinomial(len(values), shares, size) @ distinct / len(values)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def wilson_interval(num_right: int, total: int) -> tuple[float, float]:
    """Wilson's 95% confidence interval of a proportion (https://doi.org/10.1080/01621459.1927.10502953)."""
    share, spread = num_right / total, _Z * _Z / total
    middle = share + spread / 2
    half = _Z * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    return max(0.0, (middle - half) / (1 + spread)), min(1.0, (middle + half) / (1 + spread))
