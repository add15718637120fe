"""The runtime of mllama-deploy: bundle -> session -> decode loop -> text.

    from mllama_runtime import Engine

    with Engine.load("bundle") as engine:
        print(engine.generate("What is this?", images=["photo.jpg"]).text)

Names are imported when first used, so that the command line starts at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mllama_runtime.decode import TokenEvent
    from mllama_runtime.engine import EncodedImage, Engine, Generation, Request, Stream, Timings, Usage
    from mllama_runtime.engine_record import Limits
    from mllama_runtime.errors import (
        BundleError,
        CheckpointError,
        EnvironmentFault,
        GateError,
        ImageError,
        InputError,
        MllamaError,
        RequestError,
        ResourceError,
        UsageError,
    )
    from mllama_runtime.sampling import SamplingParams

__version__ = "0.1.0"
__all__ = [
    "BundleError",
    "CheckpointError",
    "EncodedImage",
    "Engine",
    "EnvironmentFault",
    "GateError",
    "Generation",
    "ImageError",
    "InputError",
    "Limits",
    "MllamaError",
    "Request",
    "RequestError",
    "ResourceError",
    "SamplingParams",
    "Stream",
    "Timings",
    "TokenEvent",
    "Usage",
    "UsageError",
    "__version__",
]
_HOMES = {
    "decode": ("TokenEvent",),
    "engine": ("EncodedImage", "Engine", "Generation", "Request", "Stream", "Timings", "Usage"),
    "engine_record": ("Limits",),
    "errors": tuple(name for name in __all__ if name.endswith(("Error", "Fault"))),
    "sampling": ("SamplingParams",),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
