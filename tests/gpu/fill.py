"""Random weights behind the headers of a bundle without weights: `python -m gpu.fill BUNDLE`, on the GPU's machine.

    BUNDLE/*.safetensors.header -> BUNDLE/*.safetensors

Matrices are N(0, 1 / columns), so that activations keep their size; norms are 1 and gates 0.5. Quantised matrices are
random integers under scales that give them the same variance. The seed and a tensor's name decide its numbers.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_BLOCK_ELEMENTS = 1 << 25
_NUM_THREADS = 12
_FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
_INTEGERS = {"I8", "U8"}
_DEVIATIONS = {"I8": 127 / 3**0.5, "U8": (56 / 3) ** 0.5, "F8_E4M3": 100.0}
"""Of the stored numbers: bytes from -127 to 127, four bits from -7 to 7, and floats drawn so."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a safetensors header; offset from the start of the file. columns: of the whole matrix."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


def tensors_of(header: bytes) -> list[Tensor]:
    """What a safetensors file begins with says of its tensors."""
    length = struct.unpack("<Q", header[:8])[0]
    entries = json.loads(header[8 : 8 + length])
    entries.pop("__metadata__", None)
    return [
        Tensor(name, entry["dtype"], tuple(entry["shape"]), 8 + length + begin, end - begin)
        for name, entry in entries.items()
        for begin, end in [entry["data_offsets"]]
    ]


def constant_of(name: str, shape: tuple[int, ...]) -> float | None:
    """The number that a norm, a gate or a bias is full of; None for what is drawn."""
    if name.endswith("_scale"):
        return None
    if name.endswith("gate") or "_gate" in name.rpartition(".")[2]:
        return 0.5
    if len(shape) == 1 and "norm" in name:
        return 0.0 if name.endswith("bias") else 1.0
    if math.prod(shape) == 1:
        return 0.5
    return 0.0 if name.endswith("bias") else None


def element(dtype: str, value: float) -> bytes:
    """The bytes of one number."""
    if dtype == "BF16":
        return struct.pack("<f", value)[2:]
    return struct.pack({"F16": "<e", "F32": "<f"}[dtype], value)


def _scale(tensor: Tensor, others: dict[str, Tensor]) -> float:
    """Of the matrix that a tensor named *_scale belongs to: what gives it the variance 1 / columns."""
    matrix = others[tensor.name.removesuffix("_scale")]
    columns = matrix.shape[-1] * (2 if matrix.dtype == "U8" else 1)
    return columns**-0.5 / _DEVIATIONS[matrix.dtype]


def _deviation(tensor: Tensor) -> float:
    if "embed" in tensor.name or len(tensor.shape) == 1:
        return 0.02 if len(tensor.shape) == 1 or "tokens" not in tensor.name else 1.0
    return math.prod(tensor.shape[1:]) ** -0.5


def _drawn(tensor: Tensor, start: int, count: int, seed: int, others: dict[str, Tensor], device: str) -> torch.Tensor:
    """Elements start to start + count, in the stored dtype."""
    import torch

    if tensor.name.endswith("_scale"):
        return torch.full((count,), _scale(tensor, others), dtype=getattr(torch, _FLOATS[tensor.dtype]), device=device)
    value = constant_of(tensor.name, tensor.shape)
    if value is not None:
        return torch.full((count,), value, dtype=getattr(torch, _FLOATS[tensor.dtype]), device=device)
    generator = torch.Generator(device).manual_seed(zlib.crc32(f"{seed} {tensor.name} {start}".encode()))
    if tensor.dtype == "I8":
        return torch.randint(-127, 128, (count,), dtype=torch.int8, device=device, generator=generator)
    if tensor.dtype == "U8":  # two of four bits, each from -7 to 7
        low, high = (
            torch.randint(-7, 8, (count,), dtype=torch.int8, device=device, generator=generator).view(torch.uint8) & 15
            for _ in range(2)
        )
        return low | (high << 4)
    drawn = torch.randn(count, dtype=torch.float32, device=device, generator=generator)
    if tensor.dtype == "F8_E4M3":
        return (drawn * _DEVIATIONS["F8_E4M3"]).clamp(-448, 448).to(torch.float8_e4m3fn)
    return (drawn * _deviation(tensor)).to(getattr(torch, _FLOATS[tensor.dtype]))


def fill(header: Path, *, seed: int = 0, device: str | None = None) -> int:
    """Write the weights file of a header beside it; its size in bytes."""
    import torch

    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    data = header.read_bytes()
    tensors = {tensor.name: tensor for tensor in tensors_of(data)}
    total = max(tensor.offset + tensor.num_bytes for tensor in tensors.values())
    path = header.with_suffix("")
    if shutil.disk_usage(path.parent).free < total:
        raise OSError(f"{path.parent}: {total / 1e9:.1f} GB of weights do not fit")
    blocks = [
        (tensor, start, min(_BLOCK_ELEMENTS, math.prod(tensor.shape) - start))
        for tensor in tensors.values()
        for start in range(0, math.prod(tensor.shape), _BLOCK_ELEMENTS)
    ]
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        os.truncate(descriptor, total)
        os.pwrite(descriptor, data, 0)

        def write(block: tuple[Tensor, int, int]) -> None:
            tensor, start, count = block
            drawn = _drawn(tensor, start, count, seed, tensors, place)
            view = memoryview(drawn.view(torch.uint8).cpu().numpy())
            offset = tensor.offset + start * (tensor.num_bytes // math.prod(tensor.shape))
            while view:
                done = os.pwrite(descriptor, view, offset)
                view, offset = view[done:], offset + done

        with ThreadPoolExecutor(min(_NUM_THREADS, len(os.sched_getaffinity(0)))) as pool:
            list(pool.map(write, blocks))
    finally:
        os.close(descriptor)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    began, total = time.monotonic(), 0
    for header in sorted(arguments.bundle.glob("*.safetensors.header")):
        total += fill(header, seed=arguments.seed)
        header.unlink()
    print(f"{arguments.bundle}: {total / 1e9:.1f} GB in {time.monotonic() - began:.1f} s", flush=True)


if __name__ == "__main__":
    main()
