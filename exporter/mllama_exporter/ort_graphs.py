"""ONNX Runtime's CPU twin of a standard graph: same weights file, rewritten for that provider's kernels.

Rewrites, each for a measured reason (design: the graphs):
- a low-precision graph computes in float32 from its low-precision weights: the provider has no bfloat16 kernels, and
  inserts casts around most float16 ones. It folds the casts at load, so a session takes the memory of float32 weights;
- products by quantized matrices become the provider's own kernels (`ort_kernels`);
- attentions become what is fast there (`ort_attention`).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from mllama_runtime.config import ModelConfig, TextConfig
from onnx_ir.passes.common import RemoveUnusedNodesPass

from mllama_exporter.graph_edit import CONTRIB, LOW_PRECISION, Builder
from mllama_exporter.ort_attention import self_attentions, use_group_query_attention, use_matrix_products
from mllama_exporter.ort_kernels import use_quantized_kernels

_HEAD_MULTIPLE = 8  # of the sizes of heads that GroupQueryAttention takes


def ort_graph_from_graph(standard: ir.Model, config: ModelConfig) -> ir.Model:
    """The twin of a vision or decoder graph from `graphs`, whose weights may or may not be attached yet."""
    model = standard.clone()
    _compute_in_float32(model.graph)
    use_quantized_kernels(model.graph)
    if self_attentions(model.graph):
        use_matrix_products(model.graph, config.text)
        if config.text.head_dim % _HEAD_MULTIPLE == 0:  # otherwise the standard operators stay
            _use_group_query_attention(model.graph, config.text)
        RemoveUnusedNodesPass()(model)  # the mask over the cache
    if any(node.domain == CONTRIB for node in model.graph):
        model.opset_imports[CONTRIB] = 1
    return model


def _compute_in_float32(graph: ir.Graph) -> None:
    """Every activation, cache, input and output becomes float32; weights keep their precision and are cast."""
    for node in graph:
        to = node.attributes.get("to")
        if node.op_type == "Cast" and to is not None and to.as_int() in LOW_PRECISION:
            node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT)
    for value in [*graph.inputs, *graph.outputs]:
        if value.dtype in LOW_PRECISION:
            value.type = ir.TensorType(ir.DataType.FLOAT)  # a new one: the clone shares its types with the original
    first = graph[0]
    for name, value in list(graph.initializers.items()):
        if value.dtype not in LOW_PRECISION:
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


def _use_group_query_attention(graph: ir.Graph, config: TextConfig) -> None:
    shared = Builder(graph, graph[0], "lengths")
    kv_lengths = next(value for value in graph.inputs if value.name == "kv_lengths")
    one = shared.constant(np.array(1, np.int64))
    last = shared.add("Cast", [shared.add("Sub", [kv_lengths, one])], {"to": ir.DataType.INT32})
    longest = shared.add("ReduceMax", [kv_lengths], {"keepdims": 0})
    total = shared.add("Cast", [longest], {"to": ir.DataType.INT32})
    for found in self_attentions(graph):
        use_group_query_attention(graph, found, [*found.rows, *found.past, last, total], config)
