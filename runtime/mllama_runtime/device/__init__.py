"""The thin line between the runtime and silicon: memory with addresses, streams that keep order, graphs to run.

`device.cuda` is an NVIDIA GPU; `device.trt` and `device.ort` run graphs on it. What stands above (`backends.static`)
sees nothing but the protocols below, so all of its logic also runs over a host's memory, in tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from mllama_runtime.manifest import DType

ITEM_BYTES: Mapping[DType, int] = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "bool": 1}

GraphName = Literal["vision", "decoder", "greedy", "sampler"]
ProfileName = Literal["images", "prefill", "decode", "text_prefill", "text_decode", "rows"]


@dataclass(frozen=True, slots=True)
class Tensor:
    """Contiguous memory of a device, seen as an array."""

    address: int
    shape: tuple[int, ...]
    dtype: DType

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


class Event(Protocol):
    """A point in a stream's work; one that was never recorded has passed."""

    def wait(self) -> None:
        """Block the host until the work before it is done. Raises what that work raised."""
        ...


class Captured(Protocol):
    """Work recorded once, with its addresses, to be launched again and again."""

    def launch(self) -> None: ...


class Stream(Protocol):
    """An ordered queue of work on a device. Nothing here blocks the host but `synchronize`.

    Arrays are page-locked (`Device.pinned`) or slices of such, contiguous, and stay untouched until their copy is done.
    """

    @property
    def handle(self) -> int: ...

    def upload(self, address: int, array: NDArray[Any]) -> None:
        """Host to device."""
        ...

    def download(self, array: NDArray[Any], address: int) -> None:
        """Device to host."""
        ...

    def copy(
        self, target: int, source: int, row_bytes: int, num_rows: int = 1, target_pitch: int = 0, source_pitch: int = 0
    ) -> None:
        """Device to device: num_rows rows of row_bytes, whose starts are a pitch apart (in bytes) on either side."""
        ...

    def clear(self, address: int, num_bytes: int) -> None:
        """Fill with zero bytes."""
        ...

    def record(self, event: Event) -> None:
        """Let the event be the point after all work so far."""
        ...

    def wait(self, event: Event) -> None:
        """Work from here on waits for the event; the host does not."""
        ...

    def capture(self, work: Callable[[], None]) -> Captured:
        """Record what `work` puts into this stream instead of doing it."""
        ...

    def synchronize(self) -> None:
        """Block the host until all work so far is done. Raises what that work raised."""
        ...


class Device(Protocol):
    """Where memory is and work happens. Closing frees everything; twice is fine.

    Raises:
        EnvironmentFault: from any call, when the device or its driver fails; it cannot be used any more.
        ResourceError: from `allocate` and `pinned`, when memory is short.
    """

    name: str

    def memory(self) -> tuple[int, int]:
        """Free and total device memory in bytes."""
        ...

    def allocate(self, num_bytes: int) -> int:
        """Address of zeroed device memory, aligned to 256 bytes."""
        ...

    def pinned(self, shape: tuple[int, ...], dtype: type[np.generic]) -> NDArray[Any]:
        """A zeroed page-locked array of the host."""
        ...

    def stream(self) -> Stream: ...

    def event(self) -> Event: ...

    def close(self) -> None: ...


class Session(Protocol):
    """A graph with its shapes and addresses set: what a stream runs."""

    def bind(self, tensors: Mapping[str, Tensor]) -> None:
        """Set every input and output, by name. A past and its present have the same address.

        Raises:
            UsageError: a name is missing or unknown, or a shape or dtype is none the graph takes: both sides are told.
        """
        ...

    def run(self, stream: Stream) -> None:
        """Put one run into the stream."""
        ...


class Program(Protocol):
    """A graph loaded onto a device.

    dtypes: of every input and output, by name. weights_bytes: device memory it keeps. workspace_bytes: device memory
    for activations that a session is given; sessions whose runs are in one stream share it; None of a program that
    allocates them by itself when it first runs. capturable: whether its runs can be captured.
    """

    dtypes: Mapping[str, DType]
    weights_bytes: int
    capturable: bool

    @property
    def workspace_bytes(self) -> int | None: ...

    def session(self, profile: ProfileName, workspace: int) -> Session:
        """A session for the shapes of that profile; `workspace` is the address of workspace_bytes of device memory."""
        ...


ProgramLoader = Callable[[GraphName], Program]
"""Loads a graph of a bundle onto the device it was made for. Raises BundleError, ResourceError, EnvironmentFault."""
