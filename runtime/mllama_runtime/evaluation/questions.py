"""A file of questions with known answers, one JSON object a line; what every score begins with.

{"image": "a.png", "question": "What is this?", "answer": "a cat"}

`image` is a path relative to the file, or null for a question about no picture; `images` lists several instead.
`answers` lists every accepted answer instead of `answer`. `options` makes it a multiple choice. `id` (text or a whole
number, by default the line's number) and `group` (scored apart as well) may be left out.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase

from mllama_runtime.errors import InputError
from mllama_runtime.fields import Prose, load_json, parse, show

_OPTIONAL = ("image", "images", "answer", "answers", "options", "id", "group")
_BRACKETED = re.compile(r"\(([A-Z])\)")


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked and what counts as right.

    `answers` are as the file has them; of a multiple choice they are the letters of right options, "A" the first.
    """

    id: str
    text: str
    answers: tuple[str, ...]
    images: tuple[Path, ...] = ()
    options: tuple[str, ...] = ()
    group: str | None = None

    @property
    def prompt(self) -> str:
        """What the model is to read: the question, and below it an "A. ..." line for every option."""
        lines = [f"{letter}. {option}" for letter, option in zip(ascii_uppercase, self.options, strict=False)]
        return "\n".join([self.text, *lines])


@dataclass(frozen=True, slots=True)
class Task:
    """A file's questions; `name` is the file's, `sha256` that of its bytes (the pictures are not in it)."""

    name: str
    sha256: str
    questions: tuple[Question, ...]


@dataclass(frozen=True, slots=True)
class _Line:
    question: Prose
    image: str | None
    images: tuple[str, ...] | None
    answer: Prose | None
    answers: tuple[Prose, ...] | None
    options: tuple[Prose, ...] | None
    id: str | int | None
    group: str | None


def task_from_jsonl(path: Path, *, limit: int | None = None, with_answers: bool = True) -> Task:
    """Read a task, or its first `limit` questions; blank lines do not count. Without `with_answers` a line needs none.

    Raises:
        InputError: naming the file, the line and what is wrong with it. Pictures must be there; they are not decoded.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError("cannot be read", where=path, found=error.strerror) from error
    questions: dict[str, Question] = {}
    for number, line in enumerate(data.splitlines(), start=1):
        if not line.strip():
            continue
        if len(questions) == limit:
            break
        where = f"{path}, line {number}"
        question = _question(line, number, path.parent, where, with_answers)
        if question.id in questions:
            raise InputError("the id stands twice", where=where, found=show(question.id))
        questions[question.id] = question
    if not questions:
        raise InputError("holds no questions", where=path)
    return Task(path.name, hashlib.sha256(data).hexdigest(), tuple(questions.values()))


def _question(data: bytes, number: int, folder: Path, where: str, with_answers: bool) -> Question:
    value = load_json(data, where=where, error=InputError)
    if isinstance(value, dict):
        value = dict.fromkeys(_OPTIONAL) | value
    line = parse(_Line, value, where=where, error=InputError)
    if line.image is not None and line.images is not None:
        raise InputError("image and images exclude each other", where=where, hint="list all of them in images")
    has_answers = line.answer is not None or line.answers is not None
    if (with_answers and not has_answers) or (line.answer is not None and line.answers is not None):
        raise InputError("give either answer or answers", where=where)
    names = (line.image,) if line.image is not None else line.images or ()
    answers: tuple[str, ...] = (line.answer,) if line.answer is not None else line.answers or ()
    if not line.question.strip():
        raise InputError("the question is empty", where=where)
    if has_answers and not any(answer.strip() for answer in answers):
        raise InputError("the answer is empty", where=where)
    options = line.options or ()
    if line.options is not None and has_answers:
        answers = _letters(answers, options, where)
    return Question(
        id=f"line {number}" if line.id is None else str(line.id),
        text=line.question,
        answers=answers,
        images=tuple(_picture(folder / name, where) for name in names),
        options=options,
        group=line.group,
    )


def _picture(path: Path, where: str) -> Path:
    try:
        is_there = path.is_file()
    except OSError:  # a name too long for the file system, a folder closed to us
        is_there = False
    if not is_there:
        raise InputError("no such picture", where=where, found=path)
    return path


def _letters(answers: tuple[str, ...], options: tuple[str, ...], where: str) -> tuple[str, ...]:
    """The letters that the answers of a multiple choice stand for."""
    if not 2 <= len(options) <= len(ascii_uppercase):
        raise InputError("too few or too many", where=f"{where}: options", expected="2 to 26", found=len(options))
    if not all(option.strip() for option in options):
        raise InputError("one is empty", where=f"{where}: options")
    return tuple(_letter(answer.strip(), options, f"{where}: answer") for answer in answers)


def _letter(answer: str, options: tuple[str, ...], where: str) -> str:
    letters = ascii_uppercase[: len(options)]
    bracketed = _BRACKETED.fullmatch(answer)
    if bracketed and bracketed[1] in letters:
        return bracketed[1]
    texts = [option.strip().casefold() for option in options]
    meant = [
        letter for letter, text in zip(letters, texts, strict=True) if answer == letter or answer.casefold() == text
    ]
    if not meant:
        expected = f"a letter, A to {letters[-1]}, or the text of an option"
        raise InputError("no such option", where=where, expected=expected, found=show(answer))
    if len(meant) > 1:
        found, hint = f"{show(answer)}, which is {' and '.join(meant)}", 'write a letter in brackets, such as "(A)"'
        raise InputError("may mean more than one option", where=where, found=found, hint=hint)
    return meant[0]
