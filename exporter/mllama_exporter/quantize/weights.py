"""A bundle's weights -> a quantised bundle's: read in blocks of rows, scaled, rounded, written in place, hashed.

Memory does not grow with the model: two threads work on a block each. Both files are hashed on the way, in order, so
that what was quantised is known to be what the source's manifest lists.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from mllama_runtime.errors import BundleError, InputError, ResourceError
from mllama_runtime.tensorfile import TensorFile, TensorInfo, encode_header
from numpy.typing import NDArray

from mllama_exporter.checkpoints.checkpoint import published_name
from mllama_exporter.checkpoints.torch_tensors import tensor_from_bytes
from mllama_exporter.quantize.rounding import SCALE_DTYPES, quantized, row_scales
from mllama_exporter.quantize.scheme import FloatArray, Scheme, num_blocks
from mllama_exporter.weights import write_at

Bytes = NDArray[np.uint8]
_NUM_THREADS = 2
_NUM_PENDING = 4  # blocks under way, or waiting for the hash
_BLOCK_ELEMENTS = 1 << 20


@dataclass(frozen=True, slots=True, eq=False)
class MatrixPlan:
    """What becomes of one matrix [out, in].

    columns: multiplied into its columns, [in], before rounding; rows: its rows are divided by it, [out]. importance:
    the mean square of every column's input once the columns are scaled, [in], for schemes that use it.
    """

    scheme: Scheme
    columns: FloatArray | None = None
    rows: FloatArray | None = None
    importance: FloatArray | None = None


@dataclass(frozen=True, slots=True, eq=False)
class WeightsPlan:
    """matrices: those to quantise, by name; divisors: vectors [n] to divide weights of shape [n] by, such as norms.

    Everything else is copied.
    """

    matrices: Mapping[str, MatrixPlan]
    divisors: Mapping[str, FloatArray] = field(default_factory=dict)


def scale_name(weight: str) -> str:
    """Where the scales of a quantised weight are, [out] or [out, blocks]."""
    return f"{weight}_scale"


class WeightsReader:
    """Weights files, read at any place by any thread.

    files: in their order. tensors: of all files, under their published names. homes: the file of each.
    """

    def __init__(self, files: Sequence[TensorFile]) -> None:
        self.files = files
        self.tensors: dict[str, TensorInfo] = {}
        self.homes: dict[str, TensorFile] = {}
        for file in files:
            for info in file.tensors.values():
                name = published_name(info.name)
                self.tensors[name], self.homes[name] = replace(info, name=name), file
        self._descriptors: dict[Path, int] = {}

    def __enter__(self) -> WeightsReader:
        for file in self.files:
            self._descriptors[file.path] = os.open(file.path, os.O_RDONLY)
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)

    def read(self, file: TensorFile, offset_bytes: int, size_bytes: int) -> Bytes:
        data = np.empty(size_bytes, np.uint8)
        done = 0
        while done < size_bytes:
            count = os.preadv(self._descriptors[file.path], [data[done:].data], offset_bytes + done)
            if not count:
                raise BundleError("shorter than its header says", where=file.path)
            done += count
        return data

    def rows(self, name: str, *, most: int | None = None) -> FloatArray:
        """A matrix as float32, [R, C]; with `most`, so many of its rows at even distances."""
        info, file = self.tensors[name], self.homes[name]
        num_rows, row_bytes = info.shape[0], info.size_bytes // info.shape[0]
        if most is None or most >= num_rows:
            return as_float32(self.read(file, info.offset_bytes, info.size_bytes), info.dtype).reshape(info.shape)
        chosen = np.linspace(0, num_rows - 1, most).astype(int)
        data = [self.read(file, info.offset_bytes + int(row) * row_bytes, row_bytes) for row in chosen]
        return as_float32(np.concatenate(data), info.dtype).reshape(most, *info.shape[1:])


def as_float32(data: Bytes, dtype: str) -> FloatArray:
    """Bytes of a float dtype by its safetensors name -> float32. torch, because NumPy converts FP16 one at a time."""
    result: FloatArray = tensor_from_bytes(data, dtype).float().numpy()
    return result


def planned_tensors(source: Mapping[str, TensorInfo], plan: WeightsPlan) -> list[tuple[str, str, tuple[int, ...]]]:
    """Name, stored dtype and shape of everything in the new file. Four-bit weights stand as bytes, two in each."""
    tensors = []
    for name, info in source.items():
        matrix = plan.matrices.get(name)
        if matrix is None:
            tensors.append((name, info.dtype, info.shape))
            continue
        out, columns = info.shape
        stored = ("U8", (out, columns // 2)) if matrix.scheme.dtype == "I4" else (matrix.scheme.dtype, (out, columns))
        blocks = (out,) if matrix.scheme.block_size is None else (out, num_blocks(matrix.scheme, columns))
        tensors += [(name, *stored), (scale_name(name), info.dtype, blocks)]
    return tensors


def check_room(source: Mapping[str, TensorInfo], plan: WeightsPlan, path: Path) -> None:
    """That the new file, `path`, fits the disk. Raises ResourceError."""
    header, targets = encode_header(planned_tensors(source, plan))
    total = len(header) + sum(target.size_bytes for target in targets)
    free = shutil.disk_usage(path.parent).free
    if total > free:
        hint = "free some space and quantise again"
        raise ResourceError(
            "the disk is full", where=path, expected=f"{total} bytes", found=f"{free} bytes free", hint=hint
        )


def write_quantized_weights(
    reader: WeightsReader,
    sha256: Mapping[Path, str],
    plan: WeightsPlan,
    path: Path,
    progress: Callable[[int, int], object] = lambda done_bytes, total_bytes: None,
) -> str:
    """Write the new weights file, synced to disk; the same source and plan give the same bytes.

    Args:
        sha256: what the source's manifest says of each file.
        progress: called with the source bytes read and their total, after every block.

    Returns:
        Its SHA-256.

    Raises:
        BundleError: the source is not what its manifest says.
        InputError: a weight that no scale fits, naming it.
        OSError: the disk is full.
    """
    header, targets = encode_header(planned_tensors(reader.tensors, plan))
    read, written = {file.path: _InOrder() for file in reader.files}, _InOrder()
    total = sum(file.size_bytes for file in reader.files)
    with path.open("wb", buffering=0) as file:
        write_at(file.fileno(), header, 0)
        for source in reader.files:
            first = min(info.offset_bytes for info in source.tensors.values())
            read[source.path].add(0, reader.read(source, 0, first))
        written.add(0, np.frombuffer(header, np.uint8))
        work = _Work(reader, plan, {target.name: target for target in targets}, file.fileno())
        for block in work.blocks():
            read[block.path].add(*block.source)
            for segment in block.written:
                written.add(*segment)
            progress(sum(each.num_bytes for each in read.values()), total)
        os.fsync(file.fileno())
    for place, found in read.items():
        if found.hexdigest() != sha256[place]:
            raise BundleError(
                "the weights are not what the manifest says",
                where=place,
                expected=f"sha256 {sha256[place]}",
                found=found.hexdigest(),
                hint="see `mllama verify`; export the bundle again",
            )
    return written.hexdigest()


@dataclass(slots=True)
class _InOrder:
    """A hash of segments that come in nearly any order, as if they had come by offset."""

    num_bytes: int = 0
    _digest: Any = field(default_factory=hashlib.sha256)
    _waiting: dict[int, Bytes] = field(default_factory=dict)

    def add(self, offset: int, data: Bytes) -> None:
        if data.size:
            self._waiting[offset] = data
        while (ready := self._waiting.pop(self.num_bytes, None)) is not None:
            self._digest.update(ready.data)
            self.num_bytes += ready.size

    def hexdigest(self) -> str:
        if self._waiting:
            raise RuntimeError(f"a hole at byte {self.num_bytes}")
        return str(self._digest.hexdigest())


@dataclass(frozen=True, slots=True)
class _Block:
    """What was read, of the file at `path`, and what was written, each an offset and its bytes."""

    path: Path
    source: tuple[int, Bytes]
    written: Sequence[tuple[int, Bytes]]


@dataclass(frozen=True, slots=True)
class _Work:
    reader: WeightsReader
    plan: WeightsPlan
    targets: Mapping[str, TensorInfo]
    descriptor: int

    def blocks(self) -> Iterator[_Block]:
        """Every block of the source, in its order, read, converted and written."""
        spans = iter([(info, start, stop) for info in self.reader.tensors.values() for start, stop in _spans(info)])
        running: deque[Future[_Block]] = deque()
        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            try:
                for span in spans:
                    running.append(pool.submit(self._block, *span))
                    if len(running) == _NUM_PENDING:
                        yield running.popleft().result()
                while running:
                    yield running.popleft().result()
            finally:
                for future in running:
                    future.cancel()

    def _block(self, info: TensorInfo, start: int, stop: int) -> _Block:
        """Rows start to stop of a tensor."""
        row_bytes = info.size_bytes // info.shape[0]
        offset = info.offset_bytes + start * row_bytes
        home = self.reader.homes[info.name]
        data = self.reader.read(home, offset, (stop - start) * row_bytes)
        written = [
            (self.targets[name].offset_bytes + start * (self.targets[name].size_bytes // info.shape[0]), each)
            for name, each in self._converted(info, data, start, stop)
        ]
        for target_offset, each in written:
            write_at(self.descriptor, each.data, target_offset)
        return _Block(home.path, (offset, data), written)

    def _converted(self, info: TensorInfo, data: Bytes, start: int, stop: int) -> Iterator[tuple[str, Bytes]]:
        matrix, divisor = self.plan.matrices.get(info.name), self.plan.divisors.get(info.name)
        if matrix is None:
            yield info.name, data if divisor is None else self._divided(info, data, divisor[start:stop])
            return
        weight = as_float32(data, info.dtype).reshape(stop - start, -1)
        # Never in place: float32 weights are `data` itself, which is hashed as it was read.
        if matrix.columns is not None:
            weight = weight * matrix.columns
        if matrix.rows is not None:
            weight = weight / matrix.rows[start:stop, None]
        try:
            scales = row_scales(weight, matrix.scheme, info.dtype, matrix.importance)
        except InputError as error:
            raise InputError(
                error.what, where=f"{self.reader.homes[info.name].path}: {info.name}", found=error.found
            ) from error
        yield info.name, quantized(weight, scales, matrix.scheme).reshape(-1)
        yield scale_name(info.name), _stored(scales, info.dtype)

    def _divided(self, info: TensorInfo, data: Bytes, divisor: FloatArray) -> Bytes:
        with np.errstate(over="ignore"):
            stored = _stored(as_float32(data, info.dtype) / divisor, info.dtype)
        if not np.isfinite(as_float32(stored, info.dtype)).all():
            what = "a smoothing scale takes it beyond its precision"
            raise InputError(
                what, where=f"{self.reader.homes[info.name].path}: {info.name}", hint="quantise a bundle in bf16"
            )
        return stored


def _spans(info: TensorInfo) -> list[tuple[int, int]]:
    """First rows and ends of the blocks of a tensor."""
    num_rows = info.shape[0]
    step = max(1, _BLOCK_ELEMENTS // max(1, math.prod(info.shape[1:])))
    return [(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]


def _stored(values: FloatArray, dtype: str) -> Bytes:
    return np.ascontiguousarray(values.astype(SCALE_DTYPES[dtype])).view(np.uint8).reshape(-1)
