"""The decoder graph's module: new tokens, caches and a picture's keys and values -> logits and updated caches.

One graph serves prefill, chunked prefill and decode. Reference for the behaviour: transformers' MllamaTextModel (`hf`)
and Meta's llama-models (`meta`), which differ for tokens that see no tile: hf drops only the MLP branch of a
cross-attention layer there, meta drops both branches.

Dimensions: B batch, N rows of the batch that may have a picture, S new tokens, L logits of a row, H query heads, G
key/value heads, D head_dim, C cache length, T tiles, P num_patches, E hidden size.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from mllama_runtime.config import MaskSemantics, ModelConfig, RopeConfig, TextConfig
from torch import Tensor, nn

from mllama_exporter.modules.operators import (
    RMSNorm,
    first_rows,
    masked_attention,
    rotary_embedding,
    tensor_scatter,
    with_first_rows,
)


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Rotary frequencies [head_dim / 2], float32.

    "llama3" divides low frequencies by `factor`, keeps high ones and blends between (Llama 3.1; transformers'
    modeling_rope_utils gives the formula).
    """
    freq = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if rope.rope_type == "default":
        return freq
    wavelength = 2 * math.pi / freq
    low = rope.original_max_position_embeddings / rope.low_freq_factor
    high = rope.original_max_position_embeddings / rope.high_freq_factor
    smooth = (rope.original_max_position_embeddings / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (1 - smooth) * (freq / rope.factor) + smooth * freq
    return torch.where(wavelength > low, freq / rope.factor, torch.where(wavelength < high, freq, blended))


class MLP(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class SelfAttention(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        dim, kv_dim = config.hidden_size, config.num_kv_heads * config.head_dim
        # In this order they lie in the weights file, where a twin takes the first three as one matrix.
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, width, bias=False) for width in (dim, kv_dim, kv_dim))
        self.o_proj = nn.Linear(dim, dim, bias=False)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], cache: tuple[Tensor, Tensor], step: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, S, E], rope 2 x [B, S, D/2], cache 2 x [B, G, C, D]; step: write_indices [B], mask [B, 1, S, C]."""
        write_indices, mask = step
        batch, seq, _ = x.shape
        query = rotary_embedding(self.q_proj(x), *rope, num_heads=self.num_heads)  # [B, S, H*D]
        key = rotary_embedding(self.k_proj(x), *rope, num_heads=self.num_kv_heads)  # [B, S, G*D]
        query = query.view(batch, seq, self.num_heads, self.head_dim).transpose(1, 2)
        key, value = (
            new.view(batch, seq, self.num_kv_heads, self.head_dim).transpose(1, 2) for new in (key, self.v_proj(x))
        )
        key, value = (tensor_scatter(past, new, write_indices) for past, new in zip(cache, (key, value), strict=True))
        attended = masked_attention(query, key, value, mask).transpose(1, 2).reshape(x.shape)
        return self.o_proj(attended), key, value


class SelfAttentionLayer(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.self_attn, self.mlp = SelfAttention(config), MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], cache: tuple[Tensor, Tensor], step: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        attended, key, value = self.self_attn(self.input_layernorm(x), rope, cache, step)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), key, value


class CrossAttention(nn.Module):
    """The part of a cross-attention layer that depends on the tokens; `VisionEncoder` holds the other part."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, x: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """x [N, S, E], key and value [N, G, T*P, D], mask bool [N, 1, S, T*P] -> [N, S, E]."""
        query = self.q_proj(x).view(x.shape[0], x.shape[1], self.num_heads, self.head_dim).transpose(1, 2)
        attended = masked_attention(self.q_norm(query), key, value, mask)  # [N, H, S, D]
        return self.o_proj(attended.transpose(1, 2).reshape(x.shape))  # type: ignore[no-any-return]


class CrossAttentionLayer(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.cross_attn, self.mlp = CrossAttention(config), MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.cross_attn_attn_gate = nn.Parameter(torch.empty(1))
        self.cross_attn_mlp_gate = nn.Parameter(torch.empty(1))

    def forward(self, x: Tensor, key: Tensor, value: Tensor, mask: Tensor, keep: tuple[Tensor, Tensor]) -> Tensor:
        """x [N, S, E]; keep: which tokens take the attention branch and which the MLP branch, 2 x bool [N, S, 1].

        A branch that is not taken is selected away, not multiplied by zero: a text-only row's keys and values may hold
        anything, NaN included.
        """
        zero = torch.zeros((), dtype=x.dtype)
        attended = self.cross_attn_attn_gate.tanh() * self.cross_attn(self.input_layernorm(x), key, value, mask)
        x = x + torch.where(keep[0], attended, zero)
        transformed = self.cross_attn_mlp_gate.tanh() * self.mlp(self.post_attention_layernorm(x))
        return x + torch.where(keep[1], transformed, zero)


class TextModel(nn.Module):
    """Of a text-only model the cross-attention layers are places without a layer: the others keep their numbers."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        text = config.text
        self.embed_tokens = nn.Embedding(text.num_embeddings, text.hidden_size)
        layers: dict[int, nn.Module] = {layer: SelfAttentionLayer(text) for layer in text.self_attention_layers}
        layers |= {layer: CrossAttentionLayer(text) for layer in config.cross_layers}
        self.layers = nn.ModuleList([layers.get(layer, nn.Identity()) for layer in range(text.num_layers)])
        self.norm = RMSNorm(text.hidden_size, text.rms_norm_eps)


class LanguageModel(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.model = TextModel(config)
        self.lm_head = nn.Linear(config.text.hidden_size, config.text.vocab_size, bias=False)


class Decoder(nn.Module):
    """`decoder.onnx`: one step of any length for every row of the batch."""

    inv_freq: Tensor

    def __init__(self, config: ModelConfig, mask_semantics: MaskSemantics) -> None:
        super().__init__()
        self.config, self.mask_semantics = config, mask_semantics
        self.language_model = LanguageModel(config)
        self.register_buffer("inv_freq", torch.empty(config.text.head_dim // 2, dtype=torch.float32))

    def forward(
        self,
        input_ids: Tensor,
        write_indices: Tensor,
        kv_lengths: Tensor,
        logits_indices: Tensor,
        pictures: tuple[Tensor, Tensor] | None,
        past: list[Tensor],
        cross: list[Tensor],
    ) -> list[Tensor]:
        """Logits [B, L, vocab] float32, then key and value cache of every self-attention layer in turn.

        input_ids [B, S], write_indices, kv_lengths [B], logits_indices [B, L]; pictures: cross_attention_mask bool
        [B, S, T] and has_image bool [B], None in a text-only model; past: key and value of each self-attention layer,
        [B, G, C, D]; cross: key and value of each cross-attention layer, [N, G, T*P, D]. Rows from N on have no
        picture, so with N = 0 those layers cost nothing.
        """
        x = self.language_model.model.embed_tokens(input_ids)  # [B, S, E]
        rope = self._rope(input_ids, write_indices, x.dtype)
        step = write_indices, self._self_attention_mask(kv_lengths, input_ids.shape[1], past[0].shape[2])
        masks = None if pictures is None else self._cross_attention_mask(*pictures, cross[0])
        self_caches, cross_caches = (
            iter(zip(past[::2], past[1::2], strict=True)),
            iter(zip(cross[::2], cross[1::2], strict=True)),
        )
        present: list[Tensor] = []
        for layer in self.language_model.model.layers:
            if isinstance(layer, CrossAttentionLayer) and masks is not None:
                seeing = layer(first_rows(x, cross[0]), *next(cross_caches), *masks)  # [N, S, E]
                x = with_first_rows(x, seeing)
            elif isinstance(layer, SelfAttentionLayer):
                x, key, value = layer(x, rope, next(self_caches), step)
                present += [key, value]
        last = x[torch.arange(x.shape[0])[:, None], logits_indices]  # [B, L, E]
        logits = self.language_model.lm_head(self.language_model.model.norm(last)).float()
        return [logits, *present]

    def _rope(self, input_ids: Tensor, write_indices: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine of every new token's angles, [B, S, D/2] each; angles are float32 whatever the precision."""
        positions = write_indices[:, None] + torch.arange(input_ids.shape[1])  # [B, S]
        angles = positions[..., None].float() * self.inv_freq
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def _self_attention_mask(self, kv_lengths: Tensor, seq: int, cache_len: int) -> Tensor:
        """Cache entries each new token attends to, bool [B, 1, S, C]: the last new token is entry kv_lengths - 1."""
        own = kv_lengths[:, None] - seq + torch.arange(seq)  # [B, S] each new token's own entry
        # Axes come before the comparison: TensorRT-RTX 1.7.1 fails on a boolean Unsqueeze here at batch 1.
        return torch.arange(cache_len) <= own[:, None, :, None]

    def _cross_attention_mask(
        self, tiles: Tensor, has_image: Tensor, cross: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Patches each token attends to [N, 1, S, T*P], and the tokens that take each branch, 2 x [N, S, 1].

        A token that sees no tile attends to all of them, as in the reference, whose mask row becomes zeros.
        """
        # Reduced before it is cut: ONNX Runtime keeps a reduced axis as it was where there are no rows.
        sees_any = first_rows(tiles.any(dim=-1, keepdim=True), cross)  # [N, S, 1]
        tiles, has_image = first_rows(tiles, cross), first_rows(has_image, cross)
        num_patches = self.config.vision.num_patches
        patches = (tiles | ~sees_any).unsqueeze(-1).expand(-1, -1, -1, num_patches).flatten(2)  # [N, S, T*P]
        in_image_row = has_image[:, None, None].expand_as(sees_any)
        sees_in_image_row = sees_any & in_image_row
        attention = in_image_row if self.mask_semantics == "hf" else sees_in_image_row
        return patches.unsqueeze(1), (attention, sees_in_image_row)
