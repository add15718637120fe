"""Our graphs against transformers as it was before 4.55, in an environment of its own, and as it is: both unpatched.

transformers 4.54.1 takes the vision tower's states before a block, as the published weights want; the installed one
takes them after it. A bundle of either kind gives the tensors and the greedy answers of the one it is made for.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exporter._faults import relist
from filelock import FileLock
from mllama_exporter.validate.samples import drawn
from mllama_runtime import Engine
from mllama_runtime.backends.ort import OrtBackend
from mllama_runtime.bundle import Bundle
from mllama_runtime.decode import prefill
from mllama_runtime.engine import Request
from mllama_runtime.prompt import image_visibility
from mllama_runtime.sampling import SamplingParams
from numpy.typing import NDArray
from oracles import environments
from PIL import Image
from reference import Reference

from .test_parity import PromptRow
from .test_vision_states import earlier_bundle

BAR = 2e-5  # of the largest value of a tensor
ORACLE = Path(environments.__file__).parent / "older_transformers"
MAX_NEW_TOKENS = 16  # as the oracle has it
CANVASES = ((1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1))
QUESTIONS = (
    "Describe the picture.",
    "How many shapes are there?",
    "What do you see?",
    "What color is the circle?",
    "Is there a square?",
    "What is at the top left?",
    "Which shape is the largest?",
    "What is in this picture?",
)
TEXTS = (
    "Name the four seasons.",
    "What comes after three?",
    "Who are you?",
    "Say hello.",
    "What is the color of grass?",
    "Count to five.",
    "How many days does a week have?",
    "What is a circle?",
    "Name a shape.",
    "What is two plus two?",
    "Tell me more.",
    "Good morning.",
)

Array = NDArray[Any]


@dataclass(frozen=True)
class Prompt:
    """`text` with <|image|> where a picture stands; of measured ones every tensor is compared."""

    text: str
    canvases: tuple[tuple[int, int], ...] = ()
    is_measured: bool = False


def user(*turns: str) -> str:
    """A conversation in Llama 3.2's prompt format, which asks for the next answer."""
    roles = ("user", "assistant")
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    spoken = [header.format(roles[index % 2]) + f"{turn}<|eot_id|>" for index, turn in enumerate(turns)]
    return f"<|begin_of_text|>{''.join(spoken)}{header.format('assistant')}"


def prompts() -> list[Prompt]:
    """One hundred: 64 of one picture, 12 of several, 12 with text before the picture, 12 of text alone."""
    pairs = [(canvas, CANVASES[(index + shift) % 8]) for shift in (3, 4) for index, canvas in enumerate(CANVASES)]
    found = [
        Prompt(user(f"<|image|>{question}"), (canvas,), is_measured=number == 0)
        for number, question in enumerate(QUESTIONS)
        for canvas in CANVASES
    ]
    for index, pair in enumerate(pairs[:6]):
        found.append(Prompt(user(f"<|image|><|image|>{QUESTIONS[index]}"), pair, is_measured=index == 0))
    for index, pair in enumerate(pairs[6:12]):
        turns = ("<|image|>What do you see?", "A shape.", f"<|image|>{QUESTIONS[index]}")
        found.append(Prompt(user(*turns), pair, is_measured=index == 0))
    for index, question in enumerate(TEXTS):
        found.append(Prompt(user(f"{question} <|image|>{QUESTIONS[index % 8]}"), (CANVASES[index % 8],), index < 2))
    found += [Prompt(user(question), is_measured=index < 2) for index, question in enumerate(TEXTS)]
    return found


@dataclass(frozen=True)
class Judged:
    """The prompts with their pictures, and what an unpatched transformers makes of them."""

    prompts: Sequence[Prompt]
    images: Sequence[Sequence[Path]]
    found: Mapping[str, Array]

    @property
    def version(self) -> str:
        return str(self.found["version"])

    def tensors(self, index: int) -> dict[str, Array]:
        prefix = f"{index}."
        return {key.removeprefix(prefix): array for key, array in self.found.items() if key.startswith(prefix)}


JudgedBy = Callable[[str], Judged]


@pytest.fixture(scope="session")
def older() -> Path:
    """The Python that has transformers 4.54.1."""
    return environments.environment("transformers-4.54.1", ORACLE / "requirements.txt")


@pytest.fixture(scope="session")
def judged_by(older: Path, shared: Path, miniature: Path) -> JudgedBy:
    """`judged_by(states)`: by the transformers, 4.54.1 or the installed one, whose own states these are."""

    def judged_by(states: str) -> Judged:
        folder = shared / "against-older-transformers"
        folder.mkdir(exist_ok=True)
        asked = prompts()
        images = [
            [folder / f"{index}-{number}.png" for number in range(len(each.canvases))]
            for index, each in enumerate(asked)
        ]
        output = folder / f"{states}.npz"
        with FileLock(folder / "lock"):
            if not (folder / "prompts.json").exists():
                write_prompts(folder, asked, images)
            if not output.exists():
                python = {"published": older, "transformers-4.56": Path(sys.executable)}[states]
                environments.run(python, ORACLE / "unpatched.py", miniature, folder / "prompts.json", output)
        return Judged(asked, images, np.load(output))

    return judged_by


def write_prompts(folder: Path, asked: Sequence[Prompt], images: Sequence[Sequence[Path]]) -> None:
    """Pictures for 56-pixel tiles, all different, and the prompts that name them."""
    for index, (prompt, paths) in enumerate(zip(asked, images, strict=True)):
        for number, (canvas, path) in enumerate(zip(prompt.canvases, paths, strict=True)):
            drawn(*canvas, 56, seed=1000 + 10 * index + number).save(path)
    lines = [
        {"text": each.text, "images": list(map(str, paths)), "is_measured": each.is_measured}
        for each, paths in zip(asked, images, strict=True)
    ]
    (folder / "prompts.json").write_text(json.dumps(lines))


def largest_errors(bundle: Path, judged: Judged, *, standard: bool = False) -> dict[str, float]:
    """Kind of tensor -> the largest error over the tensor's largest value, of all measured prompts."""
    errors: dict[str, float] = {}
    with Engine.load(bundle, num_threads=1) as engine, OrtBackend(Bundle.open(bundle), 1, standard=standard) as backend:
        model = engine.bundle.manifest.model
        for index in (number for number, each in enumerate(judged.prompts) if each.is_measured):
            images = judged.images[index]
            ids = engine.prompt(Request(judged.prompts[index].text, images=tuple(images), raw=True)).token_ids
            tiles = [engine.tiles(path) for path in images]
            features = [backend.encode(each) for each in tiles]
            visibility = image_visibility(ids, model.image_token_id, [each.num_tiles for each in tiles])
            slots = backend.slots(num_slots=1, cache_len=len(ids) + 4, num_tiles=visibility.shape[1])
            row = PromptRow(np.array(ids), visibility, features)
            found = {"logits": prefill(slots, 0, row, "hf")}  # type: ignore[arg-type]
            for name in features[0].arrays() if features else ():
                found[name] = np.concatenate([each.arrays()[name] for each in features], axis=2)
            expected = judged.tensors(index)
            assert found.keys() == expected.keys() - {"answer", "features"}
            for name, array in found.items():
                errors[name] = max(errors.get(name, 0.0), relative(array, expected[name].reshape(array.shape)))
    return errors


def relative(found: Array, expected: Array) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def differing_answers(bundle: Path, judged: Judged) -> list[int]:
    """The prompts whose greedy tokens are others."""
    sampling = SamplingParams(max_new_tokens=MAX_NEW_TOKENS)
    requests = [
        Request(prompt.text, images=tuple(images), sampling=sampling, raw=True)
        for prompt, images in zip(judged.prompts, judged.images, strict=True)
    ]
    with Engine.load(bundle, num_threads=1) as engine:
        answers = [
            answer for start in range(0, 100, 5) for answer in engine.generate_batch(requests[start : start + 5])
        ]
    expected = [judged.tensors(index)["answer"].tolist() for index in range(100)]
    return [index for index, answer in enumerate(answers) if list(answer.token_ids) != expected[index]]


@pytest.mark.parametrize("standard", [False, True], ids=["twin", "standard"])
@pytest.mark.parametrize("states", ["published", "transformers-4.56"])
def test_keys_values_and_logits_are_those_of_the_transformers_it_is_made_for(
    states: str, standard: bool, bundle_of, judged_by: JudgedBy
) -> None:
    errors = largest_errors(bundle_of(vision_states=states), judged_by(states), standard=standard)
    assert {name.rpartition("_")[0] for name in errors} == {"", "cross_key", "cross_value"}
    assert max(errors.values()) <= BAR, errors


@pytest.mark.parametrize("states", ["published", "transformers-4.56"])
def test_greedy_answers_to_a_hundred_prompts_are_identical(states: str, bundle_of, judged_by: JudgedBy) -> None:
    judged = judged_by(states)
    assert len(judged.prompts) == 100
    assert differing_answers(bundle_of(vision_states=states), judged) == []


def test_the_judges_differ_where_pictures_are_concerned(judged_by: JudgedBy) -> None:
    first, second = judged_by("published"), judged_by("transformers-4.56")
    assert first.version == "4.54.1"
    assert second.version == importlib.metadata.version("transformers")
    answers = [[tuple(judged.tensors(index)["answer"]) for index in range(100)] for judged in (first, second)]
    assert answers[0][:88] != answers[1][:88]
    assert answers[0][88:] == answers[1][88:]  # text alone
    assert len(set(answers[0])) > 20
    one, other = (judged.tensors(0)["features"] for judged in (first, second))
    width = one.shape[-1] // 3  # two intermediate states behind the final one
    assert relative(one[..., :width], other[..., :width]) <= BAR
    assert relative(one[..., width:], other[..., width:]) > 1000 * BAR


@pytest.mark.parametrize("fault", ["one block late", "one block early"])
def test_states_of_a_neighboring_block_are_seen(
    fault: str, bundle_of, shared: Path, miniature: Path, judged_by: JudgedBy
) -> None:
    late = fault == "one block late"
    bundle = bundle_of(vision_states="transformers-4.56") if late else earlier_bundle(shared, miniature)
    errors = largest_errors(bundle, judged_by("published"))
    assert min(errors.values()) > 1000 * BAR, errors
    assert differing_answers(bundle, judged_by("published"))


def test_the_corrected_reference_is_the_older_transformers(judged_by: JudgedBy, miniature: Path) -> None:
    judged, reference = judged_by("published"), Reference(miniature, vision_states="published")
    measured = [index for index, each in enumerate(judged.prompts) if each.is_measured and each.canvases]
    assert len(measured) == 12
    for index in measured:
        images = [Image.open(path) for path in judged.images[index]]
        inputs = reference.processor(images=images, text=judged.prompts[index].text, return_tensors="pt")
        names = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
        with torch.no_grad():
            found = reference.model.model.vision_model(**{name: inputs[name] for name in names})[0]
        assert relative(found.numpy(), judged.tensors(index)["features"]) <= BAR


def test_validation_is_right_where_the_older_transformers_is_installed(
    bundle_of, older: Path, miniature: Path, tmp_path: Path
) -> None:
    published, after, wrong = (tmp_path / name for name in ("published", "after", "wrong"))
    shutil.copytree(bundle_of(), published)
    for path in (after, wrong):
        shutil.copytree(bundle_of(vision_states="transformers-4.56"), path)
    relist(wrong, vision_states="published")
    output = tmp_path / "reports.json"
    environments.run(older, ORACLE / "validate.py", miniature, output, published, after, wrong)
    right, corrected, failed = json.loads(output.read_text())
    taken = "transformers 4.54.1 takes the vision tower's states before the block"
    for report, note in (
        (right, f"{taken}, as the bundle does, and needs no correction"),
        (corrected, f"{taken}; corrected to transformers-4.56 (after the block)"),
    ):
        assert report["json"]["verdict"] == "pass", report["text"]
        assert report["json"]["reference"]["vision_states"] == "published"
        assert f"reference: {note}" in report["text"].splitlines()
    assert failed["json"]["verdict"] == "fail"
    assert failed["json"]["layers"][0]["first_divergence"]["layer"] == "projector"
