"""Bundle and checkpoint to report: the whole validation, one step after the other in `report_from_bundle`.

The reference runs first, and its weights are freed before the bundle's are loaded.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from mllama_runtime import __version__
from mllama_runtime.backends import backend_from_bundle
from mllama_runtime.backends.ort import OrtBackend
from mllama_runtime.bundle import Bundle
from mllama_runtime.engine import Request
from mllama_runtime.errors import BundleError, GateError, InputError, RequestError, ResourceError
from mllama_runtime.evaluation.result import Result
from mllama_runtime.manifest import Manifest
from mllama_runtime.sampling import SamplingParams

from mllama_exporter.checkpoints import checkpoint_from_folder
from mllama_exporter.checkpoints.checkpoint import Checkpoint
from mllama_exporter.checkpoints.torch_tensors import tensor_from_bytes
from mllama_exporter.reference_tower import installed_states
from mllama_exporter.validate.agreement import agreements, answers_from_sample
from mllama_exporter.validate.checks import Check, Observation, checks_from_observations
from mllama_exporter.validate.compare import (
    Candidate,
    Generated,
    generated_from_runs,
    observations_from_inputs,
    observations_from_run,
)
from mllama_exporter.validate.layers import LayerTable, layer_observations, table_from_errors
from mllama_exporter.validate.observed import Activation, ObservedBundle, activation_observations, largest_by_layer
from mllama_exporter.validate.reference import (
    ATTENTION,
    ReferenceInputs,
    ReferenceModel,
    ReferenceProcessor,
    ReferenceRun,
)
from mllama_exporter.validate.report import NotRun, ReferenceInfo, Report
from mllama_exporter.validate.samples import Sample, builtin_samples, text_samples
from mllama_exporter.validate.spots import reference_modules
from mllama_exporter.validate.task import MAX_ANSWER_TOKENS, Question, accuracy_check
from mllama_exporter.validate.thresholds import ACCURACY_DROP, PREFIXES, Bounds, GraphKind, base_of, bounds_of

_TOOLS = ("numpy", "onnxruntime", "torch", "transformers")
_BYTES_PER_PARAMETER = 4

T = TypeVar("T")
Progress = Callable[[str, int, int], object]
"""Called with the step's name, and how many samples of it are done out of how many."""


def report_from_bundle(
    bundle: Bundle,
    reference: Path,
    *,
    adapter: Path | None = None,
    backend: str = OrtBackend.name,
    task: Sequence[Question] = (),
    max_steps: int = 32,
    samples: Sequence[Sample] | None = None,
    accuracy: Sequence[Result] = (),
    progress: Progress = lambda step, done, total: None,
) -> Report:
    """Compare a bundle with the checkpoint it was made from.

    Args:
        reference: the checkpoint's folder.
        adapter: the LoRA adapter that was merged into it.
        backend: runs the bundle, in the place of ONNX Runtime's graphs on the CPU. What each layer adds is measured on
            the CPU whatever it is, and so are the standard graphs.
        task: questions for both to answer.
        max_steps: tokens to generate for each sample, at most.
        samples: by default the built-in ones.
        accuracy: results of `mllama eval` to be shown side by side.

    Raises:
        InputError: the checkpoint is not the one the bundle was made from.
        GateError: a file of the bundle is not what its manifest says.
        UsageError: there is no back end of that name.
        EnvironmentFault: a package is missing, or the back end's device.
        ResourceError: the reference does not fit into memory.
    """
    checkpoint, precision = _checked(bundle, reference, adapter), bundle.manifest.precision
    base = base_of(precision, bundle.manifest.quantization)
    bounds = _bounds(bundle, checkpoint)
    processor = ReferenceProcessor(checkpoint.text_folder)
    dims = bundle.manifest.model
    wanted_states = bundle.manifest.vision_states
    own_states = None if dims.is_text_only else installed_states()
    if samples is None:
        samples = text_samples() if dims.is_text_only else builtin_samples(dims.vision)
    inputs, not_run = _inputs(processor, samples)
    # Both sides render their chat templates now, at one moment: a template may write today's date.
    candidate = Candidate(bundle, backend_from_bundle(bundle, backend, None))
    kind: GraphKind = "ort" if candidate.backend.name == OrtBackend.name else "device"
    seen = [found for each in inputs for found in observations_from_inputs(candidate, each)]

    model = _reference_model(bundle, checkpoint)
    watched = reference_modules(dims)
    runs = [model.run(each, max_steps, watched) for each in _ticking(inputs, "reference", progress)]
    asked = [_asked(processor, model, each) for each in _ticking(task, "task, reference", progress)]
    del model

    with candidate.engine as engine:
        found, generated = _observations(candidate, runs, max_steps, f"{kind} graphs", progress)
        answers = [engine.generate_batch([each.request])[0].text for each in _ticking(asked, "task", progress)]
    agreement = agreements(kind, found, generated)
    shown = [
        answers_from_sample(run.inputs.sample, processor.text(run.continuation), each.text)
        for run, each in zip(runs, generated, strict=True)
        if run.inputs.sample.depth != "answers"
    ]
    activations: list[Activation] = []
    layers: list[LayerTable] = []
    deep = [run for run in runs if run.states]
    if dims.is_text_only:
        not_run.append(NotRun("layers", "the model is text-only: layers are measured on prompts with pictures"))
    else:
        observed = ObservedBundle(bundle, candidate, "ort")
        activations += [a for each in _ticking(inputs, "activations", progress) for a in observed.activations(each)]
        seen += activation_observations(activations)
        layers.append(_layers(observed, deep, "ort", bounds["ort"], progress))
        del observed
        seen += layer_observations(layers[0])
    if kind == "ort":
        checks = checks_from_observations(seen + found, bounds[kind])
        not_run.append(NotRun("device", "the back end is the CPU's; --backend chooses another"))
    else:
        checks = checks_from_observations(seen, bounds["ort"])
        checks += checks_from_observations(found, bounds[kind], prefix=PREFIXES[kind])
        not_run.append(NotRun("ort graphs", f"{candidate.backend.name} ran in their place; layers are the CPU's"))

    if "standard" in bounds:
        with (standard := Candidate(bundle, OrtBackend(bundle, standard=True))).engine:
            seen, generated = _observations(standard, runs, max_steps, "standard graphs", progress)
        agreement += agreements("standard", seen, generated)
        if deep:
            observed = ObservedBundle(bundle, standard, "standard")
            layers.append(_layers(observed, deep, "standard", bounds["standard"], progress))
            seen += layer_observations(layers[1])
        checks += checks_from_observations(seen, bounds["standard"], prefix=PREFIXES["standard"])
    else:
        not_run.append(NotRun("standard graphs", f"ONNX Runtime's CPU provider has no {base} kernels"))
    if task:
        expected = [each.answer for each in asked]
        checks.append(accuracy_check(task, answers, expected, ACCURACY_DROP[precision]))
    else:
        not_run.append(NotRun("task_accuracy", "no task was given"))
    checks += accuracy_drops(bundle.manifest, accuracy)
    versions = {name: importlib.metadata.version(name) for name in _TOOLS}
    return Report(
        manifest=bundle.manifest,
        backend=candidate.backend.name,
        reference=ReferenceInfo(
            name=checkpoint.text_folder.resolve().name,
            fingerprint=checkpoint.fingerprint,
            library=f"transformers {versions['transformers']}",
            dtype="float32",
            attention=ATTENTION,
            vision_states=own_states,
            corrected_to=None if own_states in (None, wanted_states) else wanted_states,
        ),
        tools={"mllama-deploy": __version__, "python": platform.python_version(), **versions},
        num_samples=len(inputs),
        max_steps=max_steps,
        checks=tuple(checks),
        not_run=tuple(not_run),
        layers=tuple(layers),
        activations=largest_by_layer(activations),
        activation_limit=bounds["ort"]["largest_activation"].limit,
        agreement=tuple(agreement),
        answers=tuple(shown),
        accuracy=tuple(accuracy),
    )


def accuracy_drops(manifest: Manifest, results: Sequence[Result]) -> list[Check]:
    """How far the bundle's own results are below FP32's on the same questions; the worst, if there are such pairs.

    Both of the bundle's semantics: what a checkpoint scores with others says nothing of the precision.
    """
    semantics = (manifest.mask_semantics, manifest.vision_states)
    results = [each for each in results if (each.mask_semantics, each.vision_states) == semantics]
    own = [each for each in results if (each.bundle, each.precision) == (manifest.name, manifest.precision)]
    pairs = [
        (base, each)
        for each in own
        for base in results
        if base.precision == "fp32" and (base.task, base.metric) == (each.task, each.metric) and base is not each
    ]
    if not pairs:
        return []
    base, worst = max(pairs, key=lambda pair: pair[0].score - pair[1].score)
    detail = f"{worst.task.name}, {worst.metric}: {worst.score:.4f} against {base.score:.4f} in fp32"
    return [Check("accuracy_drop", base.score - worst.score, ACCURACY_DROP[manifest.precision], False, detail)]


def _inputs(processor: ReferenceProcessor, samples: Sequence[Sample]) -> tuple[list[ReferenceInputs], list[NotRun]]:
    """Every sample as the reference sees it, but those its chat template refuses."""
    inputs, refused = [], []
    for sample in samples:
        try:
            inputs.append(processor.inputs(sample))
        except RequestError as error:
            refused.append(NotRun(f"sample {sample.name}", f"{error.what}: {error.found}"))
    return inputs, refused


@dataclass(frozen=True, slots=True)
class _Asked:
    """A question as the bundle is to be asked it, and the reference's answer."""

    request: Request
    answer: str


def _asked(processor: ReferenceProcessor, model: ReferenceModel, question: Question) -> _Asked:
    inputs = processor.inputs(question.sample)
    sampling = SamplingParams(max_new_tokens=MAX_ANSWER_TOKENS)
    request = Request(inputs.text, images=question.sample.images, sampling=sampling, raw=True)
    return _Asked(request, processor.text(model.answer(inputs, MAX_ANSWER_TOKENS)))


def _observations(
    candidate: Candidate, runs: Sequence[ReferenceRun], max_steps: int, step: str, progress: Progress
) -> tuple[list[Observation], list[Generated]]:
    seen = [found for run in _ticking(runs, step, progress) for found in observations_from_run(candidate, run)]
    generated = generated_from_runs(candidate, runs, max_steps)
    return seen + [each.observation for each in generated], generated


def _layers(
    observed: ObservedBundle, runs: Sequence[ReferenceRun], kind: GraphKind, bounds: Bounds, progress: Progress
) -> LayerTable:
    samples = [observed.layer_errors(run) for run in _ticking(runs, f"{kind} graphs, layers", progress)]
    return table_from_errors(kind, samples, bounds)


def _reference_model(bundle: Bundle, checkpoint: Checkpoint) -> ReferenceModel:
    num_layers = bundle.manifest.options.get("num_layers")
    if num_layers is not None and not isinstance(num_layers, int):
        raise BundleError("not a number of layers", where="manifest.json: options.num_layers", found=repr(num_layers))
    needed = _BYTES_PER_PARAMETER * bundle.manifest.source.num_parameters
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory:
        raise ResourceError(
            "the reference, in float32, does not fit into memory",
            where=checkpoint.folder,
            expected=f"at least {needed / 1e9:.0f} GB",
            found=f"{memory / 1e9:.0f} GB",
            hint="validate on a larger machine",
        )
    weights = None
    if not checkpoint.shards:  # in no form that transformers reads
        weights = {name: _tensor(checkpoint, name) for name in checkpoint.tensors}
    return ReferenceModel(
        checkpoint.text_folder,
        mask_semantics=bundle.manifest.mask_semantics,
        vision_states=None if bundle.manifest.model.is_text_only else bundle.manifest.vision_states,
        num_layers=num_layers,
        weights=weights,
    )


def _tensor(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    array, info = checkpoint.read(name), checkpoint.info(name)
    return tensor_from_bytes(array.reshape(-1).view(np.uint8), info.dtype).reshape(info.shape)


def _checked(bundle: Bundle, reference: Path, adapter: Path | None) -> Checkpoint:
    """The checkpoint, if the bundle is whole and was made from it."""
    found = bundle.verify(full=True).problems
    problems = [problem for problem in found if problem.path in bundle.manifest.files]  # an old report does no harm
    if problems:
        raise GateError(f"the bundle is damaged: {'; '.join(map(str, problems))}", where=bundle.root)
    checkpoint, expected = checkpoint_from_folder(reference, adapter), bundle.manifest.source.fingerprint
    if checkpoint.fingerprint != expected:
        merged = bundle.manifest.options.get("adapter")
        raise InputError(
            f"not the checkpoint that {bundle.root} was made from",
            where=reference,
            expected=f"fingerprint {expected}",
            found=checkpoint.fingerprint,
            hint=f"give the adapter {merged} too" if merged and adapter is None else None,
        )
    return checkpoint


def _bounds(bundle: Bundle, checkpoint: Checkpoint) -> dict[GraphKind, Bounds]:
    """Of the kinds of graphs that run at the bundle's precision."""
    manifest = bundle.manifest
    return bounds_of(manifest.precision, manifest.quantization, checkpoint.dtypes, manifest.weights.num_clamped)


def _ticking(items: Sequence[T], step: str, progress: Progress) -> Iterator[T]:
    """The items, with progress reported before each and at the end."""
    for done, item in enumerate(items):
        progress(step, done, len(items))
        yield item
    if items:
        progress(step, len(items), len(items))
