"""Small tools to rewrite graphs in place: nodes with unique names, and values that take another's place."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from mllama_runtime.tensorfile import TensorInfo

CONTRIB = "com.microsoft"
"""The domain of ONNX Runtime's own operators."""

LOW_PRECISION = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
"""Types of activations that hold less than float32."""

IR_DTYPES = {
    "F32": ir.DataType.FLOAT,
    "F16": ir.DataType.FLOAT16,
    "BF16": ir.DataType.BFLOAT16,
    "I8": ir.DataType.INT8,
    "I4": ir.DataType.INT4,
    "F8_E4M3": ir.DataType.FLOAT8E4M3FN,
}
"""ONNX's types by the names that weights files give them; "I4" is our own, for the format has none."""


class Builder:
    """Adds nodes with unique names before a given one."""

    def __init__(self, graph: ir.Graph, before: ir.Node, prefix: str) -> None:
        self.graph, self.before, self.prefix, self.count = graph, before, prefix, 0

    def add(
        self,
        op_type: str,
        inputs: list[ir.Value | None],
        attributes: Mapping[str, int | float | list[int]] | None = None,
        *,
        domain: str = "",
        num_outputs: int = 1,
    ) -> ir.Value:
        node = ir.node(op_type, inputs, attributes or {}, domain=domain, num_outputs=num_outputs)
        node.name = f"{self.prefix}_{self.count}_{op_type}"
        self.count += 1
        for index, value in enumerate(node.outputs):
            value.name = f"{node.name}_output_{index}"
        self.graph.insert_before(self.before, node)
        return node.outputs[0]

    def constant(self, array: np.ndarray) -> ir.Value:
        name = f"{self.prefix}_constant_{self.count}"
        self.count += 1
        value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        value.dtype, value.shape = value.const_value.dtype, ir.Shape(array.shape)  # type: ignore[union-attr]
        self.graph.register_initializer(value)
        return value


def producer_of(value: ir.Value | None, op_type: str) -> ir.Node:
    """The node that makes a value; the graphs are our own, so anything else is a fault of ours."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type != op_type:
        raise RuntimeError(f"expected {op_type} before {value}, found {node and node.op_type}")
    return node


def replace(old: ir.Value, new: ir.Value) -> None:
    """Let `new` stand where `old` stood, under the same name and among the graph's outputs too."""
    name = old.name
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    old.name = f"{name}_replaced"
    new.name, new.type, new.shape = name, old.type, old.shape


def point_at(
    value: ir.Value, tensor: TensorInfo, dtype: ir.DataType, location: str, shape: tuple[int, ...] | None = None
) -> None:
    """Let an initializer's data be a tensor of a weights file (ONNX external data), seen as `shape` of `dtype`."""
    value.dtype, value.shape = dtype, ir.Shape(shape or tensor.shape)
    value.const_value = ir.ExternalTensor(
        location, tensor.offset_bytes, tensor.size_bytes, dtype, shape=value.shape, name=str(value.name)
    )
