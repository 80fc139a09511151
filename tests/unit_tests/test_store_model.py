"""A folder under random operations and faults, against a simple model of what it must hold."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from effort import times
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
)

from kvlink_rag.chunk import ChunkKV
from kvlink_rag.errors import KVLinkWarning, StoreError
from kvlink_rag.store import Budget, FolderStore
from kvlink_rag.store.folder.files import ChunkFiles

pytestmark = pytest.mark.usefixtures("raw_folders")

NUMBERS = st.integers(0, 5)
DOCUMENTS = st.sampled_from(["a/1", "a/2", "é"])
SIZE = 1000
"""Bytes that no file exceeds."""


def record_of(number: int) -> ChunkKV:
    """Of 1 to 3 tokens; the same number has the same contents."""
    tokens = number % 3 + 1
    keys = torch.full((1, 1, tokens, 2), float(number))
    return ChunkKV((number,) * tokens, (), "model", keys, -keys)


KEYS = {record_of(number).key: number for number in range(10)}


class FolderMachine(RuleBasedStateMachine):
    """``there`` is what must be found, ``maybe`` what a fault or the budget may have taken."""

    handles = Bundle("handles")

    def __init__(self) -> None:
        super().__init__()
        self.path = Path(tempfile.mkdtemp())
        self.stores: list[FolderStore] = []
        self.there: set[int] = set()
        self.maybe: set[int] = set()
        self.references: set[tuple[str, int]] = set()
        self.pins: set[str] = set()
        self.budget = Budget()

    def teardown(self) -> None:
        for store in self.stores:
            store.close()
        shutil.rmtree(self.path)

    def file(self, number: int) -> Path:
        return self.stores[0].path_of(record_of(number).key)

    def pinned(self, number: int) -> bool:
        return any((document, number) in self.references for document in self.pins)

    def may_evict(self) -> None:
        """The budget may have taken anything that is not pinned."""
        if self.budget != Budget():
            taken = {number for number in self.there if not self.pinned(number)}
            self.there -= taken
            self.maybe |= taken

    @initialize(target=handles, files=st.one_of(st.none(), st.integers(1, 3)), pinned=st.booleans())
    def first(self, files: int | None, pinned: bool) -> FolderStore:
        store = self.open()
        self.pin(store, "a/1", pinned)
        self.limit(store, files, None)
        for number, document in enumerate(["a/1", "é", "a/2", "é", "é", "a/2"]):
            self.put(store, number, [document])
            self.get(store, number)
            self.the_budget_holds()
        return store

    @rule(target=handles)
    def open(self) -> FolderStore:
        """Another handle, as another process has it."""
        store = FolderStore(self.path / "kv")
        self.stores.append(store)
        return store

    @rule(store=handles, number=NUMBERS, documents=st.lists(DOCUMENTS, max_size=2))
    def put(self, store: FolderStore, number: int, documents: list[str]) -> None:
        try:
            store.put(record_of(number), documents)
        except StoreError:
            assert self.budget != Budget()
            assert self.pins  # else there is always something to make room
            return
        self.references |= {(document, number) for document in documents}
        self.may_evict()
        self.maybe.discard(number)
        self.there.add(number)  # what is new stays

    @rule(store=handles, number=NUMBERS, number_of_error=st.sampled_from([errno.ENOSPC, errno.EIO]))
    def fail(self, store: FolderStore, number: int, number_of_error: int) -> None:
        def full(*arguments: object) -> None:
            raise OSError(number_of_error, os.strerror(number_of_error))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ChunkFiles, "publish", full)
            with pytest.raises(StoreError):
                store.put(record_of(number), ["failed"])
        self.may_evict()  # what was to make room is gone

    @rule(store=handles, number=NUMBERS)
    def get(self, store: FolderStore, number: int) -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", KVLinkWarning)
            found = store.get(record_of(number).key)
        if found is None:
            assert number not in self.there
            self.maybe.discard(number)
        else:
            assert not caught
            assert number in self.there | self.maybe
            right = record_of(number)
            assert found.is_for("model", (), right.token_ids)
            assert torch.equal(found.keys, right.keys)
            assert torch.equal(found.values, right.values)

    @rule(store=handles, number=NUMBERS, document=DOCUMENTS)
    def refer(self, store: FolderStore, number: int, document: str) -> None:
        store.refer([(document, record_of(number).key)])
        self.references.add((document, number))
        self.may_evict()

    @rule(store=handles, document=DOCUMENTS, keep=st.lists(NUMBERS, max_size=2))
    def release(self, store: FolderStore, document: str, keep: list[int]) -> None:
        store.release([document], keep=[record_of(number).key for number in keep])
        let_go = {(d, n) for d, n in self.references if d == document and n not in keep}
        self.references -= let_go
        for _, number in let_go:
            if not any(n == number for _, n in self.references):
                self.there.discard(number)
                self.maybe.discard(number)
                assert not store.has(record_of(number).key)

    @rule(store=handles, document=DOCUMENTS, on=st.booleans())
    def pin(self, store: FolderStore, document: str, on: bool) -> None:
        (store.pin if on else store.unpin)([document])
        (self.pins.add if on else self.pins.discard)(document)

    @rule(
        store=handles,
        files=st.one_of(st.none(), st.integers(1, 3)),
        document_files=st.one_of(st.none(), st.integers(1, 2)),
    )
    def limit(self, store: FolderStore, files: int | None, document_files: int | None) -> None:
        self.budget = Budget(
            files and files * SIZE,
            document_files and document_files * SIZE,
            {"a/": 2 * SIZE} if document_files else {},
        )
        store.set_budget(self.budget)
        self.may_evict()

    @rule(number=NUMBERS, place=st.integers(0, 10**6), bit=st.integers(0, 8))
    def damage(self, number: int, place: int, bit: int) -> None:
        """Flip a bit, or cut the file off there."""
        path = self.file(number)
        if path.exists():
            data = bytearray(path.read_bytes())
            place %= len(data)
            if bit < 8:
                data[place] ^= 1 << bit
            path.write_bytes(data if bit < 8 else data[:place])
            self.there.discard(number)  # now to be found damaged, and dropped

    @rule(number=NUMBERS)
    def vanish(self, number: int) -> None:
        self.file(number).unlink(missing_ok=True)
        self.there.discard(number)
        self.maybe.discard(number)

    @rule(store=handles)
    def prune(self, store: FolderStore) -> None:
        store.prune()
        unreferenced = {n for n in self.there if not any(m == n for _, m in self.references)}
        self.there -= unreferenced
        self.maybe -= unreferenced
        check = store.verify()
        assert check.clean
        assert check.unreferenced == []

    @rule(store=handles)
    def count(self, store: FolderStore) -> None:
        stat, usage = store.stat(), store.usage()
        assert stat.entries == sum(model.entries for model in usage.models)
        assert stat.nbytes == sum(model.nbytes for model in usage.models)
        assert (usage.budget, sorted(store.pinned())) == (self.budget, sorted(self.pins))

    @invariant()
    def nothing_is_lost(self) -> None:
        if self.stores:
            for number in self.there:
                assert self.stores[0].has(record_of(number).key), number

    @invariant()
    def the_budget_holds(self) -> None:
        limit = self.budget.max_bytes
        if limit is not None:
            files = list((self.path / "kv" / "chunks").rglob("*.safetensors"))
            fixed = [path for path in files if self.pinned(KEYS[path.stem])]
            size = sum(path.stat().st_size for path in files)
            assert size <= max(limit, sum(path.stat().st_size for path in fixed))


FolderMachine.TestCase.settings = settings(
    max_examples=times(full=60, quick=15),
    stateful_step_count=40,
    deadline=None,
    derandomize=True,  # the suite is the same every time; look further with another profile
    suppress_health_check=list(HealthCheck),
)
TestFolder = FolderMachine.TestCase
