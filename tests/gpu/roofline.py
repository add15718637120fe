"""What the GPU does at best, measured in the same run: a large copy, and large matrix products where torch is there."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

from gpu.runner import Context, Row, Step
from gpu.speed import device_copy_rate
from mllama_runtime.device.cuda import open_cuda_device

_SIZE = 8192  # of the square matrices
_REPEATS = 20


def steps() -> list[Step]:
    return [Step("roofline", "Roofline", _roofline)]


def copy_rate(context: Context) -> float | None:
    """Bytes a second, read and written, of the copy; None if it was not measured."""
    return _rate(context, "copy")


def product_rate(context: Context) -> float | None:
    """Operations a second of the faster 16-bit matrix product; None if none was measured."""
    return max(filter(None, (_rate(context, dtype) for dtype in ("fp16", "bf16"))), default=None)


def _rate(context: Context, what: str) -> float | None:
    result = context.result("roofline")
    rows = result.rows if result else []
    return next((row["rate"] for row in rows if row["what"] == what), None)


def _roofline(context: Context) -> list[Row]:
    rows: list[Row] = [{"what": "copy", "unit": "bytes/s", "rate": _copy(), "reason": None}]
    try:
        import torch
    except ImportError as error:
        return [*rows, *({"what": name, "unit": "operations/s", "rate": None, "reason": str(error)} for name in _KINDS)]
    for name, product in _KINDS.items():
        row: Row = {"what": name, "unit": "operations/s", "rate": None, "reason": None}
        try:
            row["rate"] = 2 * _SIZE**3 / _seconds(product(torch), torch.cuda.synchronize)
        except Exception as error:  # kernels that a GPU or a version of torch lacks show in many ways
            row["reason"] = f"{type(error).__name__}: {error}"[:300]
        rows.append(row)
    return rows


def _copy() -> float:
    """Bytes a second, read and written."""
    device = open_cuda_device()
    try:
        return device_copy_rate(device)
    finally:
        device.close()


def _dense(dtype: str) -> Callable[[Any], Callable[[], object]]:
    def product(torch: Any) -> Callable[[], object]:
        left, right = (torch.randn(_SIZE, _SIZE, device="cuda").to(getattr(torch, dtype)) for _ in range(2))
        return lambda: torch.mm(left, right)

    return product


def _fp8(torch: Any) -> Callable[[], object]:
    left, right = (torch.randn(_SIZE, _SIZE, device="cuda").to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device="cuda")
    return lambda: torch._scaled_mm(left, right.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)


def _int8(torch: Any) -> Callable[[], object]:
    left, right = (torch.randint(-127, 127, (_SIZE, _SIZE), device="cuda", dtype=torch.int8) for _ in range(2))
    return lambda: torch._int_mm(left, right.t())


_KINDS: dict[str, Callable[[Any], Callable[[], object]]] = {
    "fp16": _dense("float16"),
    "bf16": _dense("bfloat16"),
    "fp8": _fp8,
    "int8": _int8,
}


def _seconds(work: Callable[[], object], synchronize: Callable[[], object]) -> float:
    times = []
    for index in range(_REPEATS + 5):
        synchronize()
        start = time.perf_counter()
        work()
        synchronize()
        if index >= 5:
            times.append(time.perf_counter() - start)
    return median(times)
