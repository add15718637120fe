"""Test doubles of TensorRT's objects: no GPU, but the installed module's names and numbers of arguments.

A double refuses a name that the class it stands for does not have, and a call with another number of arguments. Calls
are written down; their results are what a test gives, or True.
"""

from __future__ import annotations

import re
from typing import Any

Call = tuple[str, tuple[Any, ...]]


class Double:
    """Stands for an object of class `of`. results: by name, a value or a function of the call's arguments."""

    def __init__(self, of: type, calls: list[Call], **results: Any) -> None:
        for name in results:
            assert hasattr(of, name), f"{of.__name__} has no {name}"
        self.__dict__.update(_of=of, _calls=calls, _results=results)

    def __getattr__(self, name: str) -> Any:
        real, result = getattr(self._of, name), self._results.get(name, True)
        if isinstance(real, property):
            return result

        def call(*arguments: Any) -> Any:
            check_number(real, len(arguments))
            self._calls.append((name, arguments))
            return result(*arguments) if callable(result) else result

        return call

    def __setattr__(self, name: str, value: Any) -> None:
        assert isinstance(getattr(self._of, name), property), f"{self._of.__name__}.{name} cannot be set"
        self._calls.append((name, (value,)))


def check_number(function: Any, number: int) -> None:
    """By the signatures in its documentation, such as "set_input_shape(self: ..., name: str, shape: tuple) -> bool"."""
    signatures = re.findall(
        rf"^(?:\d\. )?{function.__name__}\(self: [^,)]*,? ?(.*)\) -> ", function.__doc__, re.MULTILINE
    )
    assert signatures, f"{function.__name__} has no signature"
    for signature in signatures:
        arguments = [part for part in re.sub(r"\[[^]]*\]", "", signature).split(", ") if part]
        needed = sum(" = " not in part for part in arguments)
        if needed <= number <= len(arguments):
            return
    raise AssertionError(f"{function.__name__} does not take {number} arguments: {signatures}")
