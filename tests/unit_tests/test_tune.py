"""What a trial measures, what it chooses, and where the choice is found again."""

from __future__ import annotations

import json
import re

import pytest
import scripted
import tiny
import tiny_adapters
import torch
from tiny_cli import WordVectors

from kvlink_rag import Chunk, InputError, KVIndex, KVLinkWarning, UnsupportedModelError
from kvlink_rag.engine.choice import FILE, Choice
from kvlink_rag.engine.fidelity import compare
from kvlink_rag.engine.questions import spread, write_cases
from kvlink_rag.engine.tune import SHARES, Measured, TuneSettings, best_of
from kvlink_rag.errors import StoreError
from kvlink_rag.store import open_store
from kvlink_rag.tuning.plot import plot_tuning

TEXTS = ["Bees dance.", "The tower is 330 m tall.", "Ants follow trails.", "Zürich has a lake."]
ASKED = [("How tall is it?", TEXTS[:3]), ("What do ants do?", TEXTS[::-1])]
FEW = TuneSettings(questions=2, k=3, tokens=5)


def engine(name="llama", **options):
    """A tiny engine as one without wishes makes it."""
    return tiny.engine(name, **{"strategy": None, **options})


def tuned(one, **given):
    return one.tune(**{"asked": ASKED, "settings": FEW, "progress": False, **given})


@pytest.fixture(scope="module")
def tuning():
    return tuned(engine())


class TestMeasured:
    def test_each_way_is_there(self, tuning):
        ways = {(each.strategy, each.recompute) for each in tuning.measured}
        shares = {("recompute", share) for share in SHARES}
        assert ways == {("full", 0.0), ("reuse", 0.0), *shares}
        times = [each.ttft_s for each in tuning.measured]
        assert times == sorted(times)
        assert times[0] > 0
        assert (tuning.questions, tuning.tokens) == (2, 10)

    @pytest.mark.parametrize(("strategy", "share"), [("reuse", 0.0), ("recompute", 0.3)])
    def test_it_is_what_the_way_would_have_said(self, tuning, strategy, share):
        one, found = engine(), []
        options = {"strategy": strategy, "recompute": share, "max_new_tokens": 5}
        for question, chunks in ASKED:
            full = one.answer(question, chunks, strategy="full", max_new_tokens=5).token_ids
            whole = one.prefill(question, chunks, strategy="full", max_new_tokens=5)
            other = one.prefill(question, chunks, **options)
            pairs = [(whole.logits, other.logits)]
            pairs += [(whole.run([token]), other.run([token])) for token in full[:-1]]
            found.append([compare(*pair) for pair in pairs])
        tokens = [each for answer in found for each in answer]
        its = next(m for m in tuning.measured if (m.strategy, m.recompute) == (strategy, share))
        assert its.kl_nats == pytest.approx(sum(t.kl_nats for t in tokens) / 10, rel=1e-2)
        assert its.kl_nats > 1e-4
        assert its.same_tokens == sum(t.same_token for t in tokens) / 10
        assert its.same_first == sum(answer[0].same_token for answer in found) / 2
        assert its.same_answers == sum(all(t.same_token for t in a) for a in found) / 2

    def test_full_prefill_is_itself(self, tuning):
        full = next(each for each in tuning.measured if each.strategy == "full")
        assert (full.same_tokens, full.same_first, full.same_answers, full.kl_nats) == (1, 1, 1, 0)

    def test_links_are_tried_where_there_are_any(self):
        trained = tiny_adapters.adapter("llama", "cache-preserving")
        one = tiny_adapters.engine("llama", trained, strategy=None)
        assert "link" in {each.strategy for each in tuned(one).measured}

    def test_rows(self, tuning):
        heading, *rows = tuning.rows()
        assert [row[0] for row in rows] == [each.way for each in tuning.measured]
        assert {len(row) for row in (heading, *rows)} == {7}
        assert [row[0] for row in rows if row[-1] == "chosen"] == [tuning.choice.way]

    def test_nobody_is_told_and_nothing_is_counted(self):
        told, one = [], engine()
        one.observers.append(told.append)
        tuned(one)
        assert told == []
        assert one.fidelity_stats.checked == 0

    def test_plot(self, tuning, tmp_path):
        assert plot_tuning(tuning, tmp_path / "deep" / "tune.png", "llama")
        assert (tmp_path / "deep" / "tune.png").read_bytes().startswith(b"\x89PNG")


def measured(strategy="reuse", share=0.0, same=1.0, kl=0.0, ttft_s=0.1, tokens=1000):
    return Measured(strategy, share, same, same, same, kl, ttft_s, tokens)


FULL = measured("full", ttft_s=1.0)


class TestBest:
    def test_the_quickest_of_the_good(self):
        bad, good = measured(kl=9.0), measured("recompute", 0.04, 0.97, 0.01, ttft_s=0.2)
        slower = measured("recompute", 0.15, ttft_s=0.4)
        choice = best_of([bad, good, slower, FULL], 12)
        assert (choice.strategy, choice.recompute) == ("recompute", 0.04)
        assert choice.why.startswith("tuned by 12 questions: 97% of its tokens are full prefill's")
        assert "20% of its time" in choice.why

    @pytest.mark.parametrize(("same", "kl"), [(0.5, 0.0), (1.0, 3.0)])
    def test_tokens_and_divergence_both_count(self, same, kl):
        choice = best_of([measured(same=same, kl=kl), FULL], 1)
        assert (choice.strategy, choice.recompute) == ("full", 0.0)
        assert "caches are bad for this model; even by reuse only" in choice.why
        assert choice.why.startswith("tuned by 1 question:")

    @pytest.mark.parametrize(
        ("same", "tokens", "expected"),
        [
            (0.94, 191, "reuse"),
            (0.94, 2000, "full"),
            (0.93, 191, "full"),
            (0.946, 2000, "reuse"),
            (0.9, 10, "full"),
        ],
    )
    def test_the_share_of_few_tokens_is_not_taken_too_exactly(self, same, tokens, expected):
        assert best_of([measured(same=same, tokens=tokens), FULL], 1).strategy == expected

    def test_full_where_it_is_as_quick(self):
        choice = best_of([FULL, measured(ttft_s=2.0)], 3)
        assert choice.strategy == "full"
        assert "nothing as good is quicker" in choice.why


class TestRandomModel:
    def test_caches_are_bad_for_it_and_auto_is_full(self):
        one = engine()
        choice = tuned(one).choice
        assert choice.strategy == "full"
        assert "caches are bad for this model" in choice.why
        report = one.answer(*ASKED[0], max_new_tokens=2).report
        assert (report.asked, report.strategy, report.why) == ("auto", "full", choice.why)


class TestKept:
    CHOICE = Choice("recompute", "tuned by 9 questions", 0.08)

    @pytest.fixture
    def folder(self, tmp_path):
        one = engine(store=tmp_path)
        one.choices.keep(self.CHOICE)
        return tmp_path

    def test_a_trial_is_found_by_the_next_engine(self, tmp_path):
        one = engine(store=tmp_path)
        assert one.tuned is None
        choice = tuned(one).choice
        assert one.tuned == choice == engine(store=tmp_path).tuned
        assert engine(store=tmp_path).prefill(*ASKED[0]).report.why == choice.why

    def test_auto_takes_it(self, folder):
        report = engine(store=folder).prefill(*ASKED[0]).report
        assert (report.way, report.why) == ("recompute 8 %", "tuned by 9 questions")

    def test_a_share_that_is_asked_for_goes_first(self, folder):
        assert engine(store=folder).prefill(*ASKED[0], recompute=0.5).report.recompute == 0.5
        assert engine(store=folder, recompute=0.5).prefill(*ASKED[0]).report.recompute == 0.5

    def test_a_strategy_that_is_asked_for_is_taken(self, folder):
        report = engine(store=folder).prefill(*ASKED[0], strategy="recompute").report
        assert (report.recompute, report.why) == (0.15, "")

    def test_it_is_of_the_model_that_it_was_measured_with(self, folder):
        assert engine("qwen3", store=folder).tuned is None
        assert engine(store=folder, encode_behind="alone").tuned is None
        trained = tiny_adapters.adapter("llama", "cache-preserving")
        other = engine(store=folder).with_adapter(trained)
        assert other.tuned is None
        other.choices.keep(Choice("link", "of the adapter"))
        assert engine(store=folder).tuned == self.CHOICE
        assert engine(store=folder).with_adapter(trained).tuned.strategy == "link"

    def test_tiers_keep_it_in_the_folder(self, folder):
        store = open_store(folder, ram_bytes=1 << 20)
        assert engine(store=store).tuned == self.CHOICE

    def test_in_memory_it_is_the_engines(self, tmp_path):
        one = engine()
        tuned(one)
        assert one.choices.path is None
        assert one.tuned is not None
        assert engine().tuned is None
        # a twin whose store has none goes on with it; what is beside its store goes first
        assert one.with_store(tmp_path).tuned == one.tuned
        engine(store=tmp_path).choices.keep(self.CHOICE)
        assert one.with_store(tmp_path).tuned == self.CHOICE
        assert one.with_encode_behind("alone").tuned is None

    def test_the_index_finds_it(self, tmp_path):
        with KVIndex.open(tmp_path, engine(), embeddings=WordVectors()) as index:
            index.add(TEXTS, progress=False)
            tuning = index.tune(["How tall is the tower?"], FEW)
            assert (tuning.questions, index.engine.tuned) == (1, tuning.choice)
            assert index.tune(settings=FEW).questions == 2  # written by the model
        with KVIndex.open(tmp_path, engine(), embeddings=WordVectors()) as index:
            assert index.ask("How tall?", max_new_tokens=1).report.why.startswith("tuned by 2")
            assert index.verify().clean

    @pytest.mark.parametrize(
        "text", ["", "[]", "{", '{"READER": 1}', '{"READER": {"strategy": "magic"}}', "\xff"]
    )
    def test_a_damaged_file_is_said_and_done_without(self, folder, text):
        reader = next(iter(json.loads((folder / FILE).read_text())))
        (folder / FILE).write_bytes(text.replace("READER", reader).encode("latin-1"))
        with pytest.warns(KVLinkWarning, match=rf"{re.escape(str(folder / FILE))}.*kvlink tune"):
            one = engine(store=folder)
        assert one.prefill(*ASKED[0]).report.way == "recompute 15 %"
        one.choices.keep(self.CHOICE)
        assert engine(store=folder).tuned == self.CHOICE

    def test_what_cannot_be_written_is_said_and_in_use(self, tmp_path):
        one = engine(store=tmp_path)
        (tmp_path / FILE).mkdir()
        with pytest.raises(StoreError, match="cannot write what was tuned"):
            tuned(one)
        assert one.tuned is not None

    def test_a_folder_that_cannot_be_written_to_is_said_before_anything_is_measured(self, tmp_path):
        runner = scripted.ScriptedRunner()
        one = scripted.engine(runner, store=tmp_path / "kv", strategy=None)
        (tmp_path / "kv" / f"{FILE}.lock").mkdir()
        with pytest.raises(StoreError, match=r"cannot write what was tuned.*make the folder"):
            tuned(one)
        assert runner.jobs == []

    def test_a_strategy_that_cannot_be_had_any_more(self):
        runner = scripted.ScriptedRunner(strategies=frozenset({"full", "reuse"}))
        one = scripted.engine(runner, strategy=None)
        one.tuned = self.CHOICE
        assert one.answer(*ASKED[0]).report.strategy == "full"


class TestQuestions:
    def test_they_are_about_chunks_from_all_over(self):
        chunks = [Chunk(f"Tower {n} is {n} m tall.") for n in range(20)]
        one = engine()
        cases = write_cases(one.pipeline.unwatched, chunks, 5, 3, progress=False)
        assert len(cases) == 5
        for (question, its), about in zip(cases, spread(chunks, 5), strict=True):
            assert question
            assert about in its
            assert len({chunk.text for chunk in its}) == 3
        assert [about.text.split()[1] for about in spread(chunks, 5)] == ["0", "4", "8", "12", "16"]
        places = {
            its.index(about) for (_, its), about in zip(cases, spread(chunks, 5), strict=True)
        }
        assert len(places) > 1
        assert cases == write_cases(one.pipeline.unwatched, chunks, 5, 3, progress=False)

    def test_few_chunks(self):
        cases = write_cases(engine().pipeline.unwatched, [Chunk("One.")], 5, 3, progress=False)
        assert [len(its) for _, its in cases] == [1]

    def test_a_model_that_writes_nothing(self):
        runner = scripted.ScriptedRunner(lambda job: list(scripted.ScriptedRunner().stop_ids))
        one = scripted.engine(runner)
        cases = write_cases(one.pipeline.unwatched, [Chunk("One.")], 1, 3, progress=False)
        assert cases[0][0] == "What does this text say?"


class TestRefused:
    def test_nothing_to_tune_by(self):
        with pytest.raises(InputError, match="nothing to tune by"):
            engine().tune(progress=False)

    def test_a_runner_without_logits(self):
        with pytest.raises(UnsupportedModelError, match="tune needs the logits"):
            scripted.engine(scripted.ScriptedRunner(logits=False)).tune(TEXTS, progress=False)

    @pytest.mark.parametrize("name", ["questions", "k", "tokens"])
    @pytest.mark.parametrize("value", [0, -1, 1.5, True])
    def test_numbers(self, name, value):
        with pytest.raises(InputError, match=f"{name} is {value}"):
            TuneSettings(**{name: value})


def test_scripted_ways_agree():
    one = scripted.engine(strategy=None)
    tuning = tuned(one)
    assert all(each.same_tokens == 1 for each in tuning.measured)
    assert all(each.is_good for each in tuning.measured)
    assert torch.isfinite(torch.tensor([each.kl_nats for each in tuning.measured])).all()
