"""ONNX Runtime programs over a device's memory: the CUDA provider, bound by address so that nothing is copied.

The same code binds host memory with the CPU provider, which is how the tests' device double runs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mllama_runtime.backends.private_ort import ort, session_options
from mllama_runtime.bundle import Bundle
from mllama_runtime.device import Device, GraphName, ProfileName, ProgramLoader, Session, Stream, Tensor
from mllama_runtime.device.cuda_libraries import load_cuda_libraries
from mllama_runtime.errors import BundleError, EnvironmentFault, ResourceError, UsageError
from mllama_runtime.manifest import DType, GraphKey

_LOG_FATAL_ONLY = 4  # what fails is raised, and said once
_OUT_OF_MEMORY = ("Failed to allocate", "bad allocation", "bad_alloc", "out of memory", "ALLOC_FAILED")
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


_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
# What computes shapes, of a few integers each: its place is the CPU, also in a graph for CUDA.
_SHAPE_ARITHMETIC = {"Add", "Cast", "Concat", "Div", "Mul", "Reshape", "Shape", "Slice", "Squeeze", "Sub", "Unsqueeze"}
# CUDA's own attention for prompts is planned anew for each length of a chunk; Flash Attention is not.
_FLASH_ATTENTION = "1"


@dataclass(frozen=True, slots=True)
class Provider:
    """Where ONNX Runtime computes.

    name: ONNX Runtime's. device: its name in bindings. graphs: keys of those with a twin of their own. options: of
    every graph's session; the decoder's are on top. capturable: whether a stream can capture its runs.
    """

    name: str
    device: str
    graphs: Mapping[GraphName, GraphKey]
    options: Mapping[str, str] = field(default_factory=dict)
    decoder_options: Mapping[str, str] = field(default_factory=dict)
    capturable: bool = False
    num_threads: int = 1

    def session_providers(self, graph: GraphName) -> list[Any]:
        options = {**self.options, **(self.decoder_options if graph == "decoder" else {})}
        return [(self.name, options), *([] if self.name == _CPU else [_CPU])]


def need_cuda_provider() -> None:
    """Raises EnvironmentFault where this ONNX Runtime has no CUDA provider, or CUDA's libraries are missing."""
    if _CUDA not in ort.get_available_providers():
        found = f"onnxruntime {ort.__version__} with {', '.join(ort.get_available_providers())}"
        hint = 'run: pip uninstall onnxruntime && pip install "mllama-deploy[cuda]"'
        raise EnvironmentFault("ONNX Runtime cannot use a GPU", found=found, hint=hint)
    load_cuda_libraries()


def cuda_provider(stream: Stream) -> Provider:
    """The first GPU, working in the caller's stream."""
    options = {
        "device_id": "0",
        "user_compute_stream": str(stream.handle),
        "arena_extend_strategy": "kSameAsRequested",
        "use_tf32": "0",  # FP32 products of 10 bits would not be what FP32 is validated as
    }
    return Provider(
        _CUDA,
        "cuda",
        {"vision": "vision_cuda", "decoder": "decoder_cuda"},
        options,
        {"sdpa_kernel": _FLASH_ATTENTION},
        capturable=True,
    )


def ort_programs(bundle: Bundle, provider: Provider, device: Device) -> ProgramLoader:
    """Loads a bundle's graphs; what a graph's weights take is what the device has less of afterwards."""

    def load(graph: GraphName) -> OrtProgram:
        key = provider.graphs.get(graph, graph)
        spec = bundle.manifest.graphs.get(key)
        if spec is None:
            raise BundleError(f"the bundle has no graph {key}", where=bundle.root, hint="export it again")
        path = bundle.path(spec.file)
        options = session_options(log_severity_level=_LOG_FATAL_ONLY)
        options.intra_op_num_threads = provider.num_threads
        options.enable_mem_pattern = False  # it would allocate in the second run of every shape, not in the first
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        free = device.memory()[0]
        try:
            session = ort.InferenceSession(
                path, options, providers=provider.session_providers(graph), enable_fallback=False
            )
        except Exception as fault:  # ONNX Runtime raises its own types, which share no base class
            if _is_memory(fault):
                raise ResourceError("not enough memory to load the graph", where=path, found=fault) from fault
            raise BundleError("ONNX Runtime cannot load the graph", where=path, found=fault) from fault
        _check_placement(session, provider, path)
        return OrtProgram(session, provider, weights_bytes=max(0, free - device.memory()[0]))

    return load


def _check_placement(session: ort.InferenceSession, provider: Provider, path: Path) -> None:
    """Refuse a graph that computes beside the device, which would copy its tensors back and forth, or see old ones.

    What this cannot see is arithmetic of shapes that reads a tensor of the device: the exporter makes no such graph.

    Raises:
        EnvironmentFault: the provider itself could not be used.
        BundleError: it has no kernel for a node.
    """
    if provider.name not in session.get_providers():
        found, hint = ", ".join(session.get_providers()), "check the driver (`nvidia-smi`) and CUDA's libraries"
        raise EnvironmentFault(
            "ONNX Runtime cannot use the device", where=path, expected=provider.name, found=found, hint=hint
        )
    if provider.name == _CPU:
        return
    strays = {
        node.op_type
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name != provider.name
        for node in part.get_nodes()
    } - _SHAPE_ARITHMETIC
    if strays:
        raise BundleError(
            "the graph does not run on the device as a whole",
            where=path,
            found=f"no {provider.name} kernel for {', '.join(sorted(strays))}",
            hint="export the bundle again, or choose another precision",
        )


class OrtProgram:
    """A graph in ONNX Runtime."""

    workspace_bytes = None

    def __init__(self, session: ort.InferenceSession, provider: Provider, *, weights_bytes: int) -> None:
        self._session, self._provider = session, provider
        self.weights_bytes, self.capturable = weights_bytes, provider.capturable
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
        self._options = ort.RunOptions()
        # The stream is the caller's, who waits for it where there is something to wait for.
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")

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
            self._session.run_with_iobinding(self._binding, self._options)
        except Exception as fault:  # ONNX Runtime raises its own types, which share no base class
            if _is_memory(fault):
                hint = "open it with smaller limits"
                raise ResourceError("not enough memory for a step", found=fault, hint=hint) from fault
            raise EnvironmentFault("ONNX Runtime failed", found=fault, hint="open the engine again") from fault


def _is_memory(fault: Exception) -> bool:
    return isinstance(fault, MemoryError) or any(text in str(fault) for text in _OUT_OF_MEMORY)
