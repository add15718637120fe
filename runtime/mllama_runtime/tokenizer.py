"""Text to token ids and back, over a bundle's tokenizer.json.

`chat` renders a conversation, `prompt` encodes it here, `streaming` decodes the answer. Special tokens are searched for
in this file and the library is told to know none, so one object that never changes serves every thread and both
readings of `<|eot_id|>`: control token or plain text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import tokenizers

from mllama_runtime.errors import BundleError, RequestError

BOS_TOKEN = "<|begin_of_text|>"
IMAGE_TOKEN = "<|image|>"


def checked_text(value: object, where: str) -> str:
    """`value` as a plain `str` that UTF-8 can hold, or a RequestError about `where`."""
    if not isinstance(value, str):
        raise RequestError("is not text", where=where, expected="a string", found=type(value).__name__)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            "holds half of a surrogate pair, which is no character",
            where=where,
            found=f"U+{ord(value[error.start]):04X} at character {error.start}",
        ) from None
    return str.__str__(value)


class Tokenizer:
    """A byte-level BPE with Llama 3's special tokens by name; safe to share between threads.

    Args:
        backend: the loaded tokenizer; it is owned, and configured, by this object from here on.
        where: the name that errors give it.

    Attributes:
        backend: the same, for `streaming`, which reads tokens from it.
        special_tokens: the special tokens' names.
        special_ids: their ids.

    Raises:
        BundleError: a special token this runtime needs is missing, or one matches in a way it does not know.
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, where: str = "tokenizer") -> None:
        added = backend.get_added_tokens_decoder()
        special = {token.content: token_id for token_id, token in added.items() if token.special}
        for name in (BOS_TOKEN, IMAGE_TOKEN):
            if name not in special:
                raise BundleError(f"has no special token {name}", where=where, hint="use the tokenizer of an mllama")
        for token in added.values():
            if token.special and (token.lstrip or token.rstrip or token.single_word):
                raise BundleError(
                    f"special token {token.content} swallows its surroundings",
                    where=where,
                    expected="lstrip, rstrip and single_word false",
                )
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # the library reads special tokens as plain text
        self.backend = backend
        self._where = where
        self._special = special
        longest_first = sorted(special, key=len, reverse=True)
        self._special_pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
        self.special_tokens: frozenset[str] = frozenset(special)
        self.special_ids: frozenset[int] = frozenset(special.values())
        self.bos_token_id: int = special[BOS_TOKEN]
        self.image_token_id: int = special[IMAGE_TOKEN]

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Reads a tokenizer.json; BundleError names the file when it is missing or is not one."""
        try:
            source = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BundleError("cannot be read", where=path, found=error) from error
        try:
            backend = tokenizers.Tokenizer.from_str(source)
        except Exception as error:  # the library raises nothing narrower
            raise BundleError("is not a tokenizer.json", where=path, found=error) from error
        return cls(backend, where=str(path))

    @property
    def vocab_size(self) -> int:
        """Number of tokens, the special ones and `<|image|>` included."""
        return int(self.backend.get_vocab_size(with_added_tokens=True))

    def id_of(self, token: str) -> int:
        """The id of a token by its name, for example `<|eot_id|>`."""
        token_id: int | None = self.backend.token_to_id(token)
        if token_id is None:
            raise BundleError(f"has no token {token!r}", where=self._where)
        return token_id

    def encode(self, text: str, *, special: bool, add_bos: bool = False, guard: str = "") -> list[int]:
        """Token ids of `text`.

        Args:
            special: whether the spelling of a special token stands for that token; if not, it is plain text.
            add_bos: put `<|begin_of_text|>` where the reference processor puts it: behind the pictures that open the
                text, and only if the text holds none (`build_string_from_input` in transformers' processing_mllama).
            guard: a character left out once special tokens have been found: `<`, guard, `|eot_id|>` is plain text
                (see `chat.RenderedChat`).

        Raises:
            RequestError: `text` is no text.
        """
        text = checked_text(text, "text")
        token_ids: list[int] = []
        for index, piece in enumerate(self._special_pattern.split(text) if special else [text]):
            if index % 2:  # every second piece is what the pattern matched
                token_ids.append(self._special[piece])
            else:
                plain = piece.replace(guard, "") if guard else piece
                token_ids.extend(self.backend.encode(plain, add_special_tokens=False).ids)
        if add_bos and self.bos_token_id not in token_ids:
            start = next((i for i, token_id in enumerate(token_ids) if token_id != self.image_token_id), len(token_ids))
            token_ids.insert(start, self.bos_token_id)
        return token_ids

    def decode(self, token_ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of `token_ids`; ids the vocabulary does not have stand for nothing."""
        return str(self.backend.decode(list(token_ids), skip_special_tokens=skip_special))
