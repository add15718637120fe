"""The reference: transformers, one request at a time, in float32 or float64.

A named stand-in for nothing: this is the real model. `Reference` only arranges its inputs and outputs, and has its
vision tower take the states that the weights want.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from mllama_exporter.reference_tower import take_states
from mllama_runtime.config import VisionStates
from mllama_runtime.preprocessing import ImageTiles
from numpy.typing import NDArray
from transformers import AutoProcessor, MllamaForConditionalGeneration


@dataclass(frozen=True, slots=True)
class ReferenceStep:
    """logits [vocab] of the last token; cross: cross_key_i, cross_value_i [1, G, T*P, D]; past: past_key_l, ..."""

    logits: NDArray[np.float32]
    cross: Mapping[str, NDArray[np.float32]]
    past: Mapping[str, NDArray[np.float32]]


class Reference:
    def __init__(
        self, folder: Path, dtype: torch.dtype = torch.float32, vision_states: VisionStates = "published"
    ) -> None:
        self.processor = AutoProcessor.from_pretrained(folder)
        self.model = MllamaForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()
        take_states(self.model.model.vision_model, vision_states)
        self.cross_layers = self.model.config.text_config.cross_attention_layers

    @torch.no_grad()
    def step(self, token_ids: Sequence[int], images: Sequence[ImageTiles], mask: NDArray[np.bool_]) -> ReferenceStep:
        """One prefill. mask: bool [seq, images * max_num_tiles], padding tiles included."""
        output = self.model(**self.inputs(token_ids, images, mask), use_cache=True)
        tensors = {
            f"{'cross' if layer in self.cross_layers else 'past'}_{kind}_{layer}": getattr(cache, f"{kind}s").numpy()
            for layer, cache in enumerate(output.past_key_values.layers)
            if cache.is_initialized
            for kind in ("key", "value")
        }
        return ReferenceStep(
            output.logits[0, -1].numpy(),
            {name: array for name, array in tensors.items() if name.startswith("cross")},
            {name: array for name, array in tensors.items() if name.startswith("past")},
        )

    def inputs(
        self, token_ids: Sequence[int], images: Sequence[ImageTiles], mask: NDArray[np.bool_]
    ) -> dict[str, torch.Tensor]:
        inputs = {"input_ids": torch.tensor([list(token_ids)])}
        if images:
            inputs["pixel_values"] = torch.tensor(np.stack([tiles.pixel_values for tiles in images]))[None]
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
            inputs["aspect_ratio_ids"] = torch.tensor([[tiles.aspect_ratio_id for tiles in images]])
            inputs["aspect_ratio_mask"] = torch.tensor(np.stack([tiles.aspect_ratio_mask for tiles in images]))[None]
            by_image = mask.reshape(1, len(token_ids), len(images), -1)
            inputs["cross_attention_mask"] = torch.tensor(by_image.astype(np.int64))
        return inputs

    @torch.no_grad()
    def greedy(
        self, token_ids: Sequence[int], images: Sequence[ImageTiles], mask: NDArray[np.bool_], max_new_tokens: int
    ) -> list[int]:
        """The model card's way: `generate` without sampling."""
        output = self.model.generate(
            **self.inputs(token_ids, images, mask),
            attention_mask=torch.ones(1, len(token_ids), dtype=torch.int64),
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
        return output[0, len(token_ids) :].tolist()


def padded_mask(visibility: NDArray[np.bool_], images: Sequence[ImageTiles]) -> NDArray[np.bool_]:
    """Visibility of real tiles [seq, sum(num_tiles)] -> of all tiles [seq, images * max_num_tiles]."""
    columns, start = [], 0
    for tiles in images:
        column = np.zeros((len(visibility), len(tiles.aspect_ratio_mask)), np.bool_)
        column[:, : tiles.num_tiles] = visibility[:, start : start + tiles.num_tiles]
        columns.append(column)
        start += tiles.num_tiles
    return np.concatenate(columns, axis=1) if columns else np.zeros((len(visibility), 0), np.bool_)
