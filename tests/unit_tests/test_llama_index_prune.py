"""Pruning releases what no index needs, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_llama_index as lib
from llama_index.core import Document, SummaryIndex
from llama_index.core.node_parser import SentenceSplitter, SentenceWindowNodeParser
from llama_index.core.postprocessor import MetadataReplacementPostProcessor
from llama_index.core.schema import MetadataMode, NodeWithScore, TextNode
from llama_index.llms.kvlink import KVLinkQueryEngine, KVLinkTransform, KVLinkVectorStore, prune

from kvlink_rag import InputError, KVLinkEngine


def indexed(
    engine: KVLinkEngine, documents: Any = None, kind: str = "simple", **options: Any
) -> Any:
    parser = options.get("parser", SentenceSplitter())
    vectors = lib.vector_store(kind)
    return lib.index(documents or lib.documents(), parser, KVLinkTransform(engine), store=vectors)


def entries(engine: KVLinkEngine) -> int:
    return engine.store.stat().entries


@pytest.mark.parametrize("kind", ["simple", "faiss"])
def test_nothing_that_is_needed_goes(kind: str) -> None:
    engine = lib.engine()
    index = indexed(engine, kind=kind)
    assert prune(engine, index) == 0
    assert entries(engine) == 8


def test_deleted_documents_and_nodes_go() -> None:
    engine = lib.engine()
    index = indexed(engine)
    index.delete_ref_doc("bees")
    assert entries(engine) == 8
    assert prune(engine, index) == 1
    [node] = [n for n in index.docstore.docs.values() if n.ref_doc_id == "salt"]
    index.delete_nodes([node.node_id])
    assert prune(engine, index.vector_store) == 1
    assert entries(engine) == 6
    report = engine.index([node.get_content(metadata_mode=MetadataMode.LLM)], progress=False)
    assert report.misses == 1


def test_what_was_indexed_anew_goes_once_the_old_index_is_gone() -> None:
    engine = lib.engine()
    old = indexed(engine)
    changed = [*lib.documents()[:-1], Document(text="Salt is white.", id_="salt")]
    new = indexed(engine, changed)
    assert entries(engine) == 9
    assert prune(engine, old, new) == 0
    assert prune(engine, new) == 1
    assert prune(engine, new) == 0
    assert (
        KVLinkQueryEngine(new.as_retriever(), engine=engine)
        .query("Salt?")
        .metadata["kvlink"]["misses"]
        == 0
    )


def test_an_update_without_our_vector_store_leaves_the_old_cache_to_prune() -> None:
    engine = lib.engine()
    index = indexed(engine)
    changed = [*lib.documents()[:-1], Document(text="Salt is white.", id_="salt")]
    assert index.refresh_ref_docs(changed) == [False] * 7 + [True]
    assert entries(engine) == 9
    assert prune(engine, index) == 1


def test_a_chunk_of_two_documents_lasts_as_long_as_either() -> None:
    engine = lib.engine()
    index = indexed(engine, [Document(text="Same.", id_="a"), Document(text="Same.", id_="b")])
    assert entries(engine) == 1
    index.delete_ref_doc("a")
    assert prune(engine, index) == 0
    index.delete_ref_doc("b")
    assert prune(engine, index) == 1


def test_windows_of_nodes_that_stay_stay() -> None:
    engine = lib.engine()
    parser = SentenceWindowNodeParser.from_defaults(window_size=1)
    index = indexed(engine, lib.documents(["bees", "salt"]), parser=parser)
    made = KVLinkQueryEngine(
        index.as_retriever(similarity_top_k=6),
        engine=engine,
        node_postprocessors=[MetadataReplacementPostProcessor("window")],
    )
    made.query("Bees?")
    before = entries(engine)
    assert prune(engine, index) == 0
    index.delete_ref_doc("bees")
    assert prune(engine, index) == (before - 1) / 2
    assert made.query("Salt?").metadata["kvlink"]["misses"] == 0


def test_holders_are_indexes_stores_nodes_or_ids() -> None:
    engine = lib.engine()
    index = indexed(engine)
    nodes = list(index.docstore.docs.values())
    assert prune(engine, KVLinkVectorStore(index.vector_store, engine)) == 0
    assert prune(engine, SummaryIndex(nodes)) == 0
    assert prune(engine, nodes[:2], [node.node_id for node in nodes[2:]]) == 0
    assert prune(engine, nodes[:5], (node for node in nodes[5:7])) == 1
    assert prune(engine, [NodeWithScore(node=nodes[0]), NodeWithScore(node=nodes[7])]) == 6
    assert prune(engine, []) == 1
    assert entries(engine) == 0


def test_others_caches_are_left_alone() -> None:
    engine = lib.engine()
    engine.index(["Somebody else's."], progress=False)
    KVLinkTransform(engine)([TextNode(text="Ours.")])
    assert prune(engine, []) == 1
    assert entries(engine) == 1


@pytest.mark.parametrize("holder", ["one-id", TextNode(text="Hm."), 3, None])
def test_what_is_no_holder_is_named(holder: Any) -> None:
    engine = lib.engine()
    indexed(engine)
    with pytest.raises(InputError, match=f"given a {type(holder).__name__}"):
        prune(engine, holder)
    with pytest.raises(InputError, match="every cache"):
        prune(engine)
    with pytest.raises(InputError, match="FaissVectorStore cannot list"):
        prune(engine, lib.vector_store("faiss"))
    assert entries(engine) == 8
