"""A LlamaIndex pipeline with the default model: what the README shows, and a fresh process."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_llama_index as lib
from effort import times
from llama_index.core import Document, VectorStoreIndex
from llama_index.core.llms import MockLLM
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.schema import MetadataMode
from llama_index.llms.kvlink import (
    KVLinkContextChatEngine,
    KVLinkLLM,
    KVLinkSynthesizer,
    KVLinkTransform,
)

pytestmark = pytest.mark.model

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
ARTICLE = Path(__file__).parents[2] / "examples" / "corpus" / "apollo_program.md"
LENGTH = times(full=4000, quick=1600)
"""Of the article, in characters."""
QUESTION = "Who was the first person to walk on the Moon?"


def documents() -> list[Document]:
    text = ARTICLE.read_text(encoding="utf-8")[:LENGTH]
    return [Document(text=text, id_="apollo", metadata={"source": "apollo_program.md"})]


def texts(nodes: Any) -> list[str]:
    return [node.node.get_content(metadata_mode=MetadataMode.LLM) for node in nodes]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("llama-index")


@pytest.fixture(scope="module")
def llm(folder: Path) -> KVLinkLLM:
    return KVLinkLLM(MODEL, store=folder / "kv-cache", max_tokens=20)


@pytest.fixture(scope="module")
def index(llm: KVLinkLLM, folder: Path) -> VectorStoreIndex:
    made = VectorStoreIndex.from_documents(
        documents(),
        transformations=[SentenceSplitter(chunk_size=200), KVLinkTransform(llm.engine)],
        embed_model=lib.WordEmbedding(),
    )
    made.storage_context.persist(folder / "index")
    return made


def query_engine(index: VectorStoreIndex, llm: KVLinkLLM, **options: Any) -> Any:
    synthesizer = KVLinkSynthesizer(llm, **options)
    return index.as_query_engine(llm=llm, response_synthesizer=synthesizer, similarity_top_k=3)


def test_three_changed_lines(index: VectorStoreIndex, llm: KVLinkLLM) -> None:
    stock = VectorStoreIndex.from_documents(
        documents(),
        transformations=[SentenceSplitter(chunk_size=200)],
        embed_model=lib.WordEmbedding(),
    ).as_query_engine(llm=MockLLM(max_tokens=2), similarity_top_k=3)
    response = query_engine(index, llm).query(QUESTION)
    assert texts(response.source_nodes) == texts(stock.query(QUESTION).source_nodes)
    expected = llm.engine.answer(QUESTION, texts(response.source_nodes), max_new_tokens=20)
    assert str(response) == expected.text
    report = response.metadata["kvlink"]
    assert (report["hits"], report["misses"]) == (3, 0)
    assert (report["asked"], report["strategy"]) == ("auto", "recompute")
    assert report["computed_tokens"] < report["reused_tokens"] / 3
    reuse = KVLinkLLM(engine=llm.engine, strategy="reuse", max_tokens=20)
    report = query_engine(index, reuse).query(QUESTION).metadata["kvlink"]
    assert (report["hits"], report["misses"]) == (3, 0)
    assert report["computed_tokens"] < report["reused_tokens"] / 5

    stream = query_engine(index, llm, streaming=True).query(QUESTION)
    pieces = list(stream.response_gen)
    assert "".join(pieces) == expected.text
    assert len(pieces) > 5
    assert str(asyncio.run(query_engine(index, llm).aquery(QUESTION))) == expected.text


@pytest.mark.slow
def test_a_conversation(index: VectorStoreIndex, llm: KVLinkLLM) -> None:
    chat = KVLinkContextChatEngine.from_defaults(index.as_retriever(similarity_top_k=2), llm)
    with lib.Recorder() as recorder:
        first, second = chat.chat(QUESTION), chat.chat("When did he land there?")
    asked = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": first.response},
        {"role": "user", "content": "When did he land there?"},
    ]
    expected = llm.engine.answer(asked, texts(second.source_nodes), max_new_tokens=20)
    assert second.response == expected.text
    report = recorder.last("SynthesizeEndEvent").response.metadata["kvlink"]
    assert (report["hits"], report["misses"]) == (2, 0)


@pytest.mark.slow
def test_a_fresh_process_reads_nothing_anew(
    index: VectorStoreIndex, llm: KVLinkLLM, folder: Path
) -> None:
    out = subprocess.run(
        [sys.executable, "-c", FRESH],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert out.returncode == 0, out.stderr
    there = json.loads(out.stdout.splitlines()[-1])
    here = query_engine(index, llm).query(QUESTION)
    assert there == {"text": str(here), "hits": 3, "misses": 0}


FRESH = f"""
import json
import tiny_llama_index as lib
from llama_index.core import StorageContext, load_index_from_storage
from llama_index.llms.kvlink import KVLinkLLM, KVLinkSynthesizer

llm = KVLinkLLM("{MODEL}", store="kv-cache", max_tokens=20)
storage = StorageContext.from_defaults(persist_dir="index")
index = load_index_from_storage(storage, embed_model=lib.WordEmbedding())
made = index.as_query_engine(
    llm=llm, response_synthesizer=KVLinkSynthesizer(llm), similarity_top_k=3
)
response = made.query("{QUESTION}")
report = response.metadata["kvlink"]
print(json.dumps({{
    "text": str(response), "hits": report["hits"], "misses": report["misses"]
}}))
"""
