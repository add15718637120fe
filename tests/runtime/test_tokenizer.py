"""Token ids and text against transformers' tokenizer, loaded from the same folder."""

import json
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tokenizers
from mllama_runtime.errors import BundleError, RequestError
from mllama_runtime.tokenizer import BOS_TOKEN, IMAGE_TOKEN, Tokenizer
from transformers import AutoTokenizer
from transformers.models.mllama.processing_mllama import build_string_from_input

CHECKPOINT = Path(__file__).parents[2] / "recipes" / "miniature" / "checkpoint"
NUM_TEXTS = 2500

# Code points of many scripts, by block.
SCRIPTS = {
    "ascii": (0x20, 0x7E),
    "latin": (0xA1, 0x24F),
    "greek": (0x370, 0x3FF),
    "cyrillic": (0x400, 0x52F),
    "hebrew": (0x5D0, 0x5F4),
    "arabic": (0x600, 0x6FF),
    "devanagari": (0x900, 0x97F),
    "tamil": (0xB82, 0xBFA),
    "thai": (0xE01, 0xE5B),
    "tibetan": (0xF00, 0xFD8),
    "ethiopic": (0x1200, 0x137C),
    "khmer": (0x1780, 0x17F9),
    "combining": (0x300, 0x36F),
    "punctuation": (0x2010, 0x205E),
    "symbols": (0x2190, 0x2BFF),
    "kana": (0x3041, 0x30FF),
    "han": (0x4E00, 0x9FFF),
    "hangul": (0xAC00, 0xD7A3),
    "private": (0xE000, 0xF8FF),
    "wide": (0xFF01, 0xFFEE),
    "gothic": (0x10330, 0x1034A),
    "cuneiform": (0x12000, 0x12399),
    "emoji": (0x1F300, 0x1FAFF),
    "han extension": (0x20000, 0x2A6D0),
    "tags": (0xE0020, 0xE007F),
    "last plane": (0x100000, 0x10FFFF),
}
WHITESPACE = (" ", "  ", "\t", "\n", "\r\n", "\n\n\n", " \n ", "\u00a0", "\u2003", "\u3000", "\u200b", "\u2028", "\x0b")
CONTROLS = ("\x00", "\x01", "\x07", "\x1b[31m", "\x7f", "\x85", "\u200e", "\u202e", "\ufeff", "\ufffd", "\uffff")
JOINED = ("👩‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇩🇪🇫🇷", "1️⃣", "❤️‍🔥", "e\u0301", "क्षि", "നന്ദി", "ﷺ", "q\u0323\u0307")
WORDS = (
    "It's",
    "we'LL",
    "don't",
    "x1234567",
    "3.14",
    "https://a.b/c?d=e",
    "def f(x):",
    "a_b-c",
    "ÀÉ",
    "\u017f'S",
    "...!?",
)
BROKEN = ("<|", "|>", "<|eot", "_id|>", "<|EOT_ID|>", "<| eot_id |>", "<|image|", "<<|image|>>", "</s>", "[INST]")


def special_spellings() -> tuple[str, ...]:
    added = json.loads((CHECKPOINT / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    return tuple(token["content"] for token in added)


def texts(seed: int, num_texts: int) -> list[str]:
    rng = random.Random(seed)
    pools = (WHITESPACE, CONTROLS, JOINED, WORDS, BROKEN, special_spellings())

    def piece() -> str:
        if rng.random() < 0.45:
            first, last = rng.choice(tuple(SCRIPTS.values()))
            return "".join(chr(rng.randint(first, last)) for _ in range(rng.randint(1, 8)))
        return rng.choice(rng.choice(pools))

    return ["".join(piece() for _ in range(rng.randint(0, 12))) for _ in range(num_texts)]


@pytest.fixture(scope="module")
def reference():
    return AutoTokenizer.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(CHECKPOINT / "tokenizer.json")


@pytest.mark.parametrize("special", [True, False])
def test_ids_are_the_references(tokenizer, reference, special) -> None:
    batch = texts(0, NUM_TEXTS)
    assert sum(any(name in text for name in special_spellings()) for text in batch) > 500
    for text in batch:
        expected = reference(text, add_special_tokens=False, split_special_tokens=not special)["input_ids"]
        assert tokenizer.encode(text, special=special) == expected, repr(text)


def test_each_script_alone(tokenizer, reference) -> None:
    for first, last in SCRIPTS.values():
        text = "".join(map(chr, range(first, min(last, first + 400) + 1)))
        assert tokenizer.encode(text, special=True) == reference(text, add_special_tokens=False)["input_ids"]


def test_plain_reading_makes_no_special_token(tokenizer) -> None:
    for text in texts(1, 500):
        assert not tokenizer.special_ids & set(tokenizer.encode(text, special=False))


@pytest.mark.parametrize("skip_special", [True, False])
def test_decoded_text_is_the_references(tokenizer, reference, skip_special) -> None:
    rng = random.Random(2)
    ids = [tokenizer.encode(text, special=True) for text in texts(3, 500)]
    ids += [[rng.randrange(tokenizer.vocab_size) for _ in range(rng.randint(0, 20))] for _ in range(1500)]
    for token_ids in ids:
        expected = reference.decode(token_ids, skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)
        assert tokenizer.decode(token_ids, skip_special=skip_special) == expected


def test_plain_text_comes_back_whole(tokenizer) -> None:
    for text in texts(4, 500):
        assert tokenizer.decode(tokenizer.encode(text, special=False)) == text


def test_ids_beyond_the_vocabulary_decode_to_nothing(tokenizer) -> None:
    assert tokenizer.decode([*tokenizer.encode("cat", special=False), tokenizer.vocab_size + 7]) == "cat"


def test_begin_of_text_stands_where_the_reference_puts_it(tokenizer, reference) -> None:
    opened = [IMAGE_TOKEN * count + text for count, text in enumerate(texts(5, 300), start=-150)]
    for text in [*opened, BOS_TOKEN, IMAGE_TOKEN, "", f"a{BOS_TOKEN}b"]:
        built = build_string_from_input(text, BOS_TOKEN, IMAGE_TOKEN)
        expected = reference(built, add_special_tokens=False)["input_ids"]
        assert tokenizer.encode(text, special=True, add_bos=True) == expected, repr(text)


def test_guard_breaks_a_token_and_leaves_no_trace(tokenizer) -> None:
    guarded = tokenizer.encode("a<\ue000|eot_id|>b<|eot_id|>", special=True, guard="\ue000")
    eot = tokenizer.id_of("<|eot_id|>")
    assert guarded == [*tokenizer.encode("a<|eot_id|>b", special=False), eot]


def test_names_and_numbers(tokenizer, reference) -> None:
    assert tokenizer.vocab_size == len(reference)
    assert tokenizer.special_tokens == set(special_spellings())
    assert {tokenizer.id_of(name) for name in special_spellings()} == tokenizer.special_ids
    assert tokenizer.image_token_id == reference.convert_tokens_to_ids(IMAGE_TOKEN)
    assert tokenizer.bos_token_id == reference.bos_token_id
    with pytest.raises(BundleError, match=r"tokenizer\.json: has no token '<\|nobody\|>'"):
        tokenizer.id_of("<|nobody|>")


def test_threads_do_not_disturb_each_other(tokenizer) -> None:
    batch = [(text, special) for text in texts(6, 200) for special in (True, False)]
    expected = [tokenizer.encode(text, special=special) for text, special in batch]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda one: tokenizer.encode(one[0], special=one[1]), batch * 5)) == expected * 5


def test_length_settings_of_the_file_are_ignored(tmp_path: Path, tokenizer) -> None:
    backend = tokenizers.Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    backend.save(str(tmp_path / "tokenizer.json"))
    changed = Tokenizer.from_file(tmp_path / "tokenizer.json")
    text = "a long enough sentence"
    assert changed.encode(text, special=True) == tokenizer.encode(text, special=True)


@pytest.mark.parametrize(("text", "found"), [("a\ud800b", r"U\+D800 at character 1"), (b"a", "bytes"), (None, "None")])
@pytest.mark.parametrize("special", [True, False])
def test_what_is_no_text_is_refused(tokenizer, text, found, special) -> None:
    with pytest.raises(RequestError, match=f"^text: .*{found}"):
        tokenizer.encode(text, special=special)


def test_the_longest_special_token_wins(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    backend.add_special_tokens(["<|eot_id|>!", "<|eot_id|>!?"])
    backend.save(str(tmp_path / "tokenizer.json"))
    extended = Tokenizer.from_file(tmp_path / "tokenizer.json")
    for text in ("a<|eot_id|>!?b", "<|eot_id|>!b", "<|eot_id|>b", "<|eot_id|><|eot_id|>!!?"):
        assert extended.encode(text, special=True) == backend.encode(text, add_special_tokens=False).ids


def changed_source(change) -> str:
    parsed = json.loads((CHECKPOINT / "tokenizer.json").read_text(encoding="utf-8"))
    change(parsed)
    return json.dumps(parsed)


def rename(old: str, new: str):
    def change(parsed) -> None:
        next(token for token in parsed["added_tokens"] if token["content"] == old)["content"] = new

    return change


def flag(token_name: str, name: str, value: bool):
    def change(parsed) -> None:
        next(token for token in parsed["added_tokens"] if token["content"] == token_name)[name] = value

    return change


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "is not a tokenizer.json"),
        ("not JSON", "is not a tokenizer.json"),
        ("[]", "is not a tokenizer.json"),
        ("{}", "is not a tokenizer.json"),
        ((CHECKPOINT / "tokenizer.json").read_text(encoding="utf-8")[:-1000], "is not a tokenizer.json"),
        (changed_source(rename(IMAGE_TOKEN, "<|picture|>")), r"has no special token <\|image\|>"),
        (changed_source(flag(IMAGE_TOKEN, "special", False)), r"has no special token <\|image\|>"),
        (changed_source(rename(BOS_TOKEN, "<s>")), r"has no special token <\|begin_of_text\|>"),
        (changed_source(flag("<|eot_id|>", "rstrip", True)), r"<\|eot_id\|> swallows its surroundings"),
    ],
)
def test_faulty_files_are_named(tmp_path: Path, source: str, message: str) -> None:
    path = tmp_path / "größe tokenizer.json"
    path.write_text(source, encoding="utf-8")
    with pytest.raises(BundleError, match=message) as caught:
        Tokenizer.from_file(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"\xff\xfe{}")
    for path in (tmp_path / "missing.json", tmp_path, tmp_path / "latin"):
        with pytest.raises(BundleError, match="cannot be read") as caught:
            Tokenizer.from_file(path)
        assert str(caught.value).startswith(f"{path}: ")
