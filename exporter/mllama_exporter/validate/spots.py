"""The places where a model is compared layer by layer, and how a graph is made to give, and to take, what is there.

Every branch of a layer (attention, MLP) adds to one residual stream; the states of that stream, after every branch, are
the same numbers in every graph, whatever is scaled or quantised inside a branch. So they are what is compared, and what
can be replaced: a graph fed with the reference's states makes every error anew in the branch where it is made, and
passes none on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NoReturn, cast, get_args

import onnx_ir as ir
from mllama_runtime.config import ModelConfig
from mllama_runtime.errors import BundleError

GraphName = Literal["vision", "decoder"]
Group = Literal["vision", "cross", "rotary", "decoder"]
GROUPS: tuple[Group, ...] = get_args(Group)
Side = Literal["input", "output"]
FORCED = "forced"  # the observed graph's input that puts the reference's states in the place of its own
_LAYER_TITLES = (  # weight -> layer
    (r"global_transformer\.layers\.(\d+)\.", r"global vision layer \1"),
    (r"vision_model\.transformer\.layers\.(\d+)\.", r"vision layer \1"),
    (r"language_model\.model\.layers\.(\d+)\.", r"decoder layer \1"),
    (r"layernorm_post|post_tile", "global vision input"),
    (r"multi_modal_projector", "projector"),
    (r"lm_head|language_model\.model\.norm", "language head"),
)
_NORMS = ("LayerNormalization", "RMSNormalization")


@dataclass(frozen=True, slots=True)
class Spot:
    """One place.

    tensor: its name, in what the reference gives and in what an observed graph gives. group: which share a threshold.
    layer, branch: for people.
    start: the state of the residual stream that the branch adds to; None for a tensor that stands for itself.
    """

    tensor: str
    group: Group
    layer: str
    branch: str
    start: str | None = None


def spots_of(model: ModelConfig) -> tuple[Spot, ...]:
    """Every place, in the order of the data's way through the model."""
    return (*_tower(model), *_decoder(model))


def _tower(model: ModelConfig) -> Iterator[Spot]:
    for tower, title, num_layers in (
        ("vision", "vision", model.vision.num_layers),
        ("global", "global vision", model.vision.num_global_layers),
    ):
        state = f"{tower}.input"
        yield Spot(state, "vision", f"{title} input", "embedding" if tower == "vision" else "norm and embedding")
        for layer in range(num_layers):
            for branch, kind in (("attention", "self-attention"), ("mlp", "MLP")):
                start, state = state, f"{tower}.{layer}.{branch}"
                yield Spot(state, "vision", f"{title} layer {layer}", kind, start)
    yield Spot("projector", "vision", "projector", "intermediate states and projection")


def _decoder(model: ModelConfig) -> Iterator[Spot]:
    state = "decoder.input"
    yield Spot(state, "decoder", "decoder input", "embedding")
    yield Spot("rotary", "rotary", "self-attention layers", "rotary angles")
    for layer in range(model.text.num_layers):
        title, is_cross = f"decoder layer {layer}", layer in model.text.cross_attention_layers
        attention = "cross-attention" if is_cross else "self-attention"
        for kind in ("key", "value"):
            tensor, group = (f"cross_{kind}_{layer}", "cross") if is_cross else (f"past_{kind}_{layer}", "decoder")
            yield Spot(tensor, cast(Group, group), title, f"{attention} {kind}")
        for branch, kind in (("attention", attention), ("mlp", "MLP")):
            start, state = state, f"decoder.{layer}.{branch}"
            yield Spot(state, "decoder", title, kind, start)
    yield Spot("logits", "decoder", "language head", "norm and projection")


def layer_of_weight(weight: str, graph_name: GraphName) -> str:
    """The layer, as the spots title it, that a weight of a graph belongs to; what has no weight is at the input."""
    for pattern, title in _LAYER_TITLES:
        if found := re.search(pattern, weight):
            return found.expand(title)
    return f"{graph_name} input"


def reference_modules(model: ModelConfig) -> Mapping[str, tuple[str, Side]]:
    """State -> the module of transformers' model that takes it in, or gives it out."""
    modules: dict[str, tuple[str, Side]] = {
        "projector": ("model.multi_modal_projector", "output"),
        "rotary": ("model.language_model.rotary_emb", "output"),
    }
    for tower, prefix, num_layers in _towers(model):
        modules[f"{tower}.input"] = (f"model.{prefix}.0.input_layernorm", "input")
        for layer in range(num_layers):
            modules[f"{tower}.{layer}.attention"] = (f"model.{prefix}.{layer}.post_attention_layernorm", "input")
            modules[f"{tower}.{layer}.mlp"] = (f"model.{prefix}.{layer}", "output")
    return modules


def add_states(model: ir.Model, config: ModelConfig, graph_name: GraphName) -> dict[str, str]:
    """Let a graph give every state of its residual stream, and take the reference's in their place; in place.

    Its new outputs, float32, are returned as output name -> state. Its new inputs are `forced`, a boolean scalar, and
    `reference_{state}`, float32: the reference's states where `forced` is true, and anything of their rank where not.
    """
    graph = model.graph
    states = _states(graph, config, graph_name)
    first = graph[0]
    dtype = graph.outputs[-1].dtype or ir.DataType.FLOAT  # of keys, values and caches: the graph's own precision
    forced = ir.val(FORCED, ir.DataType.BOOL, shape=())
    graph.inputs.append(forced)
    outputs = {}
    for name, state in states.items():
        reference = ir.val(f"reference_{name}", ir.DataType.FLOAT)
        graph.inputs.append(reference)
        cast = ir.node("Cast", [reference], {"to": dtype}, name=f"reference_{name}_cast")
        chosen = ir.node("Where", [forced, cast.outputs[0], state], name=f"chosen_{name}")
        shown = ir.node("Cast", [state], {"to": ir.DataType.FLOAT}, name=f"state_{name}_cast")
        for node in (cast, chosen, shown):
            node.outputs[0].name = f"{node.name}_output"
        uses = [(use.node, use.idx) for use in state.uses() if use.node not in (chosen, shown)]
        for node, index in uses:
            node.replace_input_with(index, chosen.outputs[0])
        graph.insert_before(first, cast)
        graph.insert_after(_producer(state), [chosen, shown])
        shown.outputs[0].name = f"state_{name}"
        shown.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        graph.outputs.append(shown.outputs[0])
        outputs[f"state_{name}"] = name
    if graph_name == "decoder":
        outputs[_add_rotary(graph)] = "rotary"
    return outputs


def _add_rotary(graph: ir.Graph) -> str:
    """An output of the angles' cosines and sines, laid out as transformers does: each twice, for both halves of a head.

    They come before any cast, so that they are as exact in every precision; where slow frequencies are wrong, keys
    tell only at positions far beyond a sample's.
    """
    sides = [next((node for node in graph if node.op_type == kind), None) for kind in ("Cos", "Sin")]
    twice = [(side or _refuse("inv_freq", "cosine and sine")).outputs[0] for side in sides for _ in range(2)]
    joined = ir.node("Concat", twice, {"axis": -1}, name="state_rotary")
    joined.outputs[0].name = "state_rotary"
    joined.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    graph.append(joined)
    graph.outputs.append(joined.outputs[0])
    return "state_rotary"


def _towers(model: ModelConfig) -> tuple[tuple[str, str, int], ...]:
    """Name of the states, transformers' prefix of the layers, number of layers."""
    return (
        ("vision", "vision_model.transformer.layers", model.vision.num_layers),
        ("global", "vision_model.global_transformer.layers", model.vision.num_global_layers),
        ("decoder", "language_model.layers", model.text.num_layers),
    )


def _states(graph: ir.Graph, config: ModelConfig, graph_name: GraphName) -> dict[str, ir.Value]:
    """The states by name: what goes into a norm, and for a layer's last the sum of that with the branch behind it."""
    states: dict[str, ir.Value] = {}
    for tower, prefix, num_layers in _towers(config):
        if (tower == "decoder") != (graph_name == "decoder"):
            continue
        weights = prefix.replace("language_model.", "language_model.model.")  # the checkpoint's published names
        for layer in range(num_layers):
            if layer == 0:
                states[f"{tower}.input"] = _norm_input(graph, f"{weights}.0.input_layernorm.weight")
            middle = _norm_input(graph, f"{weights}.{layer}.post_attention_layernorm.weight")
            states[f"{tower}.{layer}.attention"] = middle
            states[f"{tower}.{layer}.mlp"] = _next_sum(middle)
    if graph_name == "vision":
        states["projector"] = _user_of_weight(graph, "multi_modal_projector.bias", "Add").outputs[0]
    return states


def _norm_input(graph: ir.Graph, weight: str) -> ir.Value:
    value = _user_of_weight(graph, weight, *_NORMS).inputs[0]
    return value if value is not None else _refuse(weight, "input")


def _user_of_weight(graph: ir.Graph, weight: str, *op_types: str) -> ir.Node:
    """The node of one of these types that a weight reaches, through casts if there are some."""
    value = graph.initializers.get(weight)
    use = None if value is None else next(iter(value.uses()), None)
    while use is not None and use.node.op_type not in op_types:
        use = next(iter(use.node.outputs[0].uses()), None)
    return _refuse(weight, " or ".join(op_types)) if use is None else use.node


def _next_sum(state: ir.Value) -> ir.Value:
    """What becomes of a state when the branch that starts there is added to it."""
    sums = [use.node for use in state.uses() if use.node.op_type == "Add"]
    return sums[0].outputs[0] if len(sums) == 1 else _refuse(str(state.name), "sum with one branch")


def _producer(value: ir.Value) -> ir.Node:
    return value.producer() or _refuse(str(value.name), "producer")


def _refuse(name: str, lacks: str) -> NoReturn:
    what = f"a graph is not what manifest.json makes of the model: {name} has no {lacks}"
    raise BundleError(what, hint="export the bundle again")
