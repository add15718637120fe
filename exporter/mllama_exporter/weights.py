"""Checkpoint tensors -> one weights file: read in blocks, scanned, cast, transposed where asked, written in place.

The file is a safetensors file; the graphs' initializers point into it as ONNX external data. Memory does not grow with
the checkpoint: each of two threads works on one block at a time, so that reading, casting and writing overlap.
"""

from __future__ import annotations

import errno
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
from mllama_runtime.errors import CheckpointError, ResourceError, UsageError
from mllama_runtime.tensorfile import TensorInfo, encode_header

from .checkpoint import NUMPY_DTYPES, Array, Checkpoint, Shape, listed

_NUM_THREADS = 2
_BUFFER_BYTES = 48 << 20  # of a thread's source and of its target; sets how long the pieces of a transpose are
_PLAIN_BYTES = 8 << 20  # of a block that is not transposed: small enough to stay in a cache between the passes
_STRIPE_ROWS = 32  # rows transposed together: their columns fill a cache line of the target

_DType = np.dtype[Any]


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """One tensor of the weights file: `source` of the checkpoint, as `shape` and `dtype` ("F32", "F16" or "BF16").

    With `transpose`, `source` is a matrix stored the other way round.
    """

    name: str
    source: str
    shape: Shape
    dtype: str
    transpose: bool = False


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
    tensors: dict[str, TensorStats]
    num_clamped: int


@dataclass(frozen=True, slots=True)
class _Block:
    """Rows `start` to `stop` of one tensor; of a tensor that is not transposed, a row is one element."""

    spec: WeightSpec
    source: _DType
    target: TensorInfo
    start: int
    stop: int
    num_columns: int

    @property
    def target_bytes(self) -> int:
        return (self.stop - self.start) * self.num_columns * NUMPY_DTYPES[self.spec.dtype].itemsize


def write_weights(
    checkpoint: Checkpoint,
    plan: Sequence[WeightSpec],
    path: Path,
    *,
    clamp: bool = False,
    allow_damaged: bool = False,
    progress: Callable[[int, int], object] = lambda done_bytes, total_bytes: None,
) -> WeightsReport:
    """Writes `plan`'s tensors to `path`, synced to disk; the same checkpoint and plan give the same bytes.

    Args:
        clamp: cut values beyond the written dtype to its limit, instead of refusing them.
        allow_damaged: let tensors with NaN or Inf, and matrices of zeros, through.
        progress: called with the bytes written and their total, after every block.

    Raises:
        CheckpointError: a tensor is absent, of another shape or dtype, damaged, or changed while it was read. All the
            damaged ones are named.
        ResourceError: the disk has no room, or the file cannot be written.

        Nothing is left at `path` then.
    """
    header, blocks = _planned(checkpoint, plan)
    total = len(header) + sum(block.target_bytes for block in blocks)
    try:
        free = shutil.disk_usage(path.parent).free
        if total > free:
            raise _no_room(path, total, free)
        with path.open("wb", buffering=0) as file:
            try:
                _write(file.fileno(), header, 0)
                stats = _stream(
                    checkpoint, blocks, file.fileno(), clamp, lambda done: progress(len(header) + done, total)
                )
                checkpoint.assert_unchanged()
                _check_damage(checkpoint, plan, stats, clamp, allow_damaged)
                os.fsync(file.fileno())
            except BaseException:
                path.unlink(missing_ok=True)
                raise
    except OSError as error:  # of writing: the checkpoint turns its own into CheckpointError
        raise _unwritable(path, total, error) from error
    return WeightsReport(path, total, stats, sum(found.num_beyond for found in stats.values()))


def _planned(checkpoint: Checkpoint, plan: Sequence[WeightSpec]) -> tuple[bytes, list[_Block]]:
    """The file's header, and the blocks in file order."""
    header, targets = encode_header((spec.name, spec.dtype, spec.shape) for spec in plan)
    specs = {spec.name: spec for spec in plan}
    blocks = [block for info in targets for block in _blocks(checkpoint, specs[info.name], info)]
    return header, blocks


def _blocks(checkpoint: Checkpoint, spec: WeightSpec, target: TensorInfo) -> Iterator[_Block]:
    source = checkpoint.info(spec.source)
    where = f"{checkpoint.folder}: {spec.source}"
    for dtype in (source.dtype, spec.dtype):
        if dtype not in NUMPY_DTYPES:
            raise UsageError("not a float dtype", where=where, expected=" or ".join(NUMPY_DTYPES), found=dtype)
    stored = spec.shape[::-1] if spec.transpose else spec.shape
    if source.shape != stored or (spec.transpose and len(stored) != 2):
        raise CheckpointError("wrong shape", where=where, expected=list(stored), found=list(source.shape))
    rows, columns = stored if spec.transpose else (math.prod(stored), 1)
    itemsize = max(NUMPY_DTYPES[source.dtype].itemsize, NUMPY_DTYPES[spec.dtype].itemsize)
    step = (_BUFFER_BYTES if spec.transpose else _PLAIN_BYTES) // (itemsize * columns)
    if step == 0:
        raise UsageError("the rows are too long to transpose", where=where, found=list(stored))
    for start in range(0, rows, step):
        yield _Block(spec, NUMPY_DTYPES[source.dtype], target, start, min(start + step, rows), columns)


class _Scratch:
    """A source and a target buffer, used again for block after block: fresh pages cost more than a copy."""

    def __init__(self) -> None:
        self.source = np.empty(_BUFFER_BYTES, np.uint8)
        self.target = np.empty(_BUFFER_BYTES, np.uint8)


def _stream(
    checkpoint: Checkpoint, blocks: Sequence[_Block], fd: int, clamp: bool, progress: Callable[[int], object]
) -> dict[str, TensorStats]:
    idle: SimpleQueue[_Scratch] = SimpleQueue()
    for _ in range(_NUM_THREADS):
        idle.put(_Scratch())
    stats: dict[str, TensorStats] = {}
    done = 0

    def converted(block: _Block) -> TensorStats:
        scratch = idle.get()
        try:
            return _convert(checkpoint, block, fd, clamp, scratch)
        finally:
            idle.put(scratch)

    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        # Leaving the loop early closes the iterator, which cancels what has not begun.
        for block, found in zip(blocks, pool.map(converted, blocks), strict=True):
            stats[block.spec.name] = stats.get(block.spec.name, TensorStats()) + found
            done += block.target_bytes
            progress(done)
    return stats


def _convert(checkpoint: Checkpoint, block: _Block, fd: int, clamp: bool, scratch: _Scratch) -> TensorStats:
    """One block from the checkpoint to the weights file."""
    shape, target = (block.stop - block.start, block.num_columns), NUMPY_DTYPES[block.spec.dtype]
    data = _as_array(scratch.source, block.source, shape)
    checkpoint.read_into(block.spec.source, block.start * block.num_columns * block.source.itemsize, data)
    stats = _scan(data, target)
    clamp = clamp and stats.num_beyond > 0
    if not block.spec.transpose:
        if block.source != target:
            data = _cast(data, _as_array(scratch.target, target, shape), clamp)
        _write(fd, data, block.target.offset_bytes + block.start * target.itemsize)
        return stats
    turned = _turned(data, _as_array(scratch.target, target, shape[::-1]), clamp)
    num_rows = block.spec.shape[1]
    if shape[0] == num_rows:
        _write(fd, turned, block.target.offset_bytes)
    else:  # a block holds a piece of every row of the written tensor
        for column, piece in enumerate(turned):
            _write(fd, piece, block.target.offset_bytes + (column * num_rows + block.start) * target.itemsize)
    return stats


def _turned(data: Array, out: Array, clamp: bool) -> Array:
    """`data`'s transpose in `out`, cast; in stripes, or every element would miss the cache."""
    for row in range(0, len(data), _STRIPE_ROWS):
        stripe = data[row : row + _STRIPE_ROWS]
        if stripe.dtype != out.dtype:
            stripe = _cast(stripe, np.empty(stripe.shape, out.dtype), clamp)
        _bits(out)[:, row : row + _STRIPE_ROWS] = _bits(stripe).T
    return out


def _as_array(buffer: Array, dtype: _DType, shape: Shape) -> Array:
    return buffer[: math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)


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


def _write(fd: int, data: Array | bytes, offset: int) -> None:
    rest = memoryview(data) if isinstance(data, bytes) else data.reshape(-1).view(np.uint8).data
    while rest:
        count = os.pwrite(fd, rest, offset)
        rest, offset = rest[count:], offset + count


def _check_damage(
    checkpoint: Checkpoint, plan: Sequence[WeightSpec], stats: dict[str, TensorStats], clamp: bool, allow_damaged: bool
) -> None:
    damaged, beyond = [], []
    for spec in plan:
        found = stats[spec.name]
        if found.num_nan or found.num_inf:
            damaged.append(f"{spec.source} ({found.num_nan} NaN, {found.num_inf} Inf)")
        elif found.is_zero and not _may_be_zero(spec):
            damaged.append(f"{spec.source} (all zero)")
        if found.num_beyond:
            beyond.append(f"{spec.source} ({found.num_beyond} values, largest {found.max_abs:g})")
    if damaged and not allow_damaged:
        what = f"damaged tensors ({len(damaged)}): {listed(damaged)}"
        raise CheckpointError(what, where=checkpoint.folder, hint="fetch the checkpoint again, or ask its author")
    if beyond and not clamp:
        what = f"values beyond the written dtype in tensors ({len(beyond)}): {listed(beyond)}"
        raise CheckpointError(what, where=checkpoint.folder, hint="export as bf16 or fp32, or allow clamping")


def _may_be_zero(spec: WeightSpec) -> bool:
    """Gates start at zero and may stay there, a bias can be switched off; a matrix or norm of zeros is a lost one."""
    return spec.source.endswith(".bias") or math.prod(spec.shape) == 1


def _unwritable(path: Path, total: int, error: OSError) -> ResourceError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _no_room(path, total, shutil.disk_usage(path.parent).free)
    return ResourceError("cannot be written", where=path, found=error.strerror)


def _no_room(path: Path, total: int, free: int) -> ResourceError:
    hint = "free some space and export again"
    return ResourceError(
        "the disk is full", where=path, expected=f"{total} bytes", found=f"{free} bytes free", hint=hint
    )
