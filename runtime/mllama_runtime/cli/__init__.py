"""The command `mllama`: a table of verbs loaded when called, and the one place that turns errors into exit codes.

Exit codes: 0 done; 1 a gate failed; 2 usage; 3 bad input; 4 environment; 5 resources; 70 a bug of ours;
130 Ctrl-C; 141 the reader of our output went away; 143 SIGTERM. Errors are one line on stderr, with --json also
`{"error": {...}}` on stdout. With MLLAMA_TRACEBACK=1 the traceback is shown too.
"""

from __future__ import annotations

import errno
import importlib
import io
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click

from mllama_runtime import __version__
from mllama_runtime.disk import is_full
from mllama_runtime.errors import EnvironmentFault, MllamaError, ResourceError
from mllama_runtime.fields import printable

_JSON = "mllama.json"
_BUG = 70  # EX_SOFTWARE of sysexits.h


@dataclass(frozen=True, slots=True)
class Verb:
    """Where a subcommand lives, its line of help, and the extra of the distribution that it needs."""

    target: str
    help: str
    extra: str


VERBS = {
    "plan": Verb("mllama_exporter.cli.plan:command", "Say what a model takes, and which GPU it fits.", "export"),
    "export": Verb("mllama_exporter.cli.export:command", "Make a bundle from a Hugging Face checkpoint.", "export"),
    "quantize": Verb("mllama_exporter.cli.quantize:command", "Make a smaller bundle of a bundle.", "export"),
    "build": Verb("mllama_exporter.cli.build:command", "Build a bundle's graphs into TensorRT engines.", "export"),
    "validate": Verb("mllama_exporter.cli.validate:command", "Compare a bundle with its checkpoint.", "export"),
    "inspect": Verb("mllama_runtime.cli.inspect:command", "Show what a bundle holds.", "cpu"),
    "verify": Verb("mllama_runtime.cli.verify:command", "Check every file of a bundle.", "cpu"),
    "generate": Verb("mllama_runtime.cli.generate:command", "Answer one prompt about pictures or text.", "cpu"),
    "chat": Verb("mllama_runtime.cli.chat:command", "Talk with a model, pictures attached.", "cpu"),
    "eval": Verb("mllama_runtime.cli.eval:command", "Score a bundle's answers to questions of a file.", "cpu"),
    "bench": Verb("mllama_runtime.cli.bench:command", "Measure prefill and decode of a bundle.", "cpu"),
}


class LazyGroup(click.Group):
    """A group that lists its verbs without importing them, and ends every failure in one line and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        module, attribute = VERBS[cmd_name].target.split(":")
        ctx.invoked_subcommand = cmd_name  # a missing package is blamed on its verb
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl([(name, verb.help) for name, verb in VERBS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        _make_streams_usable()
        with _sigterm_as_exit():
            try:
                result = super().invoke(ctx)
                sys.stdout.flush()  # a reader that went away is noticed here, not at the interpreter's end
                return result
            except click.exceptions.Exit:
                raise
            except click.ClickException as fault:
                if _JSON in ctx.meta:
                    _echo_json(type(fault).__name__, fault.exit_code, fault.format_message())
                raise
            except (KeyboardInterrupt, click.Abort):
                click.echo("mllama: interrupted", err=True)
                ctx.exit(130)
            except BrokenPipeError:
                _abandon_stdout()
                ctx.exit(141)
            except Exception as fault:
                _fail(ctx, fault)


Decorated = Callable[..., Any]


def json_option(command: Decorated) -> Decorated:
    """`--json`, given to the function as `as_json`; errors then come as JSON on stdout too."""

    def remember(ctx: click.Context, param: click.Parameter, value: bool) -> bool:
        if value:
            ctx.meta[_JSON] = True
        return value

    help_text = "Print one JSON object on stdout."
    return click.option("--json", "as_json", is_flag=True, is_eager=True, callback=remember, help=help_text)(command)


def example(*lines: str) -> str:
    """The epilog of a verb's --help: commands a reader can copy."""
    return "\b\nExample:\n" + "\n".join(f"  {line}" for line in lines)


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mllama")
def main() -> None:
    """Llama 3.2 Vision from checkpoint to production: export, check, validate and run bundles."""


def _fail(ctx: click.Context, fault: Exception) -> NoReturn:
    error = _for_people(fault, VERBS.get(ctx.invoked_subcommand or ""))
    message = str(error or f"internal error: {type(fault).__name__}: {fault}")
    code = error.exit_code if error else _BUG
    if os.environ.get("MLLAMA_TRACEBACK"):
        traceback.print_exception(fault)
    elif error is None:
        message += "; set MLLAMA_TRACEBACK=1 to see the traceback, and report it"
    if _JSON in ctx.meta:
        names = ("where", "what", "expected", "found", "hint") if error else ()
        fields = {name: getattr(error, name) for name in names}
        _echo_json(type(error or fault).__name__, code, message, **fields)
    click.echo(f"mllama: error: {printable(' '.join(message.split()))}", err=True)
    ctx.exit(code)


def _for_people(fault: Exception, verb: Verb | None) -> MllamaError | None:
    """The error of our own tree that an exception stands for; None for a bug."""
    if isinstance(fault, MllamaError):
        return fault
    if isinstance(fault, ImportError) and verb and not (fault.name or "").startswith("mllama_"):
        hint = f'pip install "mllama-deploy[{verb.extra}]"'
        return EnvironmentFault(f"a package is missing or broken ({fault})", where=fault.name, hint=hint)
    if isinstance(fault, MemoryError):
        return ResourceError("out of memory")
    if isinstance(fault, OSError) and fault.errno in (errno.EMFILE, errno.ENFILE):
        return ResourceError("too many open files", where=fault.filename, hint="raise the limit (`ulimit -n`)")
    if isinstance(fault, OSError) and is_full(fault):
        return ResourceError("the disk is full", where=fault.filename, hint="free some space, or write elsewhere")
    return None


def _echo_json(kind: str, code: int, message: str, **fields: object) -> None:
    texts = {name: None if value is None else str(value) for name, value in fields.items()}
    try:
        click.echo(json.dumps({"error": {"type": kind, "exit_code": code, "message": message, **texts}}))
    except OSError:  # stdout is full or gone, perhaps the very fault to be told: stderr still tells it
        _abandon_stdout()


def _abandon_stdout() -> None:
    """The interpreter flushes stdout once more at its end, and must not fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _make_streams_usable() -> None:
    """Neither a closed stream nor an encoding that lacks a character of an answer is a reason to fail."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115 - it stays open
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


@contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    """Let SIGTERM unwind the stack like an exception, so that temporary files are removed."""

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        signal.signal(number, signal.SIG_IGN)  # once is enough: cleaning up is under way
        sys.exit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
