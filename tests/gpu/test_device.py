"""The CUDA device on silicon: memory, copies, the order of streams and events, captured work, faults.

Last run on an H200 on 2026-11-27: all passed.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from mllama_runtime.device.cuda import CudaDevice, open_cuda_device
from mllama_runtime.errors import EnvironmentFault, ResourceError

pytestmark = pytest.mark.gpu


@pytest.fixture
def device() -> Iterator[CudaDevice]:
    opened = open_cuda_device()
    yield opened
    opened.close()


def test_memory_is_counted_and_given_back(device: CudaDevice) -> None:
    free, total = device.memory()
    assert 0 < free <= total
    size = 2**28
    address = device.allocate(size)
    assert address % 256 == 0
    assert free - device.memory()[0] == pytest.approx(size, rel=0.03)
    device.close()
    again = open_cuda_device()
    assert again.memory()[0] == pytest.approx(free, rel=0.03)
    again.close()


def test_what_goes_up_comes_down(device: CudaDevice) -> None:
    stream, address = device.stream(), device.allocate(4096)
    up, down = device.pinned((1024,), np.float32), device.pinned((1024,), np.float32)
    stream.download(down, address)
    stream.synchronize()
    assert not down.any()  # new memory is zero
    up[:] = np.arange(1024)
    stream.upload(address, up)
    stream.clear(address, 2048)
    stream.download(down, address)
    stream.synchronize()
    np.testing.assert_array_equal(down, np.where(np.arange(1024) < 512, 0, up))


def test_rows_with_a_pitch(device: CudaDevice) -> None:
    stream, source, target = device.stream(), device.allocate(64), device.allocate(96)
    up, down = device.pinned((4, 16), np.uint8), device.pinned((4, 24), np.uint8)
    up[:] = np.arange(64).reshape(4, 16)
    stream.upload(source, up)
    stream.copy(target, source, 5, num_rows=4, target_pitch=24, source_pitch=16)
    stream.copy(target + 10, source, 5)
    stream.download(down, target)
    stream.synchronize()
    expected = np.zeros((4, 24), np.uint8)
    expected[:, :5] = up[:, :5]
    expected[0, 10:15] = up[0, :5]
    np.testing.assert_array_equal(down, expected)


def test_a_stream_waits_for_another(device: CudaDevice) -> None:
    first, second, event = device.stream(), device.stream(), device.event()
    event.wait()  # never recorded: it has passed
    size = 2**26
    address, up, down = device.allocate(size), device.pinned((size,), np.uint8), device.pinned((size,), np.uint8)
    for value in (1, 2, 3):
        up[:] = value
        first.upload(address, up)
        first.record(event)
        second.wait(event)
        second.download(down, address)
        second.synchronize()
        assert down.min() == down.max() == value


def test_captured_work_is_done_at_each_launch(device: CudaDevice) -> None:
    stream, source, target = device.stream(), device.allocate(256), device.allocate(256)
    up, down = device.pinned((256,), np.uint8), device.pinned((256,), np.uint8)
    captured = stream.capture(lambda: stream.copy(target, source, 256))
    for value in (5, 6):
        up[:] = value
        stream.upload(source, up)
        captured.launch()
        stream.download(down, target)
        stream.synchronize()
        assert (down == value).all()


def test_more_memory_than_there_is(device: CudaDevice) -> None:
    with pytest.raises(ResourceError, match="out of memory: found CUDA_ERROR_OUT_OF_MEMORY"):
        device.allocate(device.memory()[1] + 2**30)
    assert device.allocate(256)  # and the device can still be used


def test_a_call_that_fails_is_told(device: CudaDevice) -> None:
    array = device.pinned((4,), np.uint8)
    with pytest.raises(EnvironmentFault, match="the GPU failed: found CUDA_ERROR"):
        device.stream().upload(0, array)
