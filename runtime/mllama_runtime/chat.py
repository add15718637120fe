"""Messages, parsed once, and the bundle's chat template that turns them into a prompt's text.

`prompt` comes next: it encodes the rendered text and pairs the pictures with it.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TypeAlias, cast

from mllama_runtime.errors import BundleError, RequestError
from mllama_runtime.fields import show
from mllama_runtime.sandbox import SandboxedTemplate
from mllama_runtime.tokenizer import BOS_TOKEN, checked_text

logger = logging.getLogger(__name__)

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
JsonObject: TypeAlias = dict[str, Json]

ROLES = ("system", "user", "assistant", "tool", "ipython")
MAX_JSON_DEPTH = 64
# What templates published before December 2024 say to a picture beside a system message.
SYSTEM_REFUSAL = "incompatible with system messages"
SYSTEM_NOTICE = (
    "the chat template refuses a system message beside a picture; "
    "the system message was written in Llama 3.2's own format instead"
)


@dataclass(frozen=True, slots=True)
class TextPart:
    text: str


@dataclass(frozen=True, slots=True)
class ImagePart:
    """A picture's place; `image` is its source (path, bytes, PIL image, array), None when given apart."""

    image: object | None = None


@dataclass(frozen=True, slots=True)
class ToolCall:
    name: str
    arguments: JsonObject | str
    call_id: str | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `content` stays a string where it came as one: templates may tell the two apart."""

    role: str
    content: str | tuple[TextPart | ImagePart, ...] | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    name: str | None = None
    tool_call_id: str | None = None

    @property
    def parts(self) -> tuple[TextPart | ImagePart, ...]:
        return self.content if isinstance(self.content, tuple) else ()

    @property
    def has_image(self) -> bool:
        return any(isinstance(part, ImagePart) for part in self.parts)


def messages_from(value: object) -> tuple[Message, ...]:
    """Messages in the Hugging Face form, a list of {"role", "content", "tool_calls", "name", "tool_call_id"}.

    A content is a string or a list of {"type": "text", "text"} and {"type": "image", "image"}. Keys that are None
    count as absent. Raises RequestError naming the place, such as `messages[2].content[1].type`.
    """
    messages = tuple(_message_from(item, f"messages[{index}]") for index, item in enumerate(_list(value, "messages")))
    if not messages:
        raise RequestError("is empty", where="messages", hint="give at least one message")
    return messages


def tools_from(value: object) -> tuple[JsonObject, ...] | None:
    """Tools as JSON schemas, a list of objects; None or an empty list means no tools. Raises RequestError."""
    if value is None:
        return None
    return tuple(_tool_from(item, f"tools[{index}]") for index, item in enumerate(_list(value, "tools"))) or None


def _tool_from(value: object, where: str) -> JsonObject:
    if not isinstance(value, Mapping):
        raise _unexpected(value, where, "an object with the tool's JSON schema")
    return cast(JsonObject, _json(value, where))


def _message_from(value: object, where: str) -> Message:
    fields = _object(value, where, ("role", "content", "tool_calls", "name", "tool_call_id"))
    role = checked_text(fields.get("role"), f"{where}.role")
    if role not in ROLES:
        raise RequestError("is unknown", where=f"{where}.role", expected=f"one of {', '.join(ROLES)}", found=show(role))
    calls = tuple(
        _tool_call_from(item, f"{where}.tool_calls[{index}]")
        for index, item in enumerate(_list(fields.get("tool_calls", []), f"{where}.tool_calls"))
    )
    if calls and role != "assistant":
        raise RequestError("only the assistant calls tools", where=f"{where}.tool_calls", found=f"role {role}")
    if "content" not in fields and not calls:
        raise RequestError("is missing", where=f"{where}.content", expected="a string or a list of parts")
    return Message(
        role=role,
        content=_content_from(fields.get("content"), f"{where}.content"),
        tool_calls=calls,
        name=_optional_text(fields, "name", where),
        tool_call_id=_optional_text(fields, "tool_call_id", where),
    )


def _content_from(value: object, where: str) -> str | tuple[TextPart | ImagePart, ...] | None:
    if value is None:
        return None
    if isinstance(value, str):
        return checked_text(value, where)
    if not isinstance(value, Sequence) or isinstance(value, bytes):
        raise _unexpected(value, where, "a string or a list of parts")
    return tuple(_part_from(item, f"{where}[{index}]") for index, item in enumerate(value))


def _part_from(value: object, where: str) -> TextPart | ImagePart:
    kind = value.get("type") if isinstance(value, Mapping) else None
    if kind == "text":
        return TextPart(checked_text(_object(value, where, ("type", "text")).get("text"), f"{where}.text"))
    if kind == "image":
        image = _object(value, where, ("type", "image")).get("image")
        if isinstance(image, bool | int | float | list | tuple | Mapping):
            raise _unexpected(image, f"{where}.image", "a path, bytes, a PIL image or an array")
        return ImagePart(image)
    if not isinstance(value, Mapping):
        raise _unexpected(value, where, 'an object with a "type"')
    raise RequestError("is unknown", where=f"{where}.type", expected="'text' or 'image'", found=show(kind))


def _tool_call_from(value: object, where: str) -> ToolCall:
    fields = _object(value, where, ("id", "type", "function"))
    if fields.get("type", "function") != "function":
        raise RequestError("is unknown", where=f"{where}.type", expected="'function'", found=show(fields["type"]))
    function = _object(fields.get("function"), f"{where}.function", ("name", "arguments"))
    arguments = _json(function.get("arguments", {}), f"{where}.function.arguments")
    if not isinstance(arguments, dict | str):
        raise _unexpected(arguments, f"{where}.function.arguments", "an object or a string")
    name = checked_text(function.get("name"), f"{where}.function.name")
    return ToolCall(name, arguments, _optional_text(fields, "id", where))


def _list(value: object, where: str) -> Sequence[object]:
    if not isinstance(value, list | tuple):
        raise _unexpected(value, where, "a list")
    return value


def _object(value: object, where: str, known: Collection[str]) -> dict[str, object]:
    """The entries of `value` that are not None; every key must be known."""
    if not isinstance(value, Mapping):
        raise _unexpected(value, where, "an object")
    fields = {key: item for key, item in value.items() if item is not None}
    for key in fields:
        if key not in known:
            raise RequestError(f"has an unknown key {show(key)}", where=where, expected=f"only {', '.join(known)}")
    return fields


def _optional_text(fields: Mapping[str, object], key: str, where: str) -> str | None:
    return checked_text(fields[key], f"{where}.{key}") if key in fields else None


def _json(value: object, where: str, depth: int = 0) -> Json:
    """A copy of `value` made of nothing but JSON's own types."""
    if depth > MAX_JSON_DEPTH:
        raise RequestError("is nested too deep", where=where, expected=f"at most {MAX_JSON_DEPTH} levels")
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return checked_text(value, where)
    if isinstance(value, list | tuple):
        return [_json(item, f"{where}[{index}]", depth + 1) for index, item in enumerate(value)]
    if isinstance(value, Mapping):
        return {
            checked_text(key, f"{where}, a key"): _json(item, f"{where}.{key}", depth + 1)
            for key, item in value.items()
        }
    raise _unexpected(value, where, "a JSON value")


def _unexpected(value: object, where: str, expected: str) -> RequestError:
    return RequestError("has the wrong form", where=where, expected=expected, found=type(value).__name__)


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """A conversation as the template wrote it.

    In `marked`, the character `guard` breaks every special token's spelling that came from a message, a tool or a
    variable; the spellings that are whole were written by the template and are control tokens. So a user who types
    `<|eot_id|>` says just that.
    """

    marked: str
    guard: str
    notices: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The prompt as the reference's `apply_chat_template(..., tokenize=False)` returns it."""
        return self.marked.replace(self.guard, "")


class ChatTemplate:
    """A bundle's chat template; safe to share between threads.

    Args:
        source: the Jinja template.
        special_tokens: every special token of the tokenizer, by name.
        token_variables: special tokens the template may write by a variable's name, `bos_token` among them.
        where: the name that errors give it.

    Raises:
        BundleError: it is not a Jinja template.
    """

    def __init__(
        self,
        source: str,
        *,
        special_tokens: Collection[str],
        token_variables: Mapping[str, str] | None = None,
        where: str = "chat_template.jinja",
    ) -> None:
        self._template = SandboxedTemplate(source, where=where)
        self._source = source
        self._where = where
        self._token_variables = {"bos_token": BOS_TOKEN, **(token_variables or {})}
        self._told = False
        longest_first = sorted(special_tokens, key=len, reverse=True)
        self._max_token_chars = len(longest_first[0])
        self._spelling = re.compile("|".join(map(re.escape, longest_first)))
        self._heads = frozenset(token[:size] for token in special_tokens for size in range(1, len(token)))
        self._tails = frozenset(token[size:] for token in special_tokens for size in range(1, len(token)))

    @classmethod
    def from_file(
        cls, path: str | Path, *, special_tokens: Collection[str], token_variables: Mapping[str, str] | None = None
    ) -> ChatTemplate:
        """Reads a chat_template.jinja; BundleError names the file when it is missing or is not one."""
        try:
            source = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BundleError("cannot be read", where=path, found=error) from error
        return cls(source, special_tokens=special_tokens, token_variables=token_variables, where=str(path))

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[JsonObject] | None = None,
        variables: Mapping[str, Json] | None = None,
        add_generation_prompt: bool = True,
    ) -> RenderedChat:
        """The conversation's text, as transformers' `apply_chat_template` renders it.

        A system message beside a picture that the template refuses is written in Llama 3.2's own format, in front of
        what the template makes of the other messages, and a notice says so.

        Raises:
            RequestError: the template refuses the messages.
            BundleError: the template fails, or takes too long or too much.
        """
        inputs: JsonObject = {
            **cast(JsonObject, _json(variables or {}, "template variables")),
            "messages": [_template_form(message) for message in messages],
            "tools": list(tools) if tools else None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        guard = _unused_character(json.dumps(inputs, ensure_ascii=False) + self._source)
        marked = cast(JsonObject, _map_strings(inputs, lambda text: self._guarded(text, guard)))
        try:
            return RenderedChat(self._run(marked, guard), guard)
        except RequestError as refusal:
            if SYSTEM_REFUSAL not in str(refusal.found) or not _has_system_beside_picture(messages):
                raise
        if not self._told:
            self._told = True
            logger.warning("%s: %s", self._where, SYSTEM_NOTICE)
        system = _system_turn(self._guarded(_text_of(messages[0]), guard), marked)
        rest = self._run({**marked, "messages": cast(list[Json], marked["messages"])[1:]}, guard)
        bos = self._token_variables["bos_token"]
        return RenderedChat(bos + system + rest.removeprefix(bos), guard, (SYSTEM_NOTICE,))

    def _run(self, marked: JsonObject, guard: str) -> str:
        text = self._template.render({**self._token_variables, **marked})
        return text.replace(_escaped(guard), guard)  # a template may ask `tojson` for ASCII

    def _guarded(self, text: str, guard: str) -> str:
        """`text` with a break in every special token, and around it when a neighbour could complete one."""
        text = self._spelling.sub(lambda token: token[0][0] + guard + token[0][1:], text)
        body = text.strip()  # as templates trim it
        sizes = range(1, min(self._max_token_chars, len(body) + 1))
        if any(body[:size] in self._tails or body[-size:] in self._heads for size in sizes):
            before, _, after = text.partition(body)
            return before + guard + body + guard + after
        return text


def _template_form(message: Message) -> JsonObject:
    """The message as templates know it: plain JSON, keys that say nothing left out."""
    content: Json = (
        message.content if isinstance(message.content, str | None) else [_part_form(p) for p in message.content]
    )
    calls: list[Json] = [_call_form(call) for call in message.tool_calls]
    fields: JsonObject = {
        "role": message.role,
        "content": content,
        "tool_calls": calls or None,
        "name": message.name,
        "tool_call_id": message.tool_call_id,
    }
    return {key: value for key, value in fields.items() if value is not None}


def _part_form(part: TextPart | ImagePart) -> JsonObject:
    return {"type": "text", "text": part.text} if isinstance(part, TextPart) else {"type": "image"}


def _call_form(call: ToolCall) -> JsonObject:
    form: JsonObject = {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
    return form if call.call_id is None else {"id": call.call_id, **form}


def _has_system_beside_picture(messages: Sequence[Message]) -> bool:
    first, *rest = messages
    return first.role == "system" and not first.has_image and any(message.has_image for message in rest)


def _text_of(message: Message) -> str:
    if isinstance(message.content, str):
        return message.content
    return "".join(part.text for part in message.parts if isinstance(part, TextPart))


def _system_turn(text: str, inputs: JsonObject) -> str:
    """A system message in Llama 3.2's own format; `inputs` are the template's variables."""
    tools = cast(list[Json], inputs["tools"] or [])
    date = inputs.get("date_string") or datetime.now().strftime("%d %b %Y")
    turn = "<|start_header_id|>system<|end_header_id|>\n\n"
    if tools:
        turn += "Environment: ipython\n"
    turn += f"Cutting Knowledge Date: December 2023\nToday Date: {date}\n\n"
    if tools and not inputs.get("tools_in_user_message", True):
        turn += 'These functions can be called with JSON: {"name": function name, "parameters": its arguments}.\n\n'
        turn += "".join(json.dumps(tool, ensure_ascii=False, indent=4) + "\n\n" for tool in tools)
    return f"{turn}{text.strip()}<|eot_id|>"


def _map_strings(value: Json, change: Callable[[str], str]) -> Json:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_map_strings(item, change) for item in value]
    if isinstance(value, dict):
        return {change(key): _map_strings(item, change) for key, item in value.items()}
    return value


def _escaped(character: str) -> str:
    return f"\\u{ord(character):04x}"


def _unused_character(text: str) -> str:
    """A private-use character that `text` holds neither as such nor escaped."""
    for code in range(0xE000, 0xF900):
        character = chr(code)
        if character not in text and _escaped(character) not in text:
            return character
    raise RequestError("hold every private-use character", where="messages", hint="leave one of U+E000 to U+F8FF out")
