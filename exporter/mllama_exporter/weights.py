"""Checkpoint tensors -> one weights file: read in blocks, scanned, cast, written in place, and hashed on the way.

The file is a safetensors file; the graphs' initializers point into it as ONNX external data. Memory does not grow with
the checkpoint: two threads convert a block each while the caller's hashes those before, in the order of the file.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from mllama_runtime.errors import CheckpointError, ResourceError, UsageError
from mllama_runtime.tensorfile import TensorInfo, encode_header

from mllama_exporter.checkpoints.checkpoint import NUMPY_DTYPES, Array, Checkpoint, Shape, listed

_NUM_THREADS = 2
_NUM_BUFFERS = 4  # blocks being converted, waiting for the hash or being hashed
_BLOCK_BYTES = 4 << 20  # of source or target, whichever is larger: small enough to stay in a cache between the passes

_DType = np.dtype[Any]


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """One tensor of the weights file: the checkpoint's of that name and shape, as `dtype` ("F32", "F16" or "BF16")."""

    name: str
    shape: Shape
    dtype: str


@dataclass(frozen=True, slots=True)
class TensorStats:
    """What a scan found in a tensor, before any cast.

    `max_abs` is the largest finite magnitude; `num_beyond` counts finite values the written dtype cannot hold.
    """

    max_abs: float = 0.0
    num_nan: int = 0
    num_inf: int = 0
    num_beyond: int = 0

    def __add__(self, other: TensorStats) -> TensorStats:
        return TensorStats(
            max(self.max_abs, other.max_abs),
            self.num_nan + other.num_nan,
            self.num_inf + other.num_inf,
            self.num_beyond + other.num_beyond,
        )

    @property
    def is_zero(self) -> bool:
        return self.max_abs == self.num_nan == self.num_inf == 0


@dataclass(frozen=True, slots=True)
class WeightsReport:
    """A weights file that has been written; `num_clamped` values were cut to the limit of the written dtype."""

    path: Path
    size_bytes: int
    sha256: str
    tensors: dict[str, TensorStats]
    num_clamped: int


@dataclass(frozen=True, slots=True)
class _Block:
    """`size` elements of one tensor, and the bytes at which they begin: within the tensor, and in the weights file."""

    name: str
    source: _DType
    target: _DType
    size: int
    source_offset: int
    target_offset: int


def write_weights(
    checkpoint: Checkpoint,
    plan: Sequence[WeightSpec],
    path: Path,
    *,
    clamp: bool = False,
    progress: Callable[[int, int], object] = lambda done_bytes, total_bytes: None,
) -> WeightsReport:
    """Writes `plan`'s tensors to `path`, synced to disk; the same checkpoint and plan give the same bytes.

    Args:
        clamp: cut values beyond the written dtype to its limit, instead of refusing them.
        progress: called with the bytes written and their total, after every block.

    Raises:
        CheckpointError: a tensor is absent, of another shape or dtype, damaged, or changed while it was read. All the
            damaged ones are named: those with NaN or Inf, and matrices of zeros.
        ResourceError: the disk has no room, or the file cannot be written.

        Nothing is left at `path` then.
    """
    header, targets = encode_header((spec.name, spec.dtype, spec.shape) for spec in plan)
    blocks = [block for target in targets for block in _blocks(checkpoint, target)]
    total = len(header) + sum(target.size_bytes for target in targets)
    try:
        check_room(path, total)
        with path.open("wb", buffering=0) as file:
            try:
                sha256, stats = _stream(
                    checkpoint, header, blocks, file.fileno(), clamp, lambda done: progress(done, total)
                )
                checkpoint.assert_unchanged()
                _check_damage(checkpoint, plan, stats, clamp)
                os.fsync(file.fileno())
            except BaseException:
                path.unlink(missing_ok=True)
                raise
    except OSError as error:  # of writing: the checkpoint turns its own into CheckpointError
        raise _unwritable(path, total, error) from error
    return WeightsReport(path, total, sha256, stats, sum(found.num_beyond for found in stats.values()))


def checked_weights(
    checkpoint: Checkpoint,
    plan: Sequence[WeightSpec],
    located: Mapping[str, TensorInfo],
    path: Path,
    *,
    progress: Callable[[int, int], object] = lambda done_bytes, total_bytes: None,
) -> WeightsReport:
    """Reads a file of the checkpoint that holds `plan`'s tensors in their order, as it would read them to write them.

    Args:
        located: every tensor's place in the file.

    Raises:
        CheckpointError: as `write_weights`.
    """
    blocks = [block for spec in plan for block in _blocks(checkpoint, replace(located[spec.name], name=spec.name))]
    total = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(min(info.offset_bytes for info in located.values()))
    sha256, stats = _stream(checkpoint, header, blocks, None, False, lambda done: progress(done, total))
    checkpoint.assert_unchanged()
    _check_damage(checkpoint, plan, stats, False)
    return WeightsReport(path, total, sha256, stats, 0)


def check_room(path: Path, num_bytes: int) -> None:
    """That so many more bytes fit the disk. Raises ResourceError."""
    free = shutil.disk_usage(path.parent).free
    if num_bytes > free:
        raise _no_room(path, num_bytes, free)


def _blocks(checkpoint: Checkpoint, target: TensorInfo) -> Iterator[_Block]:
    source = checkpoint.info(target.name)
    where = f"{checkpoint.folder}: {target.name}"
    for dtype in (source.dtype, target.dtype):
        if dtype not in NUMPY_DTYPES:
            raise UsageError("not a float dtype", where=where, expected=" or ".join(NUMPY_DTYPES), found=dtype)
    if source.shape != target.shape:
        raise CheckpointError("wrong shape", where=where, expected=list(target.shape), found=list(source.shape))
    old, new, size = NUMPY_DTYPES[source.dtype], NUMPY_DTYPES[target.dtype], math.prod(target.shape)
    step = _BLOCK_BYTES // max(old.itemsize, new.itemsize)
    for start in range(0, size, step):
        target_offset = target.offset_bytes + start * new.itemsize
        yield _Block(target.name, old, new, min(step, size - start), start * old.itemsize, target_offset)


def _stream(
    checkpoint: Checkpoint,
    header: bytes,
    blocks: Sequence[_Block],
    fd: int | None,
    clamp: bool,
    progress: Callable[[int], object],
) -> tuple[str, dict[str, TensorStats]]:
    """The sha256 of all that was written, or would have been, and what was found in each tensor."""
    if fd is not None:
        write_at(fd, header, 0)
    digest, done = hashlib.sha256(header), len(header)
    stats: dict[str, TensorStats] = {}
    buffers = np.empty((_NUM_BUFFERS, 2, _BLOCK_BYTES), np.uint8)  # used again: fresh pages cost more than a copy
    with ThreadPoolExecutor(_NUM_THREADS) as pool:

        def begun(index: int) -> Future[tuple[TensorStats, memoryview]]:
            return pool.submit(_convert, checkpoint, blocks[index], fd, clamp, buffers[index % _NUM_BUFFERS])

        running = deque(begun(index) for index in range(min(_NUM_BUFFERS, len(blocks))))
        for index, block in enumerate(blocks):
            found, data = running.popleft().result()
            digest.update(data)
            if index + _NUM_BUFFERS < len(blocks):
                running.append(begun(index + _NUM_BUFFERS))  # over the block that has just been hashed
            stats[block.name] = stats.get(block.name, TensorStats()) + found
            done += len(data)
            progress(done)
    return digest.hexdigest(), stats


def _convert(
    checkpoint: Checkpoint, block: _Block, fd: int | None, clamp: bool, buffers: Array
) -> tuple[TensorStats, memoryview]:
    """One block from the checkpoint to the weights file; also the bytes written, which lie in one of the `buffers`."""
    data = buffers[0, : block.size * block.source.itemsize].view(block.source)
    checkpoint.read_into(block.name, block.source_offset, data)
    stats = _scan(data, block.target)
    if block.source != block.target:
        out = buffers[1, : block.size * block.target.itemsize].view(block.target)
        data = _cast(data, out, clamp and stats.num_beyond > 0)
    written = data.view(np.uint8).data
    if fd is not None:
        write_at(fd, written, block.target_offset)
    return stats, written


def _bits(array: Array) -> Array:
    """The same bytes as unsigned integers, which NumPy compares and copies at full speed whatever the float type."""
    return array.view(f"u{array.itemsize}")


def _cast(data: Array, out: Array, clamp: bool) -> Array:
    """Round to nearest even into `out`; what it cannot hold becomes Inf, or its largest value with `clamp`."""
    with np.errstate(over="ignore", invalid="ignore"):
        np.copyto(out, data, casting="unsafe")
    if clamp:
        bits, infinity = _bits(out), _infinity(out.dtype)
        bits[bits & bits.dtype.type(_sign(out.dtype) - 1) == infinity] -= 1
    return out


def _scan(data: Array, target: _DType) -> TensorStats:
    """Magnitudes compare like their bits without the sign, so two integer maxima tell a healthy block."""
    bits, sign = _bits(data), _sign(data.dtype)
    largest = max(int(bits.view(f"i{data.itemsize}").max()), int(bits.max()) - sign, 0)
    limit = _largest_bits(data.dtype, _largest(target))
    if largest <= limit:
        return TensorStats(_value(largest, data.dtype))
    infinity, magnitudes = _infinity(data.dtype), bits & bits.dtype.type(sign - 1)
    num_nan, num_inf = np.count_nonzero(magnitudes > infinity), np.count_nonzero(magnitudes == infinity)
    num_beyond = np.count_nonzero(magnitudes > limit) - num_nan - num_inf
    largest = int(magnitudes[magnitudes < infinity].max(initial=0))
    return TensorStats(_value(largest, data.dtype), int(num_nan), int(num_inf), int(num_beyond))


def _sign(dtype: _DType) -> int:
    return 1 << (8 * dtype.itemsize - 1)


def _infinity(dtype: _DType) -> int:
    """The bits of infinity; those of the largest finite value are one less, those of a NaN more."""
    return int(_bits(np.full(1, np.inf, dtype))[0])


def _value(bits: int, dtype: _DType) -> float:
    return float(np.full(1, bits, f"u{dtype.itemsize}").view(dtype)[0])


def _largest(dtype: _DType) -> float:
    return _value(_infinity(dtype) - 1, dtype)


def _largest_bits(dtype: _DType, limit: float) -> int:
    """The bits of the largest value of `dtype` that is at most `limit`."""
    rounded = np.full(1, min(limit, _largest(dtype)), np.float64).astype(dtype)
    return int(_bits(rounded)[0]) - (float(rounded[0]) > limit)


def write_at(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of it, however many calls it takes."""
    rest = memoryview(data)
    while rest:
        count = os.pwrite(fd, rest, offset)
        rest, offset = rest[count:], offset + count


def _check_damage(
    checkpoint: Checkpoint, plan: Sequence[WeightSpec], stats: dict[str, TensorStats], clamp: bool
) -> None:
    damaged, beyond = [], []
    for spec in plan:
        found = stats[spec.name]
        if found.num_nan or found.num_inf:
            damaged.append(f"{spec.name} ({found.num_nan} NaN, {found.num_inf} Inf)")
        elif found.is_zero and not _may_be_zero(spec):
            damaged.append(f"{spec.name} (all zero)")
        if found.num_beyond:
            beyond.append(f"{spec.name} ({found.num_beyond} values, largest {found.max_abs:g})")
    if damaged:
        what = f"damaged tensors ({len(damaged)}): {listed(damaged)}"
        raise CheckpointError(what, where=checkpoint.folder, hint="fetch the checkpoint again, or ask its author")
    if beyond and not clamp:
        what = f"values beyond the written dtype in tensors ({len(beyond)}): {listed(beyond)}"
        raise CheckpointError(what, where=checkpoint.folder, hint="export as bf16 or fp32, or allow clamping")


def _may_be_zero(spec: WeightSpec) -> bool:
    """Gates start at zero and may stay there, a bias can be switched off; a matrix or norm of zeros is a lost one."""
    return spec.name.endswith(".bias") or math.prod(spec.shape) == 1


def _unwritable(path: Path, total: int, error: OSError) -> ResourceError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _no_room(path, total, shutil.disk_usage(path.parent).free)
    return ResourceError("cannot be written", where=path, found=error.strerror)


def _no_room(path: Path, total: int, free: int) -> ResourceError:
    hint = "free some space and export again"
    return ResourceError(
        "the disk is full", where=path, expected=f"{total} bytes", found=f"{free} bytes free", hint=hint
    )
