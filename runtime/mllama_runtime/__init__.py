"""The runtime of mllama-deploy: bundle -> session -> decode loop -> text.

    from mllama_runtime import Engine

    with Engine.load("bundle") as engine:
        print(engine.generate("What is this?", images=["photo.jpg"]).text)
"""

from __future__ import annotations

__version__ = "0.1.0"  # first: the modules below read it

from mllama_runtime.decode import TokenEvent
from mllama_runtime.engine import EncodedImage, Engine, Generation, Request, Stream, Timings, Usage
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
    "MllamaError",
    "Request",
    "RequestError",
    "ResourceError",
    "SamplingParams",
    "Stream",
    "Timings",
    "TokenEvent",
    "UsageError",
    "Usage",
    "__version__",
]
