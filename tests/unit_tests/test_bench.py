from __future__ import annotations

import json

import pytest
import tiny
import torch
from tiny_adapters import adapter

from kvlink_rag import Chunk, InputError
from kvlink_rag.bench import indexing, run_bench, table, write
from kvlink_rag.bench.decode import _cache_of_transformers
from kvlink_rag.bench.indexing import MIXES
from kvlink_rag.bench.ttft import drop_page_cache

TEXTS = ["The quick brown fox jumps over the lazy dog. " * 40]


@pytest.fixture(scope="module", autouse=True)
def _little_is_indexed():
    """A chunk of the longest mix, instead of five, is enough to see what is counted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(indexing, "TOKENS", 1000)
        yield


@pytest.fixture(scope="module")
def result():
    return run_bench(
        tiny.engine(), TEXTS, adapter=adapter(), lengths=(300, 600), repeats=2, progress=False
    )


WAYS = {
    "full",
    "full, fast attention",
    "recompute",
    "recompute by question",
    "reuse, page cache dropped",
    "reuse",
    "reuse, RAM tier",
    "cache in place",
    "one copy of the bytes",
    "link",
    "link, merged",
}


def test_every_way_is_measured_equally_often(result):
    for each in result.lengths:
        assert {name: len(s.values) for name, s in each.series.items()} == dict.fromkeys(WAYS, 2)
    assert [each.tokens for each in result.lengths] == pytest.approx([300, 600], rel=0.1)
    assert result.lengths[0].bytes_read > 0
    assert [row.chunk_tokens for row in result.indexing] == list(MIXES)
    for row in result.indexing:
        assert len(row.index.values) == len(row.forward.values) == 2
        assert f"| {row.chunk_tokens} | {row.index.median:.0f} (" in table(result)
    assert {name: len(s.values) for name, s in result.decode_s.items()} == {
        "reuse": 2,
        "transformers": 2,
    }


def test_both_ways_of_decoding_go_on_alike():
    engine = tiny.engine()
    chunks = [Chunk(text) for text in ("one fox", "two dogs", "three bees")]
    one, other = (engine.prefill("How many?", chunks) for _ in range(2))
    cache = _cache_of_transformers(other)
    for token in (5, 6, 7):
        ids = torch.tensor([[token]])
        theirs = engine.model(input_ids=ids, past_key_values=cache, use_cache=True).logits[0, -1]
        torch.testing.assert_close(one.run([token]), theirs, atol=1e-4, rtol=0)


def test_dropping_the_page_cache_leaves_the_files(tmp_path):
    engine = tiny.engine(store=tmp_path)
    engine.index(["a fox"], progress=False)
    drop_page_cache(tmp_path)
    assert engine.store.verify().clean
    assert engine.answer("?", ["a fox"], max_new_tokens=1).report.hits == 1


def test_files_hold_what_was_measured(result, tmp_path):
    paths = write(result, tmp_path)
    assert [path.name for path in paths] == ["bench.json", "bench.md", "bench.png"]
    data = json.loads(paths[0].read_text())
    first = data["ttft"][0]["series_s"]["reuse"]
    assert first["min"] <= first["median"] <= first["max"]
    assert data["machine"]["threads"] >= 1
    assert paths[1].read_text() == table(result) + "\n"
    assert paths[2].read_bytes().startswith(b"\x89PNG")


def test_the_engines_own_store_is_not_touched():
    engine = tiny.engine()
    run_bench(engine, TEXTS, lengths=(300,), repeats=1, progress=False)
    assert engine.store.stat().entries == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": (100_000,)}, "100000"),
        ({"lengths": ()}, "lengths"),
        ({"repeats": 0}, "0"),
    ],
)
def test_impossible_settings_are_named(options, message):
    with pytest.raises(InputError, match=message):
        run_bench(tiny.engine(), TEXTS, progress=False, **options)


def test_too_little_text():
    with pytest.raises(InputError, match="100 tokens"):
        run_bench(tiny.engine(), ["short"], lengths=(300,), progress=False)
