"""Work on a device that is captured once and launched again and again: a single call instead of hundreds."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Hashable

from mllama_runtime.device import Captured, Stream
from mllama_runtime.errors import EnvironmentFault, ResourceError

logger = logging.getLogger(__name__)

WARM_UP_RUNS = 2
"""Before work is captured: TensorRT takes on new shapes in a first run, and what is captured may not allocate."""


class CapturedWork:
    """Runs work of one stream, and captures it as soon as it is warm."""

    def __init__(self, stream: Stream, *, can_capture: bool) -> None:
        self._stream, self._can_capture = stream, can_capture
        self._captured: dict[Hashable, Captured] = {}
        self._num_runs: Counter[Hashable] = Counter()  # of what is not captured yet

    def run(self, key: Hashable, work: Callable[[], None]) -> None:
        """key: of the work, which always has the same sessions and addresses."""
        if captured := self._captured.get(key):
            captured.launch()
        elif not self._can_capture or self._num_runs[key] < WARM_UP_RUNS:
            self._num_runs[key] += 1
            work()
        else:
            self._capture(key, work)

    def _capture(self, key: Hashable, work: Callable[[], None]) -> None:
        """Capture and launch work; fall back to running it, now and from here on."""
        try:
            captured = self._captured[key] = self._stream.capture(work)
        except (EnvironmentFault, ResourceError) as fault:  # memory is what a capture cannot have
            self._can_capture = False
            logger.warning("steps cannot be captured, and are launched kernel by kernel: %s", fault)
            work()
        else:
            captured.launch()
