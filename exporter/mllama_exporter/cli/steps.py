"""How a long verb says what it is doing."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import click

_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


class Steps:
    """What a verb is doing, on stderr: a line a step, on a terminal with a bar; `seconds` is how long each took.

    Args:
        titles: of the steps, by name; the first begins at once.
        in_bytes: the steps that count bytes.
    """

    def __init__(self, titles: Mapping[str, str], in_bytes: str = "weights") -> None:
        self.seconds: dict[str, float] = {}
        self._titles, self._in_bytes = titles, in_bytes
        self._bar: Any = None
        self._done = 0
        self._begin(next(iter(titles)), 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def __call__(self, step: str, done: int, total: int) -> None:
        if step != self._step:
            self._end()
            self._begin(step, total)
        if self._bar:
            self._bar.update(done - self._done)
        self._done = done

    def _begin(self, step: str, total: int) -> None:
        self._step, self._started, self._done = step, time.perf_counter(), 0
        if sys.stderr.isatty() and total > 1:
            self._bar = self._new_bar(step, total)
            self._bar.__enter__()
        else:
            click.echo(self._titles[step], err=True)

    def _end(self) -> None:
        self.seconds[self._step] = time.perf_counter() - self._started
        if self._bar:
            self._bar.__exit__(None, None, None)
            self._bar = None

    def _new_bar(self, step: str, total: int) -> Any:
        in_bytes = step == self._in_bytes
        shown = shown_bytes if in_bytes else str
        bar: Any = click.progressbar(
            length=total,
            label=self._titles[step].ljust(max(map(len, self._titles.values()))),
            item_show_func=lambda _: f"{shown(bar.pos)} of {shown(total)}",
            show_percent=in_bytes,
            width=0,  # as wide as the terminal
            file=sys.stderr,
            update_min_steps=max(1, total // 200),
        )
        return bar


def shown_bytes(count: float) -> str:
    """Such as "1.2 GB"."""
    if count < 1000:
        return f"{count:.0f} bytes"
    return next(f"{count / size:.1f} {unit}" for size, unit in _UNITS if count >= size)


def peak_memory_bytes() -> int:
    """Of this process so far. Not getrusage's, which keeps that of the process which started this one."""
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:")), 0)
