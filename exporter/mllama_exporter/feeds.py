"""Graph inputs for one whole prompt in one step: what validation and calibration feed to graphs under observation.

All tiles of every picture stand in the keys and values, padding tiles included: exact in both mask semantics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from mllama_runtime.config import ModelConfig
from mllama_runtime.preprocessing import ImageTiles
from numpy.typing import NDArray

Array = NDArray[Any]


def vision_inputs(tiles: ImageTiles) -> dict[str, Array]:
    """One picture for the vision graph."""
    return {
        "pixel_values": tiles.pixel_values[None],
        "aspect_ratio_ids": np.array([tiles.aspect_ratio_id]),
        "aspect_ratio_mask": tiles.aspect_ratio_mask[None],
    }


def decoder_inputs(
    model: ModelConfig,
    token_ids: Sequence[int],
    visibility: NDArray[np.bool_],
    tiles: Sequence[ImageTiles],
    cross: Sequence[Mapping[str, Array]],
) -> dict[str, Array]:
    """A prompt for the decoder graph, on an empty cache.

    visibility: bool [seq, real tiles of all pictures]. cross: the vision graph's outputs for each picture. Without
    pictures the prompt sees none: has_image is false, and the keys and values of one tile are zeros (ONNX Runtime's
    standard Attention refuses to have no row).
    """
    text, seq = model.text, len(token_ids)
    cache = np.zeros((1, text.num_kv_heads, seq, text.head_dim), np.float32)
    past = {f"past_{kind}_{layer}": cache for layer in text.self_attention_layers for kind in ("key", "value")}
    inputs = {
        "input_ids": np.array([token_ids]),
        "write_indices": np.array([0]),
        "kv_lengths": np.array([seq]),
        "logits_indices": np.array([[seq - 1]]),
    }
    if model.is_text_only:
        return inputs | past
    if not tiles:
        blank = np.zeros((1, text.num_kv_heads, model.vision.num_patches, text.head_dim), np.float32)
        names = [f"cross_{kind}_{layer}" for layer in model.cross_layers for kind in ("key", "value")]
        cross = [dict.fromkeys(names, blank)]
    mask = padded_visibility(visibility, tiles) if tiles else np.zeros((seq, 1), np.bool_)
    seen = {"cross_attention_mask": mask[None], "has_image": np.array([bool(tiles)])}
    return inputs | seen | past | joined(cross)


def padded_visibility(visibility: NDArray[np.bool_], tiles: Sequence[ImageTiles]) -> NDArray[np.bool_]:
    """Real tiles side by side [seq, sum(num_tiles)] -> with padding tiles, which nobody sees, [seq, I*T]."""
    is_real = np.concatenate([each.aspect_ratio_mask for each in tiles]).astype(np.bool_)
    padded = np.zeros((len(visibility), len(is_real)), np.bool_)
    padded[:, is_real] = visibility
    return padded


def joined(arrays: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """The pictures' keys and values behind one another, as the reference's cache has them."""
    return {name: np.concatenate([each[name] for each in arrays], axis=2) for name in (arrays[0] if arrays else ())}
