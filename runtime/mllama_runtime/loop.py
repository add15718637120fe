"""The decode loop: requests join and leave the slots between steps; each gets its tokens as events.

A step feeds every running request its last token, reads what was chosen (in the step before, where the back end works
ahead), and spends the time of one prompt chunk on requests that are joining.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator

from mllama_runtime.backends import Chunk
from mllama_runtime.config import MaskSemantics
from mllama_runtime.decode import Row, TokenEvent, chunks_of
from mllama_runtime.errors import MllamaError
from mllama_runtime.sampling import Sampled
from mllama_runtime.speculation import Lookup
from mllama_runtime.tokens import HostTokens, Outcome, Pending, TokenSlots


class Loop:
    """Requests over a set of slots; one thread drives it.

    Args:
        speculate: tokens of a draft, for `HostTokens`; 0 drafts nothing. Drafts are made while one request runs alone.

    Attributes:
        num_steps: times that the decoder ran for single tokens or a draft.
    """

    def __init__(
        self, tokens: TokenSlots, num_slots: int, mask_semantics: MaskSemantics, *, speculate: int = 0
    ) -> None:
        self._tokens, self._mask_semantics, self._speculate = tokens, mask_semantics, speculate
        self._free = list(reversed(range(num_slots)))  # the lowest is taken first: a step runs up to the highest in use
        self._waiting: deque[Row] = deque()
        self._joining: tuple[Row, Iterator[Chunk]] | None = None
        self._rows: dict[int, Row] = {}  # by slot
        self._pending: deque[tuple[Pending, dict[int, Row]]] = deque()
        self._lookup: tuple[Row, Lookup] | None = None
        self._fault: MllamaError | None = None
        self.num_steps = 0

    @property
    def is_idle(self) -> bool:
        """Whether every slot is free and nothing waits."""
        return not (self._waiting or self._rows or self._pending)

    def submit(self, row: Row) -> None:
        """Let a request join as soon as a slot is free, in the order of submission.

        Raises:
            MllamaError: the back end failed before; the engine must be opened again.
        """
        if self._fault is not None:
            raise self._fault
        self._waiting.append(row)

    def cancel(self, row: Row) -> None:
        """Take a request out wherever it is; its slot is free at once. Of one that is over, nothing is left to do."""
        if row in self._waiting:
            self._waiting.remove(row)
        self._leave(row)

    def step(self) -> None:
        """One step of everything. Afterwards each row has its new events, or its `error`.

        A fault of one request ends that request; a fault of the back end ends all of them.
        """
        try:
            self._decode()
            self._join()
        except MllamaError as fault:
            self._fault = fault
            self._pending.clear()
            for row in (*self._rows.values(), *self._waiting):
                row.error, row.is_over = fault, True
            self._joining = None
            self._rows.clear()
            self._waiting.clear()

    def _decode(self) -> None:
        running = {
            slot: row for slot, row in self._rows.items() if 0 < row.num_asked < row.max_new_tokens and not row.is_over
        }
        if self._speculate and len(running) == len(self._rows) == 1 and isinstance(self._tokens, HostTokens):
            ((slot, row),) = running.items()
            if self._check_draft(self._tokens, slot, row):
                return
        if running:
            for row in running.values():
                row.num_asked += 1
            self.num_steps += 1
            self._pending.append((self._tokens.step(sorted(running)), running))
        self._read(self._tokens.max_pending if running else 0)

    def _check_draft(self, tokens: HostTokens, slot: int, row: Row) -> bool:
        """Decode several tokens at once if the text so far suggests them."""
        if self._lookup is None or self._lookup[0] is not row:
            self._lookup = row, Lookup()
            self._lookup[1].extend(row.token_ids.tolist())
        text = self._lookup[1]
        text.extend(row.generated[len(text) - len(row.token_ids) :])
        room = min(self._speculate, row.max_new_tokens - row.num_asked - 1)
        draft = text.draft(room) if room > 0 else ()
        if not draft:
            return False
        self.num_steps += 1
        outcomes = tokens.check(slot, draft)
        row.num_asked += len(outcomes)
        for outcome in outcomes:
            if not row.is_over:
                self._accept(row, outcome)
        return True

    def _join(self) -> None:
        """Prompts of one chunk's tokens in all, so that those who run are not kept waiting for long."""
        budget = self._tokens.prefill_chunk
        while budget > 0 and (self._joining or (self._waiting and self._free)):
            if self._joining is None:
                self._joining = self._enter(self._waiting.popleft())
            row, chunks = self._joining
            chunk = next(chunks)
            self._tokens.extend(row.slot, chunk)
            budget -= len(chunk.token_ids)
            if chunk.stop == len(row.token_ids):
                self._joining = None
                row.features = ()  # the slot has its own copy, without padding tiles
                row.num_asked = 1
                self._pending.append((self._tokens.first(row.slot, row.sampler), {row.slot: row}))
                self._read(self._tokens.max_pending)

    def _enter(self, row: Row) -> tuple[Row, Iterator[Chunk]]:
        row.slot = self._free.pop()
        row.began = time.perf_counter()
        self._rows[row.slot] = row
        return row, chunks_of(row, self._mask_semantics, self._tokens.prefill_chunk)

    def _read(self, max_pending: int) -> None:
        while len(self._pending) > max_pending:
            pending, rows = self._pending.popleft()
            for slot, outcome in pending.read():
                if not rows[slot].is_over:
                    self._accept(rows[slot], outcome)

    def _accept(self, row: Row, outcome: Outcome) -> None:
        if isinstance(outcome, Sampled):
            row.accept(outcome)
        else:
            row.error, row.is_over = outcome, True
        if row.is_over:
            self._leave(row)

    def _leave(self, row: Row) -> None:
        if self._rows.get(row.slot) is not row:
            return
        if self._joining and self._joining[0] is row:
            self._joining = None
        row.is_over = True
        del self._rows[row.slot]
        self._tokens.leave(row.slot)
        self._free.append(row.slot)
        self._free.sort(reverse=True)


def answer(loop: Loop, rows: list[Row]) -> Iterator[TokenEvent]:
    """Drive the loop until these rows are answered; their events as they come, those of one row in order."""
    events: deque[TokenEvent] = deque()
    for row in rows:
        row.events = events
        loop.submit(row)
    while True:
        while events:
            yield events.popleft()
        if fault := next((row.error for row in rows if row.error), None):
            raise fault
        if all(row.is_over for row in rows):
            return
        loop.step()
