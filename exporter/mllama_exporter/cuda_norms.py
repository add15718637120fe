"""A residual and the normalization behind it as one operator of ONNX Runtime's CUDA provider, which sums in float32.

Operators: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

import onnx_ir as ir

from mllama_exporter.graph_edit import CONTRIB, Builder, producer_of, replace

_WITH_RESIDUAL = {
    "RMSNormalization": "SkipSimplifiedLayerNormalization",
    "LayerNormalization": "SkipLayerNormalization",
}
_EPSILON = 1e-5  # ONNX's default


def use_residual_norms(graph: ir.Graph) -> None:
    """Rewrite every normalization of [rows, tokens, width] whose input is a sum, in place; a bias joins in."""
    for norm in [node for node in graph if node.op_type in _WITH_RESIDUAL]:
        residual = norm.inputs[0].producer() if norm.inputs[0] is not None else None
        if residual is None or residual.op_type != "Add" or not _is_of_a_layer(norm):
            continue
        op_type, build = _WITH_RESIDUAL[norm.op_type], Builder(graph, residual, str(norm.name))
        epsilon = norm.attributes["epsilon"].as_float() if "epsilon" in norm.attributes else _EPSILON
        inputs, dead = [*residual.inputs, *norm.inputs[1:]], [norm, residual]
        biased = _biased(inputs[1]) if op_type == "SkipLayerNormalization" else None
        if biased is not None:
            inputs[1:2] = [biased.inputs[0]]
            inputs.append(biased.inputs[1])
            dead.append(biased)
        normed = build.add(op_type, inputs, {"epsilon": epsilon}, domain=CONTRIB, num_outputs=4)
        node = producer_of(normed, op_type)
        for new, old in ((node.outputs[3], residual.outputs[0]), (normed, norm.outputs[0])):
            replace(old, new)
        for unused in node.outputs[1:3]:
            unused.name = ""
        graph.remove(dead, safe=True)


def _is_of_a_layer(norm: ir.Node) -> bool:
    """Elsewhere the axes may be others."""
    weight = norm.inputs[1]
    return norm.op_type == "RMSNormalization" or (weight is not None and ".layers." in str(weight.name))


def _biased(value: ir.Value | None) -> ir.Node | None:
    """The sum of a product and a vector that this value is, if nothing else takes it."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "Add" or len(node.outputs[0].uses()) != 1:
        return None
    bias = node.inputs[1]
    return node if bias is not None and bias.is_initializer() and str(bias.name).endswith(".bias") else None
