"""Work on a device that is recorded once and launched again and again: a single call instead of hundreds."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Hashable

from mllama_runtime.device import Captured, Stream
from mllama_runtime.errors import EnvironmentFault

logger = logging.getLogger(__name__)

# Before work of new shapes is recorded: TensorRT takes them on in a first run, and what is recorded may not allocate.
_WARM_UP_RUNS = 2


class Recorded:
    """Runs work of one stream, and records it as soon as its shapes are known there."""

    def __init__(self, stream: Stream, *, can_record: bool) -> None:
        self._stream, self._can_record = stream, can_record
        self._captured: dict[Hashable, Captured] = {}
        self._num_runs: Counter[Hashable] = Counter()  # by shapes

    def run(self, key: Hashable, shapes: Hashable, work: Callable[[], None]) -> None:
        """key: of the work, which always has the same addresses. shapes: what it shares with work of other keys."""
        if captured := self._captured.get(key):
            captured.launch()
        elif not self._can_record or self._num_runs[shapes] < _WARM_UP_RUNS:
            self._num_runs[shapes] += 1
            work()
        else:
            self._record(key, work)

    def _record(self, key: Hashable, work: Callable[[], None]) -> None:
        """Where it cannot be recorded, work runs as it is from here on."""
        try:
            captured = self._captured[key] = self._stream.capture(work)
        except EnvironmentFault as fault:
            self._can_record = False
            logger.warning("steps cannot be captured, and are launched kernel by kernel: %s", fault)
            work()
        else:
            captured.launch()
