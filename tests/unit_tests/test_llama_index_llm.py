"""The LlamaIndex LLM answers as the engine does, and there is one model."""

from __future__ import annotations

import asyncio
import copy
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import tiny_llama_index as lib
from llama_index.core.base.llms.types import (
    ChatMessage,
    CitableBlock,
    ImageBlock,
    MessageRole,
    TextBlock,
    ThinkingBlock,
)
from llama_index.core.callbacks import CallbackManager, TokenCountingHandler
from llama_index.core.llms.mock import MockFunctionCallingLLM
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.llms.kvlink import KVLinkLLM

from kvlink_rag import CHUNKS, Chunk, InputError, KVLinkEngine

ENGINE = lib.engine()
LLM = lib.llm(ENGINE)
CHUNKS_OF_TEXT = ["Bees dance to tell where flowers are.", "Ants follow trails of scent."]
QUESTION = "How do bees tell where flowers are?"


def user(content: str) -> ChatMessage:
    return ChatMessage(role=MessageRole.USER, content=content)


def expected(question: Any = QUESTION, chunks: Any = (), **options: Any) -> Any:
    return ENGINE.answer(question, chunks, **{"max_new_tokens": 12, **options})


def test_a_chat_is_the_engines_answer() -> None:
    response = LLM.chat([user(QUESTION)], documents=CHUNKS_OF_TEXT)
    answer = expected(chunks=CHUNKS_OF_TEXT)
    assert response.message.role == MessageRole.ASSISTANT
    assert response.message.content == answer.text
    assert response.raw["token_ids"] == answer.token_ids
    assert response.raw["finish_reason"] == answer.finish_reason
    assert response.raw["report"]["hits"] + response.raw["report"]["misses"] == 2
    assert response.raw["report"]["new_tokens"] == len(answer.token_ids)
    prompt, new = answer.report.context_tokens, len(answer.token_ids)
    usage = {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
    assert response.raw["usage"] == usage


def test_a_conversation_reaches_the_chat_template() -> None:
    messages = [
        ChatMessage(role=MessageRole.DEVELOPER, content="Be brief."),
        user("One?"),
        ChatMessage([ThinkingBlock(content="Hm"), TextBlock(text="1")], role="chatbot"),
        ChatMessage(role=MessageRole.ASSISTANT),
        ChatMessage(blocks=[TextBlock(text="Two?"), TextBlock(text="Or three?")]),
    ]
    asked = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "1"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "Two?\nOr three?"},
    ]
    for chunks in ([], CHUNKS_OF_TEXT):
        response = LLM.chat(messages, documents=chunks)
        assert response.raw["token_ids"] == expected(asked, chunks).token_ids


def test_pieces_of_a_stream_make_up_the_answer() -> None:
    answer = expected(chunks=CHUNKS_OF_TEXT)
    responses = list(LLM.stream_chat([user(QUESTION)], documents=CHUNKS_OF_TEXT))
    assert len(responses) > 3
    assert "".join(response.delta for response in responses) == answer.text
    assert responses[2].message.content == "".join(r.delta for r in responses[:3])
    assert [bool(response.raw) for response in responses].index(True) == len(responses) - 1
    assert responses[-1].delta == ""
    assert responses[-1].message.content == answer.text
    assert responses[-1].raw["token_ids"] == answer.token_ids
    assert responses[-1].raw["report"]["total_s"] > 0


def test_async_twins_answer_alike() -> None:
    async def ask() -> list[Any]:
        stream = await LLM.astream_chat([user(QUESTION)], documents=CHUNKS_OF_TEXT)
        streamed = [response async for response in stream]
        completions = [r async for r in await LLM.astream_complete(QUESTION)]
        return [
            await LLM.achat([user(QUESTION)], documents=CHUNKS_OF_TEXT),
            streamed[-1],
            await LLM.acomplete(QUESTION),
            completions[-1],
            "".join(response.delta for response in streamed),
        ]

    chat, streamed, completion, completed, joined = asyncio.run(ask())
    with_chunks, without = expected(chunks=CHUNKS_OF_TEXT), expected()
    assert chat.raw["token_ids"] == streamed.raw["token_ids"] == with_chunks.token_ids
    assert completion.raw["token_ids"] == completed.raw["token_ids"] == without.token_ids
    assert (joined, completion.text) == (with_chunks.text, without.text)


def test_a_completion_is_the_answer_to_a_message_of_the_user() -> None:
    assert LLM.complete(QUESTION).text == expected().text
    streamed = list(LLM.stream_complete(QUESTION, formatted=True, documents=CHUNKS_OF_TEXT))
    assert streamed[-1].text == expected(chunks=CHUNKS_OF_TEXT).text
    assert "".join(response.delta or "" for response in streamed) == streamed[-1].text
    assert streamed[-1].raw["report"]["hits"] == 2


@pytest.mark.parametrize("method", ["achat", "astream_chat", "acomplete", "astream_complete"])
def test_the_event_loop_stays_free(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    looped = threading.Event()
    original = ENGINE.runner.start

    def wait_for_the_loop(*arguments: Any) -> Any:
        assert looped.wait(60), "the event loop stood still"
        return original(*arguments)

    monkeypatch.setattr(ENGINE.runner, "start", wait_for_the_loop)

    async def ask() -> None:
        asked = QUESTION if "complete" in method else [user(QUESTION)]
        asking = asyncio.create_task(getattr(LLM, method)(asked))
        if "stream" in method:
            stream = await asking
            asking = asyncio.create_task(anext(stream))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_soon(looped.set)
        await asking

    asyncio.run(ask())


def test_documents_are_texts_nodes_or_chunks() -> None:
    node = TextNode(text="Bees dance.", id_="n1", metadata={"shelf": 3, "secret": "x"})
    node.excluded_llm_metadata_keys = ["secret"]
    documents = ["A text.", node, NodeWithScore(node=TextNode(text="Ants.")), Chunk("Wasps.")]
    response = LLM.chat([user(QUESTION)], documents=documents)
    texts = ["A text.", "shelf: 3\n\nBees dance.", "Ants.", "Wasps."]
    assert response.raw["token_ids"] == expected(chunks=texts).token_ids
    assert response.raw["report"]["misses"] == 4
    references = dict(ENGINE.store.references("llama_index:"))
    assert references['llama_index:[null, "n1"]'] == ENGINE.keys(texts)[1]


def test_documents_stand_where_a_message_has_them() -> None:
    blocks = [
        TextBlock(text="Read "),
        CitableBlock(title="Bees", source="bees-1", content=[TextBlock(text="They dance.")]),
        CitableBlock(title="", source="", content="They hum."),
        TextBlock(text=" well."),
    ]
    messages = [ChatMessage(blocks=blocks), ChatMessage("Yes.", role="assistant"), user("And now?")]
    asked = [
        {"role": "user", "content": ["Read ", CHUNKS, " well."]},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "And now?"},
    ]
    chunks = [Chunk("They dance.", title="Bees"), Chunk("They hum.")]
    response = LLM.chat(messages)
    assert response.raw["token_ids"] == expected(asked, chunks).token_ids
    assert ("bees-1", ENGINE.keys(chunks)[0]) in ENGINE.store.references()


def test_settings_reach_the_engine() -> None:
    sampled = {"temperature": 0.9, "top_p": 0.8, "seed": 7}
    made = lib.llm(ENGINE, **sampled, additional_kwargs={"strategy": "full"})
    wanted = expected(strategy="full", **sampled).token_ids
    response = made.chat([user(QUESTION)])
    assert response.raw["token_ids"] == wanted
    assert response.raw["report"]["strategy"] == "full"
    again = made.chat([user(QUESTION)], strategy="reuse", seed=8, max_tokens=5, temperature=None)
    assert again.raw["token_ids"] == expected(**{**sampled, "seed": 8}, max_new_tokens=5).token_ids
    text = expected().text
    stopped = lib.llm(ENGINE, stop=[text[4:6]]).chat([user(QUESTION)])
    assert stopped.message.content == text[: text.index(text[4:6])]
    assert stopped.raw["finish_reason"] == "stop"


def test_metadata_is_the_models() -> None:
    metadata = LLM.metadata
    assert (metadata.context_window, metadata.num_output) == (4096, 12)
    assert (metadata.is_chat_model, metadata.model_name) == (True, ENGINE.name)
    assert LLM.class_name() == LLM.to_payload()["class_name"] == "KVLinkLLM"


@pytest.mark.parametrize(
    ("message", "options", "error"),
    [
        ("Hm?", {"documents": "one text"}, "pass \\[document\\]"),
        ("Hm?", {"documents": [3]}, "document 0 is a int"),
        ("Hm?", {"documents": ["  "]}, "leave empty chunks out"),
        ("Hm?", {"max_tokens": 0}, "at least 1, not 0"),
        ("Hm?", {"max_tokens": 5000}, "has a context of 4096"),
        ("Hm?", {"tools": ["?"], "speed": 3}, "speed"),
        (" ", {"temperature": -1}, "-1"),
        ([ImageBlock(image=b"")], {}, "message 0 has a ImageBlock"),
        (
            [CitableBlock(title="", source="", content=[ImageBlock(image=b"")])],
            {},
            "message 0 has a ImageBlock",
        ),
        (
            [CitableBlock(title="", source="", content="Bees.")],
            {"documents": ["Ants."]},
            "leave one of them out",
        ),
        (
            [
                CitableBlock(title="", source="", content="Bees."),
                TextBlock(text="and"),
                CitableBlock(title="", source="", content="Ants."),
            ],
            {},
            "more than one place",
        ),
    ],
)
def test_bad_input_is_named(message: Any, options: dict[str, Any], error: str) -> None:
    with pytest.raises(InputError, match=error):
        LLM.chat([ChatMessage(content=message)], **options)


def test_a_model_is_loaded_once_and_when_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[tuple[str, dict[str, Any]]] = []
    together = threading.Barrier(8)

    def load(model: str, **options: Any) -> KVLinkEngine:
        loads.append((model, options))
        time.sleep(0.05)  # the others come meanwhile
        return ENGINE

    monkeypatch.setattr(KVLinkEngine, "from_pretrained", load)
    options: dict[str, Any] = {"dtype": "float32", "device": "cpu", "adapter": "some-adapter"}
    more = {"merge_adapter": True}
    made = KVLinkLLM("some/model", store="kv", **options, engine_kwargs=more, max_tokens=5)
    copies = [made, made.model_copy(), copy.copy(made), copy.deepcopy(made)]
    made.to_payload()
    assert loads == []

    def ask(place: int) -> KVLinkEngine:
        together.wait()
        return copies[place % 4].engine

    with ThreadPoolExecutor(8) as pool:
        engines = list(pool.map(ask, range(8)))
    assert loads == [("some/model", {"store": "kv", **options, **more})]
    assert all(engine is ENGINE for engine in engines)
    assert made.metadata.model_name == "some/model"


def test_an_llm_is_of_one_model() -> None:
    with pytest.raises(InputError, match="only one of them"):
        KVLinkLLM()
    with pytest.raises(InputError, match="only one of them"):
        KVLinkLLM("some/model", engine=ENGINE)
    for options in ({"store": "kv"}, {"dtype": "float32"}, {"engine_kwargs": {"device": "cpu"}}):
        with pytest.raises(InputError, match="with_store"):
            KVLinkLLM(engine=ENGINE, **options)
    with pytest.raises(InputError, match=r"\['dtype'\] are given by themselves and in"):
        KVLinkLLM("some/model", dtype="float32", engine_kwargs={"dtype": "float16"})


def test_what_is_computed_anew_can_be_said() -> None:
    def computed(**options: Any) -> tuple[str, int]:
        made = lib.llm(ENGINE, strategy="recompute", **options)
        report = made.chat([user(QUESTION)], documents=CHUNKS_OF_TEXT).raw["report"]
        return report["strategy"], report["computed_tokens"]

    computed()  # stores the caches
    none, first = computed(recompute=0.0)[1], {"recompute": 0.2, "recompute_by": "first"}
    lengths = [len(ENGINE.layout.chunk(Chunk(text))) for text in CHUNKS_OF_TEXT]
    few, fewer = (none + sum(round(share * n) for n in lengths) for share in (0.2, 0.05))
    assert computed(**first) == ("recompute", few)
    assert computed(**first, additional_kwargs={"recompute": 0.05}) == ("recompute", fewer)
    assert computed(recompute=0.2)[1] > few  # by the question, which is read twice
    call = {"documents": CHUNKS_OF_TEXT, "strategy": "recompute", **first}
    assert LLM.chat([user(QUESTION)], **call).raw["report"]["computed_tokens"] == few


def test_copies_share_the_model_and_pickles_are_refused() -> None:
    for twin in (LLM.model_copy(), copy.deepcopy(LLM)):
        assert twin.engine is ENGINE
        twin.max_tokens = 3
    assert LLM.max_tokens == 12
    with pytest.raises(InputError, match=r"KVLinkLLM holds a model.*num_workers=None"):
        pickle.dumps(LLM)
    with pytest.raises(InputError, match="KVLinkLLM holds a model"):
        pickle.dumps({"llm": KVLinkLLM("some/model")})


@pytest.mark.parametrize("stream", [False, True])
def test_events_are_those_of_a_stock_llm(stream: bool) -> None:
    def names(llm: Any) -> list[str]:
        with lib.Recorder() as recorder:
            if stream:
                list(llm.stream_chat([user("Hm?")]))
                list(llm.stream_complete("Hm?"))
            else:
                llm.chat([user("Hm?")])
                llm.complete("Hm?")
        return recorder.names

    ours = names(LLM)
    assert ours == names(MockFunctionCallingLLM(is_chat_model=True))
    assert ours[0] == "LLMChatStartEvent"
    assert ours[-1] == "LLMCompletionEndEvent"


def test_token_counters_count_the_models_tokens() -> None:
    counter = TokenCountingHandler()
    made = lib.llm(ENGINE, callback_manager=CallbackManager([counter]))
    answer = expected(chunks=CHUNKS_OF_TEXT)
    made.chat([user(QUESTION)], documents=CHUNKS_OF_TEXT)
    assert counter.prompt_llm_token_count == answer.report.context_tokens
    assert counter.completion_llm_token_count == len(answer.token_ids)
    list(made.stream_chat([user(QUESTION)], documents=CHUNKS_OF_TEXT))
    assert counter.completion_llm_token_count == 2 * len(answer.token_ids)
