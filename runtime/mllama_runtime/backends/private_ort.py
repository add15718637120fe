"""ONNX Runtime, which reports to nobody: import `ort` from here and nowhere else.

Official Linux builds since 1.29 collect telemetry by default (names and hashes of models, a device id kept in the
user's cache folder). Only this variable, set before the import, keeps all of it from starting:
https://github.com/microsoft/onnxruntime/blob/main/docs/Privacy.md
"""

from __future__ import annotations

import os

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import onnxruntime as ort

__all__ = ["ort"]
