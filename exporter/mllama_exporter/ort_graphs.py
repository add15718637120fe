"""ONNX Runtime's twin of a standard graph: same weights file, rewritten for that runtime's kernels.

Rewrites, each for a measured reason (design: the graphs):
- for the CPU a low-precision graph computes in float32 from its low-precision weights: that provider has no bfloat16
  kernels, and inserts casts around most float16 ones. It folds the casts at load, so a session takes the memory of
  float32 weights. The twin for CUDA, where the kernels exist, keeps the graph's own precision;
- products by quantised matrices become that runtime's own kernels (`ort_kernels`): on CUDA those by packed weights;
- scatter + self-attention becomes GroupQueryAttention over the same cache buffers: the standard operator computes over
  the whole cache axis whatever the lengths say;
- cross-attention becomes two matrix products that fold a key/value head's query heads into the row axis: the standard
  operator expands the key/value heads first.

GroupQueryAttention takes several new tokens on top of a past at batch 1 only, so prefill goes row by row.
Operator: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from mllama_runtime.config import ModelConfig
from onnx_ir.passes.common import RemoveUnusedNodesPass

from mllama_exporter.graph_edit import Builder, producer_of, replace
from mllama_exporter.ort_kernels import use_quantized_kernels

_CONTRIB = "com.microsoft"
_LOW_PRECISION = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_HEAD_MULTIPLE = 8  # of the sizes of heads that GroupQueryAttention takes
_LOWEST = np.finfo(np.float32).min


def ort_graph_from_graph(standard: ir.Model, config: ModelConfig, *, for_cuda: bool = False) -> ir.Model:
    """The twin of a vision or decoder graph from `graphs`, whose weights may or may not be attached yet."""
    model = standard.clone()
    if not for_cuda:
        _compute_in_float32(model.graph)
    use_quantized_kernels(model.graph, only_packed=for_cuda)
    attentions = [node for node in model.graph if node.op_type == "Attention"]
    cached = [node for node in attentions if _reads_cache(node)]
    if cached:
        if config.text.head_dim % _HEAD_MULTIPLE == 0:  # otherwise the standard operators stay
            _use_group_query_attention(model.graph, cached, config)
        if cross := [node for node in attentions if node not in cached]:
            _use_matrix_products(model.graph, cross, config)
        RemoveUnusedNodesPass()(model)  # the mask over the cache
    if any(node.domain == _CONTRIB for node in model.graph):
        model.opset_imports[_CONTRIB] = 1
    return model


def _reads_cache(attention: ir.Node) -> bool:
    key = attention.inputs[1]
    producer = key.producer() if key is not None else None
    return producer is not None and producer.op_type == "TensorScatter"


def _compute_in_float32(graph: ir.Graph) -> None:
    """Every activation, cache, input and output becomes float32; weights keep their precision and are cast."""
    for node in graph:
        to = node.attributes.get("to")
        if node.op_type == "Cast" and to is not None and to.as_int() in _LOW_PRECISION:
            node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT)
    for value in [*graph.inputs, *graph.outputs]:
        if value.dtype in _LOW_PRECISION:
            value.type = ir.TensorType(ir.DataType.FLOAT)  # a new one: the clone shares its types with the original
    first = graph[0]
    for name, value in list(graph.initializers.items()):
        if value.dtype not in _LOW_PRECISION:
            continue
        constant = value.const_value
        if constant is not None and not isinstance(constant, ir.ExternalTensor):
            value.const_value = ir.tensor(constant.numpy().astype(np.float32), name=name)
            value.type = ir.TensorType(ir.DataType.FLOAT)
            continue
        cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT}, name=f"{name}_to_float32")
        cast.outputs[0].name = f"{name}_float32"
        uses = [(use.node, use.idx) for use in value.uses() if use.node is not cast]
        for node, index in uses:
            node.replace_input_with(index, cast.outputs[0])
        graph.insert_before(first, cast)


def _use_group_query_attention(graph: ir.Graph, attentions: list[ir.Node], config: ModelConfig) -> None:
    text = config.text
    shared = Builder(graph, graph[0], "lengths")
    kv_lengths = next(value for value in graph.inputs if value.name == "kv_lengths")
    one = shared.constant(np.array(1, np.int64))
    last = shared.add("Cast", [shared.add("Sub", [kv_lengths, one])], {"to": ir.DataType.INT32})
    longest = shared.add("ReduceMax", [kv_lengths], {"keepdims": 0})
    total = shared.add("Cast", [longest], {"to": ir.DataType.INT32})

    for index, attention in enumerate(attentions):
        build = Builder(graph, attention, f"self_attention_{index}")
        scatters = [producer_of(attention.inputs[position], "TensorScatter") for position in (1, 2)]
        # The rows before heads were split off: Reshape and Transpose are undone.
        query, key, value = (
            producer_of(producer_of(heads, "Transpose").inputs[0], "Reshape").inputs[0]
            for heads in (attention.inputs[0], scatters[0].inputs[1], scatters[1].inputs[1])
        )
        attributes = {"num_heads": text.num_heads, "kv_num_heads": text.num_kv_heads, "scale": text.head_dim**-0.5}
        inputs = [query, key, value, scatters[0].inputs[0], scatters[1].inputs[0], last, total]
        output = build.add("GroupQueryAttention", inputs, attributes, domain=_CONTRIB, num_outputs=3)
        node = producer_of(output, "GroupQueryAttention")
        split = next(use.node for use in attention.outputs[0].uses())
        joined = next(use.node for use in split.outputs[0].uses())
        for new, old in zip(node.outputs, (joined.outputs[0], *(s.outputs[0] for s in scatters)), strict=True):
            replace(old, new)
        dead = [joined, split, attention, *scatters]
        dead += [producer_of(heads, "Transpose") for heads in (attention.inputs[0], *(s.inputs[1] for s in scatters))]
        dead += [producer_of(transpose.inputs[0], "Reshape") for transpose in dead[-3:]]
        graph.remove(dead, safe=True)


def _use_matrix_products(graph: ir.Graph, attentions: list[ir.Node], config: ModelConfig) -> None:
    """Cross-attention: N rows, H query heads, G key/value heads, S new tokens, R = T*P patches, D head_dim.

    Every shape is told in full: with no rows there is nothing to infer a size from.
    """
    text = config.text
    group = text.num_heads // text.num_kv_heads
    shared = Builder(graph, attentions[0], "cross_attention")
    mask = attentions[0].inputs[3]  # bool [N, 1, S, R]
    zero, lowest = shared.constant(np.array(0, np.float32)), shared.constant(np.array(_LOWEST, np.float32))
    bias = shared.add("Where", [mask, zero, lowest])
    dtype = attentions[0].inputs[1].dtype  # type: ignore[union-attr]
    if dtype in _LOW_PRECISION:  # each row has a patch that is not masked, so the lowest may become minus infinity
        bias = shared.add("Cast", [bias], {"to": int(dtype)})
    bias = shared.add("Unsqueeze", [bias, shared.constant(np.array([2], np.int64))])  # [N, 1, 1, S, R]
    rows = shared.add("Shape", [mask], {"start": 0, "end": 1})
    tokens = shared.add("Shape", [mask], {"start": 2, "end": 3})
    patches = shared.add("Shape", [mask], {"start": 3})
    folded_tokens = shared.add("Mul", [tokens, shared.constant(np.array([group], np.int64))])
    kv_heads, heads, width, groups = (
        shared.constant(np.array([size], np.int64))
        for size in (text.num_kv_heads, text.num_heads, text.head_dim, group)
    )
    folded = shared.add("Concat", [rows, kv_heads, folded_tokens, width], {"axis": 0})
    unfolded = shared.add("Concat", [rows, heads, tokens, width], {"axis": 0})
    split = shared.add("Concat", [rows, kv_heads, groups, tokens, patches], {"axis": 0})
    joined = shared.add("Concat", [rows, kv_heads, folded_tokens, patches], {"axis": 0})

    for index, attention in enumerate(attentions):
        build = Builder(graph, attention, f"cross_attention_{index}")
        query, key, value = attention.inputs[:3]
        query = build.add("Reshape", [query, folded])  # [N, G, H/G*S, D]
        attributes: dict[str, int | float | list[int]] = {"transB": 1, "alpha": text.head_dim**-0.5}
        scores = build.add("FusedMatMul", [query, key], attributes, domain=_CONTRIB)  # [N, G, H/G*S, R]
        scores = build.add("Reshape", [scores, split])
        weights = build.add("Softmax", [build.add("Add", [scores, bias])], {"axis": -1})  # [N, G, H/G, S, R]
        weights = build.add("Reshape", [weights, joined])
        attended = build.add("Reshape", [build.add("MatMul", [weights, value]), unfolded])  # [N, H, S, D]
        replace(attention.outputs[0], attended)
        graph.remove(attention, safe=True)
