"""Whether TensorRT-RTX works on this GPU at all: `python -m gpu.rtx ENGINE --out OUT`.

ENGINE is a small one, built for every GPU from Ampere on; it is hashed and listed where it was built.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from gpu.record import Fields, Recorder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "out")))
    arguments = parser.parse_args()
    record = Recorder(arguments.out, work="tensorrt-rtx")
    record.try_("load an engine", lambda: _loaded(arguments.engine))
    record.try_("build an engine", _built)


def _loaded(path: Path) -> Fields:
    trt, logger, messages = _tensorrt()
    engine = trt.Runtime(logger).deserialize_cuda_engine(path.read_bytes())
    context = engine.create_execution_context() if engine is not None else None
    return {
        "version": trt.__version__,
        "is_loaded": engine is not None,
        "has_context": context is not None,
        "said": " | ".join(messages)[:600],
    }


def _built() -> Fields:
    """On this GPU, for this GPU: y = x + x."""
    trt, logger, messages = _tensorrt()
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    x = network.add_input("x", trt.float32, (4,))
    network.mark_output(network.add_elementwise(x, x, trt.ElementWiseOperation.SUM).get_output(0))
    built = builder.build_serialized_network(network, builder.create_builder_config())
    engine = trt.Runtime(logger).deserialize_cuda_engine(built) if built is not None else None
    return {"is_built": built is not None, "is_loaded": engine is not None, "said": " | ".join(messages)[:600]}


def _tensorrt() -> tuple[Any, Any, list[str]]:
    import tensorrt_rtx as trt

    messages: list[str] = []

    class Logger(trt.ILogger):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            if severity <= trt.ILogger.WARNING:
                messages.append(text)

    return trt, Logger(), messages


if __name__ == "__main__":
    main()
