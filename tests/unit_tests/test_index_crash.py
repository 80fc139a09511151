"""An index whose processes are killed at random instants, and one that two processes fill.

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
from typing import TYPE_CHECKING, Any, cast

from effort import times

import kvlink_rag
from kvlink_rag.chunk import Chunk
from kvlink_rag.index.check import prune_index, verify_index
from kvlink_rag.index.index import KVIndex

if TYPE_CHECKING:
    from kvlink_rag.index.index import KVIndex

KILLS = times(full=15, quick=4)
IDS = 6


def run(what: str, *arguments: object) -> subprocess.Popen[str]:
    root = Path(kvlink_rag.__file__).parents[1]
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


def test_killed_while_changing(tmp_path: Path) -> None:
    wait_for(run("kill", tmp_path / "index"))


def test_two_processes_fill_one_index(tmp_path: Path) -> None:
    for worker in [run("fill", tmp_path / "index", name) for name in ("a", "b")]:
        wait_for(worker)
    check = verify_index(tmp_path / "index")
    assert check.clean
    assert check.unreferenced == []
    assert check.checked == 2 * 5 + 1


def opened(path: str) -> KVIndex:
    # as a script, this file has its folder on the path
    from test_index import FakeEmbeddings, FakeEngine

    return KVIndex.open(path, cast(Any, FakeEngine()), embeddings=FakeEmbeddings())


def fill(path: str, name: str) -> None:
    index = opened(path)
    for turn in range(10):
        ids = index.add(
            [Chunk(f"{name}{turn} own", id=f"{name} {turn}"), Chunk("shared text", id=name)],
            progress=False,
        )
        assert index.search(f"{name}{turn} own", k=1)[0].id == ids[0]
        if turn % 2:
            assert index.delete(ids[:1]) == 1
    assert len([id for id in index.ids() if id.startswith(f"{name} ")]) == 5
    index.close()


def text_of(place: int, turn: int) -> str:
    return f"word{place} version {turn}"


def keep_changing(index: KVIndex, first: int, say: Callable[[str], None]) -> None:
    """Replace texts, delete and add again; ``say`` what is about to be done, and what is done."""
    for turn in range(first, 10**9):
        place = turn % IDS
        if turn % 5 == 4:
            say(f"begin {place} -1")
            index.delete([str(place)])
            say(f"done {place} -1")
        else:
            say(f"begin {place} {turn}")
            index.add([Chunk(text_of(place, turn), id=str(place))], progress=False)
            say(f"done {place} {turn}")


def check(index: KVIndex, wanted: dict[int, set[int]]) -> None:
    """Every chunk is wholly as it was acknowledged, or as it was about to be."""
    there = {chunk.id: chunk.text for chunk in index.get(index.ids())}
    for place, turns in wanted.items():
        texts = {text_of(place, turn) if turn >= 0 else None for turn in turns}
        text = there.get(str(place))
        assert text in texts, (place, text, texts)
        if text is not None:
            (key,) = index.engine.keys([text])
            assert index.store.get(key) is not None
            assert index.search(text, k=1)[0].id == str(place)
            assert (str(place), key) in index.store.references()
    assert len(index.search("word", k=100)) == len(there)


def kill_at_random_instants(path: str) -> None:
    """Fork a worker, kill it, check what it left; torch is imported only once."""
    said = Path(f"{path}.said")
    chance = random.Random(0)
    wanted: dict[int, set[int]] = {place: {-1} for place in range(IDS)}
    first = 0
    for _ in range(KILLS):
        said.write_bytes(b"")
        worker = os.fork()
        if worker == 0:
            log = os.open(said, os.O_WRONLY | os.O_APPEND)

            def say(line: str, log: int = log) -> None:
                os.write(log, f"{line}\n".encode())  # outlives the process

            keep_changing(opened(path), first, say)
        while not said.read_bytes():
            assert os.waitpid(worker, os.WNOHANG)[0] == 0, "the worker has ended by itself"
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.15))
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)
        for line in said.read_text().splitlines():
            word, place, turn = line.split()
            known = wanted[int(place)] if word == "begin" else set()
            wanted[int(place)] = known | {int(turn)}
            first = max(first, int(turn)) + 1
        assert verify_index(path).corrupt == []
        index = opened(path)
        check(index, wanted)
        index.close()
        prune_index(path)
        assert verify_index(path).clean
        assert verify_index(path).unreferenced == []
        index = opened(path)
        check(index, wanted)
        index.close()


if __name__ == "__main__":
    if sys.argv[1] == "fill":
        fill(*sys.argv[2:])
    else:
        kill_at_random_instants(*sys.argv[2:])
