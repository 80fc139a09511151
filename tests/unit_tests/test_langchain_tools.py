"""Tools: shown by the chat template, their calls read from what the model produced."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
import scripted
import tiny
import tiny_tools
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_kvlink import ChatKVLink
from langchain_kvlink.tool_calls import ContentFilter, read_calls
from pydantic import BaseModel

from kvlink_rag import InputError, KVLinkEngine


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@tool
def search(query: str) -> str:
    """Search."""
    return query


CALL = {"name": "add", "arguments": {"a": 1, "b": 2}}
OTHER = {"name": "search", "arguments": {"query": "a {b} [c]"}}
ADDED = ("add", {"a": 1, "b": 2})
SEARCHED = ("search", {"query": "a {b} [c]"})


def hermes(*calls: Any) -> str:
    return "\n".join(f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in calls)


def llama(call: dict[str, Any]) -> str:
    return json.dumps({"name": call["name"], "parameters": call["arguments"]})


CALLS: dict[str, tuple[str, str, list[Any]]] = {
    # what is produced, the content, the calls
    "hermes": (hermes(CALL), "", [ADDED]),
    "hermes, two": (hermes(CALL, OTHER), "", [ADDED, SEARCHED]),
    "hermes, a list": (hermes([CALL, OTHER]), "", [ADDED, SEARCHED]),
    "hermes, text before": ("Let me see.\n" + hermes(CALL), "Let me see.\n", [ADDED]),
    "hermes, text around": (f"One. {hermes(CALL)} Two.", "One.  Two.", [ADDED]),
    "hermes, not closed": (hermes(CALL).removesuffix("\n</tool_call>"), "", [ADDED]),
    "hermes, no arguments": (hermes({"name": "add"}), "", [("add", {})]),
    "hermes, one line": (f"<tool_call>{json.dumps(CALL)}</tool_call>", "", [ADDED]),
    "arguments as a text": (
        hermes({"name": "add", "arguments": json.dumps(CALL["arguments"])}),
        "",
        [ADDED],
    ),
    "a raw new line in a text": (
        '<tool_call>{"name": "search", "arguments": {"query": "a\nb"}}</tool_call>',
        "",
        [("search", {"query": "a\nb"})],
    ),
    "mistral": (f"[TOOL_CALLS] {json.dumps([CALL])}", "", [ADDED]),
    "mistral, two": (f"[TOOL_CALLS] {json.dumps([CALL, OTHER])}", "", [ADDED, SEARCHED]),
    "a bare list": (json.dumps([CALL, OTHER]), "", [ADDED, SEARCHED]),
    "llama": (llama(CALL), "", [ADDED]),
    "llama, spaces": (f"\n  {llama(CALL)}\n", "", [ADDED]),
    "llama, two": (f"{llama(CALL)}; {llama(OTHER)}", "", [ADDED, SEARCHED]),
    "llama, two lines": (f"{llama(CALL)}\n{llama(OTHER)}", "", [ADDED, SEARCHED]),
    "llama, with a type": (json.dumps({"type": "function", **CALL}), "", [ADDED]),
    "llama, text behind": (f"{llama(CALL)} This adds.", "This adds.", [ADDED]),
    "as OpenAI nests it": (
        hermes({"type": "function", "function": CALL}),
        "",
        [ADDED],
    ),
    "no call": ("It is 3.", "It is 3.", []),
    "a word of a mark": ("a <tool b", "a <tool b", []),
    "other JSON": ('{"name": "Ann", "age": 3}', '{"name": "Ann", "age": 3}', []),
    "a list that is none": ("[1] says so.", "[1] says so.", []),
    "nothing": ("", "", []),
}

BROKEN: dict[str, tuple[str, str, list[Any], int]] = {
    # what is produced, the content, the calls, how many invalid ones
    "hermes, cut": ('<tool_call>{"name": "add", "arguments": {"a": 1', "", [], 1),
    "hermes, no JSON": ("<tool_call>add 1 and 2</tool_call>", "", [], 1),
    "hermes, a brace too many": (hermes(CALL).replace("}}", "}}}"), "", [], 1),
    "hermes, one of two": (hermes(CALL) + "<tool_call>{</tool_call>", "", [ADDED], 1),
    "hermes, no name": (hermes({"arguments": {}}), "", [], 1),
    "hermes, odd arguments": (hermes({"name": "add", "arguments": [1]}), "", [], 1),
    "hermes, odd text": (hermes({"name": "add", "arguments": "{"}), "", [], 1),
    "hermes, a number": ("<tool_call>5</tool_call>", "", [], 1),
    "hermes, null": ("<tool_call>null</tool_call>", "", [], 1),
    "mistral, cut": ('[TOOL_CALLS] [{"name": "add", "arguments": {"a"', "", [], 1),
    "llama, cut": ('{"name": "add", "parameters": {"a": 1', "", [], 1),
    "llama, the second cut": (f'{llama(CALL)}; {{"name": "add"', "", [ADDED], 1),
}


def found(message: AIMessage) -> list[Any]:
    return [(call["name"], call["args"]) for call in message.tool_calls]


def added(chunks: Any) -> AIMessageChunk:
    first, *rest = chunks
    return first + rest if rest else first


async def gathered(chunks: Any) -> list[Any]:
    return [chunk async for chunk in chunks]


@pytest.fixture
def engine() -> KVLinkEngine:
    return tiny_tools.engine()


def all_ways(engine: KVLinkEngine) -> list[AIMessage]:
    chat = ChatKVLink(engine=engine, max_tokens=200).bind_tools([add, search])
    return [
        chat.invoke("1+2?"),
        asyncio.run(chat.ainvoke("1+2?")),
        added(chat.stream("1+2?")),
        added(asyncio.run(gathered(chat.astream("1+2?")))),
    ]


@pytest.mark.parametrize("name", CALLS)
def test_calls_are_read(engine: KVLinkEngine, name: str) -> None:
    text, content, calls = CALLS[name]
    tiny_tools.say(engine, text)
    for message in all_ways(engine):
        assert (message.content, found(message)) == (content, calls)
        assert message.invalid_tool_calls == []
        ids = [call["id"] for call in message.tool_calls]
        assert all(id and len(id) == 9 and id.isalnum() for id in ids)
        assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("name", BROKEN)
def test_broken_calls_are_told(engine: KVLinkEngine, name: str) -> None:
    text, content, calls, broken = BROKEN[name]
    tiny_tools.say(engine, text)
    ways = all_ways(engine)
    for message in ways:
        assert (message.content, found(message)) == (content, calls)
        assert len(message.invalid_tool_calls) == broken
        assert [(c["name"], c["args"]) for c in message.invalid_tool_calls] == [
            (c["name"], c["args"]) for c in ways[0].invalid_tool_calls
        ]


def test_a_call_cut_by_the_number_of_tokens_is_broken(engine: KVLinkEngine) -> None:
    tiny_tools.say(engine, llama(CALL))
    chat = ChatKVLink(engine=engine, max_tokens=len(llama(CALL)) - 4).bind_tools([add])
    for message in (chat.invoke("1+2?"), added(chat.stream("1+2?"))):
        assert message.tool_calls == []
        assert message.invalid_tool_calls[0]["name"] == "add"
        assert message.response_metadata["finish_reason"] == "length"


@pytest.mark.parametrize("name", [*CALLS, *BROKEN])
def test_without_tools_all_is_text(engine: KVLinkEngine, name: str) -> None:
    text = {**CALLS, **BROKEN}[name][0]
    tiny_tools.say(engine, text)
    shown = text.replace("[TOOL_CALLS]", "")  # a special token
    chat = ChatKVLink(engine=engine, max_tokens=200)
    for message in (chat.invoke("1+2?"), added(chat.stream("1+2?"))):
        assert (message.content, message.tool_calls) == (shown, [])


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("name", [*CALLS, *BROKEN])
def test_a_stream_shows_the_content_and_nothing_else(name: str, size: int) -> None:
    text = {**CALLS, **BROKEN}[name][0]
    stream = ContentFilter()
    pieces = [stream.push(text[at : at + size]) for at in range(0, len(text), size)]
    rest, produced = stream.finish()
    assert "".join(pieces) + rest == produced.content == read_calls(text).content


def test_text_is_shown_while_no_call_can_have_begun() -> None:
    stream = ContentFilter()
    assert [stream.push(p) for p in ("\n", "One", " <tool", "s and ", "<tool_call", ">{")] == [
        "",
        "\nOne",
        " ",
        "<tools and ",
        "",
        "",
    ]


def test_a_streamed_call_is_on_the_last_chunk(engine: KVLinkEngine) -> None:
    tiny_tools.say(engine, "I add. " + hermes(CALL, OTHER))
    *chunks, last = ChatKVLink(engine=engine, max_tokens=200).bind_tools([add]).stream("1+2?")
    assert "".join(chunk.content for chunk in chunks) == "I add. "
    assert not any(chunk.tool_call_chunks for chunk in chunks)
    assert [c["index"] for c in last.tool_call_chunks] == [0, 1]
    blocks = [block["type"] for block in added([*chunks, last]).content_blocks]
    assert blocks == ["text", "tool_call", "tool_call"]


def test_tools_are_shown_to_the_model(engine: KVLinkEngine) -> None:
    seen = scripted.note_prompts(engine)
    chat = ChatKVLink(engine=engine, max_tokens=1)
    for choice, shown in {
        None: {"add", "search"},
        "auto": {"add", "search"},
        "any": {"add", "search"},
        "required": {"add", "search"},
        "search": {"search"},
        "none": set(),
    }.items():
        bound = chat.bind_tools([add, search], tool_choice=choice)
        bound.invoke("1+2?", documents=["Sums are fun."])
        prompt = engine.tokenizer.decode(seen[-1])
        names = {name for name in ("add", "search") if f'"name": "{name}"' in prompt}
        assert names == shown, choice
        assert prompt.count("Sums are fun.") == 1
    named = {"type": "function", "function": {"name": "add"}}
    chat.invoke("1+2?", tools=[add, search], tool_choice=named)
    assert '"search"' not in engine.tokenizer.decode(seen[-1])
    with pytest.raises(InputError, match=r"'lookup' is none of the tools \['add', 'search'\]"):
        chat.bind_tools([add, search], tool_choice="lookup")


def test_calls_and_answers_of_tools_go_back_to_the_model(engine: KVLinkEngine) -> None:
    be_silent = tiny_tools.say(engine, hermes(CALL))
    chat = ChatKVLink(engine=engine, max_tokens=200).bind_tools([add])
    asked = HumanMessage("1+2?")
    called = chat.invoke([asked])
    answer = add.invoke(called.tool_calls[0])
    assert isinstance(answer, ToolMessage)
    be_silent()
    prompts = scripted.note_prompts(engine)
    chat.invoke([asked, called, answer], max_tokens=1)
    shown = [engine.tokenizer.decode(ids) for ids in prompts]
    expected = "1+2?<|end|>\n<|start|>assistant\n<tool_call>"
    assert expected in shown[0]
    assert '{"arguments": {"a": 1, "b": 2}, "name": "add"}</tool_call>' in shown[0].replace(
        '"name": "add", "arguments": {"a": 1, "b": 2}',
        '"arguments": {"a": 1, "b": 2}, "name": "add"',
    )
    assert "<|start|>tool\n3<|end|>" in shown[0]


class Sum(BaseModel):
    """A sum."""

    a: int
    b: int


class TestStructuredOutput:
    def test_objects_and_dicts(self, engine: KVLinkEngine) -> None:
        tiny_tools.say(engine, hermes({"name": "Sum", "arguments": {"a": 1, "b": 2}}))
        chat = ChatKVLink(engine=engine, max_tokens=200)
        structured = chat.with_structured_output(Sum)
        assert structured.invoke("1+2?") == Sum(a=1, b=2)
        assert asyncio.run(structured.ainvoke("1+2?")) == Sum(a=1, b=2)
        schema = {"title": "Sum", "description": "", **Sum.model_json_schema()}
        assert chat.with_structured_output(schema).invoke("1+2?") == {"a": 1, "b": 2}
        with_documents = structured.invoke("1+2?", documents=["One and two."])
        assert with_documents == Sum(a=1, b=2)

    def test_what_is_not_produced_is_told(self, engine: KVLinkEngine) -> None:
        tiny_tools.say(engine, hermes({"name": "Sum", "arguments": {"a": "one"}}))
        chat = ChatKVLink(engine=engine, max_tokens=200)
        raw = chat.with_structured_output(Sum, include_raw=True).invoke("1+2?")
        assert (raw["parsed"], type(raw["raw"])) == (None, AIMessage)
        assert "one" in str(raw["parsing_error"])


class TestWithoutTools:
    """The chat template of the tiny models shows none, like that of the default model."""

    def test_binding_tools_names_the_model(self) -> None:
        chat = ChatKVLink(engine=tiny.engine())
        with pytest.raises(NotImplementedError, match="LlamaForCausalLM cannot call tools"):
            chat.bind_tools([add])
        with pytest.raises(NotImplementedError, match="LlamaForCausalLM cannot call tools"):
            chat.with_structured_output(Sum)
