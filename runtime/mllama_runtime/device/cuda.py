"""An NVIDIA GPU through CUDA's driver API: the first one that the driver shows, in its primary context.

The calls of a step go straight to the driver's functions, with numbers for addresses: nothing is wrapped or allocated
on the way. The tests check its calls against the installed `cuda.bindings`, on a double; `tests/gpu` on a GPU.

Reference: https://docs.nvidia.com/cuda/cuda-driver-api/
"""

from __future__ import annotations

import contextlib
import math
import mmap
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mllama_runtime.device import Captured, Event
from mllama_runtime.errors import EnvironmentFault, MllamaError, ResourceError

_CUDA_13 = 13_000  # as cuDriverGetVersion tells it
_INSTALL = 'run: pip install "mllama-deploy[trt-rtx]", or [trt] or [cuda]'
_DEFAULT_STREAM = 0
_AGAIN = "open the engine again; if that does not help, look at the driver's messages (`nvidia-smi`, `dmesg`)"


def cuda_driver() -> Any:
    """The module `cuda.bindings.driver`, initialised.

    Raises:
        EnvironmentFault: the package, the driver or a GPU is missing, or the driver is too old.
    """
    try:
        from cuda.bindings import driver as cu
    except ImportError as fault:
        raise EnvironmentFault("cuda-bindings is not installed", found=fault, hint=_INSTALL) from fault
    try:
        error = cu.cuInit(0)[0]
        version = cu.cuDriverGetVersion()[1]
    except RuntimeError as fault:  # libcuda.so.1 is missing, or lacks a function
        hint = "install NVIDIA's driver 580 or newer; in a container, start it with access to the GPU"
        raise EnvironmentFault("no NVIDIA driver was found", found=str(fault).rstrip("."), hint=hint) from fault
    if version < _CUDA_13:
        found = f"one for CUDA {version // 1000}.{version % 1000 // 10}"
        expected = "one for CUDA 13.0, which is 580 or newer"
        raise EnvironmentFault("the NVIDIA driver is too old", expected=expected, found=found, hint="update the driver")
    if error:
        found, hint = _told(cu, error), "check `nvidia-smi`; in a container, start it with access to the GPU"
        raise EnvironmentFault("no NVIDIA GPU can be used", found=found, hint=hint)
    return cu


def open_cuda_device() -> CudaDevice:
    """The first GPU. Raises EnvironmentFault, as `cuda_driver`."""
    return CudaDevice(cuda_driver())


class CudaEvent:
    def __init__(self, device: CudaDevice, handle: Any) -> None:
        self._device, self.handle = device, handle

    def wait(self) -> None:
        self._device.call(self._device.cu.cuEventSynchronize, self.handle)


class CudaGraph:
    """An instantiated CUDA graph."""

    def __init__(self, device: CudaDevice, handle: Any, stream: Any) -> None:
        self._device, self._handle, self._stream = device, handle, stream

    def launch(self) -> None:
        self._device.call(self._device.cu.cuGraphLaunch, self._handle, self._stream)


class CudaStream:
    """A stream that does not wait for the default one."""

    def __init__(self, device: CudaDevice, stream: Any) -> None:
        self._device, self._cu, self._stream = device, device.cu, stream
        self.handle = int(stream)

    def upload(self, address: int, array: NDArray[Any]) -> None:
        self._device.call(self._cu.cuMemcpyHtoDAsync, address, array.ctypes.data, array.nbytes, self._stream)

    def download(self, array: NDArray[Any], address: int) -> None:
        self._device.call(self._cu.cuMemcpyDtoHAsync, array.ctypes.data, address, array.nbytes, self._stream)

    def copy(
        self, target: int, source: int, row_bytes: int, num_rows: int = 1, target_pitch: int = 0, source_pitch: int = 0
    ) -> None:
        if num_rows == 1:
            self._device.call(self._cu.cuMemcpyDtoDAsync, target, source, row_bytes, self._stream)
            return
        on_device = self._cu.CUmemorytype.CU_MEMORYTYPE_DEVICE
        rows = self._cu.CUDA_MEMCPY2D()
        rows.dstMemoryType, rows.dstDevice, rows.dstPitch = on_device, target, target_pitch
        rows.srcMemoryType, rows.srcDevice, rows.srcPitch = on_device, source, source_pitch
        rows.WidthInBytes, rows.Height = row_bytes, num_rows
        self._device.call(self._cu.cuMemcpy2DAsync, rows, self._stream)

    def clear(self, address: int, num_bytes: int) -> None:
        self._device.call(self._cu.cuMemsetD8Async, address, 0, num_bytes, self._stream)

    def record(self, event: Event) -> None:
        self._device.call(self._cu.cuEventRecord, _own(event).handle, self._stream)

    def wait(self, event: Event) -> None:
        self._device.call(self._cu.cuStreamWaitEvent, self._stream, _own(event).handle, 0)

    def capture(self, work: Callable[[], None]) -> Captured:
        device, cu = self._device, self._cu
        mode = cu.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL  # other threads may allocate meanwhile
        device.call(cu.cuStreamBeginCapture, self._stream, mode)
        try:
            work()
        except BaseException:  # what failed is what `work` raised; the stream must be usable again
            error, broken = cu.cuStreamEndCapture(self._stream)
            if not error:
                cu.cuGraphDestroy(broken)
            raise
        graph = device.call(cu.cuStreamEndCapture, self._stream)
        try:
            return CudaGraph(device, device.instantiated(graph), self._stream)
        finally:
            device.call(cu.cuGraphDestroy, graph)

    def synchronize(self) -> None:
        self._device.call(self._cu.cuStreamSynchronize, self._stream)


class CudaDevice:
    """Everything it hands out is freed by `close`; page-locked arrays stay readable, for their memory is the host's."""

    def __init__(self, cu: Any) -> None:
        self.cu, self.name = cu, "GPU"
        self._thread = threading.local()  # a context is current in one thread at a time
        device = self._checked(cu.cuDeviceGet(0))
        self.name = self._checked(cu.cuDeviceGetName(256, device)).split(b"\0")[0].decode("ascii", "replace")
        self._device: Any = device
        self._context: Any = self._checked(cu.cuDevicePrimaryCtxRetain(device))
        self._streams: list[Any] = []
        self._freeing = contextlib.ExitStack()  # the latest first
        self._freeing.callback(cu.cuDevicePrimaryCtxRelease, device)

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """A driver's function, in this device's context: its result.

        Raises:
            ResourceError: memory is short.
            EnvironmentFault: anything else; most such faults end the context.
        """
        if getattr(self._thread, "context", None) is not self._context:
            self._enter()
        return self._checked(function(*arguments))

    def memory(self) -> tuple[int, int]:
        free, total = self.call(self.cu.cuMemGetInfo)
        return free, total

    def allocate(self, num_bytes: int) -> int:
        memory = self.call(self.cu.cuMemAlloc, max(1, num_bytes))
        self._freeing.callback(self.cu.cuMemFree, memory)
        self.call(self.cu.cuMemsetD8, memory, 0, max(1, num_bytes))
        self.call(self.cu.cuStreamSynchronize, _DEFAULT_STREAM)  # which none of our streams waits for
        return int(memory)

    def pinned(self, shape: tuple[int, ...], dtype: type[np.generic]) -> NDArray[Any]:
        num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        # Whole pages, for memory is locked by the page, and one page only once.
        pages = np.frombuffer(mmap.mmap(-1, max(1, num_bytes), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)
        self.call(self.cu.cuMemHostRegister, pages.ctypes.data, pages.nbytes, 0)
        self._freeing.callback(self._unregister, pages)
        return pages[:num_bytes].view(dtype).reshape(shape)

    def _unregister(self, pages: NDArray[np.uint8]) -> None:
        """Holds the pages until then: a place that is given back while it is locked can be locked by nobody else."""
        self.cu.cuMemHostUnregister(pages.ctypes.data)

    def stream(self) -> CudaStream:
        stream = self.call(self.cu.cuStreamCreate, self.cu.CUstream_flags.CU_STREAM_NON_BLOCKING)
        self._freeing.callback(self.cu.cuStreamDestroy, stream)
        self._streams.append(stream)
        return CudaStream(self, stream)

    def event(self) -> CudaEvent:
        event = self.call(self.cu.cuEventCreate, self.cu.CUevent_flags.CU_EVENT_DISABLE_TIMING)
        self._freeing.callback(self.cu.cuEventDestroy, event)
        return CudaEvent(self, event)

    def instantiated(self, graph: Any) -> Any:
        """A captured graph, ready to be launched."""
        made = self.call(self.cu.cuGraphInstantiate, graph, 0)
        self._freeing.callback(self.cu.cuGraphExecDestroy, made)
        return made

    def close(self) -> None:
        """Once all work is done, in the reverse order of making.

        A device that has failed refuses this too: then its context frees it all.
        """
        self.cu.cuCtxSetCurrent(self._context)
        while self._streams:
            self.cu.cuStreamSynchronize(self._streams.pop())
        self._freeing.close()

    def _enter(self) -> None:
        self._checked(self.cu.cuCtxSetCurrent(self._context))
        self._thread.context = self._context

    def _checked(self, result: tuple[Any, ...]) -> Any:
        if result[0]:
            raise self._fault(result[0])
        return result[1] if len(result) == 2 else result[1:]

    def _fault(self, error: Any) -> MllamaError:
        found = _told(self.cu, error)
        if error == self.cu.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            hint = "free GPU memory, or build with a smaller --max-batch or --max-seq-len"
            return ResourceError("out of memory", where=self.name, found=found, hint=hint)
        return EnvironmentFault("the GPU failed", where=self.name, found=found, hint=_AGAIN)


def _own(event: Event) -> CudaEvent:
    if not isinstance(event, CudaEvent):
        raise TypeError(f"an event of another device: {event}")
    return event


def _told(cu: Any, error: Any) -> str:
    """Such as "CUDA_ERROR_NO_DEVICE: no CUDA-capable device is detected"."""
    told = (function(error)[1] for function in (cu.cuGetErrorName, cu.cuGetErrorString))
    return ": ".join(text.decode("ascii", "replace") for text in told if text) or f"error {int(error)}"
