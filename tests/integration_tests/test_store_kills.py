"""An index in use by two processes that are killed at random instants, on a budget.

Run as a script, this file is what those processes do. KVLINK_KILLS sets how many kills (the suite
makes a few; a thousand take about half an hour).
"""

from __future__ import annotations

import atexit
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from effort import times

from kvlink_rag.chunk import Chunk
from kvlink_rag.index.check import prune_index, verify_index
from kvlink_rag.store import Budget, FolderStore

if TYPE_CHECKING:
    from kvlink_rag import KVLinkEngine
    from kvlink_rag.index.index import KVIndex

KILLS = int(os.environ.get("KVLINK_KILLS", times(full=24, quick=10)))
WORKERS = 2
PLACES = 8
"""Chunks of each worker; the first is pinned."""
VERSIONS = 4
ROOM = 12
"""Caches that fit into the budget."""
QUESTION = "What is said?"

Wanted = dict[str, set[int]]
"""By id: versions that a chunk may have, -1 for none."""


def test_nothing_is_served_wrong_or_lost(tmp_path: Path) -> None:
    import kvlink_rag

    root = Path(kvlink_rag.__file__).parents[1]
    path = os.pathsep.join([str(root), str(root / "tests")])
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path / "index"), str(KILLS)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    words = done.stdout.split()
    assert int(words[words.index("kills") - 1]) == KILLS
    for kind in ("answers", "evicted", "deleted"):
        assert int(words[words.index(kind) - 1]) > 0, done.stdout


def vectors(texts: Any) -> np.ndarray:
    return np.stack([np.random.default_rng(sum(t.encode())).random(8) for t in texts])


def opened(path: Path, engine: KVLinkEngine) -> KVIndex:
    from kvlink_rag.index.index import KVIndex

    # raw: answers are compared with those from caches that were never stored
    return KVIndex.open(path, engine, embeddings=vectors, codec="raw")


def chunk_of(id: str, version: int) -> Chunk:
    worker, place = id.split("/")
    # every third text is also one of the other worker's
    text = f"place {place}" if int(place) % 3 == 2 else f"worker {worker} place {place}"
    return Chunk(f"{text} version {version}", id=id)


def ids_of(worker: int) -> list[str]:
    return [f"{worker}/{place}" for place in range(PLACES)]


class Expected:
    """Answers without any folder."""

    def __init__(self, engine: KVLinkEngine) -> None:
        self._engine = engine.with_store(None)
        self._known: dict[tuple[str, ...], list[int]] = {}

    def __call__(self, chunks: list[Chunk]) -> list[int]:
        key = tuple(chunk.text for chunk in chunks)
        if key not in self._known:
            self._known[key] = self._engine.answer(QUESTION, chunks, max_new_tokens=2).token_ids
        return self._known[key]


def work(
    path: Path, engine: KVLinkEngine, worker: int, seed: int, say: Callable[[str], None]
) -> None:
    """Add, replace, delete and ask until killed; ``say`` what begins, and what is done."""
    chance, expected = random.Random(seed), Expected(engine)
    index = opened(path, engine)
    while True:
        id = chance.choice(ids_of(worker))
        kind = chance.random()
        if kind < 0.45:
            version = chance.randrange(VERSIONS)
            say(f"begin {id} {version}")
            index.add([chunk_of(id, version)], progress=False)
            say(f"done {id} {version}")
        elif kind < 0.55:
            say(f"begin {id} -1")
            index.delete([id])
            say(f"done {id} -1")
        else:
            there = index.get(index.ids())
            chunks = chance.sample(there, min(len(there), chance.randint(1, 3)))
            answer = index.engine.answer(QUESTION, chunks, max_new_tokens=2)
            right = answer.token_ids == expected(chunks)
            say(f"answer {'right' if right else 'WRONG'} {answer.report.hits}")
        if chance.random() < 0.02:
            index.prune()


class Worker:
    """A forked process that works until it is killed."""

    def __init__(self, path: Path, engine: KVLinkEngine, number: int, seed: int) -> None:
        self.number = number
        self.said = path.with_name(f"said-{number}-{seed}")
        self.said.write_bytes(b"")
        self.pid = os.fork()
        if self.pid == 0:
            log = os.open(self.said, os.O_WRONLY | os.O_APPEND)

            def say(line: str) -> None:
                os.write(log, f"{line}\n".encode())  # outlives the process

            try:
                work(path, engine, number, seed, say)
            except BaseException:
                say(f"FAILED {traceback.format_exc()}")
            finally:
                os._exit(1)

    def end(self) -> None:
        """Kill it, if it was not."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = 0

    def kill(self) -> list[str]:
        """What it has said."""
        self.end()
        lines = self.said.read_text().splitlines()
        assert not any("WRONG" in line or "FAILED" in line for line in lines), "\n".join(lines)
        self.said.unlink()
        return lines


def follow(wanted: Wanted, lines: list[str]) -> None:
    for line in lines:
        word, id, version = line.split()
        if word != "answer":
            known = wanted.get(id, {-1}) if word == "begin" else set()
            wanted[id] = known | {int(version)}


def nbytes_of(path: Path) -> int:
    """Of the caches on disk. A file may vanish meanwhile."""
    total = 0
    for folder, _, names in os.walk(path / "kv" / "chunks"):
        for name in names:
            if name.endswith(".safetensors"):
                try:
                    total += Path(folder, name).stat().st_size
                except FileNotFoundError:
                    continue
    return total


def check(
    path: Path, engine: KVLinkEngine, wanted: Wanted, worker: int, budget: int, alone: bool
) -> None:
    """What is acknowledged is there, what is there is right, and not too much of it."""
    assert verify_index(path).corrupt == []
    index = opened(path, engine)
    there = {chunk.document_id: chunk for chunk in index.get(ids_of(worker))}
    for id in ids_of(worker):
        possible = {chunk_of(id, v).text if v >= 0 else None for v in wanted.get(id, {-1})}
        found = there.get(id)
        assert (found.text if found else None) in possible, (id, found, possible)
        if found is not None:
            (key,) = index.engine.keys([found])
            assert (id, key) in index.store.references(id), id
            pinned = id.endswith("/0")
            assert index.store.get(key) is not None or not pinned, f"{id} is pinned"
    if alone:
        assert nbytes_of(path) <= budget, (nbytes_of(path), budget)
        prune_index(path)
        found = verify_index(path)
        assert found.clean, found
        assert found.unreferenced == [], found
    index.close()


def main(path: Path, kills: int) -> None:
    import tiny

    engine = tiny.engine()
    index = opened(path, engine)
    index.add([chunk_of("0/1", 0)], progress=False)
    budget = ROOM * index.store.stat().nbytes
    index.store.set_budget(Budget(budget))
    index.store.pin(f"{worker}/0" for worker in range(WORKERS))
    index.delete(["0/1"])
    index.close()
    engine.answer(QUESTION, ["warm"], max_new_tokens=2)

    chance = random.Random(0)
    wanted: Wanted = {}
    counts = {"answers": 0, "deleted": 0}
    workers = [Worker(path, engine, number, number) for number in range(WORKERS)]
    # an error here must not leave them: they would hold the output open for ever
    atexit.register(lambda: [worker.end() for worker in workers])
    for kill in range(kills):
        victim = chance.randrange(WORKERS)
        started = time.monotonic()
        while len(workers[victim].said.read_bytes()) < 20:
            time.sleep(0.001)
            assert time.monotonic() - started < 120, "a worker does not begin"
        time.sleep(chance.uniform(0, 0.4))
        alone = kill % 10 == 9 or kill == kills - 1
        for number in range(WORKERS) if alone else [victim]:
            lines = workers[number].kill()
            follow(wanted, lines)
            counts["answers"] += sum(line.startswith("answer") for line in lines)
            counts["deleted"] += sum(
                line.startswith("done") and line.endswith("-1") for line in lines
            )
        for number in range(WORKERS) if alone else [victim]:
            check(path, engine, wanted, number, budget, alone and number == WORKERS - 1)
        for number in range(WORKERS) if alone else [victim]:
            workers[number] = Worker(path, engine, number, WORKERS * (kill + 1) + number)
    for worker in workers:
        worker.kill()
    store = FolderStore(path / "kv")
    evicted = store.usage().evicted
    store.close()
    print(
        f"{kills} kills {counts['answers']} answers {evicted} evicted {counts['deleted']} deleted"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
