"""What to build: a user's options and a bundle's manifest -> the engine's inputs (and so its key) and its profiles."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mllama_runtime.backends.private_trt import TensorRT, TensorRTBackend, gpu_compute_capabilities
from mllama_runtime.contract import MAX_LOGITS
from mllama_runtime.device import GraphName
from mllama_runtime.engine_record import (
    EngineInputs,
    Limits,
    Profile,
    ShapeRange,
    default_limits,
    graph_hashes,
    weights_hashes,
)
from mllama_runtime.errors import EnvironmentFault, UsageError
from mllama_runtime.manifest import GraphSpec, Manifest

RULES = 3  # count up when the same inputs no longer give the same engine


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What the user chose; None stands for what the model suggests. compute_capabilities: such as "8.9"."""

    backend: TensorRTBackend
    max_batch: int = 4
    max_seq_len: int | None = None
    prefill_chunk: int = 512
    max_tiles: int | None = None
    compute_capabilities: tuple[str, ...] = ()
    strip_weights: bool = False
    weight_streaming: bool = False
    timing_cache: Path | None = None


def inputs_from_options(options: EngineOptions, manifest: Manifest, trt: TensorRT) -> EngineInputs:
    """Everything the engine will depend on.

    Raises:
        UsageError: options that do not fit the model or the back end.
        EnvironmentFault: the back end needs a GPU to do this, and there is none.
    """
    model = manifest.model
    default = default_limits(model)
    max_seq_len = options.max_seq_len or default.max_seq_len
    if max_seq_len > model.text.max_seq_len:
        raise UsageError(
            "longer than the model's positions",
            where="--max-seq-len",
            expected=f"at most {model.text.max_seq_len}",
            found=max_seq_len,
        )
    num_tiles, max_tiles = model.vision.max_num_tiles, options.max_tiles or default.max_tiles
    if max_tiles % num_tiles:
        expected = f"a multiple of {num_tiles}, the tiles of one picture with its padding"
        raise UsageError("not whole pictures", where="--max-tiles", expected=expected, found=max_tiles)
    return EngineInputs(
        backend=options.backend,
        version=trt.version,
        compute_capabilities=_targets(options, trt),
        graphs=graph_hashes(manifest),
        weights=weights_hashes(manifest),
        limits=Limits(
            max_batch=options.max_batch,
            max_seq_len=max_seq_len,
            prefill_chunk=min(options.prefill_chunk, max_seq_len),
            max_tiles=max_tiles,
        ),
        strip_weights=options.strip_weights,
        weight_streaming=options.weight_streaming,
        rules=RULES,
    )


def _targets(options: EngineOptions, trt: TensorRT) -> tuple[str, ...]:
    """Compute capabilities the engine is for; empty for every GPU the back end supports."""
    flavour, gpus = trt.flavour, gpu_compute_capabilities()
    if not gpus and (options.strip_weights or not flavour.builds_without_gpu):
        what = "a stripped engine" if flavour.builds_without_gpu else f"{flavour.title}"
        hint = "build on a machine with the GPU that will serve"
        if flavour.builds_without_gpu:
            hint += ", or without --strip-weights"
        raise EnvironmentFault(f"{what} needs an NVIDIA GPU and its driver to build", where=options.backend, hint=hint)
    if not flavour.builds_without_gpu:
        if options.compute_capabilities:
            hint = "leave it out: the engine is for the GPU it is built on"
            raise UsageError("only for tensorrt-rtx", where="--compute-capability", hint=hint)
        return gpus[:1]
    known = _known_targets(trt)
    for name in options.compute_capabilities:
        if name not in known:
            raise UsageError(
                f"{flavour.title} {trt.version} builds for no such GPU",
                where="--compute-capability",
                expected=" or ".join(known),
                found=name,
            )
    return tuple(sorted(set(options.compute_capabilities), key=list(known).index))


def _known_targets(trt: TensorRT) -> dict[str, str]:
    """Compute capability such as "8.9" -> its name in TensorRT such as "SM89", smallest first."""
    names = [name for name in dir(trt.api.ComputeCapability) if name.startswith("SM") and name[2:].isdecimal()]
    return {f"{name[2:-1]}.{name[-1]}": name for name in sorted(names, key=lambda name: int(name[2:]))}


def compute_capability_names(inputs: EngineInputs, trt: TensorRT) -> list[str]:
    """TensorRT's names of the targets; empty where the builder takes none."""
    return [_known_targets(trt)[name] for name in inputs.compute_capabilities] if trt.flavour.builds_without_gpu else []


def profiles_from_limits(graph: GraphName, spec: GraphSpec, limits: Limits) -> tuple[Profile, ...]:
    """The optimisation profiles of a graph: one, or the decoder's for a chunk of a prompt and for single tokens.

    A profile of one token alone lets TensorRT choose its matrix-vector kernels. In the text profiles no row has a
    picture, so TensorRT leaves the cross-attention layers out. All profiles share one copy of the weights.
    """
    batch, tiles, chunk = limits.max_batch, limits.max_tiles, limits.prefill_chunk
    if graph != "decoder":
        name: Literal["images", "rows"] = "images" if graph == "vision" else "rows"
        return (Profile(name, _ranges(spec, {name: (1, 1, batch)}, limits)),)
    # Prompts go row by row. But where a profile fixes the batch at one, TensorRT-RTX lays out weights for it anew, and
    # keeps both: half as much again. So no profile does, even if there is to be one row only.
    prompt = {"batch": (1, 1, 2), "seq": (1, chunk, chunk), "num_logits": (1, 1, min(MAX_LOGITS, chunk))}
    token = {"batch": (1, batch, max(2, batch)), "seq": (1, 1, 1), "num_logits": (1, 1, 1)}
    text = {"cross_rows": (0, 0, 0), "num_tiles": (1, 1, 1)}
    seen = {"num_tiles": (1, tiles, tiles)}
    of_text = (
        Profile("text_prefill", _ranges(spec, {**prompt, **text}, limits)),
        Profile("text_decode", _ranges(spec, {**token, **text}, limits)),
    )
    if not any(tensor.name == "has_image" for tensor in spec.inputs):
        return of_text
    return (
        Profile("prefill", _ranges(spec, {**prompt, **seen, "cross_rows": prompt["batch"]}, limits)),
        Profile("decode", _ranges(spec, {**token, **seen, "cross_rows": token["batch"]}, limits)),
        *of_text,
    )


def _ranges(spec: GraphSpec, symbols: dict[str, tuple[int, int, int]], limits: Limits) -> dict[str, ShapeRange]:
    known = {**symbols, "cache_len": (limits.max_seq_len,) * 3}
    return {
        tensor.name: ShapeRange(*(tuple(_size(dim, known, index) for dim in tensor.shape) for index in range(3)))
        for tensor in spec.inputs
    }


def _size(dim: int | str, symbols: dict[str, tuple[int, int, int]], index: int) -> int:
    """A dimension's value: a number, a symbol, or a multiple of one such as "1601*num_tiles"."""
    if isinstance(dim, int):
        return dim
    factor, _, symbol = dim.rpartition("*")
    return int(factor or 1) * symbols[symbol][index]
