"""Which option a model's answer to a multiple choice means."""

from __future__ import annotations

import re
from collections.abc import Sequence
from string import ascii_uppercase

_OPEN, _CLOSE = r"[\s(\[{*_\"'`]*", r"(?![\w'\u2019])"  # no letter of "I'm"
_STATED = re.compile(
    rf"(?:\banswer|\b(?:correct|right|best) (?:option|choice))(?:\s+is)?\s*:?{_OPEN}(?:(?:option|choice)\s+{_OPEN})?"
    rf"((?-i:[A-Z])){_CLOSE}",
    re.IGNORECASE,
)
_ALONE = re.compile(r"\W*([A-Za-z])\W*")
_OPENING = re.compile(r"[(\[*\"'`]*([A-Z])(?:[)\].:,*]|\s*\n)")
_BRACKETED = re.compile(r"\(([A-Z])\)")
_ARTICLE = r"A(?=\s+\W*\w)"  # a word follows
_WORD = re.compile(rf"(?<![\w'\u2019])(?!{_ARTICLE})([A-Z])(?![\w'\u2019])")


def chosen_letter(answer: str, options: Sequence[str]) -> str | None:
    """The letter of the option that an answer means, or None where it means none.

    What is looked for, in this order: a statement ("The answer is (B)."), the last one if there are several; a letter
    alone; the text of an option alone; a letter that opens the answer ("B. a cat"); the last letter in brackets; the
    text of an option within the answer, the one that ends last and the longest of those; the last letter that stands
    as a word, "A" only where it cannot be an article.

    The evaluation of MMMU (https://arxiv.org/abs/2311.16502) draws an option by lot where it finds none; here that is
    a wrong answer, so that a score is the same every time.
    """
    text, letters = answer.strip(), ascii_uppercase[: len(options)]
    alone, opening = _ALONE.fullmatch(text), _OPENING.match(text)
    candidates = (
        _last(_STATED, text),
        alone and alone[1].upper(),
        _equal(text, options),
        opening and opening[1],
        _last(_BRACKETED, text),
        _named(text, options),
        _last(_WORD, text),
    )
    return next((letter for letter in candidates if letter and letter in letters), None)


def _last(pattern: re.Pattern[str], text: str) -> str | None:
    found = pattern.findall(text)
    return str(found[-1]) if found else None


def _equal(text: str, options: Sequence[str]) -> str | None:
    """The letter of the option whose text the answer is, but for case and a final full stop."""
    names = [_folded(option) for option in options]
    return ascii_uppercase[names.index(_folded(text))] if _folded(text) in names else None


def _named(text: str, options: Sequence[str]) -> str | None:
    """The letter of the option whose text ends last in the answer, as whole words; the longest of those."""
    ends = []
    for letter, option in zip(ascii_uppercase, options, strict=False):
        name = _folded(option)
        places = re.finditer(rf"(?<!\w){re.escape(name)}(?!\w)", text.casefold())
        ends += [(place.end(), len(name), letter) for place in places]
    return max(ends)[2] if ends else None


def _folded(text: str) -> str:
    return text.strip().casefold().removesuffix(".")
