"""Threads: results in order, the first error, and new ones in a forked process."""

from __future__ import annotations

import multiprocessing
import threading

import pytest

from kvlink_rag.common.threads import Threads


def test_results_come_in_order() -> None:
    later = threading.Event()

    def act(number: int) -> int:
        if number == 0:
            assert later.wait(30)
        else:
            later.set()
        return number * 2

    assert Threads("t", 2).all(act, range(4)) == [0, 2, 4, 6]


def test_one_needs_no_thread() -> None:
    threads = Threads("t", 2)
    assert threads.all(lambda _: threading.get_ident(), [0]) == [threading.get_ident()]
    assert threads.all(lambda _: 0, []) == []
    assert threading.get_ident() not in threads.all(lambda _: threading.get_ident(), [0, 1])


def test_an_error_reaches_the_caller() -> None:
    with pytest.raises(ZeroDivisionError):
        Threads("t", 2).all(lambda n: 1 // n, [1, 0, 2])


@pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="processes cannot be forked here"
)
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own() -> None:
    threads = Threads("t", 2)
    threads.all(abs, [-1, -2])
    fork = multiprocessing.get_context("fork")
    found = fork.Queue()
    child = fork.Process(target=lambda: found.put(threads.all(abs, [-3, -4])))
    child.start()
    try:
        assert found.get(timeout=60) == [3, 4]
    finally:
        child.kill()
        child.join()
