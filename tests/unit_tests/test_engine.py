from __future__ import annotations

import asyncio
import copy
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
import tiny
import torch

from kvlink_rag import (
    AdapterError,
    AdapterRequiredError,
    Answer,
    Chunk,
    InputError,
    KVLinkEngine,
    KVLinkWarning,
    StoreError,
)
from kvlink_rag.common.once import say_once_that_memory_ends
from kvlink_rag.store import FolderStore, MemoryStore

CHUNKS = [Chunk(f"Fact {i} is {i * i}.", id=f"id-{i}", title="Squares") for i in range(5)]
QUESTION = "What is fact 3?"


@pytest.fixture
def engine() -> KVLinkEngine:
    return tiny.engine()


def forwards(engine: KVLinkEngine):
    """A list that grows by the number of tokens of each forward pass."""
    seen: list[int] = []
    hook = engine.model.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0].shape[1]), with_kwargs=True
    )
    return seen, hook


class TestIndex:
    def test_only_misses_are_encoded(self, engine):
        first = engine.index(CHUNKS, progress=False)
        assert (first.chunks, first.hits, first.misses) == (5, 0, 5)
        assert first.tokens == sum(len(engine.layout.chunk(chunk)) for chunk in CHUNKS)
        assert first.nbytes == first.tokens * engine.architecture.bytes_per_token
        seen, hook = forwards(engine)
        again = engine.index([*CHUNKS, "new"], progress=False)
        hook.remove()
        assert (again.hits, again.misses) == (5, 1)
        assert max(seen) < first.tokens

    def test_the_same_text_twice_is_encoded_once_and_referred_to_twice(self, engine):
        engine.index([Chunk("same", id="a"), Chunk("same", id="b")], progress=False)
        assert engine.store.stat().entries == 1
        assert engine.store.release(["a"]) == 0
        assert engine.store.release(["b"]) == 1

    def test_metadata_costs_nothing_and_text_is_a_miss(self, engine):
        engine.index([Chunk("text", id="a", metadata={"page": 1})], progress=False)
        report = engine.index([Chunk("text", id="a", metadata={"page": 2})], progress=False)
        assert report.misses == 0
        assert engine.index([Chunk("text!", id="a")], progress=False).misses == 1

    def test_nothing_to_index(self, engine):
        assert engine.index([], progress=False).chunks == 0

    def test_a_failing_store_is_an_error_here(self, engine, monkeypatch):
        def put(record, documents=()):
            raise StoreError("no space left")

        monkeypatch.setattr(engine.store, "put", put)
        with pytest.raises(StoreError, match="no space"):
            engine.index(CHUNKS, progress=False)

    def test_a_chunk_longer_than_the_context_is_named(self, engine):
        with pytest.raises(InputError, match=r"chunk 'big'.*4096"):
            engine.index([Chunk("fine"), Chunk("x" * 5000, id="big")], progress=False)
        assert engine.store.stat().entries == 0

    @pytest.mark.parametrize("bad", ["", "  \n"])
    def test_empty_chunks_are_named(self, engine, bad):
        with pytest.raises(InputError, match="chunk 1"):
            engine.index(["fine", bad], progress=False)

    def test_a_single_text_instead_of_a_list(self, engine):
        with pytest.raises(InputError, match="list"):
            engine.index("text")


class TestAnswer:
    def test_hits_misses_and_tokens(self, engine):
        engine.index(CHUNKS[:3], progress=False)
        first = engine.answer(QUESTION, CHUNKS, max_new_tokens=3).report
        assert (first.strategy, first.hits, first.misses) == ("reuse", 3, 2)
        lengths = [len(engine.layout.chunk(chunk)) for chunk in CHUNKS]
        assert first.reused_tokens == sum(lengths[:3])
        prefix, question = len(engine.layout.prefix()), len(engine.layout.question(QUESTION))
        # two missing chunks, the prefix, the question; indexing had computed what is before chunks
        assert first.computed_tokens == sum(lengths[3:]) + prefix + question
        second = engine.answer(QUESTION, CHUNKS[::-1], max_new_tokens=3).report
        assert (second.hits, second.misses) == (5, 0)
        assert second.computed_tokens == len(engine.layout.question(QUESTION))
        assert second.reused_tokens == sum(lengths) + len(engine.layout.prefix())
        assert second.context_tokens == second.reused_tokens + second.computed_tokens
        assert second.bytes_read == second.reused_tokens * engine.architecture.bytes_per_token

    def test_what_chunks_are_encoded_behind_counts_when_it_runs(self, engine):
        """It is computed once an engine: later answers do not report it."""
        engine.index(CHUNKS[:1], progress=False)
        engine.answer(QUESTION, CHUNKS[:1], max_new_tokens=1)  # the prefix is kept now
        seen, hook = forwards(engine)
        report = engine.answer(QUESTION, CHUNKS[:2], max_new_tokens=1).report
        hook.remove()
        assert report.misses == 1
        assert engine.behind
        assert report.computed_tokens == sum(seen)

    def test_only_the_question_runs_through_the_model(self, engine):
        engine.answer(QUESTION, CHUNKS, max_new_tokens=1)
        seen, hook = forwards(engine)
        engine.answer(QUESTION, CHUNKS, max_new_tokens=3)
        hook.remove()
        assert seen[0] == len(engine.layout.question(QUESTION))
        assert set(seen[1:]) <= {1}

    def test_full_touches_no_cache(self, engine):
        report = engine.answer(QUESTION, CHUNKS, strategy="full", max_new_tokens=2).report
        assert (report.hits, report.misses, report.reused_tokens, report.bytes_read) == (0,) * 4
        assert report.computed_tokens == report.context_tokens
        assert engine.store.stat().entries == 0

    @pytest.mark.parametrize("strategy", ["full", "reuse", "recompute"])
    def test_the_parts_of_ttft_add_up(self, engine, strategy):
        report = engine.answer(QUESTION, CHUNKS, strategy=strategy, max_new_tokens=4).report
        parts = ("tokenize", "load", "encode", "link", "forward", "sample")
        total = sum(getattr(report, f"{part}_s") for part in parts)
        assert total == pytest.approx(report.ttft_s, abs=1e-9)
        assert report.total_s >= report.ttft_s

    def test_misses_are_computed_as_indexing_computes_them(self, engine):
        missed = engine.prefill(QUESTION, CHUNKS)
        indexed = tiny.engine()
        indexed.index(CHUNKS, progress=False)
        hit = indexed.prefill(QUESTION, CHUNKS)
        torch.testing.assert_close(missed.logits, hit.logits, atol=1e-4, rtol=0)

    def test_misses_refer_to_their_chunk_and_are_released_with_it(self, engine):
        engine.answer(QUESTION, CHUNKS, max_new_tokens=1)
        before = engine.store.stat().entries
        assert engine.store.release([CHUNKS[0].id]) == 1
        assert engine.store.stat().entries == before - 1

    def test_an_answer_survives_a_store_that_cannot_write(self, engine, monkeypatch):
        expected = engine.answer(QUESTION, CHUNKS, max_new_tokens=4).token_ids
        twin = engine.with_store(None)

        def put(record, documents=()):
            raise StoreError("no space left")

        monkeypatch.setattr(twin.store, "put", put)
        with pytest.warns(KVLinkWarning, match="no space left"):
            assert twin.answer(QUESTION, CHUNKS, max_new_tokens=4).token_ids == expected

    def test_no_chunks_at_all(self, engine):
        prefill = engine.prefill(QUESTION, [])
        assert [segment.kind for segment in prefill.segments] == ["prefix", "question"]
        full = engine.prefill(QUESTION, [], strategy="full")
        torch.testing.assert_close(prefill.logits, full.logits, atol=1e-4, rtol=0)

    def test_the_system_prompt_leaves_chunk_caches_usable(self, engine):
        engine.index(CHUNKS, progress=False)
        first = engine.answer(QUESTION, CHUNKS, system="Be terse.", max_new_tokens=2)
        assert (first.report.hits, first.report.misses) == (5, 0)
        default = engine.prefill(QUESTION, CHUNKS)
        changed = engine.prefill(QUESTION, CHUNKS, system="Be terse.")
        assert default.token_ids != changed.token_ids

    def test_segments_cover_the_prompt(self, engine):
        prefill = engine.prefill(QUESTION, CHUNKS)
        assert prefill.positions == list(range(len(prefill.token_ids)))
        edges = [(segment.start, segment.stop) for segment in prefill.segments]
        assert edges[0][0] == 0
        assert edges[-1][1] == len(prefill.token_ids)
        assert all(a[1] == b[0] for a, b in pairwise(edges))
        assert [segment.slot for segment in prefill.segments] == [None, 0, 1, 2, 3, 4, None]
        assert {segment.behind for segment in prefill.segments[1:-1]} == {engine.behind}
        embedded = prefill.embed(prefill.token_ids[:3])
        weight = engine.model.get_input_embeddings().weight
        assert torch.equal(embedded, weight[prefill.token_ids[:3]])

    def test_too_long_a_prompt_is_named(self, engine):
        with pytest.raises(InputError, match=r"prompt.*4096"):
            engine.answer(QUESTION, ["x" * 3000, "y" * 3000])

    def test_seed_temperature_and_stop(self, engine):
        hot = {"temperature": 5.0, "max_new_tokens": 12}
        one = engine.answer(QUESTION, CHUNKS, seed=1, **hot)
        assert one.token_ids == engine.answer(QUESTION, CHUNKS, seed=1, **hot).token_ids
        assert one.token_ids != engine.answer(QUESTION, CHUNKS, seed=2, **hot).token_ids
        greedy = engine.answer(QUESTION, CHUNKS, max_new_tokens=12).text
        stop = greedy[len(greedy) // 2]
        assert (
            engine.answer(QUESTION, CHUNKS, max_new_tokens=12, stop=stop).text
            == (greedy[: greedy.index(stop)])
        )

    def test_an_end_token_ends_the_answer(self, engine):
        tokens = engine.answer(QUESTION, CHUNKS, max_new_tokens=12).token_ids
        engine.stop_ids = frozenset([tokens[4]])
        ended = engine.answer(QUESTION, CHUNKS, max_new_tokens=12)
        assert ended.token_ids == tokens[: tokens.index(tokens[4]) + 1]
        assert ended.report.new_tokens == len(ended.token_ids)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"strategy": "fast"}, "'fast'"),
            ({"recompute": -1}, "-1"),
            ({"max_new_tokens": 0}, "0"),
            ({"max_tokens": 5}, "max_tokens.*max_new_tokens"),
        ],
    )
    def test_bad_options_are_named(self, engine, options, message):
        with pytest.raises(InputError, match=message):
            engine.answer(QUESTION, CHUNKS, **options)

    def test_link_says_what_it_needs(self, engine):
        with pytest.raises(AdapterRequiredError, match="adapter with trained link tokens"):
            engine.answer(QUESTION, CHUNKS, strategy="link")
        with pytest.raises(AdapterRequiredError, match="link"):
            tiny.engine(strategy="link")
        with pytest.raises(AdapterError, match="'some-adapter'"):
            tiny.engine(adapter="some-adapter")


class TestStream:
    def test_pieces_are_the_answer(self, engine):
        stream = engine.stream(QUESTION, CHUNKS, max_new_tokens=12)
        pieces = list(stream)
        answer = engine.answer(QUESTION, CHUNKS, max_new_tokens=12)
        assert "".join(pieces) == answer.text == stream.text
        assert stream.token_ids == answer.token_ids
        assert stream.report.new_tokens == 12

    def test_bad_arguments_are_told_before_the_first_piece(self, engine):
        with pytest.raises(InputError):
            engine.stream("", CHUNKS)

    def test_what_was_missing_is_stored_even_when_the_reader_leaves(self, engine):
        stream = engine.stream(QUESTION, CHUNKS, max_new_tokens=12)
        next(stream)
        del stream
        assert engine.index(CHUNKS, progress=False).misses == 0

    def test_async_twins(self, engine):
        async def run() -> tuple[Answer, str, int, torch.Tensor]:
            report = await engine.aindex(CHUNKS, progress=False)
            answer = await engine.aanswer(QUESTION, CHUNKS, max_new_tokens=8)
            pieces = [p async for p in engine.astream(QUESTION, CHUNKS, max_new_tokens=8)]
            prefill = await engine.aprefill(QUESTION, CHUNKS)
            return answer, "".join(pieces), report.misses, prefill.logits

        answer, text, misses, logits = asyncio.run(run())
        assert answer.text == text
        assert misses == 5
        assert int(logits.argmax()) == answer.token_ids[0]

    def test_many_threads_get_their_own_answers(self, engine):
        engine.index(CHUNKS, progress=False)
        questions = [f"What is fact {i}?" for i in range(8)]
        expected = [engine.answer(q, CHUNKS, max_new_tokens=6).token_ids for q in questions]
        got: dict[int, list[int]] = {}

        def ask(place: int) -> None:
            strategy = "recompute" if place % 2 else "reuse"
            engine.answer(questions[place], CHUNKS, strategy=strategy, max_new_tokens=2)
            got[place] = engine.answer(questions[place], CHUNKS, max_new_tokens=6).token_ids

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [got[i] for i in range(8)] == expected

    def test_a_store_far_away_is_asked_for_many_caches_at_once(self):
        together = threading.Barrier(len(CHUNKS))

        class Distant(MemoryStore):
            def has(self, key: str) -> bool:
                together.wait(60)  # fails unless all of them are asked for
                return super().has(key)

        engine = tiny.engine(store=Distant())
        assert [engine.index(CHUNKS, progress=False).misses for _ in range(2)] == [5, 0]

    def test_engines_over_one_model_do_not_run_it_at_once(self):
        pair = (tiny.model("llama"), tiny.tokenizer())
        engines = [KVLinkEngine.from_pretrained(pair) for _ in range(4)]
        for engine in engines:
            engine.stop_ids = frozenset()
            engine.index(CHUNKS, progress=False)
        expected = engines[0].answer(QUESTION, CHUNKS, max_new_tokens=20).token_ids

        def ask(engine: KVLinkEngine) -> list[list[int]]:
            return [engine.answer(QUESTION, CHUNKS, max_new_tokens=20).token_ids for _ in range(3)]

        with ThreadPoolExecutor(len(engines)) as pool:
            found = [pool.submit(ask, engine) for engine in engines]
        assert [each.result() for each in found] == [[expected] * 3] * len(engines)


class TestTrust:
    """A cache is used for exactly what it was made for, or not at all."""

    def test_another_model_never_gets_these_caches(self, tmp_path):
        tiny.engine("llama", store=tmp_path).index(CHUNKS, progress=False)
        for other in ("llama-linear", "qwen2", "phi"):
            engine = tiny.engine(other, store=tmp_path)
            clean = tiny.engine(other).prefill(QUESTION, CHUNKS)
            prefill = engine.prefill(QUESTION, CHUNKS)
            assert (prefill.report.hits, prefill.report.misses) == (0, 5)
            assert torch.equal(prefill.logits, clean.logits)

    def test_another_dtype_or_prefix_is_a_miss(self, tmp_path):
        tiny.engine("llama", store=tmp_path).index(CHUNKS, progress=False)
        for options in ({"encode_behind": "alone"}, {"encode_behind": "header"}):
            engine = tiny.engine("llama", store=tmp_path, **options)
            assert engine.prefill(QUESTION, CHUNKS).report.misses == 5
        half = copy.deepcopy(tiny.model("llama")).to(torch.bfloat16)
        engine = KVLinkEngine.from_pretrained((half, tiny.tokenizer()), store=tmp_path)
        assert engine.prefill(QUESTION, CHUNKS).report.misses == 5

    def test_a_record_under_a_wrong_key_is_not_used(self, engine):
        engine.index(CHUNKS, progress=False)
        keys = engine.keys(CHUNKS)
        lying = MemoryStore()
        swapped = dict(zip(keys, [*keys[1:], keys[0]], strict=True))
        lying.get = lambda key, within_s=None: engine.store.get(swapped.get(key, key))  # type: ignore[method-assign]
        with pytest.warns(KVLinkWarning, match="another model"):
            prefill = engine.with_store(lying).prefill(QUESTION, CHUNKS)
        assert prefill.report.misses == 5
        right = engine.prefill(QUESTION, CHUNKS)
        torch.testing.assert_close(prefill.logits, right.logits, atol=1e-4, rtol=0)

    def test_a_flipped_byte_is_found_and_recomputed(self, tmp_path):
        engine = tiny.engine("llama", store=tmp_path)
        engine.index(CHUNKS, progress=False)
        right = engine.answer(QUESTION, CHUNKS, max_new_tokens=6)
        key = engine.keys(CHUNKS)[2]
        path = next(Path(tmp_path).rglob(f"{key}*"))
        data = bytearray(path.read_bytes())
        data[-100] ^= 1
        path.write_bytes(data)
        with pytest.warns(KVLinkWarning, match=key[:8]):
            damaged = engine.answer(QUESTION, CHUNKS, max_new_tokens=6)
        assert damaged.token_ids == right.token_ids
        assert (damaged.report.hits, damaged.report.misses) == (4, 1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert engine.answer(QUESTION, CHUNKS, max_new_tokens=6).report.misses == 0

    def test_a_fresh_engine_answers_from_disk(self, tmp_path):
        first = tiny.engine("gemma3", store=str(tmp_path))
        first.index(CHUNKS, progress=False)
        expected = first.answer(QUESTION, CHUNKS, max_new_tokens=6).token_ids
        first.store.close()
        second = tiny.engine("gemma3", store=FolderStore(tmp_path))
        answer = second.answer(QUESTION, CHUNKS, max_new_tokens=6)
        assert answer.report.misses == 0
        assert answer.token_ids == expected


def test_in_memory_model_is_used_as_it_is(engine):
    assert engine.model is tiny.model("llama")
    assert engine.tokenizer is tiny.tokenizer()
    assert engine.with_store(None).model is engine.model
    assert engine.with_store(None).store is not engine.store


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encode_behind": "nothing"}, "'nothing'"),
        ({"strategy": "turbo"}, "'turbo'"),
        ({"device": "toaster"}, "'toaster'"),
        ({"dtype": "int8"}, "'int8'"),
    ],
)
def test_bad_settings_of_an_engine_are_named(options, message):
    with pytest.raises(InputError, match=message):
        tiny.engine(**options)


def test_caches_in_memory_are_told_of_once(caplog, tmp_path):
    say_once_that_memory_ends.cache_clear()
    tiny.engine(store=tmp_path).index(["rivers"], progress=False)
    tiny.engine(store=MemoryStore()).index(["rivers"], progress=False)
    tiny.engine().with_store(tmp_path).index(["rocks"], progress=False)  # as an index does
    assert caplog.records == []
    for _ in range(2):
        tiny.engine().index(["rivers"], progress=False)
    assert [record.name for record in caplog.records] == ["kvlink_rag"]
    assert "end with this process" in caplog.text
