"""How many processors are free, and that no more threads than that compute."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from kvlink_rag.common import processors
from kvlink_rag.common.processors import free_for, own_running, running
from kvlink_rag.runners.transformers.model_lock import ModelLock

BUSY = "import time\nend = time.monotonic() + 30\nwhile time.monotonic() < end: pass"


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Says how many threads run in all, and how many of them are this process's; 8 processors."""

    def say(seen: object, own: int = 1) -> None:
        (tmp_path / "loadavg").write_text(f"0.20 0.18 0.12 {seen}/80 11206\n")
        for task in range(3):
            folder = tmp_path / "task" / str(task)
            folder.mkdir(parents=True, exist_ok=True)
            state = "R" if task < own else "S"
            (folder / "stat").write_text(f"1 (a (b) R) {state} 1 2 3")

    monkeypatch.setattr(processors, "LOAD", tmp_path / "loadavg")
    monkeypatch.setattr(processors, "OWN", tmp_path / "task")
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    return say


@pytest.mark.parametrize(
    ("seen", "own", "threads", "free"),
    [
        (1, 1, 8, 8),  # only who asks
        (2, 1, 8, 7),  # one other
        (2, 1, 4, 4),  # for whom there is room
        (5, 1, 4, 4),
        (6, 1, 4, 3),
        (6, 3, 4, 4),  # three of these are our own
        (30, 1, 8, 1),
        (0, 0, 8, 8),
        ("?", 1, 8, 8),
        (2, 1, 1, 1),
    ],
)
def test_who_is_free(load, seen: object, own: int, threads: int, free: int) -> None:
    load(seen, own)
    assert free_for(threads) == free


def test_who_runs_for_an_instant_does_not_count(load, monkeypatch: pytest.MonkeyPatch) -> None:
    load(2)
    left = [lambda: load(2), lambda: load(2), lambda: load(1)]
    monkeypatch.setattr(time, "sleep", lambda _: left.pop(0)())
    assert free_for(8) == 8
    assert left == []


def test_systems_that_do_not_tell(load, tmp_path: Path) -> None:
    assert running() == 0  # no such file yet
    assert own_running() == 0
    assert free_for(8) == 8


@pytest.mark.skipif(not processors.LOAD.exists(), reason="this system does not tell")
def test_a_busy_program_is_seen() -> None:
    with subprocess.Popen([sys.executable, "-c", BUSY]) as busy:
        try:
            until = time.monotonic() + 20
            while running() - own_running() < 1 and time.monotonic() < until:
                time.sleep(0.01)
            found = [free_for(os.cpu_count() or 1) for _ in range(20)]
        finally:
            busy.kill()
    assert max(found) <= max((os.cpu_count() or 1) - 1, 1)
    assert own_running() >= 1


class TestLock:
    @pytest.fixture(autouse=True)
    def _two_threads(self):
        before = torch.get_num_threads()
        torch.set_num_threads(2)
        yield
        torch.set_num_threads(before)

    def test_fewer_threads_while_others_run(self, load) -> None:
        load(8)
        lock = ModelLock()
        with lock, lock:
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2

    def test_all_where_there_is_room(self, load) -> None:
        load(7)
        with ModelLock():
            assert torch.get_num_threads() == 2

    def test_also_after_an_error(self, load) -> None:
        load(8)
        with pytest.raises(ZeroDivisionError), ModelLock():
            _ = 1 / 0
        assert torch.get_num_threads() == 2

    def test_what_is_set_inside_without_need_stays(self, load) -> None:
        load(1)
        with ModelLock():
            torch.set_num_threads(3)
        assert torch.get_num_threads() == 3
