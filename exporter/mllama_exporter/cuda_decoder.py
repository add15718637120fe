"""ONNX Runtime's CUDA twin of the decoder: the same weights file, rewritten for that provider's kernels.

A step for one token is hundreds of small kernels, so fewer of them is faster. Beside products (`cuda_products`) and
attentions (`ort_attention`):
- GroupQueryAttention rotates queries and keys itself, and takes query, key and value as one product. It has no float32
  kernel: there the standard operators stay;
- its longest length is that of the cache axis, which the host knows without asking the device;
- a residual and the normalization behind it become one operator;
- gates are constant, but ONNX Runtime folds no 16-bit Tanh at load: theirs is taken in float32.

Operators: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from mllama_runtime.config import ModelConfig, TextConfig
from onnx_ir.passes.common import RemoveUnusedNodesPass

from mllama_exporter.cuda_norms import use_residual_norms
from mllama_exporter.cuda_products import one_product, use_fused_products, use_quantized_products
from mllama_exporter.graph_edit import CONTRIB, LOW_PRECISION, Builder, producer_of, replace
from mllama_exporter.ort_attention import self_attentions, use_group_query_attention, use_matrix_products

GROUPED_DTYPES = LOW_PRECISION  # that GroupQueryAttention has kernels for
_HEAD_MULTIPLE = 16  # of the sizes of heads that it rotates


def cuda_decoder_from_graph(standard: ir.Model, config: ModelConfig) -> ir.Model:
    """`decoder.cuda.onnx` from the decoder of `graphs`, whose weights may or may not be attached yet."""
    model, text = standard.clone(), config.text
    graph = model.graph
    dtype = next(value.dtype for value in graph.inputs if str(value.name).startswith("past_"))
    if dtype is None:
        raise RuntimeError("a cache without a type")
    use_quantized_products(graph, dtype)
    use_matrix_products(graph, text)
    if dtype in GROUPED_DTYPES and text.head_dim % _HEAD_MULTIPLE == 0:
        _use_group_query_attention(graph, text, dtype)
    else:
        _keep_lengths_on_device(graph)
    use_fused_products(graph)
    use_residual_norms(graph)
    if dtype in LOW_PRECISION:
        _fold_gates(graph, dtype)
    _gather_by_row(graph)
    RemoveUnusedNodesPass()(model)
    model.opset_imports[CONTRIB] = 1
    return model


def _use_group_query_attention(graph: ir.Graph, config: TextConfig, dtype: ir.DataType) -> None:
    layers = self_attentions(graph)
    shared = Builder(graph, graph[0], "self_attention")
    kv_lengths = next(value for value in graph.inputs if value.name == "kv_lengths")
    one = shared.constant(np.array(1, np.int64))
    last = shared.add("Cast", [shared.add("Sub", [kv_lengths, one])], {"to": ir.DataType.INT32})
    cache_len = shared.add("Shape", [layers[0].past[0]], {"start": 2, "end": 3})
    total = shared.add("Cast", [cache_len], {"to": ir.DataType.INT32})
    # Cosine and sine of every position's angles [max_seq_len, D/2], in float32 whatever the precision; folded at load.
    ends = (shared.constant(np.array(value, np.float32)) for value in (0, config.max_seq_len, 1))
    positions = shared.add("Unsqueeze", [shared.add("Range", [*ends]), shared.constant(np.array([1], np.int64))])
    angles = shared.add("Mul", [positions, graph.initializers["inv_freq"]])
    rotation = [shared.add("Cast", [shared.add(name, [angles])], {"to": int(dtype)}) for name in ("Cos", "Sin")]
    for layer in layers:
        query, key = (producer_of(rows, "RotaryEmbedding").inputs[0] for rows in layer.rows[:2])
        rows = [query, key, layer.rows[2]]
        if (together := one_product(graph, rows)) is not None:
            rows = [together, None, None]
        inputs = [*rows, *layer.past, last, total, *rotation]
        use_group_query_attention(graph, layer, inputs, config, {"do_rotary": 1})


def _keep_lengths_on_device(graph: ir.Graph) -> None:
    """The mask over the cache starts from where new tokens are written, not from lengths less their number.

    Both are the same place, but the host knows the number and the device the lengths: a copy in every step.
    """
    sub = next(node for node in graph if node.op_type == "Sub")
    start = next(value for value in graph.inputs if value.name == "write_indices")
    build = Builder(graph, sub, "first_new_token")
    replace(sub.outputs[0], build.add("Unsqueeze", [start, build.constant(np.array([1], np.int64))]))
    graph.remove(sub, safe=True)


def _fold_gates(graph: ir.Graph, dtype: ir.DataType) -> None:
    for gate in [node for node in graph if node.op_type == "Tanh"]:
        build = Builder(graph, gate, str(gate.name))
        wide = build.add("Tanh", [build.add("Cast", [gate.inputs[0]], {"to": ir.DataType.FLOAT})])
        replace(gate.outputs[0], build.add("Cast", [wide], {"to": int(dtype)}))
        graph.remove(gate, safe=True)


def _gather_by_row(graph: ir.Graph) -> None:
    """The tokens whose logits are wanted, found by their place in a row: without arithmetic on places in the batch."""
    gather = next(node for node in graph if node.op_type == "GatherND")
    wanted = next(value for value in graph.inputs if value.name == "logits_indices")
    build = Builder(graph, gather, "wanted_tokens")
    places = build.add("Unsqueeze", [wanted, build.constant(np.array([2], np.int64))])  # [B, L, 1]
    replace(gather.outputs[0], build.add("GatherND", [gather.inputs[0], places], {"batch_dims": 1}))
    graph.remove(gather, safe=True)
