"""Matrix products in the CUDA provider's own kernels; a step of making the twins for it.

- Matrices are [out, in], as in the checkpoint, and the standard graphs transpose each before they multiply by it. ONNX
  Runtime folds such a Transpose when it opens the graph: one thread turns every matrix on the host, which takes a
  minute for 11B. FusedMatMul multiplies by the matrix as it lies.
- Weight-only (int8-weight, int4): MatMulNBits (`ort_packed`), whose accuracy levels mean nothing here.
- int8 with int8 activations: MatMulNBits over the same bytes. There is no kernel for the scheme that is faster than
  float16; activations then are not rounded, which is nearer to the unquantized model than the scheme is.
- fp8: MatMulBlockQuantizedFp8Weight, the exact scheme, activations rounded inside. It has no float32 form: there the
  operators of the standard graph stay.

Operators: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import onnx_ir as ir

from mllama_exporter.graph_edit import CONTRIB, LOW_PRECISION, Builder, producer_of, replace
from mllama_exporter.ort_packed import is_dequantized, put_product, quantized_products, use_packed


def use_fused_products(graph: ir.Graph) -> None:
    """Rewrite every product by a transposed weight that is not quantized, in place."""
    for product in [node for node in graph if node.op_type == "MatMul"]:
        if (weight := _transposed_weight(product)) is None:
            continue
        transpose, build = producer_of(product.inputs[1], "Transpose"), Builder(graph, product, str(product.name))
        result = build.add("FusedMatMul", [product.inputs[0], weight], {"transB": 1}, domain=CONTRIB)
        replace(product.outputs[0], result)
        graph.remove(product, safe=True)
        if not transpose.outputs[0].uses():
            graph.remove(transpose, safe=True)


def _transposed_weight(product: ir.Node) -> ir.Value | None:
    """The weight [out, in] that a MatMul multiplies by; None where it multiplies by something else."""
    matrix = product.inputs[1] if product.op_type == "MatMul" else None
    producer = matrix.producer() if matrix is not None else None
    weight = producer.inputs[0] if producer is not None and producer.op_type == "Transpose" else None
    return weight if weight is not None and weight.is_initializer() else None


def use_quantized_products(graph: ir.Graph, dtype: ir.DataType) -> None:
    """Rewrite every product by a quantized weight, in place. dtype: of the graph's activations."""
    for dequantize, product in quantized_products(graph):
        if dequantize.inputs[0].dtype == ir.DataType.FLOAT8E4M3FN:  # type: ignore[union-attr]
            if dtype in LOW_PRECISION:
                _use_fp8(graph, dequantize, product)
            continue
        activation = product.inputs[0]
        if is_dequantized(activation):
            activation = _before_rounding(activation)
        use_packed(graph, dequantize, product, activation, dtype, {})


def _before_rounding(activation: ir.Value | None) -> ir.Value | None:
    return producer_of(producer_of(activation, "DequantizeLinear").inputs[0], "QuantizeLinear").inputs[0]


def _use_fp8(graph: ir.Graph, dequantize: ir.Node, product: ir.Node) -> None:
    """Weights [out, in], a scale for each of their rows, and one for the activations."""
    weight, scale = dequantize.inputs[:2]
    if weight is None or weight.shape is None:
        raise RuntimeError(f"a weight without a shape before {product}")
    rounded = producer_of(product.inputs[0], "DequantizeLinear")
    build = Builder(graph, product, f"{weight.name}_fp8")
    column = build.constant(np.array([1], np.int64))
    scales = build.add("Unsqueeze", [build.add("Cast", [scale], {"to": ir.DataType.FLOAT}), column])
    step = build.add("Cast", [rounded.inputs[1]], {"to": ir.DataType.FLOAT})
    result = build.add(
        "MatMulBlockQuantizedFp8Weight",
        [_before_rounding(product.inputs[0]), weight, scales, step],
        {"block_size": int(weight.shape[1])},  # type: ignore[arg-type]
        domain=CONTRIB,
    )
    put_product(graph, dequantize, product, result)


def one_product(graph: ir.Graph, values: Sequence[ir.Value | None]) -> ir.Value | None:
    """Products of one tensor by several weights, as one by all their rows; None if they are not alike, or fp8.

    Matrices that lie side by side in the weights file are one there already. Others are joined at load, for which fp8
    has no operator.
    """
    products = [product for value in values if value is not None and (product := value.producer()) is not None]
    first = products[0]
    if len(products) != len(values) or len({_kind(node) for node in products}) != 1:
        return None
    build = Builder(graph, products[-1], f"{first.name}_and_{products[-1].name}")
    if first.op_type == "MatMulNBits":
        attributes = {name: attribute.as_int() for name, attribute in first.attributes.items()}
        attributes["N"] = sum(node.attributes["N"].as_int() for node in products)
        sides = (build.add("Concat", [node.inputs[side] for node in products], {"axis": 0}) for side in (1, 2))
        return build.add(first.op_type, [first.inputs[0], *sides], attributes, domain=CONTRIB)
    weights = [weight for node in products if (weight := _transposed_weight(node)) is not None]
    if len(weights) != len(products):
        return None
    matrix = _whole(graph, weights) or build.add("Concat", [*weights], {"axis": 0})
    return build.add("FusedMatMul", [first.inputs[0], matrix], {"transB": 1}, domain=CONTRIB)


def _kind(product: ir.Node) -> tuple[object, ...]:
    """What products must have in common to be joined: the operator, its settings but for N, and what is multiplied."""
    settings = sorted(
        (name, each.as_int()) for name, each in product.attributes.items() if name in ("bits", "block_size")
    )
    return product.op_type, product.inputs[0], *settings


def _whole(graph: ir.Graph, weights: Sequence[ir.Value]) -> ir.Value | None:
    """The rows of all as one tensor of the weights file, if each begins where the one before ends."""
    tensors = [weight.const_value for weight in weights if isinstance(weight.const_value, ir.ExternalTensor)]
    if len(tensors) != len(weights) or not all(
        before.location == after.location and (before.offset or 0) + before.nbytes == after.offset
        for before, after in pairwise(tensors)
    ):
        return None
    first, name = tensors[0], f"{weights[0].name}_and_{weights[-1].name}"
    shape = ir.Shape([sum(tensor.shape.numpy()[0] for tensor in tensors), first.shape[1]])
    length = sum(tensor.nbytes for tensor in tensors)
    tensor = ir.ExternalTensor(first.location, first.offset, length, first.dtype, shape=shape, name=name)
    whole = ir.Value(name=name, const_value=tensor, shape=shape, type=ir.TensorType(first.dtype))
    graph.register_initializer(whole)
    return whole
