"""Coordinates of a line plot over the layers of a model, with a logarithmic axis; the page's template draws it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 40, 26  # room for labels, in pixels
_MIN_TICK_GAP = 26
_MAX_DECADES = 9
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_STEPS = (1, 2, 5, 10, 20, 50)


@dataclass(frozen=True, slots=True)
class Series:
    """One line: a value for every layer; None where it is not finite, which is drawn at the top."""

    name: str
    values: Sequence[float | None]


@dataclass(frozen=True, slots=True)
class Section:
    """Layers that belong together: `numbers` holds each one's number, None for what is no layer."""

    title: str
    numbers: Sequence[int | None]


@dataclass(frozen=True, slots=True)
class Mark:
    """A point to be pointed out."""

    series: int
    index: int
    label: str


@dataclass(frozen=True, slots=True)
class Label:
    """Text at a place; `anchor` as in SVG."""

    x: float
    y: float
    text: str
    anchor: str = "middle"


@dataclass(frozen=True, slots=True)
class Plot:
    """What is drawn, in pixels."""

    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int
    lines: tuple[tuple[str, ...], ...]  # points attributes, of each line its pieces
    points: tuple[tuple[tuple[float, float], ...], ...]  # of each line
    limits: tuple[str, ...]  # points attributes
    grid: tuple[Label, ...]
    ticks: tuple[Label, ...]
    sections: tuple[Label, ...]
    borders: tuple[float, ...]
    marks: tuple[Label, ...]


def plot(
    width: int,
    height: int,
    *,
    series: Sequence[Series],
    limits: Sequence[Sequence[float]],
    sections: Sequence[Section],
    marks: Sequence[Mark] = (),
) -> Plot:
    """Lay out lines over layers. limits: more lines, of thresholds, a value for every layer."""
    numbers = [number for section in sections for number in section.numbers]
    step = (width - _LEFT - _RIGHT) / max(1, len(numbers))
    xs = [_LEFT + (index + 0.5) * step for index in range(len(numbers))]
    shown = [value for each in series for value in each.values if value] + [value for line in limits for value in line]
    high = math.ceil(math.log10(max(shown, default=1.0)) + 0.1)
    low = max(math.floor(math.log10(min(shown, default=0.1))), high - 3 * _MAX_DECADES)
    low = min(low, high - 1)

    def y(value: float | None) -> float:
        log = high if value is None else math.log10(value) if value > 0 else low
        share = (min(max(log, low), high) - low) / (high - low)
        return round(height - _BOTTOM - share * (height - _TOP - _BOTTOM), 1)

    points = [tuple(zip((round(x, 1) for x in xs), map(y, each.values), strict=True)) for each in series]
    starts = [sum(len(section.numbers) for section in sections[:index]) for index in range(len(sections))]
    return Plot(
        width=width,
        height=height,
        left=_LEFT,
        right=width - _RIGHT,
        top=_TOP,
        bottom=height - _BOTTOM,
        lines=tuple(tuple(_pieces(line, each.values, starts)) for line, each in zip(points, series, strict=True)),
        points=tuple(points),
        limits=tuple(_points(_steps(xs, list(map(y, line)), step)) for line in limits),
        grid=tuple(
            Label(_LEFT - 6, y(10.0**decade), _power(decade), "end")
            for decade in range(low, high + 1, -(-(high - low) // _MAX_DECADES))
        ),
        ticks=tuple(_ticks(numbers, xs, height - _BOTTOM + 17, step)),
        sections=tuple(
            Label(round(_LEFT + start * step + 4, 1), 14.0 + 15 * (index % 2), section.title, "start")
            for index, (start, section) in enumerate(zip(starts, sections, strict=True))
        ),
        borders=tuple(round(_LEFT + start * step, 1) for start in starts[1:]),
        marks=tuple(_marks(marks, points, width)),
    )


def _pieces(
    points: Sequence[tuple[float, float]], values: Sequence[float | None], starts: Sequence[int]
) -> Iterator[str]:
    """A line interrupted between sections, and where a value is zero, which a logarithmic axis does not have."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for index, (point, value) in enumerate(zip(points, values, strict=True)):
        if value == 0 or index in starts:
            pieces.append([])
        if value != 0:
            pieces[-1].append(point)
    return (_points(piece) for piece in pieces if piece)


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:g},{y:g}" for x, y in points)


def _steps(xs: Sequence[float], ys: Sequence[float], step: float) -> list[tuple[float, float]]:
    """A level line over each layer's width."""
    edges = ((round(x - step / 2, 1), round(x + step / 2, 1), y) for x, y in zip(xs, ys, strict=True))
    return [point for left, right, y in edges for point in ((left, y), (right, y))]


def _ticks(numbers: Sequence[int | None], xs: Sequence[float], y: float, step: float) -> Iterator[Label]:
    every = next((each for each in _STEPS if each * step >= _MIN_TICK_GAP), _STEPS[-1])
    for number, x in zip(numbers, xs, strict=True):
        if number is not None and number % every == 0:
            yield Label(round(x, 1), y, str(number))


def _marks(marks: Sequence[Mark], points: Sequence[Sequence[tuple[float, float]]], width: int) -> Iterator[Label]:
    for mark in marks:
        x, y = points[mark.series][mark.index]
        yield Label(x, y, mark.label, "start" if x < width / 2 else "end")


def _power(decade: int) -> str:
    return f"10{str(decade).translate(_SUPERSCRIPTS)}"
