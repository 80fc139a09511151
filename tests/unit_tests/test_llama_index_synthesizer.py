"""Answers of a query engine are those of the engine from the same texts, and all else is stock."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import tiny_llama_index as lib
from llama_index.core import QueryBundle, StorageContext, VectorStoreIndex
from llama_index.core.base.llms.types import ChatMessage, MessageRole
from llama_index.core.bridge.pydantic import BaseModel
from llama_index.core.callbacks import CallbackManager, LlamaDebugHandler
from llama_index.core.llms import MockLLM
from llama_index.core.node_parser import SentenceSplitter, SentenceWindowNodeParser
from llama_index.core.postprocessor import MetadataReplacementPostProcessor
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.prompts import ChatPromptTemplate, PromptTemplate, SelectorPromptTemplate
from llama_index.core.response_synthesizers import get_response_synthesizer
from llama_index.core.schema import MetadataMode, NodeWithScore, TextNode
from llama_index.llms.kvlink import KVLinkLLM, KVLinkSynthesizer, KVLinkTransform

from kvlink_rag import CHUNKS, InputError

QUESTION = "Which whales?"
ENGINE = lib.engine()
INDEX = lib.index(lib.documents(), SentenceSplitter(), KVLinkTransform(ENGINE))


class Reverse(BaseNodePostprocessor):
    """A reranker."""

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        return nodes[::-1]


def texts(nodes: list[NodeWithScore]) -> list[str]:
    return [node.node.get_content(metadata_mode=MetadataMode.LLM) for node in nodes]


def query_engine(**options: Any) -> Any:
    llm = options.pop("llm", None) or lib.llm(ENGINE)
    synthesizer = KVLinkSynthesizer(llm, streaming=options.pop("streaming", False))
    made = {"similarity_top_k": 3, "response_synthesizer": synthesizer, **options}
    return INDEX.as_query_engine(llm=llm, **made)


def answer(question: Any, chunks: list[str], **options: Any) -> str:
    return ENGINE.answer(question, chunks, **{"max_new_tokens": 12, **options}).text


def nodes(*given: str) -> list[NodeWithScore]:
    return [NodeWithScore(node=TextNode(text=text, id_=f"node-{text}")) for text in given]


@pytest.mark.parametrize("kind", ["simple", "faiss"])
def test_three_changed_lines_and_the_same_nodes(kind: str) -> None:
    documents, engine = lib.documents(), lib.engine()

    def storage() -> StorageContext:
        return StorageContext.from_defaults(vector_store=lib.vector_store(kind))

    llm: Any = MockLLM(max_tokens=4)
    index = VectorStoreIndex.from_documents(
        documents,
        transformations=[SentenceSplitter()],
        embed_model=lib.WordEmbedding(),
        storage_context=storage(),
    )
    stock = index.as_query_engine(llm=llm, similarity_top_k=3).query(QUESTION)

    llm = KVLinkLLM(engine=engine)
    index = VectorStoreIndex.from_documents(
        documents,
        transformations=[SentenceSplitter(), KVLinkTransform(engine)],
        embed_model=lib.WordEmbedding(),
        storage_context=storage(),
    )
    linked = index.as_query_engine(
        llm=llm, response_synthesizer=KVLinkSynthesizer(llm), similarity_top_k=3
    ).query(QUESTION)

    assert lib.ids(linked.source_nodes) == lib.ids(stock.source_nodes)
    assert linked.source_nodes[0].node.ref_doc_id == "whales"
    assert [n.score for n in linked.source_nodes] == [n.score for n in stock.source_nodes]
    assert str(linked) == engine.answer(QUESTION, texts(linked.source_nodes)).text
    report = linked.metadata.pop("kvlink")
    assert (report["hits"], report["misses"]) == (3, 0)
    assert report["ttft_s"] > 0
    assert list(linked.metadata.values()) == list(stock.metadata.values())
    assert linked.metadata.keys() == {node.node_id for node in linked.source_nodes}


def test_the_llm_alone_serves_stock_synthesizers() -> None:
    llm = lib.llm(ENGINE)
    prompt = PromptTemplate("Read {context_str} and answer: {query_str}")
    response = INDEX.as_query_engine(llm=llm, similarity_top_k=2, text_qa_template=prompt).query(
        "Hm?"
    )
    read = "\n\n".join(texts(response.source_nodes))
    assert str(response) == answer(f"Read {read} and answer: Hm?", [])


def test_answers_are_the_engines_token_for_token() -> None:
    with lib.Recorder() as recorder:
        response = query_engine().query(QUESTION)
    chat = recorder.last("LLMChatEndEvent").response
    expected = ENGINE.answer(QUESTION, texts(response.source_nodes), max_new_tokens=12)
    assert chat.raw["token_ids"] == expected.token_ids
    assert str(response) == expected.text != answer(QUESTION, [])


def test_streams_and_async_answers_are_the_same() -> None:
    expected = str(query_engine().query(QUESTION))
    stream = query_engine(streaming=True).query(QUESTION)
    assert stream.metadata["kvlink"] == {}
    assert len(stream.source_nodes) == 3
    pieces = list(stream.response_gen)
    assert len(pieces) > 3
    assert "".join(pieces) == expected
    assert stream.metadata["kvlink"]["hits"] == 3
    assert stream.metadata["kvlink"]["total_s"] > 0
    assert str(query_engine(streaming=True).query(QUESTION)) == expected

    async def ask() -> tuple[Any, Any, list[str], str]:
        whole = await query_engine().aquery(QUESTION)
        stream = await query_engine(streaming=True).aquery(QUESTION)
        pieces = [piece async for piece in stream.async_response_gen()]
        again = await query_engine(streaming=True).aquery(QUESTION)
        return whole, stream, pieces, (await again.get_response()).response

    whole, stream, pieces, again = asyncio.run(ask())
    assert str(whole) == "".join(pieces) == again == expected
    assert len(pieces) > 3
    for response in (whole, stream):
        assert response.metadata["kvlink"]["hits"] == 3
        assert len(response.source_nodes) == 3


def test_a_reranker_costs_no_cache() -> None:
    plain = query_engine().query(QUESTION)
    turned = query_engine(node_postprocessors=[Reverse()]).query(QUESTION)
    assert lib.ids(turned.source_nodes) == lib.ids(plain.source_nodes)[::-1]
    assert turned.metadata["kvlink"]["misses"] == 0
    assert str(turned) == answer(QUESTION, texts(turned.source_nodes))


def test_sentence_windows_are_computed_once_where_they_are_needed() -> None:
    engine = lib.engine()
    parser = SentenceWindowNodeParser.from_defaults(window_size=1)
    index = lib.index(lib.documents(["bees", "salt"]), parser, KVLinkTransform(engine))
    assert engine.store.stat().entries == 6
    made = index.as_query_engine(
        llm=lib.llm(engine),
        response_synthesizer=KVLinkSynthesizer(lib.llm(engine)),
        node_postprocessors=[MetadataReplacementPostProcessor("window")],
    )
    first = made.query("Bees were seen?")
    windows = texts(first.source_nodes)
    assert all(window.count(".") >= 2 for window in windows)
    assert len(set(windows)) == 2
    assert first.metadata["kvlink"]["misses"] == 2
    stored = len(engine.store.stored)  # type: ignore[attr-defined]
    second = made.query("bees WERE seen")
    assert texts(second.source_nodes) == windows
    assert (second.metadata["kvlink"]["hits"], second.metadata["kvlink"]["misses"]) == (2, 0)
    assert len(engine.store.stored) == stored  # type: ignore[attr-defined]
    # the window's cache is the node's own, as the sentence's is
    references = engine.store.references()
    for node, key in zip(first.source_nodes, engine.keys(windows), strict=True):
        owner = f'llama_index:["{node.node.ref_doc_id}", "{node.node.node_id}"]'
        assert [k for o, k in references if o == owner].count(key) == 1
        assert len([k for o, k in references if o == owner]) == 2


def test_sixteen_questions_at_once() -> None:
    questions = [
        f"{topic.capitalize()} or {other}?" for topic in lib.TOPICS for other in ("a", "b")
    ]
    made, streaming = query_engine(), query_engine(streaming=True)

    async def ask(place: int, question: str) -> Any:
        if place % 2:
            return await made.aquery(question)
        return await (await streaming.aquery(question)).get_response()

    async def ask_all() -> list[Any]:
        return await asyncio.gather(*(ask(n, question) for n, question in enumerate(questions)))

    responses = asyncio.run(ask_all())
    for question, response in zip(questions, responses, strict=True):
        assert str(response) == answer(question, texts(response.source_nodes))
        assert response.metadata["kvlink"]["hits"] == 2 + 1
        assert set(response.metadata) == {"kvlink", *(n.node_id for n in response.source_nodes)}
    assert len({str(response) for response in responses}) > 4


# Prompts


@pytest.mark.parametrize("kind", ["text", "selector"])
def test_nodes_stand_where_the_prompt_has_the_context(kind: str) -> None:
    template: Any = PromptTemplate(
        "Read this:\n{context_str}\nIn {tone}, answer: {query_str}", tone="rhyme"
    )
    if kind == "selector":
        other = PromptTemplate("{context_str}")
        template = SelectorPromptTemplate(
            other, [(lambda llm: llm.metadata.is_chat_model, template)]
        )
    synthesizer = KVLinkSynthesizer(engine=ENGINE, text_qa_template=template)
    response = synthesizer.synthesize("Hm?", nodes("One.", "Two."))
    asked = [{"role": "user", "content": ["Read this:\n", CHUNKS, "\nIn rhyme, answer: Hm?"]}]
    assert str(response) == answer(asked, ["One.", "Two."], max_new_tokens=64)
    assert str(response) != answer("Hm?", ["One.", "Two."], max_new_tokens=64)


def test_nodes_stand_in_any_message_of_a_chat_prompt() -> None:
    messages = [
        ChatMessage("Know this: {context_str}", role=MessageRole.SYSTEM),
        ChatMessage("{query_str} {language}?", role=MessageRole.USER),
    ]
    synthesizer = KVLinkSynthesizer(lib.llm(ENGINE), text_qa_template=ChatPromptTemplate(messages))
    response = synthesizer.synthesize("In {context_str}", nodes("One."), language="Latin")
    asked = [
        {"role": "system", "content": ["Know this: ", CHUNKS]},
        {"role": "user", "content": "In {context_str} Latin?"},
    ]
    assert str(response) == answer(asked, ["One."])


def test_a_prompt_without_context_has_the_engines_wording_and_two_are_refused() -> None:
    template = PromptTemplate("Briefly: {query_str}")
    synthesizer = KVLinkSynthesizer(lib.llm(ENGINE), text_qa_template=template)
    assert str(synthesizer.synthesize("Hm?", nodes("One."))) == answer("Briefly: Hm?", ["One."])
    synthesizer.update_prompts({"text_qa_template": PromptTemplate("{context_str}{context_str}")})
    with pytest.raises(InputError, match="in 2 places"):
        synthesizer.synthesize("Hm?", nodes("One."))


def test_prompts_are_shown_and_changed_from_outside() -> None:
    made = query_engine()
    name = "response_synthesizer:text_qa_template"
    assert made.get_prompts()[name].get_template() == "{query_str}"
    made.update_prompts({name: PromptTemplate("{context_str} {query_str}")})
    response = made.query("Hm?")
    asked = [{"role": "user", "content": [CHUNKS, " Hm?"]}]
    assert str(response) == answer(asked, texts(response.source_nodes))


def test_the_llms_system_prompt_and_settings_hold() -> None:
    llm = lib.llm(ENGINE, system_prompt="Be bold.", max_tokens=5)
    response = query_engine(llm=llm).query("Hm?")
    chunks = texts(response.source_nodes)
    assert str(response) == answer("Hm?", chunks, system="Be bold.", max_new_tokens=5)
    assert response.metadata["kvlink"]["misses"] == 0


# What is not an answer


@pytest.mark.parametrize("streaming", [False, True])
def test_nothing_retrieved_is_answered_as_ever(streaming: bool) -> None:
    llm = lib.llm(ENGINE)
    stock = get_response_synthesizer(llm=llm, streaming=streaming)
    ours = KVLinkSynthesizer(llm, streaming=streaming)
    both = [s.synthesize("Hm?", []) for s in (stock, ours)]
    assert type(both[0]) is type(both[1])
    assert [str(r) for r in both] == ["Empty Response", "Empty Response"]
    assert [r.metadata for r in both] == [None, None]
    told = KVLinkSynthesizer(llm, empty_response="Nothing found.").synthesize("Hm?", [])
    assert str(told) == "Nothing found."

    async def ask(synthesizer: Any) -> str:
        response = await synthesizer.asynthesize("Hm?", [])
        return (await response.get_response()).response if streaming else str(response)

    assert asyncio.run(ask(ours)) == asyncio.run(ask(stock)) == "Empty Response"


def test_blank_nodes_are_not_shown_but_listed() -> None:
    given = nodes("One.", " ", "Two.")
    response = KVLinkSynthesizer(lib.llm(ENGINE)).synthesize("Hm?", given)
    assert str(response) == answer("Hm?", ["One.", "Two."])
    assert response.source_nodes == given
    more = nodes("Aside.")
    response = KVLinkSynthesizer(lib.llm(ENGINE)).synthesize("Hm?", given, more)
    assert response.source_nodes == given + more


def test_texts_without_nodes_are_answered_from() -> None:
    synthesizer = KVLinkSynthesizer(lib.llm(ENGINE))
    assert synthesizer.get_response("Hm?", ["One.", "Two."]) == answer("Hm?", ["One.", "Two."])
    assert asyncio.run(synthesizer.aget_response("Hm?", ["One."])) == answer("Hm?", ["One."])


def test_what_cannot_be_done_is_refused() -> None:
    class Tally(BaseModel):
        count: int

    llm = lib.llm(ENGINE)
    with pytest.raises(InputError, match=r"output_cls=.*Tally.* cannot be used"):
        KVLinkSynthesizer(llm, output_cls=Tally)  # type: ignore[arg-type]
    for other in (MockLLM(), llm.as_structured_llm(Tally)):
        with pytest.raises(InputError, match=f"llm is a {type(other).__name__}"):
            KVLinkSynthesizer(other)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="only one of them"):
        KVLinkSynthesizer()
    with pytest.raises(InputError, match="only one of them"):
        KVLinkSynthesizer(llm, engine=ENGINE)
    with pytest.raises(InputError, match="has a context of 4096"):
        KVLinkSynthesizer(llm).synthesize("Hm?", nodes("a" * 4000, "b" * 4000))


# Observers


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("call", ["sync", "async"])
def test_observers_see_what_they_see_of_a_stock_synthesizer(call: str, streaming: bool) -> None:
    async def ask_async(synthesizer: Any) -> None:
        response = await synthesizer.asynthesize("Hm?", nodes("One.", "Two."))
        if streaming:
            await response.get_response()

    def observed(synthesizer: Any, debug: LlamaDebugHandler) -> tuple[list[str], list[str]]:
        with lib.Recorder() as recorder:
            if call == "async":
                asyncio.run(ask_async(synthesizer))
            else:
                str(synthesizer.synthesize("Hm?", nodes("One.", "Two.")))
        return recorder.names, [event.event_type.value for event in debug.get_events()]

    def manager() -> tuple[LlamaDebugHandler, CallbackManager]:
        debug = LlamaDebugHandler(print_trace_on_end=False)
        return debug, CallbackManager([debug])

    debug, callbacks = manager()
    llm = lib.llm(ENGINE, callback_manager=callbacks)
    stock = get_response_synthesizer(llm=llm, callback_manager=callbacks, streaming=streaming)
    expected = observed(stock, debug)

    debug, callbacks = manager()
    llm = lib.llm(ENGINE, callback_manager=callbacks)
    ours = KVLinkSynthesizer(llm, callback_manager=callbacks, streaming=streaming)
    names, called = observed(ours, debug)
    assert names == expected[0]
    assert called == [name for name in expected[1] if name != "chunking"]
    assert names[:2] == ["SynthesizeStartEvent", "GetResponseStartEvent"]
    assert "LLMChatEndEvent" in names
    assert "templating" in called


def test_events_tell_of_texts_and_costs() -> None:
    given = nodes("One.", "Two.")
    with lib.Recorder() as recorder:
        KVLinkSynthesizer(lib.llm(ENGINE)).synthesize("Hm?", given)
    assert recorder.last("GetResponseStartEvent").text_chunks == ["One.", "Two."]
    assert recorder.last("LLMPredictStartEvent").template_args["context_str"] == "One.\n\nTwo."
    assert recorder.last("SynthesizeEndEvent").response.metadata["kvlink"]["hits"] == 2
