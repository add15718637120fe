"""Intervals against published values, known distributions and their own coverage."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from mllama_runtime.evaluation.intervals import bootstrap_interval, mean_interval, paired_interval, wilson_interval

SCORES = arrays(np.float64, st.integers(1, 40), elements=st.sampled_from([0.0, 0.3, 0.6, 0.9, 1.0]))


def test_wilson_interval() -> None:
    """Newcombe (1998), table I: 81 of 263 gives 0.2553 to 0.3662; 0 of 20 gives 0 to 0.1611."""
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson_interval(20, 20) == pytest.approx((0.8389, 1.0), abs=5e-5)


def test_bootstrap_of_shares_is_the_binomial() -> None:
    """Means of resamples of 54 ones and 6 zeros are Binomial(60, 0.9) / 60.

    P(X <= 48, 49, 57, 58) = 0.015, 0.034, 0.947, 0.986, each more than five standard errors (0.0016, of 10,000
    resamples) from 2.5% and 97.5%: the quantiles are 49 and 58.
    """
    scores = np.repeat([1.0, 0.0], [54, 6])
    assert bootstrap_interval(scores) == pytest.approx((49 / 60, 58 / 60), abs=1e-12)


def test_bootstrap_of_many_values_is_the_normal() -> None:
    """Uniform values: mean +- 1.96 standard errors; the quantile of 10,000 resamples errs by 2.7% of one."""
    values = np.random.default_rng(0).random(5000)
    error = values.std() / np.sqrt(len(values))
    low, high = bootstrap_interval(values)
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)


def test_bootstrap_covers_the_truth_about_as_often_as_it_says() -> None:
    """400 samples of 100: 95% of the intervals hold the mean, with a standard error of 1.1 points."""
    rng, truth = np.random.default_rng(1), 0.7
    samples = [rng.choice([0.0, 0.5, 1.0], 100, p=[0.2, 0.2, 0.6]) for _ in range(400)]
    intervals = [mean_interval(sample) for sample in samples]
    assert 0.91 <= np.mean([each.low <= truth <= each.high for each in intervals]) <= 0.98


def test_a_paired_interval_is_narrower_than_what_two_runs_apart_allow() -> None:
    """Two runs that differ on 10 of 1000 questions, 8 for the worse: -0.6 points +- 1.96 * sqrt(0.01) / sqrt(1000)."""
    baseline = np.repeat([1.0, 0.0], [500, 500])
    scores = baseline.copy()
    scores[:8], scores[500:502] = 0, 1
    found = paired_interval(scores, baseline)
    half = 1.96 * np.sqrt(0.01 - 0.006**2) / np.sqrt(1000)
    assert found.kind == "bootstrap"
    assert (found.low, found.high) == pytest.approx((-0.006 - half, -0.006 + half), abs=0.0011)  # steps of 0.001
    alone = mean_interval(scores)
    assert found.high - found.low < (alone.high - alone.low) / 4


def test_where_all_is_equal_wilson_stands() -> None:
    assert mean_interval(np.ones(20)).kind == "wilson"
    assert (mean_interval(np.zeros(20)).low, mean_interval(np.zeros(20)).high) == wilson_interval(0, 20)
    half = mean_interval(np.full(20, 0.5))
    assert (half.low, half.high, half.kind) == (0.5, 0.5, "bootstrap")
    same = paired_interval(np.repeat([1.0, 0.0], 10), np.repeat([1.0, 0.0], 10))
    assert (same.low, same.high, same.kind) == (-wilson_interval(0, 20)[1], wilson_interval(0, 20)[1], "wilson")


@given(SCORES)
def test_intervals_are_in_order_within_bounds_and_repeatable(scores: np.ndarray) -> None:
    found = mean_interval(scores)
    assert scores.min() - 1e-12 <= found.low <= found.high <= scores.max() + 1e-12 or found.kind == "wilson"
    assert 0 <= found.low <= found.high <= 1 + 1e-12
    assert found == mean_interval(np.flip(scores))  # the order of the questions does not matter
    change = paired_interval(scores, np.zeros_like(scores))
    assert change.low <= scores.mean() + 1e-12
