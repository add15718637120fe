"""ONNX Runtime's CUDA twin of the vision graph: the same weights file, rewritten for that provider's kernels.

- Attention loses its mask, with which that provider has no fast kernel. All that the mask does is to keep padding rows
  from padding rows. Heads widened by a few columns do the same: there, padding rows hold c in queries and -c in keys,
  and all else is zero. The scores of such pairs fall so far that their weights are zero, and no other score changes.
- Patches are embedded by a matrix product: a convolution would try out every algorithm on the first picture.
- Products take matrices as they lie in the weights file, quantized ones too (`cuda_products`).

Dimensions as in `modules.vision`: I images, T tiles, P patches, Q rows of a tile, V hidden size, H heads, D head_dim.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from mllama_runtime.config import ModelConfig, VisionConfig
from onnx_ir.passes.common import RemoveUnusedNodesPass

from mllama_exporter.cuda_norms import use_residual_norms
from mllama_exporter.cuda_products import use_fused_products, use_quantized_products
from mllama_exporter.graph_edit import CONTRIB, LOW_PRECISION, Builder, producer_of, replace

_HEAD_MULTIPLE = 8  # of the widths of heads that the fast kernels take
_APART = 64.0  # c: exact in every precision, and eight times its square is within FP16's range


def cuda_vision_from_graph(standard: ir.Model, config: ModelConfig) -> ir.Model:
    """`vision.cuda.onnx` from the vision graph of `graphs`, whose weights may or may not be attached yet."""
    model, vision = standard.clone(), config.vision
    graph = model.graph
    dtype = graph.outputs[0].dtype
    if dtype is None:
        raise RuntimeError("an output without a type")
    _use_widened_heads(graph, vision, dtype)
    _use_patch_product(graph, vision)
    use_quantized_products(graph, dtype)
    use_fused_products(graph)
    use_residual_norms(graph)
    RemoveUnusedNodesPass()(model)  # the mask
    model.opset_imports[CONTRIB] = 1
    return model


def _use_widened_heads(graph: ir.Graph, vision: VisionConfig, dtype: ir.DataType) -> None:
    """MultiHeadAttention of [I, T*Q, H*D] without a mask: on Hopper cuDNN's kernel, and no transposes before or after.

    That kernel takes values of another width than queries and keys, so values stay as they are.
    """
    attentions = [node for node in graph if node.op_type == "Attention"]
    num_heads, width = vision.num_heads, vision.head_dim
    extra = _HEAD_MULTIPLE - width % _HEAD_MULTIPLE
    shared = Builder(graph, attentions[0], "attention")
    pairs = producer_of(producer_of(attentions[0].inputs[3], "Unsqueeze").inputs[0], "Or")  # [I, T*Q, T*Q]
    is_real = producer_of(pairs.inputs[0], "Unsqueeze").inputs[0]  # [I, T*Q]
    is_real = shared.add("Unsqueeze", [is_real, shared.constant(np.array([2, 3]))])
    spread = shared.constant(np.array([1, 1, num_heads, extra]))
    columns = []  # of queries, then of keys: [I, T*Q, H, extra]
    for apart in (_APART, -_APART):
        sides = [shared.constant(np.array(number, np.float32)) for number in (0, apart)]
        column = shared.add("Where", [is_real, *sides])
        if dtype in LOW_PRECISION:
            column = shared.add("Cast", [column], {"to": int(dtype)})
        columns.append(shared.add("Expand", [column, spread]))
    split = shared.constant(np.array([0, 0, num_heads, width]))
    joined = shared.constant(np.array([0, 0, num_heads * (width + extra)]))

    for index, attention in enumerate(attentions):
        build = Builder(graph, attention, f"attention_{index}")
        query, key, value = (  # [I, T*Q, H*D]
            producer_of(producer_of(heads, "Transpose").inputs[0], "Reshape").inputs[0]
            for heads in attention.inputs[:3]
        )
        wide = []
        for rows, column in zip((query, key), columns, strict=True):
            heads = build.add("Concat", [build.add("Reshape", [rows, split]), column], {"axis": -1})
            wide.append(build.add("Reshape", [heads, joined]))
        attributes = {"num_heads": num_heads, "scale": attention.attributes["scale"].as_float()}
        result = build.add("MultiHeadAttention", [*wide, value], attributes, domain=CONTRIB)
        turned = next(use.node for use in attention.outputs[0].uses())
        rejoined = next(use.node for use in turned.outputs[0].uses())
        replace(rejoined.outputs[0], result)
        graph.remove([rejoined, turned, attention], safe=True)


def _use_patch_product(graph: ir.Graph, vision: VisionConfig) -> None:
    """Pixels [I*T, 3, size, size] -> patches [I, T, P-1, 3*patch*patch] -> [I, T, P-1, V], in the place of Conv."""
    convolution = next(node for node in graph if node.op_type == "Conv")
    build = Builder(graph, convolution, "patches")
    side, patch, channels = vision.image_size // vision.patch_size, vision.patch_size, vision.num_channels
    pixels, kernel = convolution.inputs
    rows = build.add("Reshape", [pixels, build.constant(np.array([-1, channels, side, patch, side, patch]))])
    rows = build.add("Transpose", [rows], {"perm": [0, 2, 4, 1, 3, 5]})
    size = channels * patch * patch
    rows = build.add("Reshape", [rows, build.constant(np.array([-1, vision.max_num_tiles, side * side, size]))])
    matrix = build.add("Reshape", [kernel, build.constant(np.array([vision.hidden_size, size]))])
    patches = build.add("FusedMatMul", [rows, matrix], {"transB": 1}, domain=CONTRIB)
    chain = [convolution]
    for _ in range(3):  # Reshape, Transpose, Reshape: features last, tiles apart
        chain.append(next(use.node for use in chain[-1].outputs[0].uses()))
    replace(chain[-1].outputs[0], patches)
    graph.remove(chain[::-1], safe=True)
