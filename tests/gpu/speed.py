"""How long a bundle's steps take on the `cuda` back end, and what they take of the device; over one open back end.

Every figure is of the path that requests take (`mllama_runtime.bench`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
from gpu.mini import captured_steps, without_capture
from gpu.record import Fields, Recorder
from mllama_runtime import bench
from mllama_runtime.backends import Backend, backend_from_bundle
from mllama_runtime.bench import DecodeCase, Decoding, first_token_seconds, sample_tiles
from mllama_runtime.bundle import Bundle
from mllama_runtime.device.cuda import CudaDevice, open_cuda_device
from mllama_runtime.engine_record import Limits
from mllama_runtime.errors import EnvironmentFault
from mllama_runtime.roofline import decode_bytes, first_token_flops, vision_flops

_COPY_BYTES = 2 * 2**30  # far beyond any cache
_WARM_UP = 6  # steps: two run, one is captured
_NUM_BEFORE = 5  # tokens before a picture
WORKS = ("load", "memory", "decode", "sampler", "ttft", "vision", "profile")


@dataclass(frozen=True, slots=True)
class Cases:
    """What to measure. decode: batch, tiles, cached tokens."""

    limits: Limits
    decode: tuple[tuple[int, int, int], ...]
    steps: int = 64


CASES = {
    "large": Cases(
        Limits(max_batch=64, max_seq_len=2048, prefill_chunk=512, max_tiles=4),
        (
            *((1, 0, 512), (1, 4, 512), (1, 1, 512), (1, 0, 1900), (4, 0, 512), (4, 4, 512)),
            *((16, 0, 512), (16, 4, 512), (64, 0, 512), (64, 4, 512)),
        ),
    ),
    "quick": Cases(
        Limits(max_batch=16, max_seq_len=8192, prefill_chunk=512, max_tiles=4),
        ((1, 0, 512), (1, 4, 512), (1, 0, 8000), (4, 0, 512), (16, 0, 512), (16, 4, 512)),
    ),
    "short": Cases(  # to compare one way with another
        Limits(max_batch=16, max_seq_len=1024, prefill_chunk=512, max_tiles=4),
        ((1, 0, 512), (1, 4, 512), (4, 0, 512), (16, 0, 512)),
        32,
    ),
    "tiny": Cases(  # for a rehearsal
        Limits(max_batch=4, max_seq_len=512, prefill_chunk=256, max_tiles=4), ((1, 0, 128), (1, 4, 128), (4, 4, 128)), 8
    ),
}


def measure(path: Path, works: Sequence[str], cases: Cases, record: Recorder, *, capture: bool = True) -> None:
    """Open the bundle once and do the works in order; a work that fails leaves its error and the next begins."""
    copying = open_cuda_device()
    rate = device_copy_rate(copying)
    copying.close()
    device, bundle = open_cuda_device(), Bundle.open(path)
    try:
        free = device.memory()[0]
        began = time.perf_counter()
        opened: Fields = {}
        with backend_from_bundle(bundle, "cuda", None, limits=cases.limits) as backend:
            opened = {"open_seconds": time.perf_counter() - began, "taken_bytes": free - device.memory()[0]}
            if not capture:
                without_capture(backend)
            run = _Run(bundle, backend, cases, record, device, rate, free)
            record.add("open", **opened, copy_bytes_per_second=rate, plan=str(backend.memory()))
            for work in works:
                record.try_(work, getattr(run, work))
            record.try_("memory at the end", run.memory)
    except Exception as error:
        record.add("open", error=f"{type(error).__name__}: {error}"[:700])
    finally:
        device.close()


def too_large(path: Path, record: Recorder) -> None:
    """Limits that no device holds are refused as such, and the next engine opens all the same."""
    bundle = Bundle.open(path)
    chunk = min(512, bundle.manifest.model.text.max_seq_len)
    for max_batch in (100_000, 1):
        limits = Limits(max_batch, chunk, chunk, bundle.manifest.model.vision.max_num_tiles)

        def opened(limits: Limits = limits) -> Fields:
            with backend_from_bundle(bundle, "cuda", None, limits=limits) as backend:
                return {"planned_bytes": backend.memory().device_bytes}

        record.try_(f"open with {max_batch} slots", opened)


def device_copy_rate(device: CudaDevice) -> float:
    """Bytes a second, read and written, of a large copy on the device."""
    stream = device.stream()
    source, target = device.allocate(_COPY_BYTES), device.allocate(_COPY_BYTES)
    seconds = []
    for number in (200, 20, 20, 20):  # the first wakes the clocks
        start = time.perf_counter()
        for _ in range(number):
            stream.copy(target, source, _COPY_BYTES)
        stream.synchronize()
        seconds.append((time.perf_counter() - start) / number)
    return 2 * _COPY_BYTES / median(seconds[1:])


@dataclass(frozen=True, slots=True)
class _Run:
    bundle: Bundle
    backend: Backend
    cases: Cases
    record: Recorder
    device: CudaDevice
    rate: float
    free: int

    @property
    def model(self) -> Any:
        return self.bundle.manifest.model

    @property
    def stream(self) -> Any:
        """Where the back end's work goes."""
        slots: Any = self.backend.slots(num_slots=1, cache_len=1, num_tiles=1)
        return slots.loaded.compute

    def load(self) -> Fields:
        parts = self.backend.memory().device_parts()
        return {"weights_bytes": parts["weights"], "activation_bytes": parts["activations"]}

    def memory(self) -> Fields:
        """The plan against what the device has less of."""
        plan = self.backend.memory()
        taken = self.free - self.device.memory()[0]
        return {
            "taken_bytes": taken,
            "planned_bytes": plan.device_bytes,
            "unplanned_bytes": taken - plan.device_bytes,
            "pinned_bytes": plan.pinned_bytes,
        }

    def decode(self) -> Fields:
        for batch, tiles, cached in self.cases.decode:
            self.record.try_(
                "decode",
                lambda batch=batch, tiles=tiles, cached=cached: self._decode(batch, tiles, cached),  # type: ignore[misc]
            )
        return {"captured": captured_steps(self.backend)}

    def _decode(self, batch: int, tiles: int, cached: int) -> Fields:
        steps = self.cases.steps
        cache_len = min(cached + steps + _WARM_UP + 2, self.cases.limits.max_seq_len)
        decoding = Decoding(self.backend, self.model, DecodeCase(batch, cached, cache_len, tiles))
        try:
            for _ in range(_WARM_UP):
                decoding.step()
            self.stream.synchronize()
            gpu = _Stopwatch(self.device, self.stream)
            times = []
            gpu.start()
            for _ in range(steps):
                start = time.perf_counter()
                decoding.step()
                times.append((time.perf_counter() - start) * 1e3)
            gpu_ms = gpu.stop()
        finally:
            decoding.end()
        read = decode_bytes(self.bundle, batch=batch, num_cached=cached, num_tiles=tiles, on_cpu=False)
        ms = median(times)
        return {
            "batch": batch,
            "tiles": tiles,
            "cached": cached,
            "ms": ms,
            "p10": float(np.percentile(times, 10)),
            "p90": float(np.percentile(times, 90)),
            "gpu_ms": None if gpu_ms is None else gpu_ms / steps,
            "tokens_per_second": batch / ms * 1e3,
            "read_bytes": read,
            "share_of_copy": read / (ms * 1e-3) / self.rate,
            "clock_mhz": clock(),
        }

    def sampler(self) -> Fields:
        """Steps with seeded sampling, at batch 1 and 16."""
        from mllama_runtime.backends import Chunk
        from mllama_runtime.sampling import Sampler, SamplingParams

        found: Fields = {}
        for batch in (1, min(16, self.cases.limits.max_batch)):
            tokens = self.backend.tokens(num_slots=batch, cache_len=256, num_tiles=0)
            for slot in range(batch):
                tokens.extend(slot, Chunk(np.zeros(1, np.int64), 0, np.ones((1, 0), np.bool_)))
                params = SamplingParams(temperature=0.8, top_p=0.9, top_k=50, seed=slot)
                tokens.first(slot, Sampler(params, self.model.text.vocab_size)).read()
            times, before = [], None
            for index in range(_WARM_UP + 24):  # a step is read while the next one runs, as requests do it
                start = time.perf_counter()
                pending = tokens.step(range(batch))
                if before is not None:
                    before.read()
                before = pending
                if index >= _WARM_UP:
                    times.append((time.perf_counter() - start) * 1e3)
            pending.read()
            for slot in range(batch):
                tokens.leave(slot)
            found[f"ms_batch_{batch}"] = median(times)
        return found

    def ttft(self) -> Fields:
        """First tokens: the very first time, and repeated; then text of lengths that were never seen."""
        for tiles, length in ((0, 128), (1, 128), (4, 128), (0, 512), (4, 512)):
            if length <= self.cases.limits.max_seq_len:
                self.record.try_(
                    "first token",
                    lambda tiles=tiles, length=length: self._first_token(tiles, length),  # type: ignore[misc]
                )
        lengths = [100, 101, 102]
        first = [self._seconds(0, length, warm_up=0, repeats=1) * 1e3 for length in lengths]
        again = [self._seconds(0, length, warm_up=1, repeats=3) * 1e3 for length in lengths]
        return {"new_lengths": str(lengths), "first_ms": _shown(first), "again_ms": _shown(again)}

    def _first_token(self, tiles: int, length: int) -> Fields:
        first = self._seconds(tiles, length, warm_up=0, repeats=1)
        again = self._seconds(tiles, length, warm_up=3, repeats=10)
        flops = first_token_flops(self.model, num_tokens=length, num_tiles=tiles)
        return {
            "tiles": tiles,
            "tokens": length,
            "first_ms": first * 1e3,
            "ms": again * 1e3,
            "tflops": flops / again / 1e12,
            "clock_mhz": clock(),
        }

    def _seconds(self, tiles: int, length: int, *, warm_up: int, repeats: int) -> float:
        num_before = _NUM_BEFORE if tiles else 0
        with patch.object(bench, "_WARM_UP", warm_up):
            return first_token_seconds(self.backend, self.model, length, tiles, num_before, repeats=repeats)

    def vision(self) -> Fields:
        """The vision graph alone: from pixels on the host to keys and values on the device."""
        slots: Any = self.backend.slots(num_slots=1, cache_len=1, num_tiles=1)
        times, sample = [], sample_tiles(self.model)

        def encode(key: str) -> None:
            features: Any = self.backend.encode(replace(sample, key=key))
            slots._pictures.encoded(features, {features.key})

        for index in range(10):
            start = time.perf_counter()
            encode(f"alone {index}")
            self.stream.synchronize()
            times.append((time.perf_counter() - start) * 1e3)
        start = time.perf_counter()
        for index in range(8):  # the next one's pixels go up meanwhile
            encode(f"in a row {index}")
        self.stream.synchronize()
        in_a_row = (time.perf_counter() - start) / 8 * 1e3
        flops = vision_flops(self.model.vision, self.model.text)
        return {
            "first_ms": times[0],
            "ms": median(times[3:]),
            "in_a_row_ms": in_a_row,
            "tflops_in_a_row": flops / in_a_row / 1e9,
        }

    def profile(self) -> Fields:
        """Kernels by the time they take: of a step for text, one with a picture, one of 16 rows, and a first token."""
        largest = min(16, self.cases.limits.max_batch)
        for name, batch, tiles in (
            ("step, text", 1, 0),
            ("step, picture", 1, 4),
            (f"step, {largest} rows", largest, 0),
        ):
            self.record.try_(
                f"profile: {name}",
                lambda name=name, batch=batch, tiles=tiles: self._profile_steps(name, batch, tiles),  # type: ignore[misc]
            )
        self._seconds(4, 128, warm_up=0, repeats=1)
        slots: Any = self.backend.slots(num_slots=1, cache_len=1, num_tiles=1)
        slots._pictures.warm_up(sample_tiles(self.model))  # it forgets: or the picture would not be encoded again
        name = "first token, picture"
        self.record.try_(
            f"profile: {name}",
            lambda: self._kernels(name, 1, lambda: self._seconds(4, 128, warm_up=0, repeats=1)),
        )
        return {}

    def _profile_steps(self, name: str, batch: int, tiles: int) -> Fields:
        number, length = 5, min(600, self.cases.limits.max_seq_len)
        decoding = Decoding(self.backend, self.model, DecodeCase(batch, length - 40, length, tiles))
        try:
            for _ in range(_WARM_UP):
                decoding.step()
            self.stream.synchronize()
            return self._kernels(name, number, lambda: [decoding.step() for _ in range(number)])
        finally:
            decoding.end()

    def _kernels(self, name: str, number: int, work: Callable[[], object]) -> Fields:
        """number: of runs in the work; what is written is of one."""
        rows = _profiled(work)
        if not rows and without_capture(self.backend):
            self.record.add("profile", note="no kernel seen in captured steps: they are run one by one")
            rows = _profiled(work)
        if not rows:
            return {"kernels": 0, "note": "torch.profiler sees no kernel of ONNX Runtime"}
        total = sum(each.self_device_time_total for each in rows)
        for each in rows[:40]:
            us = each.self_device_time_total
            self.record.add(
                "kernel", of=name, name=each.key[:160], count=each.count / number, us=us / number, share=us / total
            )
        return {"kernels": sum(each.count for each in rows) / number, "names": len(rows), "total_us": total / number}


def _profiled(work: Callable[[], object]) -> list[Any]:
    """Kernels by name, the longest first; none where copies are all that was seen."""
    import torch
    from torch.profiler import ProfilerActivity

    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profiled:
        work()
        torch.cuda.synchronize()
    rows = [each for each in profiled.key_averages() if each.self_device_time_total > 0]
    if all(each.key.startswith("Mem") for each in rows):
        return []
    return sorted(rows, key=lambda each: -each.self_device_time_total)


class _Stopwatch:
    """Milliseconds of the device between two points of a stream; None where its events cannot tell."""

    def __init__(self, device: CudaDevice, stream: Any) -> None:
        self._device, self._stream, self._events = device, stream, list[Any]()
        try:
            self._events = [device.call(device.cu.cuEventCreate, 0) for _ in range(2)]
        except (EnvironmentFault, RuntimeError):  # a driver that lacks a function raises RuntimeError
            self._events = []

    def start(self) -> None:
        self._record(0)

    def stop(self) -> float | None:
        self._record(1)
        if not self._events:
            return None
        try:
            self._device.call(self._device.cu.cuEventSynchronize, self._events[1])
            return float(self._device.call(self._device.cu.cuEventElapsedTime, *self._events))
        except (EnvironmentFault, RuntimeError):
            return None

    def _record(self, index: int) -> None:
        if self._events:
            self._device.call(self._device.cu.cuEventRecord, self._events[index], self._stream.handle)


def clock() -> int | None:
    """The GPU's clock at this moment, in MHz; None where NVIDIA's management library does not tell."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        return int(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM))
    except pynvml.NVMLError:
        return None


def _shown(values: Sequence[float]) -> str:
    return " ".join(f"{value:.2f}" for value in values)
