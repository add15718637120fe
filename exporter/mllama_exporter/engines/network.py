"""Graph to TensorRT network: the cache's length is pinned in memory, the bundle's file stays as it is.

Networks are strongly typed (TensorRT 11 and TensorRT-RTX know no other), so every type is the graph's own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from mllama_runtime.backends.private_trt import Log, TensorRT
from mllama_runtime.errors import BundleError

_NODES = re.compile(r"\[ONNX Layer: ([^\]]+)\]")  # how the parser says which nodes a layer stands for
_NORMS = ("LayerNormalization", "RMSNormalization")


@dataclass(frozen=True, slots=True)
class Network:
    """The graph of a file, parsed. `definition` is TensorRT's; `norms` are the names of its normalisation nodes.

    The parser owns the weights' memory, so it lives as long as the network.
    """

    path: Path
    trt: TensorRT
    definition: Any
    parser: Any
    norms: frozenset[str]

    def layers(self) -> Iterator[Any]:
        """Every layer, in order of execution."""
        return (self.definition.get_layer(index) for index in range(self.definition.num_layers))

    def inputs(self) -> list[Any]:
        return [self.definition.get_input(index) for index in range(self.definition.num_inputs)]

    def attentions(self) -> Iterator[Any]:
        """Every fused attention."""
        for layer in self.layers():
            if layer.type == self.trt.api.LayerType.ATTENTION_INPUT:
                layer.__class__ = self.trt.api.IAttentionInputLayer  # the bindings hand out plain layers
                yield layer.attention


def is_cross(attention: Any) -> bool:
    """Whether it reads the keys and values of pictures."""
    return bool(attention.get_input(2).is_network_input)


def tensors_in(layer: Any) -> list[Any]:
    """A layer's inputs that are set."""
    return [tensor for index in range(layer.num_inputs) if (tensor := layer.get_input(index)) is not None]


def tensors_out(layer: Any) -> list[Any]:
    return [layer.get_output(index) for index in range(layer.num_outputs)]


def nodes_in(metadata: str) -> tuple[str, ...]:
    """Names of the ONNX nodes that a layer's metadata tells."""
    return tuple(_NODES.findall(metadata))


def network_from_graph(trt: TensorRT, builder: Any, path: Path, cache_len: int, log: Log) -> Network:
    """Parse a graph of a bundle.

    FP32 attention has no kernel of its own; it is decomposed into products and a softmax. Cross-attention may be too,
    or TensorRT refuses the profiles in which it has no row; `checks` sees to it that it is not in the others.

    Raises:
        BundleError: TensorRT cannot take the graph; it names the node.
    """
    model = onnx.load(path, load_external_data=False)
    _pin_cache_len(model, cache_len)
    definition = builder.create_network(0)
    parser = trt.api.OnnxParser(definition, trt.logger)
    if not parser.parse(model.SerializeToString(), str(path)):
        faults = [parser.get_error(index) for index in range(parser.num_errors)]
        reason = f"{faults[-1].node_name()}: {faults[-1].desc()}" if faults else log.last_error()
        raise BundleError(f"{trt.flavour.title} cannot take the graph", where=path, found=reason)
    norms = frozenset(node.name for node in model.graph.node if node.op_type in _NORMS)
    network = Network(path, trt, definition, parser, norms)
    for attention in network.attentions():
        in_float = attention.get_input(0).dtype == trt.api.DataType.FLOAT
        attention.decomposable = in_float or is_cross(attention)
    return network


def _pin_cache_len(model: onnx.ModelProto, cache_len: int) -> None:
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == "cache_len":
                dim.dim_value = cache_len
