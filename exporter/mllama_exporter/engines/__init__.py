"""Bundle to TensorRT engines: plan, preflight, network, structural checks, engine. Nothing here runs an engine."""

from mllama_exporter.engines.pipeline import BuiltEngine, engine_for_bundle
from mllama_exporter.engines.plan import EngineOptions

__all__ = ["BuiltEngine", "EngineOptions", "engine_for_bundle"]
