"""Bundles without weights: the graphs, texts and weights' headers of models that are too large to carry to a GPU.

Time does not depend on what the weights are: `gpu.fill` writes random ones behind the headers. Nothing of the size of
the weights is made here; their files are sparse.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import onnx_ir as ir
import torch
from bench.random_checkpoint import INSTRUCT_11B, with_layers, write_random_checkpoint
from gpu.fill import constant_of, element
from mllama_exporter import graphs as tracing
from mllama_exporter.checkpoints.checkpoint import expected_tensors
from mllama_exporter.export import saved_graphs, tool_versions
from mllama_exporter.graphs import decoder_graph_from_config, vision_graph_from_config, weight_names, weights_attached
from mllama_exporter.placement import own_files
from mllama_exporter.quantize.graphs import quantized_graph
from mllama_exporter.quantize.layers import groups_of
from mllama_exporter.quantize.scheme import SCHEMES
from mllama_exporter.quantize.weights import MatrixPlan, WeightsPlan, planned_tensors
from mllama_exporter.text_files import write_text_files
from mllama_exporter.weights import WeightSpec
from mllama_runtime.bundle import Bundle
from mllama_runtime.bundle_writer import BundleWriter
from mllama_runtime.config import ModelConfig
from mllama_runtime.errors import BundleError
from mllama_runtime.manifest import (
    BasePrecision,
    GraphKey,
    Manifest,
    Precision,
    Quantization,
    QuantizedPrecision,
    Source,
    WeightStats,
)
from mllama_runtime.tensorfile import TensorInfo, encode_header, read_header

_STORED = {"fp16": "F16", "bf16": "BF16"}
_TORCH = {"fp16": torch.float16, "bf16": torch.bfloat16}
_LARGEST_ACTIVATION = 6.0  # of normalised rows, for schemes that quantise them
_NO_HASH = "0" * 64  # sessions compare the sizes of large files alone


@dataclass(frozen=True, slots=True)
class Wanted:
    """One skeleton."""

    name: str
    config: ModelConfig
    precision: Precision
    base: BasePrecision


_EIGHT = with_layers(INSTRUCT_11B, 8)  # with a cross-attention layer, at full width
SKELETONS = (
    Wanted("8of40-fp16", _EIGHT, "fp16", "fp16"),
    Wanted("8of40-bf16", _EIGHT, "bf16", "bf16"),
    Wanted("11b-fp16", INSTRUCT_11B, "fp16", "fp16"),
    Wanted("11b-int4", INSTRUCT_11B, "int4", "fp16"),
    Wanted("11b-int8-weight", INSTRUCT_11B, "int8-weight", "fp16"),
    Wanted("11b-fp8", INSTRUCT_11B, "fp8", "fp16"),
)


def skeleton(wanted: Wanted, output: Path, cache: Path) -> Bundle:
    """Make one; the bundle's weights files are sparse, but for norms and gates.

    cache: keeps traced graphs, which depend on nothing but the modules.
    """
    checkpoint = cache / f"checkpoint-{_digest(wanted.config)}"
    if not checkpoint.exists():
        write_random_checkpoint(checkpoint, wanted.config, sparse=True)
    graphs = _traced(wanted, cache)
    names = dict.fromkeys(name for model in graphs.values() for name in weight_names(model))
    shapes, dtype = expected_tensors(wanted.config), _STORED[wanted.base]
    files = own_files([WeightSpec(name, shapes[name], dtype) for name in names])
    located = {name: place for file in files for name, place in file.located.items()}
    for model in graphs.values():
        weights_attached(model, located)
    shutil.rmtree(output, ignore_errors=True)
    with BundleWriter(output) as writer:
        write_text_files(checkpoint, writer, wanted.config)
        layouts: dict[str, list[tuple[str, str, tuple[int, ...]]]] = {
            file.name: [(spec.name, spec.dtype, spec.shape) for spec in file.specs] for file in files
        }
        if wanted.precision != wanted.base:
            infos = {name: info for file in files for name, info in file.infos.items()}
            name = "weights.safetensors"
            layouts = {name: _quantized(wanted, graphs, infos, writer.path / name)}
        for name, layout in layouts.items():
            _write_sparse(writer.path / name, layout)
            writer.add_file(name, sha256=_NO_HASH)
        specs = saved_graphs(graphs, writer.path, wanted.config)
        for spec in specs.values():
            writer.add_file(spec.file)
        quantization = None if wanted.precision == wanted.base else Quantization(wanted.base, None, (), None)
        return writer.commit(
            Manifest(
                name=wanted.name,
                model=wanted.config,
                mask_semantics="hf",
                vision_states="published",
                precision=wanted.precision,
                graphs=specs,
                files={},
                tools=tool_versions(("onnx", "onnx-ir", "torch")),
                source=Source(_NO_HASH, "hf", len(names), sum(math.prod(shapes[name]) for name in names), {}),
                options={"num_layers": wanted.config.text.num_layers},
                weights=WeightStats(0, 0, 1.0),
                quantization=quantization,
            )
        )


def _quantized(
    wanted: Wanted, graphs: Mapping[GraphKey, ir.Model], infos: Mapping[str, TensorInfo], path: Path
) -> list[tuple[str, str, tuple[int, ...]]]:
    """The decoder's matrices in the scheme, as `mllama quantize` has them; what the new file holds."""
    scheme = SCHEMES[cast(QuantizedPrecision, wanted.precision)]
    groups = groups_of(graphs["decoder"].graph)
    by_weight = {name: group for group in groups for name in group.members}
    layout = planned_tensors(infos, WeightsPlan({name: MatrixPlan(scheme) for name in by_weight}))
    _write_sparse(path, layout)
    stored = read_header(path, error=BundleError)
    scales = dict.fromkeys(groups, _LARGEST_ACTIVATION / scheme.largest)
    for model in graphs.values():
        quantized_graph(model, by_weight, dict.fromkeys(by_weight, scheme), scales, stored, path.name)
    return layout


def _traced(wanted: Wanted, cache: Path) -> dict[GraphKey, ir.Model]:
    """The standard graphs without weights; traced once for every state of the modules."""
    dtype, config = _TORCH[wanted.base], wanted.config
    makers = {
        "vision": lambda: vision_graph_from_config(config, dtype, "published"),
        "decoder": lambda: decoder_graph_from_config(config, dtype, "hf"),
    }
    models: dict[GraphKey, ir.Model] = {}
    for key, make in makers.items():
        path = cache / f"{key}-{_digest(config, wanted.base)}.onnx"
        if not path.exists():
            model = make()
            names = weight_names(model)
            layout = [(name, _STORED[wanted.base], expected_tensors(config)[name]) for name in names]
            _, infos = encode_header(layout)
            weights_attached(model, {info.name: (path.name, info) for info in infos})
            ir.save(model, path)
        model = ir.load(path)
        for value in model.graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = None
        models[cast(GraphKey, key)] = model
    return models


def _digest(*parts: object) -> str:
    """Of what a traced graph depends on."""
    digest = hashlib.sha256(repr(parts).encode())
    home = Path(tracing.__file__).parent
    for path in (home / "graphs.py", *sorted((home / "modules").glob("*.py"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _write_sparse(path: Path, layout: list[tuple[str, str, tuple[int, ...]]]) -> None:
    header, infos = encode_header(layout)
    with path.open("wb") as file:
        file.write(header)
        for info in infos:
            value = constant_of(info.name, info.shape)
            if value is not None:
                file.seek(info.offset_bytes)
                file.write(element(info.dtype, value) * math.prod(info.shape))
        file.truncate(len(header) + sum(info.size_bytes for info in infos))


def config_of(wanted: Wanted, cache: Path) -> bytes:
    """The checkpoint's own config.json, for the judge."""
    return (cache / f"checkpoint-{_digest(wanted.config)}" / "config.json").read_bytes()
