"""Is the network what it must be? TensorRT drops and decomposes without an error; this says so, and by layer.

What a strongly typed network says holds for its engine: caches updated in place, attention that is not decomposable
and each tensor's type are demands on the builder, which fails rather than break them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mllama_runtime.config import ModelConfig
from mllama_runtime.device import GraphName
from mllama_runtime.engine_record import Finding, Kernel, Profile
from mllama_runtime.errors import GateError

from mllama_exporter.engines.network import Network, is_cross, nodes_in, tensors_in, tensors_out


def findings_from_network(
    network: Network, graph: GraphName, model: ModelConfig, *, low_precision: bool
) -> tuple[Finding, ...]:
    """Every check.

    Args:
        low_precision: whether anything in FP32 needs a reason.

    Raises:
        GateError: the network fails one; the layer or tensor is named.
    """
    vision = model.vision.num_layers + model.vision.num_global_layers
    decoder = len(model.text.self_attention_layers) + len(model.cross_layers)
    expected = {"vision": vision, "decoder": decoder}.get(graph, 0)
    return (
        _caches(network),
        _attention(network, expected, low_precision),
        _positions(network),
        _precision(network) if low_precision else Finding("precision", "the engine is in FP32 throughout"),
        _inputs(network),
    )


def _caches(network: Network) -> Finding:
    """Each cache goes in and comes out through one KV_CACHE_UPDATE, which writes in place: no step copies it."""
    updates = network.trt.api.LayerType.KV_CACHE_UPDATE
    updated = {layer.get_input(0).name: layer.get_output(0).name for layer in network.layers() if layer.type == updates}
    outputs = {network.definition.get_output(index).name for index in range(network.definition.num_outputs)}
    pasts = [tensor.name for tensor in network.inputs() if tensor.name.startswith("past_")]
    for past in pasts:
        present = past.replace("past_", "present_", 1)
        if updated.get(past) != present or present not in outputs:
            raise _broken(network, f"{past} is not updated in place as {present}")
    return Finding("caches", f"{len(pasts)} caches updated in place" if pasts else "no caches")


def _attention(network: Network, expected: int, low_precision: bool) -> Finding:
    attentions = list(network.attentions())
    if len(attentions) != expected:
        softmax = network.trt.api.LayerType.SOFTMAX
        loose = [_name(layer) for layer in network.layers() if layer.type == softmax]
        by = f", and a softmax of its own in {loose[0]}" if loose else ""
        raise _broken(network, f"{len(attentions)} attentions where {expected} are expected{by}")
    loose = [attention.name for attention in attentions if attention.decomposable and not is_cross(attention)]
    if loose and low_precision:
        raise _broken(network, f"{loose[0]} may be decomposed")
    if not attentions:
        return Finding("attention", "no attentions")
    kind = "decomposed, for FP32 has no kernel of its own" if loose else "each one kernel"
    return Finding("attention", f"{expected} attentions, {kind}")


def check_fused(network: Network, kernels: Sequence[Kernel], profiles: Sequence[Profile]) -> None:
    """Every attention has stayed one kernel in every profile it is in, as far as the kernels' names tell.

    Raises:
        GateError: fewer than there should be.
    """
    found = sum("mha" in kernel.name for kernel in kernels)
    attentions = list(network.attentions())
    num_self = sum(not is_cross(attention) for attention in attentions)
    expected = sum(num_self if profile.name.startswith("text_") else len(attentions) for profile in profiles)
    if 0 < found < expected:
        raise _broken(network, f"{expected - found} attentions of {expected}, in all profiles, are decomposed")


def _positions(network: Network) -> Finding:
    """An attention over a cache must be told what of it is written: by a mask, or by lengths.

    The parsers of 2026 take neither from `is_causal` and `nonpad_kv_seqlen`: they read the first alone, as a triangle
    from the cache's first entry, and a decoded token would see nothing but that.
    """
    api = network.trt.api
    caches = {tensors_out(layer)[0].name for layer in network.layers() if layer.type == api.LayerType.KV_CACHE_UPDATE}
    if not caches:
        return Finding("positions", "no caches")
    count = 0
    for attention in network.attentions():
        if attention.get_input(2).name not in caches:  # the value: keys are scaled on their way
            continue
        count += 1
        by_lengths = attention.key_value_lengths is not None and attention.causal_kind == api.CausalMaskKind.LOWER_RIGHT
        if attention.mask is None and not by_lengths:
            kind = attention.causal_kind.name
            detail = f"{attention.name} does not know which cache entries are written (no mask, causal {kind})"
            raise _broken(network, detail)
    if 2 * count != len(caches):
        raise _broken(network, f"{len(caches)} caches, but {count} attentions read two of them each")
    return Finding("positions", f"{count} attentions know which cache entries are written")


def _precision(network: Network) -> Finding:
    """No activation in FP32, but within normalisations and on the way to an output."""
    api = network.trt.api
    layers = list(network.layers())
    readers: dict[str, list[Any]] = {}
    for layer in layers:
        for tensor in tensors_in(layer):
            readers.setdefault(tensor.name, []).append(layer)
    float_types = (api.DataType.FLOAT, api.DataType.HALF, api.DataType.BF16)
    moving = {tensor.name for tensor in network.inputs() if tensor.dtype in float_types}
    weights: set[str] = set()
    num_norm, num_output = 0, 0
    for layer in layers:
        outputs = tensors_out(layer)
        if layer.type == api.LayerType.CONSTANT:
            weights.update(tensor.name for tensor in outputs if tensor.dtype in float_types)
            continue
        given = {tensor.name for tensor in tensors_in(layer)}
        embeds = layer.type == api.LayerType.GATHER and not weights.isdisjoint(given)
        if moving.isdisjoint(given) and not embeds:
            continue  # weights, positions and their angles
        moving.update(tensor.name for tensor in outputs)
        for tensor in outputs:
            if tensor.dtype != api.DataType.FLOAT:
                continue
            if tensor.is_network_output:
                num_output += 1
            elif _in_norm(layer, network) or all(_in_norm(reader, network) for reader in readers.get(tensor.name, [])):
                num_norm += 1
            else:
                raise _broken(network, f"{_name(layer)} computes in FP32 ({layer.type.name})")
    return Finding("precision", f"FP32 only in {num_norm} layers of normalisations and {num_output} outputs")


def _in_norm(layer: Any, network: Network) -> bool:
    nodes = nodes_in(layer.metadata)
    return bool(nodes) and all(node in network.norms for node in nodes)


def _inputs(network: Network) -> Finding:
    """An input that nothing reads is a meaning that the parser dropped."""
    read = {tensor.name for layer in network.layers() for tensor in tensors_in(layer)}
    unused = [tensor.name for tensor in network.inputs() if tensor.name not in read]
    if unused:
        raise _broken(network, f"{unused[0]} is read by no layer")
    return Finding("inputs", f"all {len(network.inputs())} inputs are used")


def _name(layer: Any) -> str:
    """The ONNX nodes a layer stands for, or its own name where the parser put it in."""
    return ", ".join(nodes_in(layer.metadata)) or str(layer.name)


def _broken(network: Network, detail: str) -> GateError:
    hint = "export the bundle again with this version, and report it if that does not help"
    return GateError(f"the engine would not be the model: {detail}", where=network.path, hint=hint)
