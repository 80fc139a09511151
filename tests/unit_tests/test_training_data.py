from __future__ import annotations

import gzip
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny

from kvlink_rag import Chunk, InputError, KVLinkEngine
from kvlink_rag.adapters.links import LinkTokens
from kvlink_rag.training.data import CONTINUE, HELD_OUT, SUMMARIZE, Lessons, held_out
from kvlink_rag.training.lesson import Lesson, Turn
from kvlink_rag.training.pack import IGNORED, Packer
from kvlink_rag.training.settings import TrainSettings

Row = dict[str, Any]

# One row of each kind. Every text in it names the row by `#number.`, so that what a lesson holds
# tells which rows it is made of.


def question(number: int, gold: int = 1, distractors: int = 3) -> Row:
    docs = [
        {"title": f"g{at}", "text": f"gold {at} #{number}.", "gold": True} for at in range(gold)
    ]
    docs += [
        {"title": "d", "text": f"distractor {at} #{number}.", "gold": False}
        for at in range(distractors)
    ]
    return {"question": f"Which one #{number}.", "answers": [f"that #{number}."], "docs": docs}


def article(number: int, paragraphs: int = 12, distill: bool = False) -> Row:
    qas = [{"question": f"What #{number}.", "answers": [f"this #{number}."]}]
    texts = [f"paragraph {at} #{number}." for at in range(paragraphs)]
    row = {
        "article": f"An_article_#{number}.",
        "paragraphs": [{"text": text, "qas": qas} for text in texts],
    }
    return {**row, "distill": True} if distill else row


def words(number: int, count: int = 400) -> str:
    return " ".join(f"word{at}#{number}." for at in range(count))


def summary(number: int, documents: int = 2) -> Row:
    docs = [{"title": "t", "text": words(number)} for _ in range(documents)]
    return {"docs": docs, "summary": f"in short #{number}."}


def instruction(number: int) -> Row:
    messages = [
        {"role": "user", "content": f"Do it #{number}."},
        {"role": "assistant", "content": f"Done #{number}."},
    ]
    return {"messages": messages}


def text(number: int) -> Row:
    return {"title": f"Title #{number}.", "text": words(number)}


KINDS: dict[str, Callable[[int], Row]] = {
    "question": question,
    "article": article,
    "summary": summary,
    "instruction": instruction,
    "text": text,
}


def write(path: Path, rows: Sequence[Any]) -> str:
    opened: Any = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def settings(data: str | dict[str, float], **changes: Any) -> TrainSettings:
    shares = {data: 1.0} if isinstance(data, str) else data
    return TrainSettings(**{"model": "none", "data": shares, "max_chunks": 5, **changes})


def rows_of(lesson: Lesson) -> set[int]:
    """The rows that a lesson is made of."""
    texts = [f"{chunk.title} {chunk.text}" for chunk in lesson.chunks]
    texts += [f"{turn.question} {turn.answer}" for turn in lesson.turns]
    return {int(number) for part in texts for number in re.findall(r"#(\d+)\.", part)}


# What each kind of row becomes


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_lessons(tmp_path, kind, ending):
    path = write(tmp_path / f"data.{ending}", [KINDS[kind](number) for number in range(60)])
    lessons = list(Lessons(settings(path), 40))
    assert len(lessons) == 40
    assert {lesson.source for lesson in lessons} == {kind}
    for lesson in lessons:
        assert lesson.turns
        assert all(turn.answer.strip() for turn in lesson.turns)
        assert all(chunk.text.strip() for chunk in lesson.chunks)
        assert len(lesson.chunks) <= 5


def test_a_question_has_all_its_gold_documents_and_its_own_distractors_first(tmp_path):
    path = write(tmp_path / "q.jsonl", [question(n, gold=2, distractors=9) for n in range(60)])
    for lesson in Lessons(settings(path), 50):
        [row] = rows_of(lesson)
        texts = [chunk.text for chunk in lesson.chunks]
        assert {f"gold 0 #{row}.", f"gold 1 #{row}."} <= set(texts)
        assert lesson.turns == (Turn(f"Which one #{row}.", f"that #{row}."),)
        assert len(set(texts)) == len(texts)


def test_a_question_without_enough_distractors_borrows_those_of_others(tmp_path):
    path = write(tmp_path / "q.jsonl", [question(n, distractors=0) for n in range(60)])
    for lesson in Lessons(settings(path, min_chunks=4), 50):
        assert len(set(lesson.chunks)) == len(lesson.chunks) >= 4
        assert len(rows_of(lesson)) == len(lesson.chunks)


def test_few_rows_give_fewer_chunks_and_none_of_them_twice(tmp_path):
    path = write(tmp_path / "q.jsonl", [question(n, distractors=0) for n in range(4)])
    for lesson in Lessons(settings(path, min_chunks=5), 30):
        assert len(lesson.chunks) == 3  # one of four rows is held out
        assert len(set(lesson.chunks)) == 3


def test_more_gold_documents_than_chunks_allowed_are_left_out(tmp_path):
    # the layout `slot` has embeddings for so many chunks only
    path = write(tmp_path / "q.jsonl", [question(n, gold=7) for n in range(60)])
    for lesson in Lessons(settings(path, max_chunks=3, layout="slot", slots=3), 30):
        assert len(lesson.chunks) == 3
        assert all(chunk.text.startswith("gold") for chunk in lesson.chunks)


def test_documents_without_marks_are_all_gold(tmp_path):
    row = {"question": "Q?", "answers": ["a"], "docs": [{"text": f"doc {n}"} for n in range(4)]}
    path = write(tmp_path / "q.jsonl", [row] * 3)
    for lesson in Lessons(settings(path, min_chunks=2), 10):
        assert {chunk.text for chunk in lesson.chunks} == {f"doc {n}" for n in range(4)}


def test_an_article_asks_several_questions_about_its_paragraphs(tmp_path):
    rows = [article(n) for n in range(60)]
    for row in rows:
        for at, paragraph in enumerate(row["paragraphs"]):
            paragraph["qas"] = [
                {"question": f"{paragraph['text']} {q}?", "answers": [f"answer {at}"]}
                for q in range(2)
            ]
    lessons = list(Lessons(settings(write(tmp_path / "a.jsonl", rows), turns=3), 80))
    assert {len(lesson.turns) for lesson in lessons} == {3}
    borrowed = 0
    for lesson in lessons:
        texts = [chunk.text for chunk in lesson.chunks]
        for turn in lesson.turns:  # each question is about a paragraph that is there
            assert turn.question.rpartition(" ")[0] in texts
        titles = Counter(chunk.title for chunk in lesson.chunks)
        assert all("_" not in str(title) for title in titles)
        borrowed += len(titles) > 1
    assert 20 < borrowed < 70


def test_a_short_article_is_filled_up_with_paragraphs_of_others(tmp_path):
    path = write(tmp_path / "a.jsonl", [article(n, paragraphs=1) for n in range(60)])
    for lesson in Lessons(settings(path, min_chunks=3), 50):
        assert 3 <= len(lesson.chunks) <= 5
        assert len(set(lesson.chunks)) == len(lesson.chunks)


def test_paragraphs_that_nobody_asked_about_are_to_be_continued(tmp_path):
    row = article(0)
    for paragraph in row["paragraphs"]:
        paragraph["qas"] = []
    [turn] = Lessons(settings(write(tmp_path / "a.jsonl", [row])), 1)[0].turns
    assert turn.question == CONTINUE
    assert turn.answer in {paragraph["text"] for paragraph in row["paragraphs"]}


def test_a_summary_is_learnt_from_documents_in_pieces(tmp_path):
    lesson = Lessons(settings(write(tmp_path / "s.jsonl", [summary(7)])), 1)[0]
    assert lesson.turns == (Turn(SUMMARIZE, "in short #7."),)
    assert len(lesson.chunks) == 5  # 800 words are more than 5 pieces
    assert words(7).startswith(" ".join(chunk.text for chunk in lesson.chunks[:3]))


def test_an_instruction_has_no_chunks(tmp_path):
    lesson = Lessons(settings(write(tmp_path / "i.jsonl", [instruction(7)])), 1)[0]
    assert lesson.chunks == ()
    assert lesson.turns == (Turn("Do it #7.", "Done #7."),)


def test_text_is_by_itself_or_continues_the_pieces_before_it(tmp_path):
    path = write(tmp_path / "t.jsonl", [text(n) for n in range(60)])
    lessons = list(Lessons(settings(path), 60))
    alone = [lesson for lesson in lessons if not lesson.chunks]
    assert 15 < len(alone) < 45
    for lesson in lessons:
        [turn], [row] = lesson.turns, rows_of(lesson)
        if lesson.chunks:
            assert turn.question == CONTINUE
            assert {chunk.title for chunk in lesson.chunks} == {f"Title #{row}."}
        else:
            assert turn.question == ""
        pieces = [*(chunk.text for chunk in lesson.chunks), turn.answer]
        assert " ".join(pieces) in words(row)


def test_text_of_one_word(tmp_path):
    path = write(tmp_path / "t.jsonl", [{"text": "word"}] * 3)
    assert {lesson.turns for lesson in Lessons(settings(path), 5)} == {(Turn("", "word"),)}


def test_lessons_without_gold_answers_are_made_for_the_base_models_distribution(tmp_path):
    made = {
        kind: write(tmp_path / f"{kind}.jsonl", [KINDS[kind](n) for n in range(60)])
        for kind in KINDS
    }
    made["own"] = write(tmp_path / "own.jsonl", [article(n, distill=True) for n in range(3)])
    flags = {}
    for kind, path in made.items():
        [flags[kind]] = {lesson.distill for lesson in Lessons(settings(path), 20)}
    assert flags == {
        "question": False,
        "article": False,
        "summary": False,
        "instruction": True,
        "text": True,
        "own": True,
    }


def test_other_answers_are_learnt_too(tmp_path):
    row = {**question(1), "answers": ["the usual", 1937]}
    path = write(tmp_path / "q.jsonl", [row] * 3)
    learnt = Counter(lesson.turns[0].answer for lesson in Lessons(settings(path), 200))
    assert learnt.keys() == {"the usual", "1937"}
    assert 0.75 < learnt["the usual"] / 200 < 0.95  # seven in ten, and half of the others


# Chance


def test_number_of_chunks_and_place_of_the_gold_one_are_random(tmp_path):
    path = write(tmp_path / "q.jsonl", [question(n, distractors=9) for n in range(60)])
    counts, places = Counter(), Counter()
    for lesson in Lessons(settings(path, min_chunks=2, max_chunks=5), 400):
        texts = [chunk.text.split()[0] for chunk in lesson.chunks]
        counts[len(texts)] += 1
        if len(texts) == 4:
            places[texts.index("gold")] += 1
    assert counts.keys() == {2, 3, 4, 5}
    assert all(70 < count < 130 for count in counts.values())
    assert places.keys() == {0, 1, 2, 3}
    assert all(count > 0.12 * places.total() for count in places.values())


def test_paragraphs_stand_in_random_order(tmp_path):
    path = write(tmp_path / "a.jsonl", [article(n) for n in range(60)])
    rising = 0
    lessons = list(Lessons(settings(path, min_chunks=5), 60))
    for lesson in lessons:
        numbers = [int(chunk.text.split()[1]) for chunk in lesson.chunks]
        rising += numbers == sorted(numbers)
    assert rising < 6


@pytest.mark.parametrize("kind", KINDS)
def test_same_settings_give_the_same_lessons_in_any_order_of_access(tmp_path, kind):
    path = write(tmp_path / "data.jsonl", [KINDS[kind](n) for n in range(60)])
    first = Lessons(settings(path, seed=3), 40)
    expected = [first[place] for place in range(40)]
    again, places = Lessons(settings(path, seed=3), 40), list(range(40))
    random.Random(0).shuffle(places)
    assert {place: again[place] for place in places} == dict(enumerate(expected))
    assert [again[place] for place in range(40)] == expected
    assert list(Lessons(settings(path, seed=4), 40)) != expected


def test_the_order_of_entries_in_settings_changes_nothing(tmp_path):
    paths = [
        write(tmp_path / f"{kind}.jsonl", [KINDS[kind](n) for n in range(60)])
        for kind in ("question", "text")
    ]
    views = {"link": 0.6, "reuse": 0.4}
    one = settings(dict.fromkeys(paths, 1.0), views=views)
    other = settings(dict.fromkeys(paths[::-1], 1.0), views=dict(reversed(views.items())))
    assert one == other
    assert list(Lessons(one, 30)) == list(Lessons(other, 30))


def test_all_rows_come_before_one_comes_again(tmp_path):
    path = write(tmp_path / "i.jsonl", [instruction(n) for n in range(50)])
    lessons = [rows_of(lesson) for lesson in Lessons(settings(path), 90)]
    trained = {n for n in range(50) if not held_out("instruction", n)}
    assert len(trained) == 45
    assert set().union(*lessons[:45]) == set().union(*lessons[45:]) == trained


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_either_learnt_or_held_out(tmp_path, kind):
    count = 3 * HELD_OUT.get(kind, 10)
    rows = [KINDS[kind](n) for n in range(count)]
    if kind == "question":  # the others' documents are asked for
        rows = [question(n, distractors=1) for n in range(count)]
    path = write(tmp_path / "data.jsonl", rows)
    learnt = set().union(*map(rows_of, Lessons(settings(path), 2 * count)))
    kept = set().union(*map(rows_of, Lessons(settings(path, seed=1), 60, held_out=True)))
    assert learnt | kept == set(range(count))
    assert not learnt & kept
    assert kept == {n for n in range(count) if held_out(kind, n)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_row_is_learnt_and_evaluated(tmp_path, kind):
    path = write(tmp_path / "data.jsonl", [KINDS[kind](0)])
    for evaluation in (False, True):
        assert rows_of(Lessons(settings(path), 3, held_out=evaluation)[2]) == {0}


def test_shares_are_met(tmp_path):
    shares = {"question": 0.5, "text": 0.375, "instruction": 0.125}
    paths = {
        write(tmp_path / f"{kind}.jsonl", [KINDS[kind](n) for n in range(60)]): 4 * share
        for kind, share in shares.items()
    }
    found = Counter(lesson.source for lesson in Lessons(settings(paths), 2000))
    for kind, share in shares.items():
        assert abs(found[kind] / 2000 - share) < 0.04


def test_views_are_met_among_lessons_with_chunks(tmp_path):
    paths = {
        write(tmp_path / f"{kind}.jsonl", [KINDS[kind](n) for n in range(60)]): 1.0
        for kind in ("question", "instruction")
    }
    views = {"link": 0.5, "reuse": 0.375, "full": 0.125}
    lessons = list(Lessons(settings(paths, views=views), 2000))
    found = Counter(lesson.view for lesson in lessons if lesson.chunks)
    assert 800 < found.total() < 1200
    for view, share in views.items():
        assert abs(found[view] / found.total() - share) < 0.06


# Files


def test_a_set_is_found_by_its_name(tmp_path, monkeypatch):
    (tmp_path / "train").mkdir()
    write(tmp_path / "train" / "mine.jsonl.gz", [instruction(7)])
    monkeypatch.setenv("KVLINK_DATA", str(tmp_path))
    assert rows_of(Lessons(settings("mine"), 1)[0]) == {7}


def test_a_path_may_start_at_home(tmp_path, monkeypatch):
    write(tmp_path / "mine.jsonl", [instruction(7)])
    monkeypatch.setenv("HOME", str(tmp_path))
    assert rows_of(Lessons(settings("~/mine.jsonl"), 1)[0]) == {7}


@pytest.mark.parametrize("sets", [True, False], ids=["with sets", "without sets"])
def test_a_missing_file_is_named(tmp_path, monkeypatch, sets):
    monkeypatch.setenv("KVLINK_DATA", str(tmp_path if sets else tmp_path / "none"))
    missing = tmp_path / "missing.jsonl"
    with pytest.raises(InputError, match=re.escape(f"no training data at {missing}")):
        Lessons(settings(str(missing)), 1)


BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "blank": (b"\n\n", "is empty"),
    "no JSON": (b"question,answer\n1,2\n", "cannot be read as JSON lines"),
    "cut": (b'{"text": "whole"}\n{"text": "hal', "cannot be read as JSON lines"),
    "no UTF-8": ('{"text": "Zürich"}'.encode("latin-1"), "cannot be read as JSON lines"),
    "unknown fields": (b'{"prompt": "p", "completion": "c"}', r"\['completion', 'prompt'\]"),
    "no object": (b'["text", "question"]', "the first line has the fields"),
    "a string": (b'"some text"', "the first line has the fields"),
    "no text": (b'{"text": " "}', r"row 1: text.text is ' ', not a text"),
    "text of numbers": (b'{"text": "a"}\n{"text": 3}', r"row 2: text.text is 3, not a text"),
    "another kind": (b'{"text": "a"}\n{"messages": []}', r"row 2: text.text is None"),
    "a row of another type": (b'{"text": "a"}\n[]', r"row 2: text is \[\], not an object"),
    "no answers": (
        b'{"question": "q", "answers": [], "docs": [{"text": "t"}]}',
        r"question.answers is \[\], not a list of 1 or more",
    ),
    "an answer in no list": (
        b'{"question": "q", "answers": "a", "docs": [{"text": "t"}]}',
        "question.answers is 'a', not a list",
    ),
    "a document of another type": (
        b'{"question": "q", "answers": ["a"], "docs": [{"text": "t"}, "t"]}',
        r"question.docs\[1\] is 't', not an object",
    ),
    "no documents": (b'{"docs": [], "summary": "s"}', r"summary.docs is \[\]"),
    "no paragraphs": (b'{"article": "a", "paragraphs": []}', r"article.paragraphs is \[\]"),
    "no questions": (
        b'{"paragraphs": [{"text": "t"}]}',
        r"article.paragraphs\[0\].qas is None, not a list",
    ),
    "a question without answers": (
        b'{"paragraphs": [{"text": "t", "qas": [{"question": "q"}]}]}',
        r"article.paragraphs\[0\].qas\[0\].answers is None",
    ),
    "no response": (
        b'{"messages": [{"role": "user", "content": "c"}]}',
        "instruction.messages is .*, not a list of 2 or more",
    ),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz"])
def test_a_bad_file_is_named_and_what_is_wrong_with_it(tmp_path, case, ending):
    content, message = BAD[case]
    path = tmp_path / f"bad.{ending}"
    path.write_bytes(gzip.compress(content) if ending.endswith("gz") else content)
    with pytest.raises(InputError, match=message) as caught:
        Lessons(settings(str(path)), 1)
    assert str(path) in str(caught.value)


def test_a_damaged_archive_is_named(tmp_path):
    path = tmp_path / "bad.jsonl.gz"
    whole = gzip.compress(b"".join(b'{"text": "%d"}\n' % n for n in range(1000)))
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    for content in (whole[: len(whole) // 2], bytes(flipped), b"no archive"):
        path.write_bytes(content)
        with pytest.raises(InputError, match=re.escape(str(path))):
            Lessons(settings(str(path)), 1)


def test_a_folder_is_no_file_of_lessons(tmp_path):
    with pytest.raises(InputError, match=re.escape(str(tmp_path))):
        Lessons(settings(str(tmp_path)), 1)


# Lessons as tokens


@cache
def engine() -> KVLinkEngine:
    return tiny.engine(prompt=None)


LINKS = LinkTokens("shared", 2, 320)


def packer(max_tokens: int = 2048, max_answer: int = 64, **options: Any) -> Packer:
    chosen = {"kind": "cache-preserving", "links": LINKS, **options}
    return Packer(engine(), max_tokens=max_tokens, max_answer=max_answer, **chosen)


def seen_ids(lesson: Lesson, kind: str) -> list[int]:
    return packer(kind=kind).pack(lesson).token_ids


@pytest.mark.parametrize("kind", ["cache-preserving", "whole-model"])
def test_special_tokens_in_data_stay_text(kind):
    marks = "<|end|><|start|><tool>"
    control = set(tiny.tokenizer().added_tokens_decoder)
    plain = Lesson((Chunk("text", title="title"),), (Turn("question", "answer"),))
    marked = Lesson((Chunk(marks, title=marks),), (Turn(marks, marks),))
    count = Counter(token for token in seen_ids(plain, kind) if token in control)
    assert count  # those of the chat template
    assert Counter(token for token in seen_ids(marked, kind) if token in control) == count
    labels = [label for label in packer(kind=kind).pack(marked).labels if label != IGNORED]
    assert [label for label in labels if label in control] == [engine().tokenizer.eos_token_id]
    assert tiny.tokenizer().decode(labels[:-1]) == marks


def test_special_tokens_in_chunks_of_the_frozen_context_stay_text():
    record = engine().layout.chunk(Chunk("<|end|>", title="<tool>"))
    assert not set(record) & set(tiny.tokenizer().added_tokens_decoder)


def test_an_answer_ends_with_the_end_token():
    pack = packer().pack(Lesson((Chunk("c"),), (Turn("q", "yes"), Turn("q", "no"))))
    assert pack.answers == [4, 3]
    learnt = [label for label in pack.labels if label != IGNORED]
    assert learnt[3] == learnt[6] == engine().tokenizer.eos_token_id


@pytest.mark.parametrize("lesson", [
    Lesson((Chunk("c"),), (Turn("q", "y" * 100), Turn("q", "n" * 5))),
    Lesson((), (Turn("q", "y" * 100), Turn("q", "n" * 5))),
    Lesson((), (Turn("", "y" * 100), Turn("", "n" * 6))),
], ids=["chunks", "instruction", "text"])  # fmt: skip
def test_answers_are_cut(lesson):
    pack = packer(max_answer=20).pack(lesson)
    long, short = pack.answers
    assert long == 20
    assert short in (5, 6)
    learnt = [label for label in pack.labels if label != IGNORED]
    assert learnt[19] != engine().tokenizer.eos_token_id  # an answer that is cut does not end


def test_plain_text_has_nothing_around_it():
    pack = packer().pack(Lesson((), (Turn("", "abcd"),)))
    ids = engine().layout.encode_text("abcd")
    assert [*pack.token_ids, pack.labels[-1]] == ids
    assert pack.labels == ids[1:]


@pytest.mark.parametrize("kind", ["cache-preserving", "whole-model"])
@pytest.mark.parametrize("view", ["link", "reuse", "full"])
@pytest.mark.parametrize("lesson", [
    Lesson(tuple(Chunk(f"{n}" * 150) for n in range(9)), (Turn("why?", "y" * 100),)),
    Lesson((Chunk("long" * 500),), (Turn("why?", "y" * 100),)),
    Lesson((Chunk("c"),), (Turn("why? " * 300, "y" * 100), Turn("short", "no"))),
    Lesson((), (Turn("why? " * 300, "y" * 100),)),
    Lesson((), (Turn("", "y" * 3000),)),
], ids=["many chunks", "long chunk", "long question", "long instruction", "text"])  # fmt: skip
def test_long_lessons_are_cut(kind, view, lesson):
    pack = packer(600, 1000, kind=kind, distill=0.5).pack(Lesson(lesson.chunks, lesson.turns, view))
    assert max([*pack.positions, *pack.context]) < 600
    assert all(count >= 1 for count in pack.answers)
    assert len(pack.answers) == len(lesson.turns)
    assert pack.teacher is not None
    assert len(pack.teacher) == sum(pack.answers)


def test_a_question_loses_its_middle_not_the_templates_words():
    ask = "a" + "m" * 2000 + "z"
    pack = packer(400).pack(Lesson((), (Turn(ask, "yes"),)))
    read = tiny.tokenizer().decode(pack.token_ids)
    assert read.startswith("<|start|>system")
    assert "z<|end|>\n<|start|>assistant\n" in read
    assert len(pack.token_ids) <= 400


def test_chunks_that_do_not_fit_are_left_out_at_the_end():
    lesson = Lesson(tuple(Chunk(f"{n}" * 150) for n in range(9)), (Turn("why?", "yes"),))
    pack = packer(600, links=None, kind="whole-model").pack(Lesson(lesson.chunks, lesson.turns))
    read = tiny.tokenizer().decode(pack.token_ids)
    assert "0" * 150 in read
    assert "1" * 150 in read
    assert "5" not in read
