"""Drafts for speculative decoding, from the text itself: answers about documents and charts copy a lot.

Prompt lookup (A. Saxena, 2023): the last few tokens are looked up earlier in the text, and what followed them there is
the draft of what follows now. No second model, and a wrong draft costs one step of a few more rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_LONGEST_MATCH = 4  # tokens; a longer match is found as well, by its end
_SHORTEST_MATCH = 2  # one token alone is followed by too many things


class Lookup:
    """A text's own continuations: a token costs the same to add, and a draft to find, however long the text is."""

    def __init__(self) -> None:
        self._token_ids: list[int] = []
        self._followed_at: dict[tuple[int, ...], int] = {}  # the latest place of what followed these tokens

    def __len__(self) -> int:
        return len(self._token_ids)

    def extend(self, token_ids: Iterable[int]) -> None:
        """The text goes on with these."""
        for token_id in token_ids:
            place = len(self._token_ids)
            for length in range(_SHORTEST_MATCH, min(_LONGEST_MATCH, place) + 1):
                self._followed_at[tuple(self._token_ids[place - length :])] = place
            self._token_ids.append(token_id)

    def draft(self, max_tokens: int) -> Sequence[int]:
        """What followed the latest earlier occurrence of the text's end, the longest end first; empty if none did."""
        for length in range(_LONGEST_MATCH, _SHORTEST_MATCH - 1, -1):
            place = self._followed_at.get(tuple(self._token_ids[-length:]))
            if place is not None:
                return self._token_ids[place : place + max_tokens]
        return ()
