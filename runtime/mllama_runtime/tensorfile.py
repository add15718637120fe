"""safetensors files: a strict reader of their headers, and the layout of the ones we write.

The exporter reads checkpoints through here, bundles check their weights, and ONNX external data points at the offsets
found here. Only the header is read; the data is neither read nor mapped. The `safetensors` library is no dependency
of the runtime, and it takes what we refuse (a key standing twice, fields it does not know, a header that does not start
with `{`); its errors name neither the file nor the tensor, nor both sizes of a truncated file.

Format: 8 bytes little-endian header length, a JSON header padded with spaces, then the tensors without holes.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mllama_runtime.errors import InputError, UsageError
from mllama_runtime.fields import load_json, parse, show

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_RANK = 32
DATA_ALIGNMENT = 64  # bytes: a cache line, and the widest SIMD register

# Bytes of one element, by the format's names. F4, F6_E2M3 and F6_E3M2 exist too, and are refused.
DTYPE_BYTES: Mapping[str, int] = {
    **dict.fromkeys(("BOOL", "U8", "I8"), 1),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor: `offset_bytes` counts from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset_bytes: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class TensorFile:
    """A safetensors file whose header has been checked against its size; tensors stand in the order of their data."""

    path: Path
    size_bytes: int
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor as the header spells it; the offsets count from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def read_header(path: Path, *, error: type[InputError]) -> TensorFile:
    """Read and check the header of a safetensors file.

    Raises:
        error: naming the file, the tensor where there is one, and the bytes found and expected, for anything that is
            not exactly one well-formed safetensors file.
    """
    try:
        with path.open("rb") as file:
            size_bytes = os.fstat(file.fileno()).st_size
            if size_bytes < 8:
                raise error("truncated", where=path, expected="at least 8 bytes", found=f"{size_bytes} bytes")
            length = int.from_bytes(file.read(8), "little")
            _check_length(path, length, size_bytes, error)
            data = file.read(length)
    except OSError as fault:
        raise error(f"cannot be read ({fault.strerror})", where=path) from fault
    if len(data) != length or not data.startswith(b"{"):
        raise error("the header is not JSON", where=path, expected="'{' first", found=show(data[:1]))

    header = load_json(data, where=path, error=error)
    if not isinstance(header, dict):
        raise error("the header is not a JSON object", where=path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise error("__metadata__ does not map strings to strings", where=path)
    start = 8 + length
    tensors = [_tensor(path, name, value, start, error) for name, value in header.items()]
    tensors.sort(key=lambda tensor: (tensor.offset_bytes, tensor.size_bytes))
    _check_layout(path, tensors, start, size_bytes, error)
    return TensorFile(path, size_bytes, {tensor.name: tensor for tensor in tensors}, metadata)


def encode_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, tuple[TensorInfo, ...]]:
    """The first bytes of a safetensors file for `(name, dtype, shape)` triples, and the tensors in file order.

    The data starts at a multiple of 64 bytes. The format allows no holes, so tensors are ordered by the largest power
    of two (up to 64) that divides their size, given order kept within one: each then starts at a multiple of its own,
    which is 64 for any matrix and at least the element size for everything.

    Raises:
        UsageError: a name given twice, or an unknown dtype.
    """
    sized: dict[str, tuple[str, tuple[int, ...], int]] = {}
    for name, dtype, shape in tensors:
        if name in sized or dtype not in DTYPE_BYTES:
            raise UsageError("a tensor is given twice, or its dtype is unknown", where=name, found=dtype)
        sized[name] = (dtype, shape, DTYPE_BYTES[dtype] * math.prod(shape))
    order = sorted(sized, key=lambda name: -_alignment(sized[name][2]))

    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    begin = 0
    for name in order:
        dtype, shape, size = sized[name]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + size]}
        begin += size
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-(8 + len(text)) % DATA_ALIGNMENT)

    infos, offset = [], 8 + len(text)
    for name in order:
        dtype, shape, size = sized[name]
        infos.append(TensorInfo(name, dtype, shape, offset, size))
        offset += size
    return len(text).to_bytes(8, "little") + text, tuple(infos)


def _alignment(size_bytes: int) -> int:
    return min(DATA_ALIGNMENT, size_bytes & -size_bytes) if size_bytes else DATA_ALIGNMENT


def _check_length(path: Path, length: int, size_bytes: int, error: type[InputError]) -> None:
    if not 0 < length <= MAX_HEADER_BYTES:
        expected = f"1 to {MAX_HEADER_BYTES} bytes"
        raise error("the header's length is out of range", where=path, expected=expected, found=f"{length} bytes")
    if 8 + length > size_bytes:
        expected = f"at least {8 + length} bytes for the header"
        raise error("truncated", where=path, expected=expected, found=f"{size_bytes} bytes")


def _tensor(path: Path, name: str, value: object, start: int, error: type[InputError]) -> TensorInfo:
    entry = parse(_Entry, value, where=path, error=error, path=f"tensor {show(name)}")
    label = f"tensor {show(name)}"
    if entry.dtype not in DTYPE_BYTES:
        raise error(f"{label} has an unsupported dtype", where=path, found=show(entry.dtype))
    if len(entry.shape) > MAX_RANK or not all(0 <= dim < 2**63 for dim in entry.shape):
        raise error(f"{label} has an impossible shape", where=path, found=show(list(entry.shape)))
    begin, end = entry.data_offsets
    if not 0 <= begin <= end < 2**63:
        raise error(f"{label} has impossible offsets", where=path, found=show([begin, end]))
    size = DTYPE_BYTES[entry.dtype] * math.prod(entry.shape)
    if end - begin != size:
        expected = f"{show(size)} bytes for {entry.dtype} {show(list(entry.shape))}"
        raise error(f"{label} has offsets that do not fit its shape", where=path, expected=expected, found=end - begin)
    return TensorInfo(name, entry.dtype, entry.shape, start + begin, size)


def _check_layout(path: Path, tensors: list[TensorInfo], start: int, size_bytes: int, error: type[InputError]) -> None:
    """Tensors must follow each other without hole or overlap from `start` to the end of the file."""
    end = start
    for tensor in tensors:
        if tensor.offset_bytes != end:
            what = "overlaps the one before it" if tensor.offset_bytes < end else "leaves a hole before it"
            expected, found = f"data at byte {end}", tensor.offset_bytes
            raise error(f"tensor {show(tensor.name)} {what}", where=path, expected=expected, found=found)
        end += tensor.size_bytes
    if size_bytes < end:
        first = next(tensor for tensor in tensors if tensor.offset_bytes + tensor.size_bytes > size_bytes)
        what = f"truncated within tensor {show(first.name)}"
        raise error(what, where=path, expected=f"{end} bytes", found=f"{size_bytes} bytes")
    if size_bytes > end:
        raise error("bytes behind the last tensor", where=path, expected=f"{end} bytes", found=f"{size_bytes} bytes")
