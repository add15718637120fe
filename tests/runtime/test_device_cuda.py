"""The CUDA device against a double of the driver: what it calls, in which order, and what it says of faults.

The same on silicon is `tests/gpu/test_device.py`.
"""

from __future__ import annotations

import sys
import threading

import numpy as np
import pytest
from mllama_runtime.errors import EnvironmentFault, ResourceError

pytest.importorskip("cuda.bindings")

from cuda_double import DriverDouble
from mllama_runtime.device.cuda import CudaDevice, cuda_driver


@pytest.fixture
def driver() -> DriverDouble:
    return DriverDouble()


@pytest.fixture
def device(driver: DriverDouble) -> CudaDevice:
    return CudaDevice(driver)


def test_every_operation_calls_what_is_installed(driver: DriverDouble, device: CudaDevice) -> None:
    """The double refuses a name or a number of arguments that the installed module does not have."""
    assert device.name == "A double"
    assert device.memory() == (3 * 10**9, 8 * 10**9)
    address, array, stream, event = (
        device.allocate(1024),
        device.pinned((4, 8), np.float32),
        device.stream(),
        device.event(),
    )
    stream.upload(address, array)
    stream.download(array, address)
    stream.copy(address, address + 512, 256)
    stream.clear(address, 1024)
    stream.record(event)
    stream.wait(event)
    event.wait()
    stream.capture(lambda: stream.clear(address, 4)).launch()
    stream.synchronize()
    assert stream.handle > 0
    done = dict(driver.calls)
    assert done["cuMemcpyHtoDAsync"][:3] == (address, array.ctypes.data, 128)
    assert done["cuMemcpyDtoHAsync"][:3] == (array.ctypes.data, address, 128)
    assert done["cuMemcpyDtoDAsync"][:3] == (address, address + 512, 256)
    assert done["cuMemsetD8Async"][:3] == (address, 0, 4)
    assert "cuGraphLaunch" in done


def test_rows_with_a_pitch_are_one_copy(driver: DriverDouble, device: CudaDevice) -> None:
    device.stream().copy(1000, 2000, 64, num_rows=8, target_pitch=128, source_pitch=256)
    name, (rows, _) = driver.calls[-1]
    assert name == "cuMemcpy2DAsync"
    assert (int(rows.dstDevice), rows.dstPitch, int(rows.srcDevice), rows.srcPitch) == (1000, 128, 2000, 256)
    assert (rows.WidthInBytes, rows.Height) == (64, 8)
    on_device = driver.CUmemorytype.CU_MEMORYTYPE_DEVICE
    assert (rows.dstMemoryType, rows.srcMemoryType) == (on_device, on_device)


def test_page_locked_arrays_have_pages_of_their_own_and_outlive_the_device(device: CudaDevice) -> None:
    arrays = [device.pinned(shape, np.int64) for shape in ((3,), (2, 5), (0, 4))]
    assert [array.shape for array in arrays] == [(3,), (2, 5), (0, 4)]
    assert len({array.ctypes.data for array in arrays[:2]}) == 2
    assert all(array.ctypes.data % 4096 == 0 for array in arrays)
    assert all(array.flags.c_contiguous and array.flags.writeable for array in arrays)
    device.close()
    arrays[1][:] = 7
    assert arrays[1].sum() == 70
    assert arrays[0].sum() == 0


def test_a_page_locked_array_that_is_dropped_keeps_its_place(device: CudaDevice) -> None:
    """A driver refuses to lock a place twice, and the system hands out a place as soon as it is free."""
    places = [device.pinned((2**20,), np.uint8).ctypes.data for _ in range(4)]
    assert len(set(places)) == 4


def test_work_is_done_before_all_is_freed_in_reverse_and_once(driver: DriverDouble, device: CudaDevice) -> None:
    """The stream is made before the page-locked array that its copies may still be reading."""
    address, stream = device.allocate(10), device.stream()
    device.event()
    device.pinned((3,), np.int64)
    stream.capture(lambda: stream.clear(address, 4))
    del driver.calls[:]
    device.close()
    freed = driver.called()
    assert freed == [
        "cuCtxSetCurrent",
        "cuStreamSynchronize",
        "cuGraphExecDestroy",
        "cuMemHostUnregister",
        "cuEventDestroy",
        "cuStreamDestroy",
        "cuMemFree",
        "cuDevicePrimaryCtxRelease",
    ]
    device.close()
    assert driver.called()[len(freed) :] == ["cuCtxSetCurrent"]


def test_new_memory_is_zero_before_any_stream_sees_it(driver: DriverDouble, device: CudaDevice) -> None:
    """The driver clears it in the default stream, which ours do not wait for, and returns before that is done."""
    device.allocate(64)
    assert driver.called()[-3:] == ["cuMemAlloc", "cuMemsetD8", "cuStreamSynchronize"]
    assert driver.calls[-1][1] == (0,)


def test_a_device_that_has_failed_is_still_closed(driver: DriverDouble, device: CudaDevice) -> None:
    stream = device.stream()
    driver.fail = dict.fromkeys(("cuStreamSynchronize", "cuStreamDestroy"), "CUDA_ERROR_ILLEGAL_ADDRESS")
    with pytest.raises(EnvironmentFault, match=r"A double: the GPU failed: found CUDA_ERROR_ILLEGAL_ADDRESS.*open the"):
        stream.synchronize()
    device.close()
    assert driver.called()[-1] == "cuDevicePrimaryCtxRelease"


@pytest.mark.parametrize(("function", "work"), [("cuMemAlloc", "allocate"), ("cuMemHostRegister", "pinned")])
def test_too_little_memory(function: str, work: str, driver: DriverDouble, device: CudaDevice) -> None:
    driver.fail = {function: "CUDA_ERROR_OUT_OF_MEMORY"}
    with pytest.raises(ResourceError, match="A double: out of memory: found CUDA_ERROR_OUT_OF_MEMORY") as caught:
        _ = device.allocate(8) if work == "allocate" else device.pinned((2,), np.int64)
    assert caught.value.exit_code == 5


def test_a_capture_that_fails_leaves_the_stream_usable(driver: DriverDouble, device: CudaDevice) -> None:
    def work() -> None:
        raise EnvironmentFault("of the work")

    with pytest.raises(EnvironmentFault, match="of the work"):
        device.stream().capture(work)
    assert driver.called()[-2:] == ["cuStreamEndCapture", "cuGraphDestroy"]


def test_any_thread_may_call(driver: DriverDouble, device: CudaDevice) -> None:
    """The driver's current context is a thread's own."""
    stream = device.stream()
    stream.synchronize()
    assert driver.called().count("cuCtxSetCurrent") == 1
    thread = threading.Thread(target=lambda: (stream.synchronize(), stream.synchronize()))
    thread.start()
    thread.join()
    assert driver.called()[-3:] == ["cuCtxSetCurrent", "cuStreamSynchronize", "cuStreamSynchronize"]


def test_a_driver_that_is_there(monkeypatch: pytest.MonkeyPatch, driver: DriverDouble) -> None:
    monkeypatch.setattr("cuda.bindings.driver", driver)
    assert cuda_driver() is driver


@pytest.mark.parametrize(
    ("double", "message"),
    [
        (DriverDouble(version=12_080), r"driver is too old: expected one for CUDA 13\.0.*found one for CUDA 12\.8"),
        (
            DriverDouble(fail={"cuInit": "CUDA_ERROR_NO_DEVICE"}),
            "no NVIDIA GPU can be used: found CUDA_ERROR_NO_DEVICE",
        ),
    ],
)
def test_a_driver_that_cannot_be_used(double: DriverDouble, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cuda.bindings.driver", double)
    with pytest.raises(EnvironmentFault, match=message) as caught:
        cuda_driver()
    assert caught.value.exit_code == 4


def test_no_driver_and_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoDriver:
        def cuInit(self, flags: int) -> None:  # noqa: N802 - the driver's name
            raise RuntimeError('"cuda" is missing.')

    monkeypatch.setattr("cuda.bindings.driver", NoDriver())
    with pytest.raises(EnvironmentFault, match='no NVIDIA driver was found: found "cuda" is missing; install NVIDIA'):
        cuda_driver()
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(EnvironmentFault, match="cuda-bindings is not installed"):
        cuda_driver()
