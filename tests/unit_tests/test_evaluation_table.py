"""The table, configurations and the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
from tiny_sets import save_adapter, write_set
from typer.testing import CliRunner

from kvlink_rag import AdapterRequiredError, InputError
from kvlink_rag.cli import app
from kvlink_rag.cli import evaluate as evaluate_module
from kvlink_rag.evaluation.plan import Plan, Row, make_rows, plan_of, read_plan
from kvlink_rag.evaluation.run import evaluate
from kvlink_rag.evaluation.table import AVERAGE, results, write

ROWS = (Row("full", "full"), Row("reuse", "reuse"))


@pytest.fixture
def out(tmp_path):
    """Two sets of eight questions, answered by two rows, with scores that are known."""
    sets = tuple(write_set(tmp_path, name, questions=8) for name in ("first", "second"))
    folder = tmp_path / "out"
    evaluate(Plan(ROWS, sets, max_new_tokens=2), tiny.engine(), folder, progress=False)
    lines = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    for line in lines:
        odd = int(line["id"][1]) % 2
        em = odd if line["row"] == "full" else 1
        line["scores"] = {"em": em, "f1": em / 2 if line["set"] == "first" else 0.25}
    set_lines(folder, lines)
    return folder


def set_lines(folder, lines):
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "answers.jsonl").write_text(text)


def test_scores_and_differences(out):
    found = results(out)
    full, reuse = found["rows"]["full"], found["rows"]["reuse"]
    assert full["first"]["questions"] == 8
    assert (full["first"]["em"]["mean"], full["first"]["f1"]["mean"]) == (0.5, 0.25)
    assert 0 < full["first"]["em"]["low"] < 0.5 < full["first"]["em"]["high"] < 1
    assert reuse["second"]["em"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    assert full[AVERAGE]["questions"] == 16
    assert full[AVERAGE]["em"]["mean"] == 0.5
    assert reuse[AVERAGE]["f1"]["mean"] == (0.5 + 0.25) / 2
    assert found["reference"] == "full"
    assert set(found["differences"]) == {"reuse"}
    difference = found["differences"]["reuse"]["first"]
    assert difference["em"]["mean"] == 0.5
    assert difference["em"]["p"] == pytest.approx(2 / 2**4)  # four of four better
    assert found["differences"]["reuse"]["second"]["f1"]["p"] == 1.0


def test_the_table_for_people(out):
    text = write(out)
    assert (out / "results.md").read_text() == text + "\n"
    assert json.loads((out / "results.json").read_text()) == results(out)
    half = 50 * (lambda em: em["high"] - em["low"])(results(out)["rows"]["full"]["first"]["em"])
    lines = text.splitlines()
    assert f"| row | first (8) | second (8) | {AVERAGE} (16) |" in lines
    assert "|---|---|---|---|" in lines
    (full,) = [line for line in lines if line.startswith("| full |")]
    assert full.startswith(f"| full | 50.0 ± {half:.1f} / 25.0 ± {half / 2:.1f} | 50.0 ± ")
    (em, f1) = [line for line in lines if line.startswith("| reuse | +")]
    assert em.startswith("| reuse | +50.0 (+")
    assert "p 0.125" in em
    assert "| +0.0 (+0.0 to +0.0), p 1.000 |" in f1
    assert "threads 1" in text.lower()
    assert "max_new_tokens 2" in text


def test_what_is_missing_shows(out):
    lines = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    first = [line for line in lines if line["set"] == "first"]
    set_lines(out, [line for line in first if line["row"] == "full" or line["id"] != "q0"])
    text = write(out)
    assert results(out)["differences"]["reuse"]["first"]["questions"] == 7
    assert AVERAGE not in results(out)["rows"]["full"]
    (reuse,) = [line for line in text.splitlines() if line.startswith("| reuse | 100")]
    assert reuse.endswith("(of 7) | - | - |")


def test_lines_of_other_runs_are_left_out(out, tmp_path):
    plan = Plan(ROWS[:1], (str(tmp_path / "first.jsonl"),), questions=2, max_new_tokens=2)
    evaluate(plan, tiny.engine(), out, progress=False)
    found = results(out)
    assert list(found["rows"]) == ["full"]
    assert found["rows"]["full"] == {"first": found["rows"]["full"]["first"]}
    assert found["rows"]["full"]["first"]["questions"] == 2


def test_an_empty_folder_has_no_table(tmp_path):
    with pytest.raises(InputError, match="run kvlink eval"):
        results(tmp_path)


def test_rows_of_strategies_and_adapters():
    rows = make_rows(["none", "full", "link"], ["a/x", "b/y"])
    assert [(row.name, row.strategy, row.adapter) for row in rows] == [
        ("none", "none", None),
        ("full", "full", None),
        ("full x", "full", "a/x"),
        ("link x", "link", "a/x"),
        ("full y", "full", "b/y"),
        ("link y", "link", "b/y"),
    ]
    with pytest.raises(AdapterRequiredError, match="'link' needs an adapter"):
        make_rows(["full", "link"], [])
    with pytest.raises(InputError, match="'fast' is none of none, full"):
        make_rows(["fast"], [])


def test_a_plan_is_read_as_it_was_written(tmp_path):
    plan = Plan(ROWS, ("a", "b"), questions=3, reference="reuse", text=("t.jsonl",))
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan.as_dict()))
    assert plan_of(read_plan(path)) == plan


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rows": [{"name": "a", "strategy": "full"}] * 2}, "two rows are named 'a'"),
        ({"rows": []}, "no rows"),
        ({"rows": ["full"]}, "not a list of objects"),
        ({"rows": [{"strategy": "full"}]}, "no 'name'"),
        ({"rows": [{"name": "a", "strategy": "full", "k": 1}]}, "'k', and knows only name"),
        ({"row": []}, "'row', and knows only rows"),
        ({"questions": 0}, "questions is 0"),
        ({"chunks": "two"}, "chunks is 'two'"),
        ({"reference": "best"}, "'best' is no row"),
        ({"rows": [{"name": "a", "strategy": "reuse", "encode_behind": "x"}]}, "encode_behind 'x'"),
        ({"rows": [{"name": "a", "strategy": "full", "recompute": -1}]}, "is -1"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(InputError, match=message):
        plan_of({"rows": [{"name": "full", "strategy": "full"}], **settings})


@pytest.mark.parametrize(("name", "sets"), [("link5", 5), ("ablation", 5), ("codecs", 3)])
def test_the_committed_configurations_are_plans(name, sets):
    plan = plan_of(read_plan(Path(__file__).parents[2] / "benchmarks" / f"eval_{name}.json"))
    assert plan.reference_row is not None
    assert len(plan.sets) == sets


class Shell:
    """Runs ``kvlink eval`` with a tiny model."""

    def __init__(self, folder, monkeypatch):
        self.out = folder / "results"
        self.loads = []
        monkeypatch.setattr(
            evaluate_module,
            "load_engine",
            lambda name, **_: self.loads.append(name) or tiny.engine(),
        )

    def __call__(self, *options):
        arguments = ["eval", "--out", str(self.out), *map(str, options)]
        return CliRunner().invoke(app, arguments)


@pytest.fixture
def shell(tmp_path, monkeypatch):
    return Shell(tmp_path, monkeypatch)


def test_the_command(shell, tmp_path):
    data = write_set(tmp_path, questions=4)
    adapter = save_adapter(tmp_path, "mine")
    options = ("--data", data, "--adapter", adapter, "--max-new-tokens", 2, "--questions", 3)
    done = shell(*options)
    assert done.exit_code == 0, done.output
    assert (shell.out / "results.md").read_text() in done.stdout
    names = ["full", "reuse", "recompute"]
    names += [f"{name} mine" for name in [*names, "link"]]
    assert list(results(shell.out)["rows"]) == names
    assert len((shell.out / "answers.jsonl").read_text().splitlines()) == 7 * 3
    shell.loads.clear()
    again = shell("--table-only")
    assert again.stdout == done.stdout
    assert shell.loads == []


def test_shards_and_configurations(shell, tmp_path):
    config = tmp_path / "plan.json"
    plan = Plan(ROWS, (write_set(tmp_path, questions=4),), "model-name", max_new_tokens=2)
    config.write_text(json.dumps(plan.as_dict()))
    for shard in ("0/2", "1/2"):
        done = shell("--config", config, "--shard", shard, "--questions", 3)
        assert done.exit_code == 0, done.output
    assert shell.loads == ["model-name"] * 2
    assert "| row | small (3) |" in done.stdout
    assert "(of " not in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--data", "nonsense"), "no question set 'nonsense'"),
        (("--data", "nowhere.jsonl"), "no such question set: nowhere.jsonl"),
        (("--strategies", "full,link"), "'link' needs an adapter"),
        (("--strategies", "fast"), "'fast' is none of"),
        (("--shard", "2/2"), "shard '2/2'"),
        (("--text", "nowhere.jsonl"), "no such file: nowhere.jsonl"),
        (("--config", "nowhere.json"), "nowhere.json cannot be read"),
        (("--reference", "best"), "'best' is no row"),
        (("--table-only",), "holds no evaluation"),
        (("--data", "set", "--adapter", "nowhere"), "no adapter at 'nowhere'"),
    ],
)
def test_errors_are_one_line(shell, tmp_path, monkeypatch, options, message):
    (tmp_path / "dev").mkdir()
    write_set(tmp_path / "dev", "set")
    monkeypatch.setenv("KVLINK_DATA", str(tmp_path))
    done = shell(*options)
    assert done.exit_code == 1
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_no_data_folder(shell, tmp_path, monkeypatch):
    monkeypatch.setenv("KVLINK_DATA", str(tmp_path / "nowhere"))
    done = shell()
    assert done.exit_code == 1
    assert "set KVLINK_DATA" in done.stderr
    assert shell.loads == []


def test_a_configuration_with_rows_takes_no_strategies(shell, tmp_path):
    config = tmp_path / "plan.json"
    config.write_text(json.dumps(Plan(ROWS, ("set",)).as_dict()))
    done = shell("--config", config, "--strategies", "full")
    assert done.exit_code == 1
    assert "leave --strategies and --adapter out" in done.stderr
