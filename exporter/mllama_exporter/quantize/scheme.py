"""The quantised precisions: how each stores a weight matrix, and whether it quantises what the matrix multiplies.

All are symmetric (no zero points) and explicit in the graph as DequantizeLinear, and QuantizeLinear for activations.
A matrix is [out, in], as in the checkpoint. Operators: https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from mllama_runtime.manifest import QuantizedPrecision
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
FP8_LARGEST = 448.0  # E4M3 without infinities (https://arxiv.org/abs/2209.05433)
INT8_LARGEST = 127.0  # -128 is left out: the grid is symmetric


@dataclass(frozen=True, slots=True)
class Scheme:
    """A quantised precision.

    dtype: of the stored weights, by the safetensors format's names; "I4" is packed two to a byte, the first in the low
    half, as ONNX has it. largest: the end of the grid that a scale maps the largest weight to. block_size: columns that
    share a scale; None for one scale a row. activations: the inputs are quantised too, one scale a tensor.
    """

    name: QuantizedPrecision
    dtype: str
    largest: float
    block_size: int | None
    activations: bool


SCHEMES: Mapping[QuantizedPrecision, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme("int8", "I8", INT8_LARGEST, None, activations=True),
        Scheme("int8-weight", "I8", INT8_LARGEST, None, activations=False),
        Scheme("int4", "I4", 7.0, 128, activations=False),
        Scheme("fp8", "F8_E4M3", FP8_LARGEST, None, activations=True),
    )
}


def num_blocks(scheme: Scheme, num_columns: int) -> int:
    """Scales in a row of so many columns."""
    return 1 if scheme.block_size is None else num_columns // scheme.block_size
