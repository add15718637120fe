"""What a bundle's activations look like, channel by channel: pictures with questions -> statistics of every input.

The bundle answers each question itself, then its own graphs run over prompt and answer with more outputs. No torch
model is loaded; weights stay in the bundle's file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from mllama_runtime.bundle import Bundle
from mllama_runtime.engine import Engine
from mllama_runtime.errors import InputError, RequestError
from mllama_runtime.evaluation.asking import AskOptions, error_of_question, request_from_question
from mllama_runtime.evaluation.questions import Question, task_from_jsonl
from mllama_runtime.manifest import Calibration
from mllama_runtime.preprocessing import ImageTiles
from mllama_runtime.prompt import image_visibility
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from mllama_exporter.feeds import decoder_inputs, vision_inputs
from mllama_exporter.observer import (
    FIRST_ROW,
    observed_channels,
    session_from_model,
    use_every_answer_row,
)
from mllama_exporter.quantize.layers import Group
from mllama_exporter.quantize.scheme import FloatArray

Progress = Callable[[int, int], object]
_TEXTS = ("Name the four seasons.", "What is the capital of France?", "Write a short poem about the sea.", "Hello!")
_TEXT_EVERY = 6  # pictures; without a text-only prompt, int8 errors on such prompts were twice those with some
_QUESTIONS = ("Describe the picture.", "What do you see?", "How many things are there, and where?")
_ASKED = AskOptions(max_new_tokens=32)
_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")


@dataclass(slots=True, eq=False)
class ChannelStatistics:
    """Of one activation: the largest magnitude and the mean square of each channel, [C], over `num_rows` rows."""

    max_abs: FloatArray
    sum_squares: NDArray[np.float64]
    num_rows: int = 0

    @property
    def mean_square(self) -> FloatArray:
        return (self.sum_squares / max(1, self.num_rows)).astype(np.float32)

    def add(self, max_abs: FloatArray, sum_squares: FloatArray, num_rows: int) -> None:
        self.max_abs = np.maximum(self.max_abs, max_abs)
        self.sum_squares += sum_squares
        self.num_rows += num_rows


@dataclass(frozen=True, slots=True)
class Measured:
    """Statistics of every group's input, and what they were measured on."""

    statistics: Mapping[Group, ChannelStatistics]
    calibration: Calibration


def calibration_samples(path: Path) -> tuple[Question, ...]:
    """Questions from a JSONL file, as `mllama eval` reads them but answers are optional; or about a folder's pictures.

    With a folder, questions about no picture are put among those about its pictures.

    Raises:
        InputError: there are none, or a line is wrong.
    """
    if not path.is_dir():
        return task_from_jsonl(path, with_answers=False).questions
    pictures = sorted(each for each in path.iterdir() if each.suffix.lower() in _SUFFIXES)
    if not pictures:
        raise InputError("holds no pictures", where=path, expected=f"files ending in {', '.join(_SUFFIXES)}")
    samples = []
    for index, each in enumerate(pictures):
        samples.append(Question(each.name, _QUESTIONS[index % len(_QUESTIONS)], answers=(), images=(each,)))
        if index % _TEXT_EVERY == _TEXT_EVERY - 1:
            text = _TEXTS[index // _TEXT_EVERY % len(_TEXTS)]
            samples.append(Question(f"text {index}", text, answers=()))
    return tuple(samples)


def check_pictures(samples: Sequence[Question]) -> None:
    """Refuse samples without a single picture: the cross-attention layers would be measured on nothing."""
    if not any(sample.images for sample in samples):
        raise InputError(
            "there is no picture among the calibration samples",
            expected="pictures with questions",
            found=f"{len(samples)} questions about no picture",
            hint="cross-attention layers see nothing but pictures: add some like those the model will see",
        )


def measured(
    bundle: Bundle,
    engine: Engine,
    samples: Sequence[Question],
    groups: Mapping[str, Sequence[Group]],
    progress: Progress,
) -> Measured:
    """Statistics of every group's input.

    Args:
        engine: the bundle's, open.
        groups: of the graphs to be quantised, by "vision" and "decoder".

    Raises:
        InputError: an activation that was never seen, is always zero or not finite, naming the weights it multiplies.
        ImageError, RequestError: a sample that cannot be used.
    """
    if not bundle.manifest.model.is_text_only:
        check_pictures(samples)
    run = _Run(bundle, engine, groups)
    for done, sample in enumerate(samples):
        progress(done, len(samples))
        run.add(sample)
    progress(len(samples), len(samples))
    for group, statistics in run.statistics.items():
        check_statistics(statistics, group)
    return Measured(run.statistics, run.record(len(samples)))


def check_statistics(statistics: ChannelStatistics, group: Group) -> None:
    """Refuse what no scale can be made from. Raises InputError naming the group's weights."""
    largest = float(statistics.max_abs.max())
    if statistics.num_rows and np.isfinite(statistics.max_abs).all() and largest > 0:
        return
    raise InputError(
        "calibration gives no usable scale for its input",
        where=", ".join(group.members),
        expected="activations that are finite and not all zero",
        found="no data" if not statistics.num_rows else f"largest {largest:g}",
        hint="calibrate on pictures and questions like those the model will see",
    )


@dataclass(slots=True)
class _Run:
    """Sums over samples; the observed graphs, and the hash of what went through them."""

    bundle: Bundle
    engine: Engine
    groups: Mapping[str, Sequence[Group]]
    statistics: dict[Group, ChannelStatistics] = field(default_factory=dict)
    num_images: int = 0
    num_tokens: int = 0
    digest: Any = field(default_factory=hashlib.sha256)
    graphs: dict[str, _ObservedGraph] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for group in (each for of in self.groups.values() for each in of):
            zeros = np.zeros(group.width, np.float32)
            self.statistics[group] = ChannelStatistics(zeros, zeros.astype(np.float64))
        for key in ("decoder",) if self.bundle.manifest.model.is_text_only else ("vision", "decoder"):
            self.graphs[key] = _ObservedGraph(self.bundle, key, self.groups.get(key, ()))

    def add(self, sample: Question) -> None:
        request = request_from_question(self.bundle.manifest, sample, sample.images, _ASKED)
        try:
            prompt = self.engine.prompt(request)
            answer = self.engine.generate_batch([request])[0].token_ids
        except RequestError as error:
            raise error_of_question(error, sample) from error
        # The last token is never fed back, so that no logits come from it.
        token_ids, model = (*prompt.token_ids, *answer[:-1]), self.bundle.manifest.model
        tiles = [self.engine.tiles(each) for each in prompt.images]  # type: ignore[arg-type]
        cross = [self._run("vision", vision_inputs(each)) for each in tiles]
        visibility = image_visibility(token_ids, model.image_token_id, [each.num_tiles for each in tiles])
        inputs = decoder_inputs(model, token_ids, visibility, tiles, cross)
        inputs[FIRST_ROW] = np.array([len(prompt.token_ids) - 1])
        self._run("decoder", inputs, has_image=bool(tiles))
        self._count(token_ids, tiles)

    def record(self, num_samples: int) -> Calibration:
        return Calibration(num_samples, self.num_images, self.num_tokens, self.digest.hexdigest())

    def _run(self, key: str, inputs: Mapping[str, NDArray[Any]], *, has_image: bool = True) -> dict[str, NDArray[Any]]:
        outputs, found = self.graphs[key].run(inputs, has_image=has_image)
        for group, values in found.items():
            self.statistics[group].add(*values)
        return outputs

    def _count(self, token_ids: Sequence[int], tiles: Sequence[ImageTiles]) -> None:
        self.num_images += len(tiles)
        self.num_tokens += len(token_ids)
        self.digest.update(np.array(token_ids, "<i8").tobytes())
        for each in tiles:
            self.digest.update(each.pixel_values.tobytes())


class _ObservedGraph:
    """A graph for ONNX Runtime that also gives what is known of its activations' channels."""

    def __init__(self, bundle: Bundle, key: str, groups: Sequence[Group]) -> None:
        spec = bundle.manifest.graphs["vision_ort" if key == "vision" else "decoder_ort"]
        model = ir.load(bundle.path(spec.file))
        layers = bundle.manifest.model.cross_layers
        self._cross_layers = tuple(f"language_model.model.layers.{layer}." for layer in layers)
        self._names = [str(output.name) for output in model.graph.outputs] if key == "vision" else []
        if key == "decoder":
            use_every_answer_row(model.graph)
        observed, outputs = observed_channels(model, {group.activation: group.width for group in groups})
        self._outputs = {group: outputs[group.activation] for group in groups}
        RemoveUnusedNodesPass()(observed)  # the language head, of which only the input is looked at
        self._session = session_from_model(observed, bundle.root)

    def run(
        self, inputs: Mapping[str, NDArray[Any]], *, has_image: bool
    ) -> tuple[dict[str, NDArray[Any]], dict[Group, tuple[FloatArray, FloatArray, int]]]:
        """The graph's own outputs; and of each activation the largest magnitudes, sums of squares, and rows."""
        names = self._names + [name for outputs in self._outputs.values() for name in outputs]
        results = dict(zip(names, self._session.run(names, dict(inputs)), strict=True))
        found = {
            group: (results[outputs.max_abs], results[outputs.sum_squares], results[outputs.num_rows].item())
            for group, outputs in self._outputs.items()
            if has_image or not group.members[0].startswith(self._cross_layers)  # text alone does not go there
        }
        return {name: results[name] for name in self._names}, found
