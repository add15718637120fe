"""Strict JSON at the edge: bytes -> JSON value -> frozen dataclass, and back to the same bytes every time.

The manifest and the safetensors headers are read through here. Nothing is defaulted, converted or ignored: a field that
is missing, unknown or of another type is an error that names it by its path, such as `graphs.decoder.inputs[2].dtype`.
"""

from __future__ import annotations

import json
import math
import re
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from reprlib import Repr
from typing import Any, Literal, NewType, NoReturn, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from mllama_runtime.errors import InputError

T = TypeVar("T")
Prose = NewType("Prose", str)
"""What people or models wrote: unlike a `str` field it may hold line breaks and other control characters."""

_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_SHORT.maxlevel = 2
_UNCLEAN = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_HALF = re.compile(r"[\ud800-\udfff]")
_NAMES: dict[object, str] = {
    dict: "an object",
    list: "a list",
    str: "a string",
    Prose: "a string",
    bool: "a boolean",
    int: "an integer",
    float: "a number",
    type(None): "null",
}


def load_json(data: bytes, *, where: object, error: type[InputError]) -> object:
    """The value of a JSON text; refuses what Python's parser lets through: duplicate keys, NaN, unbounded nesting.

    Raises:
        error: naming `where`, for anything that is not one UTF-8 JSON value.
    """

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        value: dict[str, object] = {}
        for key, item in pairs:
            if key in value:
                raise error("a key stands twice in one object", where=where, found=show(key))
            value[key] = item
        return value

    def no_constant(text: str) -> NoReturn:
        raise error("not JSON", where=where, expected="a finite number", found=text)

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=no_constant)
    except RecursionError:
        raise error("the JSON is nested too deeply", where=where) from None
    except ValueError as fault:  # of the decoder, of the parser, and for integers of thousands of digits
        raise error(f"not JSON ({fault})", where=where) from None


def dump_json(value: object) -> bytes:
    """A dataclass as JSON; equal values give equal bytes (sorted keys, indent 2, newline at the end)."""
    return (json.dumps(to_plain(value), indent=2, sort_keys=True, allow_nan=False) + "\n").encode("utf-8")


def to_plain(value: object) -> object:
    """Dataclasses and mappings as dicts, tuples as lists, scalars as they are."""
    if is_dataclass(value):
        return {field.name: to_plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [to_plain(item) for item in value]
    return value


def parse(kind: type[T], value: object, *, where: object, error: type[InputError], path: str = "") -> T:
    """Read a JSON value as `kind`: a dataclass of scalars, literals, tuples, mappings by string, unions, dataclasses.

    Args:
        where: the file the value came from, for the error.
        path: the field within it.

    Raises:
        error: naming file and field. Strings with control characters or lone surrogates are refused too: they end up
            in file names and on terminals. `Prose` may hold control characters.
    """
    return cast(T, _Parser(where, error).read(kind, value, path))


def show(value: object) -> str:
    """A value as it may stand in an error line: short, and without raw control characters."""
    return _SHORT.repr(value)


def printable(text: str) -> str:
    """Text for one line of a terminal: whatever could move the cursor or end the line stands as an escape."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def is_clean(text: str) -> bool:
    """Whether a string is free of control characters, line separators and lone surrogates."""
    return _UNCLEAN.search(text) is None


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


class _Parser:
    def __init__(self, where: object, error: type[InputError]) -> None:
        self.where, self.error = where, error

    def fail(self, what: str, path: str, *, expected: str | None = None, found: str | None = None) -> NoReturn:
        where = f"{self.where}: {path}" if path else self.where
        raise self.error(what, where=where, expected=expected, found=found)

    def read(self, kind: Any, value: object, path: str) -> object:
        origin, args = get_origin(kind), get_args(kind)
        if origin in (Union, types.UnionType):
            member = next((arg for arg in args if _fits(arg, value)), None)
            if member is None:
                self.fail("wrong type", path, expected=_name(kind), found=_found(value))
            return self.read(member, value, path)
        if not _fits(kind, value):
            self.fail("wrong type", path, expected=_name(kind), found=_found(value))
        if is_dataclass(kind):
            return self._record(cast(type, kind), cast(dict[str, object], value), path)
        if origin is Literal:
            if value not in args:
                self.fail("unknown value", path, expected=_name(kind), found=show(value))
        elif origin is tuple:
            return self._tuple(args, cast(list[object], value), path)
        elif origin is Mapping:
            items = cast(dict[str, object], value).items()
            return {self.read(args[0], key, path): self.read(args[1], item, _key(path, key)) for key, item in items}
        elif kind is float:
            return self._float(cast(float, value), path)
        elif kind is str or kind is Prose:
            return self._text(kind, cast(str, value), path)
        return value

    def _record(self, kind: type, value: dict[str, object], path: str) -> object:
        hints = _hints(kind)
        if missing := [name for name in hints if name not in value]:
            self.fail("the field is missing", _key(path, missing[0]))
        if unknown := [name for name in value if name not in hints]:
            self.fail("the field is unknown", _key(path, unknown[0]), expected=f"only {', '.join(hints)}")
        return kind(**{name: self.read(hint, value[name], _key(path, name)) for name, hint in hints.items()})

    def _tuple(self, args: tuple[Any, ...], value: list[object], path: str) -> tuple[object, ...]:
        kinds = args[:1] * len(value) if args[1:] == (...,) else args
        if len(kinds) != len(value):
            self.fail("wrong length", path, expected=f"{len(kinds)} entries", found=f"{len(value)}")
        pairs = zip(kinds, value, strict=True)
        return tuple(self.read(kind, item, f"{path}[{index}]") for index, (kind, item) in enumerate(pairs))

    def _float(self, value: float, path: str) -> float:
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            self.fail("the number is out of range", path, expected="a finite float", found=show(value))
        return number

    def _text(self, kind: object, value: str, path: str) -> str:
        if kind is Prose and _HALF.search(value):
            self.fail("the string holds half a character", path, found=show(value))
        if kind is str and not is_clean(value):
            self.fail("the string holds control characters or half a character", path, found=show(value))
        return value


def _fits(kind: Any, value: object) -> bool:
    """Whether the JSON type of `value` is that of `kind`, its content aside."""
    origin = get_origin(kind)
    if is_dataclass(kind) or origin is Mapping:
        return isinstance(value, dict)
    if origin is tuple:
        return isinstance(value, list)
    if origin is Literal:
        return type(value) in {type(arg) for arg in get_args(kind)}
    if kind is float:
        return type(value) in (int, float)
    return type(value) is (str if kind is Prose else kind)


def _key(path: str, key: str) -> str:
    if not key.isidentifier():
        return f"{path}[{show(key)}]"
    return f"{path}.{key}" if path else key


def _name(kind: Any) -> str:
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " or ".join(str(arg) for arg in args)
    if origin in (Union, types.UnionType):
        return " or ".join(_name(arg) for arg in args)
    return _NAMES[list if origin is tuple else dict if origin is Mapping or is_dataclass(kind) else kind]


def _found(value: object) -> str:
    return _NAMES[type(value)] if isinstance(value, dict | list) else show(value)
