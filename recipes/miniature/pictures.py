"""Procedurally drawn pictures and questions about them: everything the miniature model can see.

A scene is a pure function of its seed. Pictures are drawn with PIL on a coarse grid of cells (two by two per tile),
in sizes for which the image processor chooses each of the eight tile canvases. Neighbours: `conversations.py` turns
questions into prompts, `train.py` and `evaluate.py` draw their pictures from disjoint seed ranges (`SPLITS`).
"""

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from PIL import Image, ImageDraw

TILE = 56  # pixels; vision_config.image_size
CELL = TILE // 2
CANVASES = ((1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1))  # (tile rows, tile columns)
COLORS = {
    "red": (216, 32, 32),
    "green": (32, 160, 56),
    "blue": (32, 64, 216),
    "yellow": (240, 208, 24),
    "purple": (144, 40, 176),
    "orange": (248, 128, 24),
    "black": (24, 24, 24),
}
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross")
NUMBERS = ("no", "one", "two", "three", "four")
SPLITS = {
    "train": range(0, 10_000_000),
    "held_out": range(10_000_000, 11_000_000),
    "calibration": range(11_000_000, 12_000_000),
    "demo": range(12_000_000, 13_000_000),
}


@dataclass(frozen=True, slots=True)
class Thing:
    """One drawn shape; `row` and `column` are cells of the scene's grid, offsets and radius are parts of a cell."""

    shape: str
    color: str
    row: int
    column: int
    offset_x: float
    offset_y: float
    radius: float
    rgb: tuple[int, int, int]

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture before it is drawn: `canvas` in tiles, `width` and `height` in pixels, things in reading order."""

    seed: int
    canvas: tuple[int, int]
    width: int
    height: int
    background: tuple[int, int, int]
    things: tuple[Thing, ...]

    @property
    def num_rows(self) -> int:
        return 2 * self.canvas[0]

    @property
    def num_columns(self) -> int:
        return 2 * self.canvas[1]


@dataclass(frozen=True, slots=True)
class Question:
    """A question about one picture. `short` is the one-word answer, empty where one word cannot answer."""

    kind: str
    question: str
    answer: str
    short: str = ""


@dataclass(frozen=True, slots=True)
class Example:
    scene: Scene
    question: Question


def scene_from_seed(seed: int) -> Scene:
    rng = random.Random(seed)
    canvas = CANVASES[rng.randrange(len(CANVASES))]
    width, height = _picture_size(rng, canvas)
    shade = rng.randint(228, 250)
    background = (shade + rng.randint(-5, 5), shade + rng.randint(-5, 5), shade + rng.randint(-5, 5))
    cells = [(row, column) for row in range(2 * canvas[0]) for column in range(2 * canvas[1])]
    things: list[Thing] = []
    for row, column in sorted(rng.sample(cells, rng.choice((1, 2, 2, 3, 3, 3, 4, 4)))):
        color = rng.choice(things).color if things and rng.random() < 0.25 else rng.choice(list(COLORS))
        shape = rng.choice(things).shape if things and rng.random() < 0.25 else rng.choice(SHAPES)
        red, green, blue = (min(255, max(0, value + rng.randint(-10, 10))) for value in COLORS[color])
        things.append(
            Thing(
                shape=shape,
                color=color,
                row=row,
                column=column,
                offset_x=rng.uniform(-0.04, 0.04),
                offset_y=rng.uniform(-0.04, 0.04),
                radius=rng.uniform(0.38, 0.44),
                rgb=(red, green, blue),
            )
        )
    return Scene(seed, canvas, width, height, background, tuple(things))


def _picture_size(rng: random.Random, canvas: tuple[int, int]) -> tuple[int, int]:
    """A size in pixels for which the image processor picks `canvas`: exact, a little smaller, or larger."""
    rows, columns = canvas
    chance = rng.random()
    factor = rng.uniform(0.88, 1.0) if chance < 0.2 else rng.uniform(1.0, 3.0) if chance < 0.4 else 1.0
    if factor > 1.0 and canvas == (1, 1):  # a larger square picture would get the 2x2 canvas
        factor = 1.0
    side = round(TILE * factor)
    return side * columns, side * rows


def render(scene: Scene) -> Image.Image:
    image = Image.new("RGB", (scene.width, scene.height), scene.background)
    draw = ImageDraw.Draw(image)
    cell = scene.width / scene.num_columns
    for thing in scene.things:
        center_x = (thing.column + 0.5 + thing.offset_x) * cell
        center_y = (thing.row + 0.5 + thing.offset_y) * cell
        _draw_shape(draw, thing.shape, center_x, center_y, thing.radius * cell, thing.rgb)
    return image


def _draw_shape(draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, rgb: tuple[int, int, int]) -> None:
    if shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=rgb)
    elif shape == "square":
        side = 0.85 * r
        draw.rectangle((x - side, y - side, x + side, y + side), fill=rgb)
    elif shape == "triangle":
        draw.polygon([(x, y - r), (x + r, y + 0.8 * r), (x - r, y + 0.8 * r)], fill=rgb)
    elif shape == "diamond":
        draw.polygon([(x, y - 1.1 * r), (x + 0.8 * r, y), (x, y + 1.1 * r), (x - 0.8 * r, y)], fill=rgb)
    elif shape == "star":
        radii = (1.15 * r, 0.42 * r)
        angles = [math.pi * (step / 5 - 0.5) for step in range(10)]
        draw.polygon(
            [(x + radii[i % 2] * math.cos(a), y + radii[i % 2] * math.sin(a)) for i, a in enumerate(angles)], fill=rgb
        )
    else:
        arm = 0.3 * r
        draw.rectangle((x - arm, y - r, x + arm, y + r), fill=rgb)
        draw.rectangle((x - r, y - arm, x + r, y + arm), fill=rgb)


def with_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _number(count: int, singular: str, plural: str) -> str:
    return f"There is one {singular}." if count == 1 else f"There are {NUMBERS[count]} {plural}."


def _unique_by(scene: Scene, field: str) -> list[Thing]:
    values = [getattr(thing, field) for thing in scene.things]
    return [thing for thing in scene.things if values.count(getattr(thing, field)) == 1]


def place(scene: Scene, thing: Thing) -> str:
    vertical = "top" if thing.row < scene.canvas[0] else "bottom"
    horizontal = "left" if thing.column < scene.canvas[1] else "right"
    return f"{vertical} {horizontal}"


def _ask_color(scene: Scene, rng: random.Random) -> Question | None:
    things = _unique_by(scene, "shape")
    if not things:
        return None
    thing = rng.choice(things)
    text = rng.choice(("What color is the {}?", "What colour is the {}?", "Which color does the {} have?"))
    return Question("color", text.format(thing.shape), f"The {thing.shape} is {thing.color}.", thing.color)


def _ask_shape(scene: Scene, rng: random.Random) -> Question | None:
    things = _unique_by(scene, "color")
    if not things:
        return None
    thing = rng.choice(things)
    text = rng.choice(("What shape is {}?", "Which shape is {}?", "What is the {} shape?"))
    return Question("shape", text.format(thing.color), f"The {thing.color} shape is a {thing.shape}.", thing.shape)


def _ask_count(scene: Scene, rng: random.Random) -> Question | None:
    text = rng.choice(
        ("How many shapes are there?", "How many shapes are in the picture?", "How many shapes do you see?")
    )
    count = len(scene.things)
    return Question("count", text, _number(count, "shape", "shapes"), NUMBERS[count])


def _ask_count_of(scene: Scene, rng: random.Random) -> Question | None:
    thing = rng.choice(scene.things)
    present = rng.random() < 0.7
    if rng.random() < 0.5:
        color = thing.color if present else rng.choice(list(COLORS))
        count = sum(other.color == color for other in scene.things)
        singular, plural = f"{color} shape", f"{color} shapes"
    else:
        shape = thing.shape if present else rng.choice(SHAPES)
        count = sum(other.shape == shape for other in scene.things)
        singular, plural = shape, f"{shape}es" if shape == "cross" else f"{shape}s"
    text = rng.choice(("How many {} are there?", "How many {} do you see?"))
    return Question("count_of", text.format(plural), _number(count, singular, plural), NUMBERS[count])


def _ask_exists(scene: Scene, rng: random.Random) -> Question | None:
    thing = rng.choice(scene.things)
    color, shape = thing.color, thing.shape
    if rng.random() < 0.5:  # a near miss: one of the two properties is changed
        color, shape = rng.choice(((rng.choice(list(COLORS)), shape), (color, rng.choice(SHAPES))))
    name = with_article(f"{color} {shape}")
    found = any((other.color, other.shape) == (color, shape) for other in scene.things)
    answer = f"Yes, there is {name}." if found else f"No, there is no {color} {shape}."
    text = rng.choice(("Is there {}?", "Do you see {}?"))
    return Question("exists", text.format(name), answer, "yes" if found else "no")


def _ask_where(scene: Scene, rng: random.Random) -> Question | None:
    things = _unique_by(scene, "name")
    if not things:
        return None
    thing = rng.choice(things)
    return Question("where", f"Where is the {thing.name}?", f"The {thing.name} is at the {place(scene, thing)}.")


def _ask_extreme(scene: Scene, rng: random.Random) -> Question | None:
    side = rng.choice(("leftmost", "rightmost", "topmost", "lowest"))
    axis = "column" if side in ("leftmost", "rightmost") else "row"
    values = [getattr(thing, axis) for thing in scene.things]
    best = min(values) if side in ("leftmost", "topmost") else max(values)
    if values.count(best) != 1:
        return None
    thing = scene.things[values.index(best)]
    text = rng.choice((f"What is the {side} shape?", f"Which shape is {side}?"))
    return Question("extreme", text, f"The {side} shape is {with_article(thing.name)}.")


def _ask_relation(scene: Scene, rng: random.Random) -> Question | None:
    things = _unique_by(scene, "name")
    if len(things) < 2:
        return None
    first, second = rng.sample(things, 2)
    word, true = rng.choice(
        (
            ("left of", first.column < second.column),
            ("right of", first.column > second.column),
            ("above", first.row < second.row),
            ("below", first.row > second.row),
        )
    )
    answer = f"Yes, the {first.name} is {word} the {second.name}."
    if not true:
        answer = f"No, the {first.name} is not {word} the {second.name}."
    return Question("relation", f"Is the {first.name} {word} the {second.name}?", answer, "yes" if true else "no")


def _ask_describe(scene: Scene, rng: random.Random) -> Question | None:
    text = rng.choice(("Describe the picture.", "What do you see?", "What is in this picture?"))
    parts = [f"{with_article(thing.name)} at the {place(scene, thing)}" for thing in scene.things]
    joined = parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + f" and {parts[-1]}"
    return Question("describe", text, f"I see {joined}.")


QUESTION_KINDS: dict[str, Callable[[Scene, random.Random], Question | None]] = {
    "color": _ask_color,
    "shape": _ask_shape,
    "count": _ask_count,
    "count_of": _ask_count_of,
    "exists": _ask_exists,
    "where": _ask_where,
    "extreme": _ask_extreme,
    "relation": _ask_relation,
    "describe": _ask_describe,
}


def ask(scene: Scene, rng: random.Random, kinds: tuple[str, ...] = tuple(QUESTION_KINDS)) -> Question:
    """A question of a kind drawn from `kinds`; kinds the scene cannot answer without ambiguity are drawn again."""
    while True:
        question = QUESTION_KINDS[rng.choice(kinds)](scene, rng)
        if question is not None:
            return question


def held_out(split: str, count: int) -> Iterator[Example]:
    """`count` questions, each about a picture of its own, always the same ones for a split."""
    for seed in SPLITS[split][:count]:
        scene = scene_from_seed(seed)
        yield Example(scene, ask(scene, random.Random(f"question {seed}")))
