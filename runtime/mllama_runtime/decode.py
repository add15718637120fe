"""The decode loop: rows of prompts -> prefill, then one token a row and step -> events, until every row is finished.

It knows a back end's slots on one side and, per row, a sampler and a text stream on the other.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mllama_runtime.backends import Features, Slots
from mllama_runtime.config import MaskSemantics
from mllama_runtime.sampling import Sampled, Sampler
from mllama_runtime.streaming import TextStream

PREFILL_CHUNK = 512  # tokens; bounds the memory of a prefill's activations

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One generated token of one row.

    `text` is what it releases: often one word, sometimes nothing (half a character, or the possible start of a stop
    string). `finish_reason` is None until the row's last token: "stop" for an end token or a stop string, "length" for
    max_new_tokens or the end of the context.
    """

    row: int
    token_id: int
    text: str
    logprob: float | None
    top_logprobs: tuple[tuple[int, float], ...]
    finish_reason: FinishReason | None


@dataclass(slots=True)
class Row:
    """One request while it is being answered.

    token_ids: the prompt [seq]. visibility: bool [seq, tiles], which tiles each token sees. max_new_tokens: what the
    request asks for, cut to what the context has room for.
    """

    token_ids: NDArray[np.int64]
    visibility: NDArray[np.bool_]
    features: Sequence[Features]
    sampler: Sampler
    text: TextStream
    max_new_tokens: int
    generated: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def cache_len(self) -> int:
        """Cache positions the row can need; its last token is never fed back."""
        return len(self.token_ids) + self.max_new_tokens - 1

    def accept(self, index: int, sampled: Sampled) -> TokenEvent:
        """Take the next token and say what it means to the caller."""
        self.generated.append(sampled.token_id)
        if sampled.token_id in self.sampler.stop_token_ids:
            self.finish_reason, text = "stop", self.text.flush()
        else:
            text = self.text.push(sampled.token_id)
            if self.text.finished:
                self.finish_reason = "stop"
            elif len(self.generated) == self.max_new_tokens:
                self.finish_reason = "length"
                text += self.text.flush()
        return TokenEvent(index, sampled.token_id, text, sampled.logprob, sampled.top_logprobs, self.finish_reason)


def events_from_rows(slots: Slots, rows: Sequence[Row], mask_semantics: MaskSemantics) -> Iterator[TokenEvent]:
    """Answer all rows together; row r uses slot r. Events of one row come in order, rows interleave."""
    for index, row in enumerate(rows):
        start = time.perf_counter()
        logits = prefill(slots, index, row, mask_semantics)
        row.features = ()  # the slot has its own copy, without padding tiles
        event = row.accept(index, row.sampler.sample(logits))
        row.prefill_seconds = time.perf_counter() - start
        yield event
    while num_rows := max((index + 1 for index, row in enumerate(rows) if row.finish_reason is None), default=0):
        yield from decode(slots, rows[:num_rows])


def prefill(slots: Slots, slot: int, row: Row, mask_semantics: MaskSemantics) -> NDArray[np.float32]:
    """Feed a row's prompt to its slot, in chunks; returns the last token's logits [vocab].

    In hf semantics the tokens before the first picture attend to every tile of the tower's output, padding tiles too
    (their mask row becomes zeros, see the decoder's module), so they are fed apart, before those tiles are dropped.
    """
    num_tokens, sees_any = len(row.token_ids), row.visibility.any(axis=1)
    num_before = int(sees_any.argmax()) if row.features and mask_semantics == "hf" else 0
    edges = [*range(0, num_before, PREFILL_CHUNK), *range(num_before, num_tokens, PREFILL_CHUNK), num_tokens]
    for start, stop in pairwise(edges):
        logits = slots.prefill(
            slot,
            row.token_ids[start:stop],
            start,
            row.visibility[start:stop],
            row.features,
            with_padding_tiles=start < num_before,
        )
    return logits[-1]


def decode(slots: Slots, rows: Sequence[Row]) -> Iterator[TokenEvent]:
    """One step for all rows. Finished rows between unfinished ones ride along; their result is not looked at."""
    start = time.perf_counter()
    token_ids = np.array([row.generated[-1] for row in rows], np.int64)
    positions = np.array([len(row.token_ids) + len(row.generated) - 1 for row in rows], np.int64)
    # A row finished by length has no cache position left for its last token; it writes over its own last entry.
    positions = np.minimum(positions, [row.cache_len - 1 for row in rows])
    logits = slots.decode(token_ids, positions)
    events = []
    for index, row in enumerate(rows):
        if row.finish_reason is None:
            events.append(row.accept(index, row.sampler.sample(logits[index])))
    elapsed = time.perf_counter() - start
    for event in events:
        rows[event.row].decode_seconds += elapsed
    yield from events
