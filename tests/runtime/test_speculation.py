"""Drafts from the text itself: the same answers in fewer steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from bench.speculation import answer, is_copying, requests
from hypothesis import given
from hypothesis import strategies as st
from mllama_runtime import Engine, Request, SamplingParams, UsageError
from mllama_runtime.evaluation.questions import task_from_jsonl
from mllama_runtime.speculation import Lookup


def slow_draft(token_ids: list[int], max_tokens: int) -> list[int]:
    """The same by search, from the end backwards."""
    for length in (4, 3, 2):
        end = token_ids[-length:]
        for start in range(len(token_ids) - length - 1, -1, -1):
            if len(end) == length and token_ids[start : start + length] == end:
                return token_ids[start + length : start + length + max_tokens]
    return []


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(0, 40), st.integers(1, 9))
def test_a_draft_is_what_a_search_finds(token_ids: list[int], cut: int, max_tokens: int) -> None:
    text = Lookup()
    text.extend(token_ids[:cut])
    text.extend(token_ids[cut:])
    assert len(text) == len(token_ids)
    assert list(text.draft(max_tokens)) == slow_draft(token_ids, max_tokens)


def test_an_old_text_is_continued() -> None:
    text = Lookup()
    text.extend([1, 2, 3, 4, 5, 6, 9, 9, 3, 4])
    assert text.draft(3) == [5, 6, 9]
    text.extend([7])
    assert text.draft(3) == ()


def test_the_same_answers_in_fewer_steps(bundle_of: Callable[..., Path], questions_of: Callable[..., Path]) -> None:
    task = task_from_jsonl(questions_of("held_out", 250))
    asked = requests(task.questions)
    assert len(asked) == 500
    with (
        Engine.load(bundle_of(), backend="cpu", num_threads=1) as plain,
        Engine.load(bundle_of(), backend="cpu", num_threads=1, speculate=8) as drafting,
    ):
        expected, found = ([answer(engine, request)[:3] for request in asked] for engine in (plain, drafting))
    assert [each[:2] for each in found] == [each[:2] for each in expected]
    plain_steps, drafted_steps = ([num_steps for _, _, num_steps in each] for each in (expected, found))
    assert plain_steps == [len(token_ids) - 1 for token_ids, _, _ in expected]
    assert all(after <= before for before, after in zip(plain_steps, drafted_steps, strict=True))
    copying = [index for index, request in enumerate(asked) if is_copying(request)]
    assert sum(drafted_steps[index] for index in copying) < 0.6 * sum(plain_steps[index] for index in copying)


def test_rows_together_are_not_drafted(bundle_of: Callable[..., Path]) -> None:
    sampling = SamplingParams(max_new_tokens=12, min_new_tokens=12)
    asked = [Request("Hello", sampling=sampling), Request("What comes after six?", sampling=sampling)]
    with (
        Engine.load(bundle_of(), num_threads=1, speculate=8) as engine,
        Engine.load(bundle_of(), num_threads=1) as plain,
    ):
        found = [answer.token_ids for answer in engine.generate_batch(asked)]
        assert found == [answer.token_ids for answer in plain.generate_batch(asked)]


@pytest.mark.parametrize("length", [-1, 16])
def test_a_draft_too_long_is_refused(bundle_of: Callable[..., Path], length: int) -> None:
    with pytest.raises(UsageError, match="speculate: not a draft's length: expected 0 to 15"):
        Engine.load(bundle_of(), speculate=length)
