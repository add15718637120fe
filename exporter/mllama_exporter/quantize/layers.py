"""Which matrices a graph multiplies by, what feeds them, and where a scale of their input can be folded.

Read off the standard graph itself, so that no list of layer names can go stale: a matrix is an initializer that
reaches a MatMul through a Transpose, or a Gemm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import onnx_ir as ir
from mllama_runtime.errors import UsageError

_NORMS = ("RMSNormalization", "LayerNormalization")
_PREFIXES = ("", "language_model.", "language_model.model.", "vision_model.")


@dataclass(frozen=True, slots=True)
class Group:
    """Matrices that multiply the same tensor.

    activation: the tensor's name in the graph, [..., width]. members: the weights' names. norm: the weights of the
    normalisation that makes the tensor, for these matrices alone; or rows: the matrix whose output, times something
    else, is the tensor. Dividing either by a vector divides the tensor by it.
    """

    activation: str
    width: int
    members: tuple[str, ...]
    norm: tuple[str, ...] = ()
    rows: str | None = None


def groups_of(graph: ir.Graph) -> list[Group]:
    """Every matrix of a standard graph with weights attached, grouped by its input, in the order of the graph."""
    products = products_of(graph)
    members: dict[ir.Value, list[str]] = {}
    for name, node in products.items():
        activation = node.inputs[0]
        if activation is not None:
            members.setdefault(activation, []).append(name)
    outputs = {node.outputs[0]: name for name, node in products.items()}
    return [
        Group(
            activation=str(activation.name),
            width=_width(graph, names[0]),
            members=tuple(names),
            norm=_norm_before(activation, len(names)),
            rows=_rows_before(activation, outputs),
        )
        for activation, names in members.items()
    ]


def products_of(graph: ir.Graph) -> dict[str, ir.Node]:
    """Weight name -> the MatMul or Gemm that multiplies by it, in the order of the graph."""
    products = {}
    for node in graph:
        weight = node.inputs[1] if node.op_type in ("MatMul", "Gemm") else None
        producer = weight.producer() if weight is not None else None
        if producer is not None and producer.op_type == "Transpose":
            weight = producer.inputs[0]
        if weight is not None and weight.is_initializer():
            products[str(weight.name)] = node
    return products


def kept(names: Sequence[str], patterns: Sequence[str]) -> set[str]:
    """The weights that patterns such as `lm_head` or `layers.0.*` name; the model's prefixes may be left out.

    Raises:
        UsageError: a pattern that names none.
    """
    matched: set[str] = set()
    for pattern in patterns:
        found = {name for name in names if _matches(name, pattern)}
        if not found:
            hint = "patterns are weight names as in the checkpoint, with * and ?, such as lm_head or layers.0.*"
            raise UsageError("names no matrix that would be quantised", where=f"keep: {pattern}", hint=hint)
        matched |= found
    return matched


def _matches(name: str, pattern: str) -> bool:
    short = name.removesuffix(".weight")
    return any(fnmatchcase(form, f"{prefix}{pattern}") for prefix in _PREFIXES for form in (name, short))


def _width(graph: ir.Graph, weight: str) -> int:
    shape = graph.initializers[weight].shape
    if shape is None or not isinstance(shape[1], int):
        raise RuntimeError(f"{weight} has no static shape")
    return shape[1]


def _norm_before(activation: ir.Value, num_members: int) -> tuple[str, ...]:
    node = activation.producer()
    if node is None or node.op_type not in _NORMS or len(activation.uses()) != num_members:
        return ()
    return tuple(str(value.name) for value in node.inputs[1:] if value is not None)


def _rows_before(activation: ir.Value, outputs: Mapping[ir.Value, str]) -> str | None:
    node = activation.producer()
    if node is None or node.op_type != "Mul" or len(activation.uses()) != 1:
        return None
    factors = [value for value in node.inputs if value is not None and len(value.uses()) == 1]
    rows = [outputs[value] for value in factors if value in outputs]
    return rows[0] if len(rows) == 1 else None
