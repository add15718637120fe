"""Graphs of the miniature with one thing made wrong, for the structural checks of an engine to find."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper


def nodes_of(model: ModelProto, op_type: str) -> list[NodeProto]:
    return [node for node in model.graph.node if node.op_type == op_type]


def insert_before(model: ModelProto, node: NodeProto, new: list[NodeProto]) -> None:
    nodes = list(model.graph.node)
    nodes[nodes.index(node) : nodes.index(node)] = new
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def causal_without_mask(model: ModelProto) -> None:
    """Self-attention by is_causal and nonpad_kv_seqlen, as ONNX would have it; TensorRT's parser drops the latter."""
    scattered = {node.output[0] for node in nodes_of(model, "TensorScatter")}
    for node in nodes_of(model, "Attention"):
        if node.input[2] in scattered:
            node.input[3] = ""
            node.input.extend(["", "", "kv_lengths"])
            node.attribute.append(helper.make_attribute("is_causal", 1))


def caches_swapped(model: ModelProto) -> None:
    """The first layer's keys come out as values."""
    names = {"present_key_0": "present_value_0", "present_value_0": "present_key_0"}
    for node in model.graph.node:
        for names_of in (node.input, node.output):
            for index, name in enumerate(names_of):
                names_of[index] = names.get(name, name)


def attention_decomposed(model: ModelProto) -> None:
    """One cross-attention as products and a softmax."""
    node = next(node for node in nodes_of(model, "Attention") if node.input[1].startswith("cross_key"))
    query, key, value, output = node.input[0], node.input[1], node.input[2], node.output[0]
    repeats = numpy_helper.from_array(
        np.array([1, 2, 1, 1]), "repeats"
    )  # two query heads to each of the miniature's keys
    model.graph.initializer.append(repeats)
    insert_before(
        model,
        node,
        [
            helper.make_node("Tile", [key, "repeats"], ["wide_key"]),
            helper.make_node("Tile", [value, "repeats"], ["wide_value"]),
            helper.make_node("Transpose", ["wide_key"], ["turned_key"], perm=[0, 1, 3, 2]),
            helper.make_node("MatMul", [query, "turned_key"], ["scores"]),
            helper.make_node("Softmax", ["scores"], ["shares"], name="loose_softmax"),
            helper.make_node("MatMul", ["shares", "wide_value"], [output]),
        ],
    )
    model.graph.node.remove(node)


def float32_island(model: ModelProto) -> None:
    """The first MLP's product of gate and up is multiplied in FP32."""
    sigmoid = nodes_of(model, "Sigmoid")[0]
    base = next(value for value in model.graph.input if value.name == "past_key_0").type.tensor_type.elem_type
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name == sigmoid.output[0]:
                node.input[index] = "back"
    after = list(model.graph.node)[list(model.graph.node).index(sigmoid) + 1]
    insert_before(
        model,
        after,
        [
            helper.make_node("Cast", [sigmoid.output[0]], ["wide"], name="widen", to=TensorProto.FLOAT),
            helper.make_node("Mul", ["wide", "wide"], ["squared"], name="island"),
            helper.make_node("Cast", ["squared"], ["back"], name="narrow", to=base),
        ],
    )


def lengths_unused(model: ModelProto) -> None:
    """The mask is made from something else, and an input is left hanging."""
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name == "kv_lengths":
                node.input[index] = "write_indices"


def cache_not_read(model: ModelProto) -> None:
    """The first layer attends to the new tokens' values alone, which is no cache."""
    scatter = next(node for node in nodes_of(model, "TensorScatter") if node.output[0] == "present_value_0")
    attention = next(node for node in nodes_of(model, "Attention") if node.input[2] == "present_value_0")
    keys = next(node for node in nodes_of(model, "TensorScatter") if node.output[0] == attention.input[1])
    attention.input[1], attention.input[2], attention.input[3] = keys.input[1], scatter.input[1], ""


def load(path: str) -> ModelProto:
    return onnx.load(path, load_external_data=False)


BROKEN: dict[str, tuple[Callable[[ModelProto], None], str]] = {
    "causal": (causal_without_mask, r"Attention_\d+ does not know which cache entries are written"),
    "swapped": (caches_swapped, "past_key_0 is not updated in place as present_key_0"),
    "decomposed": (
        attention_decomposed,
        r"5 attentions where 6 are expected, and a softmax of its own in loose_softmax",
    ),
    "island": (float32_island, r"widen computes in FP32 \(CAST\)"),
    "unused": (lengths_unused, "kv_lengths is read by no layer"),
    "unread": (cache_not_read, "8 caches, but 3 attentions read two of them each"),
}
"""What to break, and how the message must name it."""
