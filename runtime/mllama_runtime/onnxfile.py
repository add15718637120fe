"""Where an ONNX file keeps its external data, found without the `onnx` package.

A bundle's graphs point into its weights file. Back ends follow such pointers, so they are checked when a bundle is
opened: a small walker of the protobuf wire format finds every TensorProto that a ModelProto can hold.
Field numbers: onnx/onnx.proto (IR version 13 and before).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mllama_runtime.errors import BundleError
from mllama_runtime.fields import show

MAX_GRAPH_BYTES = 256 * 2**20  # weights live outside; a graph of the largest model has a few megabytes

# For each message that can lead to a tensor: field number -> message.
_CHILDREN: dict[str, dict[int, str]] = {
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Training": {1: "Graph", 2: "Graph"},
    "Graph": {1: "Node", 5: "Tensor", 15: "Sparse"},
    "Function": {7: "Node", 11: "Attribute"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "Sparse", 23: "Sparse"},
    "Sparse": {1: "Tensor", 2: "Tensor"},
}
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_KEYS = {"location", "offset", "length", "checksum"}


@dataclass(frozen=True, slots=True)
class ExternalTensor:
    """A tensor whose data is in another file: `length` bytes at `offset` of `location`."""

    name: str
    location: str
    offset: int
    length: int


def external_tensors(path: Path) -> list[ExternalTensor]:
    """Every tensor of an ONNX file that points at another file: initializers, attributes, subgraphs, functions.

    Raises:
        BundleError: the file cannot be read, is no protobuf, or a pointer is not exactly one location, one length and
            at most one offset, both of them plain decimal numbers.
    """
    try:
        size = path.stat().st_size
        if not 0 < size <= MAX_GRAPH_BYTES:
            expected = f"1 to {MAX_GRAPH_BYTES} bytes"
            raise BundleError("not a graph by its size", where=path, expected=expected, found=f"{size} bytes")
        data = path.read_bytes()
    except OSError as fault:
        raise BundleError(f"cannot be read ({fault.strerror})", where=path) from fault
    try:
        tensors = [_tensor(data, begin, end) for begin, end in _tensor_spans(data)]
    except _MalformedError as fault:
        raise BundleError(f"not an ONNX file ({fault})", where=path) from None
    return [_pointer(path, name, pairs) for name, pairs in tensors if pairs is not None]


class _MalformedError(ValueError):
    """The bytes are no protobuf message."""


def _tensor_spans(data: bytes) -> Iterator[tuple[int, int]]:
    """First byte and end of every TensorProto within the ModelProto `data`."""
    pending = [("Model", 0, len(data))]  # a stack of our own: nesting is as deep as a file claims
    while pending:
        kind, begin, end = pending.pop()
        if kind == "Tensor":
            yield begin, end
            continue
        children = _CHILDREN[kind]
        for field, wire, first, last in _fields(data, begin, end):
            if field in children:
                _expect(wire, _BYTES, field, kind)
                pending.append((children[field], first, last))


def _tensor(data: bytes, begin: int, end: int) -> tuple[str, list[tuple[str, str]] | None]:
    """Name and pointer entries of a TensorProto, None without any; a location other than 0 claims them too.

    Fields: name = 8, external_data = 13 (key = 1, value = 2), data_location = 14.
    """
    name, external, pairs = "", False, list[tuple[str, str]]()
    for field, wire, first, last in _fields(data, begin, end):
        if field == 8:
            _expect(wire, _BYTES, field, "Tensor")
            name = data[first:last].decode("utf-8", "replace")
        elif field == 13:
            _expect(wire, _BYTES, field, "Tensor")
            entry = {key: _text(data[a:b]) for key, kind, a, b in _fields(data, first, last) if kind == _BYTES}
            pairs.append((entry.get(1, ""), entry.get(2, "")))
            external = True
        elif field == 14:
            _expect(wire, _VARINT, field, "Tensor")
            external = external or _varint(data, first, last)[0] != 0
    return name, pairs if external else None


def _pointer(path: Path, name: str, pairs: list[tuple[str, str]]) -> ExternalTensor:
    what = f"the external data of tensor {show(name)} is malformed"
    values = dict(pairs)
    if len(values) != len(pairs) or not {"location", "length"} <= values.keys() <= _KEYS:
        found = show([key for key, _ in pairs])
        raise BundleError(what, where=path, expected="location, length and offset once each", found=found)
    numbers = values.get("offset", "0"), values["length"]
    for number in numbers:
        if not (number.isascii() and number.isdecimal() and len(number) <= 19):
            raise BundleError(what, where=path, expected="offset and length as decimal numbers", found=show(number))
    return ExternalTensor(name, values["location"], int(numbers[0]), int(numbers[1]))


def _expect(wire: int, expected: int, field: int, kind: str) -> None:
    if wire != expected:
        raise _MalformedError(f"field {field} of a {kind} message has wire type {wire}")


def _fields(data: bytes, begin: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """`(field number, wire type, first byte, byte after the last)` of every field of the message in data[begin:end]."""
    at = begin
    while at < end:
        tag, first = _varint(data, at, end)
        field, wire, at = tag >> 3, tag & 7, first
        if wire == _VARINT:
            at = _varint(data, at, end)[1]
        elif wire == _BYTES:
            length, first = _varint(data, at, end)
            at = first + length
        elif wire in (_FIXED64, _FIXED32):
            at += 8 if wire == _FIXED64 else 4
        else:
            raise _MalformedError(f"wire type {wire} at byte {first}")
        if not 0 < field < 2**29 or at > end:  # parsers disagree on larger numbers
            raise _MalformedError(f"field {field} at byte {first} ends at {at} of {end}")
        yield field, wire, first, at


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    value = 0
    for index in range(at, min(at + 10, end)):
        byte = data[index]
        value |= (byte & 0x7F) << (7 * (index - at))
        if byte < 0x80:
            return value, index + 1
    raise _MalformedError(f"an unfinished number at byte {at}")


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise _MalformedError(f"text that is not UTF-8: {show(data)}") from None
