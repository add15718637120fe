"""ONNX Runtime programs over a device's memory: the CUDA provider, bound by address so that nothing is copied.

The same code binds host memory with the CPU provider, which is how the tests' device double runs it. With the CUDA
provider it has never run: no GPU was at hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mllama_runtime.backends.private_ort import ort, session_options
from mllama_runtime.bundle import Bundle
from mllama_runtime.device import GraphName, ProfileName, ProgramLoader, Session, Stream, Tensor
from mllama_runtime.errors import BundleError, EnvironmentFault, ResourceError, UsageError
from mllama_runtime.manifest import DType, GraphKey

_LOG_FATAL_ONLY = 4  # what fails is raised, and said once
_OUT_OF_MEMORY = ("Failed to allocate", "bad allocation", "bad_alloc", "out of memory")
_DTYPES: Mapping[str, DType] = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": "bfloat16",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
}
_BFLOAT16 = 16  # TensorProto.BFLOAT16: numpy has no such type
_ELEMENTS: Mapping[DType, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": _BFLOAT16,
    "int64": np.int64,
    "bool": np.bool_,
}


@dataclass(frozen=True, slots=True)
class Provider:
    """Where ONNX Runtime computes. device: its name in bindings. graphs: keys of those with a twin of their own."""

    device: str
    providers: tuple[Any, ...]
    graphs: Mapping[GraphName, GraphKey]
    num_threads: int = 1


def need_cuda_provider() -> None:
    """Raises EnvironmentFault where this ONNX Runtime has no CUDA provider."""
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        found = f"onnxruntime {ort.__version__} with {', '.join(ort.get_available_providers())}"
        hint = 'run: pip uninstall onnxruntime && pip install "mllama-deploy[cuda]"'
        raise EnvironmentFault("ONNX Runtime cannot use a GPU", found=found, hint=hint)


def cuda_provider(stream: Stream) -> Provider:
    """The first GPU, working in the caller's stream."""
    options = {
        "device_id": "0",
        "user_compute_stream": str(stream.handle),
        "arena_extend_strategy": "kSameAsRequested",
        "use_tf32": "0",  # FP32 products of 10 bits would not be what FP32 is validated as
    }
    return Provider("cuda", (("CUDAExecutionProvider", options), "CPUExecutionProvider"), {"decoder": "decoder_cuda"})


def ort_programs(bundle: Bundle, provider: Provider) -> ProgramLoader:
    """Loads a bundle's graphs."""

    def load(graph: GraphName) -> OrtProgram:
        key = provider.graphs.get(graph, graph)
        spec = bundle.manifest.graphs.get(key)
        if spec is None:
            raise BundleError(f"the bundle has no graph {key}", where=bundle.root, hint="export it again")
        path = bundle.path(spec.file)
        options = session_options(log_severity_level=_LOG_FATAL_ONLY)
        options.intra_op_num_threads = provider.num_threads
        try:
            session = ort.InferenceSession(path, options, providers=list(provider.providers))
        except Exception as fault:  # ONNX Runtime raises its own types, which share no base class
            if _is_memory(fault):
                raise ResourceError("not enough memory to load the graph", where=path, found=fault) from fault
            raise BundleError("ONNX Runtime cannot load the graph", where=path, found=fault) from fault
        return OrtProgram(session, provider)

    return load


class OrtProgram:
    """A graph in ONNX Runtime, which plans activations and keeps weights by itself: neither counts here."""

    weights_bytes = workspace_bytes = 0
    capturable = False  # ONNX Runtime captures graphs by its own rules only

    def __init__(self, session: ort.InferenceSession, provider: Provider) -> None:
        self._session, self._provider = session, provider
        self._inputs = {value.name: tuple(value.shape) for value in session.get_inputs()}
        values = (*session.get_inputs(), *session.get_outputs())
        self.dtypes: Mapping[str, DType] = {value.name: _DTYPES[value.type] for value in values}

    def session(self, profile: ProfileName, workspace: int) -> Session:
        return _OrtSession(self._session, self._provider.device, self.dtypes, self._inputs)


class _OrtSession:
    def __init__(
        self, session: ort.InferenceSession, device: str, dtypes: Mapping[str, DType], inputs: Mapping[str, Any]
    ) -> None:
        self._session, self._device, self._dtypes, self._inputs = session, device, dtypes, inputs
        self._binding = session.io_binding()

    def bind(self, tensors: Mapping[str, Tensor]) -> None:
        if tensors.keys() != self._dtypes.keys():
            wrong = sorted(tensors.keys() ^ self._dtypes.keys())[0]
            raise UsageError("not the graph's tensors", where=wrong, expected=", ".join(self._dtypes))
        for name, tensor in tensors.items():
            if tensor.dtype != self._dtypes[name]:
                raise UsageError("of another type", where=name, expected=self._dtypes[name], found=tensor.dtype)
            bind = self._binding.bind_input if name in self._inputs else self._binding.bind_output
            bind(name, self._device, 0, _ELEMENTS[tensor.dtype], tensor.shape, tensor.address)

    def run(self, stream: Stream) -> None:
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as fault:  # ONNX Runtime raises its own types, which share no base class
            if _is_memory(fault):
                hint = "use fewer rows or a shorter prompt"
                raise ResourceError("not enough memory for a step", found=fault, hint=hint) from fault
            raise EnvironmentFault("ONNX Runtime failed", found=fault, hint="open the engine again") from fault


def _is_memory(fault: Exception) -> bool:
    return isinstance(fault, MemoryError) or any(text in str(fault) for text in _OUT_OF_MEMORY)
