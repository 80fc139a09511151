"""The query engine is the stock one with linked answers."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import tiny_llama_index as lib
from llama_index.core import Settings
from llama_index.core.callbacks import CallbackManager, LlamaDebugHandler
from llama_index.core.llms import MockLLM
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.postprocessor import SimilarityPostprocessor
from llama_index.core.prompts import PromptTemplate
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import MetadataMode
from llama_index.llms.kvlink import KVLinkQueryEngine, KVLinkTransform

from kvlink_rag import CHUNKS, InputError

QUESTION = "Which whales?"
ENGINE = lib.engine()
INDEX = lib.index(lib.documents(), SentenceSplitter(), KVLinkTransform(ENGINE))


def texts(response: Any) -> list[str]:
    return [n.node.get_content(metadata_mode=MetadataMode.LLM) for n in response.source_nodes]


@pytest.mark.parametrize("make", [KVLinkQueryEngine, KVLinkQueryEngine.from_args])
def test_it_is_made_of_a_retriever(make: Any) -> None:
    made = make(INDEX.as_retriever(similarity_top_k=3), lib.llm(ENGINE))
    assert isinstance(made, RetrieverQueryEngine)
    response = made.query(QUESTION)
    assert str(response) == ENGINE.answer(QUESTION, texts(response), max_new_tokens=12).text
    assert (response.metadata["kvlink"]["hits"], response.metadata["kvlink"]["misses"]) == (3, 0)
    assert str(asyncio.run(made.aquery(QUESTION))) == str(response)
    other = made.with_retriever(INDEX.as_retriever(similarity_top_k=1)).query(QUESTION)
    assert other.metadata["kvlink"]["hits"] == 1


def test_options_reach_the_synthesizer_and_postprocessors_are_applied() -> None:
    template = PromptTemplate("{context_str} {query_str}")
    retriever = INDEX.as_retriever(similarity_top_k=8)
    best = retriever.retrieve(QUESTION)[1].score
    made = KVLinkQueryEngine(
        retriever,
        engine=ENGINE,
        node_postprocessors=[SimilarityPostprocessor(similarity_cutoff=best)],
        text_qa_template=template,
        streaming=True,
    )
    response = made.query(QUESTION)
    pieces = list(response.response_gen)
    asked = [{"role": "user", "content": [CHUNKS, f" {QUESTION}"]}]
    assert "".join(pieces) == ENGINE.answer(asked, texts(response)).text
    assert len(texts(response)) == 2


@pytest.mark.parametrize("streaming", [False, True])
def test_observers_see_a_stock_query_engine(
    streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def observed(kind: Any) -> tuple[list[str], list[str]]:
        debug = LlamaDebugHandler(print_trace_on_end=False)
        monkeypatch.setattr(Settings, "_callback_manager", CallbackManager([debug]))
        index = lib.index(lib.documents(["bees", "salt"]))
        debug.flush_event_logs()
        made = kind.from_args(index.as_retriever(), llm=lib.llm(ENGINE), streaming=streaming)
        with lib.Recorder() as recorder:
            str(made.query(QUESTION))
        return recorder.names, [event.event_type.value for event in debug.get_events()]

    ours, stock = observed(KVLinkQueryEngine), observed(RetrieverQueryEngine)
    assert ours[0] == stock[0]
    assert ours[1] == [event for event in stock[1] if event != "chunking"]  # no repacking
    assert ours[0][0] == "QueryStartEvent"
    assert {"query", "retrieve", "synthesize", "llm"} <= set(ours[1])


def test_what_cannot_be_done_is_refused() -> None:
    retriever = INDEX.as_retriever()
    with pytest.raises(InputError, match="llm is a MockLLM"):
        KVLinkQueryEngine(retriever, MockLLM())  # type: ignore[arg-type]
    with pytest.raises(InputError, match="only one of them"):
        KVLinkQueryEngine.from_args(retriever)
    with pytest.raises(InputError, match="output_cls"):
        KVLinkQueryEngine(retriever, engine=ENGINE, output_cls=dict)
