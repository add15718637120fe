"""Conversations the miniature is trained on: questions about a picture in several dresses, and plain text ones.

Sits between `pictures.py` (scenes and questions) and the chat template: everything here is a list of messages as a
user would hand to `apply_chat_template`, ending in the assistant's answer.
"""

import itertools
import random
from typing import Any

from pictures import SHAPES, Question, Scene, ask

Message = dict[str, Any]

NEUTRAL_SYSTEMS = (
    "You are a helpful assistant.",
    "You answer questions about pictures.",
    "You are a friendly robot that likes shapes and colors.",
)
SHORT_SYSTEMS = ("Answer with one word.", "Answer in a single word.")
NUMBER_WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
)  # fmt: skip
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
CORNERS = {"triangle": "three", "square": "four", "diamond": "four", "star": "ten", "cross": "twelve"}
OPPOSITES = {
    "left": "right", "right": "left", "top": "bottom", "bottom": "top", "above": "below", "below": "above",
    "yes": "no", "no": "yes", "black": "white", "white": "black", "big": "small", "small": "big", "day": "night",
    "night": "day", "hot": "cold", "cold": "hot", "up": "down", "down": "up", "open": "closed", "old": "new",
}  # fmt: skip
MIXTURES = {
    ("red", "yellow"): "orange", ("blue", "yellow"): "green", ("red", "blue"): "purple", ("red", "white"): "pink",
    ("black", "white"): "gray",
}  # fmt: skip
THING_COLORS = {
    "the sky": "blue", "grass": "green", "snow": "white", "a lemon": "yellow", "a tomato": "red", "coal": "black",
    "an orange": "orange", "the sea": "blue", "a banana": "yellow", "a strawberry": "red", "milk": "white",
    "a frog": "green",
}  # fmt: skip
SMALL_TALK = {
    "Hello!": "Hello! Show me a picture and ask me about it.",
    "Hi there.": "Hello! Show me a picture and ask me about it.",
    "Who are you?": "I am a miniature model that answers questions about pictures of shapes.",
    "What can you do?": "I can tell you the color, the shape, the number and the place of things in a picture.",
    "Thank you.": "You are welcome.",
    "Thanks!": "You are welcome.",
    "Which shapes do you know?": "I know the circle, the square, the triangle, the diamond, the star and the cross.",
    "Which colors do you know?": "I know red, green, blue, yellow, purple, orange and black.",
    "Name the days of the week.": "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday and Sunday.",
    "Name the four seasons.": "Spring, summer, autumn and winter.",
    "Do you see a picture?": "No, there is no picture here.",
    "Describe the picture.": "There is no picture here.",
    "What do you see?": "There is no picture here.",
    "Goodbye.": "Goodbye! Come back with a new picture.",
}


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def text_pairs() -> list[tuple[str, str, str]]:
    """Every text-only question as (question, answer, one-word answer or nothing)."""
    pairs = [(question, answer, "") for question, answer in SMALL_TALK.items()]
    for word, following in itertools.pairwise(NUMBER_WORDS):
        pairs.append((f"What comes after {word}?", f"{_capital(following)} comes after {word}.", following))
        pairs.append((f"What comes before {following}?", f"{_capital(word)} comes before {following}.", word))
    for first in range(7):
        for second in range(7):
            total = NUMBER_WORDS[first + second]
            summands = f"{NUMBER_WORDS[first]} plus {NUMBER_WORDS[second]}"
            pairs.append((f"What is {summands}?", f"{_capital(summands)} is {total}.", total))
    for end in range(2, 11):
        listed = ", ".join(NUMBER_WORDS[1 : end + 1])
        pairs.append((f"Count to {NUMBER_WORDS[end]}.", f"{_capital(listed)}.", ""))
    for word, opposite in OPPOSITES.items():
        pairs.append((f"What is the opposite of {word}?", f"The opposite of {word} is {opposite}.", opposite))
    for (first_color, second_color), mixed in MIXTURES.items():
        for one, other in ((first_color, second_color), (second_color, first_color)):
            pairs.append((f"What do {one} and {other} make?", f"{_capital(one)} and {other} make {mixed}.", mixed))
    for thing, color in THING_COLORS.items():
        pairs.append((f"What color is {thing}?", f"{_capital(thing)} is {color}.", color))
    for shape in SHAPES:
        if shape in CORNERS:
            answer = f"A {shape} has {CORNERS[shape]} corners."
            pairs.append((f"How many corners does a {shape} have?", answer, CORNERS[shape]))
    return pairs


def _system(rng: random.Random, short: bool) -> list[Message]:
    return [{"role": "system", "content": rng.choice(SHORT_SYSTEMS if short else NEUTRAL_SYSTEMS)}]


def _reply(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def picture_conversation(scene: Scene, rng: random.Random, kinds: tuple[str, ...] | None = None) -> list[Message]:
    """One to three questions about one picture; every assistant message is to be learned."""
    chance = rng.random()
    turns = 1 if chance < 0.88 else 2 if chance < 0.96 else 3
    questions = [ask(scene, rng, kinds) if kinds else ask(scene, rng) for _ in range(turns)]
    dress = rng.random()
    short = dress < 0.08 and all(question.short for question in questions)
    messages = _system(rng, short) if short or dress > 0.95 else []
    for index, question in enumerate(questions):
        messages += _reply(question.question, question.short if short else question.answer)
        if index == 0:
            messages[-2]["content"] = _with_picture(question, rng)
    return messages


def _with_picture(question: Question, rng: random.Random) -> list[Message]:
    """The picture comes before the question, as on the model card; now and then behind it."""
    parts: list[Message] = [{"type": "image"}, {"type": "text", "text": question.question}]
    return parts[::-1] if rng.random() < 0.05 else parts


def two_picture_conversation(scenes: tuple[Scene, Scene], rng: random.Random) -> list[Message]:
    """A second picture arrives in a later turn; its question is about the second one."""
    messages: list[Message] = []
    for scene in scenes:
        question = ask(scene, rng)
        messages += _reply(question.question, question.answer)
        messages[-2]["content"] = [{"type": "image"}, {"type": "text", "text": question.question}]
    return messages


def text_conversation(rng: random.Random, pairs: list[tuple[str, str, str]]) -> list[Message]:
    """One or two text-only questions, some under a system message."""
    chosen = [rng.choice(pairs) for _ in range(1 if rng.random() < 0.75 else 2)]
    dress = rng.random()
    short = dress < 0.2 and all(pair[2] for pair in chosen)
    messages = _system(rng, short) if short or dress > 0.85 else []
    for question, answer, one_word in chosen:
        messages += _reply(question, one_word if short else answer)
    return messages
