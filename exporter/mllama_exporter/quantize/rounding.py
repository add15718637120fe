"""Rows of a matrix to a scheme's grid: float32 in, stored bytes and scales out.

Dimensions: R rows, C columns, B blocks of a row (1 where a row has one scale).
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import torch
from mllama_runtime.errors import InputError
from numpy.typing import NDArray

from mllama_exporter.quantize.scheme import FloatArray, Scheme, num_blocks

SCALE_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""What scales are stored in, by the safetensors name of the base precision."""

# FP16 holds 2**-20 with four bits to spare; below, a scale would lose what makes it one. Weights that small are noise.
_SMALLEST_SCALE = 2.0**-20
_CLIP_RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)


def row_scales(weight: FloatArray, scheme: Scheme, dtype: str, importance: FloatArray | None = None) -> FloatArray:
    """The scale of every row or block, [R, B], already rounded to `dtype`: the values a graph will multiply by.

    Args:
        weight: [R, C].
        importance: the mean square of every column's input, [C]. Given for a grid of few values, the scale of a block
            is the one of several clippings with the smallest error of the product, instead of the largest weight's.

    Raises:
        InputError: a scale that is not finite.
    """
    blocks = weight.reshape(len(weight), num_blocks(scheme, weight.shape[1]), -1)
    largest: FloatArray = torch.from_numpy(blocks).abs().amax(dim=2).numpy()  # NumPy reduces short rows slowly
    scales = _rounded(largest / np.float32(scheme.largest), dtype)
    if importance is not None and scheme.block_size is not None:
        scales = _clipped(blocks, scales, scheme, dtype, importance.reshape(1, blocks.shape[1], -1))
    if not np.isfinite(scales).all():
        raise InputError("a scale is not finite", found=f"the largest weight is {float(largest.max()):g}")
    return scales


def quantized(weight: FloatArray, scales: FloatArray, scheme: Scheme) -> NDArray[np.uint8]:
    """[R, C] and [R, B] -> the bytes of the stored rows, [R, bytes]."""
    values = _on_grid(weight.reshape(*scales.shape, -1), scales, scheme).reshape(weight.shape)
    if scheme.dtype == "F8_E4M3":
        return torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    whole: NDArray[np.uint8] = values.astype(np.int8).view(np.uint8)
    if scheme.dtype == "I4":
        pairs = whole.view("<u2")
        whole = ((pairs & np.uint16(0xF)) | ((pairs >> np.uint16(4)) & np.uint16(0xF0))).astype(np.uint8)
    return whole


def dequantized(weight: FloatArray, scales: FloatArray, scheme: Scheme) -> FloatArray:
    """What a graph makes of the stored rows, [R, C] float32; for search and for tests."""
    values = _on_grid(weight.reshape(*scales.shape, -1), scales, scheme)
    if scheme.dtype == "F8_E4M3":
        values = torch.from_numpy(values).to(torch.float8_e4m3fn).float().numpy()
    result: FloatArray = (values * scales[..., None]).reshape(weight.shape)
    return result


def _on_grid(blocks: FloatArray, scales: FloatArray, scheme: Scheme) -> FloatArray:
    """Divided by the scales and cut to the grid's ends; rounded to whole numbers where the grid has them."""
    values: FloatArray = blocks * np.reciprocal(scales)[..., None]
    if scheme.dtype != "F8_E4M3":
        np.rint(values, out=values)
    lowest = -scheme.largest - 1 if scheme.dtype == "I4" else -scheme.largest  # all sixteen values of four bits
    return np.clip(values, lowest, scheme.largest, out=values)


def _clipped(blocks: FloatArray, scales: FloatArray, scheme: Scheme, dtype: str, importance: FloatArray) -> FloatArray:
    best, errors = scales, np.full(scales.shape, np.inf, np.float32)
    for ratio in _CLIP_RATIOS:
        tried = _rounded(scales * np.float32(ratio), dtype)
        off = _on_grid(blocks, tried, scheme)
        off *= tried[..., None]
        off -= blocks
        error = (off * off * importance).sum(axis=2)
        best, errors = np.where(error < errors, tried, best), np.minimum(error, errors)
    return best


def _rounded(scales: FloatArray, dtype: str) -> FloatArray:
    with np.errstate(over="ignore"):
        rounded: FloatArray = np.maximum(scales, _SMALLEST_SCALE).astype(SCALE_DTYPES[dtype]).astype(np.float32)
    return rounded
