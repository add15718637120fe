"""What a run is on: GPU, driver, CUDA, and the packages that are there."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import shutil
import subprocess
from datetime import UTC, datetime
from typing import Any

from mllama_runtime.backends.private_trt import TENSORRT_BACKENDS, gpu_compute_capabilities, tensorrt_from_backend
from mllama_runtime.errors import EnvironmentFault

_QUERY = "name,driver_version,memory.total,power.limit,clocks.max.sm,clocks.max.memory"
_PACKAGES = (
    *("cuda-bindings", "numpy", "onnx", "onnxruntime", "onnxruntime-gpu"),
    *("torch", "transformers", "ml-dtypes"),
)


def environment() -> dict[str, Any]:
    """The JSON object; what could not be found out is null."""
    backends: dict[str, dict[str, str | None]] = {}
    for backend in TENSORRT_BACKENDS:
        try:
            backends[backend] = {"version": tensorrt_from_backend(backend).version, "missing": None}
        except EnvironmentFault as fault:
            backends[backend] = {"version": None, "missing": str(fault)}
    backends["cuda"] = _cuda_provider()
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "gpu": _gpu(),
        "compute_capability": next(iter(gpu_compute_capabilities()), None),
        "cuda": _cuda_of_driver(),
        "backends": backends,
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "python": platform.python_version(),
        "cpu_cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
    }


def _gpu() -> dict[str, str | None]:
    """The first GPU, as nvidia-smi shows it."""
    names = _QUERY.split(",")
    if shutil.which("nvidia-smi") is None:
        return dict.fromkeys(names)
    found = subprocess.run(
        ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader", "--id=0"],
        capture_output=True,
        text=True,
        check=False,
    )
    values = [value.strip() for value in found.stdout.strip().split(",")]
    return dict(zip(names, values, strict=True)) if len(values) == len(names) else dict.fromkeys(names)


def _cuda_of_driver() -> str | None:
    """The newest CUDA that the driver runs, such as "13.0"."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(version))
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def _cuda_provider() -> dict[str, str | None]:
    try:
        from mllama_runtime.backends.private_ort import ort
    except ImportError as error:
        return {"version": None, "missing": str(error)}
    if "CUDAExecutionProvider" in ort.get_available_providers():
        return {"version": ort.__version__, "missing": None}
    return {"version": None, "missing": f"onnxruntime {ort.__version__} has no CUDA provider: install onnxruntime-gpu"}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
