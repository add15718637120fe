"""What a validation found: for machines as JSON, for people as a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from mllama_runtime.config import MaskSemantics
from mllama_runtime.fields import printable
from mllama_runtime.manifest import Precision, Validation

from mllama_exporter.validate.checks import Check

REPORT_NAME = "reports/validation.json"


@dataclass(frozen=True, slots=True)
class ReferenceInfo:
    """What the bundle was compared with."""

    name: str
    fingerprint: str
    library: str
    dtype: str
    attention: str


@dataclass(frozen=True, slots=True)
class NotRun:
    """What was not checked, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Report:
    """A whole validation; `max_steps` is the limit of generated tokens a sample."""

    bundle: str
    precision: Precision
    mask_semantics: MaskSemantics
    backend: str
    reference: ReferenceInfo
    tools: Mapping[str, str]
    num_samples: int
    max_steps: int
    checks: tuple[Check, ...]
    not_run: tuple[NotRun, ...]

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if not check.passed]

    @property
    def verdict(self) -> Literal["pass", "fail"]:
        return "fail" if self.failed else "pass"

    def validation(self) -> Validation:
        """What the manifest keeps."""
        reference = f"{self.reference.name} ({self.reference.library}, {self.reference.dtype})"
        return Validation(self.verdict, REPORT_NAME, len(self.checks), len(self.failed), reference)

    def to_plain(self) -> dict[str, object]:
        """The JSON object, verdict and checks first."""
        return {
            "verdict": self.verdict,
            "checks": [_plain_check(check) for check in self.checks],
            "not_run": [{"name": each.name, "reason": each.reason} for each in self.not_run],
            "bundle": self.bundle,
            "precision": self.precision,
            "mask_semantics": self.mask_semantics,
            "backend": self.backend,
            "reference": {name: getattr(self.reference, name) for name in ReferenceInfo.__slots__},
            "tools": dict(self.tools),
            "num_samples": self.num_samples,
            "max_steps": self.max_steps,
        }

    def to_text(self) -> str:
        """One line a check, in columns; the verdict last."""
        rows = [("check", "value", "threshold", "", "where")]
        rows += [
            (check.name, _number(check.value), _threshold(check), "ok" if check.passed else "FAIL", check.detail)
            for check in self.checks
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines += [f"not run: {each.name}: {each.reason}" for each in self.not_run]
        return "\n".join(printable(line) for line in [*lines, self._conclusion()])

    def _conclusion(self) -> str:
        about = f"{self.precision}, {self.mask_semantics} semantics, against {self.reference.name}"
        if not self.failed:
            return f"pass: all {len(self.checks)} checks ({about})"
        first = self.failed[0]
        what = f"{first.name} is {_number(first.value)} instead of {_threshold(first)} ({first.detail})"
        return f"fail: {len(self.failed)} of {len(self.checks)} checks ({about}); the first is {what}"


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
