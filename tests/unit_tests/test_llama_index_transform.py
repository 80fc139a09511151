"""The pipeline's step that stores caches leaves the nodes alone and reads nothing twice."""

from __future__ import annotations

import asyncio
import copy
import pickle
from typing import Any

import pytest
import tiny_llama_index as lib
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.ingestion.pipeline import get_transformation_hash
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.schema import MetadataMode, NodeWithScore, TextNode
from llama_index.llms.kvlink import KVLinkSynthesizer, KVLinkTransform

from kvlink_rag import InputError

SPLITTER = SentenceSplitter(chunk_size=16, chunk_overlap=0)


def nodes() -> list[Any]:
    made = SPLITTER(lib.documents(["bees", "salt"]))
    assert len(made) == 6
    return made


def test_nodes_come_back_as_they_were() -> None:
    given = nodes()
    before = [node.model_dump_json() for node in given]
    hashes = [node.hash for node in given]
    assert KVLinkTransform(engine=lib.engine())(given) is given
    assert [node.model_dump_json() for node in given] == before
    assert [node.hash for node in given] == hashes


@pytest.mark.parametrize("call", ["sync", "async"])
def test_a_cache_is_of_what_the_model_is_shown_and_the_nodes_own(call: str) -> None:
    engine = lib.engine()
    transform = KVLinkTransform(engine)
    given = nodes()
    for node in given[:2]:
        node.metadata["secret"] = "unseen"
        node.excluded_llm_metadata_keys = ["secret"]
    asyncio.run(transform.acall(given)) if call == "async" else transform(given)
    texts = [node.get_content(metadata_mode=MetadataMode.LLM) for node in given]
    assert texts[0].startswith("shelf: 0\n\nAll about bees.")
    expected = {
        (f'llama_index:["{node.ref_doc_id}", "{node.node_id}"]', key)
        for node, key in zip(given, engine.keys(texts), strict=True)
    }
    assert set(engine.store.references()) == expected
    assert sorted(engine.store.stored) == sorted(engine.keys(texts))  # type: ignore[attr-defined]


def test_what_is_stored_is_not_read_again() -> None:
    engine = lib.engine()
    transform = KVLinkTransform(engine)
    transform(nodes())
    stored = list(engine.store.stored)  # type: ignore[attr-defined]
    transform(nodes())  # new ids, the same texts
    assert engine.store.stored == stored  # type: ignore[attr-defined]
    assert engine.store.stat().documents == 12


def test_metadata_that_is_not_shown_costs_nothing_and_other_metadata_a_cache() -> None:
    engine = lib.engine()
    transform = KVLinkTransform(engine)
    node = TextNode(text="Bees hum.", excluded_llm_metadata_keys=["page"])
    for metadata, stored in [({}, 1), ({"page": 1}, 1), ({"page": 1, "shelf": 2}, 2)]:
        node.metadata = metadata
        transform([node])
        assert engine.store.stat().entries == stored


def test_nodes_without_text_are_left_out_and_long_ones_named() -> None:
    engine = lib.engine()
    given = [TextNode(text=" \n"), TextNode(text="")]
    assert KVLinkTransform(engine)(given) is given
    assert engine.store.stat().entries == 0
    with pytest.raises(InputError, match=r'chunk .*"too-long".* has a context of 4096'):
        KVLinkTransform(engine)([TextNode(text="a" * 5000, id_="too-long")])


def test_progress_is_shown_unless_it_is_not_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    engine = lib.engine()
    KVLinkTransform(engine)([TextNode(text="One fact.")])
    assert "tokens" in capsys.readouterr().err
    KVLinkTransform(engine, show_progress=False)([TextNode(text="Another fact.")])
    assert capsys.readouterr().err == ""


def test_an_ingestion_cache_tells_models_apart_and_nothing_else() -> None:
    engine = lib.engine()
    given = nodes()
    hashes = {
        get_transformation_hash(given, transform)
        for transform in (
            KVLinkTransform(engine),
            KVLinkTransform(engine, show_progress=False),
            KVLinkTransform(engine.with_store(None)),
            copy.deepcopy(KVLinkTransform(engine)),
        )
    }
    assert len(hashes) == 1
    for options in ({"name": "qwen2"}, {"encode_behind": "alone"}):
        other = KVLinkTransform(lib.engine(**options))
        assert get_transformation_hash(given, other) not in hashes
    assert KVLinkTransform(engine).to_dict().keys() == {"caches", "class_name"}


def test_what_an_ingestion_cache_skipped_is_stored_once_by_the_first_answer() -> None:
    engine = lib.engine()
    pipeline = IngestionPipeline(transformations=[SPLITTER, KVLinkTransform(engine)])
    first = pipeline.run(documents=lib.documents(["bees", "salt"]))
    assert engine.store.stat().entries == 6
    engine.store.release([document for document, _ in engine.store.references()])
    engine.store.stored.clear()  # type: ignore[attr-defined]

    again = pipeline.run(documents=lib.documents(["bees", "salt"]))
    assert [node.node_id for node in again] == [node.node_id for node in first]
    assert engine.store.stat().entries == 0

    synthesizer = KVLinkSynthesizer(lib.llm(engine))
    found = [NodeWithScore(node=node) for node in again[:3]]
    reports = [synthesizer.synthesize("Hm?", found).metadata["kvlink"] for _ in range(2)]
    assert [(report["hits"], report["misses"]) for report in reports] == [(0, 3), (3, 0)]
    keys = engine.keys([node.get_content(metadata_mode=MetadataMode.LLM) for node in again[:3]])
    prefix = 1  # the prompt's beginning is kept as well
    assert len(engine.store.stored) == 3 + prefix  # type: ignore[attr-defined]
    assert set(engine.store.references()) == {
        (f'llama_index:["{node.ref_doc_id}", "{node.node_id}"]', key)
        for node, key in zip(again[:3], keys, strict=True)
    }


def test_copies_share_the_engine() -> None:
    engine = lib.engine()
    for twin in (copy.deepcopy(KVLinkTransform(engine)), KVLinkTransform(engine).model_copy()):
        assert twin.engine is engine


def test_it_does_not_go_to_other_processes() -> None:
    transform = KVLinkTransform(lib.engine())
    with pytest.raises(InputError, match=r"KVLinkTransform holds a model.*num_workers=None"):
        pickle.dumps([transform])
    pipeline = IngestionPipeline(transformations=[SPLITTER, transform], disable_cache=True)
    with pytest.raises(InputError, match="num_workers=None"):
        pipeline.run(documents=lib.documents(), num_workers=2)
    with pytest.raises(InputError, match="num_workers=None"):
        asyncio.run(pipeline.arun(documents=lib.documents(), num_workers=2))
    assert transform.engine.store.stat().entries == 0
