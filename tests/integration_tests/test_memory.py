"""What an answer costs in memory: the chunks' caches once, however many questions share them."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from kvlink_rag import Chunk, KVLinkEngine
from kvlink_rag.runners.transformers.models import DEFAULT_MODEL
from kvlink_rag.store import open_store

pytestmark = [
    pytest.mark.model,
    pytest.mark.slow,
    pytest.mark.skipif(
        not Path("/proc/self/clear_refs").exists(), reason="peak memory is measured on Linux"
    ),
]
QUESTIONS = 16

CHILD = """
import json, sys, threading
from pathlib import Path
from kvlink_rag import Chunk, KVLinkEngine
from kvlink_rag.runners.transformers import number_type

def status(name):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024

def peak(act):
    '''Bytes of memory at most while acting, mapped files among them, above those before.'''
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    act()
    return status("VmHWM") - before

model, store, texts, how, in_float32 = json.loads(sys.stdin.read())
number_type.float32_is_faster = lambda dtype: in_float32  # whatever the processor says
# what `recompute` computes anew is each question's own
engine = KVLinkEngine.from_pretrained(model, store=store, strategy="reuse")
engine.answer("Are you ready?", ["Ready is who has begun."], max_new_tokens=2)
chunks = [Chunk(text) for text in texts]
reports = []

def ask(number):
    answer = engine.answer(f"What is said about number {number}?", chunks, max_new_tokens=8)
    reports.append(answer.report)

def threads():
    all = [threading.Thread(target=ask, args=(number,)) for number in range(QUESTIONS)]
    for each in all:
        each.start()
    for each in all:
        each.join()

def batch():
    asked = [(f"What is said about number {number}?", chunks) for number in range(QUESTIONS)]
    reports.extend(answer.report for answer in engine.answer_batch(asked, max_new_tokens=8))

used = peak({"one": lambda: ask(0), "threads": threads, "batch": batch}[how])
print(json.dumps([used, reports[0].bytes_read, [r.misses for r in reports]]))
""".replace("QUESTIONS", str(QUESTIONS))


TEXTS = [f"Report {n}. " + f"The number {n} comes before {n + 1}. " * 40 for n in range(10)]
"""Of about 400 tokens."""


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A store of each codec with the texts' caches."""
    stores = {codec: str(tmp_path_factory.mktemp(codec)) for codec in ("raw", "int8")}
    engine = KVLinkEngine.from_pretrained(DEFAULT_MODEL)
    for codec, store in stores.items():
        twin = engine.with_store(open_store(store, codec=codec))
        twin.index([Chunk(text) for text in TEXTS], progress=False)
    return stores


def measured(store: str, how: str, in_float32: bool) -> tuple[float, Any]:
    """Peak memory in units of the context's cache as it is stored, and the misses."""
    child = subprocess.run(
        [sys.executable, "-c", CHILD],
        input=json.dumps([DEFAULT_MODEL, store, TEXTS, how, in_float32]),
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    used, nbytes, misses = json.loads(child.stdout.splitlines()[-1])
    times = used / nbytes
    print(f"{how}, {in_float32=}: {used / 1e6:.0f} MB, {times:.2f} times {nbytes / 1e6:.0f} MB")
    return times, misses


@pytest.mark.parametrize("in_float32", [False, True], ids=["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("codec", "how", "questions", "most"),
    [
        ("raw", "one", 1, 1.3),
        ("raw", "threads", QUESTIONS, 2),
        ("raw", "batch", QUESTIONS, 2),
        # of half the bytes: what questions have of their own weighs twice as much
        ("int8", "one", 1, 1.5),
        ("int8", "threads", QUESTIONS, 3.2),
        ("int8", "batch", QUESTIONS, 3.2),
    ],
)
def test_caches_are_held_once(
    indexed: dict[str, str], codec: str, how: str, questions: int, most: float, in_float32: bool
) -> None:
    times, misses = measured(indexed[codec], how, in_float32)
    assert misses == [0] * questions
    assert 0.9 < times <= most


READER = """
import gc, json, sys
from pathlib import Path
import torch
from kvlink_rag.chunk import ChunkKV
from kvlink_rag.rope import RopeGroup
from kvlink_rag.store import FolderStore

def resident():
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

folder, codec, reads = json.loads(sys.stdin.read())
store = FolderStore(folder, codec)
keys = torch.ones(2, 2, 40, 16)
rope = (RopeGroup(slice(0, 2), torch.ones(8)),)
record = ChunkKV(tuple(range(40)), (), "model", keys, keys, rope)
store.put(record)
key = record.key_as(codec)
assert store.get(key) is not None
marks = [resident()]
for _ in range(5):
    for _ in range(reads):
        store.get(key)
    marks.append(resident())
print(json.dumps(marks))
"""


@pytest.mark.parametrize("codec", ["raw", "int8"])
def test_reading_a_cache_leaves_nothing_in_memory(codec: str, tmp_path: Path) -> None:
    """Over as many reads as 1,500 answers of ten chunks make. Tables grow by leaps; what is lost in
    reading, in each part alike."""
    reads = 3000
    found = subprocess.run(
        [sys.executable, "-c", READER],
        input=json.dumps([str(tmp_path), codec, reads]),
        capture_output=True,
        text=True,
        check=True,
    )
    marks = json.loads(found.stdout)
    grown = [(after - before) / reads for before, after in pairwise(marks)]
    assert min(grown) < 20, f"bytes a read: {grown}"
