"""What an engine asks of a runner, and what it refuses for want of it: without a model."""

from __future__ import annotations

from typing import Any

import pytest
import scripted
import tiny
import torch
from scripted import ScriptedRunner

from kvlink_rag import AdapterRequiredError, Chunk, InputError, UnsupportedModelError
from kvlink_rag.runners.base import ModelRunner

CHUNKS = [
    Chunk("Bees dance to tell others where flowers are.", id="bees"),
    Chunk("Ants follow trails of scent.", id="ants"),
]
QUESTION = "How do ants find their way?"
GENERATES_BY_ITSELF = {
    "logits": False,
    "strategies": frozenset({"full", "reuse"}),
    "together": frozenset({"full", "reuse"}),
}
"""As an engine such as vLLM has it."""


def ids(text: str) -> list[int]:
    return list(tiny.tokenizer()(text)["input_ids"])


def says(text: str, **abilities: Any) -> ScriptedRunner:
    return ScriptedRunner(lambda job: ids(text), **abilities)


def test_both_are_runners():
    assert isinstance(ScriptedRunner(), ModelRunner)
    assert isinstance(tiny.engine().runner, ModelRunner)


def test_a_job_is_made_of_the_caches_in_the_order_asked_for():
    runner = says("By scent.<|end|>")
    engine = scripted.engine(runner)
    engine.index(CHUNKS, progress=False)
    for chunks in (CHUNKS, CHUNKS[::-1]):
        answer = engine.answer(QUESTION, chunks, max_new_tokens=16)
        assert (answer.text, answer.finish_reason) == ("By scent.", "stop")
        assert answer.report.hits == 2
        job = runner.jobs[-1]
        assert job.strategy == "reuse"
        assert [s.kind for s in job.prompt.cached] == ["prefix", "chunk", "chunk"]
        for segment, record in zip(job.prompt.cached, job.records, strict=True):
            assert record is not None
            assert list(record.token_ids) == job.prompt.token_ids[segment.start : segment.stop]
            assert record.behind == segment.behind
            # keys as they were computed, whatever their place in the prompt
            assert torch.equal(record.keys[0, 0, :, 0], torch.tensor(record.token_ids).float())


def test_each_cache_is_made_once():
    runner = ScriptedRunner()
    engine = scripted.engine(runner)
    assert engine.answer(QUESTION, [*CHUNKS, CHUNKS[0]]).report.misses == 3
    chunks = [tuple(engine.layout.chunk(chunk)) for chunk in CHUNKS]
    made = [text for text, behind in runner.encoded if behind == engine.behind]
    assert sorted(made) == sorted(chunks)
    assert engine.answer(QUESTION, CHUNKS).report.hits == 2
    assert len(runner.encoded) == 3  # and the prefix


def test_full_is_given_no_caches():
    runner = ScriptedRunner()
    report = scripted.engine(runner).answer(QUESTION, CHUNKS, strategy="full").report
    assert runner.encoded == []
    assert runner.jobs[0].records == []
    assert report.computed_tokens == report.context_tokens


def test_settings_reach_the_runner():
    runner = ScriptedRunner()
    engine = scripted.engine(runner, temperature=0.5, max_new_tokens=2)
    engine.answer(QUESTION, CHUNKS, seed=7, top_p=0.9)
    job = runner.jobs[0]
    settings = job.settings
    assert settings is not None
    assert (settings.temperature, settings.seed, settings.top_p) == (0.5, 7, 0.9)
    assert job.prompt.room == len(job.prompt.token_ids) + 2


def test_answers_end_where_they_should():
    engine = scripted.engine(says("one two three four<|end|> and more"))
    assert engine.answer(QUESTION, CHUNKS).text == "one two three four"
    assert engine.answer(QUESTION, CHUNKS, stop=" three").text == "one two"
    cut = engine.answer(QUESTION, CHUNKS, max_new_tokens=3)
    assert (cut.text, cut.finish_reason) == ("one", "length")
    assert "".join(engine.stream(QUESTION, CHUNKS)) == "one two three four"


def test_rows_that_have_ended_leave_the_batch():
    runner = ScriptedRunner(
        lambda job: ids("a<|end|>" if "short" in decoded(job) else "a longer one<|end|>"),
    )
    engine = scripted.engine(runner)
    asked = [("A short one?", CHUNKS), ("Another?", CHUNKS[:1]), ("short", [])]
    answers = engine.answer_batch(asked)
    assert [answer.text for answer in answers] == ["a", "a longer one", "a"]
    assert [answer.report.new_tokens for answer in answers] == [2, 13, 2]
    assert [answer.report.misses for answer in answers] == [2, 1, 0]
    assert len(runner.jobs) == 3
    assert len({answer.report.ttft_s for answer in answers}) == 1  # all waited for all


def decoded(job: Any) -> str:
    return str(tiny.tokenizer().decode(job.prompt.token_ids))


def test_one_after_the_other_where_a_runner_has_no_batches():
    runner = ScriptedRunner(together=frozenset())
    answers = scripted.engine(runner).answer_batch([(QUESTION, CHUNKS)] * 2)
    assert [answer.report.hits for answer in answers] == [0, 2]


class TestGeneratesByItself:
    def test_it_answers(self):
        engine = scripted.engine(says("Yes.<|end|>", **GENERATES_BY_ITSELF))
        assert engine.answer(QUESTION, CHUNKS).text == "Yes."
        assert "".join(engine.stream(QUESTION, CHUNKS)) == "Yes."
        assert [a.text for a in engine.answer_batch([(QUESTION, CHUNKS)] * 2)] == ["Yes.", "Yes."]

    def test_what_needs_logits_is_refused_before_anything_is_computed(self):
        runner = says("Yes.<|end|>", **GENERATES_BY_ITSELF)
        engine = scripted.engine(runner)
        for act in (engine.prefill, engine.fidelity):
            with pytest.raises(UnsupportedModelError, match=r"logits.*scripted"):
                act(QUESTION, CHUNKS)
        with pytest.raises(UnsupportedModelError, match="fidelity_rate needs the logits"):
            engine.answer(QUESTION, CHUNKS, fidelity_rate=0.5)
        assert runner.encoded == runner.jobs == []

    def test_strategies_that_it_has_not_are_refused(self):
        engine = scripted.engine(says("Yes.<|end|>", **GENERATES_BY_ITSELF))
        with pytest.raises(UnsupportedModelError, match=r"'recompute'.*full, reuse"):
            engine.answer(QUESTION, CHUNKS, strategy="recompute")
        with pytest.raises(UnsupportedModelError, match="'recompute'"):
            scripted.engine(says("", **GENERATES_BY_ITSELF), strategy="recompute")
        with pytest.raises(AdapterRequiredError):
            engine.answer(QUESTION, CHUNKS, strategy="link")

    def test_what_is_of_transformers_is_not_there(self):
        engine = scripted.engine()
        for name in ("model", "reader", "architecture"):
            with pytest.raises(UnsupportedModelError, match=r"scripted is run by ScriptedRunner"):
                getattr(engine, name)


class TestOptions:
    def test_defaults_are_of_every_answer_and_yield_to_its_own(self):
        runner = ScriptedRunner()
        engine = scripted.engine(runner, strategy="full", system="Be brief.")
        engine.answer(QUESTION, CHUNKS)
        assert runner.jobs[-1].strategy == "full"
        assert "Be brief." in decoded(runner.jobs[-1])
        engine.answer(QUESTION, CHUNKS, strategy="reuse", system="Be long.")
        assert runner.jobs[-1].strategy == "reuse"
        assert "Be long." in decoded(runner.jobs[-1])
        assert "Be brief." not in decoded(runner.jobs[-1])
        engine.answer(QUESTION, CHUNKS, strategy=None, system=None)
        assert runner.jobs[-1].strategy == "full"
        assert engine.with_store(None).options == engine.options

    def test_a_default_system_prompt_yields_to_a_message(self):
        runner = ScriptedRunner()
        engine = scripted.engine(runner, system="Be brief.")
        said = [{"role": "system", "content": "Rhyme."}, {"role": "user", "content": QUESTION}]
        engine.answer(said, CHUNKS)
        assert "Rhyme." in decoded(runner.jobs[-1])
        assert "Be brief." not in decoded(runner.jobs[-1])
        with pytest.raises(InputError, match="leave one of them out"):
            engine.answer(said, CHUNKS, system="Be long.")

    def test_what_is_the_stores_is_said_to_it(self):
        for name in ("codec", "budget", "cache_after", "remote", "ram_bytes", "encryption_key"):
            with pytest.raises(InputError, match=rf"open_store\(folder, {name}="):
                scripted.engine().answer(QUESTION, CHUNKS, **{name: 1})

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"top_k": 3}, "no option 'top_k': options are strategy"),
            ({"strategy": "best"}, "strategy must be one of"),
            ({"recompute_by": "last"}, "recompute_by must be one of"),
            ({"recompute": -1}, "share .* from 0 to 1 .*, not -1"),
            ({"recompute": 16}, "share .* from 0 to 1 .*, not 16"),
            ({"recompute_tokens": 16}, "recompute=0.15"),
            ({"fidelity_rate": 2}, "fidelity_rate must be in"),
            ({"fidelity_limit": -1}, "fidelity_limit must be 0 or more"),
            ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
        ],
    )
    def test_bad_ones_are_named_when_given(self, options, message):
        runner = ScriptedRunner()
        with pytest.raises(InputError, match=message):
            scripted.engine(runner, **options)
        with pytest.raises(InputError, match=message):
            scripted.engine(runner).answer(QUESTION, CHUNKS, **options)
        assert runner.encoded == []
