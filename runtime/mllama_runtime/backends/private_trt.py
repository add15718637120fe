"""TensorRT in its two flavours behind one door: `tensorrt` (data-centre GPUs) and `tensorrt_rtx` (workstation GPUs).

Their Python API is the same but for what `Flavour` says. Nothing here or above it imports either module by name:
`tensorrt_from_backend` does, and says in one line what is missing.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, get_args

from mllama_runtime.errors import EnvironmentFault

TensorRTBackend = Literal["tensorrt", "tensorrt-rtx"]
TENSORRT_BACKENDS: tuple[TensorRTBackend, ...] = get_args(TensorRTBackend)

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR of cuda.h


@dataclass(frozen=True, slots=True)
class Flavour:
    """What tells the two apart.

    builds_without_gpu: engines are made ahead of time, for GPUs named by compute capability.
    """

    backend: TensorRTBackend
    title: str
    module: str
    builds_without_gpu: bool
    has_timing_cache: bool
    install: str


_FLAVOURS = {
    flavour.backend: flavour
    for flavour in (
        Flavour(
            "tensorrt",
            "TensorRT",
            "tensorrt",
            builds_without_gpu=False,
            has_timing_cache=True,
            install='run: pip install "mllama-deploy[trt]" --extra-index-url https://pypi.nvidia.com',
        ),
        Flavour(
            "tensorrt-rtx",
            "TensorRT-RTX",
            "tensorrt_rtx",
            builds_without_gpu=True,
            has_timing_cache=False,  # its timing caches are empty shells since 1.2: kernels are chosen on the device
            install='run: pip install "mllama-deploy[trt-rtx]"',
        ),
    )
}


@dataclass(slots=True)
class Log:
    """What TensorRT said while a `logged` block ran."""

    warnings: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    details: list[str] = field(default_factory=list)

    def last_error(self) -> str:
        """The line to quote in an error of ours."""
        return self.errors[-1] if self.errors else "TensorRT gave no reason"


class TensorRT:
    """One flavour, loaded. `api` is its module."""

    def __init__(self, flavour: Flavour, api: Any) -> None:
        self.flavour, self.api = flavour, api
        self.version: str = api.__version__
        self._log = Log()
        self.logger = self._new_logger()

    @contextmanager
    def logged(self) -> Iterator[Log]:
        """Collect what is said within the block. TensorRT keeps the first logger of a process, so there is only one."""
        before, self._log = self._log, Log()
        try:
            yield self._log
        finally:
            self._log = before

    def _new_logger(self) -> Any:
        severities, owner = self.api.ILogger.Severity, self

        class Logger(self.api.ILogger):  # type: ignore[misc, name-defined]
            def log(self, severity: Any, message: str) -> None:
                log = owner._log
                if severity in (severities.ERROR, severities.INTERNAL_ERROR):
                    log.errors.append(message)
                elif severity == severities.WARNING:
                    log.warnings.append(message)
                else:
                    log.details.append(message)

        return Logger()


@cache
def tensorrt_from_backend(backend: TensorRTBackend) -> TensorRT:
    """The flavour of that name.

    Raises:
        EnvironmentFault: its package is missing, or its libraries cannot be loaded.
    """
    flavour = _FLAVOURS[backend]
    try:
        api = importlib.import_module(flavour.module)
    except ModuleNotFoundError as fault:
        if fault.name != flavour.module:
            raise _broken(flavour, fault) from fault
        raise EnvironmentFault(
            f"{flavour.title} is not installed", where=flavour.module, hint=flavour.install
        ) from None
    except (ImportError, OSError, RuntimeError, AttributeError) as fault:  # how missing libraries show, by version
        raise _broken(flavour, fault) from fault
    if not hasattr(api, "Builder"):  # an empty folder of that name is a module too
        raise _broken(flavour, "it has no Builder")
    return TensorRT(flavour, api)


def is_installed(backend: TensorRTBackend) -> bool:
    """Whether its package is there, loadable or not."""
    return importlib.util.find_spec(_FLAVOURS[backend].module) is not None


def gpu_compute_capabilities() -> tuple[str, ...]:
    """Of each NVIDIA GPU that the driver shows, such as "8.9"; empty without a GPU or a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ()
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return ()
    return tuple(_compute_capability(driver, index) for index in range(count.value))


def _compute_capability(driver: ctypes.CDLL, index: int) -> str:
    device, number = ctypes.c_int(), ctypes.c_int()
    driver.cuDeviceGet(ctypes.byref(device), index)
    parts = []
    for attribute in (_MAJOR, _MINOR):
        driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
        parts.append(str(number.value))
    return ".".join(parts)


def _broken(flavour: Flavour, reason: object) -> EnvironmentFault:
    what = f"{flavour.title} is installed, but cannot be loaded"
    return EnvironmentFault(what, where=flavour.module, found=reason, hint=f"install its libraries: {flavour.install}")
