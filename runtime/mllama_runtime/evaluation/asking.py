"""Questions to answers: a task is put to an engine, in batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mllama_runtime.engine import EncodedImage, Engine, Request
from mllama_runtime.errors import RequestError
from mllama_runtime.evaluation.questions import Question
from mllama_runtime.fields import Prose
from mllama_runtime.images import ImageSource
from mllama_runtime.manifest import Manifest
from mllama_runtime.sampling import SamplingParams
from mllama_runtime.tokenizer import IMAGE_TOKEN


@dataclass(frozen=True, slots=True)
class AskOptions:
    """How every question of a task is put; answers are always the likeliest tokens.

    `batch` questions are answered together. `date_string` is the date that a chat template writes: always the same
    one, so that the same questions are the same prompts tomorrow.
    """

    system: Prose | None = None
    max_new_tokens: int = 64
    batch: int = 8
    date_string: str = "26 Jul 2024"


def answers_from_engine(
    engine: Engine,
    questions: Sequence[Question],
    options: AskOptions,
    progress: Callable[[int], object] = lambda count: None,
) -> list[str]:
    """The engine's answer to every question, in their order.

    Pictures stand before the question's text. Questions about the same pictures are asked one after the other, and a
    picture is kept while the batch at hand needs it: it is encoded once, and memory does not grow with the task.

    Args:
        progress: called after every batch with how many questions it had; what it raises ends the work.

    Raises:
        RequestError: naming the question that cannot be asked, for example because it is too long.
        ImageError: naming the picture that cannot be read.
        ResourceError: a batch does not fit into memory.
    """
    groups: dict[tuple[Path, ...], int] = {}
    places = [groups.setdefault(question.images, len(groups)) for question in questions]
    order = sorted(range(len(questions)), key=places.__getitem__)
    answers = [""] * len(questions)
    pictures: dict[Path, EncodedImage] = {}
    for start in range(0, len(order), options.batch):
        chosen = order[start : start + options.batch]
        batch = [questions[index] for index in chosen]
        needed = dict.fromkeys(path for question in batch for path in question.images)
        pictures = {path: pictures[path] if path in pictures else engine.encode_image(path) for path in needed}
        for index, answer in zip(chosen, _ask(engine, batch, pictures, options), strict=True):
            answers[index] = answer
        progress(len(batch))
    return answers


def _ask(
    engine: Engine,
    batch: Sequence[Question],
    pictures: Mapping[Path, EncodedImage],
    options: AskOptions,
) -> list[str]:
    requests = [
        request_from_question(engine.bundle.manifest, question, [pictures[path] for path in question.images], options)
        for question in batch
    ]
    try:
        return [generation.text for generation in engine.generate_batch(requests)]
    except RequestError as error:
        if len(batch) > 1:  # one of them is to blame, and alone it is found
            return [text for each in batch for text in _ask(engine, [each], pictures, options)]
        raise error_of_question(error, batch[0]) from error


def request_from_question(
    manifest: Manifest, question: Question, images: Sequence[EncodedImage | ImageSource], options: AskOptions
) -> Request:
    """How a question is put to a model: in its chat template, or as it stands to a base model, which has none."""
    is_raw = "chat_template.jinja" not in manifest.files
    return Request(
        IMAGE_TOKEN * len(images) + question.prompt if is_raw else question.prompt,
        images=images,
        system=options.system,
        sampling=SamplingParams(max_new_tokens=options.max_new_tokens),
        date_string=options.date_string,
        raw=is_raw,
    )


def error_of_question(error: RequestError, question: Question) -> RequestError:
    """The same, naming the question."""
    where = f"{question.id}: {error.where}"
    return RequestError(error.what, where=where, expected=error.expected, found=error.found, hint=error.hint)
