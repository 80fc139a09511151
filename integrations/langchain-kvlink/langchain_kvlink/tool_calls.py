"""Tools that a model may call, and the calls in the text it produces.

Models write calls in one of three ways, and special tokens are not part of an answer's text:

- ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>`` (Hermes, Qwen, SmolLM3; the marks are
  ordinary tokens and stay in the text)
- ``[TOOL_CALLS] [{"name": ..., "arguments": {...}}]`` (Mistral; the mark is special in most of its
  tokenizers, and the bare list remains)
- ``{"name": ..., "parameters": {...}}`` (Llama 3; several are separated by `;` or new lines)
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from langchain_core.messages import InvalidToolCall, ToolCall, ToolCallChunk
from langchain_core.messages.tool import invalid_tool_call, tool_call, tool_call_chunk
from langchain_core.utils.function_calling import convert_to_openai_tool

from kvlink_rag import InputError

MARKS = ("<tool_call>", "[TOOL_CALLS]")
_MARKED = re.compile(
    r"<tool_call>\s*(\S.*?)\s*(?:</tool_call>|(?=<tool_call>)|\Z)"
    r"|\[TOOL_CALLS\]\s*(\S.*?)\s*(?:(?=\[TOOL_CALLS\])|\Z)",
    re.DOTALL,
)
_BARE = re.compile(r'\s*\[?\s*\{(?=.*"name")(?=.*"(?:arguments|parameters)")', re.DOTALL)
_JSON = json.JSONDecoder(strict=False)  # models write raw new lines into strings


@dataclass
class Produced:
    """What a model produced: text for the reader, calls of tools, and calls that cannot be read."""

    content: str
    calls: list[ToolCall] = field(default_factory=list)
    invalid: list[InvalidToolCall] = field(default_factory=list)


def chosen_tools(tools: Sequence[Any], choice: Any) -> list[dict[str, Any]]:
    """Tools as JSON schemas, those that the model is to see.

    Args:
        tools: anything that ``convert_to_openai_tool`` takes.
        choice: a tool's name shows that one alone; `none` (or False) shows none. The rest shows
            all: a model cannot be made to call a tool, so `any` is no more than `auto`.

    Raises:
        InputError: there is no tool of that name.
    """
    schemas = [convert_to_openai_tool(tool) for tool in tools]
    if isinstance(choice, dict):
        choice = choice.get("function", choice).get("name")
    if choice in ("none", False):
        return []
    if choice in (None, True, "auto", "any", "required"):
        return schemas
    names = [schema.get("function", {}).get("name") for schema in schemas]
    if choice not in names:
        raise InputError(f"tool_choice {choice!r} is none of the tools {names}")
    return [schemas[names.index(choice)]]


def read_calls(text: str) -> Produced:
    """Text and calls apart. JSON that cannot be read, or is no call, becomes an invalid call."""
    produced = Produced(text)
    if any(mark in text for mark in MARKS):
        produced.content = _MARKED.sub("", text)
        for match in _MARKED.finditer(text):
            raw = match[1] or match[2]
            values, rest = _values(raw)
            _sort(produced, values if not rest else [], raw)
    elif _BARE.match(text):
        values, rest = _values(text)
        broken = not values or rest[:1] in ("{", "[")
        produced.content = "" if broken else rest
        _sort(produced, values, text)
        if values and broken:
            _sort(produced, [], rest)
    if not produced.content.strip():
        produced.content = ""
    return produced


class ContentFilter:
    """Pieces of text in, those pieces out that are certainly no call.

    Attributes:
        text: all that came in.
    """

    def __init__(self) -> None:
        self.text = ""
        self._sent = 0

    def push(self, piece: str) -> str:
        """What may be shown after one more piece (may be empty)."""
        self.text += piece
        return self._take(self.text[: self._certain()])

    def finish(self) -> tuple[str, Produced]:
        """What was held back and is no call, and everything, as :func:`read_calls` has it."""
        produced = read_calls(self.text)
        return self._take(produced.content), produced

    def _certain(self) -> int:
        start = self.text.lstrip()[:1]
        if start in ("", "{", "["):  # may all be one call
            return 0
        marks = [place for place in map(self.text.find, MARKS) if place >= 0]
        end = min(marks) if marks else len(self.text) - self._begun()
        return end if self.text[:end].strip() else 0

    def _begun(self) -> int:
        """Length of the longest end of the text that begins a mark."""
        for length in range(max(map(len, MARKS)) - 1, 0, -1):
            if any(mark.startswith(self.text[-length:]) for mark in MARKS):
                return min(length, len(self.text))
        return 0

    def _take(self, content: str) -> str:
        piece, self._sent = content[self._sent :], max(self._sent, len(content))
        return piece


def _values(raw: str) -> tuple[list[Any], str]:
    """JSON values one behind the other, lists of them opened, and what is behind the last."""
    values: list[Any] = []
    place = 0
    while True:
        while raw[place : place + 1].isspace() or raw[place : place + 1] in (";", ","):
            place += 1
        if raw[place : place + 1] not in ("{", "["):
            return values, raw[place:]
        try:
            value, place = _JSON.raw_decode(raw, place)
        except json.JSONDecodeError:
            return values, raw[place:]
        values += value if isinstance(value, list) else [value]


def _sort(produced: Produced, values: Sequence[Any], raw: str) -> None:
    """Add the calls of one place in the text; none at all is an invalid one."""
    calls = [_call(value) for value in values]
    for value, call in zip(values, calls, strict=True):
        if call is None:
            produced.invalid.append(_invalid(json.dumps(value)))
        else:
            produced.calls.append(call)
    if not calls:
        produced.invalid.append(_invalid(raw))


def _call(value: Any) -> ToolCall | None:
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = _JSON.decode(arguments)
        except json.JSONDecodeError:
            return None
    if not isinstance(arguments, dict):
        return None
    return tool_call(name=value["name"], args=arguments, id=_new_id())


def _invalid(raw: str) -> InvalidToolCall:
    # LangChain mends cut JSON when it adds up the chunks of a stream, and would make a call of it:
    # without its opening brackets it stays broken.
    text = raw.lstrip("[{ \t\r\n") or "(empty)"
    name = re.search(r'"name"\s*:\s*"([^"]*)"', raw)
    return invalid_tool_call(
        name=name[1] if name else None,
        args=text,
        id=_new_id(),
        error="the call is no JSON object with a name and arguments",
    )


def _new_id() -> str:
    return uuid.uuid4().hex[:9]  # Mistral's chat template takes ids of nine letters and digits only


def as_chunks(produced: Produced) -> list[ToolCallChunk]:
    """Calls as the chunks of a stream carry them; added up they are what they were."""
    calls = [(call["name"], json.dumps(call["args"]), call["id"]) for call in produced.calls]
    broken = [(call["name"], call["args"], call["id"]) for call in produced.invalid]
    return [
        tool_call_chunk(name=name, args=args, id=id, index=index)
        for index, (name, args, id) in enumerate([*calls, *broken])
    ]
