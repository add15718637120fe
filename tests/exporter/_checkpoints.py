"""Small random checkpoints in every form that is published, made with transformers and safetensors alone."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import MllamaConfig, MllamaForConditionalGeneration

ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

TINY: dict[str, Any] = {
    "model_type": "mllama",
    "architectures": ["MllamaForConditionalGeneration"],
    "image_token_index": 64,
    "torch_dtype": "bfloat16",
    "text_config": {
        "model_type": "mllama_text_model",
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "cross_attention_layers": [1, 3],
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "rope_theta": 500000.0,
        "rope_scaling": ROPE,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "vision_config": {
        "model_type": "mllama_vision_model",
        "hidden_size": 32,
        "attention_heads": 2,
        "num_hidden_layers": 3,
        "num_global_layers": 2,
        "intermediate_size": 64,
        "intermediate_layers_indices": [0, 2],
        "vision_output_dim": 96,
        "image_size": 28,
        "patch_size": 14,
        "max_num_tiles": 4,
        "num_channels": 3,
        "norm_eps": 1e-5,
        "hidden_act": "gelu",
        "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
    },
}
"""A config.json in the published form, with small sizes."""


def tiny(
    *, text: Mapping[str, Any] | None = None, vision: Mapping[str, Any] | None = None, **root: Any
) -> dict[str, Any]:
    """`TINY` with fields replaced, of the text configuration, the vision configuration or at the top."""
    config = copy.deepcopy(TINY)
    config["text_config"] |= text or {}
    config["vision_config"] |= vision or {}
    return config | root


def full_size(*, image_size: int = 560, large: bool = False) -> dict[str, Any]:
    """The published dimensions: 11B or 90B, Instruct (560 pixels) or base (448)."""
    num_layers = 100 if large else 40
    text = {
        "vocab_size": 128256,
        "hidden_size": 8192 if large else 4096,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 64 if large else 32,
        "num_key_value_heads": 8,
        "intermediate_size": 28672 if large else 14336,
        "cross_attention_layers": list(range(3, num_layers, 5)),
        "max_position_embeddings": 131072,
        "rope_scaling": ROPE | {"original_max_position_embeddings": 8192},
    }
    vision = {
        "hidden_size": 1280,
        "attention_heads": 16,
        "num_hidden_layers": 32,
        "num_global_layers": 8,
        "intermediate_size": 5120,
        "intermediate_layers_indices": [3, 7, 15, 23, 30],
        "vision_output_dim": 7680,
        "image_size": image_size,
    }
    return tiny(text=text, vision=vision, image_token_index=128256)


def as_transformers_5(config: dict[str, Any]) -> dict[str, Any]:
    """The same configuration as transformers 5 writes it."""
    config = copy.deepcopy(config)
    text = config["text_config"]
    scaling = text.pop("rope_scaling") or {"rope_type": "default"}
    text["rope_parameters"] = scaling | {"rope_theta": text.pop("rope_theta")}
    return config


@cache
def tiny_tensors() -> Mapping[str, torch.Tensor]:
    """Random tensors of `TINY` under their published names, float32; gates are not zero."""
    torch.manual_seed(0)
    model = MllamaForConditionalGeneration(MllamaConfig.from_dict(tiny()))
    renamed = {
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
        "model.vision_model.": "vision_model.",
        "model.multi_modal_projector.": "multi_modal_projector.",
    }
    tensors = {}
    for name, tensor in model.state_dict().items():
        new, old = next((new, old) for new, old in renamed.items() if name.startswith(new))
        tensors[old + name.removeprefix(new)] = torch.randn(tensor.shape) * 0.1
    return tensors


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, torch.Tensor] | None = None,
    *,
    config: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    num_shards: int = 1,
) -> Path:
    """A checkpoint folder; with more than one shard, tensors are dealt out in turn and an index is written."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config or TINY))
    tensors = {
        name: tensor.to(dtype) if tensor.dtype == torch.float32 else tensor
        for name, tensor in (tiny_tensors() if tensors is None else tensors).items()
    }
    if num_shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names = [f"model-{index:05}-of-{num_shards:05}.safetensors" for index in range(1, num_shards + 1)]
    weight_map = {name: names[index % num_shards] for index, name in enumerate(tensors)}
    for shard in names:
        save_file({name: tensors[name] for name in tensors if weight_map[name] == shard}, folder / shard)
    write_index(folder, weight_map)
    return folder


def write_index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def read_index(folder: Path) -> dict[str, str]:
    weight_map: dict[str, str] = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return weight_map
