"""What a step must read and compute, from a bundle's sizes: the best that measured times can be held against.

Over the bytes a second of a large copy, or the operations a second of a large matrix product, these are the least
seconds that the step can take. Activations, masks and logits are left out: they are small beside the rest.
"""

from __future__ import annotations

import math

from mllama_runtime.bundle import Bundle
from mllama_runtime.config import ModelConfig, TextConfig, VisionConfig
from mllama_runtime.device import ITEM_BYTES
from mllama_runtime.manifest import DType, GraphKey
from mllama_runtime.onnxfile import external_tensors

_PATCH_MULTIPLE = 8  # the tower pads the patches of a tile to a multiple of this


def decode_bytes(bundle: Bundle, *, batch: int, num_cached: int, num_tiles: int, on_cpu: bool) -> int:
    """Bytes that one decode step reads: weights, and for every row the keys and values of cached tokens and real tiles.

    Of the embedding table a row reads one line. Without pictures no cross-attention layer is read.

    Args:
        num_cached, num_tiles: of each row.
        on_cpu: whether keys and values have the dtype of the graph for ONNX Runtime on the CPU.

    Raises:
        BundleError: a graph cannot be read.
    """
    model, graphs = bundle.manifest.model, bundle.manifest.graphs
    key: GraphKey = "decoder_ort" if on_cpu else "decoder"
    dtype = next(spec.dtype for spec in graphs[key].inputs if spec.name.startswith("past_key_"))
    weights = decode_weight_bytes(bundle, batch=batch, has_image=num_tiles > 0)
    return weights + batch * cache_bytes(model, num_cached=num_cached, num_tiles=num_tiles, dtype=dtype)


def decode_weight_bytes(bundle: Bundle, *, batch: int, has_image: bool) -> int:
    """Bytes of the decoder's weights that a step reads."""
    text = bundle.manifest.model.text
    unread = () if has_image else tuple(f"layers.{layer}." for layer in text.cross_attention_layers)
    total = 0
    for tensor in external_tensors(bundle.path(bundle.manifest.graphs["decoder"].file)):
        if "embed_tokens" in tensor.name:
            total += batch * tensor.length // text.num_embeddings
        elif not any(part in tensor.name for part in unread):
            total += tensor.length
    return total


def cache_bytes(model: ModelConfig, *, num_cached: int, num_tiles: int, dtype: DType) -> int:
    """Bytes of a row's keys and values in all layers."""
    text = model.text
    width = 2 * text.num_kv_heads * text.head_dim * ITEM_BYTES[dtype]
    rows = num_cached * len(text.self_attention_layers)
    rows += num_tiles * model.vision.num_patches * len(model.cross_layers)
    return rows * width


def first_token_flops(model: ModelConfig, *, num_tokens: int, num_tiles: int) -> int:
    """Multiplications and additions from a picture's pixels and a prompt to its last token's logits.

    num_tiles: real ones; 0 for text alone. The vision tower works on all tiles whatever their number.
    """
    vision = vision_flops(model.vision, model.text) if num_tiles else 0
    return vision + _prefill_flops(model.text, num_tokens, num_tiles * model.vision.num_patches)


def vision_flops(vision: VisionConfig, text: TextConfig) -> int:
    """Of one picture, from pixels to the decoder's keys and values."""
    width, tiles = vision.hidden_size, vision.max_num_tiles
    patches = math.ceil(vision.num_patches / _PATCH_MULTIPLE) * _PATCH_MULTIPLE
    rows = tiles * patches
    layer = 2 * rows * (4 * width**2 + 2 * width * vision.intermediate_size) + 4 * rows**2 * width
    pixels = vision.num_channels * vision.patch_size**2
    states = tiles * vision.num_patches
    keys = 2 * text.num_kv_heads * text.head_dim * len(text.cross_attention_layers)
    return (
        2 * rows * pixels * width
        + layer * (vision.num_layers + vision.num_global_layers)
        + 2 * states * text.hidden_size * (vision.output_dim + keys)
    )


def _prefill_flops(text: TextConfig, num_tokens: int, num_states: int) -> int:
    """num_states: rows of the pictures' keys and values; with none, the cross-attention layers do not run."""
    width, kv_width = text.hidden_size, text.num_kv_heads * text.head_dim
    mlp = 2 * num_tokens * 3 * width * text.intermediate_size
    own = 2 * num_tokens * (2 * width**2 + 2 * width * kv_width) + 2 * num_tokens**2 * width  # half of it is masked
    cross = 2 * num_tokens * 2 * width**2 + 4 * num_tokens * num_states * width
    total = len(text.self_attention_layers) * (own + mlp)
    if num_states:
        total += len(text.cross_attention_layers) * (cross + mlp)
    return total + 2 * width * text.vocab_size
