"""Torch modules with the checkpoint's parameter names. They hold structure only: they are traced, never run."""

from mllama_exporter.modules.text import Decoder
from mllama_exporter.modules.vision import VisionEncoder

__all__ = ["Decoder", "VisionEncoder"]
