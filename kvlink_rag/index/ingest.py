"""Bringing an index up to date with files: what changed is indexed, what vanished is removed.

A file counts as indexed when its digest is recorded, and that is done last: after all its chunks
are in and its stale ones are out. After a kill at any instant the next run does the file again, and
chunks that are there already cost nothing.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from kvlink_rag.chunk import FORMAT_VERSION, Chunk
from kvlink_rag.common.progress import Parts, bar, token_progress
from kvlink_rag.common.text import one_line
from kvlink_rag.errors import InputError
from kvlink_rag.index.catalog import CACHES, IndexCatalog
from kvlink_rag.index.cost import to_encode
from kvlink_rag.index.documents import Skipped, chunks_of, look, parse, read_bytes
from kvlink_rag.prompt.layout import DEFAULT_BEHIND, EncodeBehind, PromptTemplate, render_chunk
from kvlink_rag.store import EncryptionKey, KVStore, RemoteTier, open_store

if TYPE_CHECKING:
    from kvlink_rag.engine.engine import KVLinkEngine
    from kvlink_rag.index.index import KVIndex

BATCH_CHUNKS = 64
"""Chunks added at once: small files are encoded together."""


@dataclass(frozen=True)
class Splitting:
    """How files become chunks; files are done again when it changes.

    Args:
        tokens: most tokens in a chunk.
        overlap: most tokens repeated from the chunk before.
        model: whose tokens are counted.
        adapter: that the caches are to serve; empty for none.
        dtype: of the model and its caches; `auto` is the checkpoint's.
        encode_behind: what chunks are encoded behind.
    """

    tokens: int = 256
    overlap: int = 32
    model: str = ""
    adapter: str = ""
    dtype: str = "auto"
    encode_behind: EncodeBehind = DEFAULT_BEHIND

    def __post_init__(self) -> None:
        if self.tokens < 1 or not 0 <= self.overlap < self.tokens:
            raise InputError(
                f"chunks of {self.tokens} tokens with an overlap of {self.overlap}: tokens must be "
                f"1 or more, and the overlap 0 or more and smaller than tokens"
            )

    def digest(self, data: bytes) -> str:
        """What is recorded for a file with this content."""
        settings = f"{self.tokens} {self.overlap} {self.model}\n"
        settings += f"{_caching(self.adapter, self.encode_behind)}\n"
        settings += "" if self.dtype == "auto" else f"{self.dtype}\n"
        return hashlib.sha256(settings.encode() + data).hexdigest()


def _caching(adapter: str, behind: EncodeBehind) -> str:
    """What, besides the chunks and the model, decides which caches the engine looks up.

    A version that changes any of it must do every file again, or answers would find no caches. A
    cache-preserving adapter with the default prompt changes nothing.
    """
    prompt, owner = PromptTemplate(), ""
    if adapter:
        from kvlink_rag.adapters.load import load_adapter

        loaded = load_adapter(adapter)
        prompt = loaded.prompt
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
    left_out: list[Skipped] = field(default_factory=list)
    """Files in folders that are not looked into (:func:`~kvlink_rag.index.documents.look`)."""

    @property
    def nothing_to_do(self) -> bool:
        return not (self.changed or self.vanished)


@dataclass(frozen=True)
class File:
    """A file read and split."""

    source: str
    digest: str
    chunks: list[Chunk]


@dataclass
class Work:
    """A plan whose files are read and split; nothing is encoded yet."""

    plan: Plan
    files: list[File] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    """Those of the plan, and files that could not be read or split after all."""
    notes: list[tuple[Path, str]] = field(default_factory=list)

    @property
    def chunks(self) -> list[Chunk]:
        """All of them."""
        return [chunk for file in self.files for chunk in file.chunks]


@dataclass
class Summary:
    """What was done, by file; ``chunks`` counts those added or found again in changed files."""

    added: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    unchanged: int = 0
    skipped: list[Skipped] = field(default_factory=list)
    left_out: list[Skipped] = field(default_factory=list)
    notes: list[tuple[Path, str]] = field(default_factory=list)
    chunks: int = 0
    nbytes: int = 0
    """Of all caches that the index has on this machine."""
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
    found = look(root for root in roots if root not in gone)
    plan = Plan(left_out=found.left_out)
    for path in found.files:
        data = read_bytes(path)
        if isinstance(data, Skipped):
            plan.skipped.append(data)
            if data.unreadable:  # not gone: keep what was indexed of it
                covered.discard(str(path))
        elif recorded.get(str(path)) == splitting.digest(data):
            plan.unchanged.append(path)
            covered.discard(str(path))
        elif isinstance(parsed := parse(path, data), Skipped):
            plan.skipped.append(parsed)
        else:
            plan.changed.append(path)
            covered.discard(str(path))
    # nothing below a folder that cannot be listed has vanished
    unlisted = [str(skip.path) for skip in plan.skipped if os.path.isdir(skip.path)]
    plan.vanished = sorted(s for s in covered if not any(_is_under(s, u) for u in unlisted))
    return plan


def read_files(
    plan: Plan,
    engine: KVLinkEngine,
    splitting: Splitting,
    *,
    name: Callable[[Path], str] = str,
    progress: bool = True,
) -> Work:
    """Read and split the files that a plan wants indexed; what goes wrong with one is its own.

    Args:
        engine: whose model is to read the chunks.
        name: under which name a file is recorded and cited; the demo uses short ones.
        progress: show a bar on stderr.
    """
    work, total = Work(plan, skipped=list(plan.skipped)), len(plan.changed)
    with bar("Reading files", total, enabled=progress and total > 0) as done:
        for count, path in enumerate(plan.changed, 1):
            read = _read(path, engine, splitting, name(path), work.notes)
            if isinstance(read, File):
                work.files.append(read)
            else:
                work.skipped.append(read)
            done(count)
    return work


def carry_out(work: Work, index: KVIndex, *, progress: bool = True) -> Summary:
    """Index what was read, and remove what vanished.

    Args:
        progress: show bars on stderr.

    Raises:
        StoreError: the index cannot be written; files done before stay.
    """
    plan = work.plan
    summary = Summary(
        unchanged=len(plan.unchanged),
        skipped=work.skipped,
        left_out=plan.left_out,
        notes=work.notes,
        chunks=len(work.chunks),
    )
    _add(work, index, summary, progress)
    # last, so that a moved file's caches are taken over and not computed again
    for source in plan.vanished:
        _forget(index, source)
        summary.removed.append(source)
    summary.waiting = _upload(index.store, progress)
    summary.nbytes = index.store.stat().nbytes
    return summary


def _add(work: Work, index: KVIndex, summary: Summary, progress: bool) -> None:
    recorded = index.catalog.sources()
    tokens = sum(to_encode(index.engine, work.chunks))
    files = len(work.files)
    with (
        token_progress("Encoding chunks", tokens, progress) as encoded,
        # nothing to encode: it is the vectors that take time
        bar("Indexing files", files, enabled=progress and files > 0 and not tokens) as done,
    ):
        parts = Parts(encoded)
        for batch in _batches(work.files):
            chunks = [chunk for file in batch for chunk in file.chunks]
            for start in range(0, len(chunks), BATCH_CHUNKS):
                index.add(chunks[start : start + BATCH_CHUNKS], progress=parts.tell)
                parts.next()
            for file in batch:
                _finish(index, file)
                (summary.changed if file.source in recorded else summary.added).append(file.source)
            done(len(summary.changed) + len(summary.added))


def settle(
    plan: Plan,
    folder: str | os.PathLike[str],
    codec: str | None = None,
    encryption_key: EncryptionKey | None = None,
    remote: str | None = None,
) -> Summary:
    """Where a plan has nothing to do: finish what earlier runs left undone, without a model.

    Raises:
        InputError: the index has another codec or key, or is not encrypted; or the remote's URL
            cannot be used.
        StoreError: the index cannot be written.
    """
    summary = Summary(unchanged=len(plan.unchanged), skipped=plan.skipped, left_out=plan.left_out)
    with closing(IndexCatalog(folder)) as catalog:
        store = open_store(
            catalog.folder / CACHES, codec=codec, encryption_key=encryption_key, remote=remote
        )
        with closing(store):
            if not catalog.readonly:
                with catalog.only_writer():
                    catalog.finish_releases(store)
                summary.waiting = _upload(store, progress=True)
            summary.nbytes = store.stat().nbytes
    return summary


def _upload(store: KVStore, progress: bool) -> int:
    """Bring to a store's remote, if it has one, what waits; returns how much is left."""
    if not isinstance(store, RemoteTier):
        return 0
    with bar("Uploading", 1.0, unit="share", enabled=progress) as done:
        return store.upload(lambda uploaded, total: done(uploaded / total))


def _batches(files: Iterable[File]) -> Iterator[list[File]]:
    """Whole files, so many together that there are enough chunks to encode at once."""
    batch: list[File] = []
    for file in files:
        batch.append(file)
        if sum(len(each.chunks) for each in batch) >= BATCH_CHUNKS:
            yield batch
            batch = []
    if batch:
        yield batch


def _read(
    path: Path,
    engine: KVLinkEngine,
    splitting: Splitting,
    source: str,
    notes: list[tuple[Path, str]],
) -> File | Skipped:
    """A file's chunks, or why there are none."""
    from kvlink_rag.engine.indexing import Indexing  # an index with nothing to do needs no model

    # read anew: the digest must be that of the content indexed, not of the content planned with
    data = read_bytes(path)
    document = data if isinstance(data, Skipped) else parse(path, data)
    if isinstance(document, Skipped) or isinstance(data, Skipped):
        return Skipped(path, "changed while it was being indexed: run again")
    try:
        chunks = chunks_of(document, engine.tokenizer, splitting.tokens, splitting.overlap, source)
        Indexing(engine.pipeline, chunks)  # refuses what is too long
    # splitter and tokenizer are libraries of their own; one file must not stop the others
    except Exception as error:
        return Skipped(path, f"cannot be split: {one_line(error)}")
    if document.note:
        notes.append((path, document.note))
    return File(source, splitting.digest(data), chunks)


def _finish(index: KVIndex, file: File) -> None:
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
