"""`mllama generate`: one prompt in, one answer out, as text or as JSON."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from mllama_runtime.chat import messages_from
from mllama_runtime.cli import example, json_option
from mllama_runtime.cli.answers import echo_text, engine_options, open_engine, sampling_options, write_answer
from mllama_runtime.engine import Generation
from mllama_runtime.errors import RequestError, UsageError
from mllama_runtime.fields import load_json, printable
from mllama_runtime.images import URL_PREFIXES
from mllama_runtime.sampling import SamplingParams
from mllama_runtime.tokenizer import checked_text

_EXAMPLE = example(
    'mllama generate my-bundle --image cat.jpg --prompt "What is this?"',
    "mllama generate my-bundle --prompt - < question.txt --json | jq -r .text",
    "mllama generate my-bundle --messages conversation.json --temperature 0.7 --seed 1",
)


@click.command(epilog=_EXAMPLE)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--prompt", metavar="TEXT", help="What to ask; - reads it from stdin.")
@click.option("--image", "images", multiple=True, metavar="PATH", help="A picture; repeatable, in order.")
@click.option("--system", metavar="TEXT", help="A system message.")
@click.option(
    "--messages",
    "messages_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help='A conversation instead of a prompt: a JSON list of {"role", "content"}. An image part names its picture, '
    'relative to the file, as {"type": "image", "image": PATH}; parts that name none take those of --image.',
)
@click.option(
    "--raw",
    is_flag=True,
    help="Continue the prompt as it stands, without chat template; <|image|> in it is a picture's place.",
)
@sampling_options
@click.option("--logprobs", type=int, metavar="N", help="With --json: log-probabilities, and the N likeliest tokens.")
@click.option("--stream/--no-stream", default=None, help="Write the answer as it comes; the default on a terminal.")
@engine_options
@json_option
def command(
    bundle: Path,
    prompt: str | None,
    images: tuple[str, ...],
    system: str | None,
    messages_file: Path | None,
    raw: bool,
    sampling: SamplingParams,
    logprobs: int | None,
    stream: bool | None,
    as_json: bool,
    **engine_arguments: Any,
) -> None:
    """Answer one prompt about pictures, or about text alone."""
    if as_json and stream:
        raise UsageError("--stream and --json exclude each other")
    if logprobs is not None and not as_json:
        raise UsageError("--logprobs needs --json")
    request: dict[str, Any] = {
        "prompt": _prompt(prompt, messages_file, system, raw),
        "images": images,
        "system": system,
        "raw": raw,
        "sampling": replace(sampling, logprobs=logprobs),
    }
    is_streamed = not as_json and (sys.stdout.isatty() if stream is None else stream)
    with open_engine(bundle, **engine_arguments) as engine, engine.stream(**request) as answer:
        if is_streamed:
            write_answer(answer)
        else:
            for _ in answer:
                pass
        generation = answer.generation()
    if as_json:
        click.echo(json.dumps(_json(generation)))
        return
    if not is_streamed:
        echo_text(f"{generation.text}\n")
    if sys.stderr.isatty():
        for line in (*generation.notices, _summary(generation)):
            click.echo(f"mllama: {printable(line)}", err=True)


def _prompt(text: str | None, file: Path | None, system: str | None, raw: bool) -> str | list[Any]:
    if file is None:
        if text is None:
            raise UsageError("nothing to answer", hint="give --prompt TEXT or --messages FILE")
        return _stdin() if text == "-" else checked_text(text, "--prompt")
    for option, is_given in (("--prompt", text is not None), ("--raw", raw)):
        if is_given:
            raise UsageError(f"{option} and --messages exclude each other")
    messages = _messages(file)
    if system is not None and messages[0]["role"] == "system":
        raise UsageError("--system is given, and the messages begin with a system message", where=file)
    return messages


def _stdin() -> str:
    """All of stdin, but the newline that `echo` and editors put at its end."""
    data = sys.stdin.buffer.read()
    try:
        return data.decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise RequestError("is not UTF-8", where="the prompt on stdin", found=error) from None


def _messages(path: Path) -> list[Any]:
    """The file's messages, checked; pictures they name are looked for beside the file."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RequestError(f"cannot be read ({error.strerror})", where=path) from None
    messages: Any = load_json(data, where=path, error=RequestError)
    try:
        messages_from(messages)
    except RequestError as error:
        where = f"{path}: {error.where}"
        raise RequestError(
            error.what, where=where, expected=error.expected, found=error.found, hint=error.hint
        ) from None
    parts = [part for message in messages if isinstance(message.get("content"), list) for part in message["content"]]
    for part in parts:
        image = part.get("image")
        if image is not None and not image.lower().startswith(URL_PREFIXES):  # those are refused by their own name
            part["image"] = str(path.parent / image)
    return list(messages)


def _json(generation: Generation) -> dict[str, Any]:
    value = asdict(generation)
    value["timings"] = {name: round(milliseconds, 3) for name, milliseconds in value["timings"].items()}
    if generation.logprobs is None:
        del value["logprobs"]
    else:
        chosen = zip(generation.token_ids, generation.logprobs, strict=True)
        value["logprobs"] = [
            {**_logprob(token_id, logprob), "top": [_logprob(*pair) for pair in top]}
            for token_id, (logprob, top) in chosen
        ]
    return value


def _logprob(token_id: int, logprob: float) -> dict[str, Any]:
    return {"token_id": token_id, "logprob": logprob}


def _summary(generation: Generation) -> str:
    usage, timings = generation.usage, generation.timings
    read = f"{usage.prompt_tokens} prompt tokens" + (
        f" and {usage.image_tokens} image tokens" * bool(usage.image_tokens)
    )
    seconds = (timings.preprocess_ms + timings.vision_ms + timings.prefill_ms) / 1e3
    rate = f" at {1e3 / timings.decode_ms_per_token:.1f} per second" if timings.decode_ms_per_token else ""
    cut = ", cut off at the length limit" if generation.finish_reason == "length" else ""
    return f"{read} read in {seconds:.2f} s; {usage.completion_tokens} tokens written{rate}{cut}"
