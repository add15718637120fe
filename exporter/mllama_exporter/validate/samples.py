"""The built-in prompts and pictures of a validation: drawn here, the same every time, for any model's tile size.

Every canvas shape occurs, and every way in which pictures and text can stand to each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from mllama_runtime.config import VisionConfig
from mllama_runtime.images import ImageSource
from mllama_runtime.tokenizer import IMAGE_TOKEN
from PIL import Image, ImageDraw

Part = Mapping[str, str]
Message = Mapping[str, Any]
"""{"role", "content"}, the content a list of text and image parts; as `chat.messages_from` takes it."""

_QUESTIONS = (
    "Describe the picture.",
    "How many shapes are there?",
    "What do you see?",
    "What is in this picture?",
    "How many shapes do you see?",
)
_PLACES = ("top left", "top right", "bottom left", "bottom right")
_NUM_SENTENCES = 90  # of the long prompt: more tokens than a chunk of prefill, and where slow rotary frequencies show
_TENSORS_EVERY = 8  # text samples, of which one is compared tensor by tensor
_NUM_DESCRIBED = 40  # samples for tokens alone: more than 1,000 greedy steps in all, so that one is below 0.1%
_COLORS = ((220, 30, 30), (30, 140, 40), (40, 60, 220), (240, 210, 30), (130, 40, 160), (245, 140, 20))

Depth = Literal["answers", "tensors", "layers"]
"""Tokens and logits; or keys, values and caches too; or what every layer makes too."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One prompt; `images` fill the image parts of `messages` in order; `depth` is what is compared."""

    name: str
    messages: Sequence[Message]
    images: tuple[ImageSource, ...] = ()
    depth: Depth = "tensors"

    @property
    def raw_text(self) -> str:
        """The prompt for a model without chat template: one turn a line, `<|image|>` where a picture stands."""
        parts = ([part.get("text", IMAGE_TOKEN) for part in message["content"]] for message in self.messages)
        return "\n".join("".join(turn) for turn in parts)


def builtin_samples(vision: VisionConfig) -> list[Sample]:
    """A prompt for every canvas shape, and one for every other order of text and pictures."""
    ratios, size = vision.supported_aspect_ratios, vision.image_size
    samples = [
        question(f"canvas_{high}x{wide}", _QUESTIONS[index % len(_QUESTIONS)], drawn(high, wide, size, seed=index))
        for index, (high, wide) in enumerate(ratios)
    ]
    first, last, odd = drawn(1, 1, size, seed=101), drawn(*ratios[-1], size, seed=102), drawn(1, 1, size, seed=103)
    asked, answered = _turn("user", "How many shapes are there?"), _turn("assistant", "There are two shapes.")
    others = [
        Sample("text_only", [_turn("user", "Name the four seasons.")]),
        Sample("text_before_picture", [_turn("user", "Look at this: ", None, "What do you see?")], (first,)),
        Sample("two_pictures", [_turn("user", None, None, "Describe the pictures.")], (first, last), "layers"),
        Sample("second_turn", [_turn("user", None, "What do you see?"), answered, asked], (odd,)),
        Sample(
            "picture_in_second_turn",
            [_turn("user", None, "What do you see?"), answered, _turn("user", None, "And what is in this one?")],
            (last, odd.convert("RGBA")),
        ),
    ]
    samples.append(Sample("long_prompt", [_turn("user", None, f"{_long_text()} What do you see?")], (first,), "layers"))
    canvases = [ratios[index % len(ratios)] for index in range(_NUM_DESCRIBED)]
    described = [
        question(f"described_{index}", _QUESTIONS[0], drawn(high, wide, size, seed=200 + index), "answers")
        for index, (high, wide) in enumerate(canvases)
    ]
    return [*samples[:1], *others, *samples[1:], *described]  # so that a batch of neighbours is mixed


def text_samples() -> list[Sample]:
    """For a text-only model: short prompts, a second turn, and one of several chunks."""
    asked, answered = _turn("user", "What comes after three?"), _turn("assistant", "Four comes after three.")
    samples = [
        Sample("second_turn", [asked, answered, _turn("user", "And what comes before it?")]),
        Sample("long_prompt", [_turn("user", f"{_long_text()} How often is the star named?")]),
    ]
    for index in range(_NUM_DESCRIBED):
        first, last = _PLACES[index % len(_PLACES)], _PLACES[(index // len(_PLACES)) % len(_PLACES)]
        depth: Depth = "answers" if index % _TENSORS_EVERY else "tensors"
        text = f"{index + 1} circles are at the {first}, and one star is at the {last}. Tell me more."
        samples.append(Sample(f"text_{index}", [_turn("user", text)], (), depth))
    return samples


def question(name: str, text: str, image: ImageSource | None, depth: Depth = "tensors") -> Sample:
    """A picture, or none, and then a question about it."""
    parts, images = ([text], ()) if image is None else ([None, text], (image,))
    return Sample(name, [_turn("user", *parts)], images, depth)


def drawn(tiles_high: int, tiles_wide: int, image_size: int, *, seed: int) -> Image.Image:
    """Bright shapes on a pale gradient, a little smaller than a canvas of so many tiles, so that it is resized."""
    rng = np.random.default_rng(seed)
    margin = max(1, image_size // 4)
    height, width = tiles_high * image_size - margin, tiles_wide * image_size - margin
    shade = np.add.outer(np.linspace(0, 20, height), np.linspace(0, 20, width))[..., None]
    noise = rng.integers(0, 4, (height, width, 3))
    picture = Image.fromarray((250 - shade - noise).astype(np.uint8))
    pen, radius = ImageDraw.Draw(picture), min(height, width) // 5
    for index in range(tiles_high * tiles_wide + 1):
        x, y = (int(rng.integers(radius, side - radius)) for side in (width, height))
        draw = (pen.ellipse, pen.rectangle)[index % 2]
        draw((x - radius, y - radius, x + radius, y + radius), fill=_COLORS[int(rng.integers(len(_COLORS)))])
    return picture


def _long_text() -> str:
    rng = np.random.default_rng(104)
    names = ("circle", "square", "star", "cross", "house", "table")
    sentences = [f"The {rng.choice(names)} is at the {rng.choice(_PLACES)}." for _ in range(_NUM_SENTENCES)]
    return " ".join(sentences)


def _turn(role: str, *parts: str | None) -> Message:
    """A message; None among the parts is a picture's place."""
    content: list[Part] = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
    return {"role": role, "content": content}
