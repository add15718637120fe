"""The command `mllama`: a table of verbs loaded when called, and the one place that turns errors into exit codes.

Exit codes: 0 done; 1 a gate failed; 2 usage; 3 bad input; 4 environment; 5 resources; 70 a bug of ours;
130 Ctrl-C; 141 the reader of our output went away; 143 SIGTERM. Errors are one line on stderr, with --json also
`{"error": {...}}` on stdout. With MLLAMA_TRACEBACK=1 the traceback is shown too.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click

from .. import __version__
from ..disk import is_full
from ..errors import EnvironmentFault, MllamaError, ResourceError
from ..fields import printable

_OWN_PACKAGES = ("mllama_runtime", "mllama_exporter")
_JSON = "mllama.json"


@dataclass(frozen=True, slots=True)
class Verb:
    """Where a subcommand lives, its line of help, and the extra of the distribution that it needs."""

    target: str
    help: str
    extra: str


VERBS = {
    "export": Verb("mllama_exporter.cli.export:command", "Make a bundle from a Hugging Face checkpoint.", "export"),
    "validate": Verb("mllama_exporter.cli.validate:command", "Compare a bundle with its checkpoint.", "export"),
    "inspect": Verb("mllama_runtime.cli.inspect:command", "Show what a bundle holds.", "cpu"),
    "verify": Verb("mllama_runtime.cli.verify:command", "Check every file of a bundle.", "cpu"),
    "generate": Verb("mllama_runtime.cli.generate:command", "Answer one prompt about pictures or text.", "cpu"),
    "chat": Verb("mllama_runtime.cli.chat:command", "Talk with a model, pictures attached.", "cpu"),
    "bench": Verb("mllama_runtime.cli.bench:command", "Measure prefill and decode of a bundle.", "cpu"),
}


class LazyGroup(click.Group):
    """A group that lists its verbs without importing them, and ends every failure in one line and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        verb = VERBS.get(cmd_name)
        if verb is None:
            return None
        module, attribute = verb.target.split(":")
        with _missing_packages(cmd_name, verb):
            command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl([(name, verb.help) for name, verb in VERBS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        with _sigterm_as_exit():
            try:
                return super().invoke(ctx)
            except (click.exceptions.Exit, click.Abort):
                raise
            except click.ClickException as fault:
                if _JSON in ctx.meta:
                    _echo_json_error(type(fault).__name__, fault.exit_code, fault.format_message())
                raise
            except KeyboardInterrupt:
                click.echo("mllama: interrupted", err=True)
                ctx.exit(130)
            except BrokenPipeError:
                # The interpreter flushes stdout once more at its end, and must not fail again.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                ctx.exit(141)
            except Exception as fault:
                _fail(ctx, fault)


def json_option[F: Callable[..., Any]](command: F) -> F:
    ...


def example(*lines: str) -> str:
    ...
