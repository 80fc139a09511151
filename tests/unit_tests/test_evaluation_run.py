"""The runner gives the engine's own answers, goes on after a kill, and computes nothing twice."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import tiny
import tiny_adapters
from effort import times
from tiny_sets import save_adapter, write_set

from kvlink_rag import AdapterRequiredError, InputError, PromptTemplate
from kvlink_rag.evaluation import run as run_module
from kvlink_rag.evaluation.data import read_set
from kvlink_rag.evaluation.items import Item, make_items
from kvlink_rag.evaluation.plan import Plan, Row
from kvlink_rag.evaluation.run import Runner, evaluate, groups
from kvlink_rag.evaluation.table import results


def rows_of(adapters, recompute=0.2):
    rows = [Row(s, s, recompute=recompute) for s in ("none", "full", "reuse")]
    rows.append(Row("alone", "reuse", encode_behind="alone"))
    rows.append(Row("recompute", "recompute", recompute=recompute))
    for name, adapter in adapters.items():
        rows += [
            Row(f"{strategy} {name}", strategy, adapter, recompute=recompute)
            for strategy in ("none", "full", "reuse", "recompute", "link")
        ]
    return tuple(rows)


def engine_answer(engine, row, item):
    """What the public API answers."""
    chunks = [] if row.strategy == "none" else item.chunks
    return engine.answer(
        item.question,
        chunks,
        strategy="full" if row.strategy == "none" else row.strategy,
        recompute=row.recompute,
        max_new_tokens=item.max_new_tokens,
    )


@pytest.mark.parametrize(
    "model",
    [
        "llama",
        pytest.param("gemma3", marks=pytest.mark.slow),
        pytest.param("qwen2-sliding", marks=pytest.mark.slow),
    ],
)
def test_answers_are_the_engines_own(tmp_path, model):
    kinds = {kind: {"kind": kind, "seed": seed} for seed, kind in enumerate(tiny_adapters.KINDS)}
    kinds["another"] = {"seed": 7, "layout": "tail"}
    adapters = {
        name: save_adapter(tmp_path, name, model=model, **options)
        for name, options in kinds.items()
    }
    questions = times(full=4, quick=2)
    plan = Plan(rows_of(adapters), (write_set(tmp_path, questions=questions),), max_new_tokens=16)
    runner = Runner(plan, tiny.engine(model))
    items = make_items(plan, [read_set(plan.sets[0])], runner.engines)
    answers = [answer for part in runner.answers(items) for answer in part]
    assert len(answers) == len(plan.rows) * len(items)
    settings = {(row.adapter, row.encode_behind) for row in plan.rows}
    engines = {
        (a, b): tiny.engine(model, adapter=a, **({"encode_behind": b} if b else {}))
        for a, b in settings
    }
    different = set()
    for answer in answers:
        row = answer.row
        expected = engine_answer(engines[row.adapter, row.encode_behind], row, answer.item)
        assert answer.token_ids == expected.token_ids, row.name
        assert answer.text == expected.text
        different.add((answer.item.id, tuple(answer.token_ids)))
    assert len(different) > len(answers) / 3  # rows do have answers of their own


def test_answers_end_where_the_engine_ends_them(tmp_path):
    """Rows that have ended leave the batch, the others go on."""
    base = tiny.engine()
    plan = Plan((Row("reuse", "reuse"),), (write_set(tmp_path, questions=4),), max_new_tokens=12)
    runner = Runner(plan, base)
    items = make_items(plan, [read_set(plan.sets[0])], runner.engines)
    (whole,) = runner.answers(items)
    stops = frozenset({whole[0].token_ids[3], whole[1].token_ids[7]})
    runner.engines[plan.rows[0]].stop_ids = base.stop_ids = stops
    (cut,) = runner.answers(items)
    for before, answer in zip(whole, cut, strict=True):
        ends = [place for place, token in enumerate(before.token_ids) if token in stops]
        assert answer.token_ids == before.token_ids[: ends[0] + 1 if ends else None]
    assert len({len(answer.token_ids) for answer in cut}) > 1


def test_codecs_answer_as_a_folder_with_the_codec_does(tmp_path):
    rows = tuple(Row(codec, "reuse", codec=codec) for codec in ("int4", "raw", "int8"))
    plan = Plan(rows, (write_set(tmp_path, questions=3),), max_new_tokens=16)
    runner = Runner(plan, tiny.engine())
    items = make_items(plan, [read_set(plan.sets[0])], runner.engines)
    answers = [answer for part in runner.answers(items) for answer in part]
    assert len(answers) == 9
    assert len({runner.digest(row, items[0]) for row in rows}) == 3
    texts = {}
    for answer in answers:
        codec, item = answer.row.codec, answer.item
        engine = tiny.engine(store=tmp_path / codec, codec=codec)
        engine.answer(item.question, item.chunks, max_new_tokens=1)  # all is stored now
        expected = engine.answer(item.question, item.chunks, max_new_tokens=16)
        assert answer.token_ids == expected.token_ids, codec
        texts.setdefault(codec, []).append(answer.text)
    assert texts["int4"] != texts["raw"]


def test_the_context_is_read_once_for_all_that_leave_it_to_the_base_model(tmp_path, monkeypatch):
    adapters = {name: save_adapter(tmp_path, name, seed=i) for i, name in enumerate("ab")}
    whole = save_adapter(tmp_path, "whole", kind="whole-model")
    rows = [Row("full", "full")]
    rows += [Row(f"{s} {n}", s, a) for n, a in adapters.items() for s in ("full", "reuse", "link")]
    rows += [Row("full whole", "full", whole)]
    plan = Plan(tuple(rows), (write_set(tmp_path, questions=1),), max_new_tokens=2)
    runner = Runner(plan, tiny.engine())
    read = []
    prefill = runner._prefill
    monkeypatch.setattr(
        runner, "_prefill", lambda row, item: read.append(row) or prefill(row, item)
    )
    items = make_items(plan, [read_set(plan.sets[0])], runner.engines)
    assert sum(len(part) for part in runner.answers(items)) == len(rows)
    assert [row.name for row in read] == ["full", "reuse a", "link a", "link b", "full whole"]
    assert runner.store.stat().entries == 0


def count_answers(monkeypatch):
    """A list that each computed answer's row and question are added to."""
    made = []
    answers = Runner.answers

    def counted(self, items, skip=()):
        for part in answers(self, items, skip):
            made.extend((answer.row.name, answer.item.id) for answer in part)
            yield part

    monkeypatch.setattr(Runner, "answers", counted)
    return made


def small_plan(tmp_path, **options):
    rows = (Row("full", "full"), Row("reuse", "reuse"))
    return Plan(rows, (write_set(tmp_path, questions=3),), max_new_tokens=4, **options)


def test_a_run_goes_on_where_a_kill_stopped_it(tmp_path, monkeypatch):
    plan, out = small_plan(tmp_path), tmp_path / "out"
    evaluate(plan, tiny.engine(), out, progress=False)
    file = out / "answers.jsonl"
    whole, expected = file.read_bytes(), results(out)
    lines = whole.splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:4]) + lines[4][:20])
    made = count_answers(monkeypatch)
    evaluate(plan, tiny.engine(), out, progress=False)
    assert len(made) == 2
    assert results(out) == expected
    assert lines[4][:20] in file.read_bytes()
    made.clear()
    evaluate(plan, tiny.engine(), out, progress=False)
    assert made == []


def test_only_what_changed_is_computed_anew(tmp_path, monkeypatch):
    adapter = save_adapter(tmp_path, "links", seed=1)
    rows = (Row("full", "full"), Row("link", "link", adapter))
    plan, out = replace(small_plan(tmp_path), rows=rows), tmp_path / "out"
    evaluate(plan, tiny.engine(), out, progress=False)
    made = count_answers(monkeypatch)

    save_adapter(tmp_path, "links", seed=2)
    evaluate(plan, tiny.engine(), out, progress=False)
    assert {row for row, _ in made} == {"link"}
    assert len(made) == 3

    made.clear()
    renamed = (replace(rows[0], name="everything"), rows[1])
    evaluate(replace(plan, rows=renamed), tiny.engine(), out, progress=False)
    assert made == []
    assert results(out)["rows"]["everything"]["small"]["questions"] == 3

    evaluate(replace(plan, chunks=2), tiny.engine(), out, progress=False)
    assert len(made) == 6
    made.clear()
    evaluate(replace(plan, max_new_tokens=5), tiny.engine(), out, progress=False)
    assert len(made) == 6
    made.clear()
    evaluate(plan, tiny.engine(), out, progress=False)
    assert made == []
    other = tiny.engine(prompt=PromptTemplate("Other words:\n", "{question}"))
    evaluate(plan, other, out, progress=False)
    assert {row for row, _ in made} == {row.name for row in plan.rows}


def test_an_adapters_digest_is_over_its_weights():
    same = [tiny_adapters.adapter(seed=3).fingerprint for _ in range(2)]
    assert same[0] == same[1]
    others = [
        tiny_adapters.adapter(seed=4),
        tiny_adapters.adapter(seed=3, kind="whole-model"),
        tiny_adapters.adapter(seed=3, lora=False),
        tiny_adapters.adapter(seed=3, layout="shared"),
    ]
    assert len({same[0], *(other.fingerprint for other in others)}) == 5


def test_shards_fill_one_folder(tmp_path, monkeypatch):
    plan = small_plan(tmp_path)
    evaluate(plan, tiny.engine(), tmp_path / "whole", progress=False)
    made = count_answers(monkeypatch)
    for shard in range(2):
        evaluate(plan, tiny.engine(), tmp_path / "parts", shard=(shard, 2), progress=False)
    assert len(made) == 6
    names = sorted(path.name for path in (tmp_path / "parts").glob("answers*"))
    assert names == ["answers-0-of-2.jsonl", "answers-1-of-2.jsonl"]
    assert results(tmp_path / "parts") == results(tmp_path / "whole")


def test_lines_can_be_read_by_people(tmp_path):
    plan, out = small_plan(tmp_path), tmp_path / "out"
    evaluate(plan, tiny.engine(), out, progress=False)
    lines = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert len(lines) == 6
    first = lines[0]
    assert (first["set"], first["id"], first["row"]) == ("small", "q0", "full")
    assert first["question"] == "How tall is it?"
    assert first["gold"] == ["330 m", "e"]
    assert first["tokens"] <= 4
    assert first["scores"]["em"] == float("e" in first["answer"].lower())


def test_a_prompt_that_does_not_fit_loses_its_last_chunks(tmp_path):
    long = ["x" * 1500] * 4
    plan = Plan((Row("reuse", "reuse"),), (write_set(tmp_path, texts=long),), max_new_tokens=8)
    runner = Runner(plan, tiny.engine())
    items = make_items(plan, [read_set(plan.sets[0])], runner.engines)
    assert {(len(item.chunks), item.dropped) for item in items} == {(2, 2)}
    evaluate(replace(plan, questions=1), tiny.engine(), tmp_path / "out", progress=False)
    about = results(tmp_path / "out")["sets"]["small"]
    assert (about["questions"], about["cut_prompts"], about["dropped_chunks"]) == (1, 1, 2)
    huge = read_set(write_set(tmp_path, texts=["x" * 5000]))
    with pytest.raises(InputError, match="not even its first chunk"):
        make_items(plan, [huge], runner.engines)


def test_long_documents_of_summaries_are_cut_into_chunks(tmp_path):
    words = " ".join(f"word{i}." for i in range(100))
    row = {"id": 1, "docs": [{"text": words}, {"title": "T", "text": "short"}], "summary": "words"}
    (tmp_path / "news.jsonl").write_text(json.dumps(row))
    plan = Plan((Row("reuse", "reuse"),), (str(tmp_path / "news.jsonl"),))
    engine = tiny.engine()
    (item,) = make_items(plan, [read_set(plan.sets[0])], Runner(plan, engine).engines)
    assert len(item.chunks) > 2
    assert all(len(engine.layout.encode_text(chunk.text)) <= 300 for chunk in item.chunks)
    said = "".join(chunk.text for chunk in item.chunks[:-1])
    assert said.replace(" ", "") == words.replace(" ", "")
    assert [chunk.title for chunk in item.chunks] == [None] * (len(item.chunks) - 1) + ["T"]
    assert item.max_new_tokens == 128
    evaluate(replace(plan, max_new_tokens=4), engine, tmp_path / "out", progress=False)
    found = results(tmp_path / "out")
    assert found["sets"]["news"]["kind"] == "summary"
    assert set(found["rows"]["reuse"]["news"]) == {"questions", "rouge_l"}


def test_groups_take_turns_and_stay_small(monkeypatch):
    monkeypatch.setattr(run_module, "GROUP_QUESTIONS", 3)
    monkeypatch.setattr(run_module, "GROUP_TOKENS", 100)

    def item(name, tokens):
        return Item(name, "qa", "id", "?", (), (), 8, tokens=tokens)

    items = [item("a", 10) for _ in range(4)] + [item("b", 60) for _ in range(3)]
    made = groups([*items, item("b", 500)])
    assert [[each.set for each in group] for group in made] == [
        ["a"] * 3, ["b"], ["a"], ["b"], ["b"], ["b"],
    ]  # fmt: skip


def test_rows_that_cannot_be(tmp_path):
    with pytest.raises(AdapterRequiredError, match="--adapter"):
        Row("link", "link")
    plain = save_adapter(tmp_path, "plain", layout=None)
    with pytest.raises(AdapterRequiredError, match="no link tokens"):
        Runner(Plan((Row("link", "link", plain),)), tiny.engine())
    few = save_adapter(tmp_path, "few", slots=2)
    plan = Plan((Row("few", "link", few),), (write_set(tmp_path),))
    with pytest.raises(InputError, match=r"'few' cannot answer small: 4 chunks.*--chunks"):
        evaluate(plan, tiny.engine(), tmp_path / "out", progress=False)
    evaluate(
        replace(plan, chunks=2, questions=1, max_new_tokens=2),
        tiny.engine(),
        tmp_path / "out",
        progress=False,
    )
