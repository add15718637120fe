"""Free-running answers to 300 held-out questions: token for token what transformers' `generate` gives.

In FP32 all 300 must be identical. In FP16 at least 99% (three may flip where two tokens are almost equally likely).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from mllama_runtime import Engine, Request, SamplingParams
from PIL import Image
from reference import Reference

NUM_QUESTIONS = 300
MAX_NEW_TOKENS = 80
SPLIT = "held_out"


@dataclass(frozen=True)
class Asked:
    question: str
    image: Image.Image
    token_ids: tuple[int, ...]


@pytest.fixture(scope="module")
def asked(miniature: Path) -> list[Asked]:
    """The questions with the reference's answers, by the model card's own way from processor to `generate`."""
    sys.path.insert(0, str(miniature.parent))
    from pictures import held_out, render

    reference = Reference(miniature)
    answers = []
    for example in held_out(SPLIT, NUM_QUESTIONS):
        image, question = render(example.scene), example.question.question
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        prompt = reference.processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = reference.processor(images=image, text=prompt, add_special_tokens=False, return_tensors="pt")
        output = reference.model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        answers.append(Asked(question, image, tuple(output[0, inputs["input_ids"].shape[1] :].tolist())))
    return answers


@pytest.fixture(scope="module")
def engines(bundle_of) -> Iterator[dict[str, Engine]]:
    with Engine.load(bundle_of("fp32")) as fp32, Engine.load(bundle_of("fp16")) as fp16:
        yield {"fp32": fp32, "fp16": fp16}


def num_identical(engine: Engine, asked: list[Asked]) -> int:
    sampling = SamplingParams(max_new_tokens=MAX_NEW_TOKENS)
    answers = [engine.generate(item.question, images=[item.image], sampling=sampling) for item in asked]
    return sum(answer.token_ids == item.token_ids for answer, item in zip(answers, asked, strict=True))


def test_answers_are_identical_to_those_of_transformers(engines: dict[str, Engine], asked: list[Asked]) -> None:
    assert len({item.token_ids for item in asked}) > NUM_QUESTIONS / 4  # they do say something
    assert num_identical(engines["fp32"], asked) == NUM_QUESTIONS


def test_fp16_answers_almost_never_differ(engines: dict[str, Engine], asked: list[Asked]) -> None:
    assert num_identical(engines["fp16"], asked) >= 0.99 * NUM_QUESTIONS


def test_batches_give_the_same_answers(engines: dict[str, Engine], asked: list[Asked]) -> None:
    """Eight questions at a time, pictures of different canvases and a text-only row among them."""
    sampling = SamplingParams(max_new_tokens=MAX_NEW_TOKENS)
    for start in range(0, 64, 8):
        chosen = asked[start : start + 8]
        requests = [Request(item.question, images=[item.image], sampling=sampling) for item in chosen]
        text_only = Request("What comes after three?", sampling=sampling)
        answers = engines["fp32"].generate_batch([*requests[:3], text_only, *requests[3:]])
        del answers[3]
        assert [answer.token_ids for answer in answers] == [item.token_ids for item in chosen]
