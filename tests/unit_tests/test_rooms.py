"""Memory that is used again, and never while somebody has it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny
import torch

from kvlink_rag.chunk import ChunkKV
from kvlink_rag.store import one_pass
from kvlink_rag.store.codec import coded
from kvlink_rag.store.rooms import LEAST, Rooms

SIZE = 3 * LEAST


def test_memory_is_used_again_when_nobody_has_it() -> None:
    rooms = Rooms()
    first = rooms.take(SIZE)
    place, view = first.data_ptr(), first[LEAST:].view(torch.float32)
    del first
    assert rooms.nbytes == 0  # a view has it
    other = rooms.take(SIZE)
    assert other.data_ptr() != place
    del view
    again = rooms.take(SIZE - 5)
    assert again.data_ptr() == place
    assert len(again) == SIZE - 5


def test_an_array_of_a_tensor_keeps_it() -> None:
    rooms = Rooms()
    array = rooms.take(SIZE).numpy()[5:]
    assert rooms.nbytes == 0
    del array
    assert rooms.nbytes == SIZE


def test_the_smallest_that_fits_is_taken_and_none_much_too_large() -> None:
    rooms = Rooms()
    large, small = rooms.take(SIZE + 100), rooms.take(SIZE)
    places = small.data_ptr(), large.data_ptr()
    del large, small
    kept = [rooms.take(SIZE - 1), rooms.take(SIZE)]
    assert [each.data_ptr() for each in kept] == list(places)
    del kept
    rooms.take(SIZE // 2)
    assert rooms.nbytes == 2 * SIZE + 100 + SIZE // 2


def test_no_more_is_kept_than_was_said() -> None:
    rooms = Rooms(kept=2 * SIZE)
    held = [rooms.take(SIZE) for _ in range(4)]
    held.clear()
    assert rooms.nbytes == 2 * SIZE
    rooms.take(LEAST - 1)
    assert rooms.nbytes == 2 * SIZE  # small ones are the allocator's


def test_threads_never_share() -> None:
    rooms, wrong = Rooms(), []
    ready = threading.Barrier(4)

    def use(number: int) -> None:
        ready.wait()
        for _ in range(50):
            mine = rooms.take(SIZE)[: LEAST // 8]
            mine.fill_(number)
            if not bool((mine == number).all()):
                wrong.append(number)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(use, range(4)))
    assert not wrong
    assert 0 < rooms.nbytes <= 8 * SIZE  # a thread has its next one before it lets go of one


@pytest.mark.parametrize("dtype", one_pass.DTYPES)
def test_caches_are_decoded_into_it_and_stay_what_they_are(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(one_pass, "ROOMS", Rooms())
    shape, rope = (4, 2, 9000, 16), tiny.engine("llama").architecture.groups

    def record(seed: int) -> ChunkKV:
        keys, values = torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed))
        ids = tuple(range(shape[2]))
        return ChunkKV(ids, (), "model", keys.to(dtype), values.to(dtype), rope)

    first = coded(record(0), "int8")
    before = first.keys.clone(), first.values.clone()
    second = coded(record(1), "int8")
    places = {second.keys.data_ptr(), second.values.data_ptr()}
    del second
    third = coded(record(2), "int8")
    assert {third.keys.data_ptr(), third.values.data_ptr()} == places
    assert torch.equal(first.keys, before[0])
    assert torch.equal(first.values, before[1])
