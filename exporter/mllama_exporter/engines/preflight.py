"""Is there room for a build? Asked before any work, because a builder that runs out of memory is killed silently."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from mllama_runtime.bundle import Bundle
from mllama_runtime.disk import disk_faults
from mllama_runtime.engine_record import graphs_of
from mllama_runtime.errors import ResourceError
from mllama_runtime.onnxfile import external_tensors

# Measured with TensorRT-RTX 1.7.1 on an 11B model in INT4: 16.6 GB for 5.8 GB of weights, where this says 16.7.
# The parser maps the weights, the builder keeps a copy of them, and the engine is a third.
MEMORY_PER_WEIGHT_BYTE = 2.7
MEMORY_BASE_BYTES = 2**30
DISK_BASE_BYTES = 64 * 2**20  # kernels and the record


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a build needs at most, in bytes."""

    memory_bytes: int
    disk_bytes: int


def build_memory_bytes(weights_bytes: int) -> int:
    """Host memory to build the engine of a graph with so many bytes of weights."""
    return int(MEMORY_BASE_BYTES + MEMORY_PER_WEIGHT_BYTE * weights_bytes)


def estimate_from_bundle(bundle: Bundle) -> Estimate:
    """Graphs are built one after the other, so memory is that of the largest; the disk takes all.

    Raises:
        BundleError: a graph cannot be read.
    """
    weights = []
    for graph in graphs_of(bundle.manifest.model):
        tensors = external_tensors(bundle.path(bundle.manifest.graphs[graph].file))
        weights.append(sum({(tensor.location, tensor.offset): tensor.length for tensor in tensors}.values()))
    return Estimate(
        memory_bytes=build_memory_bytes(max(weights)),
        disk_bytes=DISK_BASE_BYTES + sum(weights),
    )


def check_room(bundle: Bundle) -> Estimate:
    """The estimate, held against this machine.

    Raises:
        ResourceError: too little memory or disk.
    """
    estimate = estimate_from_bundle(bundle)
    available = available_memory_bytes()
    if available is not None and available < estimate.memory_bytes:
        raise ResourceError(
            "not enough memory to build",
            where=bundle.root,
            expected=f"{_gigabytes(estimate.memory_bytes)} available",
            found=_gigabytes(available),
            hint="build on a larger machine, or stop what else runs here",
        )
    with disk_faults(bundle.root):
        free = shutil.disk_usage(bundle.root).free
        if free < estimate.disk_bytes:
            raise ResourceError(
                "not enough disk for the engines",
                where=bundle.root,
                expected=f"{_gigabytes(estimate.disk_bytes)} free",
                found=_gigabytes(free),
                hint="free some space",
            )
    return estimate


def available_memory_bytes() -> int | None:
    """What this process may still take: the system's, or its control group's where that is less; None if unknown."""
    found = [value for value in (_system_bytes(), _group_bytes()) if value is not None]
    return min(found, default=None)


def _system_bytes() -> int | None:
    for line in _text("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _group_bytes() -> int | None:
    limit, used = _text("/sys/fs/cgroup/memory.max").strip(), _text("/sys/fs/cgroup/memory.current").strip()
    return max(0, int(limit) - int(used)) if limit.isdecimal() and used.isdecimal() else None


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
