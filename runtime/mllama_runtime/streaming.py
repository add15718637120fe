"""From token ids to text while they are being generated: the last step between the decode loop and the caller.

The tokens of a byte-level BPE are strings of bytes that need not end where a character ends. Their bytes go through
Python's incremental UTF-8 decoder; then a search for the stop strings withholds what might be the start of one.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from tokenizers import Tokenizer, decoders

from mllama_runtime.errors import BundleError


def _byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in a byte-level vocabulary (GPT-2): printable Latin-1 for itself, the
    others counted up from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_alphabet()


def _token_bytes(token: str) -> bytes:
    try:
        return bytes(map(_BYTE_OF_CHARACTER.__getitem__, token))
    except KeyError:  # an added token written outside the alphabet stands for its own text
        return token.encode()


class _StopString:
    """Follows one stop string through the text, a character at a time (Knuth, Morris and Pratt)."""

    __slots__ = ("_borders", "_pattern", "matched")

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._borders = [0, 0]  # [k]: length of the longest shorter prefix of the pattern that ends its first k
        self.matched = 0
        for character in pattern[1:]:
            self._borders.append(self._extended(self._borders[-1], character))

    def _extended(self, matched: int, character: str) -> int:
        while matched and self._pattern[matched] != character:
            matched = self._borders[matched]
        return matched + (self._pattern[matched] == character)

    def step(self, character: str) -> int:
        """Read one character; the pattern's length when that completes it, else 0."""
        self.matched = self._extended(self.matched, character)
        return self.matched if self.matched == len(self._pattern) else 0


class TextStream:
    """The text of one row, released as its token ids arrive.

    Without stop strings, the deltas joined are exactly `tokenizer.decode(ids, skip_special_tokens=True)`: an
    unfinished character waits for its last byte, and bytes that can no longer become one are U+FFFD at once. With stop
    strings, the text ends right before the first one to be complete (of several completed by the same character, the
    longest), however the tokens cut the text, and nothing after it is ever released.

    A token costs time proportional to its own length. (`tokenizers.decoders.DecodeStream` cannot be flushed, keeps
    back every text that ends in U+FFFD, and decodes a run of invalid bytes anew with each token.)

    Args:
        tokenizer: with a byte-level decoder.
        stop: stop strings, none of them empty.

    Attributes:
        finished: a stop string was met.

    Raises:
        BundleError: the tokenizer's decoder is not byte-level.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        if not isinstance(tokenizer.decoder, decoders.ByteLevel):
            raise BundleError(
                "the decoder cannot be streamed",
                where="tokenizer.json",
                expected="a ByteLevel decoder, as Llama 3 has",
                found=type(tokenizer.decoder).__name__,
            )
        self.finished = False
        self._id_to_token = tokenizer.id_to_token
        self._special_ids = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stops = [_StopString(pattern) for pattern in stop]
        self._withheld = ""
        self._released: list[str] = []

    @property
    def text(self) -> str:
        """All text released so far."""
        return "".join(self._released)

    def push(self, token_id: int) -> str:
        """Take the next token and return the text it releases, often empty; always empty once `finished`."""
        token = None if token_id in self._special_ids else self._id_to_token(token_id)
        return "" if token is None else self._release(self._decoder.decode(_token_bytes(token)))

    def flush(self) -> str:
        """Return what was still held back, after the last token: an unfinished character is U+FFFD, as in `decode`."""
        delta = self._release(self._decoder.decode(b"", final=True))
        if not self.finished:
            delta += self._withheld
            self._released.append(self._withheld)
            self._withheld = ""
        return delta

    def _release(self, new: str) -> str:
        if self.finished:
            return ""
        text = self._withheld + new
        end = self._stop_end(new)
        if end is None:
            end = len(text) - max((stop.matched for stop in self._stops), default=0)
        else:
            self.finished = True
            end += len(self._withheld)
        self._withheld = text[end:]
        self._released.append(text[:end])
        return text[:end]

    def _stop_end(self, new: str) -> int | None:
        """Where in `new` the text ends because a stop string begins there (below 0: in the withheld text)."""
        if not self._stops:
            return None
        for index, character in enumerate(new):
            length = max([stop.step(character) for stop in self._stops])
            if length:
                return index + 1 - length
        return None
