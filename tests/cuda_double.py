"""A test double of `cuda.bindings.driver`: no GPU, but the installed module's names, types and numbers of arguments.

Every call is checked against the installed module and written down. Its results are handles that stand for nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from cuda.bindings import driver

Call = tuple[str, tuple[Any, ...]]


class DriverDouble:
    """`fail`: names of functions, and the error each returns."""

    CUresult = driver.CUresult
    CUmemorytype = driver.CUmemorytype
    CUDA_MEMCPY2D = driver.CUDA_MEMCPY2D
    CUstream_flags = driver.CUstream_flags
    CUevent_flags = driver.CUevent_flags
    CUstreamCaptureMode = driver.CUstreamCaptureMode

    def __init__(self, *, version: int = 13_000, fail: dict[str, str] | None = None) -> None:
        self.calls: list[Call] = []
        self.fail = fail or {}
        self._version, self._num_made = version, 0

    def __getattr__(self, name: str) -> Callable[..., tuple[Any, ...]]:
        function = getattr(driver, name)  # AttributeError: the installed module has no such function

        def call(*arguments: Any) -> tuple[Any, ...]:
            assert len(arguments) == num_arguments(function), f"{name} takes another number of arguments"
            self.calls.append((name, arguments))
            error = getattr(driver.CUresult, self.fail.get(name, "CUDA_SUCCESS"))
            return error, *self._results(name, arguments)

        return call

    def called(self) -> list[str]:
        return [name for name, _ in self.calls]

    def _results(self, name: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        self._num_made += 1
        made = 4096 * self._num_made
        known: dict[str, tuple[Any, ...]] = {
            "cuDriverGetVersion": (self._version,),
            "cuDeviceGet": (driver.CUdevice(0),),
            "cuDeviceGetName": (b"A double\0\0\0",),
            "cuDevicePrimaryCtxRetain": (driver.CUcontext(made),),
            "cuMemGetInfo": (3 * 10**9, 8 * 10**9),
            "cuMemAlloc": (driver.CUdeviceptr(made),),
            "cuStreamCreate": (driver.CUstream(made),),
            "cuEventCreate": (driver.CUevent(made),),
            "cuStreamEndCapture": (driver.CUgraph(made),),
            "cuGraphInstantiate": (driver.CUgraphExec(made),),
        }
        if name in ("cuGetErrorName", "cuGetErrorString"):
            return (arguments[0].name.encode(),)
        return known.get(name, ())


def num_arguments(function: Any) -> int:
    """By the first line of its documentation, such as "cuStreamWaitEvent(hStream, hEvent, unsigned int Flags)"."""
    inside = function.__doc__.strip().splitlines()[0].split("(", 1)[1].rsplit(")", 1)[0]
    return len([part for part in re.sub(r"\[[^]]*\]", "", inside).split(",") if part.strip()])
