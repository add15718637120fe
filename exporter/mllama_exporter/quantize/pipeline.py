"""Bundle to quantised bundle: the whole, one step a line in `quantized_bundle_from_bundle`."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast, get_args

import numpy as np
import onnx_ir as ir
from mllama_runtime.backends.ort import OrtBackend
from mllama_runtime.bundle import Bundle
from mllama_runtime.bundle_writer import BundleWriter
from mllama_runtime.engine import Engine
from mllama_runtime.engine_record import weights_hashes
from mllama_runtime.errors import BundleError, InputError, UsageError
from mllama_runtime.evaluation.questions import Question
from mllama_runtime.manifest import (
    BasePrecision,
    Calibration,
    GraphKey,
    Quantization,
    QuantizedPrecision,
)
from mllama_runtime.tensorfile import TensorFile, read_header

from mllama_exporter.export import saved_graphs, tool_versions
from mllama_exporter.quantize.calibration import ChannelStatistics, measured
from mllama_exporter.quantize.graphs import quantized_graph
from mllama_exporter.quantize.layers import Group, groups_of, kept
from mllama_exporter.quantize.rounding import SCALE_DTYPES
from mllama_exporter.quantize.scheme import SCHEMES, FloatArray, Scheme
from mllama_exporter.quantize.smoothing import smoothing_scales
from mllama_exporter.quantize.weights import (
    MatrixPlan,
    WeightsPlan,
    WeightsReader,
    check_room,
    scale_name,
    write_quantized_weights,
)

_WEIGHTS_NAME = "weights.safetensors"
_TOOLS = ("ml-dtypes", "numpy", "onnx", "onnx-ir", "onnxruntime", "torch")
_SAMPLE_ROWS = 256  # of each matrix, for the search of smoothing scales

Progress = Callable[[str, int, int], object]
"""Called with a step's name, and how much of it is done: samples of "calibrating", groups of "scaling", bytes of
"weights"; "saving" is only announced."""


@dataclass(frozen=True, slots=True)
class QuantizeOptions:
    """What the user chose.

    vision: a scheme for the vision graph, which is kept otherwise. keep: patterns of weights to keep, such as
    `lm_head` or `layers.0.*`.
    """

    scheme: QuantizedPrecision
    vision: QuantizedPrecision | None = None
    keep: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Subject:
    """What is quantised: groups by graph, and each weight's scheme."""

    groups: Mapping[str, Sequence[Group]]
    schemes: Mapping[str, Scheme]
    kept: tuple[str, ...]

    def chosen(self, group: Group) -> list[str]:
        return [name for name in group.members if name in self.schemes]

    @property
    def measured_groups(self) -> dict[str, list[Group]]:
        """Groups of which something is quantised."""
        return {key: [each for each in of if self.chosen(each)] for key, of in self.groups.items()}


def quantized_bundle_from_bundle(
    bundle: Bundle,
    output: Path,
    options: QuantizeOptions,
    samples: Sequence[Question] | None,
    progress: Progress = lambda step, done, total: None,
) -> Bundle:
    """Quantise a bundle in FP32, FP16 or BF16; what is not quantised keeps that precision.

    Args:
        samples: what to calibrate on; None to do without, which only weight-only schemes can.

    Raises:
        InputError: the bundle is quantised already, a sample cannot be used, or calibration found no usable scale.
        BundleError: the bundle is damaged.
        UsageError: options that contradict each other, or a pattern that names nothing.
        ResourceError: the disk is too small, or the memory.
    """
    base = _base_precision(bundle)
    keys: tuple[GraphKey, ...] = ("vision", "decoder")
    if bundle.manifest.model.is_text_only:
        if options.vision:
            raise UsageError("the model is text-only, and has no vision graph", where="--vision", found=options.vision)
        keys = ("decoder",)
    graphs: dict[GraphKey, ir.Model] = {key: ir.load(bundle.path(bundle.manifest.graphs[key].file)) for key in keys}
    subject, sources = _subject(graphs, options), weights_hashes(bundle.manifest)
    _check_need_of_samples(subject, samples)
    with (
        BundleWriter(output, not_inside=bundle.root) as writer,
        WeightsReader([read_header(bundle.path(name), error=BundleError) for name in sources]) as reader,
    ):
        path = writer.path / _WEIGHTS_NAME
        unscaled = WeightsPlan({name: MatrixPlan(scheme) for name, scheme in subject.schemes.items()})
        check_room(reader.tensors, unscaled, path)  # before hours of calibration
        statistics, calibration = _statistics(bundle, samples, subject, progress)
        smoothing = _smoothing(reader, subject, statistics, progress)
        sha256 = write_quantized_weights(
            reader,
            {bundle.path(name): sha256 for name, sha256 in sources.items()},
            _plan(subject, statistics, smoothing),
            path,
            lambda done, total: progress("weights", done, total),
        )
        writer.add_file(_WEIGHTS_NAME, sha256=sha256)
        progress("saving", 0, 1)
        stored = read_header(path, error=BundleError)
        scales = _activation_scales(subject, statistics, smoothing, stored)
        by_weight = {name: group for of in subject.groups.values() for group in of for name in group.members}
        for model in graphs.values():
            quantized_graph(model, by_weight, subject.schemes, scales, stored, _WEIGHTS_NAME)
        specs = saved_graphs(graphs, writer.path, bundle.manifest.model)
        for spec in specs.values():
            writer.add_file(spec.file)
        _copy_others(bundle, writer)
        quantization = Quantization(base, options.vision, subject.kept, calibration)
        return writer.commit(
            replace(
                bundle.manifest,
                precision=options.scheme,
                graphs=specs,
                files={},
                tools=tool_versions(_TOOLS),
                quantization=quantization,
                engines=(),
                validation=None,
            )
        )


def _base_precision(bundle: Bundle) -> BasePrecision:
    precision = bundle.manifest.precision
    if precision not in get_args(BasePrecision):
        hint = "quantise the bundle it was made from"
        raise InputError(
            "is quantised already", where=bundle.root, expected="fp32, fp16 or bf16", found=precision, hint=hint
        )
    return cast(BasePrecision, precision)


def _subject(graphs: Mapping[GraphKey, ir.Model], options: QuantizeOptions) -> _Subject:
    wanted = {"decoder": SCHEMES[options.scheme]} | ({"vision": SCHEMES[options.vision]} if options.vision else {})
    groups = {key: groups_of(graphs[cast(GraphKey, key)].graph) for key in wanted}
    schemes: dict[str, Scheme] = {}
    unfit: set[str] = set()
    for key, scheme in wanted.items():
        for group in groups[key]:
            if scheme.block_size and group.width % scheme.block_size:
                unfit.update(group.members)
            schemes |= dict.fromkeys(group.members, scheme)
    left = unfit | kept(list(schemes), options.keep)
    schemes = {name: scheme for name, scheme in schemes.items() if name not in left}
    if not schemes:
        if not options.keep:
            blocks = SCHEMES[options.scheme].block_size
            expected = f"widths that are multiples of {blocks}"
            raise InputError(f"{options.scheme} fits none of the model's matrices", where="scheme", expected=expected)
        raise UsageError("nothing is left to quantise", where="keep", found=", ".join(options.keep))
    return _Subject(groups, schemes, tuple(sorted(left)))


def _check_need_of_samples(subject: _Subject, samples: Sequence[Question] | None) -> None:
    needy = next((scheme for scheme in subject.schemes.values() if scheme.activations), None)
    if samples is None and needy:
        raise UsageError(
            f"{needy.name} quantises activations and needs data to measure them on",
            where="calibration",
            hint="give --calibration a folder of pictures, or a file of questions about pictures",
        )
    if samples is not None and not samples:
        raise InputError("there are no calibration samples", where="calibration", hint="give pictures with questions")


def _statistics(
    bundle: Bundle, samples: Sequence[Question] | None, subject: _Subject, progress: Progress
) -> tuple[Mapping[Group, ChannelStatistics], Calibration | None]:
    if samples is None:
        return {}, None
    with Engine(bundle, OrtBackend(bundle)) as engine:
        found = measured(
            bundle,
            engine,
            samples,
            subject.measured_groups,
            lambda done, total: progress("calibrating", done, total),
        )
    return found.statistics, found.calibration


def _smoothing(
    reader: WeightsReader, subject: _Subject, statistics: Mapping[Group, ChannelStatistics], progress: Progress
) -> dict[Group, FloatArray]:
    """What a group's input is divided by; for groups that are quantised whole, behind something to fold into."""
    groups = [
        group
        for of in subject.groups.values()
        for group in of
        if group in statistics
        and len(subject.chosen(group)) == len(group.members)
        and (group.norm or group.rows in subject.schemes)
    ]
    found = {}
    for done, group in enumerate(groups):
        progress("scaling", done, len(groups))
        scheme = subject.schemes[group.members[0]]
        weights = (reader.rows(name, most=_SAMPLE_ROWS) for name in group.members)
        scales = smoothing_scales(scheme, statistics[group], weights, reader.tensors[group.members[0]].dtype)
        if scales is not None:
            found[group] = scales
    if groups:
        progress("scaling", len(groups), len(groups))
    return found


def _plan(
    subject: _Subject, statistics: Mapping[Group, ChannelStatistics], smoothing: Mapping[Group, FloatArray]
) -> WeightsPlan:
    divisors: dict[str, FloatArray] = {}
    rows: dict[str, FloatArray] = {}
    matrices: dict[str, MatrixPlan] = {}
    for group in (each for of in subject.groups.values() for each in of):
        scales = smoothing.get(group)
        if scales is not None:
            divisors |= dict.fromkeys(group.norm, scales)
            if group.rows:
                rows[group.rows] = scales
        seen = statistics.get(group)
        importance = None if seen is None else seen.mean_square / (1 if scales is None else scales**2)
        for name in subject.chosen(group):
            matrices[name] = MatrixPlan(subject.schemes[name], columns=scales, importance=importance)
    for name, scales in rows.items():
        matrices[name] = replace(matrices[name], rows=scales)
    return WeightsPlan(matrices, divisors)


def _activation_scales(
    subject: _Subject,
    statistics: Mapping[Group, ChannelStatistics],
    smoothing: Mapping[Group, FloatArray],
    stored: TensorFile,
) -> dict[Group, float]:
    """The largest magnitude on the end of the grid. Raises InputError where the base precision cannot hold a scale."""
    scales = {}
    for group in (each for of in subject.measured_groups.values() for each in of):
        names = subject.chosen(group)
        scheme = subject.schemes[names[0]]
        if not scheme.activations:
            continue
        largest = float((statistics[group].max_abs / smoothing.get(group, 1)).max())
        dtype = SCALE_DTYPES[stored.tensors[scale_name(names[0])].dtype]
        with np.errstate(over="ignore"):
            scale = float(np.array(largest / scheme.largest).astype(dtype))
        if not (np.isfinite(scale) and scale > 0):
            found = f"{largest:g} / {scheme.largest:g} = {scale:g} in {dtype}"
            raise InputError("no usable scale for its input", where=", ".join(names), found=found)
        scales[group] = scale
    return scales


def _copy_others(bundle: Bundle, writer: BundleWriter) -> None:
    """Tokenizer, template, configurations and licence; not what is about the old weights."""
    own = {*weights_hashes(bundle.manifest), *(graph.file for graph in bundle.manifest.graphs.values())}
    for name, entry in bundle.manifest.files.items():
        if name in own or name.startswith(("reports/", "engines/")):
            continue
        target = writer.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle.path(name), target)
        if writer.add_file(name) != entry:
            raise BundleError("changed while it was copied", where=bundle.path(name))
