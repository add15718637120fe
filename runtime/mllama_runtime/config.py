"""The dimensions of a model: parsed once at the edge, frozen, read everywhere.

The exporter fills these from a checkpoint's config.json; the manifest carries them; the runtime reads them back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MaskSemantics = Literal["hf", "meta"]
"""What a cross-attention layer does for a token that sees no picture: transformers' way or Meta's own."""


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
    """The decoder: self-attention layers with cross-attention layers at `cross_attention_layers`."""

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
    """A whole model."""

    vision: VisionConfig
    text: TextConfig
    image_token_id: int
