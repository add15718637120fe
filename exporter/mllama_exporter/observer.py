"""A graph that also tells how large its activations are: for validation, and for calibration.

A copy of a graph gets one more output or a few for every tensor asked for; it runs in ONNX Runtime beside the
original's weights file, which is neither copied nor moved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from mllama_runtime.backends.private_ort import ort, session_options
from mllama_runtime.errors import BundleError
from onnx_ir.passes.common import ShapeInferencePass

from mllama_exporter.graph_edit import Builder

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
            moving.update(node.outputs if node.op_type == "QuantizeLinear" else floats)
            names.update({value.name: weight for value in floats if value.name})
    return names


def observed(model: ir.Model, names: Sequence[str]) -> tuple[ir.Model, Mapping[str, str]]:
    """A copy with an output of max |x|, a float32 scalar, for each of these tensors; and output name -> tensor name.

    Names the graph does not have are left out. An infinity comes through; whether a NaN does depends on where it
    stands, so what looks for NaN looks at the graph's own outputs.
    """
    outputs: dict[str, str] = {}
    watch = _Watch(model)
    for name in names:
        if name in watch.values:
            magnitude = watch.add(f"{name}_abs", "Abs", watch.values[name])
            largest = watch.add(f"{name}_max", "ReduceMax", magnitude, keepdims=0)
            result = watch.add(f"{name}_observed", "Cast", largest, to=ir.DataType.FLOAT)
            outputs[watch.give(result, ir.DataType.FLOAT, ())] = name
    return watch.model, outputs


class ChannelOutputs(NamedTuple):
    """Names of outputs about one tensor [..., C]: max |x| and sum of x^2 of each channel [C], and its rows [1]."""

    max_abs: str
    sum_squares: str
    num_rows: str


def observed_channels(model: ir.Model, widths: Mapping[str, int]) -> tuple[ir.Model, Mapping[str, ChannelOutputs]]:
    """A copy with three outputs for each of these float32 tensors, of `width` channels; and tensor name -> outputs.

    Raises BundleError naming a tensor that the graph does not have.
    """
    watch = _Watch(model)
    outputs: dict[str, ChannelOutputs] = {}
    for name, width in widths.items():
        if name not in watch.values:
            raise BundleError("the graph lacks a tensor to be observed", where=model.graph.name, expected=name)
        rows = watch.add(f"{name}_rows", "Reshape", watch.values[name], watch.constant(f"{name}_shape", [-1, width]))
        first = watch.constant(f"{name}_first", [0])
        largest = watch.add(f"{name}_max", "ReduceMax", watch.add(f"{name}_abs", "Abs", rows), first, keepdims=0)
        squares = watch.add(f"{name}_squares", "ReduceSumSquare", rows, first, keepdims=0)
        num_rows = watch.add(f"{name}_num_rows", "Shape", rows, start=0, end=1)
        outputs[name] = ChannelOutputs(
            watch.give(largest, ir.DataType.FLOAT, (width,)),
            watch.give(squares, ir.DataType.FLOAT, (width,)),
            watch.give(num_rows, ir.DataType.INT64, (1,)),
        )
    return watch.model, outputs


FIRST_ROW = "first_row"
"""An input [1] of a decoder that `use_every_answer_row` has changed."""


def use_every_answer_row(graph: ir.Graph) -> None:
    """Let a decoder's last norm see every token from FIRST_ROW on, in place, not the one that logits are asked for.

    A whole prompt with its answer then shows what the language head is fed with, token by token; logits are no longer
    an output.
    """
    gather = next(node for node in graph if node.op_type == "GatherND")
    first = ir.Value(name=FIRST_ROW, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape((1,)))
    graph.inputs.append(first)
    build = Builder(graph, gather, "answer_rows")
    end, axis = (build.constant(np.array([value], np.int64)) for value in (np.iinfo(np.int64).max, 1))
    rows = build.add("Slice", [gather.inputs[0], first, end, axis])
    ir.convenience.replace_all_uses_with(gather.outputs[0], rows)
    graph.outputs.remove(next(output for output in graph.outputs if output.name == "logits"))


class _Watch:
    """A copy of a graph, to which outputs are added; `values` are its tensors by name."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model.clone()
        self.values = {value.name: value for node in self.model.graph for value in node.outputs}

    def add(self, name: str, op_type: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        node = ir.node(op_type, inputs, attributes, name=name)
        node.outputs[0].name = name
        self.model.graph.append(node)
        return node.outputs[0]

    def constant(self, name: str, values: list[int]) -> ir.Value:
        value = ir.Value(name=name, const_value=ir.tensor(np.array(values, np.int64), name=name))
        value.dtype, value.shape = ir.DataType.INT64, ir.Shape((len(values),))
        self.model.graph.register_initializer(value)
        return value

    def give(self, value: ir.Value, dtype: ir.DataType, shape: tuple[int, ...]) -> str:
        value.type, value.shape = ir.TensorType(dtype), ir.Shape(shape)
        self.model.graph.outputs.append(value)
        return str(value.name)


def session_from_model(model: ir.Model, folder: Path) -> ort.InferenceSession:
    """A session of a graph in memory whose weights file lies in `folder`. Raises BundleError."""
    options = session_options(log_severity_level=_LOG_ERRORS_ONLY)
    options.add_session_config_entry(_WEIGHTS_FOLDER, str(folder))
    data = ir.to_proto(model).SerializeToString()
    try:
        return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises its own types, which share no base class
        raise BundleError("ONNX Runtime cannot load the observed graph", where=folder, found=error) from error
