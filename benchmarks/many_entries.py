"""A folder with many caches: opening it, looking one up, counting, and making room.

    python benchmarks/many_entries.py --entries 50000

Caches are small (what is measured does not depend on their size, but for reading them); each is
stored by an ordinary put.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from kvlink_rag.chunk import ChunkKV
from kvlink_rag.common.progress import bar
from kvlink_rag.store import Budget, FolderStore

REPEATS = 200


def record_of(number: int) -> ChunkKV:
    keys = torch.full((2, 1, 4, 8), float(number % 1000))
    return ChunkKV((number, 1, 2, 3), (), "model", keys, keys)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def fill(path: Path, entries: int) -> None:
    store = FolderStore(path)
    with bar("Storing", entries) as show:
        for number in range(entries):
            store.put(record_of(number), [f"document {number // 10}"])
            show(number + 1)
    store.close()


def spread(times: list[float]) -> str:
    low, middle, high = (statistics.quantiles(times, n=20)[i] for i in (0, 9, 18))
    return f"{1000 * middle:.3f} ms (5 to 95 %: {1000 * low:.3f} to {1000 * high:.3f})"


def measure(path: Path, entries: int) -> None:
    def opened() -> None:
        FolderStore(path).close()

    print(f"open and close    {spread([seconds(opened) for _ in range(20)])}")
    store, chance = FolderStore(path), random.Random(0)
    keys = [record_of(chance.randrange(entries)).key for _ in range(REPEATS)]
    absent = [record_of(entries + n).key for n in range(REPEATS)]
    print(f"has               {spread([seconds(lambda k=k: store.has(k)) for k in keys])}")
    print(f"has, not there    {spread([seconds(lambda k=k: store.has(k)) for k in absent])}")
    print(f"get and verify    {spread([seconds(lambda k=k: store.get(k)) for k in keys])}")
    print(f"stat              {spread([seconds(store.stat) for _ in range(20)])}")
    print(f"usage             {spread([seconds(store.usage) for _ in range(20)])}")
    fresh = [record_of(2 * entries + n) for n in range(2 * REPEATS)]
    times = [seconds(lambda r=r: store.put(r, ["new"])) for r in fresh[:REPEATS]]
    print(f"put               {spread(times)}")
    store.set_budget(Budget(store.stat().nbytes))
    times = [seconds(lambda r=r: store.put(r, ["new"])) for r in fresh[REPEATS:]]
    print(f"put that evicts   {spread(times)}, {store.usage().evicted} evicted")
    store.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--entries", type=int, default=50_000)
    parser.add_argument("--folder", type=Path, help="one that was filled before, or a new one")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        path = arguments.folder or Path(scratch, "kv")
        if not path.exists():
            fill(path, arguments.entries)
        print(f"{arguments.entries} entries")
        measure(path, arguments.entries)


if __name__ == "__main__":
    main()
