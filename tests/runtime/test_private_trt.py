"""The door to TensorRT: what is missing is said in one line, and what TensorRT says is collected."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from mllama_runtime.backends import private_trt
from mllama_runtime.backends.private_trt import tensorrt_from_backend
from mllama_runtime.errors import EnvironmentFault


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """What a test puts in the modules' place is not remembered."""
    tensorrt_from_backend.cache_clear()
    yield
    tensorrt_from_backend.cache_clear()


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a module `tensorrt` that a test writes, found before any other."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    return tmp_path / "tensorrt.py"


def test_a_missing_package_is_one_install_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)  # as if not installed
    with pytest.raises(EnvironmentFault) as caught:
        tensorrt_from_backend("tensorrt")
    assert 'run: pip install "mllama-deploy[trt]"' in str(caught.value)


@pytest.mark.parametrize(
    "code",
    [
        "raise ImportError('libnvinfer.so.11: cannot open shared object file')",
        "raise OSError('libnvinfer.so.11: cannot open shared object file')",
        "raise FileNotFoundError('Could not find: libnvinfer.so.11')",
        "import libnvinfer_of_nowhere",
        "libnvinfer = 'an empty shell'",
    ],
)
def test_missing_libraries_are_named(stand_in: Path, code: str) -> None:
    stand_in.write_text(code)
    with pytest.raises(EnvironmentFault, match=r"TensorRT is installed, but cannot be loaded.*install its libraries"):
        tensorrt_from_backend("tensorrt")


def test_what_is_said_is_collected_by_block() -> None:
    pytest.importorskip("tensorrt_rtx")
    trt = tensorrt_from_backend("tensorrt-rtx")
    assert trt is tensorrt_from_backend("tensorrt-rtx")  # its logger is the process's
    severity = trt.api.ILogger.Severity
    with trt.logged() as outer:
        trt.logger.log(severity.WARNING, "a warning")
        with trt.logged() as inner:
            trt.logger.log(severity.ERROR, "an error")
            trt.logger.log(severity.INTERNAL_ERROR, "a worse one")
            trt.logger.log(severity.VERBOSE, "a detail")
    assert (outer.warnings, outer.errors) == (["a warning"], [])
    assert (inner.errors, inner.details) == (["an error", "a worse one"], ["a detail"])
    assert (inner.last_error(), outer.last_error()) == ("a worse one", "TensorRT gave no reason")


def test_no_driver_means_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(private_trt.ctypes, "CDLL", absent)
    assert private_trt.gpu_compute_capabilities() == ()


class Driver:
    """A test double of libcuda with two GPUs; the real one is looked at by tests marked `gpu`."""

    def __init__(self, fault: int = 0) -> None:
        self.fault = fault

    def cuInit(self, flags: int) -> int:  # noqa: N802 - the driver's name
        return self.fault

    def cuDeviceGetCount(self, count: object) -> int:  # noqa: N802
        count._obj.value = 2  # type: ignore[attr-defined]
        return 0

    def cuDeviceGet(self, device: object, index: int) -> int:  # noqa: N802
        device._obj.value = index  # type: ignore[attr-defined]
        return 0

    def cuDeviceGetAttribute(self, number: object, attribute: int, device: object) -> int:  # noqa: N802
        number._obj.value = {75: (8, 12), 76: (9, 0)}[attribute][device.value]  # type: ignore[attr-defined]
        return 0


def test_gpus_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private_trt.ctypes, "CDLL", lambda name: Driver())
    assert private_trt.gpu_compute_capabilities() == ("8.9", "12.0")
    monkeypatch.setattr(private_trt.ctypes, "CDLL", lambda name: Driver(fault=100))  # CUDA_ERROR_NO_DEVICE
    assert private_trt.gpu_compute_capabilities() == ()


@pytest.mark.gpu
def test_a_real_gpu_is_seen() -> None:
    assert all(float(name) >= 5 for name in private_trt.gpu_compute_capabilities())
    assert private_trt.gpu_compute_capabilities()
