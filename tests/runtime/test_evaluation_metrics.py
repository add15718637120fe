"""Metrics against values worked out by hand from the papers' and the official evaluations' definitions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mllama_runtime.errors import InputError
from mllama_runtime.evaluation.choice import chosen_letter
from mllama_runtime.evaluation.metrics import (
    METRIC_NAMES,
    MetricName,
    anls,
    default_metric,
    edit_distance,
    exact,
    metric_of,
    relaxed,
)
from mllama_runtime.evaluation.questions import Question
from mllama_runtime.evaluation.vqa import vqa_accuracy, vqa_normal

TEXTS = st.text(max_size=12)
WORDS = st.text(alphabet="abA .,'?-1234%", max_size=12)


@pytest.mark.parametrize(
    ("answer", "accepted", "score"),
    [
        (" The Cat\n", ["the cat"], 1),
        ("STRASSE", ["straße"], 1),
        ("the cat.", ["the cat"], 0),
        ("b", ["a", "B"], 1),
    ],
)
def test_exact(answer: str, accepted: list[str], score: float) -> None:
    assert exact(answer, accepted) == score


@pytest.mark.parametrize(
    ("answer", "accepted", "score"),
    [
        ("95", "100", 1),  # 5% off, and that is still right
        ("94.9", "100", 0),
        ("105", "100", 1),
        ("105.1", "100", 0),
        ("-95", "-100", 1),
        ("95", "-100", 0),
        ("1,234", "1234", 1),
        ("1,234,567.5", "1200000", 1),
        ("12,34", "1234", 0),  # no thousands
        ("52%", "0.5", 1),  # 0.52 is 4% off
        ("52%", "52", 0),
        ("52%", "54 %", 0),  # a blank: no number, and not the same text
        ("52%", "54%", 1),
        ("0", "0.0", 1),
        ("0.001", "0", 0),  # 5% of nothing
        (".5", "0.5", 1),
        ("3.", "3", 1),
        ("Yes", "yes", 1),
        ("Yes, 3", "3", 0),
        ("2014", "2010", 1),  # years count as numbers, as in the usual implementations
        ("nan", "nan", 1),  # words
        ("nan", "1", 0),
        ("1_0", "10", 0),
        ("٣", "3", 0),  # the digit of another script
        ("9" * 400, "9" * 400, 1),  # beyond a float
        ("9" * 400, "1", 0),
    ],
)
def test_relaxed(answer: str, accepted: str, score: float) -> None:
    assert relaxed(answer, [accepted]) == score
    assert relaxed(answer, ["something else", accepted]) == score


@pytest.mark.parametrize(
    ("first", "second", "distance"),
    [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "abc", 0), ("flaw", "lawn", 2), ("ab", "ba", 2)],
)
def test_edit_distance(first: str, second: str, distance: int) -> None:
    assert edit_distance(first, second) == distance


@given(TEXTS, TEXTS, TEXTS)
def test_edit_distance_is_a_metric(first: str, second: str, third: str) -> None:
    distance = edit_distance(first, second)
    assert distance == edit_distance(second, first)
    assert (distance == 0) == (first == second)
    assert abs(len(first) - len(second)) <= distance <= max(len(first), len(second))
    assert distance <= edit_distance(first, third) + edit_distance(third, second)


@pytest.mark.parametrize(
    ("answer", "accepted", "score"),
    [
        ("ITC Limited", ["itc limited", "ITC"], 1),
        ("sitting", ["kitten"], 1 - 3 / 7),
        ("sitting", ["kitten", "sitting."], 1 - 1 / 8),  # the best of those accepted
        ("ab", ["ac"], 0.5),  # the threshold itself
        ("abc", ["abxyz"], 0),  # 1 - 3/5 = 0.4
        ("a  b\nc", ["A b c"], 1),
        ("", ["abc"], 0),
        ("a very long answer that says it at last: 12", ["12"], 0),
    ],
)
def test_anls(answer: str, accepted: list[str], score: float) -> None:
    assert anls(answer, accepted) == pytest.approx(score, abs=1e-12)


@given(WORDS, WORDS)
def test_anls_is_symmetric_and_zero_or_at_least_a_half(first: str, second: str) -> None:
    score = anls(first, [second])
    assert score == anls(second, [first])
    assert score == 0 or 0.5 <= score <= 1
    assert anls(first, [second, first]) == 1


@pytest.mark.parametrize(("num_equal", "score"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (9, 1), (10, 1)])
def test_vqa_accuracy_by_the_number_of_people(num_equal: int, score: float) -> None:
    """With m of ten equal: m of ten leave m-1 others, so (m min((m-1)/3, 1) + (10-m) min(m/3, 1)) / 10."""
    people = ["yes"] * num_equal + ["no"] * (10 - num_equal)
    assert vqa_accuracy("Yes", people) == pytest.approx(score, abs=1e-12)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Dog", "dog"),
        ("a man, a plan", "man plan"),  # the comma is next to a blank
        ("black,white", "black white"),
        ("1,000", "1000"),
        ("1,000-foot", "1000foot"),  # with a comma in a number every mark vanishes
        ("two", "2"),
        ("none", "0"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldntve", "couldntve"),  # both apostrophes forgotten: not in the official table
        ("somebody'd", "somebodyd"),  # as the official table has it
        ("St. Louis.", "st louis"),
        ("3.5", "3.5"),
        ("what?!", "what"),
        ("t-shirt", "t shirt"),
        ("on\tit", "on it"),
    ],
)
def test_vqa_normal(text: str, normal: str) -> None:
    assert vqa_normal(text) == normal


def test_vqa_answers_are_normalised_unless_all_people_agree() -> None:
    assert vqa_accuracy("2 dogs", ["two dogs"] * 9 + ["dogs"]) == 1
    assert vqa_accuracy("2 dogs", ["two dogs"] * 10) == 0
    assert vqa_accuracy(" TWO dogs\n", ["two dogs"] * 10) == 1


OPTIONS = ("Paris", "London", "New London", "an ox")


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("A", "A"),
        ("b", "B"),
        ("(C)", "C"),
        ("**D**", "D"),
        ("B.", "B"),
        ("B. London", "B"),
        ("B) because of the river", "B"),
        ("C\nNew London", "C"),
        ("The answer is A.", "A"),
        ("the correct answer is: (C)", "C"),
        ("**Answer:** D", "D"),
        ("The best option is option B", "B"),
        ("Not A. The answer is B, as (A) is wrong.", "B"),
        ("First the answer is A. But no, the answer is C.", "C"),
        ("It could be (A), but I take (D).", "D"),
        ("London", "B"),
        ("new london.", "C"),
        ("The city is New London.", "C"),
        ("Not Paris but London", "B"),
        ("The answer is Paris", "A"),
        ("An ox stands there", "D"),
        ("I think B is right", "B"),
        ("A boat", None),  # an article
        ('It is A "boat"', None),
        ("I choose A. The others are too small.", "A"),
        ("Not B but A", "A"),
        ("My choice: A, a boat", "A"),
        ("E", None),  # there is no fifth option
        ("I'm sure", None),
        ("Londonderry", None),
        ("D'accord", None),
        ("", None),
    ],
)
def test_chosen_letter(answer: str, letter: str | None) -> None:
    assert chosen_letter(answer, OPTIONS) == letter


def test_letters_and_texts_of_options_that_look_alike() -> None:
    assert chosen_letter("E. coli", ("C. elegans", "E. coli", "x", "y", "z")) == "B"
    assert chosen_letter("A", ("B", "A")) == "A"  # the letter is what the prompt asks for
    assert chosen_letter("5", ("5", "15")) == "A"
    assert chosen_letter("It is 15", ("5", "15")) == "B"


@given(st.text(max_size=30), st.lists(st.text(min_size=1, max_size=5).filter(str.strip), min_size=2, max_size=26))
def test_any_answer_means_an_option_or_none(answer: str, options: list[str]) -> None:
    letter = chosen_letter(answer, options)
    assert letter is None or 0 <= ord(letter) - ord("A") < len(options)


def question(metric: MetricName, accepted: list[str]) -> Question:
    if metric == "choice":
        return Question("q", "Which?", ("B",), options=OPTIONS)
    return Question("q", "What?", tuple(accepted * 10) if metric == "vqa" else tuple(accepted))


@given(st.sampled_from(METRIC_NAMES), WORDS, WORDS)
def test_scores_are_from_0_to_1_and_the_accepted_answer_is_right(
    metric: MetricName, answer: str, accepted: str
) -> None:
    each = question(metric, [accepted])
    score = metric_of(metric, [each])
    assert 0 <= score(answer, each) <= 1
    assert score(each.answers[0], each) == 1


@pytest.mark.parametrize(
    ("metric", "each", "message"),
    [
        ("choice", Question("line 3", "Why?", ("So.",)), "line 3: has no options"),
        ("exact", Question("line 3", "Why?", ("A",), options=("a", "b")), "line 3: has options"),
        ("vqa", Question("line 3", "Why?", ("So.",) * 9), "answers of 10 people, found 9"),
    ],
)
def test_a_metric_refuses_questions_it_cannot_score(metric: MetricName, each: Question, message: str) -> None:
    with pytest.raises(InputError, match=message):
        metric_of(metric, [each])


def test_default_metric() -> None:
    open_question, choice = Question("1", "Why?", ("So.",)), Question("2", "Why?", ("A",), options=("a", "b"))
    assert default_metric([choice, choice]) == "choice"
    assert default_metric([choice, open_question]) == "exact"
