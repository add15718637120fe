"""CUDA's libraries from NVIDIA's Python packages, loaded before ONNX Runtime looks for them.

Those packages lie off the loader's path (`site-packages/nvidia/*/lib`), where ONNX Runtime's provider finds nothing.
What is loaded under a library's name counts as found for it.

Sonames: what onnxruntime-gpu 1.31's provider is linked against (CUDA 13) or opens by name.
"""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path

from mllama_runtime.errors import EnvironmentFault

# In the order in which they need each other.
_NEEDED = ("libcudart.so.13", "libcublasLt.so.13", "libcublas.so.13", "libcurand.so.10", "libcudnn.so.9")
_OPTIONAL = ("libnvrtc.so.13", "libcufft.so.12")  # opened for kernels that our graphs may not use


def load_cuda_libraries() -> None:
    """Load them from NVIDIA's Python packages, or from wherever the loader finds them.

    Raises:
        EnvironmentFault: some cannot be loaded from either place; each is named, with what the loader said.
    """
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    faults = {name: _fault(name, roots) for name in (*_OPTIONAL, *_NEEDED)}
    if missing := [f"{name} ({faults[name]})" for name in _NEEDED if faults[name]]:
        raise EnvironmentFault(
            "CUDA's libraries cannot be loaded",
            expected="CUDA 13 with cuDNN 9",
            found=", ".join(missing),
            hint='run: pip install "mllama-deploy[cuda]"',
        )


def _fault(name: str, roots: list[Path]) -> str | None:
    """Load a library; what the loader said of the first place that was tried, if none will do."""
    fault = None
    for place in [*(str(path) for root in roots for path in sorted(root.glob(f"*/lib/{name}"))), name]:
        try:
            ctypes.CDLL(place)
        except OSError as error:
            fault = fault or str(error)
        else:
            return None
    return fault
