"""Caches come and go with the nodes of a vector store, whoever deletes them."""

from __future__ import annotations

import asyncio
import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_llama_index as lib
from llama_index.core import Document, StorageContext
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.ingestion.pipeline import DocstoreStrategy
from llama_index.core.node_parser import SentenceSplitter, SentenceWindowNodeParser
from llama_index.core.postprocessor import MetadataReplacementPostProcessor
from llama_index.core.schema import NodeRelationship, RelatedNodeInfo, TextNode
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.core.vector_stores import MetadataFilter, MetadataFilters, SimpleVectorStore
from llama_index.core.vector_stores.types import (
    BasePydanticVectorStore,
    VectorStoreQuery,
    VectorStoreQueryResult,
)
from llama_index.llms.kvlink import (
    KVLinkQueryEngine,
    KVLinkSynthesizer,
    KVLinkTransform,
    KVLinkVectorStore,
)

from kvlink_rag import InputError, KVLinkEngine

SPLITTER = SentenceSplitter(chunk_size=20, chunk_overlap=0, include_metadata=False)


def node(text: str, id_: str, document: str | None = None, **metadata: Any) -> TextNode:
    made = TextNode(text=text, id_=id_, metadata=metadata, embedding=[1.0, 0.0])
    made.excluded_llm_metadata_keys = list(metadata)
    if document:
        made.relationships[NodeRelationship.SOURCE] = RelatedNodeInfo(node_id=document)
    return made


def kept(engine: KVLinkEngine, *texts: str) -> list[bool]:
    return [engine.store.has(key) for key in engine.keys(texts)]


def store(engine: KVLinkEngine, inner: BasePydanticVectorStore | None = None) -> KVLinkVectorStore:
    return KVLinkVectorStore(inner or SimpleVectorStore(), engine)


class TextStore(SimpleVectorStore):
    """A store that lists its nodes, as those of databases do."""

    stores_text: bool = True
    nodes: dict[str, Any] = {}  # noqa: RUF012

    def add(self, nodes: Any, **kwargs: Any) -> list[str]:
        self.nodes |= {node.node_id: node for node in nodes}
        return super().add(nodes, **kwargs)

    def get_nodes(self, node_ids: Any = None, filters: Any = None) -> list[Any]:
        return [node for id_, node in self.nodes.items() if id_ in self.data.embedding_dict]


def test_progress_is_shown_unless_it_is_not_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    engine = lib.engine()
    store(engine).add([node("One fact.", "1")])
    assert "tokens" in capsys.readouterr().err
    KVLinkVectorStore(SimpleVectorStore(), engine, show_progress=False).add([node("Two.", "2")])
    assert capsys.readouterr().err == ""


def test_all_else_is_the_inner_stores(tmp_path: Path) -> None:
    engine, inner = lib.engine(), TextStore()
    made = store(engine, inner)
    assert (made.stores_text, made.is_embedding_query, made.client) == (True, True, None)
    assert made.inner is inner
    assert made.add([node("One.", "1"), node("Two.", "2")]) == ["1", "2"]
    assert kept(engine, "One.", "Two.") == [True, True]
    query = VectorStoreQuery(query_embedding=[1.0, 0.0], similarity_top_k=1)
    assert made.query(query) == inner.query(query) == asyncio.run(made.aquery(query))
    assert [n.node_id for n in made.get_nodes()] == ["1", "2"]
    assert [n.node_id for n in asyncio.run(made.aget_nodes())] == ["1", "2"]
    made.persist(str(tmp_path / "vectors.json"))
    assert (tmp_path / "vectors.json").exists()
    assert made.class_name() == "KVLinkVectorStore"
    assert copy.deepcopy(made).engine is engine
    with pytest.raises(InputError, match="KVLinkVectorStore holds a model"):
        pickle.dumps(made)


@pytest.mark.parametrize("call", ["sync", "async"])
def test_a_document_takes_its_caches_along_but_none_that_others_need(call: str) -> None:
    engine = lib.engine()
    made = store(engine)
    given = [
        node("Shared.", "1", 'a"b'),
        node("Own.", "2", 'a"b'),
        node("Shared.", "3", "b"),
        node("Loose.", "4"),
        node("Near.", "5", 'a"b2'),
    ]
    asyncio.run(made.async_add(given)) if call == "async" else made.add(given)
    engine.index(["Own.", "Foreign."], progress=False)  # somebody else's, in the same store

    def delete(document: str) -> None:
        asyncio.run(made.adelete(document)) if call == "async" else made.delete(document)

    texts = ["Shared.", "Own.", "Loose.", "Near.", "Foreign."]
    delete('a"b')
    assert kept(engine, *texts) == [True, True, True, True, True]
    engine.store.release([d for d, _ in engine.store.references("text-")])
    assert kept(engine, *texts) == [True, False, True, True, False]
    delete("b")
    assert kept(engine, *texts) == [False, False, True, True, False]


@pytest.mark.parametrize("call", ["sync", "async"])
def test_nodes_take_their_caches_along(call: str) -> None:
    engine = lib.engine()
    made = store(engine)
    texts = ["One.", "Two.", "Three.", "Four."]
    made.add([node(text, text, "a", shelf=n) for n, text in enumerate(texts)])

    def run(name: str, *arguments: Any, **options: Any) -> None:
        if call == "async":
            asyncio.run(getattr(made, "a" + name)(*arguments, **options))
        else:
            getattr(made, name)(*arguments, **options)

    run("delete_nodes", ["One.", "unknown"])
    assert kept(engine, *texts) == [False, True, True, True]
    first_shelves = MetadataFilters(filters=[MetadataFilter(key="shelf", value=1)])
    run("delete_nodes", filters=first_shelves)
    assert kept(engine, *texts) == [False, False, True, True]
    run("clear")
    assert kept(engine, *texts) == [False] * 4
    assert made.inner.data.embedding_dict == {}  # type: ignore[attr-defined]


def test_stores_that_cannot_delete_or_list_keep_their_caches() -> None:
    engine = lib.engine()
    index = lib.index(lib.documents(), store=store(engine, lib.vector_store("faiss")))
    assert engine.store.stat().entries == 8
    with pytest.raises(NotImplementedError):
        index.delete_ref_doc("bees")
    with pytest.raises(NotImplementedError):
        index.delete_nodes(["bees"])
    with pytest.raises(InputError, match="FaissVectorStore cannot list its nodes"):
        index.vector_store.clear()
    assert engine.store.stat().entries == 8


def test_a_node_too_long_for_the_model_is_not_added() -> None:
    made = store(lib.engine())
    with pytest.raises(InputError, match="has a context of 4096"):
        made.add([node("Short.", "1"), node("a" * 5000, "2")])
    assert made.inner.data.embedding_dict == {}  # type: ignore[attr-defined]


@pytest.mark.parametrize("call", ["sync", "async"])
def test_a_hundred_documents_of_which_one_changes_and_goes(tmp_path: Path, call: str) -> None:
    folder = lib.CountingFolder(tmp_path / "kv")
    engine = lib.engine(store=folder)
    steps = [SentenceSplitter(), KVLinkTransform(engine)]
    documents = lib.documents([f"topic{n}" for n in range(99)])
    lib.index(documents, *steps, store=store(engine))
    size_of_99 = folder.disk()
    documents.append(Document(text="The last one.", id_="last"))
    index = lib.index(documents, *steps, store=store(engine))  # all anew, with new node ids
    assert len(folder.stored) == 100
    size_of_100 = folder.disk()
    assert size_of_100 > size_of_99

    def refresh(given: list[Document]) -> int:
        before = len(folder.stored)
        if call == "async":
            asyncio.run(index.arefresh_ref_docs(given))
        else:
            index.refresh_ref_docs(given)
        return len(folder.stored) - before

    assert refresh(documents) == 0
    documents[-1] = Document(text="The very last one.", id_="last")
    assert refresh(documents) == 1
    assert folder.disk() > size_of_100  # by five tokens: the old cache is gone
    assert folder.stat().entries == 100

    if call == "async":
        asyncio.run(index.adelete_ref_doc("last", delete_from_docstore=True))
    else:
        index.delete_ref_doc("last", delete_from_docstore=True)
    assert folder.disk() == size_of_99
    assert folder.stat().entries == 99
    assert folder.verify().clean


@pytest.mark.parametrize("call", ["sync", "async"])
def test_upserts_of_a_pipeline(call: str) -> None:
    engine = lib.engine()
    docstore = SimpleDocumentStore()
    pipeline = IngestionPipeline(
        transformations=[SPLITTER, KVLinkTransform(engine), lib.WordEmbedding()],
        docstore=docstore,
        vector_store=store(engine),
        docstore_strategy=DocstoreStrategy.UPSERTS_AND_DELETE,
    )

    def run(*documents: Document) -> int:
        before = len(engine.store.stored)  # type: ignore[attr-defined]
        if call == "async":
            asyncio.run(pipeline.arun(documents=list(documents)))
        else:
            pipeline.run(documents=list(documents))
        return len(engine.store.stored) - before  # type: ignore[attr-defined]

    a, b = (Document(text=f"{t} one. " * 4 + f"{t} two. " * 4, id_=t) for t in ("Ants", "Bees"))
    assert run(a, b) == engine.store.stat().entries > 2
    entries = engine.store.stat().entries
    assert run(a, b) == 0
    other = Document(text="Wasps sting.", id_="Bees")
    assert run(a, other) == 1
    assert engine.store.stat().entries == entries // 2 + 1
    # back again: the ingestion cache skips the transform, and the vector store does its work
    assert run(a, b) == entries // 2
    assert engine.store.stat().entries == entries


def test_windows_computed_at_answer_time_go_with_their_document() -> None:
    engine = lib.engine()
    parser = SentenceWindowNodeParser.from_defaults(window_size=1)
    vectors = store(engine)
    documents = lib.documents(["bees", "salt"])
    index = lib.index(documents, parser, KVLinkTransform(engine), store=vectors)
    made = KVLinkQueryEngine(
        index.as_retriever(similarity_top_k=6),
        engine=engine,
        node_postprocessors=[MetadataReplacementPostProcessor("window")],
    )
    made.query("Bees?")
    windows = engine.store.stat().entries - 6 - 1  # beside sentences and the prompt's beginning
    assert windows >= 4
    index.delete_ref_doc("bees")
    index.delete_ref_doc("salt")
    assert engine.store.references() == []
    assert engine.store.stat().entries == 1


@pytest.mark.slow
def test_a_persisted_index_is_answered_from_by_a_fresh_process(tmp_path: Path) -> None:
    engine = lib.engine(store=lib.CountingFolder(tmp_path / "kv"))
    steps = [SentenceSplitter(), KVLinkTransform(engine)]
    index = lib.index(lib.documents(), *steps, store=store(engine))
    index.storage_context.persist(tmp_path / "index")
    made = index.as_query_engine(
        llm=lib.llm(engine), response_synthesizer=KVLinkSynthesizer(lib.llm(engine))
    )
    here = made.query("Which whales?")
    (tmp_path / "ask.py").write_text(FRESH)
    out = subprocess.run(
        [sys.executable, "ask.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert out.returncode == 0, out.stderr
    there = json.loads(out.stdout.splitlines()[-1])
    assert there["text"] == str(here)
    assert there["nodes"] == [n.node_id for n in here.source_nodes]
    assert (there["report"]["hits"], there["report"]["misses"]) == (2, 0)
    assert there["entries"] == [8 + 1, 8]
    assert StorageContext.from_defaults(persist_dir=str(tmp_path / "index")).docstore


FRESH = """
import json
import tiny_llama_index as lib
from llama_index.core import StorageContext, load_index_from_storage
from llama_index.core.vector_stores import SimpleVectorStore
from llama_index.llms.kvlink import KVLinkSynthesizer, KVLinkVectorStore

engine = lib.engine(store="kv")
vectors = KVLinkVectorStore(SimpleVectorStore.from_persist_dir("index"), engine)
storage = StorageContext.from_defaults(persist_dir="index", vector_store=vectors)
index = load_index_from_storage(storage, embed_model=lib.WordEmbedding())
llm = lib.llm(engine)
made = index.as_query_engine(llm=llm, response_synthesizer=KVLinkSynthesizer(llm))
response = made.query("Which whales?")
entries = [engine.store.stat().entries]
index.delete_ref_doc("whales")
print(json.dumps({
    "text": str(response),
    "nodes": [n.node_id for n in response.source_nodes],
    "report": response.metadata["kvlink"],
    "entries": entries + [engine.store.stat().entries],
}))
"""


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_what_is_found_begins_to_load(is_async: bool) -> None:
    engine, found = lib.engine(), [node("one", "n1"), node("two", "n2")]

    class Finding(SimpleVectorStore):
        def query(self, query: Any, **kwargs: Any) -> VectorStoreQueryResult:
            return VectorStoreQueryResult(nodes=found)

    vector_store = store(engine, Finding())
    ahead: list[str] = []
    engine.prefetch = lambda chunks: ahead.extend(c.text for c in chunks)  # type: ignore[method-assign]
    query = VectorStoreQuery(query_embedding=[1.0, 0.0], similarity_top_k=2)
    result = asyncio.run(vector_store.aquery(query)) if is_async else vector_store.query(query)
    assert result.nodes == found
    assert ahead == ["one", "two"]
