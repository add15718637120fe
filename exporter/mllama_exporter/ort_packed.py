"""Products by weight-only quantized matrices in ONNX Runtime's MatMulNBits, for the CPU and for CUDA.

It reads the packed weights as they are. It wants them unsigned with zero in the middle; flipping the top bit of each
does that, and is folded at load.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from mllama_exporter.graph_edit import CONTRIB, Builder, replace

_BLOCKS = (128, 64, 32, 16)  # that MatMulNBits takes and a row may have
MIDDLE = 0x80  # zero, of unsigned bytes


def is_dequantized(value: ir.Value | None) -> bool:
    producer = value.producer() if value is not None else None
    return producer is not None and producer.op_type == "DequantizeLinear"


def quantized_products(graph: ir.Graph) -> list[tuple[ir.Node, ir.Node]]:
    """Every DequantizeLinear of a weight, and the product by it."""
    found = []
    for node in graph:
        weight = node.inputs[0] if node.op_type == "DequantizeLinear" else None
        if weight is not None and weight.is_initializer():
            user = next(use.node for use in node.outputs[0].uses())
            turned = user.op_type == "Transpose"
            found.append((node, next(use.node for use in user.outputs[0].uses()) if turned else user))
    return found


def unsigned(build: Builder, weight: ir.Value | None, bits: int, shape: tuple[int, ...] | None = None) -> ir.Value:
    """Signed integers of the weights file as unsigned ones around the middle, seen as bytes of `shape`."""
    tensor = weight.const_value if weight is not None else None
    if weight is None or not isinstance(tensor, ir.ExternalTensor):
        raise RuntimeError(f"{weight} is not in the weights file")
    view = ir.Shape(shape or tensor.shape)
    weight.const_value = ir.ExternalTensor(
        tensor.location, tensor.offset, tensor.length, ir.DataType.UINT8, shape=view, name=str(weight.name)
    )
    weight.type, weight.shape = ir.TensorType(ir.DataType.UINT8), view
    return build.add("BitwiseXor", [weight, build.constant(np.array(0x88 if bits == 4 else MIDDLE, np.uint8))])


def use_packed(
    graph: ir.Graph,
    dequantize: ir.Node,
    product: ir.Node,
    activation: ir.Value | None,
    dtype: ir.DataType,
    attributes: dict[str, int],
) -> None:
    """Weights [out, in] as [out, blocks, bytes of a block], scales [out, blocks]. dtype: of the activations."""
    weight, scale = dequantize.inputs[:2]
    if weight is None or weight.shape is None:
        raise RuntimeError(f"a weight without a shape before {product}")
    rows, columns = (int(size) for size in weight.shape)  # type: ignore[arg-type]
    bits = 4 if weight.dtype == ir.DataType.INT4 else 8
    blocked = "block_size" in dequantize.attributes
    block = dequantize.attributes["block_size"].as_int() if blocked else _block(columns)
    if columns % block:
        return  # ONNX Runtime then spreads such a matrix to floats at load
    build = Builder(graph, product, f"{weight.name}_packed")
    packed = unsigned(build, weight, bits, (rows, columns // block, block * bits // 8))
    if not blocked:  # in float32, which is folded at load: there is no kernel to fold bfloat16
        wide = build.add("Cast", [scale], {"to": ir.DataType.FLOAT})
        column = build.add("Unsqueeze", [wide, build.constant(np.array([1], np.int64))])
        scale = build.add("Expand", [column, build.constant(np.array([rows, columns // block], np.int64))])
        scale = build.add("Cast", [scale], {"to": int(dtype)})
    dims = {"K": columns, "N": rows, "bits": bits, "block_size": block}
    result = build.add("MatMulNBits", [activation, packed, scale], {**dims, **attributes}, domain=CONTRIB)
    put_product(graph, dequantize, product, result)


def _block(columns: int) -> int:
    """The largest block that divides a row, for scales that are the row's."""
    return next((size for size in _BLOCKS if columns % size == 0), _BLOCKS[0])


def put_product(graph: ir.Graph, dequantize: ir.Node, product: ir.Node, result: ir.Value) -> None:
    """`result` instead of the product, and what only the product needed away."""
    between = [use.node for use in dequantize.outputs[0].uses() if use.node is not product]  # a Transpose, or nothing
    replace(product.outputs[0], result)
    graph.remove([product, *between, dequantize], safe=True)
