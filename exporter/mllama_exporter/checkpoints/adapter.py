"""A PEFT LoRA adapter merged into a checkpoint as it is read: W + scaling * B @ A, in the checkpoint's own precision.

The products are PEFT's own, whole matrices at a time and in the same order, so that the result is that of its
`merge_and_unload` to the last bit: the adapter in float32, the sum rounded once to W's dtype.
Paper: Hu et al., LoRA, 2021. Files and arithmetic: https://github.com/huggingface/peft (tuners/lora/layer.py).
"""

from __future__ import annotations

import hashlib
import math
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mllama_runtime.errors import CheckpointError
from mllama_runtime.fields import show
from mllama_runtime.tensorfile import TensorFile, TensorInfo, read_header

from mllama_exporter.checkpoints.checkpoint import Checkpoint, Identity, InFile, Stored, listed, published_name
from mllama_exporter.checkpoints.hf_config import read_json_object
from mllama_exporter.checkpoints.torch_tensors import TORCH_DTYPES, tensor_from_bytes

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
_NUM_KEPT = 2  # merged matrices: blocks are read in order, by two threads
_MERGE = "merge the adapter with peft, and export the result"
_PLAIN_NAME = re.compile(r"[\w.]+")
# PEFT keeps the weights themselves of embeddings and heads.
_BASE = re.compile(r"^base_model\.model\.(?P<module>.+)\.base_layer\.weight$")
_SIDE = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight$")

# What changes the arithmetic, with the value that leaves it as it is here.
_PLAIN: Mapping[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "lora_bias": (False,),
    "use_dora": (False,),
    "fan_in_fan_out": (False,),
    "modules_to_save": (None, []),
    "layer_replication": (None,),
    "megatron_config": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "alora_invocation_tokens": (None,),
    "use_bdlora": (None, False),
    "arrow_config": (None,),
}


def merged_checkpoint(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """The checkpoint with an adapter's changes in the matrices that it is of.

    Raises:
        CheckpointError: the adapter is not plain LoRA, damaged, or of another model.
    """
    if not (folder / CONFIG_NAME).is_file() or not (folder / WEIGHTS_NAME).is_file():
        expected = f"{CONFIG_NAME} and {WEIGHTS_NAME}"
        raise CheckpointError("not a PEFT adapter", where=folder, expected=expected)
    paths = [folder / CONFIG_NAME, folder / WEIGHTS_NAME]
    identities = {path: Identity.of(path) for path in paths}
    config = read_json_object(paths[0])
    for name, plain in _PLAIN.items():
        if name in config and config[name] not in plain:
            raise CheckpointError("not plain LoRA", where=f"{paths[0]}: {name}", found=show(config[name]), hint=_MERGE)
    file = read_header(paths[1], error=CheckpointError)
    cache = _Cache()
    merged: dict[str, Stored] = {}
    bases = {found["module"]: info for name, info in file.tensors.items() if (found := _BASE.match(name))}
    for module, (first, second) in _pairs(file).items():
        name, where, rank = published_name(f"{module}.weight"), f"{paths[1]}: {module}", first.shape[0]
        if name not in checkpoint.tensors:
            raise CheckpointError("the adapter is of another model", where=where, expected="a matrix of the checkpoint")
        base = checkpoint.tensors[name]
        if base.info.shape != (second.shape[0], first.shape[1]) or second.shape[1] != rank:
            raise CheckpointError(
                "the adapter is of another model",
                where=where,
                expected=f"a product of shape {list(base.info.shape)}",
                found=f"{list(second.shape)} x {list(first.shape)}",
            )
        if base.info.dtype not in TORCH_DTYPES:
            raise CheckpointError(
                "cannot be merged into", where=name, expected=" or ".join(TORCH_DTYPES), found=base.info.dtype
            )
        own = bases.get(module)
        if own is not None and (own.shape != base.info.shape or own.dtype not in TORCH_DTYPES):
            raise CheckpointError(
                "the adapter is of another model", where=where, found=f"{own.dtype} {list(own.shape)}"
            )
        start = base if own is None else InFile(file.path, own)
        scaling = _scaling(config, module, rank, paths[0])
        sides = InFile(file.path, first), InFile(file.path, second)
        merged[name] = _Merged(base.info, start, *sides, scaling, cache)
    digest = hashlib.sha256(f"{checkpoint.fingerprint}\n".encode() + paths[0].read_bytes())
    for info in sorted(file.tensors.values(), key=lambda info: info.name):
        digest.update(f"\n{info.name} {info.dtype} {info.shape} {info.offset_bytes}".encode())
    return replace(
        checkpoint,
        fingerprint=digest.hexdigest(),
        tensors={**checkpoint.tensors, **merged},
        identities={**checkpoint.identities, **identities},
        shards=(),
    )


def _pairs(file: TensorFile) -> dict[str, tuple[TensorInfo, TensorInfo]]:
    """A [r, in] and B [out, r] of every module, by its name in the model."""
    sides: dict[str, dict[str, TensorInfo]] = {}
    strange = []
    for name, info in file.tensors.items():
        if _BASE.match(name):
            continue
        found = _SIDE.match(name)
        if found is None or len(info.shape) != 2 or info.dtype not in TORCH_DTYPES:
            strange.append(show(name))
        else:
            sides.setdefault(found["module"], {})[found["side"]] = info
    strange += [f"half of {show(module)}" for module, pair in sides.items() if len(pair) != 2]
    if strange or not sides:
        raise CheckpointError(
            "holds what is not LoRA of a linear layer", where=file.path, found=listed(strange) or "nothing", hint=_MERGE
        )
    return {module: (pair["A"], pair["B"]) for module, pair in sides.items()}


def _scaling(config: Mapping[str, Any], module: str, rank: int, where: Path) -> float:
    """lora_alpha / r of a module, or lora_alpha / sqrt(r) with rank stabilisation."""
    expected = _of_module(config, "rank_pattern", "r", module, where)
    alpha = _of_module(config, "alpha_pattern", "lora_alpha", module, where)
    if type(expected) is not int or expected != rank:
        raise CheckpointError(
            "another rank than the weights have", where=f"{where}: {module}", expected=rank, found=show(expected)
        )
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise CheckpointError("not a number", where=f"{where}: lora_alpha", found=show(alpha))
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _of_module(config: Mapping[str, Any], pattern: str, default: str, module: str, where: Path) -> object:
    """The value of the first name that the module's ends with, as a whole or behind a dot; else the default."""
    for name, value in (config.get(pattern) or {}).items():
        if not _PLAIN_NAME.fullmatch(name):  # PEFT takes them as regular expressions, which can run for ever
            raise CheckpointError("not a module's name", where=f"{where}: {pattern}", found=show(name), hint=_MERGE)
        if module == name or module.endswith(f".{name}"):
            return value
    return config.get(default)


@dataclass(frozen=True, slots=True, eq=False)
class _Merged:
    """A matrix with the adapter's product added, made whole when its first block is asked for."""

    info: TensorInfo
    start: Stored
    first: InFile
    second: InFile
    scaling: float
    cache: _Cache

    def read_into(self, offset: int, out: memoryview) -> None:
        out[:] = self.cache.bytes_of(self)[offset : offset + len(out)]

    def made(self) -> memoryview:
        first, second, weight = (_whole(stored) for stored in (self.first, self.second, self.start))
        if not (torch.isfinite(first).all() and torch.isfinite(second).all()):
            raise CheckpointError("NaN or Inf in the adapter", where=f"{self.first.path}: {self.first.info.name}")
        weight = weight.to(TORCH_DTYPES[self.info.dtype])
        weight += second.float() @ first.float() * self.scaling
        return weight.reshape(-1).view(torch.uint8).numpy().data


@dataclass(slots=True, eq=False)
class _Cache:
    """The matrices merged last."""

    _kept: OrderedDict[str, memoryview] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def bytes_of(self, tensor: _Merged) -> memoryview:
        with self._lock:
            name = tensor.info.name
            if name not in self._kept:
                while len(self._kept) >= _NUM_KEPT:
                    self._kept.popitem(last=False)
                self._kept[name] = tensor.made()
            return self._kept[name]


def _whole(stored: Stored) -> torch.Tensor:
    data = np.empty(stored.info.size_bytes, np.uint8)
    stored.read_into(0, data.data)
    return tensor_from_bytes(data, stored.info.dtype).reshape(stored.info.shape)
