"""A task's file: every form of a line, and every mistake named by file and line."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mllama_runtime.errors import InputError
from mllama_runtime.evaluation.questions import Question, Task, task_from_jsonl

RIGHT = {"question": "Why?", "answer": "So."}


def written(folder: Path, *lines: object) -> Path:
    """A task of lines given as text or as what JSON makes of them; a.png and b.png lie beside it."""
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(b"pictures are looked at when they are asked about")
    path = folder / "task.jsonl"
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def test_every_form_of_a_line(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        {"image": "a.png", "question": "What\nis it?", "answer": "a cat"},
        "",
        {"image": None, "question": "Why?", "answers": ["So.", ""], "id": 7, "group": "why"},
        {"images": ["a.png", str(tmp_path / "b.png")], "question": "Same?", "answer": "no", "id": "x"},
        {"question": "Which?", "options": ["red", "a\tb"], "answer": "RED "},
    )
    a, b = tmp_path / "a.png", tmp_path / "b.png"
    assert task_from_jsonl(path) == Task(
        "task.jsonl",
        hashlib.sha256(path.read_bytes()).hexdigest(),
        (
            Question("line 1", "What\nis it?", ("a cat",), (a,)),
            Question("7", "Why?", ("So.", ""), group="why"),
            Question("x", "Same?", ("no",), (a, b)),
            Question("line 5", "Which?", ("A",), options=("red", "a\tb")),
        ),
    )
    assert task_from_jsonl(path).questions[-1].prompt == "Which?\nA. red\nB. a\tb"
    assert task_from_jsonl(path).questions[0].prompt == "What\nis it?"


def test_a_limit_reads_no_further(tmp_path: Path) -> None:
    path = written(tmp_path, RIGHT, RIGHT, "not a question")
    limited = task_from_jsonl(path, limit=2)
    assert len(limited.questions) == 2
    assert limited.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("options", "answer", "letters"),
    [
        (["red", "blue"], "B", ("B",)),
        (["red", "blue"], "(B)", ("B",)),
        (["red", "blue"], " Blue", ("B",)),
        (["B", "A"], "(A)", ("A",)),
        (["A", "B"], "A", ("A",)),  # letter and text of the same option
        (["b", "c"], "c", ("B",)),  # a small letter is no letter of an option
        (["(A)", "x"], "(A)", ("A",)),
        (["red", "red"], "B", ("B",)),
    ],
)
def test_answers_of_a_multiple_choice(
    options: list[str], answer: str, letters: tuple[str, ...], tmp_path: Path
) -> None:
    path = written(tmp_path, {"question": "Which?", "options": options, "answer": answer})
    assert task_from_jsonl(path).questions[0].answers == letters


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "wrong type: expected an object, found a list"),
        ("\ufeff{}", "not JSON"),
        ('{"question": "a", "question": "b"}', "a key stands twice"),
        ({"answer": "So."}, "question: the field is missing"),
        ({"question": "Why?"}, "give either answer or answers"),
        ({**RIGHT, "answers": ["So."]}, "give either answer or answers"),
        ({"question": "Why?", "answers": []}, "the answer is empty"),
        ({"question": "Why?", "answer": " "}, "the answer is empty"),
        ({"question": "\n", "answer": "So."}, "the question is empty"),
        ({**RIGHT, "question": 3}, "question: wrong type"),
        ({**RIGHT, "question": "\ud800"}, "question: the string holds half a character"),
        ({**RIGHT, "answer": 3}, "answer: wrong type: expected a string or null, found 3"),
        ({**RIGHT, "id": 1.5}, "id: wrong type"),
        ({**RIGHT, "picture": "a.png"}, "picture: the field is unknown"),
        ({**RIGHT, "image": "absent.png"}, "no such picture: found .*absent.png"),
        ({**RIGHT, "image": "."}, "no such picture"),
        ({**RIGHT, "image": "x" * 5000}, "no such picture"),
        ({**RIGHT, "image": "http://example.com/a.png"}, "no such picture"),
        ({**RIGHT, "image": "a\u0000.png"}, "image: the string holds control characters"),
        ({**RIGHT, "image": "a.png", "images": ["b.png"]}, "image and images exclude each other"),
        ({**RIGHT, "images": "a.png"}, r"images: wrong type: expected a list or null"),
        ({**RIGHT, "options": ["So.", "No."], "answer": "C"}, "no such option: expected a letter, A to B, or the text"),
        ({**RIGHT, "options": ["So.", "No."], "answer": "(C)"}, "no such option"),
        ({**RIGHT, "options": ["B", "A"], "answer": "A"}, r"more than one option: found 'A', which is A and B; write"),
        ({**RIGHT, "options": ["So.", "so."]}, "more than one option"),
        ({**RIGHT, "options": ["So."]}, "options: too few or too many: expected 2 to 26, found 1"),
        ({**RIGHT, "options": ["So."] * 27}, "options: too few or too many"),
        ({**RIGHT, "options": ["So.", " "]}, "options: one is empty"),
    ],
)
def test_a_wrong_line_is_named(line: object, message: str, tmp_path: Path) -> None:
    path = written(tmp_path, RIGHT, line)
    with pytest.raises(InputError, match=f"task.jsonl, line 2.*{message}") as caught:
        task_from_jsonl(path)
    assert caught.value.exit_code == 3


def test_ids_stand_once(tmp_path: Path) -> None:
    path = written(tmp_path, {**RIGHT, "id": 3}, {**RIGHT, "id": "3"})
    with pytest.raises(InputError, match="line 2: the id stands twice: found '3'"):
        task_from_jsonl(path)


def test_a_file_without_questions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no questions"):
        task_from_jsonl(written(tmp_path, "", "  "))
    with pytest.raises(InputError, match=r"absent\.jsonl: cannot be read: found No such file"):
        task_from_jsonl(tmp_path / "absent.jsonl")
    with pytest.raises(InputError, match="cannot be read: found Is a directory"):
        task_from_jsonl(tmp_path)


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(data)
    with pytest.raises(InputError):
        task_from_jsonl(path)
