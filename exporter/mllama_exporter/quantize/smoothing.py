"""Scales that move difficulty between activations and weights, folded into what comes before.

A group's input is divided by a vector and its matrices' columns are multiplied by it, so that their product stays the
same in exact arithmetic. The division is folded into the normalisation before the group, or into the rows of the matrix
before it: the graph gets no new operation.

- int8: SmoothQuant (https://arxiv.org/abs/2211.10438): activations' outliers move to the weights. How far is searched
  for each group, by the rounding error of the product, instead of halfway everywhere: the inputs of down projections
  reach a hundred times their root mean square, those of the others five times.
- int4: activation-aware scaling (AWQ, https://arxiv.org/abs/2306.00978): columns with large inputs get a finer grid.
  How much finer is searched likewise, on the measured mean squares of the inputs.
- fp8 and int8-weight: none; a floating grid does not mind outliers, and eight bits for a row's weights are enough.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mllama_exporter.quantize.calibration import ChannelStatistics
from mllama_exporter.quantize.rounding import dequantized, row_scales
from mllama_exporter.quantize.scheme import FloatArray, Scheme

_ALPHAS = tuple(step / 20 for step in range(21))
_SMALLEST, _LARGEST = 1e-2, 1e2  # of a smoothing scale: FP16 norms must survive it


def smoothing_scales(
    scheme: Scheme, statistics: ChannelStatistics, weights: Iterable[FloatArray], dtype: str
) -> FloatArray | None:
    """The vector to divide a group's input by, [C]; None where a scheme has no use for one.

    Args:
        weights: rows of each of the group's matrices, [R, C]; for int4 a sample of them is enough.
        dtype: what scales are stored in.
    """
    if scheme.name not in ("int8", "int4"):
        return None
    rows = np.concatenate(list(weights))
    best, smallest = None, np.inf
    for alpha in _ALPHAS:
        if scheme.name == "int8":
            scales = _tamed(statistics.max_abs**alpha / np.maximum(np.abs(rows).max(axis=0), 1e-9) ** (1 - alpha))
            error = _integer_error(rows * scales, scales, scheme, statistics)
        else:
            scales = _tamed(np.sqrt(statistics.mean_square) ** alpha)
            error = _weight_error(rows * scales, scheme, statistics.mean_square / scales**2, dtype)
        if error < smallest:
            best, smallest = scales, error
    return best


def _integer_error(scaled: FloatArray, scales: FloatArray, scheme: Scheme, statistics: ChannelStatistics) -> float:
    """The expected square error of the product when both sides are rounded: a step's square over twelve each."""
    step = float((statistics.max_abs / scales).max()) / scheme.largest
    row_steps = np.abs(scaled).max(axis=1) / scheme.largest
    of_inputs = step**2 * float((scaled**2).sum())
    of_weights = float((row_steps**2).sum()) * float((statistics.mean_square / scales**2).sum())
    return (of_inputs + of_weights) / 12


def _weight_error(scaled: FloatArray, scheme: Scheme, importance: FloatArray, dtype: str) -> float:
    """The mean square error of the product, inputs taken as uncorrelated."""
    off = dequantized(scaled, row_scales(scaled, scheme, dtype, importance), scheme) - scaled
    return float((off * off * importance).sum())


def _tamed(raw: NDArray[Any]) -> FloatArray:
    """Around one, within what a norm's weight can be divided by; a channel that is always zero counts as one before."""
    scales = np.where(raw > 0, raw, 1).astype(np.float32)
    middle = np.exp(np.log(scales).mean())
    tamed: FloatArray = np.clip(scales / middle, _SMALLEST, _LARGEST).astype(np.float32)
    return tamed
