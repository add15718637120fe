"""What `generate` and `chat` share: options that become an engine and sampling parameters, and answers on stdout.

stdout carries answers and nothing else. Whatever is said beside them goes to stderr, where a person reads it.
"""

from __future__ import annotations

import functools
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from mllama_runtime.backends import BACKENDS
from mllama_runtime.cli import Decorated
from mllama_runtime.engine import Engine, Stream
from mllama_runtime.errors import MllamaError
from mllama_runtime.sampling import SamplingParams

_DEFAULTS = SamplingParams()
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but newline and tab


def _bias(text: str) -> tuple[int, float]:
    token_id, _, amount = text.partition("=")
    try:
        return int(token_id), float(amount)
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a token id, '=' and a number, such as 42=-100.") from None


_NUMBERS: tuple[tuple[str, Any, str], ...] = (
    ("max_new_tokens", int, "End the answer after N tokens."),
    ("min_new_tokens", int, "Do not let the model end the answer before N tokens."),
    ("temperature", float, "0 takes the likeliest token every time, 1 samples what the model predicts."),
    ("top_k", int, "Sample from the N likeliest tokens; 0 is off."),
    ("top_p", float, "Sample from the fewest likeliest tokens that hold this probability; 1 is off."),
    ("min_p", float, "Sample from tokens at least this likely, relative to the likeliest; 0 is off."),
    ("repetition_penalty", float, "Above 1, tokens of the prompt and the answer become less likely; 1 is off."),
    ("presence_penalty", float, "Above 0, tokens that the answer already has become less likely."),
    ("frequency_penalty", float, "The same, once for every time that the answer has them."),
)


def sampling_options(command: Decorated) -> Decorated:
    """Options for every field of SamplingParams but `logprobs`, given to the function as `sampling`."""

    @functools.wraps(command)
    def sampled(
        logit_bias: tuple[tuple[int, float], ...],
        seed: int | None,
        stop: tuple[str, ...],
        stop_token_id: tuple[int, ...],
        **values: Any,
    ) -> Any:
        numbers = {name: values.pop(name) for name, _, _ in _NUMBERS}
        sampling = SamplingParams(logit_bias=logit_bias, seed=seed, stop=stop, stop_token_ids=stop_token_id, **numbers)
        return command(sampling=sampling, **values)

    options = [
        click.option(
            f"--{name.replace('_', '-')}",
            type=kind,
            metavar="N" if kind is int else "X",
            default=getattr(_DEFAULTS, name),
            show_default=True,
            help=text,
        )
        for name, kind, text in _NUMBERS
    ]
    options += [
        click.option("--seed", type=int, metavar="N", help="Same seed, same answer; random when not given."),
        click.option("--stop", multiple=True, metavar="TEXT", help="End the answer before this text; repeatable."),
        click.option(
            "--stop-token-id", type=int, multiple=True, metavar="ID", help="End it at this token; repeatable."
        ),
        click.option(
            "--logit-bias",
            type=_bias,
            multiple=True,
            metavar="ID=VALUE",
            help="Add VALUE to a token's logit; repeatable.",
        ),
    ]
    return _decorated(sampled, options)


def engine_options(command: Decorated) -> Decorated:
    """Options for `open_engine`, given to the function under the names of its arguments."""
    options = [
        click.option(
            "--threads",
            "num_threads",
            type=click.IntRange(1),
            metavar="N",
            help="CPU threads; by default all there are.",
        ),
        click.option(
            "--backend", type=click.Choice(BACKENDS), default="auto", show_default=True, help="What runs the graphs."
        ),
        click.option(
            "--verify",
            type=click.Choice(["full", "quick"]),
            default="full",
            show_default=True,
            help="Hash every byte of the bundle first; or sizes, headers and small files only.",
        ),
    ]
    return _decorated(command, options)


@contextmanager
def open_engine(bundle: Path, **options: Any) -> Iterator[Engine]:
    """`Engine.load`, entered; a terminal says so while it takes its time."""
    logging.getLogger("mllama_runtime.chat").addHandler(logging.NullHandler())  # notices come with the answer
    with _told("loading the bundle ..."):
        engine = Engine.load(bundle, **options).__enter__()
    with engine:
        yield engine


@contextmanager
def _told(text: str) -> Iterator[None]:
    """Show a line on a terminal while something takes its time."""
    if not sys.stderr.isatty():
        yield
        return
    click.echo(text, err=True, nl=False)
    try:
        yield
    finally:
        click.echo(f"\r{' ' * len(text)}\r", err=True, nl=False)


def write_answer(stream: Stream) -> None:
    """Write an answer to stdout as it comes, and end the line, also when it is interrupted or fails."""
    has_text = False
    try:
        for event in stream:
            if event.text:
                echo_text(event.text)
                has_text = True
    except (KeyboardInterrupt, MllamaError):
        if has_text:
            echo_text("\n")
        raise
    echo_text("\n")


def echo_text(text: str) -> None:
    """Write text of the model to stdout as it is; on a terminal, without what could take control of it."""
    if sys.stdout.isatty():
        text = _CONTROL.sub(lambda match: ascii(match[0])[1:-1], text)
    click.echo(text, nl=False, color=True)  # `color`: nothing is stripped


def _decorated(command: Decorated, options: list[Decorated]) -> Decorated:
    for option in reversed(options):
        command = option(command)
    return command
