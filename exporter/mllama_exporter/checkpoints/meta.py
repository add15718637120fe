"""Meta's own files, the folder `original/` of the published checkpoints, read as if they were Hugging Face's.

`params.json` and one `consolidated.00.pth`, or one for each tensor-parallel rank. The files are pickles: they are read
by `torch.load` with `weights_only` (tensors, and nothing that runs) and mapped, and rows are taken from them when they
are asked for. Tokenizer, template and config.json are those of the Hugging Face folder that `original/` lies in.

Names, axes and the order of rows: transformers' convert_mllama_weights_to_hf.py, and Meta's model code
(https://github.com/meta-llama/llama-models).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from mllama_runtime.config import ModelConfig
from mllama_runtime.errors import CheckpointError
from mllama_runtime.fields import show
from mllama_runtime.tensorfile import TensorInfo

from mllama_exporter.checkpoints.checkpoint import Checkpoint, Identity, Shape, Stored, expected_tensors, listed
from mllama_exporter.checkpoints.hf_config import model_config_from_hf, read_json_object
from mllama_exporter.checkpoints.torch_tensors import TORCH_DTYPES

PARAMS_NAME = "params.json"
_DTYPES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
_UNUSED = {"text_model.rope.freqs"}

Ranks = Sequence[Mapping[str, torch.Tensor]]
Rows = Callable[[int, int], torch.Tensor]
"""Rows [start, stop) of a tensor, seen as [rows, columns]."""

# How the ranks' parts make a whole: rows behind one another, columns beside one another, or the same in all.
Parts = Literal["rows", "columns", "same", "rotary", "embedding", "gate", "tiles"]

_VISION: tuple[tuple[str, str, Parts], ...] = (
    (r"class_embedding", "class_embedding", "same"),
    (r"patch_embedding\.weight", "conv1._linear.weight", "rows"),
    (r"gated_positional_embedding\.embedding", "positional_embedding", "same"),
    (r"gated_positional_embedding\.tile_embedding\.weight", "gated_positional_embedding", "tiles"),
    (r"gated_positional_embedding\.gate", "gated_positional_embedding_gate", "gate"),
    (r"(pre|post)_tile_positional_embedding\.embedding\.weight", r"\1_tile_pos_embed.embedding", "tiles"),
    (r"(pre|post)_tile_positional_embedding\.gate", r"\1_tile_pos_embed.gate", "gate"),
    (r"layernorm_(pre|post)\.(weight|bias)", r"ln_\1.\2", "same"),
    (r"(\w+)\.layers\.(\d+)\.self_attn\.([qkv])_proj\.weight", r"\1.resblocks.\2.attn.w\3.weight", "rows"),
    (r"(\w+)\.layers\.(\d+)\.self_attn\.o_proj\.weight", r"\1.resblocks.\2.attn.wo.weight", "columns"),
    (r"(\w+)\.layers\.(\d+)\.mlp\.fc1\.(weight|bias)", r"\1.resblocks.\2.mlp.c_fc.\3", "rows"),
    (r"(\w+)\.layers\.(\d+)\.mlp\.fc2\.weight", r"\1.resblocks.\2.mlp.c_proj.weight", "columns"),
    (r"(\w+)\.layers\.(\d+)\.mlp\.fc2\.bias", r"\1.resblocks.\2.mlp.c_proj.bias", "same"),
    (r"(\w+)\.layers\.(\d+)\.input_layernorm\.(weight|bias)", r"\1.resblocks.\2.ln_1.\3", "same"),
    (r"(\w+)\.layers\.(\d+)\.post_attention_layernorm\.(weight|bias)", r"\1.resblocks.\2.ln_2.\3", "same"),
    (r"(\w+)\.layers\.(\d+)\.(gate_attn|gate_ffn)", r"\1.resblocks.\2.\3", "gate"),
)


def is_meta(folder: Path) -> bool:
    return (folder / PARAMS_NAME).is_file() and not (folder / "config.json").exists()


def meta_checkpoint(folder: Path) -> Checkpoint:
    """Opens an `original/` folder; no tensor data is read.

    Raises:
        CheckpointError: a file is missing, truncated or no such file; or params.json is not of the model that the
            config.json beside the folder describes.
    """
    config_folder = folder.resolve().parent
    if not (config_folder / "config.json").is_file():
        hint = "put the folder into the Hugging Face folder it came with: tokenizer, template and config.json are there"
        raise CheckpointError("no config.json beside Meta's files", where=config_folder, hint=hint)
    config = model_config_from_hf(config_folder)
    _check_params(folder / PARAMS_NAME, config)
    paths = _paths(folder)
    identities = {path: Identity.of(path) for path in (config_folder / "config.json", folder / PARAMS_NAME, *paths)}
    ranks = [_loaded(path) for path in paths]
    used: set[str] = set()
    tensors: dict[str, Stored] = {}
    for name, shape in expected_tensors(config).items():
        key, parts = _place(name, config)
        used |= {key, "text_model.learnable_embedding.weight"} if parts == "embedding" else {key}
        tensors[name] = _stored(name, shape, key, parts, ranks, config, paths)
    if left := sorted(ranks[0].keys() - used - _UNUSED):
        raise CheckpointError(f"holds what no layer of the model has: {listed(map(show, left))}", where=paths[0])
    digest = hashlib.sha256((config_folder / "config.json").read_bytes() + (folder / PARAMS_NAME).read_bytes())
    for path, rank in zip(paths, ranks, strict=True):
        digest.update(f"\n{path.name} {path.stat().st_size}".encode())
        for key in sorted(rank):
            digest.update(f"\n{key} {rank[key].dtype} {tuple(rank[key].shape)}".encode())
    return Checkpoint(folder, config, "meta", digest.hexdigest(), tensors, identities, text_folder=config_folder)


def _check_params(path: Path, config: ModelConfig) -> None:
    """What params.json says of the model, against config.json."""
    params: dict[str, Any] = read_json_object(path)
    inner = params.get("model", params)
    if not isinstance(inner, dict):
        raise CheckpointError("not Meta's parameters", where=path)
    text, vision = config.text, config.vision
    for name, expected in {
        "dim": text.hidden_size,
        "n_layers": len(text.self_attention_layers),
        "n_heads": text.num_heads,
        "n_kv_heads": text.num_kv_heads,
        "vocab_size": text.vocab_size,
        "norm_eps": text.rms_norm_eps,
        "rope_theta": text.rope.theta,
        "vision_chunk_size": vision.image_size,
        "vision_max_num_chunks": vision.max_num_tiles,
        "vision_num_cross_attention_layers": len(text.cross_attention_layers),
    }.items():
        if inner.get(name) != expected:
            hint = "the folder is not of the config.json beside it"
            raise CheckpointError(
                "not what config.json says",
                where=f"{path}: {name}",
                expected=expected,
                found=show(inner.get(name)),
                hint=hint,
            )


def _paths(folder: Path) -> list[Path]:
    paths = sorted(folder.glob("consolidated*.pth"))
    names = [path.name for path in paths]
    expected = [f"consolidated.{rank:02}.pth" for rank in range(max(1, len(paths)))]
    if names not in (expected, ["consolidated.pth"]):
        raise CheckpointError(
            "not a whole set of files", where=folder, expected=listed(expected), found=listed(names) or "none"
        )
    return paths


def _loaded(path: Path) -> dict[str, torch.Tensor]:
    try:
        found = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as fault:  # of many kinds: damaged archives, old formats, pickles that would run code
        reason = str(fault).split("\n")[0][:200]
        hint = "fetch it again; only files of PyTorch's zip format with nothing but tensors are read"
        raise CheckpointError("cannot be read as weights", where=path, found=reason, hint=hint) from fault
    if not isinstance(found, dict) or not all(isinstance(each, torch.Tensor) for each in found.values()):
        raise CheckpointError("not a dictionary of tensors", where=path)
    return found


def _place(name: str, config: ModelConfig) -> tuple[str, Parts]:
    """Meta's name of a tensor, and how its parts make it."""
    if found := re.fullmatch(r"language_model\.model\.layers\.(\d+)\.(.+)", name):
        layer = int(found[1])
        is_cross = layer in config.text.cross_attention_layers
        layers = config.text.cross_attention_layers if is_cross else config.text.self_attention_layers
        kind = "cross_attention_layers" if is_cross else "layers"
        key, parts = _of_layer(found[2], is_cross=is_cross)
        return f"text_model.{kind}.{layers.index(layer)}.{key}", parts
    if name.startswith("vision_model."):
        for pattern, key, parts in _VISION:
            if match := re.fullmatch(pattern, name.removeprefix("vision_model.")):
                return f"vision_model.vision_encoder.{match.expand(key)}", parts
    if name.startswith("multi_modal_projector."):
        return f"vision_model.vision_projection.{name.rpartition('.')[2]}", "rows"
    others: dict[str, tuple[str, Parts]] = {
        "language_model.model.embed_tokens.weight": ("text_model.tok_embeddings.weight", "embedding"),
        "language_model.model.norm.weight": ("text_model.norm.weight", "same"),
        "language_model.lm_head.weight": ("text_model.output.weight", "rows"),
    }
    return others[name]


def _of_layer(name: str, *, is_cross: bool) -> tuple[str, Parts]:
    if found := re.fullmatch(r"(?:self|cross)_attn\.([qkvo])_proj\.weight", name):
        rotary = found[1] in "qk" and not is_cross
        parts: Parts = "rotary" if rotary else "columns" if found[1] == "o" else "rows"
        return f"attention.w{found[1]}.weight", parts
    if found := re.fullmatch(r"mlp\.(gate|up|down)_proj\.weight", name):
        number = {"gate": 1, "down": 2, "up": 3}[found[1]]
        return f"feed_forward.w{number}.weight", "columns" if found[1] == "down" else "rows"
    others: dict[str, tuple[str, Parts]] = {
        "input_layernorm.weight": ("attention_norm.weight", "same"),
        "post_attention_layernorm.weight": ("ffn_norm.weight", "same"),
        "cross_attn.q_norm.weight": ("attention.q_norm.weight", "same"),
        "cross_attn.k_norm.weight": ("attention.k_norm.weight", "same"),
        "cross_attn_attn_gate": ("gate_attn", "gate"),
        "cross_attn_mlp_gate": ("gate_ffwd", "gate"),
    }
    return others[name]


@dataclass(frozen=True, slots=True, eq=False)
class _FromRows:
    """A tensor whose rows are made when they are asked for."""

    info: TensorInfo
    rows: Rows

    def read_into(self, offset: int, out: memoryview) -> None:
        num_rows = self.info.shape[0]
        row_bytes = self.info.size_bytes // num_rows
        start, stop = offset // row_bytes, -(-(offset + len(out)) // row_bytes)
        data = self.rows(start, stop).contiguous().view(torch.uint8).reshape(-1)
        first = offset - start * row_bytes
        out[:] = data[first : first + len(out)].numpy().data


def _stored(
    name: str, shape: Shape, key: str, parts: Parts, ranks: Ranks, config: ModelConfig, paths: Sequence[Path]
) -> Stored:
    missing = [path.name for path, rank in zip(paths, ranks, strict=True) if key not in rank]
    if missing:
        raise CheckpointError(f"lacks {key}", where=paths[0].parent / missing[0], hint="fetch it again")
    given = [rank[key] for rank in ranks]
    if parts == "embedding":
        learned = "text_model.learnable_embedding.weight"
        if any(learned not in rank for rank in ranks):
            raise CheckpointError(f"lacks {learned}", where=paths[0], hint="fetch it again")
        given += [rank[learned] for rank in ranks]
    rows, found = _rows(given, parts, config)
    dtypes = {tensor.dtype for tensor in given}
    if math.prod(found) != math.prod(shape) or (len(found) > 1 and found[0] != shape[0]) or len(dtypes) != 1:
        raise CheckpointError(
            "of another shape",
            where=f"{paths[0]}: {key}",
            expected=list(shape),
            found=list(found),
            hint=f"it is {name}",
        )
    dtype = given[0].dtype
    if dtype not in _DTYPES:
        expected = " or ".join(_DTYPES.values())
        raise CheckpointError("of another type", where=f"{paths[0]}: {key}", expected=expected, found=str(dtype))
    return _FromRows(TensorInfo(name, _DTYPES[dtype], shape, 0, math.prod(shape) * dtype.itemsize), rows)


def _rows(given: Sequence[torch.Tensor], parts: Parts, config: ModelConfig) -> tuple[Rows, Shape]:
    """The rows of a whole tensor, and its shape."""
    first = given[0]
    if parts == "gate":
        return lambda start, stop: first.reshape(-1)[:1], (1,)
    if parts == "tiles":
        return lambda start, stop: _by_ratio(first, config, start, stop), _by_ratio_shape(first, config)
    if parts == "same":
        return lambda start, stop: first[start:stop], tuple(first.shape)
    if parts == "columns":
        width = sum(tensor.shape[1] for tensor in given)
        return lambda start, stop: torch.cat([tensor[start:stop] for tensor in given], dim=1), (first.shape[0], width)
    num_rows = sum(tensor.shape[0] for tensor in given)
    if parts == "rotary":
        head_dim = config.text.head_dim

        def permuted(start: int, stop: int) -> torch.Tensor:
            row = torch.arange(start, stop)
            head, inner = row // head_dim, row % head_dim
            half = head_dim // 2
            return _picked(given, head * head_dim + 2 * (inner % half) + inner // half)

        return permuted, (num_rows, *first.shape[1:])
    return lambda start, stop: _picked(given, torch.arange(start, stop)), (num_rows, *first.shape[1:])


def _picked(given: Sequence[torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    """Rows of the tensors behind one another."""
    out = torch.empty(len(rows), *given[0].shape[1:], dtype=given[0].dtype)
    start = 0
    for tensor in given:
        here = (rows >= start) & (rows < start + len(tensor))
        if here.any():
            out[here] = tensor[rows[here] - start]
        start += len(tensor)
    return out


def _by_ratio_shape(table: torch.Tensor, config: ModelConfig) -> Shape:
    vision = config.vision
    return len(vision.supported_aspect_ratios) + 1, vision.max_num_tiles * math.prod(table.shape[2:])


def _by_ratio(table: torch.Tensor, config: ModelConfig, start: int, stop: int) -> torch.Tensor:
    """A table by a tile's row and column [T, T, ...] -> rows by aspect ratio id [stop - start, T * ...], else 0."""
    ratios, tiles = config.vision.supported_aspect_ratios, config.vision.max_num_tiles
    out = torch.zeros(stop - start, tiles, *table.shape[2:], dtype=table.dtype)
    for index in range(max(1, start), stop):  # id 0 is padding
        high, wide = ratios[index - 1]
        out[index - start, : high * wide] = table[:high, :wide].reshape(high * wide, *table.shape[2:])
    return out.flatten(1)
