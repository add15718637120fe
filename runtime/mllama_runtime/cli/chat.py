"""`mllama chat`: a conversation on stdin and stdout, a line a turn. Piped, it is a script: stdout has answers only."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from mllama_runtime.cli import example
from mllama_runtime.cli.answers import engine_options, open_engine, sampling_options, write_answer
from mllama_runtime.engine import EncodedImage, Engine, Generation
from mllama_runtime.errors import BundleError, MllamaError, UsageError
from mllama_runtime.fields import printable
from mllama_runtime.sampling import SamplingParams
from mllama_runtime.tokenizer import checked_text

_HELP = """\
In the session:
  /image PATH    attach a picture to your next message; repeat for several
  /system TEXT   set the system message; without TEXT, remove it
  /reset         start a new conversation; the system message stays
  /help          show this
  /quit          leave, like Ctrl-D
  Ctrl-C stops an answer; a space before a slash makes it a message"""
_EXAMPLE = example("mllama chat my-bundle", "mllama chat my-bundle --temperature 0.7 < questions.txt")


@click.command(epilog=f"\b\n{_HELP}\n\n{_EXAMPLE}")
@click.argument("bundle", type=click.Path(path_type=Path))
@sampling_options
@engine_options
def command(bundle: Path, sampling: SamplingParams, **engine_arguments: Any) -> None:
    """Talk with a model about pictures, or about text alone; a line is a message."""
    with open_engine(bundle, **engine_arguments) as engine:
        if not engine.bundle.manifest.files.get("chat_template.jinja"):
            hint = "use `mllama generate`, which continues a text"
            raise BundleError("has no chat template, as base models have none", where=bundle, hint=hint)
        _converse(_Session(engine, sampling))


@dataclass(slots=True)
class _Session:
    """A conversation so far; `images` are attached to the next message."""

    engine: Engine
    sampling: SamplingParams
    messages: list[dict[str, Any]] = field(default_factory=list)
    images: list[EncodedImage] = field(default_factory=list)
    system: str | None = None
    told: set[str] = field(default_factory=set)

    def take(self, line: str) -> bool:
        """Do what a line asks for; False when it says goodbye. Raises MllamaError, which leaves the session whole."""
        if not line.startswith("/"):
            if line.strip():
                self.ask(checked_text(line, "the message"))
            return True
        name, _, argument = line[1:].partition(" ")
        return self.obey(name, argument.strip())

    def obey(self, name: str, argument: str) -> bool:
        if name == "image":
            self.attach(argument)
        elif name == "system":
            self.system = argument or None
            _tell("system message set" if argument else "system message removed")
        elif name == "reset":
            self.messages, self.images = [], []
            _tell("new conversation")
        elif name == "help":
            _tell(_HELP)
        elif name != "quit":
            raise UsageError("no such command", where=f"/{name}", hint="see /help")
        return name != "quit"

    def attach(self, path: str) -> None:
        """Encode a picture, once: later turns use it again."""
        if not path:
            raise UsageError("names no picture", where="/image", expected="/image PATH")
        if len(path) > 1 and path[0] == path[-1] and path[0] in "'\"":  # as terminals write a file dropped on them
            path = path[1:-1]
        image = self.engine.encode_image(os.path.expanduser(path))  # noqa: PTH111 - Path's raises for an unknown ~user
        self.images.append(image)
        tiles = "1 tile" if image.num_tiles == 1 else f"{image.num_tiles} tiles"
        _tell(f"attached {path} ({tiles}); what about it?")

    def ask(self, text: str) -> None:
        """Answer a message. A turn that fails, or is stopped before its first word, is dropped, pictures and all."""
        content = [*({"type": "image", "image": image} for image in self.images), {"type": "text", "text": text}]
        self.images = []
        turn = {"role": "user", "content": content}
        is_stopped = False
        with self.engine.stream([*self.messages, turn], system=self.system, sampling=self.sampling) as stream:
            try:
                write_answer(stream)
            except KeyboardInterrupt:
                is_stopped = True
            answer = stream.generation()
        if answer.text or not is_stopped:
            self.messages += [turn, {"role": "assistant", "content": answer.text}]
        self.remark(answer)

    def remark(self, answer: Generation) -> None:
        """What is to be said beside an answer; each notice once."""
        for notice in answer.notices:
            if notice not in self.told:
                self.told.add(notice)
                _tell(notice)
        if answer.finish_reason == "cancelled":
            _tell("stopped")
        elif answer.finish_reason == "length":
            is_asked = answer.usage.completion_tokens == self.sampling.max_new_tokens
            why = "see --max-new-tokens" if is_asked else "the model's context is full, /reset empties it"
            _tell(f"cut off after {answer.usage.completion_tokens} tokens: {why}")


def _converse(session: _Session) -> None:
    is_interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if is_interactive:
        _edit_lines()
        _tell(f"{session.engine.bundle.manifest.name}: type a message, or /help")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # what is not UTF-8 is refused as a message, no more
    is_open = True
    while is_open:
        try:
            line = input("> " if is_interactive else "")
        except (EOFError, KeyboardInterrupt) as end:
            if is_interactive:
                click.echo()
            if isinstance(end, EOFError):
                return
            raise
        try:
            is_open = session.take(line)
        except KeyboardInterrupt:
            _tell("stopped")
        except MllamaError as error:
            _tell(f"mllama: error: {error}")


def _edit_lines() -> None:
    """Arrow keys and history, where Python has them."""
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")


def _tell(text: str) -> None:
    for line in text.split("\n"):
        click.echo(printable(line), err=True)
