"""A prompt as the decode loop wants it: token ids, the pictures they speak of, and which tiles each token sees.

Stands between `chat` and `tokenizer` on one side and the engine on the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mllama_runtime.chat import ChatTemplate, ImagePart, Json, JsonObject, Message
from mllama_runtime.errors import RequestError
from mllama_runtime.tokenizer import IMAGE_TOKEN, Tokenizer


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model is to continue.

    `images` holds one source for every `<|image|>` in `token_ids`, in order; `notices` says in a sentence each what
    was done differently from what was asked.
    """

    token_ids: tuple[int, ...]
    images: tuple[object, ...] = ()
    notices: tuple[str, ...] = ()


def prompt_from_messages(
    messages: Sequence[Message],
    *,
    template: ChatTemplate,
    tokenizer: Tokenizer,
    images: Sequence[object] = (),
    tools: Sequence[JsonObject] | None = None,
    variables: Mapping[str, Json] | None = None,
    add_generation_prompt: bool = True,
) -> Prompt:
    """A conversation, through the bundle's chat template.

    Only what the template itself writes becomes a control token; see `chat.RenderedChat`.

    Args:
        messages: from `chat.messages_from`.
        images: the pictures of the image parts that carry none, in order.
        tools: from `chat.tools_from`.
        variables: further template variables, such as `date_string`.

    Raises:
        RequestError: the template refuses the messages, or places and pictures do not match in number.
        BundleError: the template fails.
    """
    parts = [part for message in messages for part in message.parts if isinstance(part, ImagePart)]
    num_open = sum(part.image is None for part in parts)
    if num_open != len(images):
        raise _mismatch("image parts without a picture of their own", num_open, len(images))
    given = iter(images)
    pictures = tuple(next(given) if part.image is None else part.image for part in parts)
    rendered = template.render(messages, tools=tools, variables=variables, add_generation_prompt=add_generation_prompt)
    token_ids = tokenizer.encode(rendered.marked, special=True, add_bos=True, guard=rendered.guard)
    return _checked(Prompt(tuple(token_ids), pictures, rendered.notices), tokenizer)


def prompt_from_text(text: str, images: Sequence[object] = (), *, tokenizer: Tokenizer) -> Prompt:
    """Raw text to be continued, as base models want it: special tokens in it are control tokens.

    `<|begin_of_text|>` is added when the text has none. Raises RequestError when the text is empty, or when the
    number of `<|image|>` in it is not the number of pictures.
    """
    if not text:
        raise RequestError("is empty", where="prompt", hint="give the model something to continue")
    return _checked(Prompt(tuple(tokenizer.encode(text, special=True, add_bos=True)), tuple(images)), tokenizer)


def image_visibility(token_ids: Sequence[int], image_token_id: int, num_tiles: Sequence[int]) -> npt.NDArray[np.bool_]:
    """Which tiles each token sees: bool [seq, sum(num_tiles)], the tiles of all pictures side by side.

    A token sees the latest picture at or before it, together with the pictures that directly precede that one. As
    transformers' processing_mllama has it (get_cross_attention_token_mask), padding tiles left out.

    Args:
        num_tiles: tiles of each picture, in the order of the pictures.

    Raises:
        RequestError: there are more or fewer pictures than image tokens.
    """
    is_image = np.asarray(token_ids) == image_token_id
    if is_image.sum() != len(num_tiles):
        raise _mismatch(f"{IMAGE_TOKEN} in the prompt", int(is_image.sum()), len(num_tiles))
    num_seen = np.cumsum(is_image)[:, None]  # [seq, 1] pictures at or before each token
    opens_run = is_image & ~np.r_[False, is_image[:-1]]
    first_seen = np.maximum.accumulate(np.where(opens_run, num_seen[:, 0] - 1, 0))[:, None]  # [seq, 1]
    picture = np.repeat(np.arange(len(num_tiles)), num_tiles)  # [tiles]
    return (first_seen <= picture) & (picture < num_seen)


def _checked(prompt: Prompt, tokenizer: Tokenizer) -> Prompt:
    num_markers = prompt.token_ids.count(tokenizer.image_token_id)
    if num_markers != len(prompt.images):
        raise _mismatch(f"{IMAGE_TOKEN} in the prompt", num_markers, len(prompt.images))
    return prompt


def _mismatch(places: str, num_places: int, num_images: int) -> RequestError:
    return RequestError(
        f"the number of {places} is not the number of pictures given for them",
        where="images",
        expected=num_places,
        found=num_images,
        hint="give one picture for every place, in order",
    )
