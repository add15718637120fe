"""Products by quantized matrices, in ONNX Runtime's own CPU kernels; a step of making the twin (`ort_graphs`).

- Weight-only (int8-weight, int4): MatMulNBits (`ort_packed`).
- int8 with int8 activations: MatMulInteger, the exact arithmetic of the scheme, instead of products in float32. Both
  sides are moved to unsigned, since the kernel for signed ones is a hundred times slower, and the one for one of each
  saturates on processors without VNNI.
- fp8: there is no kernel, so weights are spread to float32 at load; activations are still rounded to the grid.

Operators: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md, https://onnx.ai/onnx/operators/
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from mllama_exporter.graph_edit import Builder, producer_of, replace
from mllama_exporter.ort_packed import MIDDLE, is_dequantized, put_product, quantized_products, unsigned, use_packed

# MatMulNBits may round a block of activations to eight bits too (level 4), which its fast kernels do; computing in
# float32 instead (level 0) takes twice as long for four-bit weights and twenty times for eight (measured: README).
_ACCURACY_LEVEL = 4


def use_quantized_kernels(graph: ir.Graph) -> None:
    """Rewrite every product by a dequantized matrix, in place."""
    for node, product in quantized_products(graph):
        if node.inputs[0].dtype == ir.DataType.FLOAT8E4M3FN:  # type: ignore[union-attr]
            _spread(graph, node)
        elif is_dequantized(product.inputs[0]):
            _use_integers(graph, node, product)
        else:
            attributes = {"accuracy_level": _ACCURACY_LEVEL}
            use_packed(graph, node, product, product.inputs[0], ir.DataType.FLOAT, attributes)


def _spread(graph: ir.Graph, dequantize: ir.Node) -> None:
    """weight * scale, each row its own: [out, in], [out]. Nodes that ONNX Runtime folds, unlike DequantizeLinear."""
    weight, scale = dequantize.inputs[:2]
    build = Builder(graph, dequantize, f"{weight.name}_spread")  # type: ignore[union-attr]
    column = build.add("Unsqueeze", [scale, build.constant(np.array([1], np.int64))])
    spread = build.add("Mul", [build.add("Cast", [weight], {"to": ir.DataType.FLOAT}), column])
    replace(dequantize.outputs[0], spread)
    graph.remove(dequantize, safe=True)


def _use_integers(graph: ir.Graph, dequantize: ir.Node, product: ir.Node) -> None:
    weight, weight_scale = dequantize.inputs[:2]
    activation = producer_of(product.inputs[0], "DequantizeLinear")
    quantize = producer_of(activation.inputs[0], "QuantizeLinear")
    build = Builder(graph, product, f"{weight.name}_integer")  # type: ignore[union-attr]
    middle = build.constant(np.array(MIDDLE, np.uint8))
    if quantize.inputs[2].dtype != ir.DataType.UINT8:  # type: ignore[union-attr]
        quantize.replace_input_with(2, middle)
    turned = build.add("Transpose", [unsigned(build, weight, 8)], {"perm": [1, 0]})
    whole = build.add("MatMulInteger", [quantize.outputs[0], turned, middle, middle])
    scale = build.add("Mul", [weight_scale, activation.inputs[1]])
    result = build.add("Mul", [build.add("Cast", [whole], {"to": ir.DataType.FLOAT}), scale])
    put_product(graph, dequantize, product, result)
    if not activation.outputs[0].uses():
        graph.remove(activation, safe=True)
