"""Where the weights of a bundle lie: in files of our own, or in the checkpoint's files, moved.

Files of our own hold at most 5 GB, so that a build that was cut short has little to do again. A moved checkpoint takes
no room: its files get a second name in the bundle (a hard link), and lose the first once the bundle is there. So at any
moment each of them has a name, and a move that was cut short is finished by the same command.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mllama_runtime.bundle import Bundle
from mllama_runtime.errors import CheckpointError, InputError, UsageError
from mllama_runtime.manifest import MANIFEST_NAME
from mllama_runtime.tensorfile import TensorInfo, encode_header

from mllama_exporter.checkpoints.checkpoint import Checkpoint, published_name
from mllama_exporter.weights import WeightSpec

_MAX_FILE_BYTES = 5 * 10**9

Located = Mapping[str, tuple[str, TensorInfo]]
"""By a tensor's published name: its file in the bundle, and its place there."""


@dataclass(frozen=True, slots=True)
class WeightsFile:
    """One file of the bundle. source: the checkpoint's file that becomes it; None for one of our own."""

    name: str
    specs: tuple[WeightSpec, ...]
    infos: Mapping[str, TensorInfo]
    num_bytes: int
    source: Path | None = None

    @property
    def located(self) -> Located:
        return {name: (self.name, info) for name, info in self.infos.items()}


def own_files(plan: Sequence[WeightSpec]) -> list[WeightsFile]:
    """The plan's tensors in their order, in as many files as it takes."""
    parts: list[list[WeightSpec]] = [[]]
    for spec in plan:
        if parts[-1] and _size([*parts[-1], spec]) > _MAX_FILE_BYTES:
            parts.append([])
        parts[-1].append(spec)
    files = []
    for name, part in zip(_names(len(parts)), parts, strict=True):
        _, targets = encode_header((spec.name, spec.dtype, spec.shape) for spec in part)
        files.append(WeightsFile(name, tuple(part), {each.name: each for each in targets}, _size(part)))
    return files


def moved_files(checkpoint: Checkpoint, plan: Sequence[WeightSpec]) -> list[WeightsFile]:
    """The checkpoint's own files.

    Raises:
        UsageError: a tensor would have to be cast, or is of no use to the bundle.
    """
    if not checkpoint.shards:
        hint = "leave out --weights move"
        raise UsageError("its weights are made on the way, and cannot be moved", where=checkpoint.folder, hint=hint)
    specs = {spec.name: spec for spec in plan}
    files = []
    for name, shard in zip(_names(len(checkpoint.shards)), checkpoint.shards, strict=True):
        infos = {published_name(info.name): info for info in shard.tensors.values()}
        for tensor, info in infos.items():
            if tensor not in specs:
                hint = "leave out --layers and --text-only, or --weights move"
                raise UsageError("of no use to this bundle, and cannot be moved", where=tensor, hint=hint)
            if info.dtype != specs[tensor].dtype:
                hint = "choose the checkpoint's own precision, or leave out --weights move"
                raise UsageError(
                    "would be cast, and cannot be moved",
                    where=tensor,
                    expected=specs[tensor].dtype,
                    found=info.dtype,
                    hint=hint,
                )
        # Tensors of a shard stand in the order of their data.
        files.append(WeightsFile(name, tuple(specs[tensor] for tensor in infos), infos, shard.size_bytes, shard.path))
    return files


def link(file: WeightsFile, folder: Path) -> None:
    """Give a checkpoint's file its name in the bundle.

    Raises:
        InputError: the checkpoint is on another file system, or this one has no hard links.
    """
    if file.source is None:
        return
    try:
        os.link(file.source, folder / file.name)
    except OSError as fault:
        hint = "put the bundle on the checkpoint's file system, or leave out --weights move"
        raise InputError(f"cannot be moved ({fault.strerror})", where=file.source, hint=hint) from fault


def finished_move(folder: Path, output: Path) -> Bundle | None:
    """Finish a move whose bundle is there: take from the checkpoint what is in the bundle. None if nothing is.

    Raises:
        BundleError: the bundle is not whole; nothing was taken.
    """
    if not (output / MANIFEST_NAME).is_file() or not folder.is_dir():
        return None
    moved = {_identity(path) for path in output.glob("*.safetensors")}
    left = [path for path in sorted(folder.glob("*.safetensors")) if _identity(path) in moved]
    if not left:
        return None
    bundle = Bundle.open(output)
    remove_sources(left)
    return bundle


def remove_sources(paths: Sequence[Path]) -> None:
    """Take the first names of moved files away; the index goes with them. Raises CheckpointError."""
    with suppress(FileNotFoundError):
        (paths[0].parent / "model.safetensors.index.json").unlink()
    for path in paths:
        try:
            path.unlink()
        except OSError as fault:
            hint = "remove it: the bundle has it"
            raise CheckpointError(f"cannot be removed ({fault.strerror})", where=path, hint=hint) from fault


def _identity(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino


def _names(count: int) -> list[str]:
    if count == 1:
        return ["weights.safetensors"]
    return [f"weights-{index:05}-of-{count:05}.safetensors" for index in range(1, count + 1)]


def _size(specs: Sequence[WeightSpec]) -> int:
    header, targets = encode_header((spec.name, spec.dtype, spec.shape) for spec in specs)
    return len(header) + sum(target.size_bytes for target in targets)
