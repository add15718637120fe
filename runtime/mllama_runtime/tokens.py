"""Slots that give tokens: what the decode loop stands on, over logits on the host or a sampler on the device.

`HostTokens` takes logits from any back end's slots and chooses with numpy; `backends.device_tokens` keeps the choice on
the device and tells it one step later.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mllama_runtime.backends import Chunk, Slots
from mllama_runtime.errors import MllamaError
from mllama_runtime.sampling import Sampled, Sampler

Outcome = Sampled | MllamaError
"""A slot's next token, or why there is none: the fault of that slot's request alone."""


class Pending(Protocol):
    """Tokens that were asked for; reading waits for them, once."""

    def read(self) -> Sequence[tuple[int, Outcome]]:
        """(slot, outcome) of every slot that was asked for."""
        ...


class TokenSlots(Protocol):
    """Slots with a sampler each. All calls return at once but `Pending.read`."""

    prefill_chunk: int

    @property
    def max_pending(self) -> int:
        """Steps that may be under way when the next begins; 0 where a step is done when it returns."""
        ...

    def extend(self, slot: int, chunk: Chunk) -> None:
        """Append a chunk of a prompt to a slot."""
        ...

    def first(self, slot: int, sampler: Sampler) -> Pending:
        """Choose the token that follows the prompt. The sampler is the slot's from here on."""
        ...

    def step(self, slots: Sequence[int]) -> Pending:
        """Feed each of these slots its last token, and choose the next."""
        ...

    def leave(self, slot: int) -> None:
        """The slot's request is over; what is under way for it comes to nothing."""
        ...


class Done:
    """Tokens that are there already."""

    def __init__(self, outcomes: Sequence[tuple[int, Outcome]]) -> None:
        self._outcomes = outcomes

    def read(self) -> Sequence[tuple[int, Outcome]]:
        return self._outcomes


class HostTokens:
    """Logits come to the host, and numpy chooses."""

    max_pending = 0

    def __init__(self, slots: Slots, num_slots: int, cache_len: int) -> None:
        self._slots, self._cache_len, self.prefill_chunk = slots, cache_len, slots.prefill_chunk
        self._samplers: list[Sampler | None] = [None] * num_slots
        self._logits: dict[int, NDArray[np.float32]] = {}
        self._visible: dict[int, NDArray[np.bool_]] = {}  # what the last token of each slot's prompt sees: [tiles]
        self._positions, self._last = np.zeros(num_slots, np.int64), np.zeros(num_slots, np.int64)

    def extend(self, slot: int, chunk: Chunk) -> None:
        self._logits[slot] = self._slots.prefill(slot, chunk)[-1]
        self._visible[slot], self._positions[slot] = chunk.visibility[-1], chunk.stop

    def first(self, slot: int, sampler: Sampler) -> Pending:
        self._samplers[slot] = sampler
        return Done([(slot, self._chosen(slot, self._logits.pop(slot)))])

    def step(self, slots: Sequence[int]) -> Pending:
        num_rows = max(slots) + 1
        # Slots between ride along: they write where their next token goes, or over their last entry when they are full.
        positions = np.minimum(self._positions[:num_rows], self._cache_len - 1)
        logits = self._slots.decode(self._last[:num_rows], positions)
        self._positions[list(slots)] += 1
        return Done([(slot, self._chosen(slot, logits[slot])) for slot in slots])

    def check(self, slot: int, draft: Sequence[int]) -> list[Outcome]:
        """Feed a slot its last token and a draft of what follows; the tokens that are really chosen, as far as they
        agree with the draft, and one more.

        Each is chosen exactly as a step of its own would, randomness included, but for the rounding of products over
        several tokens at once.
        """
        position = int(self._positions[slot])
        token_ids = np.array([self._last[slot], *draft], np.int64)
        visibility = np.tile(self._visible[slot], (len(token_ids), 1))
        logits = self._slots.prefill(slot, Chunk(token_ids, position, visibility), num_logits=len(token_ids))
        outcomes: list[Outcome] = []
        for index, row in enumerate(logits):
            outcomes.append(outcome := self._chosen(slot, row))
            if index == len(draft) or isinstance(outcome, MllamaError) or outcome.token_id != draft[index]:
                break
        self._positions[slot] += len(outcomes)
        return outcomes

    def leave(self, slot: int) -> None:
        self._samplers[slot] = None
        self._positions[slot] = 0

    def _chosen(self, slot: int, logits: NDArray[np.float32]) -> Outcome:
        sampler = self._samplers[slot]
        if sampler is None:
            raise RuntimeError(f"slot {slot} has no request")
        try:
            sampled = sampler.sample(logits)
        except MllamaError as fault:
            return fault
        self._last[slot] = sampled.token_id
        return sampled
