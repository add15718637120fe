"""What a validation found: for machines as JSON, for people as a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from mllama_runtime.config import VisionStates
from mllama_runtime.evaluation.result import Result
from mllama_runtime.fields import printable, to_plain
from mllama_runtime.manifest import Manifest, Validation

from mllama_exporter.reference_tower import TakenStates
from mllama_exporter.validate.agreement import Agreement, Answers
from mllama_exporter.validate.checks import Check
from mllama_exporter.validate.layers import LayerTable
from mllama_exporter.validate.observed import Activation

REPORT_NAME = "reports/validation.json"
_STATES: Mapping[TakenStates, str] = {
    "published": "before the block",
    "transformers-4.56": "after the block",
    "other": "neither before nor after the block",
}


@dataclass(frozen=True, slots=True)
class ReferenceInfo:
    """What the bundle was compared with.

    vision_states: those that the library itself takes; corrected_to: those that it was made to take, if others. Both
    None for text alone.
    """

    name: str
    fingerprint: str
    library: str
    dtype: str
    attention: str
    vision_states: TakenStates | None = None
    corrected_to: VisionStates | None = None

    @property
    def note(self) -> str | None:
        """What was corrected, for people."""
        if self.vision_states is None:
            return None
        taken = f"{self.library} takes the vision tower's states {_STATES[self.vision_states]}"
        if self.corrected_to is None:
            return f"{taken}, as the bundle does, and needs no correction"
        return f"{taken}; corrected to {self.corrected_to} ({_STATES[self.corrected_to]})"


@dataclass(frozen=True, slots=True)
class NotRun:
    """What was not checked, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Report:
    """A whole validation of a bundle; `max_steps` is the limit of generated tokens a sample.

    activation_limit: half of what the precision holds. answers: of the samples that are not for tokens alone.
    """

    manifest: Manifest
    backend: str
    reference: ReferenceInfo
    tools: Mapping[str, str]
    num_samples: int
    max_steps: int
    checks: tuple[Check, ...]
    not_run: tuple[NotRun, ...]
    layers: tuple[LayerTable, ...]
    activations: tuple[Activation, ...]
    activation_limit: float
    agreement: tuple[Agreement, ...]
    answers: tuple[Answers, ...]
    accuracy: tuple[Result, ...]

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if not check.passed]

    @property
    def verdict(self) -> Literal["pass", "fail"]:
        return "fail" if self.failed else "pass"

    def validation(self) -> Validation:
        """What the manifest keeps."""
        corrected = "" if self.reference.corrected_to is None else ", vision states corrected"
        reference = f"{self.reference.name} ({self.reference.library}{corrected}, {self.reference.dtype})"
        return Validation(self.verdict, REPORT_NAME, len(self.checks), len(self.failed), reference)

    def to_plain(self) -> dict[str, object]:
        """The JSON object, verdict and checks first; all that the page shows is in it."""
        manifest = self.manifest
        return {
            "verdict": self.verdict,
            "summary": self._conclusion(),
            "checks": [_plain_check(check) for check in self.checks],
            "not_run": [to_plain(each) for each in self.not_run],
            "bundle": manifest.name,
            "precision": manifest.precision,
            "quantization": to_plain(manifest.quantization),
            "mask_semantics": manifest.mask_semantics,
            "vision_states": self._vision_states,
            "backend": self.backend,
            "reference": asdict(self.reference) | {"note": self.reference.note},
            "tools": dict(self.tools),
            "made_with": dict(manifest.tools),
            "graphs": {key: manifest.files[graph.file].sha256 for key, graph in manifest.graphs.items()},
            "num_parameters": manifest.source.num_parameters,
            "num_samples": self.num_samples,
            "max_steps": self.max_steps,
            "layers": [_plain_table(table) for table in self.layers],
            "activations": {
                "limit": self.activation_limit,
                "layers": [_plain_activation(each) for each in self.activations],
            },
            "agreement": [to_plain(each) for each in self.agreement],
            "answers": [to_plain(each) for each in self.answers],
            "accuracy": [_plain_result(each) for each in self.accuracy],
        }

    @property
    def _vision_states(self) -> VisionStates | None:
        return None if self.manifest.model.is_text_only else self.manifest.vision_states

    def to_text(self) -> str:
        """One line a check, in columns; the verdict last."""
        rows = [("check", "value", "threshold", "", "where")]
        rows += [
            (check.name, _number(check.value), _threshold(check), "ok" if check.passed else "FAIL", check.detail)
            for check in self.checks
        ]
        lines = _columns(rows)
        lines += [f"not run: {each.name}: {each.reason}" for each in self.not_run]
        if self.reference.note is not None:
            lines.append(f"reference: {self.reference.note}")
        return "\n".join(printable(line) for line in [*lines, self._conclusion()])

    def layers_to_text(self) -> str:
        """The first-divergence table: one line a place, in columns; for each kind of graphs its first divergence."""
        return "\n".join(printable(line) for table in self.layers for line in _table_lines(table))

    def _conclusion(self) -> str:
        manifest = self.manifest
        made = f"{manifest.precision} on {self.backend}, {manifest.mask_semantics} semantics"
        if self._vision_states is not None:
            made += f", {self._vision_states} vision states"
        about = f"{made}, against {self.reference.name}"
        if not self.failed:
            return f"pass: all {len(self.checks)} checks ({about})"
        first = self.failed[0]
        what = f"{first.name} is {_number(first.value)} instead of {_threshold(first)} ({first.detail})"
        return f"fail: {len(self.failed)} of {len(self.checks)} checks ({about}); the first is {what}"


def _table_lines(table: LayerTable) -> list[str]:
    first = table.first_divergence
    rows = [(f"{table.kind} graphs", "branch", "added error", "threshold", "", "cosine", "max abs", "relative")]
    for error in table.errors:
        limit, found = table.limits[error.spot.group], error.drift
        mark = "ok" if error.added <= limit else "FIRST" if error is first else "FAIL"
        added = (_number(_finite(error.added)), f"<= {limit:.3g}", mark)
        drift = (f"{found.cosine:.6f}", _number(_finite(found.max_abs)), _number(_finite(found.relative)))
        rows.append((error.spot.layer, error.spot.branch, *added, *drift))
    end = "no layer is past its threshold" if first is None else f"the first past its threshold is {first.where}"
    return [*_columns(rows), f"{table.kind} graphs: {end}"]


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _plain_table(table: LayerTable) -> dict[str, object]:
    first = table.first_divergence
    return {
        "backend": table.kind,
        "first_divergence": None if first is None else {"layer": first.spot.layer, "branch": first.spot.branch},
        "spots": [
            {
                "layer": error.spot.layer,
                "branch": error.spot.branch,
                "added": _finite(error.added),
                "threshold": (limit := table.limits[error.spot.group]),
                "pass": error.added <= limit,
                "sample": error.sample,
                "cosine": error.drift.cosine,
                "max_abs": _finite(error.drift.max_abs),
                "relative": _finite(error.drift.relative),
            }
            for error in table.errors
        ],
    }


def _plain_activation(activation: Activation) -> dict[str, object]:
    return {
        "layer": activation.layer,
        "largest": _finite(activation.largest),
        "sample": activation.sample,
        "tensor": activation.tensor,
    }


def _plain_result(result: Result) -> dict[str, object]:
    """Without the single answers."""
    return {
        "bundle": result.bundle,
        "precision": result.precision,
        "mask_semantics": result.mask_semantics,
        "vision_states": result.vision_states,
        "metric": result.metric,
        "task": to_plain(result.task),
        "score": result.score,
        "interval": list(result.interval),
        "interval_kind": result.interval_kind,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _plain_check(check: Check) -> dict[str, object]:
    return {
        "name": check.name,
        "value": check.value,
        "threshold": check.threshold,
        "pass": check.passed,
        "bound": "at_least" if check.at_least else "at_most",
        "detail": check.detail,
    }


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3g}"


def _threshold(check: Check) -> str:
    return f"{'>=' if check.at_least else '<='} {check.threshold:.3g}"
