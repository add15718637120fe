"""TensorRT programs: engines of a bundle, whose steps run in memory and streams that the caller owns.

Both flavours have one API, but that TensorRT-RTX compiles kernels for the shapes it meets: at once where a step will be
captured, which keeps the kernels it was captured with, and otherwise in the background. Never run on a GPU; the tests
check every call against the installed module, on a double.

Reference: https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/python-api/infer/Core/Engine.html
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mllama_runtime.backends.private_trt import Log, TensorRT
from mllama_runtime.device import Device, GraphName, ProfileName, ProgramLoader, Session, Stream, Tensor
from mllama_runtime.engine_record import Engine, GraphEngine
from mllama_runtime.errors import BundleError, EnvironmentFault, MllamaError, ResourceError, UsageError
from mllama_runtime.manifest import DType

_DTYPES: Mapping[str, DType] = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT64": "int64",
    "BOOL": "bool",
}
_OUT_OF_MEMORY = ("out of memory", "OutOfMemory", "bad_alloc")
_OFTEN_NEW = ("prefill", "text_prefill")  # profiles whose shapes differ from prompt to prompt


def trt_programs(engine: Engine, trt: TensorRT) -> Callable[[Device, Stream], ProgramLoader]:
    """Loads a bundle's engines onto a device, into programs for one of its streams."""

    def on_device(device: Device, stream: Stream) -> ProgramLoader:
        runtime = trt.api.Runtime(trt.logger)

        def load(graph: GraphName) -> TrtProgram:
            file, data = engine.bundle.path(engine.record.engines[graph].file), engine.read(graph)
            with trt.logged() as log:
                loaded = runtime.deserialize_cuda_engine(data)
                if loaded is None:
                    fault = BundleError("TensorRT cannot load the engine", where=file, found=log.last_error())
                    raise _fault(log, fault)
                if engine.record.inputs.strip_weights:
                    _fill_in(trt, loaded, engine, graph, log)
            if engine.record.inputs.weight_streaming:  # as much of them stays on the device as there is room for
                loaded.weight_streaming_budget_v2 = loaded.get_weight_streaming_automatic_budget()
            return TrtProgram(trt, graph, loaded, engine.record.engines[graph], stream)

        return load

    return on_device


def _fill_in(trt: TensorRT, loaded: Any, engine: Engine, graph: GraphName, log: Log) -> None:
    """Give a stripped engine the weights of its graph in the bundle, which are those it was built from."""
    path = engine.bundle.path(engine.bundle.manifest.graphs[graph].file)
    refitter = trt.api.Refitter(loaded, trt.logger)
    parser = trt.api.OnnxParserRefitter(refitter, trt.logger)
    if not parser.refit_from_file(str(path)) or not refitter.refit_cuda_engine():
        raise _fault(log, BundleError("TensorRT cannot fill in the weights", where=path, found=log.last_error()))


class TrtProgram:
    """One engine.

    weights_bytes: as TensorRT told when it was built, whatever part of it is streamed.
    """

    capturable = True

    def __init__(self, trt: TensorRT, graph: GraphName, engine: Any, record: GraphEngine, stream: Stream) -> None:
        self._trt, self._graph, self._engine, self._stream = trt, graph, engine, stream
        self._profiles = [profile.name for profile in record.profiles]
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        self.dtypes: Mapping[str, DType] = {name: _DTYPES[engine.get_tensor_dtype(name).name] for name in names}
        self._inputs = {name for name in names if engine.get_tensor_mode(name) == trt.api.TensorIOMode.INPUT}
        self.weights_bytes, self.workspace_bytes = record.weights_bytes, int(engine.device_memory_size_v2)
        self._kernels: Any = None  # compiled by TensorRT-RTX for any session, there for the others

    def session(self, profile: ProfileName, workspace: int) -> Session:
        with self._trt.logged() as log:
            context = self._context(profile)
            index = self._profiles.index(profile)
            if context is None or not context.set_optimization_profile_async(index, self._stream.handle):
                raise _fault(log, _failed(f"cannot prepare {self._graph} {profile}", log))
            context.set_device_memory(workspace, self.workspace_bytes)
        return _TrtSession(self._trt, f"{self._graph} {profile}", context, self.dtypes, self._inputs)

    def _context(self, profile: ProfileName) -> Any:
        api = self._trt.api
        strategy = api.ExecutionContextAllocationStrategy.USER_MANAGED
        if not self._trt.flavour.builds_without_gpu:
            return self._engine.create_execution_context(strategy)
        config, kinds = self._engine.create_runtime_config(), api.DynamicShapesKernelSpecializationStrategy
        config.set_execution_context_allocation_strategy(strategy)
        config.dynamic_shapes_kernel_specialization_strategy = kinds.LAZY if profile in _OFTEN_NEW else kinds.EAGER
        self._kernels = self._kernels or config.create_runtime_cache()
        config.set_runtime_cache(self._kernels)
        return self._engine.create_execution_context(config)


class _TrtSession:
    def __init__(self, trt: TensorRT, name: str, context: Any, dtypes: Mapping[str, DType], inputs: set[str]) -> None:
        self._trt, self._name, self._context, self._dtypes, self._inputs = trt, name, context, dtypes, inputs

    def bind(self, tensors: Mapping[str, Tensor]) -> None:
        if tensors.keys() != self._dtypes.keys():
            wrong = sorted(tensors.keys() ^ self._dtypes.keys())[0]
            raise UsageError("not the graph's tensors", where=wrong, expected=", ".join(self._dtypes))
        context = self._context
        with self._trt.logged() as log:
            for name, tensor in tensors.items():
                if tensor.dtype != self._dtypes[name]:
                    raise UsageError("of another type", where=name, expected=self._dtypes[name], found=tensor.dtype)
                if name in self._inputs and not context.set_input_shape(name, tensor.shape):
                    raise self._not_taken(name, tensor, log.last_error())
                if not context.set_tensor_address(name, tensor.address):
                    raise _failed(f"{self._name} does not take the address of {name}", log)
            for name in tensors.keys() - self._inputs:
                if (expected := tuple(context.get_tensor_shape(name))) != tensors[name].shape:
                    raise self._not_taken(name, tensors[name], expected)

    def run(self, stream: Stream) -> None:
        with self._trt.logged() as log:
            if not self._context.execute_async_v3(stream.handle):
                raise _fault(log, _failed(f"{self._name} failed", log))

    def _not_taken(self, name: str, tensor: Tensor, expected: object) -> UsageError:
        return UsageError(
            f"the engine does not take this shape in {self._name}", where=name, expected=expected, found=tensor.shape
        )


def _failed(what: str, log: Log) -> EnvironmentFault:
    return EnvironmentFault(f"TensorRT: {what}", found=log.last_error(), hint="open the engine again")


def _fault(log: Log, otherwise: MllamaError) -> MllamaError:
    """What to raise: memory and CUDA may be the reason of anything."""
    if any(sign in message for message in log.errors for sign in _OUT_OF_MEMORY):
        hint = "free GPU memory, or build with a smaller --max-batch or --max-seq-len"
        return ResourceError("out of device memory", found=log.last_error(), hint=hint)
    if any("cudaError" in message for message in log.errors):
        return _failed("CUDA failed", log)
    return otherwise
