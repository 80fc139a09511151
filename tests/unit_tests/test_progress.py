"""Bars move by what is done, and tell the time that is left."""

from __future__ import annotations

import io
import re
from contextlib import redirect_stderr

import pytest
import tiny
from rich.progress import Task, TaskID

from kvlink_rag.common.progress import Parts, TimeLeftColumn, bar, token_progress


class Terminal(io.StringIO):
    """A terminal that remembers all that was written to it."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    return Terminal()


def shown(terminal: Terminal) -> str:
    """What was written, without colours."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())


def test_a_bar_of_tokens_tells_their_number_and_the_time_left(terminal: Terminal) -> None:
    with redirect_stderr(terminal), bar("Encoding chunks", 12_000, unit="tokens") as done:
        done(3000)
    assert "12,000/12,000 tokens" in shown(terminal)
    assert re.search(r"tokens \d:\d\d:\d\d 0:00:00 left", shown(terminal))


def test_the_time_left_counts_down_while_a_batch_is_being_done() -> None:
    now = [100.0]
    task = Task(TaskID(0), "", 400, 0, _get_time=lambda: now[0], fields={"at": 0.0})
    task.start_time = 100.0
    column = TimeLeftColumn()
    assert column.render(task).plain == "-:--:-- left"
    now[0], task.completed, task.fields["at"] = 130.0, 100, 30.0
    lefts = []
    for seconds in (0, 10, 500):
        now[0] = 130.0 + seconds
        lefts.append(column.render(task).plain)
    assert lefts == ["0:01:30 left", "0:01:20 left", "0:00:00 left"]


def test_a_bar_is_drawn_only_for_something(terminal: Terminal) -> None:
    for total, progress in ((0, True), (5, False)):
        with redirect_stderr(terminal), token_progress("Encoding", total, progress) as done:
            done(total)
    assert terminal.getvalue() == ""
    with redirect_stderr(terminal), token_progress("Encoding", 5, True) as done:
        done(5)
    assert "5/5 tokens" in shown(terminal)


def test_a_function_is_told_of_each_number_and_the_total(terminal: Terminal) -> None:
    told: list[tuple[int, int]] = []
    tell = token_progress("Encoding", 9, lambda *each: told.append(each))
    with redirect_stderr(terminal), tell as done:
        done(4)
        done(9)
    assert told == [(4, 9), (9, 9)]
    assert terminal.getvalue() == ""


def test_parts_add_up() -> None:
    told: list[int] = []
    parts = Parts(told.append)
    for done in (2, 5):
        parts.tell(done, 5)
    parts.next()
    parts.next()  # one with nothing to do
    parts.tell(3, 3)
    assert told == [2, 5, 8]


def test_an_engine_tells_after_each_batch_of_the_model(terminal: Terminal) -> None:
    engine = tiny.engine()
    engine.runner.batch_tokens = 40
    texts = [f"Fact {n} is a fact of some length, which is {n * n}." for n in range(20)]
    told: list[tuple[int, int]] = []
    with redirect_stderr(terminal):
        report = engine.index([*texts, texts[0]], progress=lambda *each: told.append(each))
    dones = [done for done, _ in told]
    assert len(told) >= 20
    assert dones == sorted(set(dones))
    assert told[-1] == (report.tokens, report.tokens)
    assert {total for _, total in told} == {report.tokens}
    engine.index(texts, progress=lambda *each: pytest.fail("nothing was encoded"))
    assert terminal.getvalue() == ""


def test_a_notebook_without_widgets_gets_the_bar_and_no_advice(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setattr("kvlink_rag.common.progress.find_spec", lambda name: None)
    text = io.StringIO()
    with redirect_stderr(text), bar("Converting", 3) as done:
        done(3)
    assert "3/3" in text.getvalue()
    assert not recwarn.list
