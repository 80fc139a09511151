"""The vector store: caches come and go with documents, searches are the wrapped store's."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from langchain_community.vectorstores import FAISS
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.indexing import InMemoryRecordManager, aindex, index
from langchain_core.prompts import PromptTemplate
from langchain_core.vectorstores import InMemoryVectorStore, VectorStore
from langchain_kvlink import ChatKVLink, KVLinkVectorStore

from kvlink_rag import InputError, KVLinkEngine, KVLinkWarning, StoreError
from kvlink_rag.store import open_store

EMBEDDINGS = DeterministicFakeEmbedding(size=8)
ROOT = Path(__file__).parents[2]


def document(n: int, text: str = "", **metadata: Any) -> Document:
    return Document(text or f"Fact {n} is {n * n}.", metadata={"source": f"s{n}", **metadata})


def make(engine: KVLinkEngine, **options: Any) -> KVLinkVectorStore:
    return KVLinkVectorStore(InMemoryVectorStore(EMBEDDINGS), engine, **options)


def disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in (folder / "chunks").rglob("*.safetensors"))


def references(engine: KVLinkEngine) -> set[tuple[str, str]]:
    return set(engine.store.references())


@pytest.fixture
def engine() -> KVLinkEngine:
    return tiny.engine()


def count_encoded(engine: KVLinkEngine) -> list[int]:
    """How many chunks each call of the engine from now on had to encode."""
    counts: list[int] = []
    index_ = engine.index

    def note(*args: Any, **kwargs: Any) -> Any:
        report = index_(*args, **kwargs)
        counts.append(report.misses)
        return report

    engine.index = note  # type: ignore[method-assign]
    return counts


@pytest.fixture
def encoded(engine: KVLinkEngine) -> list[int]:
    return count_encoded(engine)


class TestAdding:
    def test_progress_is_shown_unless_it_is_not_wanted(
        self, engine: KVLinkEngine, capsys: pytest.CaptureFixture[str]
    ) -> None:
        make(engine).add_documents([document(1)])
        assert "tokens" in capsys.readouterr().err
        make(engine).add_documents([document(1)])  # nothing to encode
        make(engine, show_progress=False).add_documents([document(2)])
        options = {"engine": engine, "show_progress": False}
        KVLinkVectorStore.from_texts(["Fact 3 is 9."], EMBEDDINGS, **options).add_texts(["Four."])
        assert capsys.readouterr().err == ""
        KVLinkVectorStore.from_texts(["Fact 5 is 25."], EMBEDDINGS, engine=engine)
        assert "tokens" in capsys.readouterr().err

    def test_each_document_refers_to_its_cache_by_its_id(self, engine: KVLinkEngine) -> None:
        store = make(engine)
        ids = store.add_documents([document(1), document(2)])
        ids += store.add_texts(["three", "four"], [{"a": 1}, {"a": 2}], ids=["3", "4"])
        ids += store.add_texts(["five"])
        texts = [document(1), document(2), "three", "four", "five"]
        keys = engine.keys(t if isinstance(t, str) else t.page_content for t in texts)
        assert references(engine) == set(zip(ids, keys, strict=True))
        assert engine.store.stat().entries == 5
        assert [d.page_content for d in store.get_by_ids(["3", "4"])] == ["three", "four"]

    def test_async(self, engine: KVLinkEngine) -> None:
        store = make(engine)

        async def main() -> list[str]:
            ids = await store.aadd_documents([document(1), document(2)])
            return ids + await store.aadd_texts(["three"], [{"a": 1}], ids=["3"])

        ids = asyncio.run(main())
        keys = engine.keys([document(1).page_content, document(2).page_content, "three"])
        assert references(engine) == set(zip(ids, keys, strict=True))

    def test_what_is_unchanged_costs_nothing(self, tmp_path: Path) -> None:
        engine = tiny.engine(store=open_store(tmp_path, codec="raw"))
        counts = count_encoded(engine)
        store = make(engine)
        documents = [document(n) for n in range(100)]
        ids = [str(n) for n in range(100)]
        store.add_documents(documents, ids=ids)
        store.add_documents(documents, ids=ids)
        assert counts == [100, 0]
        size, before = disk(tmp_path), references(engine)
        documents[7] = document(7, "Seven is an odd number.")
        documents[8] = document(8, page=3)  # the model does not see it
        store.add_documents(documents, ids=ids)
        assert counts == [100, 0, 1]
        assert engine.store.stat().entries == 100
        old, new = engine.keys([document(7).page_content, "Seven is an odd number."])
        assert references(engine) == before - {("7", old)} | {("7", new)}
        with_it = disk(tmp_path)
        assert with_it > size
        store.delete(["7"])
        entry = tiny.engine().index(["Seven is an odd number."], progress=False).nbytes
        assert with_it - disk(tmp_path) >= entry
        assert not engine.store.has(new)
        assert engine.store.verify().clean
        assert engine.store.verify().unreferenced == []

    def test_texts_that_change_places(self, engine: KVLinkEngine, encoded: list[int]) -> None:
        store = make(engine)
        store.add_texts(["one", "two"], ids=["1", "2"])
        store.add_texts(["two", "one"], ids=["1", "2"])
        one, two = engine.keys(["one", "two"])
        assert references(engine) == {("1", two), ("2", one)}
        store.add_texts(["one"], ids=["1"])
        assert references(engine) == {("1", one), ("2", one)}
        assert encoded == [2, 0, 0]
        assert engine.store.stat().entries == 1
        store.delete(["1"])
        assert engine.store.stat().entries == 1
        store.delete(["2"])
        assert engine.store.stat().entries == 0

    def test_the_last_of_those_with_one_id_counts(self, engine: KVLinkEngine) -> None:
        store = make(engine)
        store.add_texts(["one", "two"], ids=["1", "1"])
        assert references(engine) == {("1", engine.keys(["two"])[0])}
        assert engine.store.stat().entries == 1

    def test_documents_without_text_have_no_cache(self, engine: KVLinkEngine) -> None:
        store = make(engine)
        store.add_texts(["one", " \n", ""], ids=["1", "2", "3"])
        assert len(store.get_by_ids(["1", "2", "3"])) == 3
        store.add_texts([" "], ids=["1"])
        assert engine.store.stat().entries == 0
        assert store.add_documents([]) == []

    def test_a_document_prompt_decides_what_is_encoded(self, engine: KVLinkEngine) -> None:
        prompt = PromptTemplate.from_template("{source}: {page_content}")
        store = make(engine, document_prompt=prompt)
        store.add_documents([document(1), document(2)])
        found = store.similarity_search("x", k=2)
        chat = ChatKVLink(engine=engine, document_prompt=prompt, max_tokens=1)
        report = chat.invoke("Why?", documents=found).response_metadata["report"]
        assert (report["hits"], report["misses"]) == (2, 0)
        with pytest.raises(InputError, match="cannot be shown"):
            store.add_documents([Document("no source")])
        assert engine.store.stat().documents == 2

    def test_arguments_of_the_wrapped_store_reach_it(self, engine: KVLinkEngine) -> None:
        seen: list[Any] = []

        class Wrapped(InMemoryVectorStore):
            def add_documents(self, documents: Any, ids: Any = None, **kwargs: Any) -> list[str]:
                seen.append(kwargs)
                return super().add_documents(documents, ids)

        store = KVLinkVectorStore(Wrapped(EMBEDDINGS), engine)
        store.add_texts(["one"], ids=["1"], batch_size=7, namespace="n")
        assert seen == [{"batch_size": 7, "namespace": "n"}]


class Failing(InMemoryVectorStore):
    """Refuses documents that say so, after it has taken those before."""

    def add_documents(self, documents: list[Document], *args: Any, **kwargs: Any) -> list[str]:
        if any("fail" in d.page_content for d in documents):
            super().add_documents(documents[:1], kwargs.get("ids", [])[:1])
            raise ConnectionError("gone")
        return super().add_documents(documents, *args, **kwargs)

    async def aadd_documents(self, documents: list[Document], *args: Any, **kwargs: Any) -> Any:
        return self.add_documents(documents, *args, **kwargs)

    def delete(self, ids: Any = None, **kwargs: Any) -> Any:
        if ids == ["2"]:
            raise ConnectionError("gone")
        if ids == ["1"]:
            return False
        return super().delete(ids, **kwargs)

    async def adelete(self, ids: Any = None, **kwargs: Any) -> Any:
        return self.delete(ids, **kwargs)


def added(store: KVLinkVectorStore, texts: list[str], **options: Any) -> list[str]:
    return store.add_texts(texts, **options)


def added_async(store: KVLinkVectorStore, texts: list[str], **options: Any) -> list[str]:
    return asyncio.run(store.aadd_texts(texts, **options))


class TestFailures:
    @pytest.fixture
    def store(self, engine: KVLinkEngine) -> KVLinkVectorStore:
        store = KVLinkVectorStore(Failing(EMBEDDINGS), engine)
        store.add_texts(["one", "two"], ids=["1", "2"])
        return store

    @pytest.mark.parametrize("add", [added, added_async])
    def test_the_wrapped_store_fails(
        self, engine: KVLinkEngine, store: KVLinkVectorStore, add: Any
    ) -> None:
        before = references(engine)
        with pytest.raises(ConnectionError):
            add(store, ["one more", "two", "fail"], ids=["1", "3", "4"])
        assert references(engine) == before
        assert engine.store.stat().entries == 2
        # the one that it took before it failed is answered from all the same
        chat = ChatKVLink(engine=engine, max_tokens=4)
        found = chat.invoke("Why?", documents=store.get_by_ids(["1", "2"]))
        assert (
            found.content
            == tiny.engine().answer("Why?", ["one more", "two"], max_new_tokens=4).text
        )
        assert (found.response_metadata["report"]["misses"]) == 1
        store.add_texts(["one more", "two", "three"], ids=["1", "3", "4"])
        keys = engine.keys(["one more", "two", "two", "three"])
        assert references(engine) == set(zip("1234", keys, strict=True))

    @pytest.mark.parametrize("add", [added, added_async])
    def test_encoding_fails(self, engine: KVLinkEngine, store: KVLinkVectorStore, add: Any) -> None:
        before = references(engine)
        put = engine.store.put

        def full(record: Any, documents: Any = ()) -> None:
            if engine.store.stat().entries >= 3:
                raise StoreError("disk full")
            put(record, documents)

        engine.store.put = full  # type: ignore[method-assign]
        with pytest.raises(StoreError, match="disk full"):
            add(store, [f"Text {n}." for n in range(5)])
        assert references(engine) == before
        assert engine.store.stat().entries == 2
        assert len(store.similarity_search("x", k=10)) == 2

    def test_a_text_too_long_for_the_model_is_refused_before_anything_is_added(
        self, engine: KVLinkEngine, store: KVLinkVectorStore
    ) -> None:
        with pytest.raises(InputError, match="use fewer or smaller chunks"):
            store.add_texts(["short", "long " * 2000])
        assert len(store.similarity_search("x", k=10)) == 2
        assert engine.store.stat().entries == 2

    def test_deleting_fails(self, engine: KVLinkEngine, store: KVLinkVectorStore) -> None:
        with pytest.raises(ConnectionError):
            store.delete(["2"])
        assert store.delete(["1"]) is False
        with pytest.raises(ConnectionError):
            asyncio.run(store.adelete(["2"]))
        assert asyncio.run(store.adelete(["1"])) is False
        assert engine.store.stat().entries == 2

    def test_ids_that_do_not_fit(self, engine: KVLinkEngine) -> None:
        class Odd(InMemoryVectorStore):
            def add_documents(self, *args: Any, **kwargs: Any) -> list[str]:
                return super().add_documents(*args, **kwargs)[:-1]

        store = KVLinkVectorStore(Odd(EMBEDDINGS), engine)
        with pytest.warns(KVLinkWarning, match="returned 1 ids for 2 documents"):
            store.add_texts(["one", "two"])
        assert engine.store.stat().entries == 0
        assert len(store.similarity_search("x")) == 2

    def test_numbers_as_ids(self, engine: KVLinkEngine) -> None:
        class Numbers(InMemoryVectorStore):
            def add_documents(self, *args: Any, **kwargs: Any) -> Any:
                return [int(id) for id in super().add_documents(*args, **kwargs)]

        store = KVLinkVectorStore(Numbers(EMBEDDINGS), engine)
        store.add_texts(["one", "two"], ids=["1", "2"])
        assert {id for id, _ in references(engine)} == {"1", "2"}
        store.delete([1, 2])  # type: ignore[list-item]
        assert engine.store.stat().entries == 0

    @pytest.mark.parametrize("during", ["encoding", "adding"])
    def test_a_cancelled_task_leaves_nothing_behind(
        self, engine: KVLinkEngine, during: str
    ) -> None:
        started, go_on = threading.Event(), threading.Event()
        index_ = engine.index

        def slow(*args: Any, **kwargs: Any) -> Any:
            started.set()
            assert go_on.wait(30)
            return index_(*args, **kwargs)

        class Slow(InMemoryVectorStore):
            async def aadd_documents(self, *args: Any, **kwargs: Any) -> Any:
                started.set()
                await asyncio.sleep(30)

        if during == "encoding":
            engine.index = slow  # type: ignore[method-assign]
        store = KVLinkVectorStore(Slow(EMBEDDINGS), engine)

        async def main() -> None:
            task = asyncio.ensure_future(store.aadd_documents([document(1)]))
            while not started.is_set():
                await asyncio.sleep(0.005)
            task.cancel()
            await asyncio.sleep(0.02)
            go_on.set()
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(main())
        assert references(engine) == set()
        assert engine.store.stat().entries == 0

    def test_what_cannot_be_wrapped_is_named(self, engine: KVLinkEngine) -> None:
        with pytest.raises(InputError, match="vectorstore is a dict"):
            KVLinkVectorStore({}, engine)  # type: ignore[arg-type]
        with pytest.raises(InputError, match="engine is a ChatKVLink"):
            KVLinkVectorStore(InMemoryVectorStore(EMBEDDINGS), ChatKVLink(engine=engine))  # type: ignore[arg-type]
        with pytest.raises(InputError, match="engine is None"):
            KVLinkVectorStore.from_texts(["a"], EMBEDDINGS)


class Forgetting(InMemoryVectorStore):
    """Deletes everything, or by a filter, when there are no ids."""

    def delete(self, ids: Any = None, source: str = "", **kwargs: Any) -> None:
        if ids is None:
            ids = [i for i, d in self.store.items() if source in d["metadata"]["source"]]
        super().delete(ids)

    async def adelete(self, ids: Any = None, **kwargs: Any) -> None:
        self.delete(ids, **kwargs)


class TestDeleting:
    def test_caches_go_with_the_last_document(self, engine: KVLinkEngine) -> None:
        store = make(engine)
        store.add_texts(["same", "same", "other"], ids=["1", "2", "3"])
        store.delete(["1", "unknown"])
        assert engine.store.stat().entries == 2
        asyncio.run(store.adelete(["2"]))
        assert engine.store.stat().entries == 1

    @pytest.mark.parametrize("asynchronous", [False, True])
    def test_without_ids_what_vanished_is_dropped(
        self, engine: KVLinkEngine, asynchronous: bool
    ) -> None:
        store = KVLinkVectorStore(Forgetting(EMBEDDINGS), engine)
        store.add_documents([document(1), document(2), document(3)], ids=["1", "2", "3"])
        engine.index(["somebody else's"], progress=False)

        def delete(**kwargs: Any) -> None:
            if asynchronous:
                asyncio.run(store.adelete(**kwargs))
            else:
                store.delete(**kwargs)

        delete(source="s2")
        assert {id for id, _ in references(engine)} >= {"1", "3"}
        assert engine.store.stat().documents == 3
        delete()
        assert engine.store.stat().documents == 1
        assert engine.store.has(engine.keys(["somebody else's"])[0])

    def test_without_ids_where_that_does_nothing(self, engine: KVLinkEngine) -> None:
        store = make(engine)
        store.add_texts(["one"])
        store.delete()  # InMemoryVectorStore keeps everything
        assert len(store.similarity_search("x")) == 1
        assert engine.store.stat().entries == 1

    def test_without_ids_where_nobody_can_tell(self, engine: KVLinkEngine) -> None:
        class Silent(Forgetting):
            def get_by_ids(self, ids: Any, /) -> list[Document]:
                raise NotImplementedError("no get_by_ids")

        store = KVLinkVectorStore(Silent(EMBEDDINGS), engine)
        store.add_documents([document(1)])
        with pytest.raises(NotImplementedError, match="no get_by_ids"):
            store.delete()
        assert len(store.similarity_search("x")) == 1
        assert engine.store.stat().entries == 1


class Noting(VectorStore):
    """Notes how each of its methods is called."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def __getattribute__(self, name: str) -> Any:
        if name in SEARCHES:
            found = [Document(name)] if "search" in name else name

            def note(*args: Any, **kwargs: Any) -> Any:
                self.calls.append((name, args, kwargs))
                return found

            async def anote(*args: Any, **kwargs: Any) -> Any:
                return note(*args, **kwargs)

            return anote if name.startswith("a") else note
        return super().__getattribute__(name)

    def similarity_search(self, *args: Any, **kwargs: Any) -> list[Document]:
        raise AssertionError

    @classmethod
    def from_texts(cls, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError


SEARCHES = {
    prefix + name
    for prefix in ("", "a")
    for name in (
        "search",
        "similarity_search",
        "similarity_search_with_score",
        "similarity_search_with_relevance_scores",
        "similarity_search_by_vector",
        "max_marginal_relevance_search",
        "max_marginal_relevance_search_by_vector",
        "get_by_ids",
    )
} | {"_select_relevance_score_fn"}


class TestSearching:
    @pytest.mark.parametrize("name", sorted(SEARCHES))
    def test_searches_are_the_wrapped_stores(self, engine: KVLinkEngine, name: str) -> None:
        wrapped = Noting()
        store = KVLinkVectorStore(wrapped, engine)
        found = getattr(store, name)("a", 7, filter={"b": 1})
        found = asyncio.run(found) if name.startswith("a") else found
        assert found == ([Document(name)] if "search" in name else name)
        assert wrapped.calls == [(name, ("a", 7), {"filter": {"b": 1}})]

    def test_every_search_of_a_vector_store_is_passed_on(self) -> None:
        public = {
            name for name in dir(VectorStore) if "search" in name and not name.startswith("_")
        }
        assert public <= SEARCHES

    @pytest.mark.parametrize(
        "options",
        [
            {"search_kwargs": {"k": 2}},
            {"search_type": "mmr", "search_kwargs": {"k": 2, "fetch_k": 4, "lambda_mult": 0.1}},
            {
                "search_type": "similarity_score_threshold",
                "search_kwargs": {"score_threshold": 0.01},
            },
            {"search_kwargs": {"k": 3, "filter": {"source": "s2"}}},
        ],
    )
    def test_retrievers(self, engine: KVLinkEngine, options: dict[str, Any]) -> None:
        wrapped = FAISS.from_documents([document(n) for n in range(6)], EMBEDDINGS)
        store = KVLinkVectorStore(wrapped, engine)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # random vectors have scores out of range
            expected = wrapped.as_retriever(**options).invoke("Fact 2 is 4.")
            retriever = store.as_retriever(**options)
            assert retriever.invoke("Fact 2 is 4.") == expected
            assert asyncio.run(retriever.ainvoke("Fact 2 is 4.")) == expected
        assert expected
        assert store.embeddings is EMBEDDINGS
        retriever.add_documents([document(9)])
        assert engine.store.stat().entries == 1

    def test_no_document_is_changed(self, engine: KVLinkEngine) -> None:
        store = make(engine)
        given = document(1)
        (id,) = store.add_documents([given])
        assert (given.id, given.metadata) == (None, {"source": "s1"})
        assert store.similarity_search("x") == [
            Document(given.page_content, metadata={"source": "s1"}, id=id)
        ]


class TestFromTexts:
    def test_in_memory_unless_told_otherwise(self, engine: KVLinkEngine) -> None:
        store = KVLinkVectorStore.from_texts(["one", "two"], EMBEDDINGS, engine=engine)
        assert isinstance(store.vectorstore, InMemoryVectorStore)
        found = {(d.id, engine.keys([d.page_content])[0]) for d in store.similarity_search("x")}
        assert references(engine) == found
        assert len(found) == 2

    def test_with_any_class(self, engine: KVLinkEngine) -> None:
        documents = [Document("one", id="1", metadata={"a": 1}), Document("two")]
        for store in (
            KVLinkVectorStore.from_documents(
                documents, EMBEDDINGS, engine=engine, vectorstore_class=FAISS
            ),
            asyncio.run(
                KVLinkVectorStore.afrom_documents(
                    documents, EMBEDDINGS, engine=engine, vectorstore_class=FAISS
                )
            ),
        ):
            assert isinstance(store.vectorstore, FAISS)
            found = store.similarity_search("x")
            assert {d.page_content for d in found} == {"one", "two"}
            ids = {d.id: d for d in found}
            assert ids["1"].metadata == {"a": 1}
            assert ids.keys() <= {id for id, _ in references(engine)}

    def test_when_it_fails_nothing_is_kept(self, engine: KVLinkEngine) -> None:
        with pytest.raises(ValueError, match="Duplicate ids"):
            KVLinkVectorStore.from_texts(
                ["one", "two"], EMBEDDINGS, ids=["1", "1"], engine=engine, vectorstore_class=FAISS
            )
        assert engine.store.stat().entries == 0


def contents(engine: KVLinkEngine) -> tuple[int, int]:
    stat = engine.store.stat()
    return stat.entries, stat.documents


@pytest.fixture(params=["memory", "faiss"])
def indexed(request: pytest.FixtureRequest, engine: KVLinkEngine) -> Iterator[KVLinkVectorStore]:
    if request.param == "memory":
        yield make(engine)
    else:
        wrapped = FAISS.from_texts(["x"], EMBEDDINGS, ids=["x"])
        wrapped.delete(["x"])
        yield KVLinkVectorStore(wrapped, engine)


class TestIndexing:
    """`langchain_core.indexing`: updated and vanished documents drop their caches."""

    @pytest.mark.parametrize("asynchronous", [False, True])
    @pytest.mark.parametrize("cleanup", ["incremental", "full", "scoped_full"])
    def test_clean_up(
        self,
        engine: KVLinkEngine,
        encoded: list[int],
        indexed: KVLinkVectorStore,
        cleanup: Any,
        asynchronous: bool,
    ) -> None:
        records = InMemoryRecordManager("test")
        records.create_schema()

        def run(documents: list[Document]) -> tuple[int, int, int]:
            options: Any = {"source_id_key": "source", "key_encoder": "sha256"}
            if asynchronous:
                result = asyncio.run(
                    aindex(documents, records, indexed, cleanup=cleanup, **options)
                )
            else:
                result = index(documents, records, indexed, cleanup=cleanup, **options)
            return result["num_added"], result["num_skipped"], result["num_deleted"]

        documents = [document(n) for n in range(5)]
        assert run(documents) == (5, 0, 0)
        assert (contents(engine), encoded) == ((5, 5), [5])
        assert run(documents) == (0, 5, 0)
        assert (contents(engine), encoded) == ((5, 5), [5])
        # one changes its text, one only its metadata: for `index` both are other documents
        documents[1] = document(1, "One is odd.")
        documents[2] = document(2, page=3)
        assert run(documents) == (2, 3, 2)
        assert (contents(engine), encoded) == ((5, 5), [5, 1])
        gone = engine.keys([document(1).page_content])[0]
        assert not engine.store.has(gone)
        # the last of the second source's texts vanishes
        split = [document(9, f"Part {n}.", part=n) for n in range(3)]
        assert run([*documents, *split]) == (3, 5, 0)
        assert run([*documents, *split[:1]]) == (0, 6, 2)
        assert contents(engine) == (6, 6)
        # a whole source vanishes: only the full clean-up can tell
        removed = 1 if cleanup == "full" else 0
        assert run(documents) == (0, 5, removed)
        assert contents(engine) == (6 - removed, 6 - removed)
        found = {d.page_content for d in indexed.similarity_search("x", k=10)}
        keys = engine.keys(found)
        assert {key for _, key in references(engine)} == set(keys)
        assert all(map(engine.store.has, keys))

    def test_forced_updates(self, engine: KVLinkEngine, encoded: list[int]) -> None:
        store, records = make(engine), InMemoryRecordManager("test")
        records.create_schema()
        options: Any = {"cleanup": "full", "key_encoder": "sha256", "force_update": True}
        for _ in range(2):
            index([document(1), document(2)], records, store, **options)
        assert (contents(engine), encoded) == ((2, 2), [2, 0])

    def test_an_index_that_failed_is_repeated(self, engine: KVLinkEngine) -> None:
        class Once(InMemoryVectorStore):
            failed = False

            def add_documents(self, *args: Any, **kwargs: Any) -> list[str]:
                if not self.failed:
                    self.failed = True
                    raise ConnectionError
                return super().add_documents(*args, **kwargs)

        store, records = KVLinkVectorStore(Once(EMBEDDINGS), engine), InMemoryRecordManager("test")
        records.create_schema()
        options: Any = {"cleanup": "full", "key_encoder": "sha256"}
        with pytest.raises(ConnectionError):
            index([document(1)], records, store, **options)
        assert contents(engine) == (0, 0)
        index([document(1)], records, store, **options)
        assert contents(engine) == (1, 1)


FRESH = """
import sys, tiny
from langchain_community.vectorstores import FAISS
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_kvlink import ChatKVLink, KVLinkVectorStore
engine = tiny.engine(store=sys.argv[1] + "/kv")
vectors = FAISS.load_local(
    sys.argv[1] + "/faiss", DeterministicFakeEmbedding(size=8), allow_dangerous_deserialization=True
)
store = KVLinkVectorStore(vectors, engine)
found = store.as_retriever(search_kwargs={"k": 3}).invoke("Fact 2 is 4.")
message = ChatKVLink(engine=engine, max_tokens=8).invoke("Fact 2?", documents=found[::-1])
report = message.response_metadata["report"]
print([report["hits"], report["misses"], report["reused_tokens"] > 0, message.content])
store.delete([found[0].id])
print(engine.store.stat().documents)
"""


def test_a_fresh_process_answers_without_a_miss(tmp_path: Path) -> None:
    engine = tiny.engine(store=tmp_path / "kv")
    store = KVLinkVectorStore.from_documents(
        [document(n) for n in range(5)], EMBEDDINGS, engine=engine, vectorstore_class=FAISS
    )
    assert isinstance(store.vectorstore, FAISS)
    store.vectorstore.save_local(str(tmp_path / "faiss"))
    found = store.similarity_search("Fact 2 is 4.", k=3)[::-1]
    expected = tiny.engine().answer(
        "Fact 2?", [document.page_content for document in found], max_new_tokens=8
    )
    engine.store.close()
    out = subprocess.run(
        [sys.executable, "-c", FRESH, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": ":".join([str(ROOT / "tests"), *sys.path]), "OMP_NUM_THREADS": "1"},
    )
    assert out.stdout.splitlines() == [str([3, 0, True, expected.text]), "4"]


class Prefetched:
    """Texts of the chunks that an engine was told to load ahead."""

    def __init__(self, engine: KVLinkEngine) -> None:
        self.texts: list[str] = []
        engine.prefetch = self._note  # type: ignore[method-assign]

    def _note(self, chunks: Any) -> None:
        self.texts += [chunk.text for chunk in chunks]


OF_DOCUMENTS: list[tuple[str, Any]] = [
    ("search", {"query": "q", "search_type": "similarity"}),
    ("similarity_search", {"query": "q"}),
    ("similarity_search_with_score", {"query": "q"}),
    ("similarity_search_with_relevance_scores", {"query": "q"}),
    ("similarity_search_by_vector", {"embedding": [0.1] * 8}),
    ("max_marginal_relevance_search", {"query": "q"}),
    ("max_marginal_relevance_search_by_vector", {"embedding": [0.1] * 8}),
]


@pytest.mark.parametrize(("name", "options"), OF_DOCUMENTS, ids=[name for name, _ in OF_DOCUMENTS])
@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.filterwarnings("ignore:Relevance scores must be")
def test_what_is_found_begins_to_load(
    engine: KVLinkEngine, name: str, options: dict[str, Any], is_async: bool
) -> None:
    prompt = PromptTemplate.from_template("{source}: {page_content}")
    inner = FAISS.from_documents([document(1), document(2)], EMBEDDINGS)
    inner.relevance_score_fn = lambda score: 1 - score
    store = KVLinkVectorStore(inner, engine, document_prompt=prompt)
    ahead = Prefetched(engine)
    call = getattr(store, f"a{name}" if is_async else name)
    found = asyncio.run(call(k=2, **options)) if is_async else call(k=2, **options)
    documents = [each[0] if isinstance(each, tuple) else each for each in found]
    expected = [f"{each.metadata['source']}: {each.page_content}" for each in documents]
    assert len(expected) == 2
    assert ahead.texts == expected


def test_a_search_finds_what_cannot_be_shown(engine: KVLinkEngine) -> None:
    inner = InMemoryVectorStore.from_texts(["a", " "], EMBEDDINGS)
    prompt = PromptTemplate.from_template("{missing}: {page_content}")
    ahead = Prefetched(engine)
    assert len(KVLinkVectorStore(inner, engine, prompt).similarity_search("q")) == 2
    assert len(KVLinkVectorStore(inner, engine).similarity_search("q")) == 2
    assert ahead.texts == ["a"]
