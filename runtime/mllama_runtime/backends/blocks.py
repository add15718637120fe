"""Regions of memory allocated: tensors on the device, and their mirrors in page-locked memory of the host."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mllama_runtime.device import Device, Stream, Tensor
from mllama_runtime.memory import Region, aligned, tensor_bytes

Array = NDArray[Any]
_HOST_DTYPES: Mapping[str, type[np.generic]] = {"float32": np.float32, "int64": np.int64, "bool": np.bool_}


class Reader(Protocol):
    """Whoever still has to read a mirror."""

    def read(self) -> object: ...


class Block:
    """One region: `tensors` by name on the device, and a ring of mirrors that are used in turn.

    A mirror is written by the host and uploaded, or downloaded into and read by the host. It is taken again only when
    the copy it was used for is done, and whoever was to read it has.
    """

    def __init__(self, device: Device, region: Region) -> None:
        self.tensors: dict[str, Tensor] = {}
        offset, address, views = 0, device.allocate(region.num_bytes), {}
        for name, (shape, dtype) in region.tensors.items():
            size = tensor_bytes(shape, dtype)
            self.tensors[name] = Tensor(address + offset, shape, dtype)
            views[name] = (slice(offset, offset + size), shape, dtype)
            offset += aligned(size)
        self.address = address
        self._bytes = [device.pinned((region.num_bytes,), np.uint8) for _ in range(region.num_mirrors)]
        self._mirrors: list[dict[str, Array]] = [
            {name: raw[part].view(_HOST_DTYPES[dtype]).reshape(shape) for name, (part, shape, dtype) in views.items()}
            for raw in self._bytes
        ]
        self._events = [device.event() for _ in self._mirrors]
        self._readers: list[Reader | None] = [None for _ in self._mirrors]
        self._index = 0

    def turn(self, reader: Reader | None = None) -> Mapping[str, Array]:
        """The next mirror, free to be written; `reader` is asked to read it before it is taken again."""
        self._index = (self._index + 1) % len(self._mirrors)
        before = self._readers[self._index]
        if before is not None:
            before.read()
        self._events[self._index].wait()
        self._readers[self._index] = reader
        return self._mirrors[self._index]

    def upload(self, stream: Stream) -> None:
        """The whole mirror taken last."""
        stream.upload(self.address, self._bytes[self._index])
        stream.record(self._events[self._index])

    def download(self, stream: Stream) -> None:
        """Into the mirror taken last."""
        stream.download(self._bytes[self._index], self.address)
        stream.record(self._events[self._index])

    def upload_part(self, stream: Stream, part: Array, address: int) -> None:
        """A contiguous part of the mirror taken last, to any address."""
        stream.upload(address, part)
        stream.record(self._events[self._index])

    def wait(self, stream: Stream) -> None:
        """Let a stream wait for the copy of the mirror taken last."""
        stream.wait(self._events[self._index])

    def arrived(self) -> Arrived:
        """What tells that the copy of the mirror taken last is done."""
        return self._events[self._index]

    def row(self, name: str, index: int) -> Tensor:
        """One row of a tensor [rows, ...], as [1, ...]."""
        tensor = self.tensors[name]
        one = (1, *tensor.shape[1:])
        return Tensor(tensor.address + index * tensor_bytes(one, tensor.dtype), one, tensor.dtype)

    def first(self, name: str, *sizes: int) -> Tensor:
        """The start of a tensor's memory, seen as the given shape."""
        tensor = self.tensors[name]
        return Tensor(tensor.address, sizes, tensor.dtype)


class Arrived(Protocol):
    def wait(self) -> None: ...
