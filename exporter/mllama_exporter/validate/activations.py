"""The largest activation of a bundle, measured on its graphs for ONNX Runtime with one more output a tensor.

Those graphs compute in float32, so that a value is seen as it would be if the precision could hold it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from mllama_runtime.bundle import Bundle
from mllama_runtime.preprocessing import ImageTiles
from numpy.typing import NDArray

from mllama_exporter.observer import activation_names, observed, session_from_model
from mllama_exporter.validate.checks import Observation
from mllama_exporter.validate.compare import Candidate, joined, padded_visibility
from mllama_exporter.validate.reference import ReferenceInputs

Array = NDArray[Any]


class ObservedGraph:
    """One graph of a bundle; `run` gives its own outputs and tells its largest activation."""

    def __init__(self, bundle: Bundle, key: Literal["vision", "decoder"]) -> None:
        graphs = bundle.manifest.graphs
        twin_key: Literal["vision_ort", "decoder_ort"] = "vision_ort" if key == "vision" else "decoder_ort"
        self._weights = activation_names(ir.load(bundle.path(graphs[key].file)))
        # Tensors the twin alone has are left out: they are never stored in the bundle's precision.
        model, self._tensors = observed(ir.load(bundle.path(graphs[twin_key].file)), list(self._weights))
        self._session = session_from_model(model, bundle.root)
        self._key = key

    def run(self, inputs: Mapping[str, Array], sample: str) -> tuple[dict[str, Array], Observation]:
        """The graph's own outputs, and its largest activation."""
        names = [output.name for output in self._session.get_outputs()]
        results = dict(zip(names, self._session.run(names, dict(inputs)), strict=True))
        maxima = {
            tensor: float(np.nan_to_num(results.pop(output), nan=np.inf, posinf=np.inf))
            for output, tensor in self._tensors.items()
        }
        tensor = max(maxima, key=lambda name: maxima[name])
        note = f"{self._key}: {tensor}, after {self._weights[tensor]}"
        return results, Observation("largest_activation", maxima[tensor], sample, note)


class Activations:
    """Both graphs of a bundle under observation."""

    def __init__(self, bundle: Bundle, candidate: Candidate) -> None:
        self._candidate = candidate
        self._vision, self._decoder = ObservedGraph(bundle, "vision"), ObservedGraph(bundle, "decoder")

    def observations(self, inputs: ReferenceInputs) -> Iterator[Observation]:
        """The largest activation of each picture, and of the prompt.

        None for text alone: what its cross-attention layers compute is dropped, and may be any size.
        """
        if not inputs.sample.images:
            return
        name, tiles = inputs.sample.name, self._candidate.tiles(inputs)
        cross = []
        for picture in tiles:
            features, observation = self._vision.run(_vision_inputs(picture), name)
            cross.append(features)
            yield observation
        yield self._decoder.run(_decoder_inputs(self._candidate, inputs, tiles, cross), name)[1]


def _vision_inputs(tiles: ImageTiles) -> dict[str, Array]:
    return {
        "pixel_values": tiles.pixel_values[None],
        "aspect_ratio_ids": np.array([tiles.aspect_ratio_id]),
        "aspect_ratio_mask": tiles.aspect_ratio_mask[None],
    }


def _decoder_inputs(
    candidate: Candidate, inputs: ReferenceInputs, tiles: Sequence[ImageTiles], cross: Sequence[Mapping[str, Array]]
) -> dict[str, Array]:
    """The whole prompt in one step, over all tiles, padding ones included: exact in both mask semantics."""
    text, seq = candidate.manifest.model.text, len(inputs.token_ids)
    mask = padded_visibility(candidate.visibility(inputs, tiles), tiles)
    cache = np.zeros((1, text.num_kv_heads, seq, text.head_dim), np.float32)
    past = {f"past_{kind}_{layer}": cache for layer in text.self_attention_layers for kind in ("key", "value")}
    return {
        "input_ids": np.array([inputs.token_ids]),
        "write_indices": np.array([0]),
        "kv_lengths": np.array([seq]),
        "logits_indices": np.array([seq - 1]),
        "cross_attention_mask": mask[None],
        "has_image": np.array([True]),
        **past,
        **joined(cross),
    }
