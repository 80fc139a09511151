"""Which codec is chosen, and what `auto` means for a folder."""

from __future__ import annotations

import pytest
import tiny
import torch

from kvlink_rag import Chunk, InputError, KVLinkEngine
from kvlink_rag.common.corpus import corpus_files, paragraphs
from kvlink_rag.engine.fidelity import compare
from kvlink_rag.store import FolderStore, MemoryStore, open_store
from kvlink_rag.store.codec import coded
from kvlink_rag.tuning.codec import (
    BUILT_IN,
    CHUNKS_PER_CASE,
    built_in_cases,
    choose_codec,
    resolve_codec,
)

CHUNKS = ["The tower is 330 m tall, and was built in 1889.", "Bees dance to tell of flowers."]
CASES = [("How tall is it?", CHUNKS), ("What do bees do?", CHUNKS[::-1])]


class Coded(MemoryStore):
    """Gives back what a codec would; written apart from what is tested."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def get(self, key, within_s=None):
        record = super().get(key)
        return record and coded(record, self.name)


def divergence(engine: KVLinkEngine, codec: str) -> float:
    """KL over all tokens of full prefill's answers, each way read token by token."""
    found = []
    for question, chunks in CASES:
        tokens = engine.answer(question, chunks, strategy="full", max_new_tokens=16).token_ids
        logits = []
        for store in (MemoryStore(), Coded(codec)):
            twin = engine.with_store(store)
            twin.prefill(question, chunks)
            prefill = twin.prefill(question, chunks, max_new_tokens=16)  # now from the store
            logits.append([prefill.logits, *(prefill.run([token]) for token in tokens[:-1])])
        found += [compare(raw, other).kl_nats for raw, other in zip(*logits, strict=True)]
    return sum(found) / len(found)


@pytest.fixture(scope="module")
def engine() -> KVLinkEngine:
    return tiny.engine()


@pytest.fixture(scope="module")
def choice(engine):
    return choose_codec(engine, CASES, bound=0.0, progress=False)


def test_what_is_measured_is_the_divergence_from_raw_caches(engine, choice):
    measured = {each.codec: each for each in choice.measured}
    assert set(measured) == {"raw", "bf16", "fp8", "int8", "int4"}
    for codec, each in measured.items():
        expected = 0.0 if codec == "raw" else divergence(engine, codec)
        assert each.kl_nats == pytest.approx(expected, rel=1e-3)
        assert (each.kl_nats > 0) == (codec != "raw")
    assert choice.refused == {}


def test_bytes_are_those_of_files(engine, choice, tmp_path):
    for each in choice.measured:
        twin = engine.with_store(FolderStore(tmp_path / each.codec, each.codec))
        twin.index(CHUNKS, progress=False)
        twin.prefill("?", CHUNKS)  # stores the prefix
        stat = twin.store.stat()
        files = list((tmp_path / each.codec).rglob("*.safetensors"))
        assert stat.nbytes == sum(file.stat().st_size for file in files)
        assert each.bytes_per_token == pytest.approx(stat.nbytes / stat.tokens)
    sizes = [each.bytes_per_token for each in choice.measured]
    assert sizes == sorted(sizes)


def test_the_smallest_within_the_bound(engine, choice):
    by_name = {each.codec: each.kl_nats for each in choice.measured}
    assert choice.codec == "raw"  # nothing else is within 0 nats
    for bound in sorted(by_name.values()):
        at = choose_codec(engine, CASES, bound=bound * (1 + 1e-9), progress=False)
        within = [e.codec for e in choice.measured if e.kl_nats <= bound]
        assert at.codec == within[0]
    assert choose_codec(engine, CASES, bound=1e9, progress=False).codec == "int4"


def test_rows(choice):
    heading, *rows = choice.rows()
    assert heading[0] == "codec"
    assert [row[0] for row in rows] == [each.codec for each in choice.measured]
    assert [row[0] for row in rows if row[-1]] == ["raw"]
    assert all(len(row) == len(heading) for row in rows)
    assert next(row for row in rows if row[0] == "raw")[2:4] == ("100.0%", "0.0000")


def test_the_engine_is_left_alone(tmp_path):
    engine = tiny.engine(store=tmp_path / "mine")
    told = []
    engine.observers.append(told.append)
    choose_codec(engine, CASES, progress=False)
    assert engine.store.stat().entries == 0
    assert told == []
    assert engine.answer("?", CHUNKS, max_new_tokens=1).report.misses == 2
    assert len(told) == 1


def test_codecs_that_cannot_hold_the_caches_are_refused():
    torch.manual_seed(0)
    config = tiny.CONFIGS["llama"]()
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 2, 2, 32
    model = tiny.hf.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # values beyond what float16 scales can say
        model.model.layers[0].self_attn.v_proj.weight.mul_(1e9)
    engine = KVLinkEngine.from_pretrained((model, tiny.tokenizer()))
    choice = choose_codec(engine, CASES, bound=1e9, progress=False)
    assert set(choice.refused) == {"fp8", "int8", "int4"}
    assert all("cannot hold" in reason for reason in choice.refused.values())
    assert {each.codec for each in choice.measured} == {"raw", "bf16"}
    assert choice.codec == "bf16"


def test_bf16_is_raw_for_a_bfloat16_model():
    model = tiny.hf.AutoModelForCausalLM.from_config(tiny.CONFIGS["llama"]()).eval().bfloat16()
    engine = KVLinkEngine.from_pretrained((model, tiny.tokenizer()))
    choice = choose_codec(engine, CASES, bound=0.0, progress=False)
    assert {each.codec for each in choice.measured} == {"raw", "fp8", "int8", "int4"}
    assert choice.codec == "raw"


@pytest.mark.parametrize(
    ("cases", "bound", "message"),
    [
        ([], 0.01, "no cases"),
        (CASES, -1.0, "bound.*-1.0"),
        (CASES, float("nan"), "bound.*nan"),
        ([("?", [" "])], 0.01, "no text"),
        ([("?", ["x" * 5000])], 0.01, "context of 4096"),
    ],
)
def test_bad_input(engine, cases, bound, message):
    with pytest.raises(InputError, match=message):
        choose_codec(engine, cases, bound=bound, progress=False)


def test_built_in_cases():
    texts = [text for file in corpus_files() for text in paragraphs(file)]
    for _, words in BUILT_IN:
        assert sum(words in text for text in texts) == 1, words
    cases = built_in_cases()
    assert len(cases) == len(BUILT_IN) >= 15
    places = set()
    for (question, chunks), (expected, words) in zip(cases, BUILT_IN, strict=True):
        assert question == expected
        assert len({chunk.title for chunk in chunks}) == CHUNKS_PER_CASE
        (place,) = [place for place, chunk in enumerate(chunks) if words in chunk.text]
        places.add(place)
    assert places == set(range(CHUNKS_PER_CASE))


class TestAuto:
    @pytest.fixture
    def counted(self, monkeypatch):
        """How often a codec was chosen; by few cases, within any bound."""
        calls = []

        def choose(engine, cases=None):
            calls.append(cases)
            return choose_codec(engine, CASES, bound=1e9, progress=False)

        monkeypatch.setattr("kvlink_rag.tuning.codec.choose_codec", choose)
        return calls

    def test_a_new_folder_is_made_with_the_codec_chosen(self, tmp_path, counted):
        engine = tuned(tmp_path / "new")
        assert engine.store.codec == FolderStore(tmp_path / "new").codec == "int4"
        engine.index(CHUNKS, progress=False)
        again = tuned(tmp_path / "new")
        assert again.store.codec == "int4"
        assert again.answer("?", CHUNKS, max_new_tokens=1).report.hits == 2
        assert len(counted) == 1

    def test_chunks_that_are_known_are_asked_about(self, tmp_path, counted):
        engine, chunks = tiny.engine(), [Chunk(text) for text in CHUNKS]
        resolve_codec("auto", tmp_path / "one", engine, chunks)
        ((first, its), *_) = counted[0]
        assert first
        assert set(its) == set(chunks)
        resolve_codec("auto", tmp_path / "other", engine)
        assert counted[1] is None

    def test_twins(self, tmp_path, counted):
        engine = tiny.engine()
        twin = engine.with_store(tuned(tmp_path / "new").store)
        assert (twin.store.codec, engine.store.codec) == ("int4", "raw")
        other = engine.with_store(open_store(tmp_path / "other", codec="fp8"))
        assert other.store.codec == "fp8"
        assert len(counted) == 1

    @pytest.mark.parametrize("codec", ["raw", "int8"])
    def test_a_folder_keeps_its_codec(self, tmp_path, counted, codec):
        FolderStore(tmp_path, codec).close()
        assert tuned(tmp_path).store.codec == codec
        (tmp_path / "catalog.sqlite").unlink()
        assert resolve_codec("auto", str(tmp_path), tiny.engine()) is None
        assert counted == []

    def test_what_is_no_folder_keeps_its_codec(self, counted):
        engine = tiny.engine()
        assert resolve_codec("auto", engine.store, engine) is None
        assert resolve_codec("auto", None, engine) is None
        assert counted == []

    def test_names_stay_and_urls_are_refused(self, tmp_path, counted):
        engine = tiny.engine()
        assert resolve_codec("fp8", tmp_path / "new", engine) == "fp8"
        assert resolve_codec(None, tmp_path / "new", engine) is None
        with pytest.raises(InputError, match="share a URL"):
            resolve_codec("auto", "s3://bucket/folder", engine)
        with pytest.raises(InputError, match="codec 'int5'"):
            tiny.engine(store=tmp_path / "new", codec="int5")
        assert counted == []


def tuned(folder):
    """An engine whose new folder has the codec that fits."""
    engine = tiny.engine()
    return engine.with_store(open_store(folder, codec=resolve_codec("auto", folder, engine)))


@pytest.mark.model
@pytest.mark.slow
def test_the_default_model(default_model_folder):
    engine = KVLinkEngine.from_pretrained(default_model_folder, adapter="smollm2-135m-link5")
    choice = choose_codec(engine, progress=False)
    assert choice.codec == "int8"
    found = {each.codec: each.kl_nats for each in choice.measured}
    assert 0 == found["raw"] < found["int8"] < 0.01 < found["int4"] < 0.5
