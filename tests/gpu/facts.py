"""What the machine with the GPU is: driver, clocks, memory, packages, and where CUDA's libraries lie."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
from pathlib import Path

from gpu.record import Fields, Recorder

_QUERY = (
    "name,driver_version,memory.total,memory.free,power.limit,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,"
    "clocks_event_reasons.active,temperature.gpu,persistence_mode,mig.mode.current,ecc.mode.current,pcie.link.gen.current"
)
_PACKAGES = (
    *("torch", "transformers", "numpy", "onnx", "onnxruntime", "onnxruntime-gpu", "cuda-bindings", "cuda-core"),
    *("cuda-pathfinder", "nvidia-cublas", "nvidia-cudnn-cu13", "nvidia-cufft", "nvidia-curand", "nvidia-cuda-runtime"),
    *("tokenizers", "pillow", "jinja2", "click", "ml-dtypes", "pytest", "safetensors"),
)


def facts(record: Recorder) -> None:
    record.try_("gpu", _gpu)
    record.try_("host", _host)
    record.try_("packages", _packages)
    record.try_("libraries", _libraries)
    record.try_("onnxruntime", _onnxruntime)


def _gpu() -> Fields:
    query = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader", "--id=0"]
    values = subprocess.run(query, capture_output=True, text=True, check=False)
    names = _QUERY.split(",")
    found = [value.strip() for value in values.stdout.strip().split(",")]
    return dict(zip(names, found, strict=True)) if len(found) == len(names) else {"said": values.stdout[:300]}


def _host() -> Fields:
    found: Fields = {"python": platform.python_version(), "kernel": platform.release(), "cores": os.cpu_count()}
    for folder in ("/dev/shm", "/tmp"):
        if Path(folder).exists():
            found[folder] = f"{shutil.disk_usage(folder).free / 1e9:.1f} GB free"
    pages, size = os.sysconf("SC_AVPHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return found | {"free_memory_gb": pages * size / 1e9}


def _packages() -> Fields:
    found: Fields = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _libraries() -> Fields:
    """Of CUDA's wheels, and what the loader would find."""
    spec = importlib.util.find_spec("nvidia")
    roots = list(spec.submodule_search_locations or []) if spec else []
    folders = sorted({str(path.parent) for root in roots for path in Path(root).rglob("*.so*")})
    listed = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True, check=False).stdout
    names = ("libcuda.so", "libcublas.so", "libcudart.so", "libcudnn.so", "libcufft.so", "libcurand.so")
    lines = [line.strip() for line in listed.splitlines() if any(name in line for name in names)]
    return {"wheels": folders, "ldconfig": lines, "LD_LIBRARY_PATH": os.environ.get("LD_LIBRARY_PATH")}


def _onnxruntime() -> Fields:
    from mllama_runtime.backends.private_ort import ort

    return {"version": ort.__version__, "file": ort.__file__, "providers": ort.get_available_providers()}
