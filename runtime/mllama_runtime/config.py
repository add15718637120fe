"""The dimensions of a model: parsed once at the edge, frozen, read everywhere.

The exporter fills these from a checkpoint's config.json; the manifest carries them; the runtime reads them back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Literal

from mllama_runtime.errors import InputError

MaskSemantics = Literal["hf", "meta"]
"""What a cross-attention layer does for a token that sees no picture: transformers' way or Meta's own."""
VisionStates = Literal["published", "transformers-4.56"]
"""Which states of the vision tower the projector sees beside the last, for every i in `intermediate_layers_indices`:
those before block i (Meta's own code, the published weights, transformers until 4.54), or after it (transformers since
4.56)."""


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """The vision tower: a local and a global transformer over the tiles of one picture."""

    hidden_size: int
    num_heads: int
    num_layers: int
    num_global_layers: int
    intermediate_size: int
    intermediate_layers_indices: tuple[int, ...]
    image_size: int  # pixels, the side of one square tile
    patch_size: int  # pixels
    max_num_tiles: int
    supported_aspect_ratios: tuple[tuple[int, int], ...]  # (tiles high, tiles wide); id 0 is padding
    norm_eps: float
    hidden_act: str
    num_channels: int = 3

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def num_patches(self) -> int:
        """Rows of one tile, the class embedding included."""
        return (self.image_size // self.patch_size) ** 2 + 1

    @property
    def output_dim(self) -> int:
        """Width of a patch's features: the final state beside the chosen intermediate ones."""
        return self.hidden_size * (1 + len(self.intermediate_layers_indices))


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding; `rope_type` is "default" or "llama3" (Llama 3.1's frequency-dependent scaling)."""

    rope_type: str
    theta: float
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True, slots=True)
class TextConfig:
    """The decoder: self-attention layers, and cross-attention layers at `cross_attention_layers`."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    rms_norm_eps: float
    max_seq_len: int
    cross_attention_layers: tuple[int, ...]
    rope: RopeConfig
    hidden_act: str = "silu"

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def self_attention_layers(self) -> tuple[int, ...]:
        return tuple(layer for layer in range(self.num_layers) if layer not in self.cross_attention_layers)

    @property
    def num_embeddings(self) -> int:
        """Rows of the embedding table: eight more than the vocabulary, the first of them for `<|image|>`."""
        return self.vocab_size + 8


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A whole model; of a text-only one the vision tower and the cross-attention layers have been left out."""

    vision: VisionConfig
    text: TextConfig
    image_token_id: int
    is_text_only: bool = False

    @property
    def cross_layers(self) -> tuple[int, ...]:
        """The cross-attention layers that are there."""
        return () if self.is_text_only else self.text.cross_attention_layers


_MAX_SIZE = 2**20  # of any size without a limit of its own: far beyond every model, far below any trouble
_MAX_SIZES: Mapping[str, int] = {
    "num_layers": 1024,
    "num_global_layers": 1024,
    "num_heads": 1024,
    "image_size": 2**13,
    "max_num_tiles": 64,
    "vocab_size": 2**24,
    "max_seq_len": 2**24,
}


def check_model(config: ModelConfig, where: object, error: type[InputError]) -> None:
    """Refuse dimensions that contradict each other or are absurd, before anything is allocated by them.

    Raises:
        error: naming `where` and the field, with what was found and expected.
    """

    def need(right: bool, field: str, expected: str, found: object) -> None:
        if not right:
            raise error("impossible model dimension", where=f"{where}: {field}", expected=expected, found=found)

    vision, text = config.vision, config.text
    for part, record in (("vision", vision), ("text", text)):
        for item in fields(record):
            value = getattr(record, item.name)
            if type(value) is int:
                limit = _MAX_SIZES.get(item.name, _MAX_SIZE)
                need(1 <= value <= limit, f"{part}.{item.name}", f"1 to {limit}", value)
        heads = record.num_heads
        need(record.hidden_size % heads == 0, f"{part}.num_heads", f"a divisor of {record.hidden_size}", heads)
    _check_vision(vision, need)
    _check_text(text, need)
    limit = text.num_embeddings
    need(0 <= config.image_token_id < limit, "image_token_id", f"0 to {limit - 1}", config.image_token_id)


_Need = Callable[[bool, str, str, object], None]


def _check_vision(vision: VisionConfig, need: _Need) -> None:
    side, patch = vision.image_size, vision.patch_size
    need(side % patch == 0, "vision.patch_size", f"a divisor of the image size {side}", patch)
    need(vision.num_channels == 3, "vision.num_channels", "3", vision.num_channels)
    need(0 < vision.norm_eps < 1, "vision.norm_eps", "between 0 and 1", vision.norm_eps)
    taken = vision.intermediate_layers_indices
    expected = f"one or more increasing layers from 0 to {vision.num_layers - 1}"
    need(bool(taken) and _increasing(taken, vision.num_layers), "vision.intermediate_layers_indices", expected, taken)
    ratios, tiles = vision.supported_aspect_ratios, vision.max_num_tiles
    right = bool(ratios) and len(set(ratios)) == len(ratios)
    right = right and all(high > 0 and wide > 0 and high * wide <= tiles for high, wide in ratios)
    need(right, "vision.supported_aspect_ratios", f"different canvases of 1 to {tiles} tiles", ratios)


def _check_text(text: TextConfig, need: _Need) -> None:
    need(
        text.num_heads % text.num_kv_heads == 0,
        "text.num_kv_heads",
        f"a divisor of {text.num_heads}",
        text.num_kv_heads,
    )
    need(text.head_dim % 2 == 0, "text.num_heads", "an even size per head, for rotary embedding", text.num_heads)
    need(0 < text.rms_norm_eps < 1, "text.rms_norm_eps", "between 0 and 1", text.rms_norm_eps)
    cross = text.cross_attention_layers
    right = bool(cross) and _increasing(cross, text.num_layers)
    need(right, "text.cross_attention_layers", f"increasing layers from 0 to {text.num_layers - 1}", cross)
    rope = text.rope
    need(rope.rope_type in ("default", "llama3"), "text.rope.rope_type", "default or llama3", repr(rope.rope_type))
    need(0 < rope.theta < math.inf, "text.rope.theta", "a positive number", rope.theta)
    need(0 < rope.factor < math.inf, "text.rope.factor", "a positive number", rope.factor)
    low, high = rope.low_freq_factor, rope.high_freq_factor
    need(0 < low < high < math.inf, "text.rope.low_freq_factor", f"above 0 and below {high}", low)
    original = rope.original_max_position_embeddings
    need(0 < original <= _MAX_SIZES["max_seq_len"], "text.rope.original_max_position_embeddings", "positive", original)


def _increasing(layers: tuple[int, ...], num_layers: int) -> bool:
    return all(0 <= layer < num_layers for layer in layers) and list(layers) == sorted(set(layers))
