from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvlink_rag import InputError
from kvlink_rag.training.settings import TrainSettings, parse_shares, read_settings

FOLDER = Path(__file__).parents[2] / "training"
CONFIGS = sorted(FOLDER.rglob("*.json"))


def settings(**changes: Any) -> TrainSettings:
    return TrainSettings(**{"data": {"a.jsonl": 1.0}, **changes})


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"kind": "whole"}, r"kind must be one of \('cache-preserving', 'whole-model'\), not 'whole'"),
    ({"layout": "head"}, "layout must be one of .*, not 'head'"),
    ({"layout": None}, "layout must be one of .*, not None"),
    ({"encode_behind": "nothing"}, "encode_behind must be one of .*, not 'nothing'"),
    *(
        ({name: 0}, f"{name} must be at least 1, not 0")
        for name in (
            "slots",
            "alpha",
            "min_chunks",
            "turns",
            "max_tokens",
            "max_answer",
            "steps",
            "batch",
            "accumulate",
            "save_steps",
        )
    ),
    ({"steps": "100"}, "steps must be a whole number, not '100'"),
    ({"steps": 1.5}, "steps must be a whole number, not 1.5"),
    ({"batch": True}, "batch must be a whole number, not True"),
    ({"links": None}, "links must be a whole number, not None"),
    ({"learning_rate": "fast"}, "learning_rate must be a number, not 'fast'"),
    ({"learning_rate": 0}, "learning_rate must be above 0, not 0"),
    ({"learning_rate": float("nan")}, "learning_rate must be a number, not nan"),
    ({"link_learning_rate": -1e-3}, "link_learning_rate must be above 0, not -0.001"),
    ({"warmup": 1.1}, "warmup must be between 0 and 1, not 1.1"),
    ({"start": 5}, "start must be an adapter's folder or name, not 5"),
    ({"start": ""}, "start must be an adapter's folder or name, not ''"),
    ({"distill": -0.1}, "distill must be between 0 and 1, not -0.1"),
    ({"distill": 2}, "distill must be between 0 and 1, not 2"),
    ({"seed": -1}, "seed must be between 0 and 4294967294, not -1"),
    ({"seed": 2**32}, "seed must be between 0 and 4294967294, not 4294967296"),
    ({"links": -1}, "nothing to train with links -1 and rank 16"),
    ({"rank": -1}, "nothing to train with links 5 and rank -1"),
    ({"links": 0, "rank": 0}, "nothing to train with links 0 and rank 0"),
    ({"min_chunks": 5, "max_chunks": 4}, "max_chunks 4 is less than min_chunks 5"),
    ({"layout": "slot", "slots": 9}, "max_chunks 10 needs as many slots, not 9"),
    ({"model": ""}, "model must be a hub id or a folder, not ''"),
    ({"data": {}}, "data needs entries with shares above 0, not {}"),
    ({"data": {"a": 0.0}}, "data needs entries with shares above 0"),
    ({"data": {"a": 2, "b": -1}}, "data needs entries with shares above 0"),
    ({"data": {"a": "1"}}, "data must have a number for each name"),
    ({"data": {"a": float("inf")}}, "data must have a number for each name"),
    ({"data": {Path("a"): 1}}, "data must have a number for each name"),
    ({"data": ["a"]}, r"data must have a number for each name, not \['a'\]"),
    ({"data": "a"}, "data must have a number for each name, not 'a'"),
    ({"views": {}}, "views needs entries with shares above 0, not {}"),
    ({"views": {"link": 1, "linked": 1}}, r"views are .*, not \['linked'\]"),
    ({"views": ["link"]}, "views must have a number for each name"),
    ({"links": 0}, "without link tokens .* give views without link"),
    ({"views": {"reuse": 1}}, "the 5 link tokens would never be trained"),
    ({"views": {"reuse": 1, "link": 0}}, "the 5 link tokens would never be trained"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[str(case) for case, _ in WRONG])
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        settings(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"links": 0, "views": {"reuse": 0.7, "full": 0.3}},
        {"links": 0, "views": {"link": 0, "reuse": 1}},
        {"rank": 0},
        {"layout": "slot", "slots": 10},
        {"layout": "tail"},
        {"kind": "whole-model", "encode_behind": "header"},
        {"min_chunks": 1, "max_chunks": 1},
        {"warmup": 0, "distill": 1, "learning_rate": 1, "seed": 2**32 - 2},
        {"data": {"a": 1, "b": 0}},
    ],
    ids=str,
)
def test_possible_settings_are_taken_and_kept_as_json(changes):
    made = settings(**changes)
    assert TrainSettings(**json.loads(json.dumps(made.to_json()))) == made


def test_what_chunks_are_encoded_behind_goes_with_the_kind():
    assert settings().behind == "system"
    assert settings(kind="whole-model").behind == "alone"
    assert settings(kind="whole-model", encode_behind="system").behind == "system"
    assert settings(encode_behind="alone").behind == "alone"


# Files


def test_a_file_gives_settings_and_changes_replace_its_own(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"data": {"a": 2}, "links": 3, "steps": 7}))
    assert read_settings(path) == TrainSettings(data={"a": 2}, links=3, steps=7)
    changed = read_settings(path, steps=9, data={"b": 1.0})
    assert changed == TrainSettings(data={"b": 1.0}, links=3, steps=9)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("{", "cannot be read"),
        ("[1, 2]", r"must be a JSON object, not \[1, 2\]"),
        ('"text"', "must be a JSON object, not 'text'"),
        ('{"data": {"a": 1}, "stepz": 5, "link": 1}', r"unknown entries \['link', 'stepz'\]"),
    ],
    ids=["missing", "no JSON", "a list", "a string", "unknown entries"],
)
def test_a_bad_file_is_named(tmp_path, content, message):
    path = tmp_path / "run.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        read_settings(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("value", ['"10"', "0", "null", "10.0"])
def test_impossible_values_in_a_file_are_refused(tmp_path, value):
    path = tmp_path / "run.json"
    path.write_text(f'{{"data": {{"a": 1}}, "steps": {value}}}')
    with pytest.raises(InputError, match="steps must be"):
        read_settings(path)


def test_there_are_committed_configurations():
    assert CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(FOLDER)))
def test_committed_configurations_are_readable(path):
    made = read_settings(path)
    assert made.data
    assert sum(made.data.values()) == pytest.approx(1)
    assert sum(made.views.values()) == pytest.approx(1)


# Shares on the command line


def test_shares_stand_behind_paths():
    given = ["docs", "a.jsonl=0.25", "dir/b.jsonl=3"]
    assert parse_shares(given) == {"docs": 1.0, "a.jsonl": 0.25, "dir/b.jsonl": 3.0}
    assert parse_shares([]) == {}


def test_an_existing_path_may_have_a_mark_in_its_name(tmp_path):
    path = tmp_path / "size=0.5"
    path.mkdir()
    assert parse_shares([str(path), f"{path}=2"]) == {str(path): 2.0}
    assert parse_shares([str(path)]) == {str(path): 1.0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.jsonl=half", "'half' is no share, give a number"),
        ("a.jsonl=", "'' is no share, give a number"),
        ("=0.5", "names no file or folder"),
        ("", "names no file or folder"),
    ],
)
def test_a_bad_share_is_named(text, message):
    with pytest.raises(InputError, match=message):
        parse_shares([text])
