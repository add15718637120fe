"""CUDA's libraries from NVIDIA's Python packages, loaded before ONNX Runtime looks for them.

Those packages lie off the loader's path (`site-packages/nvidia/*/lib`), where ONNX Runtime's provider finds nothing. A
library that is loaded already counts as found, whichever way it came.

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
        EnvironmentFault: some are in neither place; all that are missing are named.
    """
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    missing = [name for name in (*_OPTIONAL, *_NEEDED) if not _is_loaded(name, roots) and name in _NEEDED]
    if missing:
        raise EnvironmentFault(
            "CUDA's libraries are missing",
            expected="CUDA 13 with cuDNN 9",
            found=f"no {', '.join(missing)}",
            hint='run: pip install "mllama-deploy[cuda]"',
        )


def _is_loaded(name: str, roots: list[Path]) -> bool:
    places = [str(path) for root in roots for path in sorted(root.glob(f"*/lib/{name}"))]
    return any(map(_opens, [*places, name]))


def _opens(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True
