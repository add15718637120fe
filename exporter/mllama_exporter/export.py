"""Checkpoint to bundle: the whole pipeline, one step a line in `bundle_from_checkpoint`.

Nothing of a checkpoint is held in memory: graphs are traced from dimensions, weights are streamed.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

import onnx_ir as ir
import torch
from mllama_runtime import __version__
from mllama_runtime.bundle import Bundle
from mllama_runtime.bundle_writer import BundleWriter
from mllama_runtime.config import MaskSemantics, ModelConfig, VisionStates
from mllama_runtime.errors import BundleError
from mllama_runtime.fields import parse, printable, to_plain
from mllama_runtime.manifest import DType, GraphKey, GraphSpec, Manifest, Source, TensorSpec, WeightStats
from mllama_runtime.tensorfile import TensorInfo

from mllama_exporter.checkpoints import checkpoint_from_folder
from mllama_exporter.checkpoints.checkpoint import Checkpoint, expected_tensors, truncate
from mllama_exporter.cuda_decoder import cuda_decoder_from_graph
from mllama_exporter.cuda_vision import cuda_vision_from_graph
from mllama_exporter.graphs import (
    decoder_graph_from_config,
    vision_graph_from_config,
    weight_names,
    weights_attached,
)
from mllama_exporter.ort_graphs import ort_graph_from_graph
from mllama_exporter.placement import WeightsFile, finished_move, link, moved_files, own_files, remove_sources
from mllama_exporter.sampling_graphs import greedy_graph_from_config, sampler_graph_from_config
from mllama_exporter.text_files import write_text_files
from mllama_exporter.weights import WeightSpec, check_room, checked_weights, write_weights

_TOOLS = ("onnx", "onnx-ir", "onnxscript", "torch")
_STORED_DTYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
_TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

ExportPrecision = Literal["fp32", "fp16", "bf16"]
Progress = Callable[[str, int, int], object]
"""Called with a step's name, and how much of it is done out of how much: graphs for "tracing", bytes for "weights";
"saving" is only announced."""


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """What the user chose.

    num_layers: keep only the first layers of the decoder, for debugging. clamp: clip what is beyond FP16's range
    instead of refusing it. text_only: leave out the vision tower and the cross-attention layers; what remains is the
    text model that Llama 3.2 Vision was made from. weights: "move" makes the checkpoint's own files the bundle's,
    which takes no room and leaves the checkpoint without them. adapter: a folder with a LoRA adapter to merge.
    """

    precision: ExportPrecision = "fp32"
    mask_semantics: MaskSemantics = "hf"
    vision_states: VisionStates = "published"
    num_layers: int | None = None
    clamp: bool = False
    text_only: bool = False
    weights: Literal["copy", "move"] = "copy"
    adapter: Path | None = None


def bundle_from_checkpoint(
    folder: Path, output: Path, options: ExportOptions, progress: Progress = lambda step, done, total: None
) -> Bundle:
    """Export a checkpoint folder. What an export of the same was cut short at is not done again.

    Raises:
        CheckpointError: the checkpoint is incomplete, damaged, not an mllama, or changed meanwhile.
        InputError: the output cannot be made there.
        ResourceError: the disk is too small.
        UsageError: options that do not fit the model.
    """
    if options.weights == "move" and (moved := finished_move(folder, output)):
        return moved
    checkpoint = checkpoint_from_folder(folder, options.adapter)
    config = checkpoint.config if options.num_layers is None else truncate(checkpoint.config, options.num_layers)
    config = replace(config, is_text_only=options.text_only)
    checkpoint.check(config)
    with BundleWriter(output, not_inside=folder, key=_key(checkpoint, options)) as writer:
        write_text_files(checkpoint.text_folder, writer, config)
        graphs = _graphs(checkpoint, config, options, writer, progress)
        plan = _weight_plan(graphs.weights, config, options)
        files = _files(checkpoint, plan, options)
        weights = _weights(checkpoint, files, options, writer, progress)
        progress("saving", 0, 1)
        for file in files:
            link(file, writer.path)
            writer.add_file(file.name, sha256=weights[file.name].sha256)
        for spec in graphs.specs.values():
            writer.add_file(spec.file)
        checkpoint.assert_unchanged()
        bundle = writer.commit(_manifest(checkpoint, config, options, graphs.specs, plan, weights.values()))
    if sources := [file.source for file in files if file.source]:
        remove_sources(sources)
    return bundle


def _key(checkpoint: Checkpoint, options: ExportOptions) -> str:
    """Of everything that the bundle depends on."""
    return repr((checkpoint.fingerprint, checkpoint.state(), options, tool_versions(_TOOLS)))


@dataclass(frozen=True, slots=True)
class _Graphs:
    """The bundle's graphs, saved. weights: names of the tensors they use, in the order of first use."""

    weights: tuple[str, ...]
    specs: Mapping[GraphKey, GraphSpec]


def _graphs(
    checkpoint: Checkpoint, config: ModelConfig, options: ExportOptions, writer: BundleWriter, progress: Progress
) -> _Graphs:
    if (before := writer.finished("graphs")) is not None:
        return parse(_Graphs, before, where="units/graphs.json", error=BundleError)
    models = _traced(config, options, progress)
    names = tuple(dict.fromkeys(name for model in models.values() for name in weight_names(model)))
    located: dict[str, tuple[str, TensorInfo]] = {}
    for file in _files(checkpoint, _weight_plan(names, config, options), options):
        located |= file.located
    for model in models.values():
        weights_attached(model, located)
    made = _Graphs(names, saved_graphs(models, writer.path, config))
    writer.finish("graphs", [spec.file for spec in made.specs.values()], to_plain(made))
    return made


def _files(checkpoint: Checkpoint, plan: Sequence[WeightSpec], options: ExportOptions) -> list[WeightsFile]:
    return moved_files(checkpoint, plan) if options.weights == "move" else own_files(plan)


@dataclass(frozen=True, slots=True)
class _Weights:
    """What is known of one weights file."""

    sha256: str
    num_clamped: int
    num_nonfinite: int
    largest_abs: float


def _weights(
    checkpoint: Checkpoint,
    files: Sequence[WeightsFile],
    options: ExportOptions,
    writer: BundleWriter,
    progress: Progress,
) -> dict[str, _Weights]:
    """Write, or only read, the files that are not finished yet. By name."""
    done, total = 0, sum(file.num_bytes for file in files)
    before = {file.name: writer.finished(file.name) for file in files}
    missing = sum(file.num_bytes for file in files if not file.source and before[file.name] is None)
    check_room(writer.path, missing)
    weights: dict[str, _Weights] = {}
    for file in files:
        known = before[file.name]
        if known is None:

            def report(written: int, _: int, start: int = done) -> None:
                progress("weights", start + written, total)

            path, names = file.source or writer.path / file.name, [] if file.source else [file.name]
            if file.source:
                found = checked_weights(checkpoint, file.specs, file.infos, path, progress=report)
            else:
                found = write_weights(checkpoint, file.specs, path, clamp=options.clamp, progress=report)
            weights[file.name] = _Weights(
                sha256=found.sha256,
                num_clamped=found.num_clamped,
                num_nonfinite=sum(each.num_nan + each.num_inf for each in found.tensors.values()),
                largest_abs=max(each.max_abs for each in found.tensors.values()),
            )
            writer.finish(file.name, names, to_plain(weights[file.name]))
        else:
            weights[file.name] = parse(_Weights, known, where=f"units/{file.name}.json", error=BundleError)
        done += file.num_bytes
    return weights


def _traced(config: ModelConfig, options: ExportOptions, progress: Progress) -> dict[GraphKey, ir.Model]:
    dtype = _TORCH_DTYPES[options.precision]
    progress("tracing", 0, 2)
    graphs: dict[GraphKey, ir.Model] = {}
    if not config.is_text_only:
        graphs["vision"] = vision_graph_from_config(config, dtype, options.vision_states)
    progress("tracing", 1, 2)
    graphs["decoder"] = decoder_graph_from_config(config, dtype, options.mask_semantics)
    progress("tracing", 2, 2)
    return graphs


def _weight_plan(names: Sequence[str], config: ModelConfig, options: ExportOptions) -> list[WeightSpec]:
    """Every tensor the graphs use, once, in the checkpoint's layout: a graph transposes where it needs to."""
    shapes, dtype = expected_tensors(config), _STORED_DTYPES[options.precision]
    return [WeightSpec(name, shapes[name], dtype) for name in names]


def tool_versions(names: Sequence[str]) -> dict[str, str]:
    """Of this project and of the packages that a bundle was made with, for its manifest."""
    return {"mllama-deploy": __version__, **{name: importlib.metadata.version(name) for name in names}}


def saved_graphs(graphs: Mapping[GraphKey, ir.Model], folder: Path, config: ModelConfig) -> dict[GraphKey, GraphSpec]:
    """Each standard graph, its weights attached, its ONNX Runtime twins over the same weights, and the samplers."""
    models: dict[GraphKey, tuple[str, ir.Model]] = {}
    for key, standard in graphs.items():
        models[key] = f"{key}.onnx", standard
        models[cast(GraphKey, f"{key}_ort")] = f"{key}.ort.onnx", ort_graph_from_graph(standard, config)
        cuda_twin = cuda_vision_from_graph if key == "vision" else cuda_decoder_from_graph
        models[cast(GraphKey, f"{key}_cuda")] = f"{key}.cuda.onnx", cuda_twin(standard, config)
    models["greedy"] = "greedy.onnx", greedy_graph_from_config(config)
    models["sampler"] = "sampler.onnx", sampler_graph_from_config(config)
    specs: dict[GraphKey, GraphSpec] = {}
    for key, (file, model) in models.items():
        ir.save(model, folder / file)
        specs[key] = GraphSpec(file, _tensor_specs(model.graph.inputs), _tensor_specs(model.graph.outputs))
    return specs


_DTYPES: dict[ir.DataType, DType] = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "bfloat16",
    ir.DataType.INT64: "int64",
    ir.DataType.BOOL: "bool",
}


def _tensor_specs(values: Sequence[ir.Value]) -> tuple[TensorSpec, ...]:
    specs = []
    for value in values:
        if value.name is None or value.dtype is None or value.shape is None:
            raise RuntimeError(f"an input or output without name, dtype or shape: {value}")
        shape = tuple(dim if isinstance(dim, int) else str(dim) for dim in value.shape)
        specs.append(TensorSpec(value.name, _DTYPES[value.dtype], shape))
    return tuple(specs)


def _manifest(
    checkpoint: Checkpoint,
    config: ModelConfig,
    options: ExportOptions,
    specs: Mapping[GraphKey, GraphSpec],
    plan: Sequence[WeightSpec],
    weights: Collection[_Weights],
) -> Manifest:
    return Manifest(
        name=printable(checkpoint.text_folder.resolve().name),  # a folder may be called anything
        model=config,
        mask_semantics=options.mask_semantics,
        vision_states=options.vision_states,
        precision=options.precision,
        graphs=specs,
        files={},
        tools=tool_versions(_TOOLS),
        source=Source(
            fingerprint=checkpoint.fingerprint,
            format=checkpoint.format,
            num_tensors=len(plan),
            num_parameters=sum(math.prod(spec.shape) for spec in plan),
            files={},
        ),
        options={
            "num_layers": options.num_layers,
            "clamp": options.clamp,
            "adapter": printable(options.adapter.resolve().name) if options.adapter else None,
        },
        weights=WeightStats(
            num_clamped=sum(file.num_clamped for file in weights),
            num_nonfinite=sum(file.num_nonfinite for file in weights),
            largest_abs=max(file.largest_abs for file in weights),
        ),
    )
