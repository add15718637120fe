"""One request while it is answered: its prompt in chunks on one side, the events its caller sees on the other."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mllama_runtime.backends import Chunk, Features, Slots
from mllama_runtime.config import MaskSemantics
from mllama_runtime.errors import MllamaError
from mllama_runtime.sampling import Sampled, Sampler
from mllama_runtime.streaming import TextStream

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


@dataclass(slots=True, eq=False)
class Row:
    """One request while it is being answered.

    token_ids: the prompt [seq]. visibility: bool [seq, tiles], which tiles each token sees. max_new_tokens: what the
    request asks for, cut to what the context has room for. index: its number among those asked together. events: where
    its events go. slot, num_asked (tokens that the back end was asked for) and began are the loop's; error is set
    instead of a finish_reason when the request fails.
    """

    token_ids: NDArray[np.int64]
    visibility: NDArray[np.bool_]
    features: Sequence[Features]
    sampler: Sampler
    text: TextStream
    max_new_tokens: int
    index: int = 0
    events: deque[TokenEvent] = field(default_factory=deque)
    generated: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: MllamaError | None = None
    is_over: bool = False
    slot: int = -1
    num_asked: int = 0
    began: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def cache_len(self) -> int:
        """Cache positions the row can need; its last token is never fed back."""
        return len(self.token_ids) + self.max_new_tokens - 1

    def accept(self, sampled: Sampled) -> None:
        """Take the next token and say what it means to the caller."""
        elapsed = time.perf_counter() - self.began
        if self.generated:
            self.decode_seconds = elapsed - self.prefill_seconds
        else:
            self.prefill_seconds = elapsed
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
        self.is_over = self.finish_reason is not None
        self.events.append(
            TokenEvent(self.index, sampled.token_id, text, sampled.logprob, sampled.top_logprobs, self.finish_reason)
        )


def chunks_of(row: Row, mask_semantics: MaskSemantics, size: int) -> Iterator[Chunk]:
    """A prompt in chunks of at most `size` tokens.

    In hf semantics the tokens before the first picture attend to every tile of the tower's output, padding tiles too
    (their mask row becomes zeros, see the decoder's module): a chunk that has some of them is fed with those tiles.
    """
    num_tokens, sees_any = len(row.token_ids), row.visibility.any(axis=1)
    num_before = int(sees_any.argmax()) if row.features and mask_semantics == "hf" else 0
    for start, stop in pairwise([*range(0, num_tokens, size), num_tokens]):
        part = slice(start, stop)
        yield Chunk(
            row.token_ids[part], start, row.visibility[part], row.features, with_padding_tiles=start < num_before
        )


def prefill(slots: Slots, slot: int, row: Row, mask_semantics: MaskSemantics) -> NDArray[np.float32]:
    """Feed a row's whole prompt to its slot; returns the last token's logits [vocab]."""
    logits = np.empty((0, 0), np.float32)
    for chunk in chunks_of(row, mask_semantics, slots.prefill_chunk):
        logits = slots.prefill(slot, chunk)
    last: NDArray[np.float32] = logits[-1]
    return last
