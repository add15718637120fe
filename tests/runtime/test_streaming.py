"""Streamed text against the tokenizer's own decode of everything, and against plain searches for the stop strings."""

import itertools
import random
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mllama_runtime.errors import BundleError
from mllama_runtime.streaming import TextStream
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

MINIATURE = Path(__file__).parents[2] / "recipes" / "miniature" / "checkpoint" / "tokenizer.json"
SENTENCES = [
    "How many red circles are there? There are three red circles.",
    "Größe, naïve café, Ελληνικά, русский текст, עברית, العربية.",
    "日本語の文章と、中文句子与한국어 문장.",
    "Emoji: 👩‍👩‍👧‍👦 🇩🇪 👍🏽 🏴‍☠️ 😀 and a replacement character \ufffd in the text.",
    "a ab aab abab abb baa bab bba aaaa bbbb ab\n\nab",
]
REPLACEMENT = "\ufffd"


def train() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.add_special_tokens([AddedToken("<|eot_id|>", special=True), AddedToken("<|image|>", special=True)])
    # Added text outside the byte alphabet, inside it, and mixed: three paths through the library's decoder.
    tokenizer.add_tokens(["日本 語", "<tool>", "Ġé"])
    return tokenizer


TRAINED = train()


@pytest.fixture(params=["trained", "miniature"], scope="module")
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return TRAINED if request.param == "trained" else Tokenizer.from_file(str(MINIATURE))


def byte_ids(tokenizer: Tokenizer) -> dict[int, int]:
    """The id of the single-byte token of every byte, found through a second path: the library's own encoder."""
    ids = {byte: tokenizer.token_to_id(chr(byte)) for byte in range(0xC0, 0x100)}  # written as themselves
    for character in map(chr, range(0x100)):
        written = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(character)[0][0]
        ids |= {byte: tokenizer.token_to_id(c) for byte, c in zip(character.encode(), written, strict=True)}
    return ids


def stream_all(stream: TextStream, ids: list[int]) -> list[str]:
    return [*(stream.push(token_id) for token_id in ids), stream.flush()]


def test_random_ids_equal_the_full_decode(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    single_bytes = list(byte_ids(tokenizer).values())
    num_ids = tokenizer.get_vocab_size() + 3  # a few that stand for nothing
    for _ in range(2000):
        ids = [
            rng.choice(single_bytes) if rng.random() < 0.6 else rng.randrange(num_ids) for _ in range(rng.randrange(40))
        ]
        full = tokenizer.decode(ids, skip_special_tokens=True)
        stream = TextStream(tokenizer)
        for token_id in ids:
            stream.push(token_id)
            assert full.startswith(stream.text)  # nothing released is ever taken back
        stream.flush()
        assert stream.text == full


def test_every_kind_of_utf8_error_equals_the_full_decode(tokenizer: Tokenizer) -> None:
    # One byte of each class the UTF-8 table tells apart: every sequence of up to four covers every error.
    classes = [0x41, 0x80, 0x90, 0xA0, 0xC0, 0xC2, 0xE0, 0xE1, 0xED, 0xEE, 0xF0, 0xF1, 0xF4, 0xF5]
    ids = [byte_ids(tokenizer)[byte] for byte in classes]
    for length in (1, 2, 3, 4):
        for sequence in itertools.product(ids, repeat=length):
            streamed = "".join(stream_all(TextStream(tokenizer), list(sequence)))
            assert streamed == tokenizer.decode(list(sequence))


def test_text_is_released_as_soon_as_its_characters_are_whole(tokenizer: Tokenizer) -> None:
    for sentence in SENTENCES:
        ids = tokenizer.encode(sentence, add_special_tokens=False).ids
        stream = TextStream(tokenizer)
        for count, token_id in enumerate(ids, start=1):
            stream.push(token_id)
            so_far = tokenizer.decode(ids[:count])
            if not so_far.endswith(REPLACEMENT):
                assert stream.text == so_far
            assert sentence.startswith(stream.text)
        assert (stream.flush(), stream.text) == ("", sentence)


def test_bytes_that_cannot_become_a_character_are_not_held_back(tokenizer: Tokenizer) -> None:
    ids = byte_ids(tokenizer)
    stream = TextStream(tokenizer)
    assert [stream.push(ids[byte]) for byte in (0xFF, 0xE6, 0x97, 0xA5, 0xE6)] == [REPLACEMENT, "", "", "日", ""]
    assert stream.push(ids[0x41]) == REPLACEMENT + "A"
    assert [stream.push(ids[byte]) for byte in REPLACEMENT.encode()] == ["", "", REPLACEMENT]
    assert (stream.push(ids[0xF0]), stream.flush(), stream.flush()) == ("", REPLACEMENT, "")
    assert stream.text == f"{REPLACEMENT}日{REPLACEMENT}A{REPLACEMENT * 2}"


def test_special_and_unknown_tokens_say_nothing() -> None:
    stream = TextStream(TRAINED)
    a, eot = TRAINED.token_to_id("a"), TRAINED.token_to_id("<|eot_id|>")
    assert stream_all(stream, [a, eot, 10**6, a]) == ["a", "", "", "a", ""]


def test_added_text_outside_the_byte_alphabet_stands_for_itself() -> None:
    ids = [TRAINED.token_to_id(token) for token in ("日本 語", "<tool>", "Ġé")]
    assert TextStream(TRAINED).push(ids[0]) == "日本 語"
    # "Ġé" is spelled within the alphabet, so it is bytes: a space and 0xE9, which alone is no character.
    assert "".join(stream_all(TextStream(TRAINED), ids)) == TRAINED.decode(ids) == f"日本 語<tool> {REPLACEMENT}"


def test_cost_per_token_does_not_grow_with_what_is_held_back() -> None:
    # Decoding anew with each token would take minutes at this length; a linear stream takes a fraction of a second.
    lead, letter = byte_ids(TRAINED)[0xFF], TRAINED.token_to_id("a")
    num_tokens, start = 50_000, time.perf_counter()
    assert len("".join(stream_all(TextStream(TRAINED), [lead] * num_tokens))) == num_tokens
    assert len("".join(stream_all(TextStream(TRAINED, ["a" * 20_000 + "b"]), [letter] * num_tokens))) == num_tokens
    assert time.perf_counter() - start < 15


def test_other_decoders_are_refused() -> None:
    wordpiece = Tokenizer(models.WordPiece({"a": 0}, unk_token="a"))
    wordpiece.decoder = decoders.WordPiece()
    with pytest.raises(BundleError, match=r"tokenizer\.json: .*expected a ByteLevel decoder.*found WordPiece"):
        TextStream(wordpiece)


def ended(text: str, stops: list[str]) -> tuple[str, bool]:
    """Reference: read the text a character longer at a time until it ends in a stop string."""
    for end in range(1, len(text) + 1):
        lengths = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if lengths:
            return text[: end - max(lengths)], True
    return text, False


def withheld(text: str, stops: list[str]) -> int:
    """Reference: length of the longest ending of the text that a stop string begins with."""
    return max((n for stop in stops for n in range(len(stop)) if n and text.endswith(stop[:n])), default=0)


# Tokens over few characters, so that stop strings occur, overlap and span tokens; 日 comes whole and in bytes.
STOP_TOKENS = [
    *(TRAINED.token_to_id(token) for token in ("a", "b", "ab", "aa", "bb", "日本 語", "<|eot_id|>")),
    *(byte_ids(TRAINED)[byte] for byte in "日".encode()),
]
TEXTS = st.text(alphabet="ab日" + REPLACEMENT, min_size=1, max_size=6)


@settings(max_examples=1000, deadline=None, derandomize=True)
@given(ids=st.lists(st.sampled_from(STOP_TOKENS), max_size=25), stops=st.lists(TEXTS, max_size=4))
def test_stop_strings_equal_a_plain_search(ids: list[int], stops: list[str]) -> None:
    expected, found = ended(TRAINED.decode(ids), stops)
    stream, plain = TextStream(TRAINED, stops), TextStream(TRAINED)
    for token_id in ids:
        stream.push(token_id)
        plain.push(token_id)
        text, done = ended(plain.text, stops)
        assert stream.finished is done
        assert stream.text == (text if done else text[: len(text) - withheld(text, stops)])
    stream.flush()
    assert (stream.text, stream.finished) == (expected, found)


def characters(text: str) -> list[int]:
    return [TRAINED.token_to_id(character) for character in text]


def test_text_is_withheld_while_it_may_begin_a_stop_string() -> None:
    stream = TextStream(TRAINED, ["abba"])
    assert [stream.push(i) for i in characters("babbba")] == ["b", "", "", "", "abbb", ""]
    assert (stream.flush(), stream.finished) == ("a", False)


def test_nothing_is_released_after_a_stop_string() -> None:
    stream = TextStream(TRAINED, ("ab",))
    deltas = [stream.push(i) for i in characters("bab")]
    assert (deltas, stream.finished) == (["b", "", ""], True)
    assert [stream.push(i) for i in characters("bb")] == ["", ""]
    assert (stream.flush(), stream.text) == ("", "b")


def test_a_stop_string_inside_one_token_cuts_the_token() -> None:
    stream = TextStream(TRAINED, ["本"])
    assert (stream.push(TRAINED.token_to_id("日本 語")), stream.finished) == ("日", True)


@pytest.mark.parametrize(
    ("stops", "text", "expected"),
    [
        (["abcd", "c"], "xabcd", "xab"),  # the first to be complete wins, though the other began earlier
        (["bc", "abc"], "xabc", "x"),  # completed by the same character: the longest
        (["b", "a"], "xab", "x"),  # the order of the list says nothing
    ],
)
def test_the_earliest_of_several_stop_strings_wins(stops: list[str], text: str, expected: str) -> None:
    stream = TextStream(TRAINED, stops)
    assert ("".join(stream_all(stream, characters(text))), stream.finished) == (expected, True)


def test_an_unfinished_character_can_complete_a_stop_string_at_the_end() -> None:
    stream = TextStream(TRAINED, ["a" + REPLACEMENT])
    assert stream_all(stream, [*characters("ba"), byte_ids(TRAINED)[0xE6]]) == ["b", "", "", ""]
    assert stream.finished
