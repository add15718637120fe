"""The public names and shapes of the graphs: what the exporter makes and what a back end expects to find.

A string in a shape is a symbol; a multiple of one is written "1601*num_tiles". See the graphs' modules for meanings.
"""

from __future__ import annotations

from mllama_runtime.config import ModelConfig

MAX_LOGITS = 16
"""Tokens of a row whose logits one step of an engine gives at most: a draft of speculative decoding and one more."""

SAMPLER_OPTIONS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
"""Columns of the sampler graph's `options`, named as in `SamplingParams`."""

Shape = tuple[int | str, ...]
Shapes = dict[str, Shape]


def vision_shapes(config: ModelConfig) -> tuple[Shapes, Shapes]:
    """Inputs and outputs of `vision.onnx`, in order."""
    vision, text = config.vision, config.text
    inputs: Shapes = {
        "pixel_values": ("images", vision.max_num_tiles, vision.num_channels, vision.image_size, vision.image_size),
        "aspect_ratio_ids": ("images",),
        "aspect_ratio_mask": ("images", vision.max_num_tiles),
    }
    rows = vision.max_num_tiles * vision.num_patches
    key_value: Shape = ("images", text.num_kv_heads, rows, text.head_dim)
    return inputs, dict.fromkeys(_key_value_names("cross", config.cross_layers), key_value)


def decoder_shapes(config: ModelConfig) -> tuple[Shapes, Shapes]:
    """Inputs and outputs of `decoder.onnx`, in order.

    The first cross_rows rows of the batch may have pictures; the others are text, and cost the cross-attention layers
    nothing. A text-only model takes nothing of pictures.
    """
    text = config.text
    cache: Shape = ("batch", text.num_kv_heads, "cache_len", text.head_dim)
    cross: Shape = ("cross_rows", text.num_kv_heads, f"{config.vision.num_patches}*num_tiles", text.head_dim)
    inputs: Shapes = {
        "input_ids": ("batch", "seq"),
        "write_indices": ("batch",),
        "kv_lengths": ("batch",),
        "logits_indices": ("batch", "num_logits"),
    }
    if not config.is_text_only:
        inputs |= {"cross_attention_mask": ("batch", "seq", "num_tiles"), "has_image": ("batch",)}
    inputs |= dict.fromkeys(_key_value_names("past", text.self_attention_layers), cache)
    inputs |= dict.fromkeys(_key_value_names("cross", config.cross_layers), cross)
    outputs: Shapes = {"logits": ("batch", "num_logits", text.vocab_size)}
    outputs |= dict.fromkeys(_key_value_names("present", text.self_attention_layers), cache)
    return inputs, outputs


def greedy_shapes(config: ModelConfig) -> tuple[Shapes, Shapes]:
    """Inputs and outputs of `greedy.onnx`, in order: next tokens, in the shape of the decoder's `input_ids`."""
    return {"logits": ("rows", config.text.vocab_size)}, {"token_ids": ("rows", 1), "status": ("rows",)}


def sampler_shapes(config: ModelConfig) -> tuple[Shapes, Shapes]:
    """Inputs and outputs of `sampler.onnx`, in order."""
    full: Shape = ("rows", config.text.vocab_size)
    inputs: Shapes = dict.fromkeys(("logits", "counts", "in_prompt", "bias", "noise"), full)
    inputs["options"] = ("rows", len(SAMPLER_OPTIONS))
    return inputs, {"token_ids": ("rows", 1), "status": ("rows",), "present_counts": full}


def _key_value_names(prefix: str, layers: tuple[int, ...]) -> list[str]:
    return [f"{prefix}_{kind}_{layer}" for layer in layers for kind in ("key", "value")]
