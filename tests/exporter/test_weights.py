"""The weights file: casts equal torch's bit for bit, and what is damaged never passes unnamed."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import threading
import tracemalloc
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from mllama_exporter import weights
from mllama_exporter.checkpoints.checkpoint import Checkpoint
from mllama_exporter.weights import TensorStats, WeightSpec, WeightsReport, write_weights
from mllama_runtime.errors import CheckpointError, MllamaError, ResourceError, UsageError
from mllama_runtime.tensorfile import read_header
from safetensors.torch import load_file

from ._checkpoints import write_checkpoint

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
INTEGERS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


@pytest.fixture(autouse=True)
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Syncing a hundred small files waits on the disk and shows nothing; one test looks at it alone."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def checkpoint_of(folder: Path, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> Checkpoint:
    return Checkpoint.open(write_checkpoint(folder / "checkpoint", tensors, dtype=dtype))


def spec(tensors: Mapping[str, torch.Tensor], name: str, dtype: str) -> WeightSpec:
    return WeightSpec(name, tuple(tensors[name].shape), dtype)


def converted(
    folder: Path, tensor: torch.Tensor, dtype: str, *, clamp: bool = False
) -> tuple[torch.Tensor, WeightsReport]:
    """One tensor through a checkpoint and a weights file."""
    tensors = {"t": tensor}
    checkpoint = checkpoint_of(folder, tensors, tensor.dtype)
    report = write_weights(checkpoint, [spec(tensors, "t", dtype)], folder / "out", clamp=clamp)
    return load_file(folder / "out")["t"], report


def assert_same_bits(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == expected.dtype
    kind = INTEGERS[expected.dtype]
    assert torch.equal(found.view(kind), expected.view(kind))


def beyond(values: torch.Tensor, dtype: str) -> torch.Tensor:
    """Which values are finite, and more than the dtype can hold."""
    return torch.isfinite(values) & (values.double().abs() > torch.finfo(DTYPES[dtype]).max)


def patterns(dtype: torch.dtype) -> torch.Tensor:
    """Every value of a 16-bit type; of float32, random patterns beside what decides every rounding to 16 bits."""
    if dtype != torch.float32:
        return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    generator = torch.Generator().manual_seed(0)
    anything = torch.randint(-(2**31), 2**31, (1 << 18,), generator=generator).to(torch.int32).view(torch.float32)
    small = torch.randn(1 << 16, generator=generator) * 10.0 ** torch.randint(-9, 5, (1 << 16,), generator=generator)
    grid = torch.cat([patterns(torch.float16).float(), patterns(torch.bfloat16).float()])
    bits = grid.view(torch.int32)
    ties = [bits + offset for offset in (0x7FFF, 0x8000, 0x8001, 0x0FFF, 0x1000, 0x1001)]
    return torch.cat([anything, small, grid, torch.cat(ties).view(torch.float32)])


@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("source", DTYPES)
def test_casts_equal_torchs(tmp_path: Path, source: str, target: str) -> None:
    """Of every finite value the target can hold: normal and subnormal, on either side of every tie."""
    values = patterns(DTYPES[source])
    values = values[torch.isfinite(values) & ~beyond(values, target)]
    found, report = converted(tmp_path, values, target)
    assert_same_bits(found, values.to(DTYPES[target]))
    assert report.tensors["t"] == TensorStats(values.abs().max().item())
    assert report.num_clamped == 0


@pytest.mark.parametrize(("source", "target"), [("F32", "F16"), ("F32", "BF16"), ("BF16", "F16")])
def test_what_is_beyond_the_target_is_cut_to_its_limit(tmp_path: Path, source: str, target: str) -> None:
    values, limit = patterns(DTYPES[source]), torch.finfo(DTYPES[target]).max
    values = values[torch.isfinite(values)]
    found, report = converted(tmp_path, values, target, clamp=True)
    assert_same_bits(found, values.float().clamp(-limit, limit).to(DTYPES[target]))
    assert report.num_clamped == report.tensors["t"].num_beyond == int(beyond(values, target).sum()) > 0


@pytest.mark.parametrize("clamp", [False, True])
@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("source", DTYPES)
def test_every_nan_and_inf_is_counted(tmp_path: Path, source: str, target: str, clamp: bool) -> None:
    """Whatever its sign and its other bits, and never as a value to be cut."""
    values = patterns(DTYPES[source])
    num_nan, num_inf = int(torch.isnan(values).sum()), int(torch.isinf(values).sum())
    with pytest.raises(CheckpointError, match=rf"t \({num_nan} NaN, {num_inf} Inf\)"):
        converted(tmp_path, values, target, clamp=clamp)


@pytest.mark.parametrize("target", DTYPES)
def test_a_tensor_in_many_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    monkeypatch.setattr(weights, "_BLOCK_BYTES", 1000)
    tensor = torch.randn((3, 5, 7, 11), generator=torch.Generator().manual_seed(2))
    found, report = converted(tmp_path, tensor, target)
    assert_same_bits(found, tensor.to(DTYPES[target]))
    assert report.tensors["t"].max_abs == tensor.abs().max().item()


def test_the_file_is_an_ordinary_safetensors_file(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    shapes = {"matrix": (40, 24), "norm": (24,), "gate": (1,), "conv": (8, 3, 2, 2)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    dtypes = {"matrix": "BF16", "norm": "F32", "gate": "F16", "conv": "BF16"}
    plan = [spec(tensors, name, dtype) for name, dtype in dtypes.items()]
    calls: list[tuple[int, int]] = []
    report = write_weights(
        checkpoint_of(tmp_path, tensors),
        plan,
        tmp_path / "out",
        progress=lambda done, total: calls.append((done, total)),
    )
    loaded = load_file(tmp_path / "out")
    assert set(loaded) == set(report.tensors) == set(dtypes)
    for name, dtype in dtypes.items():
        assert_same_bits(loaded[name], tensors[name].to(DTYPES[dtype]))
    size = (tmp_path / "out").stat().st_size
    assert report.size_bytes == size == read_header(tmp_path / "out", error=CheckpointError).size_bytes
    assert report.sha256 == hashlib.sha256((tmp_path / "out").read_bytes()).hexdigest()
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert calls[-1][0] == size
    assert {total for _, total in calls} == {size}


def test_the_same_plan_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the report their hash, in whatever order the blocks come."""
    tensors = {f"t{index}": torch.randn(65, 33, generator=torch.Generator().manual_seed(index)) for index in range(9)}
    checkpoint = checkpoint_of(tmp_path, tensors)
    plan = [spec(tensors, name, ("F16", "F32")[index % 2]) for index, name in enumerate(tensors)]
    written = set()
    for threads, buffers, size in ((1, 1, 1 << 20), (2, 4, 1000), (4, 5, 400), (4, 2, 400)):
        monkeypatch.setattr(weights, "_NUM_THREADS", threads)
        monkeypatch.setattr(weights, "_NUM_BUFFERS", buffers)
        monkeypatch.setattr(weights, "_BLOCK_BYTES", size)
        report = write_weights(checkpoint, plan, tmp_path / "out")
        written.add((tmp_path / "out").read_bytes())
        assert {report.sha256} == {hashlib.sha256(data).hexdigest() for data in written}
    assert len(written) == 1


def refused(folder: Path, tensors: Mapping[str, torch.Tensor], dtype: str, kind: type[MllamaError]) -> str:
    """What writing says; it must leave nothing behind."""
    checkpoint = checkpoint_of(folder, tensors)
    (folder / "bundle").mkdir()
    with pytest.raises(kind) as caught:
        write_weights(checkpoint, [spec(tensors, name, dtype) for name in tensors], folder / "bundle" / "out")
    assert list((folder / "bundle").iterdir()) == []
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("target", DTYPES)
def test_all_damaged_tensors_are_named_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    monkeypatch.setattr(weights, "_BLOCK_BYTES", 64)
    generator = torch.Generator().manual_seed(4)
    tensors = {name: torch.randn(20, 20, generator=generator) for name in ("good", "nan", "inf", "both", "zero")}
    tensors["nan"][3, 4:9] = torch.nan
    tensors["inf"][7, 7], tensors["inf"][19, 19] = torch.inf, -torch.inf
    tensors["both"][0, 0], tensors["both"][19, 0] = -torch.nan, torch.inf
    tensors["zero"].zero_()
    tensors["norm.weight"] = -torch.zeros(20)
    message = refused(tmp_path, tensors, target, CheckpointError)
    assert "damaged tensors (5)" in message
    for found in ("nan (5 NaN, 0 Inf)", "inf (0 NaN, 2 Inf)", "both (1 NaN, 1 Inf)", "zero (all zero)"):
        assert found in message
    assert "norm.weight (all zero)" in message
    assert "good" not in message


def test_gates_and_biases_may_be_zero(tmp_path: Path) -> None:
    """An untrained checkpoint has zero gates, and transformers starts every bias at zero."""
    tensors = {"cross_attn_attn_gate": torch.zeros(1), "fc1.bias": torch.zeros(64), "half": torch.eye(8)}
    plan = [spec(tensors, name, "F16") for name in tensors]
    report = write_weights(checkpoint_of(tmp_path, tensors), plan, tmp_path / "out")
    assert [stats.max_abs for stats in report.tensors.values()].count(0.0) == 2


@pytest.mark.parametrize("source", [torch.bfloat16, torch.float32])
def test_values_beyond_fp16_are_refused_or_clamped(tmp_path: Path, source: torch.dtype) -> None:
    tensor = torch.linspace(-1, 1, 600).reshape(20, 30)
    tensor[0, 0], tensor[10, 10], tensor[19, 29] = 65536.0, -3e38, 65280.0
    checkpoint = checkpoint_of(tmp_path, {"large": tensor, "small": tensor.clamp(-1, 1)}, source)
    plan = [WeightSpec(name, (20, 30), "F16") for name in ("large", "small")]
    with pytest.raises(CheckpointError, match=r"tensors \(1\): large \(2 values, largest 3[.\d]*e\+38\).*clamp"):
        write_weights(checkpoint, plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()

    report = write_weights(checkpoint, plan, tmp_path / "out", clamp=True)
    assert (report.num_clamped, report.tensors["large"].num_beyond) == (2, 2)
    assert_same_bits(load_file(tmp_path / "out")["large"], tensor.to(source).float().clamp(-65504, 65504).half())
    write_weights(checkpoint, [WeightSpec("large", (20, 30), "BF16")], tmp_path / "out")  # holds them


def touch(path: Path) -> None:
    os.utime(path, ns=(0, 0))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize(("change", "message"), [(touch, "changed while it was read"), (cut, "model.safetensors")])
def test_a_checkpoint_that_changes_meanwhile_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None], message: str
) -> None:
    monkeypatch.setattr(weights, "_BLOCK_BYTES", 64)
    checkpoint = checkpoint_of(tmp_path, {"t": torch.randn(100, 100)})
    once = iter([change])

    def progress(done: int, total: int) -> None:
        for act in once:
            act(checkpoint.folder / "model.safetensors")

    with pytest.raises(CheckpointError, match=message):
        write_weights(checkpoint, [WeightSpec("t", (100, 100), "F32")], tmp_path / "out", progress=progress)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_foreseen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setattr(weights, "_stream", None)  # no work is begun
    message = refused(tmp_path, {"t": torch.ones(100, 100)}, "F16", ResourceError)
    assert "the disk is full" in message
    assert "found 1000 bytes free" in message
    assert f"expected {64 + 64 + 100 * 100 * 2} bytes" in message


@pytest.mark.parametrize(("code", "text"), [(errno.ENOSPC, "disk is full"), (errno.EIO, "cannot be written")])
@pytest.mark.parametrize("fails_at", [0, 1, 30, 60])
def test_a_disk_that_fills_or_fails_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int, code: int, text: str
) -> None:
    monkeypatch.setattr(weights, "_BLOCK_BYTES", 640)  # 63 writes
    calls, write = iter(range(1000)), os.pwrite

    def failing(fd: int, data: bytes, offset: int) -> int:
        if next(calls) >= fails_at:
            raise OSError(code, os.strerror(code))
        return write(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", failing)
    assert text in refused(tmp_path, {"t": torch.ones(100, 100)}, "F32", ResourceError)


def test_short_writes_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: write(fd, data[: max(1, len(data) // 3)], offset))
    tensor = torch.randn(70, 50)
    assert_same_bits(converted(tmp_path, tensor, "F16")[0], tensor.half())


def test_an_unwritable_place_is_refused(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, {"t": torch.ones(4)})
    plan = [WeightSpec("t", (4,), "F32")]
    for path in (tmp_path / "nowhere" / "out", tmp_path):
        with pytest.raises(ResourceError, match="cannot be written"):
            write_weights(checkpoint, plan, path)
    assert tmp_path.is_dir()


def test_an_interrupt_stops_the_work_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_BLOCK_BYTES", 64)  # 625 blocks
    checkpoint = checkpoint_of(tmp_path, {"t": torch.ones(100, 100)})
    calls, interrupted, write = count(), threading.Event(), os.pwrite

    def slow(fd: int, data: bytes, offset: int) -> int:
        if next(calls) > 4:
            interrupted.wait()
        return write(fd, data, offset)

    def progress(done: int, total: int) -> None:
        interrupted.set()
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "pwrite", slow)
    with pytest.raises(KeyboardInterrupt):
        write_weights(checkpoint, [WeightSpec("t", (100, 100), "F32")], tmp_path / "out", progress=progress)
    assert not (tmp_path / "out").exists()
    assert next(calls) < 100


def test_the_file_is_synced_when_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []

    def fsync(fd: int) -> None:
        synced.append(os.fstat(fd).st_size)

    monkeypatch.setattr(os, "fsync", fsync)
    report = converted(tmp_path, torch.ones(100, 100), "F16")[1]
    assert synced == [report.size_bytes]


@pytest.mark.parametrize(
    ("plan", "kind", "message"),
    [
        ([WeightSpec("gone", (4, 6), "F32")], CheckpointError, "gone: no such tensor"),
        ([WeightSpec("t", (6, 4), "F32")], CheckpointError, r"t: wrong shape: expected \[6, 4\], found \[4, 6\]"),
        ([WeightSpec("integers", (3,), "F32")], UsageError, "integers: not a float dtype.*found I64"),
        ([WeightSpec("t", (4, 6), "U16")], UsageError, "found U16"),
        ([WeightSpec("t", (4, 6), "fp16")], UsageError, "fp16"),
        ([WeightSpec("t", (4, 6), "F32")] * 2, UsageError, "twice"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(
    tmp_path: Path, plan: list[WeightSpec], kind: type[MllamaError], message: str
) -> None:
    tensors = {"t": torch.ones(4, 6), "integers": torch.ones(3, dtype=torch.int64)}
    with pytest.raises(kind, match=message):
        write_weights(checkpoint_of(tmp_path, tensors), plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_memory_does_not_grow_with_the_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four buffers, each of a block before and after its cast; the tensor is sixty-four times a block."""
    monkeypatch.setattr(weights, "_BLOCK_BYTES", 1 << 18)
    tensors = {"t": torch.ones(4096, 1024)}
    checkpoint = checkpoint_of(tmp_path, tensors)
    tracemalloc.start()
    try:
        write_weights(checkpoint, [spec(tensors, "t", "F16")], tmp_path / "out")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * 2 * (1 << 18) + (1 << 19)
    np.testing.assert_array_equal(load_file(tmp_path / "out")["t"].numpy(), 1)
