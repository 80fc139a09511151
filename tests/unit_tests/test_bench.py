from __future__ import annotations

import json

import pytest
import tiny

from kvlink_rag import InputError
from kvlink_rag.bench import run_bench, table, write

TEXTS = ["The quick brown fox jumps over the lazy dog. " * 40]


@pytest.fixture(scope="module")
def result():
    return run_bench(tiny.engine(), TEXTS, lengths=(300, 600), repeats=2, progress=False)


def test_every_strategy_is_measured_equally_often(result):
    for each in result.lengths:
        assert {n: len(s.seconds) for n, s in each.series.items()} == dict.fromkeys(
            ("full", "reuse", "recompute", "floor"), 2
        )
    assert [each.tokens for each in result.lengths] == pytest.approx([300, 600], rel=0.1)
    assert result.lengths[0].bytes_read > 0
    assert [row.chunk_tokens for row in result.indexing] == [200, 500]
    for row in result.indexing:
        assert len(row.index.seconds) == len(row.forward.seconds) == 2
        assert f"| {row.chunk_tokens} | {row.index.median:.0f} (" in table(result)


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
