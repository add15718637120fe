"""The verbs of `mllama` that need torch and onnx: `mllama_runtime.cli` loads them when they are called."""
