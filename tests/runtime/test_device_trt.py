"""TensorRT programs against doubles of TensorRT's objects: what they call, and what they say of faults.

The doubles know the names of the installed TensorRT-RTX. The same on silicon is `tests/runtime/test_contract.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mllama_runtime.backends.private_trt import Log
from mllama_runtime.device import Program, Tensor
from mllama_runtime.device.trt import trt_programs
from mllama_runtime.errors import BundleError, EnvironmentFault, MllamaError, ResourceError, UsageError
from trt_double import Call, Double

api = pytest.importorskip("tensorrt_rtx")

DTYPES = {"x": api.DataType.HALF, "index": api.DataType.INT64, "y": api.DataType.FLOAT}
STREAM = SimpleNamespace(handle=77)


class Setting:
    """A flavour of TensorRT, a bundle's engines, and all calls to either. `log` is what TensorRT says meanwhile."""

    def __init__(
        self, *, flavour: str = "tensorrt-rtx", strip: bool = False, stream: bool = False, takes_shapes: bool = True
    ) -> None:
        self.calls: list[Call] = []
        self.log = Log()
        self.context = self._double(
            api.IExecutionContext, get_tensor_shape=lambda name: (2, 8), set_input_shape=takes_shapes
        )
        config = self._double(api.IRuntimeConfig)
        self.loaded = self._double(
            api.ICudaEngine,
            num_io_tensors=3,
            get_tensor_name=lambda index: list(DTYPES)[index],
            get_tensor_dtype=lambda name: DTYPES[name],
            get_tensor_mode=lambda name: api.TensorIOMode.OUTPUT if name == "y" else api.TensorIOMode.INPUT,
            device_memory_size_v2=4096,
            create_execution_context=self.context,
            create_runtime_config=config,
            get_weight_streaming_automatic_budget=123,
        )
        runtime = self._double(api.Runtime, deserialize_cuda_engine=self.loaded)
        self.refitter, self.parser = self._double(api.Refitter), self._double(api.OnnxParserRefitter)
        doubles = SimpleNamespace(
            Runtime=lambda logger: runtime,
            Refitter=lambda engine, logger: self.refitter,
            OnnxParserRefitter=lambda refitter, logger: self.parser,
            ExecutionContextAllocationStrategy=api.ExecutionContextAllocationStrategy,
            DynamicShapesKernelSpecializationStrategy=api.DynamicShapesKernelSpecializationStrategy,
            TensorIOMode=api.TensorIOMode,
        )
        ahead = SimpleNamespace(builds_without_gpu=flavour == "tensorrt-rtx")
        self.trt = SimpleNamespace(api=doubles, logger=None, flavour=ahead, logged=self._logged)
        names = ("prefill", "decode", "text_prefill", "text_decode")
        profiles = [SimpleNamespace(name=name) for name in names]
        file = SimpleNamespace(file="engines/x/decoder.engine", weights_bytes=999, profiles=profiles)
        inputs = SimpleNamespace(strip_weights=strip, weight_streaming=stream)
        manifest = SimpleNamespace(graphs={"decoder": SimpleNamespace(file="decoder.onnx")})
        self.engine = SimpleNamespace(
            read=lambda graph: b"native code",
            bundle=SimpleNamespace(path=lambda name: Path("/bundle") / name, manifest=manifest),
            record=SimpleNamespace(engines={"decoder": file, "greedy": file}, inputs=inputs),
        )

    def _double(self, of: type, **results: Any) -> Double:
        return Double(of, self.calls, **results)

    @contextmanager
    def _logged(self) -> Any:
        yield self.log

    def load(self) -> Program:
        return trt_programs(self.engine, self.trt)(None, STREAM)("decoder")  # type: ignore[arg-type]

    def called(self, name: str) -> list[tuple[Any, ...]]:
        return [arguments for each, arguments in self.calls if each == name]


def tensors(**changes: Tensor) -> dict[str, Tensor]:
    usual = {
        "x": Tensor(256, (2, 4), "float16"),
        "index": Tensor(512, (2,), "int64"),
        "y": Tensor(768, (2, 8), "float32"),
    }
    return usual | changes


def test_a_program_says_what_it_takes() -> None:
    setting = Setting()
    program = setting.load()
    assert setting.called("deserialize_cuda_engine") == [(b"native code",)]
    assert program.dtypes == {"x": "float16", "index": "int64", "y": "float32"}
    assert (program.weights_bytes, program.workspace_bytes, program.capturable) == (999, 4096, True)


@pytest.mark.parametrize(
    ("profile", "index", "kernels"),
    [("prefill", 0, "LAZY"), ("decode", 1, "EAGER"), ("text_prefill", 2, "LAZY"), ("text_decode", 3, "EAGER")],
)
def test_a_session_is_of_one_profile_in_memory_of_the_caller(profile: Any, index: int, kernels: str) -> None:
    setting = Setting()
    setting.load().session(profile, 8192)
    assert setting.called("set_optimization_profile_async") == [(index, 77)]
    assert setting.called("set_device_memory") == [(8192, 4096)]
    managed = api.ExecutionContextAllocationStrategy.USER_MANAGED
    assert setting.called("set_execution_context_allocation_strategy") == [(managed,)]
    strategy = getattr(api.DynamicShapesKernelSpecializationStrategy, kernels)
    assert setting.called("dynamic_shapes_kernel_specialization_strategy") == [(strategy,)]


def test_sessions_share_the_kernels_compiled_for_one() -> None:
    setting = Setting()
    program = setting.load()
    for _ in range(3):
        program.session("decode", 8192)
    assert len(setting.called("create_runtime_cache")) == 1
    assert len(setting.called("set_runtime_cache")) == 3


def test_the_other_flavour_compiles_nothing() -> None:
    setting = Setting(flavour="tensorrt")
    setting.load().session("decode", 8192)
    assert setting.called("create_execution_context") == [(api.ExecutionContextAllocationStrategy.USER_MANAGED,)]
    assert not setting.called("create_runtime_config")


def test_what_is_bound_is_what_runs() -> None:
    setting = Setting()
    session = setting.load().session("decode", 8192)
    session.bind(tensors())
    assert setting.called("set_input_shape") == [("x", (2, 4)), ("index", (2,))]
    assert setting.called("set_tensor_address") == [("x", 256), ("index", 512), ("y", 768)]
    session.run(SimpleNamespace(handle=5))  # type: ignore[arg-type]
    assert setting.called("execute_async_v3") == [(5,)]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"z": Tensor(0, (1,), "int64")}, "z: not the graph's tensors: expected x, index, y"),
        ({"x": Tensor(0, (2, 4), "float32")}, "x: of another type: expected float16, found float32"),
        (
            {"y": Tensor(0, (3, 8), "float32")},
            r"y: the engine does not take this shape in decoder decode: expected \(2, 8\)",
        ),
    ],
)
def test_what_cannot_be_bound_is_named(wrong: dict[str, Tensor], message: str) -> None:
    session = Setting().load().session("decode", 8192)
    with pytest.raises(UsageError, match=message):
        session.bind(tensors(**wrong))
    with pytest.raises(UsageError, match="y: not the graph's tensors"):
        session.bind({name: tensor for name, tensor in tensors().items() if name != "y"})


def test_a_shape_outside_of_the_profile_is_refused() -> None:
    setting = Setting(takes_shapes=False)
    setting.log.errors.append("beyond the profile")
    session = setting.load().session("decode", 8192)
    with pytest.raises(UsageError, match=r"x: .*in decoder decode: expected beyond the profile, found \(2, 4\)"):
        session.bind(tensors())


def session_of(setting: Setting) -> None:
    setting.load().session("decode", 8192)


def run_of(setting: Setting) -> None:
    setting.load().session("decode", 8192).run(SimpleNamespace(handle=5))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("failing", "work", "error", "said", "message"),
    [
        (
            "deserialize_cuda_engine",
            Setting.load,
            BundleError,
            "magic tag",
            r"decoder\.engine: TensorRT cannot load.*magic",
        ),
        (
            "deserialize_cuda_engine",
            Setting.load,
            EnvironmentFault,
            "cudaError 35: driver",
            "CUDA failed: found cudaError",
        ),
        ("deserialize_cuda_engine", Setting.load, ResourceError, "Out: out of memory", "out of device memory"),
        ("create_execution_context", session_of, EnvironmentFault, "no", "cannot prepare decoder decode: found no"),
        ("create_execution_context", session_of, ResourceError, "OutOfMemory", "out of device memory"),
        ("set_optimization_profile_async", session_of, EnvironmentFault, "no", "cannot prepare decoder decode"),
        (
            "execute_async_v3",
            run_of,
            EnvironmentFault,
            "launch",
            "decoder decode failed: found launch; open the engine",
        ),
    ],
)
def test_faults(
    failing: str, work: Callable[[Setting], object], error: type[MllamaError], said: str, message: str
) -> None:
    nothing = None if failing in ("deserialize_cuda_engine", "create_execution_context") else False
    setting = Setting()
    for double in (setting.loaded, setting.context):
        if hasattr(double.__dict__["_of"], failing):
            double.__dict__["_results"][failing] = nothing
    if failing == "deserialize_cuda_engine":
        setting.trt.api.Runtime = lambda logger: Double(api.Runtime, setting.calls, deserialize_cuda_engine=None)
    setting.log.errors.append(said)
    with pytest.raises(error, match=message):
        work(setting)


def test_a_stripped_engine_is_filled_in_from_the_bundle() -> None:
    setting = Setting(strip=True)
    setting.load()
    assert setting.called("refit_from_file") == [("/bundle/decoder.onnx",)]
    assert setting.called("refit_cuda_engine") == [()]
    setting.refitter.__dict__["_results"]["refit_cuda_engine"] = False
    with pytest.raises(BundleError, match=r"decoder\.onnx: TensorRT cannot fill in the weights"):
        setting.load()


def test_weights_are_streamed_as_far_as_they_must() -> None:
    setting = Setting(stream=True)
    setting.load()
    assert setting.called("weight_streaming_budget_v2") == [(123,)]
    assert not Setting().called("weight_streaming_budget_v2")
