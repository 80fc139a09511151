"""Conversations over an index: history, memory and sources as in stock, nodes from their caches."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import tiny_llama_index as lib
from llama_index.core.base.llms.types import ChatMessage, MessageRole
from llama_index.core.chat_engine import CondenseQuestionChatEngine, ContextChatEngine
from llama_index.core.llms import MockLLM
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.postprocessor import SimilarityPostprocessor
from llama_index.core.prompts import PromptTemplate
from llama_index.core.schema import MetadataMode
from llama_index.llms.kvlink import (
    KVLinkContextChatEngine,
    KVLinkQueryEngine,
    KVLinkSynthesizer,
    KVLinkTransform,
)

from kvlink_rag import CHUNKS, InputError

FIRST, SECOND = "Which whales?", "And {bees}?"
ENGINE = lib.engine()
INDEX = lib.index(lib.documents(), SentenceSplitter(), KVLinkTransform(ENGINE))


def chat_engine(**options: Any) -> KVLinkContextChatEngine:
    return KVLinkContextChatEngine.from_defaults(
        INDEX.as_retriever(similarity_top_k=3), lib.llm(ENGINE), **options
    )


def texts(nodes: Any) -> list[str]:
    return [node.node.get_content(metadata_mode=MetadataMode.LLM) for node in nodes]


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def answer(asked: list[dict[str, Any]], nodes: Any) -> str:
    return ENGINE.answer(asked, texts(nodes), max_new_tokens=12).text


def said(engine: Any) -> list[tuple[str, str | None]]:
    return [(message.role.value, message.content) for message in engine.chat_history]


def test_history_and_nodes_make_the_answer() -> None:
    chat = chat_engine(system_prompt="Be {kind}.")
    system = {"role": "system", "content": "Be {kind}."}
    with lib.Recorder() as recorder:
        first = chat.chat(FIRST)
        second = chat.chat(SECOND)
    assert first.response == answer([system, user(FIRST)], first.source_nodes)
    before = [system, user(FIRST), {"role": "assistant", "content": first.response}]
    assert second.response == answer([*before, user(SECOND)], second.source_nodes)
    ends = [e for e in recorder.events if e.class_name() == "SynthesizeEndEvent"]
    reports = [event.response.metadata["kvlink"] for event in ends]  # type: ignore[attr-defined]
    assert [(report["hits"], report["misses"]) for report in reports] == [(3, 0), (3, 0)]
    expected = [("user", FIRST), ("assistant", first.response)]
    assert said(chat) == [*expected, ("user", SECOND), ("assistant", second.response)]
    chat.reset()
    assert said(chat) == []


def test_streams_and_async_answers_are_the_same() -> None:
    plain = chat_engine()
    expected = [plain.chat(FIRST).response, plain.chat(SECOND).response]

    def streamed(chat: Any) -> list[str]:
        return ["".join(chat.stream_chat(question).response_gen) for question in (FIRST, SECOND)]

    async def asked(chat: Any) -> list[str]:
        return [(await chat.achat(question)).response for question in (FIRST, SECOND)]

    async def astreamed(chat: Any) -> list[str]:
        answers = []
        for question in (FIRST, SECOND):
            response = await chat.astream_chat(question)
            assert len(response.source_nodes) == 3
            answers.append("".join([piece async for piece in response.async_response_gen()]))
        return answers

    for ask in (streamed, lambda c: asyncio.run(asked(c)), lambda c: asyncio.run(astreamed(c))):
        chat = chat_engine()
        answers = ask(chat)
        # a streamed answer is kept stripped, as in stock, so the second turn may differ
        assert answers[0] == expected[0]
        if expected[0] == expected[0].strip():
            assert answers == expected
        assert [role for role, _ in said(chat)] == ["user", "assistant"] * 2


def test_memory_and_sources_are_those_of_the_stock_class() -> None:
    history = [ChatMessage("Hello.", role="user"), ChatMessage("Hi.", role="assistant")]
    retriever = INDEX.as_retriever(similarity_top_k=3)
    options: dict[str, Any] = {
        "chat_history": history,
        "node_postprocessors": [SimilarityPostprocessor(similarity_cutoff=0.1)],
    }
    stock = ContextChatEngine.from_defaults(retriever, llm=lib.llm(ENGINE), **options)
    ours = KVLinkContextChatEngine.from_defaults(retriever, lib.llm(ENGINE), **options)
    assert isinstance(ours, ContextChatEngine)
    with lib.Recorder() as seen_of_stock:
        theirs = stock.chat(FIRST)
    with lib.Recorder() as seen_of_ours:
        response = ours.chat(FIRST)
    assert seen_of_ours.names == seen_of_stock.names
    assert response.source_nodes == theirs.source_nodes
    assert response.sources[0].raw_output == response.source_nodes
    assert response.sources[0].tool_name == theirs.sources[0].tool_name
    assert said(ours)[:3] == said(stock)[:3]
    assert [role for role, _ in said(ours)] == [role for role, _ in said(stock)]


def test_a_context_template_puts_nodes_into_the_system_message() -> None:
    template = "Know this:\n{context_str}\nThat is all. "
    options = {
        "context_template": template,
        "prefix_messages": [
            ChatMessage("Be brief. ", role=MessageRole.SYSTEM),
            ChatMessage("Listen {query_str}.", role=MessageRole.USER),
            ChatMessage("Yes {context_str}.", role=MessageRole.ASSISTANT),
        ],
    }
    chat = chat_engine(**options)
    response = chat.chat(FIRST)
    asked = [
        {"role": "system", "content": ["Know this:\n", CHUNKS, "\nThat is all. Be brief."]},
        user("Listen {query_str}."),
        {"role": "assistant", "content": "Yes {context_str}."},
        user(FIRST),
    ]
    assert response.response == answer(asked, response.source_nodes)
    mapped = PromptTemplate("{context_str}{note}", function_mappings={"note": lambda **_: "Hm."})
    response = chat_engine(context_template=mapped).chat(FIRST)
    asked = [{"role": "system", "content": [CHUNKS, "Hm."]}, user(FIRST)]
    assert response.response == answer(asked, response.source_nodes)


def test_nothing_retrieved_is_answered_as_ever() -> None:
    cutoff = [SimilarityPostprocessor(similarity_cutoff=2.0)]
    response = chat_engine(node_postprocessors=cutoff).chat(FIRST)
    assert response.response == "Empty Response"


def test_what_cannot_be_done_is_refused() -> None:
    retriever = INDEX.as_retriever()
    with pytest.raises(InputError, match="context_refine_template"):
        chat_engine(context_refine_template="{context_msg}")
    with pytest.raises(InputError, match="llm is a MockLLM"):
        KVLinkContextChatEngine.from_defaults(retriever, MockLLM())
    with pytest.raises(InputError, match="only one of them"):
        KVLinkContextChatEngine.from_defaults(retriever)
    assert KVLinkContextChatEngine.from_defaults(retriever, engine=ENGINE).chat(FIRST).response


@pytest.mark.parametrize("made_by", ["us", "index"])
def test_stock_condensing_engines_ask_our_query_engine(made_by: str) -> None:
    llm = lib.llm(ENGINE)
    if made_by == "us":
        made = KVLinkQueryEngine(INDEX.as_retriever(similarity_top_k=3), llm)
        chat: Any = CondenseQuestionChatEngine.from_defaults(query_engine=made, llm=llm)
    else:
        chat = INDEX.as_chat_engine(
            "condense_question",  # type: ignore[arg-type]
            llm=llm,
            response_synthesizer=KVLinkSynthesizer(llm),
            similarity_top_k=3,
        )
    first = chat.chat(FIRST)
    assert first.response == answer([user(FIRST)], first.source_nodes)

    second = chat.chat(SECOND)
    condensed = second.sources[0].raw_input["query"]
    assert condensed != SECOND
    response = second.sources[0].raw_output
    assert second.response == answer([user(condensed)], response.source_nodes)
    assert (response.metadata["kvlink"]["hits"], response.metadata["kvlink"]["misses"]) == (3, 0)

    chat.reset()
    stream = chat.stream_chat(FIRST)
    assert "".join(stream.response_gen) == first.response
    assert stream.sources[0].raw_output.metadata["kvlink"]["misses"] == 0

    async def ask() -> tuple[str, str]:
        chat.reset()
        whole = (await chat.achat(FIRST)).response
        chat.reset()
        stream = await chat.astream_chat(FIRST)
        return whole, "".join([piece async for piece in stream.async_response_gen()])

    assert asyncio.run(ask()) == (first.response, first.response)
