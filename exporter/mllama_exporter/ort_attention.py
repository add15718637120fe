"""The decoder's attentions for ONNX Runtime: what the twins for the CPU and for CUDA have in common.

- scatter + self-attention becomes GroupQueryAttention over the same cache buffers, where its kernel exists: the
  standard operator computes over the whole cache axis whatever the lengths say. It takes several new tokens on top of a
  past at batch 1 only, so prefill goes row by row;
- cross-attention becomes two matrix products that fold a key/value head's query heads into the row axis: the standard
  operator expands the key/value heads first, and refuses to have no rows.

Operators: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from mllama_runtime.config import TextConfig

from mllama_exporter.graph_edit import CONTRIB, LOW_PRECISION, Builder, producer_of, replace

_LOWEST = np.finfo(np.float32).min


@dataclass(frozen=True, slots=True, eq=False)
class SelfAttention:
    """One layer's, in the standard graph. rows: query, key and value [B, S, heads * D]; past: caches [B, G, C, D]."""

    attention: ir.Node
    scatters: tuple[ir.Node, ir.Node]
    rows: tuple[ir.Value, ir.Value, ir.Value]

    @property
    def past(self) -> tuple[ir.Value | None, ir.Value | None]:
        return self.scatters[0].inputs[0], self.scatters[1].inputs[0]


def self_attentions(graph: ir.Graph) -> list[SelfAttention]:
    """Those that read a cache, in the order of the graph."""
    found = []
    for node in graph:
        key = node.inputs[1].producer() if node.op_type == "Attention" and node.inputs[1] is not None else None
        if key is None or key.op_type != "TensorScatter":
            continue
        scatters = key, producer_of(node.inputs[2], "TensorScatter")
        query, key_rows, value = (
            producer_of(producer_of(heads, "Transpose").inputs[0], "Reshape").inputs[0]
            for heads in (node.inputs[0], scatters[0].inputs[1], scatters[1].inputs[1])
        )
        if query is None or key_rows is None or value is None:
            raise RuntimeError(f"{node} lacks an input")
        found.append(SelfAttention(node, scatters, (query, key_rows, value)))
    return found


def use_group_query_attention(
    graph: ir.Graph,
    found: SelfAttention,
    inputs: list[ir.Value | None],
    config: TextConfig,
    attributes: Mapping[str, int] | None = None,
) -> None:
    """Put the operator where scatters and attention stood; it attends within the new tokens and to the past.

    inputs: from the query on, as its documentation lists them. What made inputs that it does not take stays behind.
    """
    build = Builder(graph, found.attention, f"{found.attention.name}_grouped")
    dims = {"num_heads": config.num_heads, "kv_num_heads": config.num_kv_heads, "scale": config.head_dim**-0.5}
    output = build.add("GroupQueryAttention", inputs, {**dims, **(attributes or {})}, domain=CONTRIB, num_outputs=3)
    node = producer_of(output, "GroupQueryAttention")
    split = next(use.node for use in found.attention.outputs[0].uses())
    joined = next(use.node for use in split.outputs[0].uses())
    for new, old in zip(node.outputs, (joined.outputs[0], *(each.outputs[0] for each in found.scatters)), strict=True):
        replace(old, new)
    heads = [producer_of(found.attention.inputs[0], "Transpose")]
    heads += [producer_of(scatter.inputs[1], "Transpose") for scatter in found.scatters]
    reshapes = [producer_of(transpose.inputs[0], "Reshape") for transpose in heads]
    graph.remove([joined, split, found.attention, *found.scatters, *heads, *reshapes], safe=True)


def use_matrix_products(graph: ir.Graph, config: TextConfig) -> None:
    """Cross-attention: N rows, H query heads, G key/value heads, S new tokens, R = T*P patches, D head_dim.

    Every shape is told in full: with no rows there is nothing to infer a size from.
    """
    own = {found.attention for found in self_attentions(graph)}
    attentions = [node for node in graph if node.op_type == "Attention" and node not in own]
    if not attentions:
        return
    group = config.num_heads // config.num_kv_heads
    shared = Builder(graph, attentions[0], "cross_attention")
    mask = attentions[0].inputs[3]  # bool [N, 1, S, R]
    zero, lowest = shared.constant(np.array(0, np.float32)), shared.constant(np.array(_LOWEST, np.float32))
    bias = shared.add("Where", [mask, zero, lowest])
    dtype = attentions[0].inputs[1].dtype  # type: ignore[union-attr]
    if dtype in LOW_PRECISION:  # each row has a patch that is not masked, so the lowest may become minus infinity
        bias = shared.add("Cast", [bias], {"to": int(dtype)})
    bias = shared.add("Unsqueeze", [bias, shared.constant(np.array([2], np.int64))])  # [N, 1, 1, S, R]
    rows = shared.add("Shape", [mask], {"start": 0, "end": 1})
    tokens = shared.add("Shape", [mask], {"start": 2, "end": 3})
    patches = shared.add("Shape", [mask], {"start": 3})
    folded_tokens = shared.add("Mul", [tokens, shared.constant(np.array([group], np.int64))])
    kv_heads, heads, width, groups = (
        shared.constant(np.array([size], np.int64))
        for size in (config.num_kv_heads, config.num_heads, config.head_dim, group)
    )
    folded = shared.add("Concat", [rows, kv_heads, folded_tokens, width], {"axis": 0})
    unfolded = shared.add("Concat", [rows, heads, tokens, width], {"axis": 0})
    split = shared.add("Concat", [rows, kv_heads, groups, tokens, patches], {"axis": 0})
    joined = shared.add("Concat", [rows, kv_heads, folded_tokens, patches], {"axis": 0})

    for index, attention in enumerate(attentions):
        build = Builder(graph, attention, f"cross_attention_{index}")
        query, key, value = attention.inputs[:3]
        query = build.add("Reshape", [query, folded])  # [N, G, H/G*S, D]
        attributes: dict[str, int | float | list[int]] = {"transB": 1, "alpha": config.head_dim**-0.5}
        scores = build.add("FusedMatMul", [query, key], attributes, domain=CONTRIB)  # [N, G, H/G*S, R]
        scores = build.add("Reshape", [scores, split])
        weights = build.add("Softmax", [build.add("Add", [scores, bias])], {"axis": -1})  # [N, G, H/G, S, R]
        weights = build.add("Reshape", [weights, joined])
        attended = build.add("Reshape", [build.add("MatMul", [weights, value]), unfolded])  # [N, H, S, D]
        replace(attention.outputs[0], attended)
        graph.remove(attention, safe=True)
