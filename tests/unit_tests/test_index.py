"""The index: texts, vectors and chunk caches that stay together."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import re
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from kvlink_rag.chunk import Chunk, ChunkKV, ScoredChunk, as_chunks
from kvlink_rag.engine.engine import KVLinkEngine
from kvlink_rag.errors import IndexMismatchError, InputError, StoreError
from kvlink_rag.index.catalog import IndexCatalog
from kvlink_rag.index.check import is_index, prune_index, stat_index, verify_index
from kvlink_rag.index.index import BATCH, KVIndex
from kvlink_rag.store import KVStore, MemoryStore

DIM = 16


class FakeEngine:
    """Writes caches as the engine does, and answers with what it was given."""

    def __init__(self, fingerprint: str = "model-a") -> None:
        self.fingerprint = fingerprint
        self.name = f"fake {fingerprint}"
        self.adapter, self.encode_behind = None, "system"
        self.store: KVStore = MemoryStore()
        self.layout = SimpleNamespace(chunk=lambda chunk: self._record(chunk).token_ids)

    def with_store(self, store: KVStore) -> FakeEngine:
        twin = copy.copy(self)
        twin.store = store
        return twin

    def with_encode_behind(self, encode_behind: str, *, override: bool) -> FakeEngine:
        assert not override
        twin = copy.copy(self)
        twin.encode_behind = encode_behind
        return twin

    def _record(self, chunk: Chunk) -> ChunkKV:
        token_ids = tuple(f"{chunk.title or ''}\n{chunk.text}".encode())
        tensor = torch.zeros(1, 1, len(token_ids), 2)
        return ChunkKV(token_ids, (), self.fingerprint, tensor, tensor)

    def keys(self, chunks: Iterable[str | Chunk]) -> list[str]:
        return [self._key(self._record(chunk)) for chunk in as_chunks(chunks)]

    def _key(self, record: ChunkKV) -> str:
        return record.key_as(self.store.codec)

    def index(self, chunks: Iterable[str | Chunk], *, progress: Any = True) -> None:
        listed = as_chunks(chunks)
        distinct = {self._key(record): record for record in map(self._record, listed)}
        lengths = {k: len(r.token_ids) for k, r in distinct.items() if not self.store.has(k)}
        done, total = 0, sum(lengths.values())
        for chunk in listed:
            record = self._record(chunk)
            key = self._key(record)
            if self.store.has(key):
                self.store.refer([(chunk.document_id, key)])
                continue
            if not self.store.cache_after:
                self.store.put(record, [chunk.document_id])
            if callable(progress):
                done += lengths[key]
                progress(done, total)

    def answer(self, question: str, chunks: Sequence[Chunk], **settings: object) -> object:
        return question, [chunk.text for chunk in chunks], settings

    stream = answer


class FakeEmbeddings:
    """The same text has the same vector; texts with a common first word are near."""

    def __init__(self, name: str = "fake", dim: int = DIM) -> None:
        self.name = name
        self.dim = dim
        self.embedded: list[str] = []

    def _vector(self, word: str) -> np.ndarray:
        seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "little")
        return np.random.default_rng(seed).standard_normal(self.dim)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        self.embedded += texts
        return np.stack([5 * self._vector(text.split()[0]) + self._vector(text) for text in texts])


Open = Callable[..., KVIndex]


@pytest.fixture
def open_index(tmp_path: Path) -> Iterator[Open]:
    opened: list[KVIndex] = []

    def open_index(
        folder: Path = tmp_path / "index", fingerprint: str = "model-a", **options: Any
    ) -> KVIndex:
        options.setdefault("embeddings", FakeEmbeddings())
        engine = cast(KVLinkEngine, FakeEngine(fingerprint))
        opened.append(KVIndex.open(folder, engine, **options))
        return opened[-1]

    yield open_index
    for index in opened:
        index.close()


@pytest.fixture
def index(open_index: Open) -> KVIndex:
    return open_index()


def texts(found: Iterable[Chunk]) -> list[str]:
    return [chunk.text for chunk in found]


class TestAddAndSearch:
    def test_what_is_added_is_found(self, index: KVIndex) -> None:
        chunk = Chunk("cats sleep", id="é 日本", title="Über", metadata={"page": 3, "ü": ["x"]})
        assert index.add(["dogs bark", chunk, "birds sing"], progress=False)[1] == "é 日本"
        found = index.search("birds fly", k=2)
        assert found[0].text == "birds sing"
        assert isinstance(found[0], ScoredChunk)
        assert 1 >= found[0].score > found[1].score >= -1
        assert index.get(["é 日本", "unknown"]) == [chunk]
        assert index.get(["é 日本"])[0].metadata == chunk.metadata
        assert len(index) == 3
        assert "é 日本" in index
        assert "unknown" not in index
        assert index.search("Über cats sleep")[0].id == "é 日本"  # the title is searched too

    def test_scores_are_cosines(self, index: KVIndex) -> None:
        index.add(["cats sleep"], progress=False)
        assert index.search("cats sleep")[0].score == pytest.approx(1, abs=1e-5)

    def test_a_function_is_told_of_tokens_over_all_batches(self, index: KVIndex) -> None:
        many = [f"the number {n} is a fact" for n in range(150)]
        index.add(many[:5], progress=False)
        told: list[tuple[int, int]] = []
        index.add([*many, many[0]], progress=lambda *each: told.append(each))
        tokens = index.store.stat().tokens
        dones = [done for done, _ in told]
        assert len(told) >= 3
        assert dones == sorted(set(dones))
        first = sum(len(index.engine.layout.chunk(Chunk(text))) for text in many[:5])
        assert {total for _, total in told} == {dones[-1]} == {tokens - first}
        told.clear()
        index.add(["one more"], progress=lambda *each: told.append(each))
        index.add(many, progress=lambda *each: told.append(each))  # all there
        ((done, total),) = told
        assert done == total == index.store.stat().tokens - tokens

    @pytest.mark.parametrize("cache_after", [0, 1])
    def test_there_is_a_bar_whatever_takes_the_time(
        self, open_index: Open, capsys: pytest.CaptureFixture[str], cache_after: int
    ) -> None:
        many = [f"the number {n} is a fact" for n in range(70)]
        open_index(cache_after=cache_after).add(many)
        shown = capsys.readouterr().err
        assert ("Encoding chunks" in shown, "Adding chunks" in shown) == (
            (True, False) if cache_after == 0 else (False, True)
        )

    def test_an_empty_index_finds_nothing(self, index: KVIndex) -> None:
        assert index.search("cats") == []
        assert index.add([], progress=False) == []
        assert len(index) == 0

    def test_all_chunks_when_k_is_huge(self, index: KVIndex) -> None:
        index.add(["a", "b"], progress=False)
        assert sorted(texts(index.search("a", k=10**12))) == ["a", "b"]

    def test_adding_again_costs_nothing(self, index: KVIndex) -> None:
        embeddings = cast(FakeEmbeddings, index.embeddings)
        first = index.add(["cats", "dogs"], progress=False)
        before = index.stat()
        assert index.add(["dogs", "cats"], progress=False) == first[::-1]
        assert embeddings.embedded == ["cats", "dogs"]
        assert index.stat() == before

    def test_duplicates_in_one_call(self, index: KVIndex) -> None:
        ids = index.add(
            ["cats", "cats", Chunk("old", id="1"), Chunk("new", id="1")], progress=False
        )
        assert ids[0] == ids[1]
        assert ids[2:] == ["1", "1"]
        assert sorted(texts(index.get(index.ids()))) == ["cats", "new"]
        assert index.stat().caches.entries == 2

    def test_another_text_replaces_the_old_one(self, index: KVIndex) -> None:
        index.add([Chunk("cats sleep", id="1"), Chunk("dogs", id="2")], progress=False)
        assert index.search("cats")[0].id == "1"
        index.add([Chunk("birds sing", id="1")], progress=False)
        assert len(index) == 2
        assert set(texts(index.search("cats", k=5))) == {"birds sing", "dogs"}
        assert index.search("birds")[0].id == "1"
        assert index.stat().caches.entries == 2  # the old text's cache is released
        assert index.verify().clean
        assert index.verify().unreferenced == []

    def test_another_title_is_another_text(self, index: KVIndex) -> None:
        index.add([Chunk("cats", id="1", title="a")], progress=False)
        index.add([Chunk("cats", id="1", title="b")], progress=False)
        assert index.get(["1"])[0].title == "b"
        assert index.stat().caches.entries == 1

    def test_other_metadata_costs_no_embedding(self, index: KVIndex) -> None:
        embeddings = cast(FakeEmbeddings, index.embeddings)
        index.add([Chunk("cats", id="1", metadata={"source": "a"})], progress=False)
        index.add([Chunk("cats", id="1", metadata={"source": "b"})], progress=False)
        assert index.get(["1"])[0].metadata == {"source": "b"}
        assert index.catalog.ids(source="b") == ["1"]
        assert index.catalog.ids(source="a") == []
        assert embeddings.embedded == ["cats"]

    def test_more_than_one_batch(self, index: KVIndex) -> None:
        many = [f"word{number} x" for number in range(2 * BATCH + 3)]
        assert len(set(index.add(many, progress=False))) == len(index) == len(many)
        assert index.search("word77 x", k=1)[0].text == "word77 x"

    def test_delete(self, index: KVIndex) -> None:
        ids = index.add(["cats", "dogs", "birds"], progress=False)
        index.search("cats")
        assert index.delete([ids[0], "unknown", ids[0]]) == 1
        assert texts(index.search("cats", k=3))[0] != "cats"
        assert index.ids() == ids[1:]
        assert index.stat().caches.entries == 2
        assert index.verify().clean

    def test_a_cache_two_chunks_share_outlives_one(self, index: KVIndex) -> None:
        index.add([Chunk("cats", id="1"), Chunk("cats", id="2")], progress=False)
        assert index.stat().caches.entries == 1
        index.delete(["1"])
        assert index.stat().caches.entries == 1
        index.delete(["2"])
        assert index.stat().caches.entries == 0

    def test_ask_and_stream_pass_on_what_was_found(self, index: KVIndex) -> None:
        index.add(["cats sleep", "dogs bark"], progress=False)
        answer = cast(Any, index.ask("cats", k=1, max_new_tokens=3))
        assert answer == ("cats", ["cats sleep"], {"max_new_tokens": 3})
        assert cast(Any, index.stream("cats", k=1)) == ("cats", ["cats sleep"], {})

    def test_the_engine_given_keeps_its_store(self, tmp_path: Path) -> None:
        engine = FakeEngine()
        with KVIndex.open(
            tmp_path, cast(KVLinkEngine, engine), embeddings=FakeEmbeddings()
        ) as index:
            assert index.engine.store is index.store
            assert engine.store is not index.store


class TestInput:
    @pytest.mark.parametrize("question", ["", "  ", None, 3])
    def test_questions(self, index: KVIndex, question: Any) -> None:
        with pytest.raises(InputError, match="question"):
            index.search(question)

    @pytest.mark.parametrize("k", [0, -1, 1.5, float("nan"), True, "4"])
    def test_k(self, index: KVIndex, k: Any) -> None:
        with pytest.raises(InputError, match="k is"):
            index.search("cats", k=k)

    @pytest.mark.parametrize(
        "chunk",
        [
            Chunk("a", metadata={"score": float("nan")}),
            Chunk("a", metadata={"when": object()}),
            Chunk("a", metadata={"source": 3}),
            Chunk("a", metadata={"x": "\ud800"}),
            Chunk("a", id="\ud800"),
            Chunk("a", id=cast(str, 3)),
            Chunk("a", title=cast(str, 3)),
            Chunk(""),
        ],
        ids=lambda chunk: re.sub(" at 0x[0-9a-f]+", "", repr(chunk)),  # the same in every process
    )
    def test_a_chunk_that_cannot_be_kept_adds_nothing(self, index: KVIndex, chunk: Chunk) -> None:
        with pytest.raises(InputError):
            index.add(["good", chunk], progress=False)
        assert len(index) == 0
        assert index.stat().caches.entries == 0

    def test_what_is_no_unicode_is_kept_as_the_engine_reads_it(self, index: KVIndex) -> None:
        (id,) = index.add([Chunk("cats \ud800", title="\ud83d\ude00")], progress=False)
        (kept,) = index.get([id])
        assert (kept.text, kept.title) == ("cats \ufffd", "\N{GRINNING FACE}")
        index.add([Chunk("cats \ud800", title="\ud83d\ude00")], progress=False)
        assert len(index) == 1

    @pytest.mark.parametrize("what", ["embeddings", "vectors", "store", "commit"])
    def test_of_an_add_that_fails_nothing_is_left(
        self, what: str, open_index: Open, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        working = FakeEmbeddings()
        broken = {"embeddings": False, "vectors": False}

        def embeddings(texts: Sequence[str]) -> np.ndarray:
            if broken["embeddings"]:
                raise RuntimeError("no embeddings today")
            return working(texts) * (np.nan if broken["vectors"] else 1)

        index = open_index(embeddings=embeddings)
        index.add([Chunk("cats sleep", id="1"), Chunk("dogs bark", id="2")], progress=False)
        before = sorted(index.store.references())
        many = [Chunk(f"bees {n}", id=str(n)) for n in range(2, 12)]  # 2 is another text now
        with monkeypatch.context() as patch:
            if what == "store":
                put, done = index.store.put, []

                def full(record: Any, documents: Any = ()) -> None:
                    if len(done) == 5:
                        raise StoreError("the disk is full")
                    done.append(record)
                    put(record, documents)

                patch.setattr(index.store, "put", full)
            if what == "commit":
                patch.setattr("kvlink_rag.index.index.sql.add_rows", lambda *_: 1 / 0)
            broken |= {what: True}
            with pytest.raises((RuntimeError, InputError, StoreError, ZeroDivisionError)):
                index.add(many, progress=False)
        broken |= {what: False}
        assert sorted(index.store.references()) == before
        assert index.stat().caches.entries == 2
        assert [chunk.text for chunk in index.get(["1", "2"])] == ["cats sleep", "dogs bark"]
        index.add(many, progress=False)
        assert len(index) == 11
        assert index.stat().caches.entries == 11

    def test_bad_vectors_add_no_rows(self, open_index: Open) -> None:
        index = open_index(embeddings=lambda texts: np.full((len(texts), 3), np.nan))
        with pytest.raises(InputError, match=r"lambda.*NaN"):
            index.add(["cats"], progress=False)
        assert len(index) == 0
        assert index.verify().unreferenced == []
        assert index.stat().caches.entries == 0

    def test_one_id_is_no_list(self, index: KVIndex) -> None:
        for use in (index.delete, index.get):
            with pytest.raises(InputError, match="list"):
                use("id")
        with pytest.raises(InputError, match="ids are str"):
            index.delete([cast(str, 1)])


class TestIdentity:
    def test_other_embeddings_are_refused(self, open_index: Open) -> None:
        open_index().add(["cats"], progress=False)
        with pytest.raises(IndexMismatchError, match="'fake', not 'other'"):
            open_index(embeddings=FakeEmbeddings(name="other"))
        with pytest.raises(IndexMismatchError, match="16, the embeddings give 8"):
            open_index(embeddings=FakeEmbeddings(dim=8))
        assert len(open_index()) == 1

    def test_embeddings_that_change_later_are_refused(self, index: KVIndex) -> None:
        index.add(["cats"], progress=False)
        cast(FakeEmbeddings, index.embeddings).dim = 8
        with pytest.raises(IndexMismatchError):
            index.search("cats")
        with pytest.raises(IndexMismatchError):
            index.add(["dogs"], progress=False)
        assert len(index) == 1

    def test_an_empty_index_takes_any(self, open_index: Open) -> None:
        open_index()
        open_index(embeddings=FakeEmbeddings(name="other", dim=8)).add(["cats"], progress=False)

    def test_another_model_is_a_miss(self, open_index: Open) -> None:
        first = open_index()
        first.add([Chunk("cats", id="1")], progress=False)
        other = open_index(fingerprint="model-b")
        assert not other.store.has(other.engine.keys(["cats"])[0])
        other.add([Chunk("cats", id="1")], progress=False)
        assert other.stat().caches.entries == 2
        assert (other.stat().model_name, other.stat().chunks) == ("fake model-a", 1)
        other.add([Chunk("dogs", id="1")], progress=False)  # releases the caches of both models
        assert other.stat().caches.entries == 1
        assert other.stat().model_name == "fake model-b"


class TestSeveralAtOnce:
    def test_each_sees_the_others_changes(self, open_index: Open) -> None:
        one, other = open_index(), open_index()
        ids = one.add(["cats sleep", "dogs bark"], progress=False)
        assert other.search("cats")[0].text == "cats sleep"
        other.add(["birds sing"], progress=False)
        assert one.search("birds")[0].text == "birds sing"
        one.delete(ids[:1])
        assert "cats sleep" not in texts(other.search("cats", k=3))
        assert len(other) == 2

    def test_threads(self, index: KVIndex) -> None:
        wrong: list[BaseException] = []

        def work(name: int) -> None:
            try:
                for turn in range(5):
                    ids = index.add([f"w{name}x{turn} a", f"w{name}y{turn} b"], progress=False)
                    assert index.search(f"w{name}x{turn} a", k=1)[0].id == ids[0]
                    assert index.delete(ids[:1]) == 1
            except BaseException as error:
                wrong.append(error)

        threads = [threading.Thread(target=work, args=(name,)) for name in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
        assert len(index) == index.stat().caches.entries == 15
        assert index.verify().clean


class TestMaintenance:
    def test_works_without_a_model(self, index: KVIndex) -> None:
        index.add([Chunk("cats", id="1"), Chunk("dogs", id="2")], progress=False)
        index.catalog.set_source("a.txt", "digest")
        index.close()
        folder = index.catalog.folder
        assert is_index(folder)
        assert not is_index(folder / "kv")
        stat = stat_index(folder)
        assert (stat.chunks, stat.sources, stat.embedding_dim) == (2, 1, DIM)
        assert (stat.embedding_name, stat.model_name) == ("fake", "fake model-a")
        assert stat.fingerprint == "model-a"
        assert stat.caches.entries == 2
        assert verify_index(folder).clean
        assert prune_index(folder).clean

    def test_caches_of_no_chunk_are_found_and_removed(self, index: KVIndex) -> None:
        index.add(["cats"], progress=False)
        index.engine.index([Chunk("killed before its row was committed", id="9")])
        (key,) = index.engine.keys(["killed before its row was committed"])
        assert verify_index(index.catalog.folder).unreferenced == [key]
        assert prune_index(index.catalog.folder).unreferenced == [key]
        assert verify_index(index.catalog.folder).unreferenced == []
        assert index.stat().caches.entries == 1

    def test_an_interrupted_release_is_finished(
        self, index: KVIndex, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        index.add([Chunk("cats", id="1"), Chunk("dogs", id="2")], progress=False)

        def killed(*_: object, **__: object) -> int:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(index.store, "release", killed)
            with pytest.raises(KeyboardInterrupt):
                index.add([Chunk("birds", id="1")], progress=False)
        assert index.get(["1"])[0].text == "birds"
        assert index.verify().unreferenced == index.engine.keys(["cats"])
        index.delete(["2"])  # whoever writes next finishes it
        assert index.verify().unreferenced == []
        assert index.store.has(index.engine.keys(["birds"])[0])
        assert index.stat().caches.entries == 1

    def test_a_replacement_killed_before_its_commit_leaves_nothing(
        self, index: KVIndex, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        index.add([Chunk("cats", id="1"), Chunk("dogs", id="2")], progress=False)

        def killed(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("kvlink_rag.index.index.sql.add_rows", killed)
            patch.setattr(index, "_undone", lambda _: contextlib.nullcontext())
            with pytest.raises(KeyboardInterrupt):
                index.add([Chunk("birds", id="1")], progress=False)
        assert index.get(["1"])[0].text == "cats"
        assert index.verify().unreferenced == index.engine.keys(["birds"])
        index.delete(["2"])  # whoever writes next finishes it
        assert index.verify().clean
        assert index.store.has(index.engine.keys(["cats"])[0])
        assert index.stat().caches.entries == 1

    def test_damaged_vectors_are_found(self, index: KVIndex) -> None:
        index.add([Chunk("cats", id="1")], progress=False)
        with sqlite3.connect(index.catalog.path) as database:
            database.execute("UPDATE chunks SET embedding = x'00'")
        database.close()
        assert "'1'" in verify_index(index.catalog.folder).corrupt[0]
        with pytest.raises(StoreError, match="chunk '1' is damaged"):
            index.search("cats")

    @pytest.mark.parametrize("data", [b"garbage" * 1000, b"SQLite format 3\0" + b"\xff" * 4096])
    def test_a_damaged_database_is_one_line(self, tmp_path: Path, data: bytes) -> None:
        (tmp_path / "index.sqlite").write_bytes(data)
        for use in (verify_index, prune_index, stat_index, IndexCatalog):
            with pytest.raises(StoreError, match=r"index\.sqlite") as caught:
                use(tmp_path)
            assert "\n" not in str(caught.value)
        assert (tmp_path / "index.sqlite").read_bytes() == data

    def test_a_newer_format(self, index: KVIndex) -> None:
        index.close()
        with sqlite3.connect(index.catalog.path) as database:
            database.execute("PRAGMA user_version = 7")
        database.close()
        with pytest.raises(StoreError, match=r"format 7.*newer"):
            stat_index(index.catalog.folder)

    def test_what_is_no_index_stays_as_it_is(self, tmp_path: Path) -> None:
        with pytest.raises(StoreError, match="no index"):
            stat_index(tmp_path / "nothing")
        assert not (tmp_path / "nothing").exists()

    def test_sources_and_meta(self, index: KVIndex) -> None:
        catalog = index.catalog
        catalog.set_source("b", "1")
        catalog.set_source("a", "2")
        catalog.set_source("b", "3")
        assert catalog.sources() == {"a": "2", "b": "3"}
        catalog.drop_source("a")
        assert catalog.sources() == {"b": "3"}
        assert catalog.meta("x") is None
        catalog.set_meta({"x": "é"})
        assert catalog.meta("x") == "é"


def test_an_index_with_all_that_a_store_can_have(tmp_path: Path) -> None:
    """Encrypted caches on a budget, shared through a remote with an index elsewhere."""
    import tiny  # not above: test_index_crash takes this file's stand-ins from outside of pytest

    chunks = [Chunk(f"Fact {i} is {i * i}.", id=f"id-{i}") for i in range(6)]
    key, remote = b"k" * 32, (tmp_path / "remote").as_uri()
    settings = {"codec": "int8", "encryption_key": key, "remote": remote}

    def opened(name: str, **more: Any) -> KVIndex:
        embeddings = FakeEmbeddings()
        return KVIndex.open(
            tmp_path / name, tiny.engine(), embeddings=embeddings, **settings, **more
        )

    with opened("here") as here:
        here.add(chunks, progress=False)
        assert cast(Any, here.store).flush(30)
        one = here.stat().caches.nbytes // len(chunks)
    with opened("there", budget=3 * one) as there:
        there.add(chunks, progress=False)  # nothing is computed: the remote has all of it
        assert there.stat().caches.entries <= 3
        report = there.ask("Fact 1", k=2, max_new_tokens=1).report
        assert (report.hits, report.misses) == (2, 0)
        assert there.stat().caches.nbytes <= 3 * one
        assert there.verify().clean
        assert there.delete(["id-1"]) == 1
        assert cast(Any, there.store).flush(30)
    left = [path for path in (tmp_path / "remote").rglob("*") if path.is_file()]
    assert all(b"dtype" not in path.read_bytes() for path in left)
    with pytest.raises(InputError, match="KVLINK_STORE_KEY"):
        KVIndex.open(tmp_path / "here", tiny.engine(), embeddings=FakeEmbeddings())
