"""Maintenance of an index: needs no model, only its folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kvlink_rag.index import catalog as sql
from kvlink_rag.index.catalog import CACHES, FILE, SNAPSHOTS, IndexCatalog, IndexStat
from kvlink_rag.store import FolderStore, KVStore, StoreCheck

Progress = Callable[[int, int], None]


def is_index(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds an index (of any version, damaged or not)."""
    return (Path(folder).expanduser() / FILE).is_file()


def verify_index(folder: str | os.PathLike[str], progress: Progress | None = None) -> StoreCheck:
    """Check rows, vectors, chunk caches and references of an index; changes nothing.

    Caches that only removed chunks refer to (their removal was interrupted) count as
    ``unreferenced``.

    Args:
        folder: the index.
        progress: called with (files checked, files in all) after each file.

    Raises:
        StoreError: no index, or it cannot be opened.
    """
    with _opened(folder) as (catalog, store):
        return verify(catalog, store, progress)


def prune_index(folder: str | os.PathLike[str], progress: Progress | None = None) -> StoreCheck:
    """Remove from an index what :func:`verify_index` reports, but for damaged rows.

    Raises:
        StoreError: no index, or it cannot be written.
    """
    with _opened(folder) as (catalog, store):
        return prune(catalog, store, progress)


def stat_index(folder: str | os.PathLike[str]) -> IndexStat:
    """Counts, sizes and identity of an index.

    Raises:
        StoreError: no index, or it cannot be opened.
    """
    with _opened(folder) as (catalog, store):
        return stat(catalog, store)


def verify(catalog: IndexCatalog, store: KVStore, progress: Progress | None) -> StoreCheck:
    """:func:`verify_index` of an open index."""
    check = store.verify(progress)
    check.corrupt = _damaged_rows(catalog) + check.corrupt
    if not check.corrupt or catalog.sound():
        check.unreferenced = sorted({*check.unreferenced, *_stray_keys(catalog, store)})
    return check


def prune(catalog: IndexCatalog, store: KVStore, progress: Progress | None) -> StoreCheck:
    """:func:`prune_index` of an open index."""
    with catalog.only_writer():
        catalog.finish_releases(store)
        with catalog.reading() as tx:
            rows = {row[0] for row in tx.execute("SELECT id FROM chunks")}
        stray = _stray_keys(catalog, store)
        store.release({document for document, _ in store.references()} - rows)
        check = store.prune(progress)
    check.unreferenced = sorted({*check.unreferenced, *stray})
    return check


def stat(catalog: IndexCatalog, store: KVStore) -> IndexStat:
    """:func:`stat_index` of an open index."""
    files = [*catalog.folder.glob(f"{FILE}*"), *catalog.folder.glob(SNAPSHOTS)]
    return IndexStat(
        chunks=len(catalog),
        sources=len(catalog.sources()),
        embedding_name=catalog.meta("embedding_name") or "",
        embedding_dim=int(catalog.meta("embedding_dim") or 0),
        model_name=catalog.meta("model_name") or "",
        fingerprint=catalog.meta("fingerprint") or "",
        nbytes=sum(file.stat().st_size for file in files),
        caches=store.stat(),
    )


@contextmanager
def _opened(folder: str | os.PathLike[str]) -> Iterator[tuple[IndexCatalog, FolderStore]]:
    catalog = IndexCatalog(folder)
    try:
        store = FolderStore(catalog.folder / CACHES)
        try:
            yield catalog, store
        finally:
            store.close()
    finally:
        catalog.close()


def _damaged_rows(catalog: IndexCatalog) -> list[str]:
    if not catalog.sound():
        return [str(catalog.path)]
    size = 4 * int(catalog.meta("embedding_dim") or 0)
    with catalog.reading() as tx:
        rows = tx.execute("SELECT id FROM chunks WHERE length(embedding) != ?", (size,)).fetchall()
    return [f"{catalog.path}: vector of chunk {row[0]!r}" for row in rows]


def _stray_keys(catalog: IndexCatalog, store: KVStore) -> set[str]:
    """Stored keys that documents refer to, but none that is a chunk of the index and keeps them."""
    references = store.references()  # read first: caches are stored before their rows
    with catalog.reading() as tx:
        rows = {row[0] for row in tx.execute("SELECT id FROM chunks")}
        releases = sql.releases_of(tx)
    held: set[str] = set()
    stray: set[str] = set()
    for document, key in references:
        keep = releases.get(document)
        holds = document in rows and (keep is None or key in keep)
        (held if holds else stray).add(key)
    return {key for key in stray - held if store.has(key)}
