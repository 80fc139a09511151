"""Fidelity: the distance from full prefill, which answers are checked, and the fallback."""

from __future__ import annotations

import asyncio
import math
import threading
from dataclasses import fields

import pytest
import tiny
import tiny_adapters
import torch

from kvlink_rag import InputError
from kvlink_rag.engine.fidelity import Fidelity, FidelityMonitor, FidelityStats, compare
from kvlink_rag.engine.pipeline import Pipeline
from kvlink_rag.engine.report import Stopwatch
from kvlink_rag.engine.request import Request

CHUNKS = [
    "The tower is 330 m tall.",
    "Bees dance to tell where flowers are.",
    "Zürich lies on a lake.",
]
QUESTION = "How tall is it?"
PARTS = ["tokenize_s", "load_s", "encode_s", "link_s", "forward_s", "fidelity_s", "sample_s"]


def engine(**options):
    made = tiny.engine(**options)
    made.stop_ids = frozenset()
    return made


class TestCompare:
    def test_by_hand(self):
        # p = (1/2, 1/4, 1/4) and q = (1/4, 1/2, 1/4); logits are free up to a constant
        p = torch.tensor([0.5, 0.25, 0.25]).log() + 3
        q = torch.tensor([0.25, 0.5, 0.25]).log() - 7
        found = compare(p, q)
        # 1/2 ln 2 - 1/4 ln 2
        assert found.kl_nats == pytest.approx(math.log(2) / 4, rel=1e-6)
        assert found.total_variation == pytest.approx(0.25, rel=1e-6)
        assert not found.same_token

    def test_the_direction_of_kl(self):
        p, q = torch.tensor([0.9, 0.1]), torch.tensor([0.5, 0.5])
        forth = 0.9 * math.log(1.8) + 0.1 * math.log(0.2)
        back = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
        assert compare(p.log(), q.log()).kl_nats == pytest.approx(forth, rel=1e-6)
        assert compare(q.log(), p.log()).kl_nats == pytest.approx(back, rel=1e-6)

    def test_equal_distributions(self):
        logits = torch.randn(1000, generator=torch.Generator().manual_seed(0))
        assert compare(logits, logits) == Fidelity(0.0, 0.0, same_token=True)
        shifted = compare(logits, logits + 5)
        assert 0 <= shifted.kl_nats < 1e-9
        assert shifted.same_token

    def test_tokens_that_are_ruled_out(self):
        never = -math.inf
        p, q = torch.tensor([0.0, 0.0, never]), torch.tensor([0.0, never, never])
        assert compare(p, p) == Fidelity(0.0, 0.0, same_token=True)
        assert compare(p, q).kl_nats == math.inf
        # the other way round it is finite: KL((1, 0, 0) || (1/2, 1/2, 0)) = ln 2
        assert compare(q, p).kl_nats == pytest.approx(math.log(2), rel=1e-6)
        assert compare(q, p).total_variation == pytest.approx(0.5)


class TestEngineFidelity:
    @pytest.mark.parametrize("name", ["llama", "gemma3", "smollm3"])
    def test_one_chunk_right_behind_what_it_was_encoded_behind_is_full(self, name):
        one = tiny.engine(name)
        found = one.fidelity(QUESTION, CHUNKS[:1])
        assert found.kl_nats < 1e-6
        assert found.total_variation < 1e-3
        assert found.same_token

    def test_chunks_that_have_not_seen_each_other_are_not(self):
        found = engine().fidelity(QUESTION, CHUNKS)
        assert found.kl_nats > 0.01
        assert 0.01 < found.total_variation <= 1

    def test_it_is_that_of_the_prefills(self):
        one = engine()
        for options in ({"strategy": "recompute", "recompute": 0.15}, {"system": "Be terse."}):
            system = options.get("system")
            full = one.prefill(QUESTION, CHUNKS, strategy="full", system=system)
            other = one.prefill(QUESTION, CHUNKS, **options)
            found = one.fidelity(QUESTION, CHUNKS, **options)
            assert found == compare(full.logits, other.logits)

    def test_recompute_of_everything_and_full_itself(self):
        one = engine()
        whole = one.fidelity(QUESTION, CHUNKS, strategy="recompute", recompute=1.0)
        assert whole.kl_nats < 1e-6
        assert one.fidelity(QUESTION, CHUNKS, strategy="full").kl_nats == 0
        assert one.fidelity(QUESTION, []).kl_nats < 1e-6

    def test_missing_caches_are_stored_and_nothing_is_counted(self):
        one = engine()
        assert asyncio.run(one.afidelity(QUESTION, CHUNKS)) == one.fidelity(QUESTION, CHUNKS)
        assert one.index(CHUNKS, progress=False).misses == 0
        assert one.fidelity_stats == FidelityStats()

    @pytest.mark.parametrize("kind", tiny_adapters.KINDS)
    def test_full_prefill_has_the_same_adapter(self, kind):
        one = tiny_adapters.engine("llama", tiny_adapters.adapter("llama", kind))
        full = one.prefill(QUESTION, CHUNKS, strategy="full")
        for strategy in ("link", "reuse"):
            other = one.prefill(QUESTION, CHUNKS, strategy=strategy)
            found = one.fidelity(QUESTION, CHUNKS, strategy=strategy)
            assert found == compare(full.logits, other.logits)
        untuned = tiny.engine().prefill(QUESTION, CHUNKS, strategy="full")
        assert compare(untuned.logits, full.logits).kl_nats > 0.01
        # alone behind the prefix, only link tokens make a difference
        assert one.fidelity(QUESTION, CHUNKS[:1], strategy="reuse").kl_nats < 1e-6
        assert one.fidelity(QUESTION, CHUNKS[:1], strategy="link").kl_nats > 0.01


class TestRate:
    def checked(self, rate: float, answers: int) -> list[bool]:
        one = engine(fidelity_rate=rate)
        reports = [one.answer(QUESTION, CHUNKS, max_new_tokens=1).report for _ in range(answers)]
        found = [report.fidelity is not None for report in reports]
        assert one.fidelity_stats.checked == sum(found)
        return found

    def test_never_and_always(self):
        assert not any(self.checked(0.0, 6))
        assert all(self.checked(1.0, 6))
        assert engine().answer(QUESTION, CHUNKS, max_new_tokens=1).report.fidelity is None

    def test_about_half_and_the_same_each_time(self):
        monitor = FidelityMonitor()
        many = [monitor.choose(0.5) for _ in range(1000)]
        assert 400 < sum(many) < 600
        assert self.checked(0.5, 12) == self.checked(0.5, 12) == many[:12]

    @pytest.mark.parametrize("limit", [None, 0.0])
    def test_full_and_no_chunks_are_not_checked(self, limit):
        one = engine(fidelity_rate=1.0, fidelity_limit=limit)
        for report in (
            one.answer(QUESTION, CHUNKS, strategy="full", max_new_tokens=1).report,
            one.answer(QUESTION, [], max_new_tokens=1).report,
        ):
            assert report.fidelity is None
            assert report.fidelity_s == report.after_s == 0
        assert one.fidelity_stats == FidelityStats()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"fidelity_rate": -0.1}, "fidelity_rate.*-0.1"),
            ({"fidelity_rate": 1.5}, "fidelity_rate.*1.5"),
            ({"fidelity_rate": math.nan}, "fidelity_rate.*nan"),
            ({"fidelity_limit": -1.0}, "fidelity_limit.*-1.0"),
            ({"fidelity_limit": math.nan}, "fidelity_limit.*nan"),
        ],
    )
    def test_bad_values_are_named(self, options, message):
        with pytest.raises(InputError, match=message):
            engine(**options)


class TestWithoutLimit:
    def test_the_report_has_what_engine_fidelity_says(self):
        one = engine(fidelity_rate=1.0)
        report = one.answer(QUESTION, CHUNKS, max_new_tokens=4).report
        assert report.fidelity == one.fidelity(QUESTION, CHUNKS)
        assert (report.strategy, report.fell_back) == ("reuse", False)

    def test_the_check_follows_the_last_piece(self, monkeypatch):
        one = engine(fidelity_rate=1.0)
        calls = []
        compare_them = Pipeline.compare
        monkeypatch.setattr(Pipeline, "compare", lambda *a: calls.append(a) or compare_them(*a))
        expected = engine().answer(QUESTION, CHUNKS, max_new_tokens=8)
        stream = one.stream(QUESTION, CHUNKS, max_new_tokens=8)
        text = ""
        while text != expected.text:
            assert calls == []
            text += next(stream)
        assert calls == []
        assert list(stream) == []
        assert len(calls) == 1
        assert stream.report.fidelity is not None
        assert stream.token_ids == expected.token_ids

    def test_its_time_is_in_after_s_alone(self):
        report = engine(fidelity_rate=1.0).answer(QUESTION, CHUNKS, max_new_tokens=4).report
        assert report.fidelity_s == 0
        assert report.after_s > 0
        assert sum(getattr(report, part) for part in PARTS) == pytest.approx(report.ttft_s)
        plain = engine().answer(QUESTION, CHUNKS, max_new_tokens=4).report
        assert plain.after_s == 0
        counts = [field.name for field in fields(plain) if field.type == "int"]
        assert len(counts) == 7
        for name in counts:
            assert getattr(report, name) == getattr(plain, name)

    def test_a_reader_who_leaves_is_not_counted(self):
        one = engine(fidelity_rate=1.0)
        stream = one.stream(QUESTION, CHUNKS, max_new_tokens=8)
        next(stream)
        del stream
        assert one.fidelity_stats.checked == 0


class TestFallback:
    def test_above_the_limit_it_is_the_full_answer(self):
        one = engine(fidelity_rate=1.0, fidelity_limit=0.0)
        answer = one.answer(QUESTION, CHUNKS, max_new_tokens=20)
        full = one.answer(QUESTION, CHUNKS, strategy="full", max_new_tokens=20)
        assert answer.token_ids == full.token_ids
        assert answer.token_ids != engine().answer(QUESTION, CHUNKS, max_new_tokens=20).token_ids
        report = answer.report
        assert (report.strategy, report.fell_back) == ("full", True)
        assert report.fidelity == one.fidelity(QUESTION, CHUNKS)
        assert (report.misses, report.reused_tokens) == (3, 0)
        assert report.context_tokens == full.report.context_tokens
        assert report.new_tokens == 20
        # both prefills ran before the first token
        linked = engine().answer(QUESTION, CHUNKS, max_new_tokens=1).report.computed_tokens
        assert report.computed_tokens == linked + full.report.computed_tokens

    def test_sampling_too(self):
        hot = {"temperature": 2.0, "seed": 3, "max_new_tokens": 12}
        one = engine(fidelity_rate=1.0, fidelity_limit=0.0)
        answer = one.answer(QUESTION, CHUNKS, **hot)
        assert answer.token_ids == one.answer(QUESTION, CHUNKS, strategy="full", **hot).token_ids

    def test_at_the_limit_the_linked_answer_stays(self):
        plain = engine()
        limit = plain.fidelity(QUESTION, CHUNKS).kl_nats
        for share, falls in ((1.0, False), (0.99, True)):
            one = engine(fidelity_rate=1.0, fidelity_limit=share * limit)
            one.index(CHUNKS, progress=False)
            plain.index(CHUNKS, progress=False)
            answer = one.answer(QUESTION, CHUNKS, max_new_tokens=12)
            expected = plain.answer(
                QUESTION, CHUNKS, strategy="full" if falls else "reuse", max_new_tokens=12
            )
            assert answer.report.fell_back == falls
            assert answer.report.strategy == expected.report.strategy
            assert answer.token_ids == expected.token_ids

    @pytest.mark.parametrize("limit", [0.0, math.inf])
    def test_the_parts_of_ttft_add_up(self, limit):
        one = engine(fidelity_rate=1.0, fidelity_limit=limit)
        report = one.answer(QUESTION, CHUNKS, max_new_tokens=4).report
        assert report.fidelity_s > 0
        assert report.after_s == 0
        total = sum(getattr(report, part) for part in PARTS)
        assert total == pytest.approx(report.ttft_s, abs=1e-9)
        assert report.total_s >= report.ttft_s

    @pytest.mark.parametrize("limit", [0.0, math.inf])
    def test_pieces_are_the_answer(self, limit):
        one = engine(fidelity_rate=1.0, fidelity_limit=limit)
        stream = one.stream(QUESTION, CHUNKS, max_new_tokens=12)
        pieces = list(stream)
        expected = engine().answer(
            QUESTION, CHUNKS, strategy="reuse" if limit else "full", max_new_tokens=12
        )
        assert "".join(pieces) == expected.text == stream.text
        assert stream.token_ids == expected.token_ids
        assert one.index(CHUNKS, progress=False).misses == 0  # stored all the same

    @pytest.mark.parametrize("limit", [0.0, math.inf])
    def test_with_a_cache_preserving_adapter(self, limit):
        trained = tiny_adapters.adapter("llama", "cache-preserving")
        options = {"fidelity_rate": 1.0, "fidelity_limit": limit}
        one = tiny_adapters.engine("llama", trained, **options)
        plain = tiny_adapters.engine("llama", trained)
        one.stop_ids = plain.stop_ids = frozenset()
        answer = one.answer(QUESTION, CHUNKS, max_new_tokens=12)
        strategy = "link" if limit else "full"
        expected = plain.answer(QUESTION, CHUNKS, strategy=strategy, max_new_tokens=12)
        assert answer.token_ids == expected.token_ids
        assert answer.report.strategy == strategy
        assert answer.report.context_tokens == expected.report.context_tokens
        assert answer.report.fidelity == plain.fidelity(QUESTION, CHUNKS)


class TestSeveralTokens:
    """What more than the first token is compared by: one pass over prompt and answer together."""

    @pytest.mark.parametrize("name", ["llama", "gemma3", "gemma2"])
    @pytest.mark.parametrize("strategy", ["full", "reuse", "recompute"])
    def test_looking_ahead_is_one_pass_over_all(self, name, strategy):
        one = engine(name=name)
        tokens = one.answer(QUESTION, CHUNKS, strategy=strategy, max_new_tokens=6).token_ids
        request = Request.of(QUESTION, CHUNKS, {"strategy": strategy}, {}, one.runner)
        started = one.pipeline.start(request, Stopwatch(), None, len(tokens))
        found = started.along(tokens[:-1])
        assert found.shape[0] == 6
        prefill = one.prefill(QUESTION, CHUNKS, strategy=strategy, max_new_tokens=6)
        expected = [prefill.logits, *(prefill.run([token]) for token in tokens[:-1])]
        torch.testing.assert_close(found, torch.stack(expected), atol=1e-4, rtol=1e-4)
        assert found.argmax(-1).tolist() == tokens
        # and it leaves the prompt as it was
        torch.testing.assert_close(started.along(tokens[:-1]), found, atol=1e-5, rtol=1e-5)
        model = one.model(torch.tensor([[*started.prompt.token_ids, *tokens[:-1]]])).logits[0, -6:]
        difference = (model.float() - found).abs().max()
        assert (difference < 1e-4) == (strategy == "full")

    def test_the_mean_over_the_tokens(self):
        p, q = torch.randn(2, 4, 50, generator=torch.Generator().manual_seed(0))
        each = [compare(one, its) for one, its in zip(p, q, strict=True)]
        found = compare(p, q)
        assert found.tokens == 4
        assert found.kl_nats == pytest.approx(sum(one.kl_nats for one in each) / 4)
        assert found.total_variation == pytest.approx(sum(o.total_variation for o in each) / 4)
        assert found.other_tokens == sum(not one.same_token for one in each) > 0
        assert not found.same_token
        assert compare(p, p) == Fidelity(0.0, 0.0, same_token=True, tokens=4)

    def test_an_answer_is_read_by_full_prefill(self):
        one = engine(fidelity_rate=1.0, fidelity_tokens=5)
        answer = one.answer(QUESTION, CHUNKS, max_new_tokens=12, temperature=2.0, seed=3)
        found, tokens = answer.report.fidelity, answer.token_ids
        logits = []
        for strategy in ("full", "reuse"):
            prefill = one.prefill(QUESTION, CHUNKS, strategy=strategy, max_new_tokens=5)
            rows = [prefill.logits, *(prefill.run([token]) for token in tokens[:4])]
            logits.append(torch.stack(rows))
        expected = compare(*logits)
        assert found.tokens == 5
        assert found.kl_nats == pytest.approx(expected.kl_nats, rel=1e-3)
        assert found.other_tokens == expected.other_tokens
        assert answer.report.after_s > 0

    @pytest.mark.parametrize("most", [1, 3])
    def test_shorter_answers(self, most):
        one = engine(fidelity_rate=1.0, fidelity_tokens=5)
        assert one.answer(QUESTION, CHUNKS, max_new_tokens=most).report.fidelity.tokens == most

    @pytest.mark.parametrize("limit", [0.0, math.inf])
    def test_with_a_limit_they_come_before_the_first(self, limit):
        one = engine(fidelity_rate=1.0, fidelity_limit=limit, fidelity_tokens=5)
        hot = {"temperature": 2.0, "seed": 3, "max_new_tokens": 12}
        answer = one.answer(QUESTION, CHUNKS, **hot)
        strategy = "reuse" if limit else "full"
        expected = engine().answer(QUESTION, CHUNKS, strategy=strategy, **hot)
        assert answer.token_ids == expected.token_ids
        assert answer.text == expected.text
        report = answer.report
        assert (report.fell_back, report.fidelity.tokens) == (not limit, 5)
        assert report.ttft_s == pytest.approx(sum(getattr(report, part) for part in PARTS))

    def test_an_end_token_ends_what_is_compared(self):
        one = engine()
        tokens = one.answer(QUESTION, CHUNKS, max_new_tokens=6).token_ids
        one.stop_ids = frozenset([tokens[2]])
        options = {"fidelity_rate": 1.0, "fidelity_limit": math.inf, "fidelity_tokens": 6}
        answer = one.answer(QUESTION, CHUNKS, max_new_tokens=6, **options)
        assert answer.token_ids == tokens[: tokens.index(tokens[2]) + 1]
        assert answer.report.fidelity.tokens == len(answer.token_ids)

    def test_asked_for(self):
        one = engine()
        found = one.fidelity(QUESTION, CHUNKS, fidelity_tokens=6)
        tokens = one.answer(QUESTION, CHUNKS, strategy="full", max_new_tokens=6).token_ids
        logits = []
        for strategy in ("full", "reuse"):
            prefill = one.prefill(QUESTION, CHUNKS, strategy=strategy, max_new_tokens=6)
            rows = [prefill.logits, *(prefill.run([token]) for token in tokens[:-1])]
            logits.append(torch.stack(rows))
        expected = compare(*logits)
        assert (found.tokens, found.other_tokens) == (6, expected.other_tokens)
        assert found.kl_nats == pytest.approx(expected.kl_nats, rel=1e-3)

    @pytest.mark.parametrize("tokens", [0, -1, 1.5, True])
    def test_numbers_that_are_none(self, tokens):
        with pytest.raises(InputError, match=f"fidelity_tokens is {tokens}"):
            engine(fidelity_tokens=tokens)


class TestStats:
    def test_by_hand(self):
        monitor = FidelityMonitor()
        assert monitor.stats == FidelityStats()
        for kl, same in ((0.25, True), (1.0, False), (0.25, False), (0.5, True)):
            found = Fidelity(kl, 0.1, same)
            monitor.count(found, fell_back=found.is_beyond(0.5))
        assert monitor.stats == FidelityStats(
            checked=4, fallbacks=1, mean_kl_nats=0.5, max_kl_nats=1.0, other_token_share=0.5
        )
        assert Fidelity(math.nan, 0.0, True).is_beyond(0.5)

    def test_of_answers(self):
        one = engine(fidelity_rate=1.0)
        questions = [QUESTION, "Where is it?", "What do bees do?"]
        found = [one.answer(q, CHUNKS, max_new_tokens=1).report.fidelity for q in questions]
        stats = one.fidelity_stats
        assert (stats.checked, stats.fallbacks) == (3, 0)
        assert stats.max_kl_nats == max(f.kl_nats for f in found)
        assert stats.mean_kl_nats == pytest.approx(sum(f.kl_nats for f in found) / 3)
        assert stats.other_token_share == sum(not f.same_token for f in found) / 3

    @pytest.mark.parametrize("limit", [None, 0.0])
    def test_two_threads(self, limit):
        one = engine(fidelity_rate=1.0, fidelity_limit=limit)
        reports = []

        def ask() -> None:
            for _ in range(8):
                reports.append(one.answer(QUESTION, CHUNKS, max_new_tokens=2).report)

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stats = one.fidelity_stats
        assert (stats.checked, stats.fallbacks) == (16, 0 if limit is None else 16)
        expected = one.fidelity(QUESTION, CHUNKS).kl_nats
        assert stats.mean_kl_nats == pytest.approx(expected, rel=1e-4)
        assert all(report.fidelity is not None for report in reports)

    def test_twins(self):
        one = engine(fidelity_rate=1.0, fidelity_limit=2.0)
        one.with_store(None).answer(QUESTION, CHUNKS, max_new_tokens=1)
        assert one.fidelity_stats.checked == 1
        trained = tiny_adapters.adapter("llama", "cache-preserving")
        other = one.with_adapter(trained)
        assert other.answer(QUESTION, CHUNKS, max_new_tokens=1).report.fidelity is not None
        assert (other.fidelity_stats.checked, one.fidelity_stats.checked) == (1, 1)
