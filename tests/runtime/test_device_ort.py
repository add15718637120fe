"""Programs of ONNX Runtime: a session that is not where it should be is refused when it is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from host_device import HostDevice
from mllama_runtime.backends.private_ort import ort
from mllama_runtime.bundle import Bundle
from mllama_runtime.device.ort import Provider, cuda_provider, ort_programs
from mllama_runtime.errors import BundleError, EnvironmentFault

CUDA = "CUDAExecutionProvider"


@pytest.fixture
def bundle(bundle_of: Callable[..., Path]) -> Bundle:
    return Bundle.open(bundle_of())


@pytest.mark.filterwarnings("ignore:Specified provider 'CUDAExecutionProvider' is not in available")
def test_a_session_that_fell_back_to_the_cpu(bundle: Bundle, capfd: pytest.CaptureFixture[str]) -> None:
    """As ONNX Runtime makes it, with two lines on stderr, where CUDA's libraries do not load."""
    load = ort_programs(bundle, Provider(CUDA, "cuda", {}), HostDevice())
    with pytest.raises(
        EnvironmentFault, match=rf"cannot use the device: expected {CUDA}, found CPUExecution"
    ) as caught:
        load("greedy")
    assert caught.value.exit_code == 4
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(("operators", "is_refused"), [(("Shape", "Squeeze", "Cast"), False), (("Shape", "Pad"), True)])
def test_what_computes_beside_the_device(
    operators: tuple[str, ...], is_refused: bool, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session as the CUDA provider reports it: shapes are computed on the CPU, and nothing else may be."""

    class Session(ort.InferenceSession):
        def __init__(self, path: Path, options: ort.SessionOptions, providers: list[object], **rest: object) -> None:
            super().__init__(path, options, providers=["CPUExecutionProvider"], **rest)

        def get_providers(self) -> list[str]:
            return [CUDA, "CPUExecutionProvider"]

        def get_provider_graph_assignment_info(self) -> list[SimpleNamespace]:
            names = {CUDA: ("MatMul", "Pad"), "CPUExecutionProvider": operators}
            return [
                SimpleNamespace(ep_name=name, get_nodes=lambda own=own: [SimpleNamespace(op_type=op) for op in own])
                for name, own in names.items()
            ]

    monkeypatch.setattr(ort, "InferenceSession", Session)
    load = ort_programs(bundle, Provider(CUDA, "cuda", {}), HostDevice())
    if not is_refused:
        assert load("greedy").dtypes["logits"] == "float32"
        return
    with pytest.raises(BundleError, match=f"as a whole: found no {CUDA} kernel for Pad; export the bundle again"):
        load("greedy")


def test_the_gpu_s_sessions_work_in_our_stream_in_full_precision_and_prompts_in_flash_attention() -> None:
    provider = cuda_provider(SimpleNamespace(handle=4711))
    for graph in ("vision", "decoder", "greedy", "sampler"):
        (name, options), beside = provider.session_providers(graph)
        assert (name, beside) == (CUDA, "CPUExecutionProvider")
        assert (options["user_compute_stream"], options["use_tf32"]) == ("4711", "0")
        assert options.get("sdpa_kernel") == ("1" if graph == "decoder" else None)  # vision: cuDNN's, which is faster
