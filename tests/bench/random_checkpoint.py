"""Checkpoints of any size with random weights, in the published layout: for benchmarks and memory tests.

    python tests/bench/random_checkpoint.py DIR --size midsize

Weights are streamed, so the size is bounded by the disk alone, and drawn on all cores. The same seed gives the same
weights on any number of them. The tokenizer is the miniature's, padded with unused entries to the model's vocabulary.
With --sparse the weights are zeros but for one in each tensor, and take hardly any disk: for structure and memory.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
from mllama_exporter.checkpoints.checkpoint import Shape, expected_tensors
from mllama_exporter.sizing import PUBLISHED
from mllama_runtime.config import ModelConfig, RopeConfig, TextConfig, VisionConfig
from mllama_runtime.tensorfile import encode_header

MINIATURE = Path(__file__).parents[2] / "recipes" / "miniature" / "checkpoint"
_BLOCK = 1 << 22  # elements generated at once
Block = tuple[int, int, int, int, float, float]
"""Seed, tensor, its first element, how many; standard deviation and mean."""

_RATIOS = ((1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1))

MIDSIZE = ModelConfig(
    vision=VisionConfig(
        hidden_size=320,
        num_heads=4,
        num_layers=4,
        num_global_layers=2,
        intermediate_size=1280,
        intermediate_layers_indices=(0, 2),
        image_size=224,
        patch_size=14,
        max_num_tiles=4,
        supported_aspect_ratios=_RATIOS,
        norm_eps=1e-5,
        hidden_act="gelu",
    ),
    text=TextConfig(
        vocab_size=32064,
        hidden_size=1024,
        num_layers=15,
        num_heads=16,
        num_kv_heads=4,
        intermediate_size=3584,
        rms_norm_eps=1e-5,
        max_seq_len=16384,
        cross_attention_layers=(3, 8, 13),
        rope=RopeConfig("llama3", 500000.0, 8.0, 1.0, 4.0, 8192),
    ),
    image_token_id=32064,
)
INSTRUCT_11B, INSTRUCT_90B = PUBLISHED["11b"], PUBLISHED["90b"]
BASE_11B = replace(INSTRUCT_11B, vision=replace(INSTRUCT_11B.vision, image_size=448))
GUARD_11B = INSTRUCT_11B  # Llama Guard 3 11B Vision is tuned from it
SIZES = {
    "midsize": MIDSIZE,
    "11b": BASE_11B,
    "11b-instruct": INSTRUCT_11B,
    "guard-3-11b": GUARD_11B,
    "90b-instruct": INSTRUCT_90B,
}
_SHARD_BYTES = 5 * 10**9  # as in the published checkpoints


def write_random_checkpoint(folder: Path, config: ModelConfig, *, seed: int = 0, sparse: bool = False) -> None:
    """A BF16 checkpoint: matrices ~ N(0, 1/columns), norms near 1, gates at 0.5, so that activations stay tame."""
    folder.mkdir(parents=True)
    shards = _shards(expected_tensors(config))
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{index:05}-of-{len(shards):05}.safetensors" for index in range(1, len(shards) + 1)]
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    first = 0
    for name, shard in zip(names, shards, strict=True):
        (_write_sparse if sparse else _write_drawn)(folder / name, shard, seed, first)
        first += len(shard)
    (folder / "config.json").write_text(json.dumps(_hf_config(config), indent=2))
    _write_tokenizer(folder, config)
    preprocessor = json.loads((MINIATURE / "preprocessor_config.json").read_text())
    preprocessor["size"] = {"height": config.vision.image_size, "width": config.vision.image_size}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    for name in ("chat_template.jinja", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(MINIATURE / name, folder / name)


def _shards(shapes: dict[str, Shape]) -> list[dict[str, Shape]]:
    shards: list[dict[str, Shape]] = [{}]
    size = 0
    for name, shape in shapes.items():
        size += 2 * math.prod(shape)
        if shards[-1] and size > _SHARD_BYTES:
            shards.append({})
            size = 2 * math.prod(shape)
        shards[-1][name] = shape
    return shards


def _write_drawn(path: Path, shapes: dict[str, Shape], seed: int, first: int) -> None:
    """first: the number of the file's first tensor."""
    header, infos = encode_header((name, "BF16", shape) for name, shape in shapes.items())
    num_threads = len(os.sched_getaffinity(0))
    with path.open("wb") as file, ThreadPoolExecutor(num_threads) as threads:
        file.write(header)
        blocks = (
            (seed, index, start, min(_BLOCK, math.prod(info.shape) - start), *_distribution(info.name, info.shape))
            for index, info in enumerate(infos, start=first)
            for start in range(0, math.prod(info.shape), _BLOCK)
        )
        for group in _groups(blocks, num_threads):  # what is drawn ahead stays in memory
            file.writelines(threads.map(_drawn, group))


def _write_sparse(path: Path, shapes: dict[str, Shape], seed: int, first: int) -> None:
    header, infos = encode_header((name, "BF16", shape) for name, shape in shapes.items())
    with path.open("wb") as file:
        file.write(header)
        for info in infos:
            file.seek(info.offset_bytes)
            file.write(b"\x00\x3f")  # 0.5
        file.truncate(len(header) + sum(info.size_bytes for info in infos))


def _groups(blocks: Iterator[Block], size: int) -> Iterator[list[Block]]:
    while group := list(islice(blocks, size)):
        yield group


def _drawn(block: Block) -> bytes:
    seed, tensor, start, count, scale, offset = block
    rng = np.random.default_rng((seed, tensor, start))
    values = rng.standard_normal(count, np.float32) * np.float32(scale) + np.float32(offset)
    return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()


def _distribution(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    if "norm" in name and name.endswith("weight"):
        return 0.02, 1.0
    if math.prod(shape) == 1:
        return 0.0, 0.5
    return shape[-1] ** -0.5 if len(shape) > 1 else 0.02, 0.0


def _hf_config(config: ModelConfig) -> dict[str, object]:
    vision, text = config.vision, config.text
    return {
        "architectures": ["MllamaForConditionalGeneration"],
        "model_type": "mllama",
        "image_token_index": config.image_token_id,
        "torch_dtype": "bfloat16",
        "vision_config": {
            "model_type": "mllama_vision_model",
            "hidden_size": vision.hidden_size,
            "attention_heads": vision.num_heads,
            "num_hidden_layers": vision.num_layers,
            "num_global_layers": vision.num_global_layers,
            "intermediate_size": vision.intermediate_size,
            "intermediate_layers_indices": list(vision.intermediate_layers_indices),
            "vision_output_dim": vision.output_dim,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "max_num_tiles": vision.max_num_tiles,
            "supported_aspect_ratios": [list(ratio) for ratio in vision.supported_aspect_ratios],
            "norm_eps": vision.norm_eps,
            "hidden_act": vision.hidden_act,
            "num_channels": vision.num_channels,
        },
        "text_config": {
            "model_type": "mllama_text_model",
            "vocab_size": text.vocab_size,
            "hidden_size": text.hidden_size,
            "num_hidden_layers": text.num_layers,
            "num_attention_heads": text.num_heads,
            "num_key_value_heads": text.num_kv_heads,
            "intermediate_size": text.intermediate_size,
            "rms_norm_eps": text.rms_norm_eps,
            "max_position_embeddings": text.max_seq_len,
            "cross_attention_layers": list(text.cross_attention_layers),
            "hidden_act": text.hidden_act,
            "rope_theta": text.rope.theta,
            "rope_scaling": {
                "rope_type": text.rope.rope_type,
                "factor": text.rope.factor,
                "low_freq_factor": text.rope.low_freq_factor,
                "high_freq_factor": text.rope.high_freq_factor,
                "original_max_position_embeddings": text.rope.original_max_position_embeddings,
            },
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 2,
            "tie_word_embeddings": False,
        },
    }


def _write_tokenizer(folder: Path, config: ModelConfig) -> None:
    tokenizer = json.loads((MINIATURE / "tokenizer.json").read_text())
    vocab, size = tokenizer["model"]["vocab"], config.text.vocab_size
    for token in tokenizer["added_tokens"]:
        if token["content"] == "<|image|>":
            vocab.pop("<|image|>", None)
            token["id"] = size
    taken = {*vocab.values(), *(token["id"] for token in tokenizer["added_tokens"])}
    vocab |= {f"unused {token_id}": token_id for token_id in range(size) if token_id not in taken}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def with_layers(config: ModelConfig, num_layers: int) -> ModelConfig:
    """The same widths with fewer decoder layers, for disks that do not hold the whole."""
    cross = tuple(layer for layer in config.text.cross_attention_layers if layer < num_layers)
    return replace(config, text=replace(config.text, num_layers=num_layers, cross_attention_layers=cross))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=SIZES, default="midsize")
    parser.add_argument("--layers", type=int, help="keep only so many decoder layers")
    parser.add_argument("--sparse", action="store_true", help="zeros that take no disk")
    arguments = parser.parse_args()
    chosen = SIZES[arguments.size]
    if arguments.layers:
        chosen = with_layers(chosen, arguments.layers)
    write_random_checkpoint(arguments.folder, chosen, sparse=arguments.sparse)
