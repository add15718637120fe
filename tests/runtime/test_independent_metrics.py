"""Metrics and intervals against independent statements of the official rules, and where they differ from them.

test_evaluation_metrics.py and test_evaluation_intervals.py have the first judge: values worked out by hand.
"""

from __future__ import annotations

import hashlib
import random
from fractions import Fraction
from functools import cache
from itertools import combinations
from statistics import NormalDist

import numpy as np
import pytest
from mllama_runtime.evaluation import vqa
from mllama_runtime.evaluation.choice import chosen_letter
from mllama_runtime.evaluation.intervals import bootstrap_interval, paired_interval, wilson_interval
from mllama_runtime.evaluation.metrics import anls, edit_distance, relaxed
from mllama_runtime.evaluation.vqa import vqa_accuracy, vqa_normal
from scipy import stats

# VQA: vqaEval.py of https://github.com/GT-Vision-Lab/VQA at a013f00

SPELLED = {"none": 0, "zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5}
SPELLED |= {"six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10}
WORDS = """
    the a an The dog cat yes Yes no none two ten Ten seven dont don't its it's couldnt've whos y'all'd've somebody'd
    3.5 1,000 1,000.50 a.m. U.S. t-shirt dog/cat ... . , ?! (x) [y] {z} #1 50% $5 & ; : ' " _ `
"""
PIECES = WORDS.split()


def pieced(rng: random.Random) -> str:
    return "".join(rng.choice(PIECES) + rng.choice([" ", " ", "", "  ", "-", ","]) for _ in range(rng.randint(0, 5)))


def official_normal(text: str, contractions: dict[str, str]) -> str:
    """One character at a time. A mark is dropped where the whole text holds it beside a blank anywhere, or holds a
    digit, a comma and a digit in a row; otherwise it is a blank. A full stop stays before a digit only.
    """
    triples = zip(text, text[1:], text[2:], strict=False)
    all_vanish = any(a.isdecimal() and b == "," and c.isdecimal() for a, b, c in triples)
    written = []
    for letter in text:
        if letter in '!"()+,-/;<=>?@[\\]_`{}':
            letter = "" if all_vanish or f" {letter}" in text or f"{letter} " in text else " "
        written.append(letter)
    text, words = "".join(written), []
    text = "".join(x for x, after in zip(text, f"{text} "[1:], strict=True) if x != "." or after.isdecimal())
    for word in text.lower().split():
        word = str(SPELLED.get(word, word))
        if word not in ("a", "an", "the"):
            words.append(contractions.get(word, word))
    return " ".join(words)


def test_contractions_are_those_of_the_official_table() -> None:
    """Its 120 entries, without the six that change nothing or have a capital and so are never met."""
    lines = sorted(f"{written} {meant}\n" for written, meant in vqa._CONTRACTIONS.items())
    assert len(lines) == 114
    digest = hashlib.sha256("".join(lines).encode()).hexdigest()
    assert digest == "9964fa088ea25444d53dcc210a2d8394a798ac129e4dc1c0411f29e1d7d3d99a"


def test_normal_texts_are_those_of_the_official_rules() -> None:
    rng = random.Random(0)
    for _ in range(3000):
        text = pieced(rng).strip()
        assert vqa_normal(text) == official_normal(text, vqa._CONTRACTIONS), text


def official_accuracy(answer: str, people: list[str]) -> Fraction:
    """The mean over every nine of the ten of min(matches / 3, 1); ten equal answers are compared as they are."""
    if len(set(people)) > 1:
        answer = official_normal(answer, vqa._CONTRACTIONS)
        people = [official_normal(each, vqa._CONTRACTIONS) for each in people]
    nines = [min(Fraction(nine.count(answer), 3), Fraction(1)) for nine in combinations(people, 9)]
    return sum(nines, Fraction(0)) / 10


def test_accuracies_are_those_of_the_official_rules() -> None:
    pool = ["yes", "no", "two dogs", "2 dogs", "a dog", "dog", "dogs.", "dont", "don't", "t-shirt"]
    rng, scores = random.Random(1), set()
    for _ in range(1500):
        some = rng.sample(pool, rng.randint(1, 4))
        people = [rng.choice(some) for _ in range(10)]
        answer = rng.choice(some if rng.random() < 0.8 else pool)
        expected = official_accuracy(answer, people)
        assert vqa_accuracy(answer, people) == pytest.approx(float(expected), abs=1e-12), (answer, people)
        scores.add(expected)
    assert scores == {Fraction(n, 10) for n in (0, 3, 6, 9, 10)}


def test_where_vqa_accuracy_is_not_the_official_one() -> None:
    """Where all ten agree, case counts in vqaEval.py, although nothing else makes a capital wrong there."""
    assert official_accuracy("Yes", ["yes"] * 10) == 0
    assert vqa_accuracy("Yes", ["yes"] * 10) == 1
    assert official_accuracy("Yes", ["yes"] * 9 + ["no"]) == 1


# ANLS: the script of https://rrc.cvc.uab.es/?ch=17


@cache
def distance(first: str, second: str) -> int:
    """Levenshtein's recursion."""
    if not first or not second:
        return len(first) + len(second)
    if first[0] == second[0]:
        return distance(first[1:], second[1:])
    return 1 + min(distance(first[1:], second), distance(first, second[1:]), distance(first[1:], second[1:]))


def official_anls(answer: str, accepted: list[str]) -> float:
    """The smallest of distance / length; the distance is of lower case with single blanks, the length is not."""
    found = []
    for other in accepted:
        edits = distance(" ".join(answer.lower().split()), " ".join(other.lower().split()))
        longer = max(len(answer.upper()), len(other.upper()))
        found.append(edits / longer if longer else 0.0)
    return 1 - min(found) if 1 - min(found) >= 0.5 else 0.0


def word(rng: random.Random, size: int) -> str:
    return "".join(rng.choice("abcAB3é") for _ in range(rng.randint(0, size)))


def test_anls_is_the_official_one() -> None:
    rng, scores = random.Random(2), set()
    for _ in range(2000):
        expected = " ".join(filter(None, (word(rng, 4), word(rng, 4))))
        answer = "".join(x if rng.random() < 0.8 else word(rng, 1) for x in expected).strip().replace("  ", " ")
        accepted = [expected, *(word(rng, 6) for _ in range(rng.randint(0, 2)))]
        score = anls(answer, accepted)
        assert score == pytest.approx(official_anls(answer, accepted), abs=1e-12), (answer, accepted)
        scores.add(round(score, 2))
        assert edit_distance(answer, expected) == distance(answer, expected)
    assert len(scores) > 10
    assert {0, 0.5, 1} < scores


def test_where_anls_is_not_the_official_one() -> None:
    """The script drops surplus blanks before it counts edits, and counts them in the length."""
    assert official_anls("ab \n", ["ac"]) == 0.75
    assert anls("ab \n", ["ac"]) == anls("ab", ["ac"]) == official_anls("ab", ["ac"]) == 0.5


# Relaxed accuracy


def number(text: str) -> Fraction | None:
    share = text.endswith("%")
    try:
        return Fraction(text.removesuffix("%")) / (100 if share else 1)
    except ValueError:
        return None


def usual_relaxed(answer: str, accepted: str) -> bool:
    """relaxed_correctness of pix2struct, which evaluation suites carry on, in exact numbers."""
    found, expected = number(answer), number(accepted)
    if found is None or not expected:
        return answer.lower() == accepted.lower()
    return abs(found - expected) / abs(expected) <= Fraction(1, 20)


def test_relaxed_accuracy_is_the_usual_one() -> None:
    rng, num_right = random.Random(3), 0
    for _ in range(3000):
        truth = Fraction(rng.choice([rng.randint(1, 3000), rng.randint(-500, 500) or 1]), 10 ** rng.randint(0, 2))
        answer = truth * Fraction(rng.randint(90, 110), 100) + Fraction(rng.randint(0, 1), 1000)  # 95% and 105% too
        texts = [f"{float(x):.10f}".rstrip("0") for x in (answer, truth)]
        texts = [f"{text}{rng.choice(['', '', '%'])}" for text in texts]
        if rng.random() < 0.1:
            texts[rng.randint(0, 1)] = rng.choice(["Yes", "yes", "n/a", "3 of 4"])
        expected, gap = usual_relaxed(*texts), number(texts[0])
        if gap is not None and number(texts[1]) and abs(gap / number(texts[1]) - 1) == Fraction(1, 20):
            continue  # floats round to either side
        assert relaxed(texts[0], [texts[1]]) == expected, texts
        num_right += expected
    assert 500 < num_right < 2500


def test_where_relaxed_accuracy_is_not_the_usual_one() -> None:
    for answer, accepted in (("1,234", "1234"), ("0.0", "0")):
        assert relaxed(answer, [accepted])
        assert not usual_relaxed(answer, accepted)
    for answer, accepted in (("1e3", "1000"), ("52 %", "52%")):  # what float() reads
        assert not relaxed(answer, [accepted])
        assert usual_relaxed(answer, accepted)


# Multiple choice: parse_multi_choice_response of https://github.com/MMMU-Benchmark/MMMU

OPTIONS = ("Paris", "London", "Rome", "an ox")


def official_letter(answer: str) -> str | None:
    """The last letter in brackets, or else between blanks, or else the last option named in more than five words."""
    text = f" {answer.strip(',.!?;:' + chr(39))} "
    for form in ("({})", " {} "):
        places = {text.rfind(form.format(letter)): letter for letter in "ABCD"}
        if max(places) >= 0:
            return places[max(places)]
    if len(text.split()) <= 5:
        return None
    places = {text.lower().rfind(option.lower()): letter for letter, option in zip("ABCD", OPTIONS, strict=True)}
    return places[max(places)] if max(places) >= 0 else None


@pytest.mark.parametrize(
    "form",
    [
        "{0}",
        "{0}.",
        "({0})",
        "({0}).",
        "({0}) {1}",
        "{0} {1}",
        "The answer is {0}",
        "The answer is ({0}).",
        "The correct answer is: ({0})",
        "Answer: {0}",
        "I first thought of ({2}), but it is ({0}).",
        "Both ({2}) and ({0})",
        "I choose {0}",
        "Option {0}",
        "It must be {0}.",
        "It is not {2} but {0}",
        "The city in the picture is {1} of course",
        "Not {3} but in the end of all {1} I say",
    ],
)
def test_plain_answers_choose_what_they_choose_in_mmmu(form: str) -> None:
    for letter, option in zip("ABCD", OPTIONS, strict=True):
        for other, another in zip("ABCD", OPTIONS, strict=True):
            if other != letter:
                answer = form.format(letter, option, other, another)
                assert chosen_letter(answer, OPTIONS) == official_letter(answer) == letter, answer


# Intervals


@pytest.mark.parametrize("total", [1, 2, 7, 60, 2000])
def test_wilson_is_scipys_and_solves_its_equation(total: int) -> None:
    for num_right in sorted({0, 1, total // 3, total - 1, total}):
        found = wilson_interval(num_right, total)
        expected = stats.binomtest(num_right, total).proportion_ci(0.95, method="wilson")
        assert found == pytest.approx(tuple(expected), abs=2e-5)  # 1.96 beside 1.959964
        for end in found:
            off = (num_right / total - end) ** 2
            assert off == pytest.approx(1.96**2 * end * (1 - end) / total, abs=1e-12)
    assert NormalDist().inv_cdf(0.975) == pytest.approx(1.96, abs=5e-5)


def test_bootstrap_intervals_are_scipys() -> None:
    """Another generator and 10,000 other resamples: ends within a twentieth of the interval, or a step of the mean."""
    rng = np.random.default_rng(4)
    scores = rng.choice([0.0, 0.3, 0.6, 0.9, 1.0], 150, p=[0.2, 0.1, 0.1, 0.1, 0.5])
    baseline = np.where(rng.random(150) < 0.8, scores, rng.choice([0.0, 1.0], 150))
    change = paired_interval(scores, baseline)
    for found, values in (
        (bootstrap_interval(scores), scores),
        ((change.low, change.high), scores - baseline),
    ):
        drawn = stats.bootstrap((values,), np.mean, n_resamples=10_000, method="percentile", rng=5).confidence_interval
        width = drawn.high - drawn.low
        assert found == pytest.approx((drawn.low, drawn.high), abs=width / 20)
