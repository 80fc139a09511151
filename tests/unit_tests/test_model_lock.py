"""One thread computes at a time, and leaves no OpenMP team behind."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from kvlink_rag.runners.transformers.model_lock import ModelLock

CHILD = """
import json, os, sys, time
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(6)
import tiny

def threads():
    return len(os.listdir("/proc/self/task"))

def left(most):
    '''Threads more than before, once they are few enough: they end in their own time.'''
    until = time.monotonic() + 10
    while threads() - before > most and time.monotonic() < until:
        time.sleep(0.01)
    return threads() - before

engine = tiny.engine("llama")
before = threads()
torch.ones(512, 512) @ torch.ones(512, 512)
found = [threads() - before]
engine.index(["a b c", "d e"], progress=False)
found.append(left(0))
engine.answer("Why?", ["a b c"], max_new_tokens=3)
found.append(left(2))
print(json.dumps(found))
"""


def test_one_thread_at_a_time_and_the_same_again() -> None:
    lock, inside, most = ModelLock(), 0, 0

    def work() -> None:
        nonlocal inside, most
        for _ in range(20):
            with lock, lock:
                inside += 1
                most = max(most, inside)
                time.sleep(0.0005)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (inside, most) == (0, 1)


def test_an_error_lets_go_of_the_lock() -> None:
    lock = ModelLock()
    with pytest.raises(ZeroDivisionError), lock:
        raise ZeroDivisionError
    other = threading.Thread(target=lambda: lock.__enter__() or lock.__exit__(None, None, None))
    other.start()
    other.join(30)
    assert not other.is_alive()


@pytest.mark.skipif(
    not list(Path(torch.__file__).parent.glob("lib/libgomp*.so*")),
    reason="torch is built without GCC's OpenMP",
)
def test_teams_are_let_go_of() -> None:
    """The team of a matrix product is there, and gone after indexing and after an answer."""
    tests = str(Path(__file__).parent.parent)
    child = subprocess.run(
        [sys.executable, "-c", CHILD, tests], capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr
    team, indexed, answered = json.loads(child.stdout.splitlines()[-1])
    assert team == 5
    assert indexed <= 0
    # threads that load caches are no team
    assert answered <= 2
