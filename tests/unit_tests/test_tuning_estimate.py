"""What storing chunks would cost and save: counts and bytes hold, times add up."""

from __future__ import annotations

import math
import random

import pytest
import tiny
import torch

from kvlink_rag import Chunk, InputError, KVLinkEngine
from kvlink_rag.store import FolderStore
from kvlink_rag.tuning.estimate import (
    QUESTION,
    SAMPLE,
    CodecEstimate,
    Estimate,
    _Measured,
    _of_codec,
    _sample,
    estimate,
)

RNG = random.Random(0)
TEXTS = [
    " ".join(RNG.choices(["bees", "dance", "to", "tell", "where", "flowers"], k=10 + 3 * n))
    for n in range(20)
]


@pytest.fixture(scope="module")
def found() -> Estimate:
    return estimate(tiny.engine(), [*TEXTS, TEXTS[0], Chunk(TEXTS[1], id="b")], progress=False)


def test_counts(found):
    engine = tiny.engine()
    assert (found.chunks, found.distinct) == (22, 20)
    assert found.tokens == sum(len(engine.layout.chunk(Chunk(text))) for text in TEXTS)
    assert found.refused == {}


def test_bytes_are_those_that_indexing_then_writes(found, tmp_path):
    assert {each.codec for each in found.codecs} == {"raw", "bf16", "fp8", "int8", "int4"}
    sizes = [each.nbytes for each in found.codecs]
    assert sizes == sorted(sizes)
    for each in found.codecs:
        engine = tiny.engine(store=tmp_path / each.codec, codec=each.codec)
        engine.index(TEXTS, progress=False)
        files = (tmp_path / each.codec).rglob("*.safetensors")
        written = sum(file.stat().st_size for file in files)
        assert each.nbytes == pytest.approx(written, rel=0.02)


def test_times_are_measured_and_fit_each_other(found):
    for each in found.codecs:
        assert each.index_s > 0
        assert each.load_s >= 0
        assert each.saved_s == pytest.approx(found.compute_s - each.load_s)
        if each.saved_s <= 0:
            assert each.retrievals is None
        else:
            cost = each.index_s / found.distinct
            assert each.retrievals == math.ceil(cost / each.saved_s)


def test_by_hand():
    measured = _Measured(
        encode=0.003,
        compute=0.004,
        write={"raw": 0.001, "int4": 0.0005, "fp8": 0.001},
        load={"raw": 0.001, "int4": 0.004, "fp8": 0.0035},
        nbytes={"raw": 1000.5, "int4": 300.0, "fp8": 500.0},
    )
    # 0.004 s a token to index, 0.003 saved by each retrieval: paid for by the second
    raw = _of_codec("raw", measured, [50, 150] * 10, 2000)
    assert (raw.codec, raw.nbytes, raw.retrievals) == ("raw", 2_001_000, 2)
    assert (raw.index_s, raw.load_s, raw.saved_s) == pytest.approx((8.0, 0.1, 0.3))
    assert _of_codec("fp8", measured, [2000], 2000).retrievals == 8
    assert _of_codec("fp8", measured, [2000], 3000).retrievals == 11  # padding is encoded, too
    never = _of_codec("int4", measured, [2000], 2000)
    assert (never.saved_s, never.retrievals) == (0.0, None)


def test_rows():
    codecs = (
        CodecEstimate("int8", 1_234_567_890, 7300.0, 0.0021, 0.25, 1),
        CodecEstimate("raw", 12_345_678_900, 90.0, 1.5, -0.5, None),
        CodecEstimate("bf16", 12_345_678_900, 30.0, 1.0, 0.1, 1200),
    )
    heading, *rows = Estimate(1, 1, 1, 1.0, codecs, {}).rows()
    assert all(len(row) == len(heading) for row in rows)
    assert rows[0] == ("int8", "1.23", "2.0 h", "2.1 ms", "250 ms", "1 retrieval")
    assert rows[1][2:4] == ("1.5 min", "1.5 s")
    assert rows[1][4:] == ("nothing", "never: loading takes as long as computing")
    assert rows[2][5] == "1,200 retrievals"


def test_nothing_is_kept_or_told(tmp_path):
    engine = tiny.engine(store=tmp_path / "mine")
    told = []
    engine.observers.append(told.append)
    (tmp_path / "disk").mkdir()
    seen = []
    make = FolderStore.put

    class Spy:
        def put(self, record, documents=()):
            seen.append(self.path)
            return make(self, record, documents)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FolderStore, "put", Spy.put)
        estimate(engine, TEXTS[:2], folder=tmp_path / "disk", progress=False)
    assert {path.parents[1] for path in seen} == {tmp_path / "disk"}
    assert list((tmp_path / "disk").iterdir()) == []
    assert engine.store.stat().entries == 0
    assert told == []


def test_the_sample_is_typical_and_fits_the_context():
    engine = tiny.engine()

    def sampled(words):
        distinct = {
            tuple(engine.layout.chunk(chunk)): chunk for chunk in (Chunk("x" * n) for n in words)
        }
        return [len(chunk.text) for chunk in _sample(engine, distinct)]

    assert sampled(range(100, 900)) == [200, 400, 600, 800]
    assert sampled([7]) == [7]
    assert sampled([7, 9]) == [7, 9]
    # four of these do not fit in 4,096 tokens
    assert sampled([1800, 1900, 2000, 2100, 2200]) == [1900, 2100]
    assert sampled([2800, 2900, 3000]) == [2900]
    assert len(sampled([10] * 9 + list(range(20, 29)))) == SAMPLE


def test_codecs_that_cannot_hold_the_caches():
    torch.manual_seed(0)
    model = tiny.hf.AutoModelForCausalLM.from_config(tiny.CONFIGS["llama"]()).eval()
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.mul_(1e9)
    engine = KVLinkEngine.from_pretrained((model, tiny.tokenizer()))
    found = estimate(engine, TEXTS[:1], progress=False)
    assert {each.codec for each in found.codecs} == {"raw", "bf16"}
    assert set(found.refused) == {"fp8", "int8", "int4"}


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ([], "no chunks"),
        ("one text", r"pass \[text\]"),
        ([" "], "no text"),
        (["x" * 5000], "chunk.*context of 4096"),
        (["x" * (4096 - len(QUESTION))], "context of 4096"),
    ],
)
def test_bad_chunks(chunks, message):
    with pytest.raises(InputError, match=message):
        estimate(tiny.engine(), chunks, progress=False)


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(InputError, match="is no folder"):
        estimate(tiny.engine(), TEXTS[:1], folder=tmp_path / "none", progress=False)
