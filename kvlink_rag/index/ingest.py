"""Bringing an index up to date with files: what changed is indexed, what vanished is removed.

A file counts as indexed when its digest is recorded, and that is done last: after all its chunks
are in and its stale ones are out. After a kill at any instant the next run does the file again, and
chunks that are there already cost nothing.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from kvlink_rag.chunk import FORMAT_VERSION, Chunk
from kvlink_rag.common.progress import bar
from kvlink_rag.errors import InputError
from kvlink_rag.index.documents import Skipped, chunks_of, find_files, parse, read_bytes
from kvlink_rag.prompt.layout import DEFAULT_BEHIND, PromptTemplate, render_chunk

if TYPE_CHECKING:
    from kvlink_rag.index.index import KVIndex
    from kvlink_rag.store import EncryptionKey, KVStore

BATCH_CHUNKS = 64
"""Chunks added at once: small files are encoded together, large ones show their progress."""


@dataclass(frozen=True)
class Splitting:
    """How files become chunks; files are done again when it changes.

    Args:
        tokens: most tokens in a chunk.
        overlap: most tokens repeated from the chunk before.
        model: whose tokens are counted.
        adapter: that the caches are to serve; empty for none.
    """

    tokens: int = 256
    overlap: int = 32
    model: str = ""
    adapter: str = ""

    def __post_init__(self) -> None:
        if self.tokens < 1 or not 0 <= self.overlap < self.tokens:
            raise InputError(
                f"chunks of {self.tokens} tokens with an overlap of {self.overlap}: tokens must be "
                f"1 or more, and the overlap 0 or more and smaller than tokens"
            )

    def digest(self, data: bytes) -> str:
        """What is recorded for a file with this content."""
        settings = f"{self.tokens} {self.overlap} {self.model}\n{_caching(self.adapter)}\n".encode()
        return hashlib.sha256(settings + data).hexdigest()


def _caching(adapter: str) -> str:
    """What, besides the chunks and the model, decides which caches the engine looks up.

    A version that changes any of it must do every file again, or answers would find no caches. A
    cache-preserving adapter with the default prompt changes nothing.
    """
    prompt, behind, owner = PromptTemplate(), DEFAULT_BEHIND, ""
    if adapter:
        from kvlink_rag.adapters.load import load_adapter

        loaded = load_adapter(adapter)
        prompt, behind = loaded.prompt, loaded.encode_behind
        owner = loaded.fingerprint if loaded.kind == "whole-model" else ""
    shown = render_chunk(Chunk("text", title="title"), prompt.chunk)
    return f"{FORMAT_VERSION} {(prompt, behind, shown)}{owner}"


@dataclass
class Plan:
    """What has to be done. Paths are absolute."""

    changed: list[Path] = field(default_factory=list)
    """New files, and files whose content or splitting changed."""
    unchanged: list[Path] = field(default_factory=list)
    vanished: list[str] = field(default_factory=list)
    """Recorded files that are under the given paths no more, or hold no text any more."""
    skipped: list[Skipped] = field(default_factory=list)

    @property
    def nothing_to_do(self) -> bool:
        return not (self.changed or self.vanished)


@dataclass
class Summary:
    """What was done, by file; ``chunks`` counts those added or found again in changed files."""

    added: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    unchanged: int = 0
    skipped: list[Skipped] = field(default_factory=list)
    notes: list[tuple[Path, str]] = field(default_factory=list)
    chunks: int = 0
    waiting: int = 0
    """Uploads and deletions that the remote has not taken; a later run goes on with them."""


def make_plan(
    paths: Iterable[str | os.PathLike[str]], recorded: Mapping[str, str], splitting: Splitting
) -> Plan:
    """Compare the files under ``paths`` with the digests recorded by an earlier run.

    Recorded files outside of ``paths`` are left alone. A path that is gone is fine when something
    of it is recorded: then it has vanished.

    Raises:
        InputError: a path does not exist and nothing of it is recorded.
    """
    roots = [os.path.abspath(Path(path).expanduser()) for path in paths]
    covered = {source for source in recorded if any(_is_under(source, root) for root in roots)}
    gone = [r for r in roots if not os.path.exists(r) and any(_is_under(s, r) for s in covered)]
    plan = Plan()
    for path in find_files(root for root in roots if root not in gone):
        data = read_bytes(path)
        if isinstance(data, Skipped):
            plan.skipped.append(data)
            covered.discard(str(path))  # unreadable is not gone: keep what was indexed of it
        elif recorded.get(str(path)) == splitting.digest(data):
            plan.unchanged.append(path)
            covered.discard(str(path))
        elif isinstance(parsed := parse(path, data), Skipped):
            plan.skipped.append(parsed)
        else:
            plan.changed.append(path)
            covered.discard(str(path))
    # nothing below a folder that cannot be listed has vanished
    unlisted = [str(skip.path) for skip in plan.skipped if skip.path.is_dir()]
    plan.vanished = sorted(s for s in covered if not any(_is_under(s, u) for u in unlisted))
    return plan


def carry_out(
    plan: Plan,
    index: KVIndex,
    splitting: Splitting,
    *,
    name: Callable[[Path], str] = str,
    progress: bool = True,
) -> Summary:
    """Do what a plan says.

    Args:
        name: under which name a file is recorded and cited; the demo uses short ones.
        progress: show bars on stderr.

    Raises:
        StoreError: the index cannot be written; files done before stay.
    """
    recorded = index.catalog.sources()
    summary = Summary(unchanged=len(plan.unchanged), skipped=list(plan.skipped))
    total = sum(path.stat().st_size for path in plan.changed if path.exists())
    with bar("Indexing files", total, unit="bytes", enabled=progress and total > 0) as done:
        nbytes_done = 0
        for batch in _batches(plan.changed, index, splitting, name, summary):
            nbytes = sum(file.nbytes for file in batch)
            chunks = [chunk for file in batch for chunk in file.chunks]
            for start in range(0, len(chunks), BATCH_CHUNKS):
                index.add(chunks[start : start + BATCH_CHUNKS], progress=False)
                share = min(start + BATCH_CHUNKS, len(chunks)) / len(chunks)
                done(nbytes_done + int(nbytes * share))
            for file in batch:
                _finish(index, file)
                (summary.changed if file.source in recorded else summary.added).append(file.source)
            summary.chunks += len(chunks)
            nbytes_done += nbytes
    # last, so that a moved file's caches are taken over and not computed again
    for source in plan.vanished:
        _forget(index, source)
        summary.removed.append(source)
    summary.waiting = _upload(index.store, progress)
    return summary


def settle(
    folder: str | os.PathLike[str],
    codec: str | None = None,
    encryption_key: EncryptionKey | None = None,
    remote: str | None = None,
) -> int:
    """Finish what earlier runs left undone, without a model, where there is nothing else to do.

    Returns:
        uploads and deletions that the remote has not taken.

    Raises:
        InputError: the index has another codec or key, or is not encrypted; or the remote's URL
            cannot be used.
        StoreError: the index cannot be written.
    """
    from kvlink_rag.index.catalog import CACHES, IndexCatalog
    from kvlink_rag.store import open_store

    catalog = IndexCatalog(folder)
    try:
        if catalog.readonly:
            return 0
        store = open_store(
            catalog.folder / CACHES, codec=codec, encryption_key=encryption_key, remote=remote
        )
        try:
            with catalog.only_writer():
                catalog.finish_releases(store)
            return _upload(store, progress=True)
        finally:
            store.close()
    finally:
        catalog.close()


def _upload(store: KVStore, progress: bool) -> int:
    """Bring to a store's remote, if it has one, what waits; returns how much is left."""
    from kvlink_rag.store import RemoteTier

    if not isinstance(store, RemoteTier):
        return 0
    with bar("Uploading", 1.0, unit="share", enabled=progress) as done:
        return store.upload(lambda uploaded, total: done(uploaded / total))


@dataclass(frozen=True)
class _File:
    """A file read and split."""

    source: str
    digest: str
    nbytes: int
    chunks: list[Chunk]


def _batches(
    paths: Iterable[Path],
    index: KVIndex,
    splitting: Splitting,
    name: Callable[[Path], str],
    summary: Summary,
) -> Iterator[list[_File]]:
    """Whole files, so many together that there are enough chunks to encode at once."""
    batch: list[_File] = []
    for path in paths:
        file = _read(path, index, splitting, name(path), summary)
        if file is not None:
            batch.append(file)
        if sum(len(file.chunks) for file in batch) >= BATCH_CHUNKS:
            yield batch
            batch = []
    if batch:
        yield batch


def _read(
    path: Path, index: KVIndex, splitting: Splitting, source: str, summary: Summary
) -> _File | None:
    """A file's chunks; None, and a line in the summary, when it has none."""
    # read anew: the digest must be that of the content indexed, not of the content planned with
    data = read_bytes(path)
    document = data if isinstance(data, Skipped) else parse(path, data)
    if isinstance(document, Skipped) or isinstance(data, Skipped):
        summary.skipped.append(Skipped(path, "changed while it was being indexed: run again"))
        return None
    if document.note:
        summary.notes.append((path, document.note))
    chunks = chunks_of(
        document, index.engine.tokenizer, splitting.tokens, splitting.overlap, source
    )
    return _File(source, splitting.digest(data), len(data), chunks)


def _finish(index: KVIndex, file: _File) -> None:
    """Remove what a changed file holds no more, then record it."""
    current = {chunk.id for chunk in file.chunks}
    stale = [id for id in index.catalog.ids(source=file.source) if id not in current]
    if stale:
        index.delete(stale)
    index.catalog.set_source(file.source, file.digest)


def _forget(index: KVIndex, source: str) -> None:
    """Remove a file's chunks, then its record: killed in between, the next run does it again."""
    stale = index.catalog.ids(source=source)
    if stale:
        index.delete(stale)
    index.catalog.drop_source(source)


def _is_under(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip(os.sep) + os.sep)
