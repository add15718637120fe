"""The miniature's configuration and its checkpoint in the form in which Llama 3.2 Vision was published.

`train.py` builds the model here and writes it back through `save_checkpoint`: BF16 shards with the published key
names (`language_model.model...`), the older config.json, generation_config.json, licence files.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from mllama_exporter.reference_tower import take_states
from pictures import CANVASES, TILE
from safetensors.torch import save_file
from tokenizer import SPECIAL_TOKENS, TOKEN_IDS, VOCAB_SIZE, write_json, write_processor_files
from tokenizers import Tokenizer
from transformers import MllamaConfig, MllamaForConditionalGeneration

HERE = Path(__file__).parent
BEGIN, END, PAD = (TOKEN_IDS[SPECIAL_TOKENS[index]] for index in (0, 1, 4))
EOS_IDS = [END, TOKEN_IDS["<|eom_id|>"], TOKEN_IDS["<|eot_id|>"]]
IMAGE_ID = VOCAB_SIZE
MAX_SHARD_BYTES = 6_000_000


def text_config() -> dict[str, Any]:
    return {
        "bos_token_id": BEGIN,
        "cross_attention_layers": [1, 3],
        "dropout": 0,
        "eos_token_id": EOS_IDS,
        "hidden_act": "silu",
        "hidden_size": 256,
        "initializer_range": 0.02,
        "intermediate_size": 512,
        "max_position_embeddings": 131072,
        "model_type": "mllama_text_model",
        "num_attention_heads": 4,
        "num_hidden_layers": 6,
        "num_key_value_heads": 2,
        "pad_token_id": PAD,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": VOCAB_SIZE,
    }


def vision_config() -> dict[str, Any]:
    hidden_size, intermediate_layers = 128, [1, 2]
    return {
        "attention_heads": 2,
        "hidden_act": "gelu",
        "hidden_size": hidden_size,
        "image_size": TILE,
        "initializer_range": 0.02,
        "intermediate_layers_indices": intermediate_layers,
        "intermediate_size": 512,
        "max_num_tiles": 4,
        "model_type": "mllama_vision_model",
        "norm_eps": 1e-05,
        "num_channels": 3,
        "num_global_layers": 2,
        "num_hidden_layers": 3,
        "patch_size": 14,
        "supported_aspect_ratios": [list(canvas) for canvas in CANVASES],
        "torch_dtype": "bfloat16",
        "vision_output_dim": hidden_size * (1 + len(intermediate_layers)),
    }


def model_config() -> dict[str, Any]:
    """config.json as published in 2024: `rope_theta` and `rope_scaling` in the text part, `torch_dtype`."""
    return {
        "architectures": ["MllamaForConditionalGeneration"],
        "image_token_index": IMAGE_ID,
        "model_type": "mllama",
        "text_config": text_config(),
        "torch_dtype": "bfloat16",
        "transformers_version": "4.45.0.dev0",
        "vision_config": vision_config(),
    }


def generation_config() -> dict[str, Any]:
    return {
        "bos_token_id": BEGIN,
        "do_sample": False,
        "eos_token_id": EOS_IDS,
        "pad_token_id": PAD,
        "transformers_version": "4.45.0.dev0",
    }


def build_model(seed: int) -> MllamaForConditionalGeneration:
    """A fresh model, whose vision tower takes the published states whatever transformers is installed.

    All gates start open: closed ones (the default) would hide the picture for a long time.
    """
    torch.manual_seed(seed)
    model = MllamaForConditionalGeneration(MllamaConfig(**model_config()))
    vision = model.model.vision_model
    take_states(vision, "published")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("attn_gate", "mlp_gate", "gate_attn", "gate_ffn")):
                parameter.fill_(1.0)
            elif name.endswith("embedding.gate"):
                parameter.fill_(0.6)
        position = vision.gated_positional_embedding
        tiles = (vision.pre_tile_positional_embedding, vision.post_tile_positional_embedding)
        for weight in (position.embedding, position.tile_embedding.weight, *(tile.embedding.weight for tile in tiles)):
            weight.normal_(std=0.1)
    return model.float().train()  # the config asks for bfloat16; train in float32


def published_name(name: str) -> str:
    """The key under which Llama 3.2 Vision published a parameter, from its name in transformers 5."""
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    name = name.removeprefix("model.")
    prefix = "language_model."
    return f"{prefix}model.{name.removeprefix(prefix)}" if name.startswith(prefix) else name


def shards(tensors: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Tensors in order, a new shard where one more would pass the limit."""
    parts: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if parts[-1] and size + tensor.nbytes > MAX_SHARD_BYTES:
            parts.append({})
            size = 0
        parts[-1][name] = tensor
        size += tensor.nbytes
    return parts


def with_distinct_norms(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same function with query and key norms that differ: one times powers of two, the other divided by them.

    Scores have only their product, so training gives both the same gradients, and they would end up equal: whoever
    mixed them up would see nothing.
    """
    distinct = dict(state)
    for name in [name for name in state if name.endswith("cross_attn.q_norm.weight")]:
        powers = 2.0 ** (torch.arange(len(state[name])) % 3 - 1)
        other = name.replace("q_norm", "k_norm")
        distinct[name], distinct[other] = state[name] * powers, state[other] / powers
    return distinct


def write_weights(state: dict[str, torch.Tensor], folder: Path) -> None:
    state = with_distinct_norms(state)
    tensors = {published_name(name): value.detach().to(torch.bfloat16).contiguous() for name, value in state.items()}
    parts = shards(dict(sorted(tensors.items())))
    weight_map = {}
    for index, part in enumerate(parts, start=1):
        file_name = f"model-{index:05d}-of-{len(parts):05d}.safetensors"
        save_file(part, folder / file_name, metadata={"format": "pt"})
        (folder / file_name).chmod(0o644)
        weight_map.update(dict.fromkeys(part, file_name))
    total = sum(tensor.nbytes for tensor in tensors.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def save_checkpoint(state: dict[str, torch.Tensor], folder: Path, tokenizer: Tokenizer) -> None:
    """Writes beside `folder` and swaps, so that a reader never meets half a checkpoint."""
    fresh = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    write_processor_files(fresh, tokenizer)
    write_json(fresh / "config.json", model_config())
    write_json(fresh / "generation_config.json", generation_config())
    write_weights(state, fresh)
    for name in ("LICENSE", "NOTICE"):
        shutil.copyfile(HERE / name, fresh / name)
    old = folder.with_name(f"{folder.name}.old")
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def num_parameters(folder: Path) -> int:
    """Parameters of a checkpoint, from the size that its index states."""
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    return int(index["metadata"]["total_size"]) // 2
