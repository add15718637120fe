"""The sandbox a bundle's chat template runs in; `chat` fills it with messages.

The environment is the one transformers renders templates in (utils/chat_template_utils.py), so that a published
template writes the same text here, with limits on time and size added: a template is a file someone else wrote.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils

from mllama_runtime.errors import BundleError, RequestError

MAX_CHARS = 1 << 24  # of one string or of the whole output: far beyond any context length
MAX_SECONDS = 10.0  # of processor time
_DEADLINE = "render deadline"  # not an identifier, so no template can name it


class SandboxedTemplate:
    """A compiled template; safe to share between threads.

    Args:
        source: the template.
        where: the name that errors give it.

    Raises:
        BundleError: it is not a Jinja template.
    """

    def __init__(self, source: str, *, where: str) -> None:
        self._where = where
        environment = _Environment()
        try:
            self._template = environment.from_string(_with_ticks(environment.parse(source)))
        except Exception as error:  # besides its own errors, Jinja lets Python's compiler speak
            line = f"line {error.lineno}, " if isinstance(error, jinja2.TemplateSyntaxError) else ""
            raise BundleError("is not a chat template", where=where, found=f"{line}{error}") from error

    def render(self, variables: Mapping[str, object]) -> str:
        """What the template writes.

        Raises:
            RequestError: the template calls `raise_exception`; `found` is what it says.
            BundleError: it fails in any other way, or passes a limit.
        """
        pieces: list[str] = []
        num_chars = 0
        try:
            for piece in self._template.generate({**variables, _DEADLINE: time.thread_time() + MAX_SECONDS}):
                pieces.append(piece)
                num_chars += len(piece)
                _check_size(num_chars)
        except _Refusal as refusal:
            raise RequestError(
                "the chat template refuses these messages", where=self._where, found=str(refusal)[:300]
            ) from refusal
        except Exception as error:  # a template can raise whatever Python can
            kind = "" if isinstance(error, _LimitError) else f"{type(error).__name__}: "
            raise BundleError(
                "the chat template fails on these messages", where=self._where, found=kind + str(error)[:300]
            ) from error
        return "".join(pieces)


class _Refusal(Exception):  # noqa: N818 - the template's own decision
    pass


class _LimitError(Exception):
    pass


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "**"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # constants would be computed while loading, out of reach of every limit
            extensions=[_GenerationBlock, jinja2.ext.loopcontrols],
        )
        del self.globals["lipsum"]
        for name in ("batch", "center", "format", "slice"):  # of a number they make gigabytes, in one go
            del self.filters[name]
        self.globals.update(
            raise_exception=_raise_exception, strftime_now=_strftime_now, dict=_new_dict, namespace=_Namespace
        )
        self.filters.update(tojson=_tojson, _tick=_tick)

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        _check_size(_result_size(operator, left, right))
        return super().call_binop(context, operator, left, right)


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}`, which marks the assistant's words for training, is nothing but its content here."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's interface

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


class _Namespace(jinja2.utils.Namespace):
    """`namespace()` without names that could reach Python's internals, and without endless growth."""

    def __init__(self, /, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")
        if isinstance(value, str):
            _check_size(len(value))
        super().__setitem__(name, value)


def _raise_exception(message: object) -> NoReturn:
    raise _Refusal(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _new_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)  # the class itself would lend its methods


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it stands, where Jinja's own filter escapes it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _with_ticks(tree: jinja2.nodes.Template) -> jinja2.nodes.Template:
    """Has every loop and every macro look at the clock on each turn."""
    turning: list[jinja2.nodes.For | jinja2.nodes.Macro | jinja2.nodes.CallBlock] = [
        *tree.find_all(jinja2.nodes.For),
        *tree.find_all(jinja2.nodes.Macro),
        *tree.find_all(jinja2.nodes.CallBlock),
    ]
    for node in turning:
        tick = jinja2.nodes.Filter(jinja2.nodes.ContextReference(), "_tick", [], [], None, None)
        node.body.insert(0, jinja2.nodes.ExprStmt(tick, lineno=node.lineno))
    return tree.set_environment(tree.environment)  # type: ignore[return-value, arg-type]


def _tick(context: jinja2.runtime.Context) -> None:
    if time.thread_time() > context.parent[_DEADLINE]:
        raise _LimitError(f"it takes more than {MAX_SECONDS:g} seconds")


def _check_size(num_chars: int) -> None:
    if num_chars > MAX_CHARS:
        raise _LimitError(f"it makes more than {MAX_CHARS} characters")


def _result_size(operator: str, left: object, right: object) -> int:
    """Characters, items or bits of a product or a power, before it is computed."""
    if isinstance(left, int) and isinstance(right, int):
        return left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
    pairs = ((left, right), (right, left))
    return max(
        (len(many) * n for many, n in pairs if isinstance(many, str | list | tuple) and isinstance(n, int)), default=0
    )
