"""A bundle's graphs with more outputs: the largest value of every activation, and the states of every layer.

The graphs for ONNX Runtime compute in float32, so that a value is seen as it would be if the precision could hold it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from mllama_runtime.bundle import Bundle
from mllama_runtime.manifest import GraphKey
from mllama_runtime.preprocessing import ImageTiles
from numpy.typing import NDArray

from mllama_exporter.feeds import decoder_inputs, vision_inputs
from mllama_exporter.observer import activation_names, observed, session_from_model
from mllama_exporter.validate.checks import Observation
from mllama_exporter.validate.compare import Candidate
from mllama_exporter.validate.layers import LayerError, layer_error
from mllama_exporter.validate.reference import ReferenceInputs, ReferenceRun
from mllama_exporter.validate.spots import FORCED, GraphName, add_states, layer_of_weight, spots_of
from mllama_exporter.validate.thresholds import GraphKind

Array = NDArray[Any]
_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
_KEYS: Mapping[tuple[GraphName, GraphKind], GraphKey] = {
    ("vision", "ort"): "vision_ort",
    ("decoder", "ort"): "decoder_ort",
    ("vision", "standard"): "vision",
    ("decoder", "standard"): "decoder",
}


@dataclass(frozen=True, slots=True)
class Activation:
    """The largest activation of a layer; infinite where one was not finite. `tensor` names it for people."""

    layer: str
    largest: float
    sample: str
    tensor: str


def activation_observations(activations: Sequence[Activation]) -> Iterator[Observation]:
    for each in activations:
        yield Observation("largest_activation", each.largest, each.sample, each.tensor)


def largest_by_layer(activations: Sequence[Activation]) -> tuple[Activation, ...]:
    """The largest of all samples, layer by layer, in the order of the data."""
    largest: dict[str, Activation] = {}
    for each in activations:
        if each.layer not in largest or each.largest > largest[each.layer].largest:
            largest[each.layer] = each
    return tuple(largest.values())


class ObservedGraph:
    """One graph of a bundle, under observation."""

    def __init__(self, bundle: Bundle, name: GraphName, kind: GraphKind) -> None:
        graphs = bundle.manifest.graphs
        model = ir.load(bundle.path(graphs[_KEYS[name, kind]].file))
        self._weights: Mapping[str, str] = {}
        if kind == "ort":
            # Tensors the twin alone has are left out: they are never stored in the bundle's precision.
            self._weights = activation_names(ir.load(bundle.path(graphs[name].file)))
        model, self._tensors = observed(model, list(self._weights))
        self._own = [str(value.name) for value in model.graph.outputs if value.name not in self._tensors]
        self._states = add_states(model, bundle.manifest.model, name)
        self._session = session_from_model(model, bundle.root)
        self._dtypes = {value.name: _DTYPES.get(value.type) for value in self._session.get_inputs()}
        self._name = name

    def activations(self, inputs: Mapping[str, Array], sample: str) -> tuple[dict[str, Array], tuple[Activation, ...]]:
        """The graph's own outputs, and the largest activation of every layer."""
        found = self._run(inputs, {}, [*self._own, *self._tensors])
        activations = []
        for output, tensor in self._tensors.items():
            value = float(np.nan_to_num(found.pop(output), nan=np.inf, posinf=np.inf))
            weight = self._weights[tensor]
            layer = layer_of_weight(weight, self._name)
            activations.append(Activation(layer, value, sample, f"{self._name}: {tensor}, after {weight}"))
        return found, largest_by_layer(activations)

    def states(self, inputs: Mapping[str, Array], reference: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """The graph's own outputs and its states, float32, by name; with the reference's states in their place."""
        found = self._run(inputs, reference or {}, [*self._own, *self._states])
        return {self._states.get(name, name): array.astype(np.float32) for name, array in found.items()}

    def _run(
        self, inputs: Mapping[str, Array], reference: Mapping[str, Array], outputs: Sequence[str]
    ) -> dict[str, Array]:
        given = dict(inputs)
        for name in self._dtypes:
            if name.startswith("reference_"):
                given[name] = reference.get(name.removeprefix("reference_"), np.zeros((1, 1, 1), np.float32))
        given[FORCED] = np.array(bool(reference))
        typed = {name: array.astype(self._dtypes[name] or array.dtype, copy=False) for name, array in given.items()}
        return dict(zip(outputs, self._session.run(outputs, typed), strict=True))


class ObservedBundle:
    """Both graphs of a kind, under observation."""

    def __init__(self, bundle: Bundle, candidate: Candidate, kind: GraphKind) -> None:
        self._candidate, self._spots = candidate, spots_of(bundle.manifest.model)
        self._vision, self._decoder = (ObservedGraph(bundle, name, kind) for name in ("vision", "decoder"))

    def activations(self, inputs: ReferenceInputs) -> Iterator[Activation]:
        """The largest activations of each picture, and of the prompt.

        None for text alone: what its cross-attention layers compute is dropped, and may be any size.
        """
        if not inputs.sample.images:
            return
        name, tiles = inputs.sample.name, self._candidate.tiles(inputs)
        cross = []
        for picture in tiles:
            features, largest = self._vision.activations(vision_inputs(picture), name)
            cross.append(features)
            yield from largest
        yield from self._decoder.activations(self._prompt(inputs, tiles, cross), name)[1]

    def layer_errors(self, run: ReferenceRun) -> list[LayerError]:
        """Every spot of a sample with pictures, whose states the reference has kept."""
        tiles, expected = self._candidate.tiles(run.inputs), _expected(run)
        given = [vision_inputs(picture) for picture in tiles]
        free = _pictures([self._vision.states(each) for each in given])
        forced = _pictures([self._vision.states(each, _picture(expected, i)) for i, each in enumerate(given)])
        for tensors, reference in ((free, None), (forced, expected)):
            cross = {name: array for name, array in (reference or free).items() if name.startswith("cross_")}
            found = self._decoder.states(self._prompt(run.inputs, tiles, [cross]), reference)
            tensors.update({name.replace("present_", "past_"): array for name, array in found.items()})
        name = run.inputs.sample.name
        return [layer_error(spot, name, expected, free, forced) for spot in self._spots]

    def _prompt(
        self, inputs: ReferenceInputs, tiles: Sequence[ImageTiles], cross: Sequence[Mapping[str, Array]]
    ) -> dict[str, Array]:
        visibility = self._candidate.visibility(inputs, tiles)
        return decoder_inputs(self._candidate.manifest.model, inputs.token_ids, visibility, tiles, cross)


def _expected(run: ReferenceRun) -> dict[str, Array]:
    """The reference's tensors after the prompt."""
    num_tokens = len(run.inputs.token_ids)
    past = {name: array[:, :, :num_tokens] for name, array in run.past.items()}
    return {**run.states, **run.cross, **past, "logits": run.logits[None, :1]}  # [batch, num_logits, vocab]


def _picture(expected: Mapping[str, Array], index: int) -> dict[str, Array]:
    names = [name for name in expected if name.startswith(("vision.", "global.", "projector"))]
    return {name: expected[name][index : index + 1] for name in names}


def _pictures(found: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """The pictures' states one above the other, and their keys and values behind one another."""
    names = [name for name in found[0] if not name.startswith("cross_")]
    return {name: np.concatenate([each[name] for each in found]) for name in names} | {
        name: np.concatenate([each[name] for each in found], axis=2) for name in found[0] if name not in names
    }
