"""What the GPU reaches at the 11B model's shapes with nothing in its way: torch's cuBLAS under a CUDA graph.

Each product of a few rows reads its matrix once, so bytes a second are held against those of a large copy. Matrices are
taken in turn, more than the cache holds. Two layouts: x @ W.T with W [out, in] as checkpoints have it, and x @ W with
W [in, out].
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from gpu.record import Fields, Recorder

_SHAPES = {  # in, out
    "query": (4096, 4096),
    "key": (4096, 1024),
    "query, key, value": (4096, 6144),
    "gate": (4096, 14336),
    "gate and up": (4096, 28672),
    "down": (14336, 4096),
    "lm_head": (4096, 128256),
}
_COPY_BYTES = 4 * 2**30
_AT_LEAST = 400 * 2**20  # bytes of matrices in turn: far beyond the cache
_LARGE = 8192


def blas(record: Recorder) -> None:
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    if not torch.cuda.is_available():
        record.add("copy", error="torch sees no GPU")
        return
    found = record.try_("copy", functools.partial(_copy, torch))
    rate = float(found["bytes_per_second"]) if found else 3e12
    record.try_("read", functools.partial(_read, torch, rate))
    for dtype in ("float16", "bfloat16"):
        record.try_("large product", functools.partial(_large, torch, dtype))
        for name, (width, out) in _SHAPES.items():
            for rows in (1, 4, 16):
                for layout in ("x @ W.T", "x @ W"):
                    work = functools.partial(_product, torch, dtype, width, out, rows, layout, rate)
                    record.try_(f"{name}, {rows} rows", work)


def seconds(torch: Any, work: Callable[[], object], *, repeats: int = 10) -> float:
    """Of one run of `work`, replayed from a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    graph.replay()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) * 1e-3 / repeats


def _copy(torch: Any) -> Fields:
    source, target = (torch.empty(_COPY_BYTES, dtype=torch.uint8, device="cuda").zero_() for _ in range(2))
    took = seconds(torch, lambda: target.copy_(source))
    return {"bytes_per_second": 2 * _COPY_BYTES / took}


def _read(torch: Any, rate: float) -> Fields:
    """A sum reads and hardly writes: what products can hope for."""
    source = torch.zeros(_COPY_BYTES // 4, dtype=torch.float32, device="cuda")
    took = seconds(torch, lambda: source.sum())
    return {"bytes_per_second": _COPY_BYTES / took, "share_of_copy": _COPY_BYTES / took / rate}


def _large(torch: Any, dtype: str) -> Fields:
    left, right = (torch.randn(_LARGE, _LARGE, device="cuda").to(getattr(torch, dtype)) for _ in range(2))
    took = seconds(torch, lambda: left @ right.T)
    return {"dtype": dtype, "tflops": 2 * _LARGE**3 / took / 1e12}


def _product(torch: Any, dtype: str, width: int, out: int, rows: int, layout: str, rate: float) -> Fields:
    kind = getattr(torch, dtype)
    size = 2 * width * out
    number = max(2, -(-_AT_LEAST // size))
    shape = (out, width) if layout == "x @ W.T" else (width, out)
    weights = [torch.empty(shape, dtype=kind, device="cuda").normal_(0, width**-0.5) for _ in range(number)]
    left = torch.randn(rows, width, device="cuda").to(kind)

    def work() -> None:
        for weight in weights:
            left @ (weight.T if layout == "x @ W.T" else weight)

    took = seconds(torch, work) / number
    achieved = size / took
    return {
        "dtype": dtype,
        "rows": rows,
        "layout": layout,
        "us": took * 1e6,
        "bytes_per_second": achieved,
        "share_of_copy": achieved / rate,
    }
