"""What is said before indexing is what the files take."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny

from kvlink_rag import Chunk, InputError
from kvlink_rag.index.cost import coded_bytes, cost_of, to_encode
from kvlink_rag.store import FolderStore, open_store
from kvlink_rag.store.codec import CODECS

CHUNKS = [Chunk(f"Fact {n}: " + "a long sentence about it. " * (8 + 5 * n)) for n in range(4)]


@pytest.mark.parametrize("codec", CODECS)
def test_the_bytes_are_those_of_the_files(codec: str, tmp_path: Path) -> None:
    store = FolderStore(tmp_path, codec)
    engine = tiny.engine(store=store)
    cost = cost_of(engine, CHUNKS)
    report = engine.index(CHUNKS, progress=False)
    assert (cost.caches, cost.tokens) == (report.misses, report.tokens)
    headers = store.stat().nbytes - cost.nbytes
    ids = 8 * (cost.tokens + len(CHUNKS) * len(engine.behind))
    assert ids < headers < ids + 2000 * len(CHUNKS)


def test_a_codec_can_be_named_before_there_is_a_store() -> None:
    engine = tiny.engine()
    raw, int8 = cost_of(engine, CHUNKS), cost_of(engine, CHUNKS, "int8")
    assert raw.nbytes == raw.tokens * engine.architecture.bytes_per_token
    assert int8.tokens == raw.tokens
    assert int8.nbytes < raw.nbytes / 2
    lengths = {n: coded_bytes(engine.architecture, "bf16", n) for n in (1, 7)}
    assert lengths[7] == 7 * lengths[1] == 7 * engine.architecture.bytes_per_token // 2


def test_what_is_stored_and_what_is_alike_costs_nothing() -> None:
    engine = tiny.engine()
    engine.index(CHUNKS[:1], progress=False)
    cost = cost_of(engine, [*CHUNKS[:2], Chunk(CHUNKS[1].text, id="again")])
    assert cost.caches == 1
    assert cost == cost_of(engine, CHUNKS[1:2])
    assert cost_of(engine, CHUNKS[:1]) == cost_of(engine, [])


def test_what_answers_will_store_costs_nothing_now(tmp_path: Path) -> None:
    assert to_encode(tiny.engine(store=open_store(tmp_path, cache_after=1)), CHUNKS) == []


def test_an_empty_chunk_is_refused() -> None:
    with pytest.raises(InputError):
        cost_of(tiny.engine(), [CHUNKS[0], Chunk(" ")])
