"""The arithmetic of memory: what a back end with fixed limits takes, from the model's dimensions alone.

Such a back end allocates exactly these regions when it is entered, and nothing later. What weights and activations take
is what its programs say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from mllama_runtime.config import ModelConfig
from mllama_runtime.contract import MAX_LOGITS, SAMPLER_OPTIONS
from mllama_runtime.device import ITEM_BYTES
from mllama_runtime.engine_record import Limits
from mllama_runtime.manifest import DType

ALIGNMENT = 256  # bytes: what TensorRT wants of every address
RING = 2  # steps whose results the host may not have read yet


@dataclass(frozen=True, slots=True)
class Region:
    """One allocation: tensors behind one another, each at an aligned address.

    num_mirrors: copies of it in page-locked memory of the host, to upload from and download to.
    """

    name: str
    what: str
    tensors: Mapping[str, tuple[tuple[int, ...], DType]]
    num_mirrors: int = 0

    @property
    def num_bytes(self) -> int:
        return sum(aligned(tensor_bytes(*tensor)) for tensor in self.tensors.values())

    @property
    def pinned_bytes(self) -> int:
        return self.num_mirrors * self.num_bytes


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Everything a back end takes, in bytes. workspace: for activations; all programs share it."""

    weights_bytes: int
    workspace_bytes: int
    regions: tuple[Region, ...]

    @property
    def device_bytes(self) -> int:
        return self.weights_bytes + self.workspace_bytes + sum(region.num_bytes for region in self.regions)

    @property
    def pinned_bytes(self) -> int:
        return sum(region.pinned_bytes for region in self.regions)

    def device_parts(self) -> dict[str, int]:
        """Device memory in bytes by what it is for."""
        regions = {region.what: region.num_bytes for region in self.regions}
        return {"weights": self.weights_bytes, "activations": self.workspace_bytes, **regions}

    def __str__(self) -> str:
        """In one line, the largest first; what is small is left to the total."""
        parts = sorted(self.device_parts().items(), key=lambda part: -part[1])
        shown = ", ".join(f"{what} {gigabytes(size)}" for what, size in parts if size >= 10**7)
        return gigabytes(self.device_bytes) + (f" ({shown})" if shown else "")


def memory_plan(
    model: ModelConfig, limits: Limits, *, cache_dtype: DType, weights_bytes: int = 0, workspace_bytes: int = 0
) -> MemoryPlan:
    """Regions for max_batch slots of max_seq_len tokens and max_tiles tiles each.

    cache_dtype: of keys, values and the vision graph's outputs. The names of tensors are the graphs' own.
    """
    text, vision = model.text, model.vision
    rows, tiles, chunk = limits.max_batch, limits.max_tiles, limits.prefill_chunk
    side, num_tiles, vocab = vision.image_size, vision.max_num_tiles, text.vocab_size
    cross = [f"cross_{kind}_{layer}" for layer in model.cross_layers for kind in ("key", "value")]
    past = [f"past_{kind}_{layer}" for layer in text.self_attention_layers for kind in ("key", "value")]

    def caches(names: list[str], num_rows: int, length: int) -> dict[str, tuple[tuple[int, ...], DType]]:
        return dict.fromkeys(names, ((num_rows, text.num_kv_heads, length, text.head_dim), cache_dtype))

    def sampling(num_rows: int) -> dict[str, tuple[tuple[int, ...], DType]]:
        full = (num_rows, vocab)
        return {
            "counts": (full, "float32"),
            "present_counts": (full, "float32"),
            "bias": (full, "float32"),
            "in_prompt": (full, "bool"),
            "options": ((num_rows, len(SAMPLER_OPTIONS)), "float32"),
        }

    pixels: dict[str, tuple[tuple[int, ...], DType]] = {
        "pixel_values": ((1, num_tiles, vision.num_channels, side, side), "float32"),
        "aspect_ratio_ids": ((1,), "int64"),
        "aspect_ratio_mask": ((1, num_tiles), "int64"),
    }
    num_pictures = tiles // num_tiles
    picture = caches(cross, 1, num_tiles * vision.num_patches)
    of_pictures = [
        Region("cross", "pictures' keys and values", caches(cross, rows, tiles * vision.num_patches)),
        *(
            Region(f"picture_{index}", f"encoded picture {index}", picture)
            for index in range(num_pictures + 1)  # those of one request, and one more for the next
        ),
        *(Region(f"pixels_{index}", f"pixels {index}", pixels, num_mirrors=1) for index in range(RING)),
    ]
    if num_pictures > 1:
        of_pictures.append(Region("joined", "pictures side by side", caches(cross, 1, tiles * vision.num_patches)))
    regions = [
        Region("cache", "self-attention caches", caches(past, rows, limits.max_seq_len)),
        *([] if model.is_text_only else of_pictures),
        Region(
            "prompt",
            "a chunk of a prompt",
            {
                "input_ids": ((1, chunk), "int64"),
                "write_indices": ((1,), "int64"),
                "kv_lengths": ((1,), "int64"),
                "logits_indices": ((1, MAX_LOGITS), "int64"),
                "has_image": ((1,), "bool"),
                "cross_attention_mask": ((1, chunk, tiles), "bool"),
            },
            num_mirrors=RING,
        ),
        Region(
            "lengths",
            "lengths",
            {"write_indices": ((rows,), "int64"), "kv_lengths": ((rows,), "int64")},
            num_mirrors=RING,
        ),
        Region(
            "seen",
            "visible tiles",
            {"has_image": ((rows,), "bool"), "cross_attention_mask": ((rows, 1, tiles), "bool")},
            num_mirrors=RING,
        ),
        Region("zeros", "indices of logits", {"logits_indices": ((rows, 1), "int64")}),
        Region(
            "results",
            "token ids",
            {"token_ids": ((rows, 1), "int64"), "status": ((rows,), "int64")},
            num_mirrors=RING,
        ),
        Region(
            "first_results",
            "first token ids",
            {"token_ids": ((1, 1), "int64"), "status": ((1,), "int64")},
            num_mirrors=RING,
        ),
        Region("logits", "logits", {"logits": ((rows, 1, vocab), "float32")}, num_mirrors=1),
        Region("last_logits", "logits of prompts", {"logits": ((1, MAX_LOGITS, vocab), "float32")}, num_mirrors=1),
        Region("sampling", "sampling", sampling(rows)),
        Region("first_sampling", "sampling of first tokens", sampling(1), num_mirrors=RING),
        Region("noise", "noise of sampling", {"noise": ((rows, vocab), "float32")}, num_mirrors=RING),
        Region("first_noise", "noise of first tokens", {"noise": ((1, vocab), "float32")}, num_mirrors=RING),
    ]
    return MemoryPlan(weights_bytes, workspace_bytes, tuple(regions))


def tensor_bytes(shape: tuple[int, ...], dtype: DType) -> int:
    return math.prod(shape) * ITEM_BYTES[dtype]


def aligned(num_bytes: int) -> int:
    return math.ceil(num_bytes / ALIGNMENT) * ALIGNMENT


def gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 10**8 else f"{num_bytes / 1e6:.1f} MB"
