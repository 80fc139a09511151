"""A folder store used by several processes, and by processes that are killed.

Run as a script, this file is what those processes do.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from effort import times

import kvlink_rag.store
from kvlink_rag.chunk import ChunkKV
from kvlink_rag.store import FolderStore

KILLS = times(full=15, quick=4)
ROUNDS = 60


def make_record(number: int) -> ChunkKV:
    keys = torch.full((2, 1, 2, 4), float(number))
    return ChunkKV((number, number + 1), (), "model-a", keys, keys + 1)


def is_right(record: ChunkKV | None, number: int) -> bool:
    return record is not None and bool((record.keys == number).all())


def run(what: str, *arguments: object) -> subprocess.Popen[str]:
    root = Path(kvlink_rag.store.__file__).parents[2]
    path = os.pathsep.join([str(root), str(root / "tests")])
    return subprocess.Popen(
        [sys.executable, __file__, what, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(process: subprocess.Popen[str]) -> None:
    _, errors = process.communicate()
    assert process.returncode == 0, errors


def test_two_processes_share_a_folder(tmp_path: Path) -> None:
    """They put and release the same few keys, so that they get in each other's way."""
    workers = [run("share", tmp_path / "kv", name) for name in ("a", "b")]
    for worker in workers:
        wait_for(worker)
    store = FolderStore(tmp_path / "kv", "raw")
    check = store.verify()
    assert check.clean
    assert check.unreferenced == []
    # what each referred to at the end is there: no release of the other took it away
    assert store.stat().entries == 2
    assert is_right(store.get(make_record(0).key), 0)
    assert is_right(store.get(make_record(1).key), 1)
    store.close()


def share(path: str, name: str) -> None:
    store = FolderStore(path, "raw")
    for turn in range(ROUNDS):
        number = turn % 4
        store.put(make_record(number), [f"{name} {number}"])
        # referred to by this process: whatever the other one releases, it is there
        assert is_right(store.get(make_record(number).key), number)
        assert store.release([f"{name} {number}"]) in (0, 1)
        if turn % 20 == 0:
            store.prune()
    for number in range(2):
        store.put(make_record(number), [f"{name} {number}"])
    store.close()


def test_killed_while_putting(tmp_path: Path) -> None:
    wait_for(run("kill", tmp_path / "kv", "put"))


def test_killed_while_releasing(tmp_path: Path) -> None:
    wait_for(run("kill", tmp_path / "kv", "release"))


def keep_putting(store: FolderStore, say: Callable[[int], None]) -> None:
    for number in range(10**6):
        store.put(make_record(number), [f"document {number}"])
        say(number)


def check_put(store: FolderStore, said: list[int]) -> None:
    """What was acknowledged is there, with its reference."""
    references = set(store.references())
    for number in said:
        key = make_record(number).key
        assert is_right(store.get(key), number), number
        assert (f"document {number}", key) in references


def keep_releasing(store: FolderStore, say: Callable[[int], None]) -> None:
    for number in range(10**6):
        store.put(make_record(number), [f"document {number}", "always"] if number % 2 else ["once"])
        store.release(["once"])
        say(number)


def check_released(store: FolderStore, said: list[int]) -> None:
    """What was released is gone, the others are there."""
    for number in said:
        found = store.get(make_record(number).key)
        assert is_right(found, number) if number % 2 else found is None, number


def kill_at_random_instants(path: str, what: str) -> None:
    """Fork a worker, kill it, check what it left; torch is imported only once."""
    work, check = (keep_putting, check_put) if what == "put" else (keep_releasing, check_released)
    acknowledged = Path(f"{path}.acknowledged")
    chance = random.Random(0)
    for _ in range(KILLS):
        acknowledged.write_bytes(b"")
        worker = os.fork()
        if worker == 0:
            log = os.open(acknowledged, os.O_WRONLY | os.O_APPEND)

            def say(number: int, log: int = log) -> None:
                os.write(log, b"%d\n" % number)  # outlives the process

            work(FolderStore(path, "raw"), say)
        while not acknowledged.read_bytes():
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.1))
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)
        said = [int(line) for line in acknowledged.read_text().split("\n")[:-1]]
        store = FolderStore(path, "raw")
        assert store.verify().corrupt == []
        check(store, said)
        store.prune()
        check(store, said)
        assert store.verify().clean
        store.close()


if __name__ == "__main__":
    if sys.argv[1] == "share":
        share(*sys.argv[2:])
    else:
        kill_at_random_instants(*sys.argv[2:])
