"""Standard graphs with quantised matrices: DequantizeLinear on weights, and QuantizeLinear before it on activations.

The forms are those that TensorRT's parser takes: scales in the graph's own precision, no zero points but the typed zero
that tells QuantizeLinear its type, a Transpose after the weight as in the unquantised graph.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from mllama_runtime.tensorfile import TensorFile

from mllama_exporter.graph_edit import IR_DTYPES, point_at
from mllama_exporter.quantize.layers import Group, products_of
from mllama_exporter.quantize.rounding import SCALE_DTYPES
from mllama_exporter.quantize.scheme import Scheme
from mllama_exporter.quantize.weights import scale_name


def quantized_graph(
    model: ir.Model,
    groups: Mapping[str, Group],
    schemes: Mapping[str, Scheme],
    activation_scales: Mapping[Group, float],
    weights: TensorFile,
    location: str,
) -> ir.Model:
    """A standard graph over the new weights file, in place; returns the model.

    Args:
        groups: of each matrix to quantise, by the weight's name.
        schemes: likewise.
        activation_scales: of those groups whose scheme quantises their input.
        location: the weights file's name within the bundle.
    """
    graph = model.graph
    for name, value in list(graph.initializers.items()):
        if isinstance(value.const_value, ir.ExternalTensor) and name not in schemes:
            point_at(value, weights.tensors[name], IR_DTYPES[weights.tensors[name].dtype], location)
    dequantized: dict[str, ir.Value] = {}
    for name, node in products_of(graph).items():
        if name not in schemes:
            continue
        scheme, group = schemes[name], groups[name]
        _dequantize_weight(graph, name, scheme, weights, location)
        if scheme.activations:
            if group.activation not in dequantized:
                scale = activation_scales[group]
                dequantized[group.activation] = _quantize_activation(graph, node, scheme, scale, weights, name)
            node.replace_input_with(0, dequantized[group.activation])
    return model


def _dequantize_weight(graph: ir.Graph, name: str, scheme: Scheme, weights: TensorFile, location: str) -> None:
    weight, stored, scales = graph.initializers[name], weights.tensors[name], weights.tensors[scale_name(name)]
    users = [(use.node, use.idx) for use in weight.uses()]
    scale = ir.Value(name=scale_name(name))
    point_at(scale, scales, IR_DTYPES[scales.dtype], location)
    graph.register_initializer(scale)
    shape = (stored.shape[0], 2 * stored.shape[1]) if scheme.dtype == "I4" else stored.shape
    point_at(weight, stored, IR_DTYPES[scheme.dtype], location, shape)
    attributes = {"axis": 0} if scheme.block_size is None else {"axis": 1, "block_size": scheme.block_size}
    node = ir.node("DequantizeLinear", [weight, scale], attributes, name=f"{name}_dequantize")
    node.outputs[0].name = f"{name}_dequantized"
    graph.insert_before(users[0][0], node)
    for user, index in users:
        user.replace_input_with(index, node.outputs[0])


def _quantize_activation(
    graph: ir.Graph, before: ir.Node, scheme: Scheme, scale: float, weights: TensorFile, weight: str
) -> ir.Value:
    activation = before.inputs[0]
    dtype = SCALE_DTYPES[weights.tensors[scale_name(weight)].dtype]
    name = str(activation.name)  # type: ignore[union-attr]
    scale_value = _constant(graph, f"{name}_scale", ir.tensor(np.array(scale, dtype)))
    zero = _constant(graph, f"{name}_zero", ir.tensor(np.zeros((), IR_DTYPES[scheme.dtype].numpy())))
    quantize = ir.node("QuantizeLinear", [activation, scale_value, zero], name=f"{name}_quantize")
    dequantize = ir.node("DequantizeLinear", [quantize.outputs[0], scale_value], name=f"{name}_dequantize")
    quantize.outputs[0].name, dequantize.outputs[0].name = f"{name}_quantized", f"{name}_dequantized"
    graph.insert_before(before, [quantize, dequantize])
    return dequantize.outputs[0]


def _constant(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    value = ir.Value(name=name, const_value=tensor)
    value.dtype, value.shape = tensor.dtype, ir.Shape(())
    graph.register_initializer(value)
    return value
