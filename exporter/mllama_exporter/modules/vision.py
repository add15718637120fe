"""The vision graph's module: tiles of pictures -> keys and values of every cross-attention layer.

Tower, projector, K/V projections and key norm are one graph, because their result is per picture and not per token.
Reference for the behavior: Meta's VisionEncoder (package llama-models) and transformers' MllamaTextCrossAttention.

Dimensions: I images, T max_num_tiles, P num_patches, Q num_patches rounded up to a multiple of 8, V vision hidden size,
H heads, G key/value heads, D head_dim, E text hidden size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from mllama_runtime.config import ModelConfig, TextConfig, VisionConfig, VisionStates
from torch import Tensor, nn

from mllama_exporter.modules.operators import RMSNorm, masked_attention

_ROW_MULTIPLE = 8  # the reference pads the rows of a tile to a multiple of eight, and real rows attend to the padding


class AspectRatioEmbedding(nn.Module):
    """A learned vector per tile of each canvas shape, behind a tanh gate."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.shape = (-1, config.max_num_tiles, 1, config.hidden_size)
        num_ids = len(config.supported_aspect_ratios) + 1
        self.embedding = nn.Embedding(num_ids, config.max_num_tiles * config.hidden_size)
        self.gate = nn.Parameter(torch.empty(1))

    def forward(self, x: Tensor, aspect_ratio_ids: Tensor) -> Tensor:
        embedding: Tensor = self.embedding(aspect_ratio_ids)
        return x + embedding.reshape(self.shape) * self.gate.tanh()  # [I, T, rows, V]


class PositionEmbedding(nn.Module):
    """A learned vector per patch, blended by a tanh gate with one per patch, tile and canvas shape."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.shape = (-1, config.max_num_tiles, config.num_patches, config.hidden_size)
        num_ids = len(config.supported_aspect_ratios) + 1
        self.gate = nn.Parameter(torch.empty(1))
        self.embedding = nn.Parameter(torch.empty(config.num_patches, config.hidden_size))
        self.tile_embedding = nn.Embedding(num_ids, config.max_num_tiles * config.num_patches * config.hidden_size)

    def forward(self, x: Tensor, aspect_ratio_ids: Tensor) -> Tensor:
        gate = self.gate.tanh()
        x = x + (1 - gate) * self.embedding  # [I, T, P, V]
        tile_embedding: Tensor = self.tile_embedding(aspect_ratio_ids)
        return x + gate * tile_embedding.reshape(self.shape)


class VisionAttention(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        dim = config.hidden_size
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim, bias=False) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        heads = (x.shape[0], x.shape[1], self.num_heads, self.head_dim)
        query, key, value = (
            proj(x).view(heads).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )  # [I, H, T*Q, D] each
        attended = masked_attention(query, key, value, mask)
        return self.o_proj(attended.transpose(1, 2).reshape(x.shape))  # type: ignore[no-any-return]


class VisionMLP(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))  # type: ignore[no-any-return]


class VisionLayer(nn.Module):
    """Pre-norm transformer layer; in the global transformer both branches pass a tanh gate."""

    def __init__(self, config: VisionConfig, *, is_gated: bool) -> None:
        super().__init__()
        self.self_attn, self.mlp = VisionAttention(config), VisionMLP(config)
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.is_gated = is_gated
        if is_gated:
            self.gate_attn, self.gate_ffn = nn.Parameter(torch.empty(1)), nn.Parameter(torch.empty(1))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x), mask)
        x = x + (self.gate_attn.tanh() * attended if self.is_gated else attended)
        transformed = self.mlp(self.post_attention_layernorm(x))
        return x + (self.gate_ffn.tanh() * transformed if self.is_gated else transformed)  # type: ignore[no-any-return]


class VisionTransformer(nn.Module):
    def __init__(self, config: VisionConfig, num_layers: int, *, is_gated: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList([VisionLayer(config, is_gated=is_gated) for _ in range(num_layers)])

    def forward(self, x: Tensor, mask: Tensor) -> list[Tensor]:
        """States before the first layer and after every layer, in order: (1 + num_layers) x [I, T*Q, V]."""
        states = [x]
        for layer in self.layers:
            x = layer(x, mask)
            states.append(x)
        return states


class VisionTower(nn.Module):
    def __init__(self, config: VisionConfig, vision_states: VisionStates) -> None:
        super().__init__()
        self.config = config
        after = int(vision_states == "transformers-4.56")
        self.taken_states = [index + after for index in config.intermediate_layers_indices]
        self.patch_embedding = nn.Conv2d(
            config.num_channels, config.hidden_size, config.patch_size, stride=config.patch_size, bias=False
        )
        self.class_embedding = nn.Parameter(torch.empty(config.hidden_size))
        self.gated_positional_embedding = PositionEmbedding(config)
        self.pre_tile_positional_embedding = AspectRatioEmbedding(config)
        self.post_tile_positional_embedding = AspectRatioEmbedding(config)
        self.layernorm_pre, self.layernorm_post = nn.LayerNorm(config.hidden_size), nn.LayerNorm(config.hidden_size)
        self.transformer = VisionTransformer(config, config.num_layers, is_gated=False)
        self.global_transformer = VisionTransformer(config, config.num_global_layers, is_gated=True)

    def forward(self, pixel_values: Tensor, aspect_ratio_ids: Tensor, aspect_ratio_mask: Tensor) -> Tensor:
        """[I, T, 3, size, size], [I], [I, T] -> features [I, T, P, V * (1 + intermediate layers)]."""
        config = self.config
        num_images, num_tiles, dim = pixel_values.shape[0], config.max_num_tiles, config.hidden_size
        padding = -config.num_patches % _ROW_MULTIPLE
        rows = config.num_patches + padding  # Q
        tiled, flat = (num_images, num_tiles, rows, dim), (num_images, num_tiles * rows, dim)

        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype).flatten(0, 1))
        x = patches.flatten(2).transpose(1, 2).reshape(num_images, num_tiles, config.num_patches - 1, dim)
        x = self.pre_tile_positional_embedding(x, aspect_ratio_ids)
        x = torch.cat([self.class_embedding.expand(num_images, num_tiles, 1, dim), x], dim=2)  # [I, T, P, V]
        x = self.layernorm_pre(self.gated_positional_embedding(x, aspect_ratio_ids))
        # Not F.pad, which ONNX Runtime has no kernel for in bfloat16.
        zeros = torch.scalar_tensor(0, dtype=x.dtype).expand(num_images, num_tiles, padding, dim)
        x = torch.cat([x, zeros], dim=2).reshape(flat)  # [I, T*Q, V]

        mask = self._attention_mask(aspect_ratio_mask, padding)
        states = self.transformer(x, mask)
        x = self.layernorm_post(states[-1]).reshape(tiled)
        x = self.post_tile_positional_embedding(x, aspect_ratio_ids).reshape(flat)
        final = self.global_transformer(x, mask)[-1]

        # Final state first, then the intermediate states interleaved: the last axis runs over features, then layers.
        chosen = torch.stack([states[index] for index in self.taken_states], dim=-1)
        features = torch.cat([final, chosen.flatten(2)], dim=-1)
        return features.reshape(num_images, num_tiles, rows, config.output_dim)[:, :, : config.num_patches]

    def _attention_mask(self, aspect_ratio_mask: Tensor, padding: int) -> Tensor:
        """Blocks padding rows from padding rows only: [I, T] -> bool [I, 1, T*Q, T*Q]."""
        is_real = (aspect_ratio_mask > 0).unsqueeze(-1).expand(-1, -1, self.config.num_patches)
        is_real = F.pad(is_real, (0, padding)).flatten(1)  # [I, T*Q]
        return (is_real.unsqueeze(-1) | is_real.unsqueeze(-2)).unsqueeze(1)


class CrossKeyValue(nn.Module):
    """The part of a cross-attention layer that depends on the picture alone."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.num_kv_heads, self.head_dim = config.num_kv_heads, config.head_dim
        kv_dim = config.num_kv_heads * config.head_dim
        self.k_proj = nn.Linear(config.hidden_size, kv_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_dim, bias=False)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """[I, T*P, E] -> key and value, [I, G, T*P, D] each."""
        heads = (states.shape[0], states.shape[1], self.num_kv_heads, self.head_dim)
        key, value = (proj(states).view(heads).transpose(1, 2) for proj in (self.k_proj, self.v_proj))
        return self.k_norm(key), value


class VisionEncoder(nn.Module):
    """`vision.onnx`: everything that is computed once per picture."""

    def __init__(self, config: ModelConfig, vision_states: VisionStates) -> None:
        super().__init__()
        self.vision_model = VisionTower(config.vision, vision_states)
        self.multi_modal_projector = nn.Linear(config.vision.output_dim, config.text.hidden_size)
        self.cross_layers = [CrossKeyValue(config.text) for _ in config.text.cross_attention_layers]
        layers = {
            str(layer): _named(cross_attn=module)
            for layer, module in zip(config.text.cross_attention_layers, self.cross_layers, strict=True)
        }
        self.language_model = _named(model=_named(layers=nn.ModuleDict(layers)))

    def forward(self, pixel_values: Tensor, aspect_ratio_ids: Tensor, aspect_ratio_mask: Tensor) -> list[Tensor]:
        """Key and value of every cross-attention layer in turn, [I, G, T*P, D] each."""
        features = self.vision_model(pixel_values, aspect_ratio_ids, aspect_ratio_mask)
        states = self.multi_modal_projector(features).flatten(1, 2)  # [I, T*P, E]
        return [tensor for layer in self.cross_layers for tensor in layer(states)]


def _named(**children: nn.Module) -> nn.Module:
    """A container whose children carry the names the checkpoint gives them."""
    container = nn.Module()
    for name, child in children.items():
        container.add_module(name, child)
    return container
