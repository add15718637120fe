"""Steps at full size: checkpoints of random weights, a bundle in every precision, engines, and the bench of each.

Time does not depend on what the weights are. The disk holds one precision at a time: a bundle's step removes what only
the precisions before it needed, and engines are built into a snapshot that goes when it has been measured.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench.random_checkpoint import INSTRUCT_11B, INSTRUCT_90B, write_random_checkpoint
from gpu.command import mllama, need_disk, snapshot
from gpu.runner import Context, Row, SkipError, Step
from gpu.small import BACKENDS, MINIATURE, need_backend
from mllama_exporter.checkpoints.checkpoint import expected_tensors
from mllama_exporter.sizing import weights_of
from mllama_runtime.config import ModelConfig
from mllama_runtime.device.cuda import open_cuda_device
from mllama_runtime.engine_record import Limits
from mllama_runtime.manifest import BasePrecision, DType, Precision
from mllama_runtime.memory import memory_plan
from mllama_runtime.roofline import first_token_flops

TILES = (0, 1, 4)
PROMPT_LEN, CACHE_LEN, STEPS = 128, 1024, 64
# An engine's kernels are chosen for its largest batch, so the latency of one request has an engine of its own.
BATCHES = {1: (1,), 64: (1, 4, 16, 64)}
_CALIBRATED: tuple[Precision, ...] = ("int8", "fp8")


@dataclass(frozen=True, slots=True)
class Model:
    """A model, and what its precisions are made from. precisions: in the order of the steps."""

    name: str
    config: ModelConfig
    precisions: tuple[Precision, ...]
    base: BasePrecision = "fp16"

    @property
    def num_parameters(self) -> int:
        return sum(map(math.prod, expected_tensors(self.config).values()))

    def bundle_bytes(self, precision: Precision) -> int:
        """Of its weights."""
        return weights_of(self.config, precision).total_bytes


MODELS = (
    Model("11b", INSTRUCT_11B, ("bf16", "fp16", "int8-weight", "fp8", "int8", "int4", "fp32")),
    Model("90b", INSTRUCT_90B, ("int4", "int8-weight", "fp8")),
)


def steps() -> list[Step]:
    return [step for model in MODELS for precision in model.precisions for step in _steps(model, precision)]


def _steps(model: Model, precision: Precision) -> list[Step]:
    name, section = f"{model.name}-{precision}", model.name.upper()
    found = [Step(f"{name}-bundle", section, partial(_bundle, model, precision))]
    for backend in BACKENDS:
        if backend == "cuda":
            work = partial(_bench, model, precision, backend, max(BATCHES))
            found.append(Step(f"{name}-{backend}-bench", section, work))
            continue
        for max_batch in BATCHES:
            build = partial(_build, model, precision, backend, max_batch)
            bench = partial(_bench, model, precision, backend, max_batch)
            found.append(Step(f"{name}-{backend}-batch{max_batch}-build", section, build))
            found.append(Step(f"{name}-{backend}-batch{max_batch}-bench", section, bench))
    return found


def checkpoint(model: Model, context: Context) -> Path:
    """The random checkpoint, made if it is not there."""
    folder = context.work / model.name / "checkpoint"
    if not folder.exists():
        need_disk(folder.parent, 2 * model.num_parameters, "a checkpoint's weights")
        partial_folder = folder.with_name("checkpoint.partial")
        shutil.rmtree(partial_folder, ignore_errors=True)
        write_random_checkpoint(partial_folder, model.config)
        partial_folder.rename(folder)
    return folder


def _bundle(model: Model, precision: Precision, context: Context) -> list[Row]:
    """A bundle; of a quantised precision from the base's, which stays for the next one."""
    folder = context.work / model.name
    is_quantized = precision not in ("fp32", "fp16", "bf16")
    _remove_all_but(context.work, {"miniature", model.name})
    _remove_all_but(folder, {"checkpoint", model.base if is_quantized else ""})
    if is_quantized:
        _need_memory(model, precision)
        base = _exported(model, model.base, context)
        need_disk(folder, model.bundle_bytes(precision), f"{precision} weights")
        data: dict[Precision, object] = dict.fromkeys(_CALIBRATED, _calibration(folder)) | {"int4": "none"}
        options = ("--calibration", data[precision]) if precision in data else ()
        found = mllama("quantize", base, folder / precision, "--scheme", precision, *options)
    else:
        _exported(model, precision, context)
        found = {}
    size = sum(path.stat().st_size for path in (folder / precision).iterdir() if path.is_file())
    return [{"kind": "bundle", "precision": precision, "size_bytes": size, "seconds": found.get("seconds")}]


def _exported(model: Model, precision: Precision, context: Context) -> Path:
    """An unquantised bundle, and no checkpoint: both and an engine are more than many disks hold."""
    bundle = context.work / model.name / precision
    if not bundle.exists():
        made, own = 2 * model.num_parameters, model.bundle_bytes(precision)
        has_checkpoint = (bundle.parent / "checkpoint").exists()
        need_disk(bundle.parent, own + (0 if has_checkpoint else made), "a checkpoint and its bundle")
        mllama("export", checkpoint(model, context), bundle, "--dtype", precision)
    shutil.rmtree(bundle.parent / "checkpoint", ignore_errors=True)
    return bundle


def _need_memory(model: Model, precision: Precision) -> None:
    """Calibration runs the bundle on the CPU, in float32, twice: as it is and with its activations as outputs."""
    needed = 2 * 4 * model.num_parameters if precision in _CALIBRATED else 0
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        raise SkipError(
            f"{precision} is calibrated on the CPU, in float32, in two sessions: {needed / 1e9:.0f} GB of memory for "
            f"{model.num_parameters / 1e9:.1f}e9 parameters, {there / 1e9:.0f} GB are there"
        )


def _calibration(folder: Path) -> Path:
    """A question about a picture and one about none: any scale is as fast as another."""
    picture = str(MINIATURE / "pictures" / "shapes-2x2.png")
    lines = [{"image": picture, "question": "What do you see?"}, {"image": None, "question": "Hello!"}]
    path = folder / "calibration.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return path


def _build(model: Model, precision: Precision, backend: str, max_batch: int, context: Context) -> list[Row]:
    need_backend(backend)
    source = _made(model, precision, context)
    need_device_memory(model, precision, max_batch)
    need_disk(context.work, model.bundle_bytes(precision), f"engines of {precision} weights")
    bundle = snapshot(source, _built(model, precision, backend, max_batch, context))
    limits = ("--max-batch", max_batch, "--max-seq-len", CACHE_LEN, "--max-tiles", max(TILES))
    found = mllama("build", bundle, "--backend", backend, *limits)
    sizes = {graph: engine["size_bytes"] for graph, engine in found["record"]["engines"].items()}
    row = {"kind": "build", "precision": precision, "backend": backend, "max_batch": max_batch}
    return [{**row, "seconds": sum(found["seconds"].values()), "size_bytes": sum(sizes.values())}]


def need_device_memory(model: Model, precision: Precision, max_batch: int) -> None:
    """Raises SkipError, with the arithmetic, when weights and caches cannot fit the GPU; activations come on top."""
    device = open_cuda_device()
    try:
        _, total = device.memory()
    finally:
        device.close()
    if reason := beyond_memory(model, precision, max_batch, total):
        raise SkipError(reason)


def beyond_memory(model: Model, precision: Precision, max_batch: int, total: int) -> str | None:
    """Why a GPU with so many bytes cannot hold it; None if it may."""
    limits = Limits(max_batch, CACHE_LEN, prefill_chunk=512, max_tiles=max(TILES))
    dtype: DType = "float32" if precision == "fp32" else "float16"
    weights = model.bundle_bytes(precision)
    caches = memory_plan(model.config, limits, cache_dtype=dtype).device_bytes
    if weights + caches <= total:
        return None
    return (
        f"{precision} weights {weights / 1e9:.0f} GB and caches for {max_batch} rows {caches / 1e9:.0f} GB, before any "
        f"activation: the GPU has {total / 1e9:.0f} GB"
    )


def _bench(model: Model, precision: Precision, backend: str, max_batch: int, context: Context) -> list[Row]:
    need_backend(backend)
    bundle = _made(model, precision, context)
    if backend != "cuda":
        bundle = _built(model, precision, backend, max_batch, context)
        if not bundle.exists():
            raise SkipError("its engines were not built")
    batches = [part for batch in BATCHES[max_batch] for part in ("--batch", batch)]
    tiles = [part for number in TILES for part in ("--tiles", number)]
    lengths = ("--prompt-len", PROMPT_LEN, "--cache-len", CACHE_LEN, "--steps", STEPS)
    try:
        found = mllama("bench", bundle, "--backend", backend, *batches, *tiles, *lengths)
    finally:
        if backend != "cuda":
            shutil.rmtree(bundle)
    row = {"precision": precision, "backend": backend, "max_batch": max_batch}
    rows = [{**row, **measured} for measured in found["measured"]]
    for each in rows:
        if each["kind"] == "first token":
            flops = first_token_flops(model.config, num_tokens=each["num_tokens"], num_tiles=each["num_tiles"])
            each["flops"] = flops
    return rows


def _made(model: Model, precision: Precision, context: Context) -> Path:
    bundle = context.work / model.name / precision
    if not bundle.exists():
        raise SkipError(f"there is no {precision} bundle: run the step {model.name}-{precision}-bundle")
    return bundle


def _built(model: Model, precision: Precision, backend: str, max_batch: int, context: Context) -> Path:
    return context.work / model.name / f"{precision}-{backend}-batch{max_batch}"


def _remove_all_but(folder: Path, names: set[str]) -> None:
    if folder.exists():
        for path in folder.iterdir():
            if path.is_dir() and path.name not in names:
                shutil.rmtree(path)
