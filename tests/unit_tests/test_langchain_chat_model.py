"""The chat model: settings, streams, metadata, concurrency, and one engine for all copies."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import gc
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import scripted
import tiny
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler, UsageMetadataCallbackHandler
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage
from langchain_core.outputs import ChatGenerationChunk
from langchain_core.prompts import PromptTemplate
from langchain_core.runnables import ConfigurableField
from langchain_kvlink import ChatKVLink

from kvlink_rag import Chunk, InputError, KVLinkEngine, Report

TEXTS = ["The sky is green.", "Grass is blue."]
QUESTION = "Colour?"


def added(chunks: Any) -> AIMessageChunk:
    first, *rest = chunks
    return first + rest if rest else first


async def gathered(chunks: Any) -> list[Any]:
    return [chunk async for chunk in chunks]


def untimed(message: AIMessage) -> dict[str, Any]:
    """Everything of a message but ids and times."""
    report = message.response_metadata["report"]
    times = {name for name in report if name.endswith("_s") or name == "started"}
    counts = {name: value for name, value in report.items() if name not in times}
    return {
        "content": message.content,
        "usage": message.usage_metadata,
        "metadata": {**message.response_metadata, "report": counts},
    }


@pytest.fixture
def engine() -> KVLinkEngine:
    engine = tiny.engine()
    engine.index(TEXTS, progress=False)
    engine.answer(QUESTION, TEXTS, max_new_tokens=1)  # stores the prefix
    return engine


class TestAnswers:
    def test_invoke_is_the_answer_of_the_engine(self, engine: KVLinkEngine) -> None:
        message = ChatKVLink(engine=engine).invoke(QUESTION, documents=TEXTS)
        answer = engine.answer(QUESTION, TEXTS)
        assert isinstance(message, AIMessage)
        assert message.content == answer.text
        assert message.usage_metadata == {
            "input_tokens": answer.report.context_tokens,
            "output_tokens": len(answer.token_ids),
            "total_tokens": answer.report.context_tokens + len(answer.token_ids),
            "input_token_details": {"cache_read": answer.report.reused_tokens},
        }
        metadata = message.response_metadata
        assert (metadata["model_name"], metadata["finish_reason"]) == (engine.name, "length")
        assert metadata["report"].keys() == {f.name for f in dataclasses.fields(Report)}
        assert (metadata["report"]["hits"], metadata["report"]["misses"]) == (2, 0)
        assert metadata["report"]["total_s"] >= metadata["report"]["ttft_s"] > 0

    def test_streamed_sync_and_async_it_is_the_same(self, engine: KVLinkEngine) -> None:
        chat = ChatKVLink(engine=engine, max_tokens=12)
        whole = untimed(chat.invoke(QUESTION, documents=TEXTS))
        chunks = list(chat.stream(QUESTION, documents=TEXTS))
        assert len(chunks) > 3
        assert untimed(added(chunks)) == whole
        assert untimed(asyncio.run(chat.ainvoke(QUESTION, documents=TEXTS))) == whole
        again = asyncio.run(gathered(chat.astream(QUESTION, documents=TEXTS)))
        assert [chunk.content for chunk in again] == [chunk.content for chunk in chunks]
        assert untimed(added(again)) == whole

    def test_what_must_not_be_added_up_is_on_the_last_chunk(self, engine: KVLinkEngine) -> None:
        *chunks, last = ChatKVLink(engine=engine).stream(QUESTION, documents=TEXTS)
        for chunk in chunks:
            assert chunk.usage_metadata is None
            assert chunk.response_metadata == {}
            assert chunk.chunk_position is None
        assert last.chunk_position == "last"

    def test_batches(self, engine: KVLinkEngine) -> None:
        chat = ChatKVLink(engine=engine, max_tokens=5).bind(documents=TEXTS)
        questions = [f"What is {n}?" for n in range(4)]
        expected = [engine.answer(q, TEXTS, max_new_tokens=5).text for q in questions]
        assert [m.content for m in chat.batch(questions)] == expected
        assert [m.content for m in asyncio.run(chat.abatch(questions))] == expected

    def test_strategy_and_system_reach_the_engine(self, engine: KVLinkEngine) -> None:
        chat = ChatKVLink(engine=engine, strategy="full", system="Be brief.", max_tokens=8)
        expected = engine.answer(
            QUESTION, TEXTS, strategy="full", system="Be brief.", max_new_tokens=8
        )
        message = chat.invoke(QUESTION, documents=TEXTS)
        assert message.content == expected.text
        assert message.response_metadata["report"]["strategy"] == "full"
        overridden = chat.invoke(QUESTION, documents=TEXTS, strategy="reuse", system="Be kind.")
        assert overridden.response_metadata["report"]["strategy"] == "reuse"
        expected = engine.answer(QUESTION, TEXTS, system="Be kind.", max_new_tokens=8)
        assert overridden.content == expected.text


class TestSettings:
    def test_what_is_computed_anew_can_be_said(self, engine: KVLinkEngine) -> None:
        def computed(chat: Any, **options: Any) -> tuple[str, int]:
            message = chat.invoke(QUESTION, documents=TEXTS, **options)
            report = message.response_metadata["report"]
            return report["strategy"], report["computed_tokens"]

        chat = ChatKVLink(engine=engine, strategy="recompute", recompute=0.0, recompute_by="first")
        none = computed(chat)[1]
        few = none + sum(round(0.2 * len(engine.layout.chunk(Chunk(text)))) for text in TEXTS)
        assert computed(chat, recompute=0.2) == ("recompute", few)
        assert computed(chat.bind(recompute=0.2, recompute_by="question"))[1] > few
        options = {"strategy": "recompute", "recompute_by": "question", "recompute": 0.2}
        made = ChatKVLink(engine=engine, **options)
        assert computed(made)[1] > few
        assert computed(made, recompute_by="first") == ("recompute", few)
        with pytest.raises(InputError, match="recompute_by must be one of"):
            computed(made, recompute_by="chance")
        assert chat._identifying_params != made._identifying_params

    def test_how_the_model_is_loaded_can_be_said(self, monkeypatch: pytest.MonkeyPatch) -> None:
        loads: list[tuple[str, dict[str, Any]]] = []
        made = tiny.engine()

        def load(model: str, **options: Any) -> KVLinkEngine:
            loads.append((model, options))
            return made

        monkeypatch.setattr(KVLinkEngine, "from_pretrained", load)
        options: dict[str, Any] = {"dtype": "float32", "device": "cpu", "adapter": "some"}
        more = {"merge_adapter": True}
        chat = ChatKVLink(model="some/model", store="kv", **options, engine_options=more)
        assert chat.engine is made
        assert chat.model_copy().engine is copy.deepcopy(chat).engine is made
        assert loads == [("some/model", {"store": "kv", **options, **more})]
        other = ChatKVLink(model="some/model", dtype="bfloat16")
        assert other._identifying_params != ChatKVLink(model="some/model")._identifying_params
        with pytest.raises(InputError, match="leave model, store, device, dtype"):
            ChatKVLink(engine=made, dtype="float32")
        with pytest.raises(InputError, match=r"\['device'\] are given by themselves and in"):
            ChatKVLink(model="some/model", device="cpu", engine_options={"device": "cuda"})

    def test_both_names_of_the_number_of_tokens(self, engine: KVLinkEngine) -> None:
        for options in ({"max_tokens": 3}, {"max_new_tokens": 3}):
            made = ChatKVLink(engine=engine, **options)
            assert made.max_tokens == 3
            for chat in (made, ChatKVLink(engine=engine).bind(**options)):
                message = chat.invoke(QUESTION)
                assert message.usage_metadata["output_tokens"] == 3

    def test_sampling_is_that_of_the_engine(self, engine: KVLinkEngine) -> None:
        settings: dict[str, Any] = {"temperature": 3.0, "top_p": 0.9, "seed": 7}
        expected = engine.answer(QUESTION, TEXTS, max_new_tokens=12, **settings).text
        assert expected != engine.answer(QUESTION, TEXTS, max_new_tokens=12).text
        chat = ChatKVLink(engine=engine, max_tokens=12, **settings)
        assert chat.invoke(QUESTION, documents=TEXTS).content == expected
        plain = ChatKVLink(engine=engine, max_tokens=12)
        assert plain.invoke(QUESTION, documents=TEXTS, **settings).content == expected

    def test_stop_of_the_call_replaces_that_of_the_model(self, engine: KVLinkEngine) -> None:
        settings: dict[str, Any] = {"temperature": 3.0, "seed": 7, "max_tokens": 12}
        text = ChatKVLink(engine=engine, **settings).invoke(QUESTION).content
        chat = ChatKVLink(engine=engine, stop=text[3:5], **settings)
        stopped = chat.invoke(QUESTION)
        assert stopped.content == text[: text.index(text[3:5])]
        assert stopped.response_metadata["finish_reason"] == "stop"
        assert chat.invoke(QUESTION, stop=[text[5:7]]).content == text[: text.index(text[5:7])]
        assert "".join(c.content for c in chat.stream(QUESTION)) == stopped.content
        assert chat.invoke(QUESTION, stop=[]).content == text

    @pytest.mark.parametrize(
        ("options", "problem"),
        [
            ({"max_tokns": 3}, r"takes no \['max_tokns'\]"),
            ({"max_tokens": "many"}, "is 'many'"),
            ({"engine": "tiny"}, "engine is a str"),
            ({"model": "x"}, "comes with its model"),
            ({"store": "kv"}, "comes with its model"),
            ({"document_prompt": "{page_content}"}, "document_prompt is '{page_content}'"),
        ],
    )
    def test_what_it_cannot_be_made_with_is_named(
        self, engine: KVLinkEngine, options: dict[str, Any], problem: str
    ) -> None:
        with pytest.raises(InputError, match=problem):
            ChatKVLink(**{"engine": engine, **options})

    def test_a_model_is_needed(self) -> None:
        with pytest.raises(InputError, match="there is no model"):
            ChatKVLink(max_tokens=3)

    @pytest.mark.parametrize(
        ("options", "problem"),
        [
            ({"max_tokns": 3}, r"a call takes no \['max_tokns'\]"),
            ({"model": "other"}, "the model is LlamaForCausalLM, not other"),
            ({"temperature": -1}, "temperature must be 0"),
            ({"max_tokens": 0}, "max_new_tokens must be at least 1"),
            ({"strategy": "fast"}, "strategy must be one of"),
            ({"tools": [{"name": "f", "description": "", "parameters": {}}]}, "shows no tools"),
        ],
    )
    def test_what_a_call_cannot_take_is_named(
        self, engine: KVLinkEngine, options: dict[str, Any], problem: str
    ) -> None:
        chat = ChatKVLink(engine=engine)
        with pytest.raises(InputError, match=problem):
            chat.invoke(QUESTION, **options)
        with pytest.raises(InputError, match=problem):
            asyncio.run(gathered(chat.astream(QUESTION, **options)))

    def test_two_system_prompts_are_one_too_many(self, engine: KVLinkEngine) -> None:
        with pytest.raises(InputError, match="leave one of them out"):
            ChatKVLink(engine=engine, system="A").invoke([("system", "B"), ("human", QUESTION)])

    def test_parameters_for_remote_models_are_accepted(self, engine: KVLinkEngine) -> None:
        ChatKVLink(engine=engine, timeout=5, max_retries=2, api_key="none", base_url="none")


class TestCallbacks:
    class Tokens(BaseCallbackHandler):
        def __init__(self) -> None:
            self.seen: list[str] = []
            self.last: Any = None

        def on_llm_new_token(self, token: Any, *, chunk: Any = None, **kwargs: Any) -> None:
            assert isinstance(chunk, ChatGenerationChunk)
            self.seen.append(token)

        def on_llm_end(self, response: Any, **kwargs: Any) -> None:
            self.last = response.generations[0][0].message

    def test_each_token_is_seen_once(self, engine: KVLinkEngine) -> None:
        chat = ChatKVLink(engine=engine, max_tokens=6)
        streaming = ChatKVLink(engine=engine, max_tokens=6, streaming=True)
        text = chat.invoke(QUESTION).content
        for run in (
            lambda config: list(chat.stream(QUESTION, config)),
            lambda config: asyncio.run(gathered(chat.astream(QUESTION, config))),
            lambda config: streaming.invoke(QUESTION, config),
            lambda config: asyncio.run(streaming.ainvoke(QUESTION, config)),
        ):
            tokens = self.Tokens()
            run({"callbacks": [tokens]})
            assert "".join(tokens.seen) == text
            assert tokens.last.usage_metadata["output_tokens"] == 6

    def test_usage_is_counted_by_langchain(self, engine: KVLinkEngine) -> None:
        usage = UsageMetadataCallbackHandler()
        message = ChatKVLink(engine=engine).invoke(QUESTION, {"callbacks": [usage]})
        assert usage.usage_metadata == {engine.name: message.usage_metadata}

    def test_events_of_a_stream(self, engine: KVLinkEngine) -> None:
        chat = ChatKVLink(engine=engine, max_tokens=6)

        async def events() -> list[str]:
            found = chat.astream_events(QUESTION, version="v2")
            return [
                e["data"]["chunk"].content
                async for e in found
                if e["event"] == "on_chat_model_stream"
            ]

        assert "".join(asyncio.run(events())) == chat.invoke(QUESTION).content


class TestIdentity:
    def test_names_and_parameters(self, engine: KVLinkEngine) -> None:
        chat = ChatKVLink(engine=engine, temperature=0.5, max_tokens=9, stop=["x"])
        assert chat._llm_type == "kvlink"
        assert chat.model_name == engine.name
        assert chat._get_ls_params() == {
            "ls_provider": "kvlink",
            "ls_model_name": engine.name,
            "ls_model_type": "chat",
            "ls_temperature": 0.5,
            "ls_max_tokens": 9,
            "ls_stop": ["x"],
        }
        assert chat._get_ls_params(stop=["y"], temperature=1)["ls_stop"] == ["y"]
        assert not ChatKVLink.is_lc_serializable()

    def test_a_cache_of_answers_tells_settings_apart(self, engine: KVLinkEngine) -> None:
        cache = InMemoryCache()
        prompt = PromptTemplate.from_template("Text: {page_content}")
        texts = set()
        for options in (
            {},
            {"max_tokens": 3},
            {"max_tokens": 3, "stop": ["]"]},
            {"system": "Be brief."},
            {"strategy": "full"},
            {"temperature": 3.0, "seed": 7},
            {"document_prompt": prompt},
        ):
            chat = ChatKVLink(engine=engine, cache=cache, **options)
            uncached = ChatKVLink(engine=engine, **options)
            for _ in range(2):
                found = chat.invoke(QUESTION, documents=TEXTS).content
                assert found == uncached.invoke(QUESTION, documents=TEXTS).content
            texts.add(found)
        assert len(cache._cache) == 7
        ChatKVLink(engine=engine, cache=cache).invoke(QUESTION, documents=TEXTS[::-1])
        ChatKVLink(engine=tiny.engine("qwen2"), cache=cache).invoke(QUESTION, documents=TEXTS)
        assert len(cache._cache) == 9

    def test_tokens_are_those_of_the_models_tokenizer(self, engine: KVLinkEngine) -> None:
        chat = ChatKVLink(engine=engine)
        text = "naïve <|end|>"
        assert chat.get_token_ids(text) == engine.layout.encode_text(text)
        assert chat.get_num_tokens(text) == len(text.encode())
        assert ChatKVLink(engine=engine, custom_get_token_ids=lambda _: [1]).get_num_tokens(text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny.model("llama").save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was loaded."""
    loaded: list[str] = []
    load = KVLinkEngine.from_pretrained

    def note(model: Any, **options: Any) -> KVLinkEngine:
        loaded.append(model)
        time.sleep(0.05)  # so that others arrive meanwhile
        return load(model, **options)

    monkeypatch.setattr(KVLinkEngine, "from_pretrained", note)
    return loaded


class TestLoading:
    def test_loaded_once_when_first_used(
        self, folder: Path, loads: list[str], tmp_path: Path
    ) -> None:
        chat = ChatKVLink(model=folder, store=tmp_path / "kv", max_tokens=4)
        assert (chat.model_name, repr(chat), loads) == (str(folder), repr(chat), [])
        assert chat._identifying_params["model_name"] == str(folder)
        before = chat._identifying_params
        message = chat.invoke(QUESTION, documents=TEXTS)
        assert chat._identifying_params == before
        assert loads == [str(folder)]
        assert message.response_metadata["model_name"] == str(folder)
        assert chat.engine.store.stat().entries == 3
        assert (
            message.content
            == tiny.engine(prompt=None).answer(QUESTION, TEXTS, max_new_tokens=4).text
        )

    def test_copies_share_the_model(self, folder: Path, loads: list[str]) -> None:
        chat = ChatKVLink(model=str(folder), max_tokens=1)
        configurable = chat.configurable_fields(
            max_tokens=ConfigurableField(id="tokens"), model=ConfigurableField(id="model")
        )
        copies: list[Any] = [
            chat,
            copy.copy(chat),
            copy.deepcopy(chat),
            chat.model_copy(update={"max_tokens": 2}),
            chat.model_copy(deep=True),
            chat.bind(stop=["x"]),
            chat.with_config(tags=["x"]),
            chat.with_retry(),
            configurable,
            configurable.with_config(configurable={"tokens": 2}),
        ]
        threads = [threading.Thread(target=c.invoke, args=(QUESTION,)) for c in copies]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert loads == [str(folder)]
        assert configurable.with_config(configurable={"tokens": 2}).invoke(
            QUESTION
        ).usage_metadata == {
            **chat.invoke(QUESTION, max_tokens=2).usage_metadata,
        }
        assert loads == [str(folder)]

    def test_a_copy_for_another_model_has_another_engine(
        self, folder: Path, loads: list[str]
    ) -> None:
        chat = ChatKVLink(engine=tiny.engine("qwen2"), max_tokens=1)
        loads.clear()
        other = chat.configurable_fields(model=ConfigurableField(id="model"))
        found = other.with_config(configurable={"model": str(folder)}).invoke(QUESTION)
        assert found.response_metadata["model_name"] == str(folder)
        assert loads == [str(folder)]

    def test_a_model_that_cannot_be_loaded_is_tried_again(
        self, tmp_path: Path, folder: Path, loads: list[str]
    ) -> None:
        chat = ChatKVLink(model=tmp_path / "later", max_tokens=1)
        with pytest.raises(Exception, match="later"):
            chat.invoke(QUESTION)
        (tmp_path / "later").symlink_to(folder)
        assert chat.invoke(QUESTION).usage_metadata["output_tokens"] == 1
        assert len(loads) == 2

    def test_options_reach_the_engine(self, folder: Path) -> None:
        chat = ChatKVLink(model=folder, engine_options={"encode_behind": "alone"})
        assert chat.engine.behind == ()


class TestAsync:
    def test_many_at_once(self, engine: KVLinkEngine) -> None:
        chat = ChatKVLink(engine=engine, max_tokens=8)
        asked = [
            (f"What is {n}?", [TEXTS[n % 2], f"Fact {n} is {n * n}.", TEXTS[(n + 1) % 2]])
            for n in range(16)
        ]

        async def all_at_once() -> list[str]:
            async def streamed(question: str, documents: list[str]) -> str:
                chunks = await gathered(chat.astream(question, documents=documents))
                return "".join(chunk.content for chunk in chunks)

            async def invoked(question: str, documents: list[str]) -> str:
                return str((await chat.ainvoke(question, documents=documents)).content)

            ways = (streamed, invoked)
            return await asyncio.gather(*(ways[n % 2](*asked[n]) for n in range(16)))

        found = asyncio.run(all_at_once())
        fresh = tiny.engine()
        assert found == [fresh.answer(*a, max_new_tokens=8).text for a in asked]
        assert engine.store.stat().entries == 2 + 16 + 1

    def test_the_event_loop_stays_free(self, engine: KVLinkEngine) -> None:
        """While a forward pass lasts, other tasks run: none could set the event otherwise."""
        set_by_the_loop = threading.Event()

        def waiting(job: Any, tokens: Iterator[int]) -> Iterator[int]:
            assert set_by_the_loop.wait(30)
            yield from tokens

        scripted.rewrite(engine, waiting)

        async def main(run: Any) -> Any:
            set_by_the_loop.clear()
            task = asyncio.ensure_future(run)
            await asyncio.sleep(0.05)
            assert not task.done()
            set_by_the_loop.set()
            return await task

        chat = ChatKVLink(engine=engine, max_tokens=3)
        assert asyncio.run(main(chat.ainvoke(QUESTION))).usage_metadata["output_tokens"] == 3
        assert len(asyncio.run(main(gathered(chat.astream(QUESTION))))) > 1

    def test_loading_leaves_the_event_loop_free(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        where: list[threading.Thread] = []
        engine = tiny.engine()
        monkeypatch.setattr(
            KVLinkEngine,
            "from_pretrained",
            lambda *_, **__: where.append(threading.current_thread()) or engine,
        )
        asyncio.run(ChatKVLink(model=folder, max_tokens=1).ainvoke(QUESTION))
        asyncio.run(gathered(ChatKVLink(model=folder, max_tokens=1).astream(QUESTION)))
        assert len(where) == 2
        assert threading.main_thread() not in where

    @pytest.mark.parametrize("streamed", [True, False])
    def test_a_cancelled_call_stops_and_harms_nothing(
        self, engine: KVLinkEngine, streamed: bool
    ) -> None:
        made: list[int] = []

        def counted(job: Any, tokens: Iterator[int]) -> Iterator[int]:
            for token in tokens:
                made.append(token)
                time.sleep(0.005)
                yield token

        restore = scripted.rewrite(engine, counted)
        chat = ChatKVLink(engine=engine, max_tokens=2000)
        documents = [*TEXTS, "Never seen before."]

        async def main() -> None:
            run = (
                gathered(chat.astream(QUESTION, documents=documents))
                if streamed
                else chat.ainvoke(QUESTION, documents=documents)
            )
            task = asyncio.ensure_future(run)
            while len(made) < 5:
                await asyncio.sleep(0.005)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(main())  # ends when its threads have ended
        gc.collect()
        assert len(made) < 1000
        restore()
        expected = tiny.engine().answer(QUESTION, documents, max_new_tokens=8).text
        found = ChatKVLink(engine=engine, max_tokens=8).invoke(QUESTION, documents=documents)
        assert found.content == expected
        assert found.response_metadata["report"]["misses"] == 0  # stored with the first token

    def test_a_reader_who_leaves_harms_nothing(self, engine: KVLinkEngine) -> None:
        chat = ChatKVLink(engine=engine, max_tokens=500)

        async def first() -> str:
            async for chunk in chat.astream(QUESTION, documents=TEXTS):
                return str(chunk.content)
            return ""

        text = chat.invoke(QUESTION, documents=TEXTS, max_tokens=8).content
        assert text.startswith(asyncio.run(first()))
        assert text.startswith(str(next(chat.stream(QUESTION, documents=TEXTS)).content))
        assert chat.invoke(QUESTION, documents=TEXTS, max_tokens=8).content == text


def test_messages_given_are_not_changed(engine: KVLinkEngine) -> None:
    block = {"type": "text-plain", "mime_type": "text/plain", "text": TEXTS[0]}
    document = Document(TEXTS[1], id="1", metadata={"a": 1})
    message = HumanMessage([block, "Why?"])
    before = copy.deepcopy((block, document, message))
    ChatKVLink(engine=engine, max_tokens=1).invoke([message], documents=[document])
    assert (block, document, message) == before
