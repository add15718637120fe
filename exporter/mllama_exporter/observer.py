"""A graph that also tells the largest absolute value of its activations: for validation, and for calibration.

A copy of a graph gets one more output, a scalar, for every tensor asked for; it runs in ONNX Runtime beside the
original's weights file, which is neither copied nor moved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx_ir as ir
from mllama_runtime.backends.private_ort import ort
from mllama_runtime.errors import BundleError
from onnx_ir.passes.common import ShapeInferencePass

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
_LOG_ERRORS_ONLY = 3


def activation_names(model: ir.Model) -> dict[str, str]:
    """Every float tensor that a graph computes from pixels, embeddings or caches, with the last weight used up to it.

    Positions, their angles and masks are not among them. The weight says where in the model a tensor is, which names
    such as `Add_57_output_0` do not.
    """
    graph = ShapeInferencePass()(model.clone()).model.graph  # files keep no types of what is inside
    if untyped := [value.name for node in graph for value in node.outputs if value.dtype is None]:
        raise RuntimeError(f"no type could be inferred for {untyped[0]}, of {graph.name}")
    moving = {value for value in graph.inputs if value.dtype in _FLOATS}
    names: dict[str, str] = {}
    weight = "no weight"
    for node in graph:
        given = [value for value in node.inputs if value is not None]
        weights = [value.name for value in given if isinstance(value.const_value, ir.ExternalTensor)]
        weight = weights[-1] or weight if weights else weight
        if not moving.isdisjoint(given) or (weights and node.op_type == "Gather"):
            floats = [value for value in node.outputs if value.dtype in _FLOATS]
            moving.update(floats)
            names.update({value.name: weight for value in floats if value.name})
    return names


def observed(model: ir.Model, names: Sequence[str]) -> tuple[ir.Model, Mapping[str, str]]:
    """A copy with an output of max |x|, a float32 scalar, for each of these tensors; and output name -> tensor name.

    Names the graph does not have are left out, and of every If the then-branch is taken. An infinity comes through;
    whether a NaN does depends on where it stands, so what looks for NaN looks at the graph's own outputs.
    """
    model = model.clone()
    graph = model.graph
    _take_branches(graph)
    values = {value.name: value for node in graph for value in node.outputs}
    outputs: dict[str, str] = {}
    for name in names:
        if name not in values:
            continue
        magnitude = ir.node("Abs", [values[name]])
        largest = ir.node("ReduceMax", magnitude.outputs, {"keepdims": 0})
        result = ir.node("Cast", largest.outputs, {"to": ir.DataType.FLOAT})
        for node, suffix in ((magnitude, "abs"), (largest, "max"), (result, "observed")):
            node.name = f"{name}_{suffix}"
            node.outputs[0].name = f"{name}_{suffix}"
        result.outputs[0].type, result.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(())
        graph.extend((magnitude, largest, result))
        graph.outputs.append(result.outputs[0])
        outputs[f"{name}_observed"] = name
    return model, outputs


def _take_branches(graph: ir.Graph) -> None:
    """Put the then-branch of every If in its place: what stands in a branch cannot be an output."""
    for node in [node for node in graph if node.op_type == "If"]:
        branch = node.attributes["then_branch"].as_graph()
        nodes, result = list(branch), branch.outputs[0]
        branch.outputs.clear()
        branch.remove(nodes)
        graph.insert_before(node, nodes)
        ir.convenience.replace_all_uses_with(node.outputs[0], result, replace_graph_outputs=True)
        graph.remove(node, safe=True)


def session_from_model(model: ir.Model, folder: Path) -> ort.InferenceSession:
    """A session of a graph in memory whose weights file lies in `folder`. Raises BundleError."""
    options = ort.SessionOptions()
    options.log_severity_level = _LOG_ERRORS_ONLY
    options.add_session_config_entry(_WEIGHTS_FOLDER, str(folder))
    data = ir.to_proto(model).SerializeToString()
    try:
        return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises its own types, which share no base class
        raise BundleError("ONNX Runtime cannot load the observed graph", where=folder, found=error) from error
