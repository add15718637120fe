"""Bytes of a checkpoint as torch tensors: what NumPy has no types for, or converts slowly."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

TORCH_DTYPES: Mapping[str, torch.dtype] = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""By the safetensors format's names."""


def tensor_from_bytes(data: NDArray[np.uint8], dtype: str) -> torch.Tensor:
    """A flat tensor over the same memory."""
    return torch.from_numpy(data).view(TORCH_DTYPES[dtype])
