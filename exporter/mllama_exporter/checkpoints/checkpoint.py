"""A checkpoint on disk: which tensors it holds, whether they are the model's, and their bytes.

Reads headers once and tensor bytes on demand; `weights` streams through here, and the dimensions say which tensors
there must be. Names are always the published spelling, whichever one the files use. This module reads Hugging Face
folders; `meta` Meta's own files, and `adapter` merges a LoRA adapter: the package opens what a user names.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import numpy.typing as npt
from mllama_runtime.config import ModelConfig, VisionConfig
from mllama_runtime.errors import CheckpointError, UsageError
from mllama_runtime.fields import show
from mllama_runtime.manifest import SourceFormat
from mllama_runtime.tensorfile import TensorFile, TensorInfo, read_header

from mllama_exporter.checkpoints.hf_config import model_config_from_hf, read_json_object

Array = npt.NDArray[Any]
Shape = tuple[int, ...]

NUMPY_DTYPES: Mapping[str, np.dtype[Any]] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}
"""The element types a checkpoint may hold and a weights file may get, by the safetensors format's names."""

_MAX_LISTED = 10

# transformers 5 renamed the modules; its files may carry either spelling (its conversion_mapping has the same four).
_RENAMED = (
    (re.compile(r"^model\.language_model\."), "language_model.model."),
    (re.compile(r"^lm_head\."), "language_model.lm_head."),
    (re.compile(r"^model\.(?=vision_model\.|multi_modal_projector\.)"), ""),
)


def published_name(name: str) -> str:
    """The spelling of a tensor's name in the published checkpoints."""
    for pattern, replacement in _RENAMED:
        name, count = pattern.subn(replacement, name)
        if count:
            break
    return name


@dataclass(frozen=True, slots=True)
class Identity:
    """What tells one state of a file from another without reading it."""

    size_bytes: int
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> Identity:
        try:
            stat = path.stat()
        except OSError as error:
            raise CheckpointError("cannot be read", where=path, found=error.strerror) from error
        return cls(stat.st_size, stat.st_mtime_ns, stat.st_ino)


class Stored(Protocol):
    """One tensor, in a file or made on the way."""

    @property
    def info(self) -> TensorInfo: ...

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fill `out` with the tensor's bytes from byte `offset` on. Raises CheckpointError."""
        ...


@dataclass(frozen=True, slots=True)
class InFile:
    """A tensor, and the shard it lies in."""

    path: Path
    info: TensorInfo

    def read_into(self, offset: int, out: memoryview) -> None:
        """Plain reads, never a memory map: a map of a file that shrinks meanwhile gives zeros or a signal."""
        name, rest, position = self.info.name, out, self.info.offset_bytes + offset
        try:
            with self.path.open("rb", buffering=0) as file:
                while rest and (count := os.preadv(file.fileno(), [rest], position)):
                    rest, position = rest[count:], position + count
        except OSError as error:
            raise CheckpointError(f"cannot read {name}", where=self.path, found=error.strerror) from error
        if rest:
            found = f"{len(out) - len(rest)} bytes"
            raise CheckpointError(f"ends within {name}", where=self.path, expected=f"{len(out)} bytes", found=found)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint whose config and headers have been read and found consistent; no tensor data is held.

    format: what it is in. fingerprint: SHA-256 (hex) over the config, every tensor's place and every file's size; the
    data itself is not read. Copies of one checkpoint have the same, wherever they lie. shards: of a Hugging Face
    checkpoint as it is, whose tensors nothing changes. text_folder: where its tokenizer and templates are.
    """

    folder: Path
    config: ModelConfig
    format: SourceFormat
    fingerprint: str
    tensors: Mapping[str, Stored]
    identities: Mapping[Path, Identity]
    text_folder: Path
    shards: tuple[TensorFile, ...] = ()

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Reads config.json, the index and every shard's header.

        Raises:
            CheckpointError: a file is absent, truncated or malformed; index and shards disagree; weights are pickled.
        """
        try:
            paths, weight_map = _shard_paths(folder)
        except OSError as error:
            raise CheckpointError("cannot be read", where=folder, found=error.strerror) from error
        if (folder / "hf_quant_config.json").exists():
            hint = "export the checkpoint it was made from, and `mllama quantize` the bundle"
            raise CheckpointError("NVIDIA Model Optimizer has quantised the weights", where=folder, hint=hint)
        identities = {path: Identity.of(path) for path in (folder / "config.json", *paths)}
        config = model_config_from_hf(folder)
        shards = tuple(read_header(path, error=CheckpointError) for path in paths)
        if weight_map is not None:
            _check_index(folder, weight_map, shards)
        digest = hashlib.sha256((folder / "config.json").read_bytes())
        for shard in shards:
            digest.update(f"\n{shard.path.name} {shard.size_bytes}".encode())
            for info in sorted(shard.tensors.values(), key=lambda info: info.name):
                digest.update(f"\n{info.name} {info.dtype} {info.shape} {info.offset_bytes}".encode())
        return cls(folder, config, "hf", digest.hexdigest(), _collect(shards), identities, folder, shards)

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and size of a tensor.

        Raises:
            CheckpointError: there is no such tensor.
        """
        return self._stored(name).info

    @property
    def dtypes(self) -> set[str]:
        """Of all tensors, by the safetensors format's names."""
        return {stored.info.dtype for stored in self.tensors.values()}

    def check(self, config: ModelConfig | None = None) -> None:
        """That the checkpoint holds exactly the tensors of `config` (by default its own), as floats of the right shape.

        With a config from `truncate`, the tensors of the dropped layers may be there.

        Raises:
            CheckpointError: naming what is missing, left over, or of the wrong shape or dtype.
        """
        expected = expected_tensors(config or self.config)
        known = expected.keys() | expected_tensors(self.config).keys()
        faults = [f"missing {name} {show(list(expected[name]))}" for name in expected if name not in self.tensors]
        faults += [f"left over {show(name)}" for name in self.tensors if name not in known]
        for name, shape in expected.items():
            info = self.tensors[name].info if name in self.tensors else None
            if info and info.shape != shape:
                faults.append(f"{name} of shape {show(list(info.shape))} instead of {list(shape)}")
            if info and info.dtype not in NUMPY_DTYPES:
                faults.append(f"{name} of dtype {info.dtype} instead of {' or '.join(NUMPY_DTYPES)}")
        if faults:
            hint = "the checkpoint is incomplete, or config.json is not its own"
            raise CheckpointError("the tensors are not the model's: " + listed(faults), where=self.folder, hint=hint)

    def read(self, name: str) -> Array:
        """A whole tensor, in its stored dtype.

        Raises:
            CheckpointError: there is no such float tensor, or the file ends before it does.
        """
        info = self.info(name)
        if info.dtype not in NUMPY_DTYPES:
            raise CheckpointError(
                "not a float tensor",
                where=f"{self.folder}: {name}",
                expected=" or ".join(NUMPY_DTYPES),
                found=info.dtype,
            )
        array = np.empty(info.shape, NUMPY_DTYPES[info.dtype])
        self.read_into(name, 0, array)
        return array

    def read_into(self, name: str, offset: int, out: Array) -> None:
        """Fills the C-contiguous `out` with the tensor's bytes from byte `offset` on.

        Raises:
            CheckpointError: the file cannot be read, or ends too early.
        """
        self._stored(name).read_into(offset, out.reshape(-1).view(np.uint8).data)

    def state(self) -> str:
        """Sha256 (hex) that differs once a file is written to or replaced; a build goes on from what is of the same."""
        known = [f"{path.name} {identity}" for path, identity in self.identities.items()]
        return hashlib.sha256("\n".join(known).encode()).hexdigest()

    def assert_unchanged(self) -> None:
        """That no file has changed since `open`, by size, modification time and inode.

        Raises:
            CheckpointError: naming the files that have.
        """
        changed = [path.name for path, identity in self.identities.items() if Identity.of(path) != identity]
        if changed:
            hint = "export again when nothing writes to the checkpoint"
            raise CheckpointError(f"changed while it was read: {listed(changed)}", where=self.folder, hint=hint)

    def _stored(self, name: str) -> Stored:
        if name not in self.tensors:
            raise CheckpointError("no such tensor", where=f"{self.folder}: {name}")
        return self.tensors[name]


def listed(items: Iterable[str]) -> str:
    """Items for a one-line message: the first ten, and how many more there are."""
    names = list(items)
    rest = len(names) - _MAX_LISTED
    return ", ".join(names[:_MAX_LISTED]) + (f" and {rest} more" if rest > 0 else "")


def truncate(config: ModelConfig, num_layers: int) -> ModelConfig:
    """The model of the first `num_layers` text layers, cross-attention layers among them kept.

    Raises:
        UsageError: there are not so many layers, or none left would see the picture.
    """
    low, high = config.text.cross_attention_layers[0] + 1, config.text.num_layers
    if not low <= num_layers <= high:
        hint = f"layer {low - 1} is the first that sees the picture"
        raise UsageError(
            "a model cannot be cut to this", where="layers", expected=f"{low} to {high}", found=num_layers, hint=hint
        )
    cross = tuple(layer for layer in config.text.cross_attention_layers if layer < num_layers)
    return replace(config, text=replace(config.text, num_layers=num_layers, cross_attention_layers=cross))


def expected_tensors(config: ModelConfig) -> dict[str, Shape]:
    """Every tensor of a model with its shape, under its published name."""
    text = {f"language_model.{name}": shape for name, shape in _text_tensors(config).items()}
    if config.is_text_only:
        return text
    shapes = {f"vision_model.{name}": shape for name, shape in _vision_tensors(config.vision).items()} | text
    shapes["multi_modal_projector.weight"] = (config.text.hidden_size, config.vision.output_dim)
    shapes["multi_modal_projector.bias"] = (config.text.hidden_size,)
    return shapes


def _vision_tensors(vision: VisionConfig) -> dict[str, Shape]:
    hidden, tiles, ids = vision.hidden_size, vision.max_num_tiles, len(vision.supported_aspect_ratios) + 1
    shapes: dict[str, Shape] = {
        "class_embedding": (hidden,),
        "patch_embedding.weight": (hidden, vision.num_channels, vision.patch_size, vision.patch_size),
        "gated_positional_embedding.gate": (1,),
        "gated_positional_embedding.embedding": (vision.num_patches, hidden),
        "gated_positional_embedding.tile_embedding.weight": (ids, tiles * vision.num_patches * hidden),
    }
    for place in ("pre", "post"):
        shapes[f"{place}_tile_positional_embedding.gate"] = (1,)
        shapes[f"{place}_tile_positional_embedding.embedding.weight"] = (ids, tiles * hidden)
        shapes |= _layer_norm(f"layernorm_{place}", hidden)
    for tower, num_layers in (("transformer", vision.num_layers), ("global_transformer", vision.num_global_layers)):
        for layer in range(num_layers):
            prefix = f"{tower}.layers.{layer}"
            shapes |= {f"{prefix}.self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
            shapes |= _linear(f"{prefix}.mlp.fc1", vision.intermediate_size, hidden)
            shapes |= _linear(f"{prefix}.mlp.fc2", hidden, vision.intermediate_size)
            shapes |= _layer_norm(f"{prefix}.input_layernorm", hidden)
            shapes |= _layer_norm(f"{prefix}.post_attention_layernorm", hidden)
            if tower == "global_transformer":
                shapes |= {f"{prefix}.gate_attn": (1,), f"{prefix}.gate_ffn": (1,)}
    return shapes


def _text_tensors(config: ModelConfig) -> dict[str, Shape]:
    text = config.text
    hidden, kv_size = text.hidden_size, text.num_kv_heads * text.head_dim
    shapes: dict[str, Shape] = {
        "model.embed_tokens.weight": (text.num_embeddings, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (text.vocab_size, hidden),
    }
    for layer in sorted((*text.self_attention_layers, *config.cross_layers)):
        prefix, cross = f"model.layers.{layer}", layer in config.cross_layers
        attention = f"{prefix}.cross_attn" if cross else f"{prefix}.self_attn"
        shapes |= {f"{attention}.{name}_proj.weight": (hidden, hidden) for name in "qo"}
        shapes |= {f"{attention}.{name}_proj.weight": (kv_size, hidden) for name in "kv"}
        shapes |= {f"{prefix}.mlp.{name}_proj.weight": (text.intermediate_size, hidden) for name in ("gate", "up")}
        shapes[f"{prefix}.mlp.down_proj.weight"] = (hidden, text.intermediate_size)
        shapes |= {f"{prefix}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
        if cross:
            shapes |= {f"{attention}.{name}_norm.weight": (text.head_dim,) for name in "qk"}
            shapes |= {f"{prefix}.cross_attn_{name}_gate": (1,) for name in ("attn", "mlp")}
    return shapes


def _linear(name: str, num_out: int, num_in: int) -> dict[str, Shape]:
    return {f"{name}.weight": (num_out, num_in), f"{name}.bias": (num_out,)}


def _layer_norm(name: str, size: int) -> dict[str, Shape]:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def _shard_paths(folder: Path) -> tuple[tuple[Path, ...], Mapping[str, str] | None]:
    """The shards in name order, and the index that named them where there is one."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if not folder.is_dir():
        raise CheckpointError("no such folder", where=folder, hint="name a Hugging Face checkpoint folder")
    if single.is_file() and index.is_file():
        hint = "remove the one that is stale"
        raise CheckpointError("holds both model.safetensors and an index of shards", where=folder, hint=hint)
    if single.is_file():
        return (single,), None
    if not index.is_file():
        raise _no_weights(folder)
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(map(_is_file_name, weight_map.values())):
        expected = "an object of tensor names and names of files in this folder"
        raise CheckpointError("not usable", where=f"{index}: weight_map", expected=expected, found=show(weight_map))
    paths = [folder / name for name in sorted(set(weight_map.values()))]
    if absent := [path.name for path in paths if not path.is_file()]:
        what = f"{len(absent)} of {len(paths)} shards named by the index are absent: {', '.join(absent)}"
        raise CheckpointError(what, where=index, hint="complete the download")
    return tuple(paths), weight_map


def _is_file_name(name: object) -> bool:
    return isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors")


def _no_weights(folder: Path) -> CheckpointError:
    names = sorted(path.name for path in folder.iterdir())
    pickled = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    tensors = [name for name in names if name.endswith(".safetensors")]
    if tensors:
        what, found = "neither model.safetensors nor model.safetensors.index.json", tensors
        hint = "merge an adapter into its base model first; complete a partial download"
    elif pickled:
        what, found = "the weights are pickled, and unpickling runs whatever code the file holds", pickled
        hint = "save the checkpoint as safetensors in an environment where that is acceptable"
    else:
        what, found, hint = "no weights", names, "name a Hugging Face checkpoint folder"
    return CheckpointError(what, where=folder, expected="safetensors", found=listed(found) or "nothing", hint=hint)


def _check_index(folder: Path, weight_map: Mapping[str, str], shards: Iterable[TensorFile]) -> None:
    held = {(name, shard.path.name) for shard in shards for name in shard.tensors}
    named = set(weight_map.items())
    faults = [f"{shard} lacks {show(name)}" for name, shard in sorted(named - held)]
    faults += [f"{shard} holds {show(name)} beyond the index" for name, shard in sorted(held - named)]
    if faults:
        where = folder / "model.safetensors.index.json"
        raise CheckpointError(f"index and shards disagree: {listed(faults)}", where=where, hint="download them again")


def _collect(shards: tuple[TensorFile, ...]) -> dict[str, Stored]:
    """Every tensor under its published name."""
    stored = [
        (published_name(info.name), InFile(shard.path, info)) for shard in shards for info in shard.tensors.values()
    ]
    counts = Counter(name for name, _ in stored)
    if twice := [show(name) for name, count in counts.items() if count > 1]:
        where = shards[0].path.parent
        raise CheckpointError(f"tensors are stored twice, in two shards or two spellings: {listed(twice)}", where=where)
    return dict(stored)
