"""ONNX Runtime's twin of a standard graph: same weights file, rewritten for that runtime's kernels.

Rewrites, each for a measured reason (design: the graphs):
- a low-precision graph computes in float32 from its low-precision weights: ONNX Runtime's CPU provider has no bfloat16
  kernels, and inserts casts around most float16 ones. It folds the casts at load, so a session takes the memory of
  float32 weights; and for a GPU, where the kernels exist, such a twin is the wrong graph;
- products by quantised matrices become that runtime's own kernels (`ort_kernels`);
- scatter + self-attention becomes GroupQueryAttention over the same cache buffers: the standard operator computes over
  the whole cache axis whatever the lengths say;
- cross-attention becomes two matrix products that fold a key/value head's query heads into the row axis: the standard
  operator expands the key/value heads first;
- a cross-attention layer is run only if some row of the batch has a picture: text alone need not read its weights.

GroupQueryAttention takes several new tokens on top of a past at batch 1 only, so prefill goes row by row.
Operator: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from mllama_runtime.config import ModelConfig
from onnx_ir.passes.common import RemoveUnusedNodesPass

from mllama_exporter.graph_edit import Builder, producer_of, replace
from mllama_exporter.ort_kernels import PRODUCTS, use_quantized_kernels

_CONTRIB = "com.microsoft"
_LOW_PRECISION = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_HEAD_MULTIPLE = 8  # of the sizes of heads that GroupQueryAttention takes
_LOWEST = np.finfo(np.float32).min


def ort_graph_from_graph(standard: ir.Model, config: ModelConfig) -> ir.Model:
    """The twin of a vision or decoder graph from `graphs`, whose weights may or may not be attached yet."""
    model = standard.clone()
    _compute_in_float32(model.graph)
    use_quantized_kernels(model.graph)
    attentions = [node for node in model.graph if node.op_type == "Attention"]
    cached = [node for node in attentions if _reads_cache(node)]
    if cached:
        if config.text.head_dim % _HEAD_MULTIPLE == 0:  # otherwise the standard operators stay
            _use_group_query_attention(model.graph, cached, config)
        _use_matrix_products(model.graph, [node for node in attentions if node not in cached], config)
        _skip_without_pictures(model.graph, config)
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
    """Cross-attention: B batch, H query heads, G key/value heads, S new tokens, R = T*P rows, D head_dim."""
    text = config.text
    group = text.num_heads // text.num_kv_heads
    shared = Builder(graph, attentions[0], "cross_attention")
    mask = attentions[0].inputs[3]  # bool [B, 1, S, R]
    zero, lowest = shared.constant(np.array(0, np.float32)), shared.constant(np.array(_LOWEST, np.float32))
    bias = shared.add("Where", [mask, zero, lowest])
    bias = shared.add("Unsqueeze", [bias, shared.constant(np.array([2], np.int64))])  # [B, 1, 1, S, R]
    folded = shared.constant(np.array([0, text.num_kv_heads, -1, text.head_dim], np.int64))
    unfolded = shared.constant(np.array([0, text.num_heads, -1, text.head_dim], np.int64))

    for index, attention in enumerate(attentions):
        build = Builder(graph, attention, f"cross_attention_{index}")
        query, key, value = attention.inputs[:3]
        query = build.add("Reshape", [query, folded])  # [B, G, H/G*S, D]
        attributes: dict[str, int | float | list[int]] = {"transB": 1, "alpha": text.head_dim**-0.5}
        scores = build.add("FusedMatMul", [query, key], attributes, domain=_CONTRIB)  # [B, G, H/G*S, R]
        flat_shape = build.add("Shape", [scores])
        tokens = build.add("Shape", [mask], {"start": 2})  # [S, R]
        heads = build.constant(np.array([0, text.num_kv_heads, group], np.int64))
        scores = build.add("Reshape", [scores, build.add("Concat", [heads, tokens], {"axis": 0})])
        weights = build.add("Softmax", [build.add("Add", [scores, bias])], {"axis": -1})  # [B, G, H/G, S, R]
        weights = build.add("Reshape", [weights, flat_shape])
        attended = build.add("Reshape", [build.add("MatMul", [weights, value]), unfolded])  # [B, H, S, D]
        replace(attention.outputs[0], attended)
        graph.remove(attention, safe=True)


def _skip_without_pictures(graph: ir.Graph, config: ModelConfig) -> None:
    """Put every cross-attention layer into the branch of an If, whose other branch passes the residual through."""
    has_image = next(value for value in graph.inputs if value.name == "has_image")
    shared = Builder(graph, graph[0], "has_image")
    as_number = shared.add("Cast", [has_image], {"to": ir.DataType.INT32})
    any_image = shared.add("ReduceMax", [as_number], {"keepdims": 0})
    any_image = shared.add("Cast", [any_image], {"to": ir.DataType.BOOL})
    for layer in config.text.cross_attention_layers:
        prefix = f"language_model.model.layers.{layer}."
        residual = _user(graph, f"{prefix}input_layernorm.weight", "RMSNormalization").inputs[0]
        last = _user(graph, f"{prefix}mlp.down_proj.weight", *PRODUCTS)
        while last.op_type != "Add":  # gate, selection, residual
            last = next(use.node for use in last.outputs[0].uses())
        if residual is None:
            raise RuntimeError(f"layer {layer} has no input")
        nodes = _between(graph, residual, last)
        order, result = list(graph), last.outputs[0]
        before = order[order.index(last) + 1]
        users = [(use.node, use.idx) for use in result.uses()]
        graph.remove(nodes)
        passed = ir.node("Identity", [residual], name=f"skip_{layer}")
        passed.outputs[0].name = f"skip_{layer}_output"
        choice = ir.node(
            "If",
            [any_image],
            {
                "then_branch": ir.Graph([], [result], nodes=nodes, name=f"layer_{layer}"),
                "else_branch": ir.Graph([], passed.outputs, nodes=[passed], name=f"without_layer_{layer}"),
            },
            name=f"if_any_image_{layer}",
        )
        choice.outputs[0].name = f"layer_{layer}_output"
        graph.insert_before(before, choice)
        for node, index in users:
            node.replace_input_with(index, choice.outputs[0])


def _user(graph: ir.Graph, weight: str, *op_types: str) -> ir.Node:
    """The node of those types that a weight reaches, through casts, transposes and the like if they are there."""
    value = graph.initializers[weight]
    while (node := next(use.node for use in value.uses())).op_type not in op_types:
        value = node.outputs[0]
    return node


def _between(graph: ir.Graph, start: ir.Value, end: ir.Node) -> list[ir.Node]:
    """The nodes, in order, that depend on `start` and that `end` depends on; `end` included."""
    needed, pending = set(), [end]
    while pending:
        node = pending.pop()
        if node not in needed:
            needed.add(node)
            pending += [p for v in node.inputs if v is not None and v is not start and (p := v.producer())]
    depends = {start}
    nodes = []
    for node in graph:
        if any(value in depends for value in node.inputs):
            depends.update(node.outputs)
            if node in needed:
                nodes.append(node)
    return nodes
