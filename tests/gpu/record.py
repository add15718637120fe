"""What a probe finds, a JSON line each, written as soon as it is known: a fault is a finding too.

Lines go to OUT/results.jsonl, tracebacks to OUT/faults.txt.
"""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

Fields = dict[str, Any]
_MAX_TEXT = 700  # characters of an error


class Recorder:
    """Appends to OUT/results.jsonl; `common` stands in every line."""

    def __init__(self, out: Path, **common: object) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self._path, self._common = out / "results.jsonl", common

    def add(self, case: str, **fields: object) -> None:
        line = {**self._common, "case": case, **fields}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, default=str) + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(" ".join(f"{name}={_short(value)}" for name, value in line.items() if value is not None), flush=True)

    def try_(self, case: str, work: Callable[[], Fields | None]) -> Fields | None:
        """The fields that `work` finds, written; None where it fails, which is written too."""
        began = time.perf_counter()
        try:
            fields = work() or {}
        except Exception as error:
            with self._path.with_name("faults.txt").open("a", encoding="utf-8") as file:
                file.write(f"{self._common} {case}\n{traceback.format_exc()}\n")
            self.add(case, took=_took(began), error=f"{type(error).__name__}: {error}"[:_MAX_TEXT])
            return None
        self.add(case, **fields, took=_took(began), error=None)
        return fields


def _took(began: float) -> float:
    return round(time.perf_counter() - began, 2)


def _short(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 160 else text[:157] + "..."
