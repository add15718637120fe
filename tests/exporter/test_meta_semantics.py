"""Meta semantics against an independent decoder in float64, written here from the description.

A token that sees no picture takes nothing from a cross-attention layer: both of its residual branches are masked. (In
hf semantics only the MLP branch is; see https://github.com/huggingface/transformers/issues/39379.)
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from mllama_runtime.backends.ort import OrtBackend
from mllama_runtime.bundle import Bundle
from mllama_runtime.prompt import image_visibility
from reference import Reference, padded_mask
from safetensors.torch import load_file
from torch import Tensor

from .test_parity import BAR, CASES, Case, pictures, run, token_ids

LOGITS_BAR = 4e-6  # of the largest logit, which is 8 to 12; 1.9e-6 is the largest difference that was seen


class MetaDecoder:
    """The text model, one row, no cache, float64."""

    def __init__(self, folder: Path) -> None:
        shards = sorted(folder.glob("*.safetensors"))
        self.weights = {name: w.double() for shard in shards for name, w in load_file(shard).items()}
        self.config = json.loads((folder / "config.json").read_text())["text_config"]
        self.num_heads = self.config["num_attention_heads"]
        self.head_dim = self.config["hidden_size"] // self.num_heads
        self.group = self.num_heads // self.config["num_key_value_heads"]

    def logits(self, ids: list[int], cross: Mapping[str, Tensor], sees: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """cross: keys and values [G, rows, D] by name; sees: bool [seq, rows]. Last token's logits and the caches."""
        x = self.weights["language_model.model.embed_tokens.weight"][ids]
        has_image = sees.any(1, keepdim=True).double()
        caches: dict[str, Tensor] = {}
        for layer in range(self.config["num_hidden_layers"]):
            prefix = f"language_model.model.layers.{layer}."
            if layer in self.config["cross_attention_layers"]:
                if not cross:
                    continue
                gate = {kind: self.weights[f"{prefix}cross_attn_{kind}_gate"].tanh() for kind in ("attn", "mlp")}
                attended = self.cross_attention(prefix, self.norm(x, f"{prefix}input_layernorm"), layer, cross, sees)
                x = x + gate["attn"] * attended * has_image
                x = x + gate["mlp"] * self.mlp(prefix, self.norm(x, f"{prefix}post_attention_layernorm")) * has_image
            else:
                attended, key, value = self.self_attention(prefix, self.norm(x, f"{prefix}input_layernorm"))
                caches |= {f"past_key_{layer}": key, f"past_value_{layer}": value}
                x = x + attended
                x = x + self.mlp(prefix, self.norm(x, f"{prefix}post_attention_layernorm"))
        last = self.norm(x[-1], "language_model.model.norm")
        return last @ self.weights["language_model.lm_head.weight"].T, caches

    def norm(self, x: Tensor, name: str) -> Tensor:
        scale = (x.pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"]).rsqrt()
        return x * scale * self.weights[f"{name}.weight"]

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T

    def heads(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), -1, self.head_dim).transpose(0, 1)  # [heads, seq, D]

    def mlp(self, prefix: str, x: Tensor) -> Tensor:
        gate = torch.nn.functional.silu(self.linear(x, f"{prefix}mlp.gate_proj"))
        return self.linear(gate * self.linear(x, f"{prefix}mlp.up_proj"), f"{prefix}mlp.down_proj")

    def attention(self, query: Tensor, key: Tensor, value: Tensor, sees: Tensor) -> Tensor:
        key, value = (kv.repeat_interleave(self.group, dim=0) for kv in (key, value))
        scores = query @ key.transpose(1, 2) / math.sqrt(self.head_dim)
        weights = scores.masked_fill(~sees, -math.inf).softmax(-1).nan_to_num(0.0)  # a row that sees nothing: zero
        return (weights @ value).transpose(0, 1).flatten(1)

    def self_attention(self, prefix: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = (self.heads(self.linear(x, f"{prefix}self_attn.{kind}_proj")) for kind in "qkv")
        query, key = self.rotated(query), self.rotated(key)
        causal = torch.ones(len(x), len(x), dtype=torch.bool).tril()
        return self.linear(self.attention(query, key, value, causal), f"{prefix}self_attn.o_proj"), key, value

    def cross_attention(self, prefix: str, x: Tensor, layer: int, cross: Mapping[str, Tensor], sees: Tensor) -> Tensor:
        query = self.norm(self.heads(self.linear(x, f"{prefix}cross_attn.q_proj")), f"{prefix}cross_attn.q_norm")
        attended = self.attention(query, cross[f"cross_key_{layer}"], cross[f"cross_value_{layer}"], sees)
        return self.linear(attended, f"{prefix}cross_attn.o_proj")

    def rotated(self, x: Tensor) -> Tensor:
        """Llama 3.1's rotary embedding: slow frequencies stretched, those between blended."""
        rope, half = self.config["rope_scaling"], self.head_dim // 2
        frequencies = []
        for index in range(half):
            frequency = self.config["rope_theta"] ** (-index / half)
            turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
            blend = (turns - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
            blend = min(max(blend, 0.0), 1.0)
            frequencies.append(frequency * (blend + (1 - blend) / rope["factor"]))
        angles = torch.arange(x.shape[1])[:, None] * torch.tensor(frequencies, dtype=torch.float64)
        first, second = x[..., :half], x[..., half:]
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


@pytest.fixture(scope="module")
def meta(miniature: Path) -> MetaDecoder:
    return MetaDecoder(miniature)


@pytest.fixture(scope="module")
def reference(miniature: Path) -> Reference:
    return Reference(miniature, torch.float64)


@pytest.mark.parametrize("standard", [False, True], ids=["twin", "standard"])
@pytest.mark.parametrize("case", CASES[7:], ids=lambda case: case.name)
def test_meta_semantics(case: Case, standard: bool, bundle_of, meta: MetaDecoder, reference: Reference) -> None:
    with OrtBackend(Bundle.open(bundle_of("fp32", "meta")), 1, standard=standard) as backend:
        images = pictures(backend._bundle.root, case.canvases)
        logits, cached, _ = run(backend, case, images, "meta")
        model = backend._bundle.manifest.model
    ids = token_ids(case, model.image_token_id)
    mask = padded_mask(image_visibility(ids, model.image_token_id, [i.num_tiles for i in images]), images)
    step = reference.step(ids, images, mask)  # the vision half is the same in both semantics
    cross = {name: torch.tensor(array).double().movedim(1, 0).flatten(1, -2) for name, array in step.cross.items()}
    sees = torch.tensor(mask).repeat_interleave(model.vision.num_patches, dim=1)
    expected, caches = meta.logits(ids, cross, sees)
    assert caches.keys() == cached.keys()
    assert np.abs(logits - expected.numpy()).max() <= LOGITS_BAR * np.abs(expected.numpy()).max()
    for name, array in cached.items():
        assert np.abs(array[0] - caches[name].numpy()).max() <= BAR, name
    if "before" in case.name:  # and the two semantics do differ
        assert np.abs(step.logits - expected.numpy()).max() > 10 * BAR
