"""The first-divergence table: for every layer and branch, how far a graph is from the reference, and where it begins.

Two runs of a graph with its states as outputs tell two things. Left alone, it shows how far its states have drifted by
each layer. Fed with the reference's states, it shows the error that each branch adds: that is what is held to a
threshold, so that a damaged layer is named and the ones behind it are not, however deep the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mllama_exporter.validate.checks import Observation
from mllama_exporter.validate.spots import GROUPS, Spot
from mllama_exporter.validate.thresholds import Bounds, GraphKind

Array = NDArray[Any]
_SMALLEST_SHARE = 1 / 64  # of the stream: a branch that moves a row by less is measured as if it moved it by this


@dataclass(frozen=True, slots=True)
class Drift:
    """A graph's tensor against the reference's, when the graph runs on its own; each of the worst sample.

    cosine: of the worst row; max_abs: the largest error; relative: that over the largest value of the tensor.
    """

    cosine: float
    max_abs: float
    relative: float


@dataclass(frozen=True, slots=True)
class LayerError:
    """One spot, over all samples. `added`: the error made there, see `added_error`; `sample`: where it is largest."""

    spot: Spot
    drift: Drift
    added: float
    sample: str

    @property
    def where(self) -> str:
        return f"{self.spot.layer}, {self.spot.branch}"


@dataclass(frozen=True, slots=True)
class LayerTable:
    """Every spot of one kind of graphs, in the order of the data; empty when no sample's layers were measured."""

    kind: GraphKind
    errors: tuple[LayerError, ...]
    limits: Mapping[str, float]  # of added errors, by the spots' groups

    @property
    def first_divergence(self) -> LayerError | None:
        """The first spot whose added error is past its limit."""
        return next((error for error in self.errors if error.added > self.limits[error.spot.group]), None)


def table_from_errors(kind: GraphKind, samples: Sequence[Sequence[LayerError]], bounds: Bounds) -> LayerTable:
    """The worst of all samples, spot by spot."""
    limits: dict[str, float] = {group: bounds[f"layers_{group}"].limit for group in GROUPS}
    return LayerTable(kind, tuple(_worst(errors) for errors in zip(*samples, strict=True)), limits)


def layer_observations(table: LayerTable) -> Iterator[Observation]:
    """What the checks `layers_*` hold to their thresholds."""
    for error in table.errors:
        yield Observation(f"layers_{error.spot.group}", error.added, error.where, error.sample)


def layer_error(
    spot: Spot, sample: str, expected: Mapping[str, Array], free: Mapping[str, Array], forced: Mapping[str, Array]
) -> LayerError:
    """One spot of one sample, from tensors by name: the reference's, the graph's own, the graph's when forced."""
    absent = np.empty(0)
    reference, own = expected.get(spot.tensor, absent), free.get(spot.tensor, absent)
    start = None if spot.start is None else expected.get(spot.start)
    return LayerError(
        spot, drift(own, reference), added_error(forced.get(spot.tensor, absent), reference, start), sample
    )


def _worst(errors: Sequence[LayerError]) -> LayerError:
    worst = max(errors, key=lambda error: error.added)
    drifts = [error.drift for error in errors]
    cosine, largest = min(each.cosine for each in drifts), max(each.max_abs for each in drifts)
    return replace(worst, drift=Drift(cosine, largest, max(each.relative for each in drifts)))


def drift(found: Array, expected: Array) -> Drift:
    """Of tensors of one shape, whose last axis is a row; a row of zeros on both sides has cosine 1."""
    if _incomparable(found, expected):
        return Drift(-1.0, math.inf, math.inf)
    rows, wanted = (array.reshape(-1, array.shape[-1]).astype(np.float64) for array in (found, expected))
    norms = np.linalg.norm(rows, axis=1) * np.linalg.norm(wanted, axis=1)
    products = (rows * wanted).sum(axis=1)
    same = (rows == wanted).all(axis=1)
    cosines = np.where(same, 1.0, np.divide(products, norms, out=np.zeros_like(norms), where=norms > 0))
    largest = float(np.abs(rows - wanted).max(initial=0.0))
    return Drift(float(cosines.min(initial=1.0)), largest, largest / (float(np.abs(wanted).max(initial=0.0)) or 1.0))


def added_error(found: Array, expected: Array, start: Array | None) -> float:
    """The error of the worst row, ||found - expected||, over what the branch adds to it, ||expected - start||.

    Where a branch adds next to nothing, over a 64th of the row itself, so that rounding the sum is no error of the
    branch. Without `start`, over the row itself; rows of less than a 64th of the largest count as that.
    """
    if _incomparable(found, expected):
        return math.inf
    rows, wanted = (array.reshape(-1, array.shape[-1]) for array in (found, expected))
    sizes = np.linalg.norm(wanted, axis=1)
    if start is None:
        scales = np.maximum(sizes, _SMALLEST_SHARE * sizes.max(initial=0.0))
    else:
        moved = np.linalg.norm(wanted - start.reshape(wanted.shape), axis=1)
        scales = np.maximum(moved, _SMALLEST_SHARE * sizes)
    errors = np.linalg.norm(rows - wanted, axis=1)
    return float(np.divide(errors, scales, out=np.where(errors > 0, np.inf, 0.0), where=scales > 0).max(initial=0.0))


def _incomparable(found: Array, expected: Array) -> bool:
    return found.shape != expected.shape or expected.size == 0 or not np.isfinite(found).all()
