"""ONNX Runtime, which reports to nobody and computes what a graph says: import `ort` from here and nowhere else.

Official Linux builds since 1.29 collect telemetry by default (names and hashes of models, a device id kept in the
user's cache folder). Only this variable, set before the import, keeps all of it from starting:
https://github.com/microsoft/onnxruntime/blob/main/docs/Privacy.md
"""

from __future__ import annotations

import os

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import onnxruntime as ort

_ERRORS = 3
ort.set_default_logger_severity(_ERRORS)  # of what belongs to no session: it warns of plugins that nobody asked for


def session_options(*, log_severity_level: int) -> ort.SessionOptions:
    """Options for every session, at this verbosity (3: errors, 4: what is fatal).

    A graph's QuantizeLinear and DequantizeLinear stay where they are: ONNX Runtime would move them through other
    operators, some of which it has no 8-bit float kernel for, and merge them into kernels of other rounding.
    """
    options = ort.SessionOptions()
    options.log_severity_level = log_severity_level
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    return options


__all__ = ["ort", "session_options"]
