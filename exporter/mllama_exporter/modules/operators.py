"""ONNX operators that torch has no single operation for, as traceable calls.

Under tracing each call becomes exactly one node of the operator it names; run eagerly they return zeros, so nothing
here computes. Operator semantics: https://onnx.ai/onnx/operators/.

Dimensions: B batch, S new tokens, H query heads, G key/value heads, C cache length, R rows of a mask, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

Attributes = dict[str, int | float | str | bool | Sequence[int] | Sequence[float] | Sequence[str] | Sequence[bool]]

_FLOAT = 1  # TensorProto.FLOAT: normalisation accumulates in float32 whatever the graph's precision


def _node(name: str, inputs: list[Tensor | None], attrs: Attributes, *, like: Tensor, version: int) -> Tensor:
    return torch.onnx.ops.symbolic(name, inputs, attrs, dtype=like.dtype, shape=like.shape, version=version)


class RMSNorm(nn.Module):
    """RMSNormalization over the last axis, accumulated in float32 (https://arxiv.org/abs/1910.07467)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        attrs: Attributes = {"axis": -1, "epsilon": self.eps, "stash_type": _FLOAT}
        return _node("RMSNormalization", [x, self.weight], attrs, like=x, version=23)


def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor, *, num_heads: int) -> Tensor:
    """Rotate the halves of every head: x [B, S, H*D], cos and sin [B, S, D/2] -> [B, S, H*D]."""
    return _node("RotaryEmbedding", [x, cos, sin], {"num_heads": num_heads}, like=x, version=23)


def tensor_scatter(cache: Tensor, update: Tensor, write_indices: Tensor) -> Tensor:
    """Write update [B, G, S, D] into cache [B, G, C, D] from position write_indices [B] on -> [B, G, C, D]."""
    return _node("TensorScatter", [cache, update, write_indices], {"axis": 2}, like=cache, version=24)


def masked_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Attention of query [B, H, S, D] over key, value [B, G, R, D] where the boolean mask [B, 1, S, R] is true.

    No softmax_precision: TensorRT's parser refuses it (and its kernels accumulate in float32). No is_causal with
    nonpad_kv_seqlen for a cache either: that parser drops the lengths without a word, and aligns the causal frontier to
    the first entries of the cache instead of the last.
    """
    attrs: Attributes = {"scale": query.shape[-1] ** -0.5}
    return _node("Attention", [query, key, value, mask], attrs, like=query, version=24)


def first_rows(x: Tensor, like: Tensor) -> Tensor:
    """The first N rows of x [B, ...], where like [N, ...] has at most as many -> [N, ...]."""
    count = _num_rows(like)
    start = torch.zeros(1, dtype=torch.int64)
    return _slice(x, start, count, (like.shape[0], *x.shape[1:]))


def with_first_rows(x: Tensor, first: Tensor) -> Tensor:
    """x [B, ...] with its first N rows replaced by first [N, ...] -> [B, ...]."""
    end = torch.full((1,), torch.iinfo(torch.int64).max)
    rest = _slice(x, _num_rows(first), end, (x.shape[0] - first.shape[0], *x.shape[1:]))
    return torch.onnx.ops.symbolic("Concat", [first, rest], {"axis": 0}, dtype=x.dtype, shape=x.shape, version=24)


def _num_rows(x: Tensor) -> Tensor:
    return torch.onnx.ops.symbolic("Shape", [x], {"start": 0, "end": 1}, dtype=torch.int64, shape=(1,), version=24)


def _slice(x: Tensor, start: Tensor, end: Tensor, shape: Sequence[int | torch.SymInt]) -> Tensor:
    axes = torch.zeros(1, dtype=torch.int64)
    return torch.onnx.ops.symbolic("Slice", [x, start, end, axes], dtype=x.dtype, shape=shape, version=24)
