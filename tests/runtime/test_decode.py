"""How a prompt is cut into chunks, and which tiles its tokens see."""

from __future__ import annotations

import numpy as np
import pytest
from mllama_runtime.backends import Chunk
from mllama_runtime.config import MaskSemantics
from mllama_runtime.decode import Row, chunks_of
from mllama_runtime.sampling import Sampler, SamplingParams
from mllama_runtime.streaming import TextStream
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel
from tokenizers.models import WordLevel


class Picture:
    """Features of a picture as far as chunks look at them."""

    def __init__(self, num_tiles: int) -> None:
        self.num_tiles, self.key = num_tiles, f"{num_tiles} tiles"

    def arrays(self) -> dict[str, np.ndarray]:
        raise AssertionError("read")


def row(num_tokens: int, num_before: int, tiles: list[int]) -> Row:
    visibility = np.zeros((num_tokens, sum(tiles)), np.bool_)
    visibility[num_before:] = True
    tokenizer = Tokenizer(WordLevel({"a": 0}, unk_token="a"))
    tokenizer.decoder = ByteLevel()
    text = TextStream(tokenizer)
    features = [Picture(count) for count in tiles]
    return Row(np.arange(num_tokens), visibility, features, Sampler(SamplingParams(), 100), text, 1)


@pytest.mark.parametrize(
    ("semantics", "num_before", "expected"),
    [
        ("hf", 0, [(0, 32, False), (32, 40, False)]),
        ("hf", 5, [(0, 32, True), (32, 40, False)]),
        ("hf", 32, [(0, 32, True), (32, 40, False)]),
        ("hf", 33, [(0, 32, True), (32, 40, True)]),
        ("meta", 5, [(0, 32, False), (32, 40, False)]),
    ],
)
def test_tokens_before_a_picture_share_a_chunk_with_those_behind_it(
    semantics: MaskSemantics, num_before: int, expected: list[tuple[int, int, bool]]
) -> None:
    chunks = list(chunks_of(row(40, num_before, [2, 1]), semantics, 32))
    assert [(chunk.position, chunk.stop, chunk.with_padding_tiles) for chunk in chunks] == expected
    assert np.concatenate([chunk.token_ids for chunk in chunks]).tolist() == list(range(40))


def test_padding_tiles_are_unseen_and_tokens_before_the_picture_see_nothing() -> None:
    (chunk,) = chunks_of(row(4, 2, [2, 1]), "hf", 32)
    seen = [True, True, False, False, True, False, False, False]
    assert chunk.visibility_with_padding(4).tolist() == [[False] * 8] * 2 + [seen] * 2


def test_a_chunk_without_pictures_has_no_tiles() -> None:
    chunk = Chunk(np.arange(3), 0, np.zeros((3, 0), np.bool_))
    assert chunk.visibility_with_padding(4).shape == (3, 0)
