"""VQA accuracy: an answer beside those of ten people, after the normalisation of the official evaluation.

Antol et al. 2015 (https://arxiv.org/abs/1505.00468) and Goyal et al. 2017 (https://arxiv.org/abs/1612.00837); the
rules and their oddities are those of vqaEval.py in https://github.com/GT-Vision-Lab/VQA, which the leaderboard ran.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

NUM_PEOPLE = 10
_ENOUGH = 3  # so many people with the same answer make it wholly right

_NUMBERS = {"none": "0"} | {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
}
_ARTICLES = frozenset(("a", "an", "the"))
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _contractions() -> dict[str, str]:
    """Every contraction with one of its apostrophes forgotten -> the contraction."""
    table = {
        word[:place] + word[place + 1 :]: word
        for word in _CONTRACTED.split()
        for place, letter in enumerate(word)
        if letter == "'"
    }
    return table | {"somebody'd": "somebodyd"}  # the official table has this one the wrong way round


_CONTRACTIONS = _contractions()


def vqa_accuracy(answer: str, people: Sequence[str]) -> float:
    """min(matches / 3, 1), averaged over the ways to leave one of the people out.

    So 0, 1, 2, 3, 4 equal answers of ten score 0, 0.3, 0.6, 0.9, 1. When all people agree to the letter, their answer
    and the model's are compared as they stand, but for case; otherwise both are normalised first.
    """
    answer, people = _one_line(answer), [_one_line(other) for other in people]
    if len(set(people)) > 1:
        answer, people = vqa_normal(answer), [vqa_normal(other) for other in people]
    matches = [other.lower() == answer.lower() for other in people]
    num_matches = sum(matches)
    return sum(min((num_matches - match) / _ENOUGH, 1.0) for match in matches) / len(people)


def vqa_normal(text: str) -> str:
    """Lower case; without articles and most punctuation; numbers up to ten in digits; apostrophes put back.

    A punctuation mark next to a space vanishes, and one within a word becomes a space; where the text holds a comma
    between digits, all of them vanish.
    """
    has_comma, kept = _COMMA_IN_NUMBER.search(text) is not None, text
    for mark in _PUNCTUATION:
        vanishes = has_comma or f"{mark} " in text or f" {mark}" in text
        kept = kept.replace(mark, "" if vanishes else " ")
    words = [_NUMBERS.get(word, word) for word in _FULL_STOP.sub("", kept).lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()
