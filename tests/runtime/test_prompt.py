"""Prompts against transformers' processor: ids, places and pictures, and which tiles each token sees."""

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mllama_runtime.chat import ChatTemplate, messages_from, tools_from
from mllama_runtime.errors import RequestError
from mllama_runtime.prompt import image_visibility, prompt_from_messages, prompt_from_text
from mllama_runtime.tokenizer import Tokenizer
from PIL import Image
from transformers import AutoProcessor
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)

CHECKPOINT = Path(__file__).parents[2] / "recipes" / "miniature" / "checkpoint"
IMAGE = 99
DATE = "26 Jul 2024"


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(CHECKPOINT / "tokenizer.json")


@pytest.fixture(scope="module")
def template(tokenizer) -> ChatTemplate:
    return ChatTemplate.from_file(CHECKPOINT / "chat_template.jinja", special_tokens=tokenizer.special_tokens)


def picture(rng: random.Random) -> Image.Image:
    return Image.new("RGB", (rng.randint(1, 300), rng.randint(1, 300)))


# Which tiles each token sees.


def without_padding(dense: np.ndarray, num_tiles: list[int]) -> np.ndarray:
    """The reference's mask [seq, images, max_num_tiles] as [seq, tiles that exist]."""
    columns = [dense[:, index, :count] for index, count in enumerate(num_tiles)]
    return np.concatenate([np.zeros((len(dense), 0)), *columns], axis=1).astype(bool)


def reference_visibility(token_ids: list[int], num_tiles: list[int], max_num_tiles: int = 4) -> np.ndarray:
    sparse = get_cross_attention_token_mask(token_ids, IMAGE)
    dense = convert_sparse_cross_attention_mask_to_dense([sparse], [num_tiles], max_num_tiles, len(token_ids))
    return without_padding(dense[0], num_tiles)


def check_visibility(token_ids: list[int], num_tiles: list[int]) -> None:
    found = image_visibility(token_ids, IMAGE, num_tiles)
    assert found.dtype == np.bool_
    assert found.shape == (len(token_ids), sum(num_tiles))
    np.testing.assert_array_equal(found, reference_visibility(token_ids, num_tiles))


def test_visibility_is_the_references_on_random_prompts() -> None:
    rng = random.Random(0)
    for _ in range(4000):
        density = rng.choice([0.05, 0.2, 0.5, 0.9])
        token_ids = [IMAGE if rng.random() < density else rng.randrange(50) for _ in range(rng.randint(1, 40))]
        check_visibility(token_ids, [rng.randint(1, 4) for _ in range(token_ids.count(IMAGE))])


def test_visibility_is_the_references_on_every_short_prompt() -> None:
    for length in range(1, 11):
        for bits in range(1 << length):
            token_ids = [IMAGE if bits >> place & 1 else 7 for place in range(length)]
            check_visibility(token_ids, [1 + index % 4 for index in range(token_ids.count(IMAGE))])


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_visibility_is_the_references_on_runs(data: st.DataObject) -> None:
    runs = data.draw(st.lists(st.tuples(st.booleans(), st.integers(1, 5)), min_size=1, max_size=12))
    token_ids = [IMAGE if is_image else 7 for is_image, length in runs for _ in range(length)]
    num_images = token_ids.count(IMAGE)
    check_visibility(token_ids, data.draw(st.lists(st.integers(1, 4), min_size=num_images, max_size=num_images)))


def test_visibility_by_hand() -> None:
    found = image_visibility([7, IMAGE, 7, IMAGE, IMAGE, 7], IMAGE, [2, 1, 3])
    expected = ["......", "11....", "11....", "..1...", "..1111", "..1111"]
    assert ["".join(".1"[int(seen)] for seen in row) for row in found] == expected


def test_generated_tokens_see_what_the_reference_lets_them_see() -> None:
    """The reference appends its mask's last row once a token."""
    rng = random.Random(1)
    for _ in range(200):
        token_ids = [IMAGE if rng.random() < 0.3 else 7 for _ in range(rng.randint(1, 20))]
        num_tiles = [rng.randint(1, 4) for _ in range(token_ids.count(IMAGE))]
        row = image_visibility(token_ids, IMAGE, num_tiles)[-1:]
        np.testing.assert_array_equal(row, reference_visibility(token_ids, num_tiles)[-1:])
        # A longer prompt of the same start would show the next token the same.
        np.testing.assert_array_equal(row, image_visibility([*token_ids, 7], IMAGE, num_tiles)[-1:])


@pytest.mark.parametrize(("token_ids", "num_tiles"), [([7, IMAGE], []), ([7], [1]), ([IMAGE, IMAGE, 7], [4] * 5)])
def test_visibility_needs_a_picture_for_every_place(token_ids, num_tiles) -> None:
    count = token_ids.count(IMAGE)
    with pytest.raises(RequestError, match=rf"^images: .*: expected {count}, found {len(num_tiles)};"):
        image_visibility(token_ids, IMAGE, num_tiles)


# Raw text.


@pytest.mark.parametrize(
    "text",
    [
        "<|image|>If I had to write a haiku for this one",
        "<|image|><|image|>Two",
        "Text first <|image|> then more <|image|><|image|>",
        "<|image|>",
        "<|begin_of_text|><|image|>x",
        "<|image|><|begin_of_text|>x",
        "a<|eot_id|>b<|image|>",
        "No picture at all",
        " ",
    ],
)
def test_raw_prompts_are_the_references(processor, tokenizer, text) -> None:
    rng = random.Random(text)
    images = [picture(rng) for _ in range(text.count("<|image|>"))]
    expected = processor(text=text, images=images or None, add_special_tokens=False)
    prompt = prompt_from_text(text, images, tokenizer=tokenizer)
    assert list(prompt.token_ids) == expected["input_ids"][0]
    assert prompt.images == tuple(images)
    assert prompt.notices == ()
    if images:
        num_tiles = [int(mask.sum()) for mask in expected["aspect_ratio_mask"][0]]
        visibility = image_visibility(prompt.token_ids, tokenizer.image_token_id, num_tiles)
        dense = np.asarray(expected["cross_attention_mask"])[0]
        np.testing.assert_array_equal(visibility, without_padding(dense, num_tiles))


@pytest.mark.parametrize(
    ("text", "num_images"),
    [("No place", 1), ("<|image|>", 0), ("<|image|> <|image|>", 1), ("<|image|>", 5), ("<|image|>" * 5, 4), ("", 1)],
)
def test_raw_places_and_pictures_must_match(tokenizer, text, num_images) -> None:
    if not text:
        message = "^prompt: is empty; "
    else:
        message = rf"^images: .*<\|image\|> in the prompt.*expected {text.count('<|image|>')}, found {num_images};"
    with pytest.raises(RequestError, match=message):
        prompt_from_text(text, ["x.png"] * num_images, tokenizer=tokenizer)


@pytest.mark.parametrize("text", ["", None, b"x", "a\ud800"])
def test_raw_prompts_that_are_no_text_are_refused(tokenizer, text) -> None:
    with pytest.raises(RequestError, match=r"^(prompt|text): "):
        prompt_from_text(text, tokenizer=tokenizer)


# Conversations.


def conversation(rng: random.Random, source: bool) -> tuple[list[dict], list[Image.Image]]:
    images: list[Image.Image] = []
    messages: list[dict] = [{"role": "system", "content": "Be brief."}] if rng.random() < 0.3 else []
    for turn in range(rng.randint(1, 4)):
        content: list[dict] = []
        for _ in range(rng.randint(1, 4)):
            if rng.random() < 0.5:
                images.append(picture(rng))
                content.append({"type": "image", "image": images[-1]} if source else {"type": "image"})
            else:
                content.append({"type": "text", "text": rng.choice(["What is this? ", "and that", "東京 "])})
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": f"Answer {turn}"}]
    return messages, images


def test_conversations_with_pictures_are_the_references(processor, tokenizer, template) -> None:
    """Ids and visibility, several pictures in several turns, through the reference's own one-call path."""
    rng = random.Random(0)
    num_with_pictures = 0
    for _ in range(60):
        messages, images = conversation(rng, source=True)
        options = {"add_generation_prompt": rng.random() < 0.5, "date_string": DATE}
        expected = processor.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
        prompt = prompt_from_messages(
            messages_from(messages),
            template=template,
            tokenizer=tokenizer,
            variables={"date_string": DATE},
            add_generation_prompt=options["add_generation_prompt"],
        )
        assert list(prompt.token_ids) == np.asarray(expected["input_ids"]).tolist()[0]
        assert prompt.images == tuple(images)
        if images:
            num_with_pictures += 1
            num_tiles = [int(mask.sum()) for mask in expected["aspect_ratio_mask"][0]]
            visibility = image_visibility(prompt.token_ids, tokenizer.image_token_id, num_tiles)
            dense = np.asarray(expected["cross_attention_mask"])[0]
            np.testing.assert_array_equal(visibility, without_padding(dense, num_tiles))
    assert num_with_pictures > 40


def test_pictures_given_apart_fill_the_open_places_in_order(tokenizer, template) -> None:
    content = [{"type": "image"}, {"type": "image", "image": "own.png"}, {"type": "image", "image": None}]
    messages = messages_from([{"role": "user", "content": content}])
    prompt = prompt_from_messages(messages, template=template, tokenizer=tokenizer, images=["a.png", b"b"])
    assert prompt.images == ("a.png", "own.png", b"b")
    assert prompt.token_ids.count(tokenizer.image_token_id) == 3


@pytest.mark.parametrize(("num_places", "num_images"), [(0, 1), (1, 0), (2, 1), (1, 5), (5, 4)])
def test_places_and_pictures_must_match(tokenizer, template, num_places, num_images) -> None:
    messages = messages_from([{"role": "user", "content": [{"type": "image"}] * num_places}])
    with pytest.raises(RequestError, match=rf"^images: .*: expected {num_places}, found {num_images};"):
        prompt_from_messages(messages, template=template, tokenizer=tokenizer, images=["x.png"] * num_images)


def test_a_marker_in_what_someone_writes_is_no_place(tokenizer, template) -> None:
    messages = messages_from([{"role": "user", "content": "What does <|image|> mean?"}])
    prompt = prompt_from_messages(messages, template=template, tokenizer=tokenizer)
    assert tokenizer.image_token_id not in prompt.token_ids
    assert "<|image|> mean?" in tokenizer.decode(prompt.token_ids)
    with pytest.raises(RequestError, match="expected 0, found 1"):
        prompt_from_messages(messages, template=template, tokenizer=tokenizer, images=["x.png"])


@pytest.mark.parametrize("source", ["{{ bos_token }}x", "<|image|><|image|>", "{{ messages | tojson }}"])
def test_a_template_that_misplaces_pictures_is_refused(tokenizer, source) -> None:
    broken = ChatTemplate(source, special_tokens=tokenizer.special_tokens)
    messages = messages_from([{"role": "user", "content": [{"type": "image", "image": "x.png"}]}])
    with pytest.raises(RequestError, match=rf"^images: .*: expected {source.count('<|image|>')}, found 1;"):
        prompt_from_messages(messages, template=broken, tokenizer=tokenizer)


def test_begin_of_text_is_added_to_a_template_that_writes_none(tokenizer) -> None:
    source = "{% for part in messages[0].content %}{{ '<|image|>' if part.type == 'image' else part.text }}{% endfor %}"
    bare = ChatTemplate(source, special_tokens=tokenizer.special_tokens)
    parts_by_kind = {
        "text": {"type": "text", "text": "a<|begin_of_text|>"},
        "image": {"type": "image", "image": "x"},
    }
    for content in (["text"], ["image", "text"], ["text", "image"]):
        parts = [parts_by_kind[kind] for kind in content]
        messages = messages_from([{"role": "user", "content": parts}])
        prompt = prompt_from_messages(messages, template=bare, tokenizer=tokenizer)
        assert prompt.token_ids.count(tokenizer.bos_token_id) == 1
        assert prompt.token_ids.index(tokenizer.bos_token_id) == (1 if content[0] == "image" else 0)


def test_tools_variables_and_notices_reach_the_prompt(tokenizer, template) -> None:
    tool = {"type": "function", "function": {"name": "count", "description": "Count.", "parameters": {}}}
    prompt = prompt_from_messages(
        messages_from([{"role": "user", "content": "x"}]),
        template=template,
        tokenizer=tokenizer,
        tools=tools_from([tool]),
        variables={"date_string": "01 Jan 2000"},
    )
    text = tokenizer.decode(prompt.token_ids, skip_special=False)
    assert '"name": "count"' in text
    assert "Today Date: 01 Jan 2000" in text
    old = ChatTemplate(
        "{% if messages[0].role == 'system' %}{{ raise_exception('incompatible with system messages') }}{% endif %}"
        "<|image|>",
        special_tokens=tokenizer.special_tokens,
    )
    messages = messages_from([{"role": "system", "content": "x"}, {"role": "user", "content": [{"type": "image"}]}])
    (notice,) = prompt_from_messages(messages, template=old, tokenizer=tokenizer, images=["x.png"]).notices
    assert "Llama 3.2's own format" in notice
