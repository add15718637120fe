"""Products by quantised matrices, in ONNX Runtime's own kernels; a step of making the twin (`ort_graphs`).

- Weight-only (int8-weight, int4): MatMulNBits, which reads the packed weights as they are. It wants them unsigned with
  zero in the middle; flipping the top bit of each does that, and is folded at load.
- int8 with int8 activations: MatMulInteger, the exact arithmetic of the scheme, instead of products in float32. Both
  sides are moved to unsigned, since the kernel for signed ones is a hundred times slower, and the one for one of each
  saturates on processors without VNNI.
- fp8: the CPU has no kernel, so weights are spread to float32 at load; activations are still rounded to the grid.

Operators: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md, https://onnx.ai/onnx/operators/
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from mllama_exporter.graph_edit import Builder, producer_of, replace

_CONTRIB = "com.microsoft"
# MatMulNBits may round a block of activations to eight bits too (level 4), which its fast kernels do; computing in
# float32 instead (level 0) takes twice as long for four-bit weights and twenty times for eight (measured: README).
_ACCURACY_LEVEL = 4
_BLOCKS = (128, 64, 32, 16)  # that MatMulNBits takes and a row may have
_MIDDLE = 0x80  # zero, of unsigned bytes


def use_quantized_kernels(graph: ir.Graph, *, only_packed: bool) -> None:
    """Rewrite every product by a dequantised matrix, in place; or only those by packed weights alone."""
    for node in [node for node in graph if node.op_type == "DequantizeLinear"]:
        weight = node.inputs[0]
        if weight is None or not weight.is_initializer():
            continue
        user = next(use.node for use in node.outputs[0].uses())
        product = next(use.node for use in user.outputs[0].uses()) if user.op_type == "Transpose" else user
        if weight.dtype == ir.DataType.FLOAT8E4M3FN or _is_dequantized(product.inputs[0]):
            if only_packed:
                continue
            if weight.dtype == ir.DataType.FLOAT8E4M3FN:
                _spread(graph, node)
            else:
                _use_integers(graph, node, product)
        else:
            _use_packed(graph, node, product)


def _is_dequantized(value: ir.Value | None) -> bool:
    producer = value.producer() if value is not None else None
    return producer is not None and producer.op_type == "DequantizeLinear"


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
    middle = build.constant(np.array(_MIDDLE, np.uint8))
    if quantize.inputs[2].dtype != ir.DataType.UINT8:  # type: ignore[union-attr]
        quantize.replace_input_with(2, middle)
    turned = build.add("Transpose", [_unsigned(build, weight, 8)], {"perm": [1, 0]})
    whole = build.add("MatMulInteger", [quantize.outputs[0], turned, middle, middle])
    scale = build.add("Mul", [weight_scale, activation.inputs[1]])
    result = build.add("Mul", [build.add("Cast", [whole], {"to": ir.DataType.FLOAT}), scale])
    _put(graph, dequantize, product, result)
    if not activation.outputs[0].uses():
        graph.remove(activation, safe=True)


def _unsigned(build: Builder, weight: ir.Value | None, bits: int, shape: tuple[int, ...] | None = None) -> ir.Value:
    """Signed integers of the weights file as unsigned ones around the middle, seen as bytes of `shape`."""
    tensor = weight.const_value if weight is not None else None
    if weight is None or not isinstance(tensor, ir.ExternalTensor):
        raise RuntimeError(f"{weight} is not in the weights file")
    view = ir.Shape(shape or tensor.shape)
    weight.const_value = ir.ExternalTensor(
        tensor.location, tensor.offset, tensor.length, ir.DataType.UINT8, shape=view, name=str(weight.name)
    )
    weight.type, weight.shape = ir.TensorType(ir.DataType.UINT8), view
    return build.add("BitwiseXor", [weight, build.constant(np.array(0x88 if bits == 4 else _MIDDLE, np.uint8))])


def _use_packed(graph: ir.Graph, dequantize: ir.Node, product: ir.Node) -> None:
    """Weights [out, in] as [out, blocks, bytes of a block], scales [out, blocks]."""
    weight, scale = dequantize.inputs[:2]
    if weight is None or weight.shape is None:
        raise RuntimeError(f"a weight without a shape before {product}")
    rows, columns = (int(size) for size in weight.shape)  # type: ignore[arg-type]
    bits = 4 if weight.dtype == ir.DataType.INT4 else 8
    block = dequantize.attributes["block_size"].as_int() if "block_size" in dequantize.attributes else _block(columns)
    if columns % block:
        return  # ONNX Runtime then spreads such a matrix to float32 at load
    build = Builder(graph, product, f"{weight.name}_packed")
    unsigned = _unsigned(build, weight, bits, (rows, columns // block, block * bits // 8))
    if "block_size" not in dequantize.attributes:
        column = build.add("Unsqueeze", [scale, build.constant(np.array([1], np.int64))])
        scale = build.add("Expand", [column, build.constant(np.array([rows, columns // block], np.int64))])
    attributes: dict[str, int | float | list[int]] = {
        "K": columns,
        "N": rows,
        "bits": bits,
        "block_size": block,
        "accuracy_level": _ACCURACY_LEVEL,
    }
    result = build.add("MatMulNBits", [product.inputs[0], unsigned, scale], attributes, domain=_CONTRIB)
    _put(graph, dequantize, product, result)


def _block(columns: int) -> int:
    """The largest block that divides a row, for scales that are the row's."""
    return next((size for size in _BLOCKS if columns % size == 0), _BLOCKS[0])


def _put(graph: ir.Graph, dequantize: ir.Node, product: ir.Node, result: ir.Value) -> None:
    """`result` instead of the product, and what only the product needed away."""
    between = [use.node for use in dequantize.outputs[0].uses() if use.node is not product]  # a Transpose, or nothing
    replace(product.outputs[0], result)
    graph.remove([product, *between, dequantize], safe=True)
