"""Where a bundle's tokens leave the reference's, sample by sample, and what both answer, with the pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

from mllama_runtime.images import ImageSource, load_image

from mllama_exporter.validate.checks import Observation
from mllama_exporter.validate.compare import Generated
from mllama_exporter.validate.samples import Sample
from mllama_exporter.validate.thresholds import GraphKind

_PICTURE_SIDE = 224  # pixels, at most
_PICTURE_QUALITY = 75


@dataclass(frozen=True, slots=True)
class Agreement:
    """One sample on one kind of graphs, in greedy steps; None where nothing disagrees."""

    kind: GraphKind
    sample: str
    num_steps: int
    num_agreed: int  # of the steps that were fed with the reference's tokens
    first_disagreement: int | None
    diverges_at: int | None  # the step at which the free-running answer leaves the reference's


@dataclass(frozen=True, slots=True)
class Answers:
    """What was asked and answered; pictures are data URIs, small enough for a page."""

    sample: str
    prompt: str
    pictures: tuple[str, ...]
    reference: str
    bundle: str


def agreements(kind: GraphKind, seen: Sequence[Observation], generated: Sequence[Generated]) -> list[Agreement]:
    """One for every sample that was generated from."""
    steps: dict[str, list[bool]] = {each.sample: [] for each in generated}
    for observation in seen:
        if observation.name == "teacher_forced_top1":
            steps[observation.sample].append(bool(observation.value))
    return [
        Agreement(
            kind=kind,
            sample=each.sample,
            num_steps=len(agreed := steps[each.sample]),
            num_agreed=sum(agreed),
            first_disagreement=agreed.index(False) if False in agreed else None,
            diverges_at=each.diverges_at,
        )
        for each in generated
    ]


def answers_from_sample(sample: Sample, reference: str, bundle: str) -> Answers:
    pictures = tuple(map(_data_uri, sample.images))
    return Answers(sample.name, sample.raw_text, pictures, reference, bundle)


def _data_uri(image: ImageSource) -> str:
    picture = load_image(image).convert("RGB")
    picture.thumbnail((_PICTURE_SIDE, _PICTURE_SIDE))
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=_PICTURE_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode('ascii')}"
