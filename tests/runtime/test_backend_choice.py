"""Which back end a name means, and what is said where it cannot be had."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from mllama_runtime import BundleError, EnvironmentFault, Limits, UsageError, backends
from mllama_runtime.backends import backend_from_bundle, gpu
from mllama_runtime.backends.private_trt import tensorrt_from_backend
from mllama_runtime.bundle import Bundle
from mllama_runtime.cli import main
from mllama_runtime.engine_record import default_limits
from mllama_runtime.manifest import EngineEntry

NO_DRIVER = "no NVIDIA driver was found"


@pytest.fixture
def bundle(bundle_of: Callable[..., Path]) -> Bundle:
    return Bundle.open(bundle_of())


@pytest.fixture
def no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise EnvironmentFault(NO_DRIVER)

    monkeypatch.setattr(gpu, "cuda_driver", absent)


def with_engines(bundle: Bundle, *names: str) -> Bundle:
    """The bundle, as if engines of these back ends were in it."""
    engines = tuple(EngineEntry(f"{index}" * 64, name, ()) for index, name in enumerate(names))  # type: ignore[arg-type]
    return replace(bundle, manifest=replace(bundle.manifest, engines=engines))


def test_names(bundle: Bundle) -> None:
    assert backend_from_bundle(bundle, "cpu", 1).name == "cpu"
    assert backend_from_bundle(bundle, "auto", 1).name == "cpu"
    with pytest.raises(
        UsageError, match="backend: unknown back end: expected auto or cpu or cuda or tensorrt or tensor"
    ):
        backend_from_bundle(bundle, "metal", 1)


def test_limits_are_for_cuda_alone(bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="limits: only for the back end cuda: found cpu"):
        backend_from_bundle(bundle, "cpu", 1, limits=Limits(1, 64, 16, 4))
    model = bundle.manifest.model
    longest = model.text.max_seq_len
    for limits, message in (
        (Limits(0, 64, 16, 4), "max_batch: not a limit for this model: expected at least 1, found 0"),
        (Limits(1, longest + 1, 16, 4), f"max_seq_len: .* expected 1 to {longest}, found {longest + 1}"),
        (Limits(1, 64, 65, 4), "prefill_chunk: .* expected 1 to max_seq_len, found 65"),
        (Limits(1, 64, 16, 0), "max_tiles: .* expected a multiple of 4, the tiles of one picture .*, found 0"),
        (Limits(1, 64, 16, 6), "max_tiles: .* found 6"),
    ):
        with pytest.raises(UsageError, match=message):
            backend_from_bundle(bundle, "cuda", 1, limits=limits)
    limits = default_limits(model)
    assert (limits.max_batch, limits.max_seq_len) == (4, min(8192, model.text.max_seq_len))
    assert limits.max_tiles == model.vision.max_num_tiles


@pytest.mark.parametrize(
    ("engines", "gpus", "installed", "chosen"),
    [
        ((), ("9.0",), ("tensorrt", "tensorrt-rtx"), "cpu"),
        (("tensorrt-rtx",), (), ("tensorrt-rtx",), "cpu"),
        (("tensorrt-rtx",), ("9.0",), ("tensorrt-rtx",), "tensorrt-rtx"),
        (("tensorrt-rtx", "tensorrt"), ("9.0",), ("tensorrt", "tensorrt-rtx"), "tensorrt"),
        (("tensorrt-rtx", "tensorrt"), ("9.0",), ("tensorrt-rtx",), "tensorrt-rtx"),
        (("tensorrt-rtx",), ("9.0",), ("tensorrt",), "tensorrt-rtx"),  # what is missing will be said
    ],
)
def test_auto(
    engines: tuple[str, ...],
    gpus: tuple[str, ...],
    installed: tuple[str, ...],
    chosen: str,
    bundle: Bundle,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []
    monkeypatch.setattr(backends, "gpu_compute_capabilities", lambda: gpus)
    monkeypatch.setattr(backends, "is_installed", lambda name: name in installed)
    monkeypatch.setattr(gpu, "tensorrt_backend", lambda bundle, name: asked.append(name))
    found = backend_from_bundle(with_engines(bundle, *engines), "auto", 1)
    assert (asked or [found.name]) == [chosen]


def test_the_package_is_missing_first(bundle: Bundle, no_driver: None) -> None:
    with pytest.raises(EnvironmentFault, match=r"TensorRT is not installed; run: pip install .*\[trt\]"):
        backend_from_bundle(bundle, "tensorrt", 1)
    with pytest.raises(EnvironmentFault, match=r"cannot use a GPU: found onnxruntime .*CPUExecutionProvider; run: pip"):
        backend_from_bundle(bundle, "cuda", 1)


def test_then_the_driver(bundle: Bundle, no_driver: None) -> None:
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(EnvironmentFault, match=NO_DRIVER):
        backend_from_bundle(bundle, "tensorrt-rtx", 1)


def test_then_the_engine(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(gpu, "cuda_driver", lambda: None)
    with pytest.raises(BundleError, match="has no engine for tensorrt-rtx; run: mllama build"):
        backend_from_bundle(bundle, "tensorrt-rtx", 1)


def test_an_engine_for_another_gpu(
    bundle_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx")
    from mllama_exporter.engines import EngineOptions, engine_for_bundle

    folder = shutil.copytree(bundle_of(), tmp_path / "bundle")
    limits = {"max_batch": 2, "max_seq_len": 64, "prefill_chunk": 16}
    engine_for_bundle(folder, EngineOptions("tensorrt-rtx", compute_capabilities=("12.0",), **limits))
    monkeypatch.setattr(gpu, "cuda_driver", lambda: None)
    monkeypatch.setattr(gpu, "gpu_compute_capabilities", lambda: ("9.0",))
    with pytest.raises(BundleError, match=r"other GPUs: expected compute capability 9\.0, found one for 12\.0; run"):
        backend_from_bundle(Bundle.open(folder), "tensorrt-rtx", 1)
    monkeypatch.setattr(gpu, "gpu_compute_capabilities", lambda: ("12.0",))
    backend = backend_from_bundle(Bundle.open(folder), "tensorrt-rtx", 1)
    assert (backend.name, backend.limits) == ("tensorrt-rtx", Limits(2, 64, 16, 4))


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX is not installed")
@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx", "cuda"])
def test_the_command_line_says_it_in_one_line(name: str, bundle: Bundle, no_driver: None) -> None:
    tensorrt_from_backend.cache_clear()
    for command in (["generate", "--prompt", "Hello"], ["bench"]):
        result = CliRunner().invoke(main, [command[0], str(bundle.root), *command[1:], "--backend", name])
        assert result.exit_code == 4, result.output
        assert result.stdout == ""
        assert result.stderr.count("\n") == 1
        assert result.stderr.startswith("mllama: error: ")
