"""A test double of a device: numpy memory for a GPU's, ONNX Runtime on the CPU for its kernels.

Work is done as late as a device may do it: when the host waits for an event behind it, or synchronizes. So a source
that is changed too early, a result that is read too early and a wait that is missing between two streams give wrong
tokens here, not on silicon alone. Copies outside of what was allocated, arrays that are not page-locked, and captured
work whose session was bound to other addresses since are refused. It counts what is allocated.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from mllama_runtime.backends.static import StaticBackend
from mllama_runtime.bundle import Bundle
from mllama_runtime.device import (
    Captured,
    Event,
    GraphName,
    ProfileName,
    Program,
    ProgramLoader,
    Session,
    Stream,
    Tensor,
)
from mllama_runtime.device.ort import Provider, ort_programs
from mllama_runtime.engine_record import Limits
from mllama_runtime.errors import EnvironmentFault, ResourceError
from numpy.typing import NDArray

_ALIGNMENT = 256
Work = Callable[[], None]


class HostEvent:
    """A point in a stream's queue."""

    def __init__(self) -> None:
        self.stream: HostStream | None = None
        self.mark = 0

    def wait(self) -> None:
        if self.stream is not None:
            self.stream.do_until(self.mark)


class HostStream:
    def __init__(self, device: HostDevice) -> None:
        self._device, self.handle = device, id(self)
        self._queue: deque[Work] = deque()
        self._num_queued = self._num_done = 0
        self._recording: list[tuple[Work, Callable[[], object] | None]] | None = None

    def upload(self, address: int, array: NDArray[Any]) -> None:
        self._device.check_pinned(array)
        self.put(lambda: self._device.write(address, array))

    def download(self, array: NDArray[Any], address: int) -> None:
        self._device.check_pinned(array)

        def work() -> None:
            array.reshape(-1).view(np.uint8)[:] = self._device.view(address, array.nbytes)

        self.put(work)

    def copy(
        self, target: int, source: int, row_bytes: int, num_rows: int = 1, target_pitch: int = 0, source_pitch: int = 0
    ) -> None:
        def work() -> None:
            for row in range(num_rows):
                start, stop = source + row * source_pitch, target + row * target_pitch
                assert row_bytes <= abs(stop - start), "source and target overlap"
                self._device.write(stop, self._device.view(start, row_bytes))

        self.put(work)

    def clear(self, address: int, num_bytes: int) -> None:
        def work() -> None:
            self._device.view(address, num_bytes)[:] = 0

        self.put(work)

    def record(self, event: Event) -> None:
        assert isinstance(event, HostEvent)
        assert self._recording is None, "an event is recorded into captured work"
        event.stream, event.mark = self, self._num_queued

    def wait(self, event: Event) -> None:
        assert isinstance(event, HostEvent)
        stream, mark = event.stream, event.mark
        if stream is not None:
            self.put(lambda: stream.do_until(mark))

    def synchronize(self) -> None:
        self.do_until(self._num_queued)

    def capture(self, work: Work) -> Captured:
        self._recording = []
        try:
            work()
            recorded = self._recording
        finally:
            self._recording = None
        self._device.num_captures += 1
        return HostGraph(self, recorded)

    @property
    def is_capturing(self) -> bool:
        return self._recording is not None

    def put(self, work: Work, state: Callable[[], object] | None = None) -> None:
        """`state` is what must be the same whenever captured work is launched."""
        if self._recording is not None:
            self._recording.append((work, state))
            return
        self._queue.append(work)
        self._num_queued += 1

    def do_until(self, mark: int) -> None:
        while self._num_done < mark:
            self._device.count_operation()
            work = self._queue.popleft()
            self._num_done += 1
            work()


class HostGraph:
    def __init__(self, stream: HostStream, recorded: list[tuple[Work, Callable[[], object] | None]]) -> None:
        self._stream = stream
        self._recorded = [(work, state, state() if state else None) for work, state in recorded]

    def launch(self) -> None:
        for work, state, before in self._recorded:
            assert state is None or state() == before, "a session was bound to other addresses after its capture"
            self._stream.put(work)


class HostDevice:
    """`fail_after`: operations after which every call raises, as a GPU's do once a kernel has failed."""

    name = "host (test double)"

    def __init__(self, *, total_bytes: int = 2**34, fail_after: int | None = None) -> None:
        self._total, self.fail_after = total_bytes, fail_after
        self._memory: dict[int, NDArray[np.uint8]] = {}
        self._pinned: list[NDArray[Any]] = []
        self.device_bytes = self.pinned_bytes = 0
        self.num_allocations = self.num_captures = self.num_operations = 0
        self.runs: list[str] = []
        self.is_closed = False

    def memory(self) -> tuple[int, int]:
        return self._total - self.device_bytes, self._total

    def allocate(self, num_bytes: int) -> int:
        if self.device_bytes + num_bytes > self._total:
            raise ResourceError("out of device memory", found=f"{num_bytes} bytes asked for")
        array = np.zeros(num_bytes + _ALIGNMENT, np.uint8)
        address = -(-array.ctypes.data // _ALIGNMENT) * _ALIGNMENT
        start = address - array.ctypes.data
        self._memory[address] = array[start : start + num_bytes]
        self.device_bytes += num_bytes
        self.num_allocations += 1
        return address

    def pinned(self, shape: tuple[int, ...], dtype: type[np.generic]) -> NDArray[Any]:
        array = np.zeros(shape, dtype)
        self._pinned.append(array)
        self.pinned_bytes += array.nbytes
        self.num_allocations += 1
        return array

    def stream(self) -> HostStream:
        return HostStream(self)

    def event(self) -> HostEvent:
        return HostEvent()

    def close(self) -> None:
        self.is_closed = True
        self._memory.clear()
        self._pinned.clear()

    def check_pinned(self, array: NDArray[Any]) -> None:
        assert array.flags.c_contiguous, "a copy of what is not contiguous"
        start, stop = array.ctypes.data, array.ctypes.data + array.nbytes
        inside = any(own.ctypes.data <= start and stop <= own.ctypes.data + own.nbytes for own in self._pinned)
        assert inside, "a copy from or to memory that is not page-locked"

    def view(self, address: int, num_bytes: int) -> NDArray[np.uint8]:
        for start, array in self._memory.items():
            if start <= address and address + num_bytes <= start + array.nbytes:
                return array[address - start : address - start + num_bytes]
        raise AssertionError(f"{num_bytes} bytes at {address:#x} are not memory of the device")

    def write(self, address: int, array: NDArray[Any]) -> None:
        self.view(address, array.nbytes)[:] = array.reshape(-1).view(np.uint8)

    def count_operation(self) -> None:
        self.num_operations += 1
        if self.fail_after is not None and self.num_operations > self.fail_after:
            raise EnvironmentFault("the device failed (test double)", hint="open the engine again")


class HostProgram:
    """An ONNX Runtime program whose runs can be captured, and which works in a workspace, as TensorRT's do."""

    capturable = True
    workspace_bytes: int | None = 1024  # to be handed out and held, though nothing is computed there

    def __init__(self, name: GraphName, program: Program, device: HostDevice) -> None:
        self._name, self._program, self._device = name, program, device
        self.dtypes, self.weights_bytes = program.dtypes, program.weights_bytes

    def session(self, profile: ProfileName, workspace: int) -> Session:
        self._device.view(workspace, self.workspace_bytes or 0)
        return HostSession(f"{self._name} {profile}", self._program.session(profile, workspace), self._device)


class HostSession:
    """What is bound counts from the run on that follows, as with TensorRT; not from when the run is done."""

    def __init__(self, name: str, session: Session, device: HostDevice) -> None:
        self._name, self._session, self._device = name, session, device
        self._bound: dict[str, Tensor] = {}
        self._done_with: dict[str, Tensor] = {}
        self._has_run = False

    def bind(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            self._device.view(tensor.address, tensor.num_bytes)
            assert tensor.address % _ALIGNMENT == 0, f"{name} is not aligned as TensorRT wants it"
        self._bound = dict(tensors)

    def run(self, stream: Stream) -> None:
        """What never ran cannot be captured: TensorRT takes on its shapes in a first run."""
        assert isinstance(stream, HostStream)
        bound = self._bound
        assert self._has_run or not stream.is_capturing, "work is captured in its first run"
        self._has_run = True

        def work() -> None:
            if bound is not self._done_with:
                self._session.bind(bound)
                self._done_with = bound
            self._device.runs.append(self._name)
            self._session.run(stream)

        stream.put(work, lambda: self._bound)


def host_backend(bundle: Bundle, *, limits: Limits | None = None, device: HostDevice | None = None) -> StaticBackend:
    """The back end for devices, on the double."""
    model = bundle.manifest.model
    chosen = limits or Limits(8, min(512, model.text.max_seq_len), 64, model.vision.max_num_tiles)
    own = device or HostDevice()

    def programs(_: object, stream: Stream) -> ProgramLoader:
        provider = Provider("CPUExecutionProvider", "cpu", {"vision": "vision_ort", "decoder": "decoder_ort"})
        load = ort_programs(bundle, provider, own)

        def wrapped(graph: GraphName) -> Program:
            return HostProgram(graph, load(graph), own)

        return wrapped

    return StaticBackend(bundle, "host double", chosen, lambda: own, programs)
