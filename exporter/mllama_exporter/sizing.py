"""What a model takes, from its dimensions alone: weights by precision, memory on a GPU, and the decode roofline.

Weights follow what `export` and `quantize` write, memory is the runtime's own arithmetic (`mllama_runtime.memory`), and
activations are an estimate: see `workspace_bytes`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import get_args

from mllama_runtime.config import ModelConfig, RopeConfig, TextConfig, VisionConfig
from mllama_runtime.engine_record import Limits
from mllama_runtime.manifest import BasePrecision, DType, Precision, QuantizedPrecision
from mllama_runtime.memory import MemoryPlan, memory_plan
from mllama_runtime.roofline import cache_bytes

from mllama_exporter.checkpoints.checkpoint import Shape, expected_tensors
from mllama_exporter.engines.preflight import build_memory_bytes
from mllama_exporter.quantize.scheme import SCHEMES, num_blocks

PRECISIONS: tuple[Precision, ...] = (*get_args(BasePrecision), *get_args(QuantizedPrecision))
_BASE_BYTES: Mapping[str, int] = {"fp32": 4, "fp16": 2, "bf16": 2}  # quantised bundles are of an FP16 or BF16 one
_STORED_BYTES: Mapping[str, float] = {"I8": 1, "F8_E4M3": 1, "I4": 0.5}
_WORKSPACE_BASE_BYTES = 10 * 10**6
_RESERVED_BYTES = 2**30  # for CUDA's context and TensorRT's kernels: an assumption


@dataclass(frozen=True, slots=True)
class Gpu:
    """What its data sheet says. bandwidth: bytes a second."""

    memory_bytes: int
    bandwidth: float | None
    compute_capability: str | None = None


_PUBLISHED_11B = ModelConfig(
    vision=VisionConfig(
        hidden_size=1280,
        num_heads=16,
        num_layers=32,
        num_global_layers=8,
        intermediate_size=5120,
        intermediate_layers_indices=(3, 7, 15, 23, 30),
        image_size=560,
        patch_size=14,
        max_num_tiles=4,
        supported_aspect_ratios=((1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1)),
        norm_eps=1e-5,
        hidden_act="gelu",
    ),
    text=TextConfig(
        vocab_size=128256,
        hidden_size=4096,
        num_layers=40,
        num_heads=32,
        num_kv_heads=8,
        intermediate_size=14336,
        rms_norm_eps=1e-5,
        max_seq_len=131072,
        cross_attention_layers=tuple(range(3, 40, 5)),
        rope=RopeConfig("llama3", 500000.0, 8.0, 1.0, 4.0, 8192),
    ),
    image_token_id=128256,
)
_TEXT_90B = replace(
    _PUBLISHED_11B.text,
    hidden_size=8192,
    num_layers=100,
    num_heads=64,
    intermediate_size=28672,
    cross_attention_layers=tuple(range(3, 100, 5)),
)
PUBLISHED: Mapping[str, ModelConfig] = {"11b": _PUBLISHED_11B, "90b": replace(_PUBLISHED_11B, text=_TEXT_90B)}
"""Llama 3.2 Vision Instruct; Llama Guard 3 11B Vision has the dimensions of 11b."""

# NVIDIA's data sheets of 2022 to 2025; memory in GiB, bandwidth in 10**9 bytes a second.
GPUS: Mapping[str, Gpu] = {
    "l4": Gpu(24 * 2**30, 300e9, "8.9"),
    "a10g": Gpu(24 * 2**30, 600e9, "8.6"),
    "rtx4090": Gpu(24 * 2**30, 1008e9, "8.9"),
    "rtx5090": Gpu(32 * 2**30, 1792e9, "12.0"),
    "a100-40": Gpu(40 * 2**30, 1555e9, "8.0"),
    "l40s": Gpu(48 * 2**30, 864e9, "8.9"),
    "rtx6000ada": Gpu(48 * 2**30, 960e9, "8.9"),
    "a100-80": Gpu(80 * 2**30, 2039e9, "8.0"),
    "h100": Gpu(80 * 2**30, 3350e9, "9.0"),
    "rtxpro6000": Gpu(96 * 2**30, 1792e9, "12.0"),
    "h200": Gpu(141 * 10**9, 4800e9, "9.0"),
    "b200": Gpu(180 * 10**9, 8000e9, "10.0"),
}


@dataclass(frozen=True, slots=True)
class Weights:
    """Bytes of a precision's weights. text, picture: what a decode step reads of them, without and with a picture."""

    total_bytes: int
    decoder_bytes: int
    text_bytes: int
    picture_bytes: int


@dataclass(frozen=True, slots=True)
class Fit:
    """A precision on a GPU.

    memory: of the limits asked for. batch: the most rows of that length; 0 if not even one fits. seq_len: the most
    tokens of a single row; 0 likewise. tokens_per_second: what bandwidth allows at batch 1, with half of the cache
    filled; None where none is known. build_bytes: host memory to build its engines.
    """

    precision: Precision
    weights_bytes: int
    build_bytes: int
    memory: MemoryPlan
    fits: bool
    batch: int
    seq_len: int
    text_tokens_per_second: float | None
    picture_tokens_per_second: float | None


def weights_of(model: ModelConfig, precision: Precision) -> Weights:
    """Of a bundle whose vision graph is not quantised."""
    total = decoder = text = picture = 0
    unread = tuple(f"language_model.model.layers.{layer}." for layer in model.cross_layers)
    for name, shape in expected_tensors(model).items():
        size = _stored_bytes(name, shape, precision)
        total += size
        if not _is_in_decoder(name):
            continue
        decoder += size
        read = size // shape[0] if "embed_tokens" in name else size
        picture += read
        text += 0 if name.startswith(unread) else read
    return Weights(total, decoder, text, picture)


def _is_in_decoder(name: str) -> bool:
    """Keys and values of pictures are made by the vision graph."""
    return name.startswith("language_model.") and ".cross_attn.k_" not in name and ".cross_attn.v_" not in name


def _stored_bytes(name: str, shape: Shape, precision: Precision) -> int:
    base = _BASE_BYTES.get(precision, 2)
    scheme = next((scheme for scheme in SCHEMES.values() if scheme.name == precision), None)
    is_matrix = _is_in_decoder(name) and len(shape) == 2 and "embed_tokens" not in name
    if scheme is None or not is_matrix or (scheme.block_size and shape[1] % scheme.block_size):
        return math.prod(shape) * base
    scales = shape[0] * num_blocks(scheme, shape[1])
    return int(math.prod(shape) * _STORED_BYTES[scheme.dtype]) + scales * base


def cache_dtype(precision: Precision) -> DType:
    return "float32" if precision == "fp32" else "float16"


def workspace_bytes(model: ModelConfig, limits: Limits, precision: Precision) -> int:
    """An estimate of what an engine takes for activations: the largest of pictures, a prompt's chunk and sampling.

    A rule fitted to TensorRT-RTX 1.7.1's own figures for 14 engines in FP16 of two small models: it is 16% below to 8%
    above those of one of 0.3 billion parameters, and 1.2 to 2.4 times those of the miniature.
    """
    text, vision, item = model.text, model.vision, _BASE_BYTES.get(precision, 2)
    tokens = 2 * limits.prefill_chunk  # the profile for prompts takes two rows
    states = tokens * (5 * text.hidden_size + 2 * text.intermediate_size) * item
    mask = int(9.5 * tokens * limits.max_seq_len)
    sampling = 30 * limits.max_batch * text.vocab_size
    rows = limits.max_batch * vision.max_num_tiles * vision.num_patches
    pictures = rows * (2 * vision.hidden_size + 2 * vision.intermediate_size + vision.output_dim) * item
    return _WORKSPACE_BASE_BYTES + max(states, mask, sampling, 0 if model.is_text_only else pictures)


def plan_of(model: ModelConfig, limits: Limits, precision: Precision) -> MemoryPlan:
    """All device and page-locked memory of an engine."""
    return memory_plan(
        model,
        limits,
        cache_dtype=cache_dtype(precision),
        weights_bytes=weights_of(model, precision).total_bytes,
        workspace_bytes=workspace_bytes(model, limits, precision),
    )


def fit(model: ModelConfig, limits: Limits, precision: Precision, gpu: Gpu) -> Fit:
    """How a precision stands on a GPU."""
    room = gpu.memory_bytes - _RESERVED_BYTES
    weights = weights_of(model, precision)

    def takes(batch: int, seq_len: int) -> int:
        sizes = replace(limits, max_batch=batch, max_seq_len=seq_len, prefill_chunk=min(limits.prefill_chunk, seq_len))
        return plan_of(model, sizes, precision).device_bytes

    memory = plan_of(model, limits, precision)
    dtype, num_cached = cache_dtype(precision), limits.max_seq_len // 2
    tiles = 0 if model.is_text_only else model.vision.max_num_tiles
    seconds = [
        None
        if gpu.bandwidth is None
        else gpu.bandwidth / (read + cache_bytes(model, num_cached=num_cached, num_tiles=seen, dtype=dtype))
        for read, seen in ((weights.text_bytes, 0), (weights.picture_bytes, tiles))
    ]
    return Fit(
        precision=precision,
        weights_bytes=weights.total_bytes,
        build_bytes=build_memory_bytes(weights.decoder_bytes),
        memory=memory,
        fits=memory.device_bytes <= room,
        batch=_largest(lambda batch: takes(batch, limits.max_seq_len) <= room, 4096),
        seq_len=_largest(lambda seq_len: takes(1, seq_len) <= room, model.text.max_seq_len),
        text_tokens_per_second=seconds[0],
        picture_tokens_per_second=None if model.is_text_only else seconds[1],
    )


def _largest(holds: Callable[[int], bool], limit: int) -> int:
    """The largest number up to the limit that holds, where all below it do; 0 if none does."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low
