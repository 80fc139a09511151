"""The commands ``kvlink store ...``."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from kvlink_rag.cli.options import ModelDtype
from kvlink_rag.cli.shared import (
    complain,
    load_engine,
    parse_size,
    prepare,
    print_list,
    progress_bar,
    read_documents,
    size_text,
)
from kvlink_rag.errors import InputError

if TYPE_CHECKING:
    from kvlink_rag.store import Budget, FolderStore, StoreCheck

store_app = typer.Typer(no_args_is_help=True, help="Look after stored chunk caches.")

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="An index, or a bare store.")]
Documents = Annotated[
    list[str],
    typer.Argument(metavar="DOCUMENT...", help="Files of the index, or ids of documents."),
]


@store_app.command()
def stat(folder: Folder) -> None:
    """Count chunks, caches and bytes; budget, hit rate, age, and what is kept of which model."""
    from kvlink_rag.index.check import is_index, stat_index

    if is_index(folder):
        found = stat_index(folder)
        typer.echo(f"model        {found.model_name or 'none yet'}")
        typer.echo(f"embeddings   {found.embedding_name or 'none yet'}")
        typer.echo(f"files        {found.sources}")
        typer.echo(f"chunks       {found.chunks}")
        typer.echo(f"text+vectors {size_text(found.nbytes)}")
    with _caches(folder) as store:
        _print_stat(store)


@store_app.command()
def verify(folder: Folder) -> None:
    """Check everything that is stored; exit code 1 when something is damaged or left over."""
    from kvlink_rag.index.catalog import FILE
    from kvlink_rag.index.check import is_index, verify_index

    with _caches(folder) as store, progress_bar("Verifying") as progress:
        check = verify_index(folder, progress) if is_index(folder) else store.verify(progress)
    _print_check(check, "")
    remedy = f"kvlink store prune {folder}"
    if check.clean:
        unused = f"; {remedy} removes the {len(check.unreferenced)} that no document refers to"
        typer.echo(f"clean: {check.checked} checked{unused if check.unreferenced else ''}")
        return
    path = folder.expanduser().absolute() / FILE
    rows = [each for each in check.corrupt if each.startswith(str(path))]
    found = {
        "corrupt": len(check.corrupt) - len(rows),
        "orphaned": len(check.orphans),
        "missing": len(check.missing),
    }
    wrong = []
    if any(found.values()):
        counts = ", ".join(f"{count} {kind}" for kind, count in found.items() if count)
        wrong.append(f"{counts}, which {remedy} removes (caches are computed again when needed)")
    if rows:
        wrong.append(
            f"{len(rows)} damaged in {FILE}, which prune leaves: restore it from a backup, or "
            "delete those chunks and add them anew"
        )
    complain(f"not clean, {check.checked} checked: {'; '.join(wrong)}")
    raise typer.Exit(1)


@store_app.command()
def prune(folder: Folder) -> None:
    """Remove what verify reports, and caches that no document refers to."""
    from kvlink_rag.index.check import is_index, prune_index

    with _caches(folder) as store, progress_bar("Pruning") as progress:
        check = prune_index(folder, progress) if is_index(folder) else store.prune(progress)
    _print_check(check, "removed ")
    kinds = (check.corrupt, check.orphans, check.missing, check.unreferenced)
    typer.echo(f"{check.checked} checked, {sum(map(len, kinds))} removed")


@store_app.command("export")
def export_archive(
    folder: Folder,
    archive: Annotated[Path, typer.Argument(metavar="FILE", help="The archive, a tar file.")],
) -> None:
    """Write an index or store with all its caches into one file."""
    from kvlink_rag.index.archive import write_archive

    with progress_bar("Exporting") as progress:
        files = write_archive(folder, archive, progress)
    typer.echo(f"{archive}: {files} files, {size_text(archive.stat().st_size)}")


@store_app.command("import")
def import_archive(
    archive: Annotated[Path, typer.Argument(metavar="FILE", help="What export wrote.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder.")],
) -> None:
    """Make an index or store from such a file; everything in it is verified."""
    from kvlink_rag.index.archive import read_archive

    with progress_bar("Importing") as progress:
        check = read_archive(archive, folder, progress)
    typer.echo(f"{folder}: {check.checked} caches, all verified")


@store_app.command()
def estimate(
    paths: Annotated[
        list[str], typer.Argument(metavar="PATH...", help="Text, Markdown and PDF files, folders.")
    ],
    model: Annotated[str | None, typer.Option(help="Hub id, folder or GGUF file.")] = None,
    adapter: Annotated[str, typer.Option(help="Folder or name of an adapter.")] = "",
    chunk_tokens: Annotated[int, typer.Option(help="Most tokens in a chunk.")] = 256,
    overlap: Annotated[int, typer.Option(help="Most tokens repeated from the chunk before.")] = 32,
    dtype: ModelDtype = "auto",
) -> None:
    """What indexing documents would cost and save, by codec: measured on a few of their chunks."""
    prepare()
    from rich.table import Table

    from kvlink_rag.index.documents import chunks_of
    from kvlink_rag.runners.transformers.models import DEFAULT_MODEL
    from kvlink_rag.tuning.estimate import estimate as run

    documents = read_documents(paths)
    if not documents:
        raise InputError(f"nothing to index: no text, Markdown or PDF in {', '.join(paths)}")
    engine = load_engine(model or DEFAULT_MODEL, adapter, dtype)
    chunks = [
        chunk
        for document in documents
        for chunk in chunks_of(document, engine.tokenizer, tokens=chunk_tokens, overlap=overlap)
    ]
    found = run(engine, chunks)
    typer.echo(
        f"{len(documents)} documents, {found.chunks} chunks ({found.distinct} different), "
        f"{found.tokens} tokens; reading one takes full prefill {1000 * found.compute_s:.0f} ms"
    )
    heading, *rows = found.rows()
    table = Table(*heading, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    Console(highlight=False).print(table)
    for codec, reason in found.refused.items():
        typer.echo(f"{codec} cannot be used: {reason}")


@store_app.command()
def migrate(
    folder: Folder,
    codec: Annotated[str, typer.Option(help="bf16, fp8, int8 or int4.")],
) -> None:
    """Write the caches of a raw store with another codec, in place; killed, run it again."""
    from kvlink_rag.store.folder.migrate import migrate as run

    with _caches(folder) as store:
        path, before = store.path, store.stat()
    with progress_bar("Migrating") as progress:
        after = run(path, codec, progress=progress)
    typer.echo(f"{after.entries} caches: {size_text(before.nbytes)} -> {size_text(after.nbytes)}")


@store_app.command()
def budget(
    folder: Folder,
    size: Annotated[
        str | None, typer.Argument(help="Most bytes of caches, such as 20GB; none: no limit.")
    ] = None,
    document: Annotated[
        str | None, typer.Option(help="Most bytes of the caches of one file; none: no limit.")
    ] = None,
    namespace: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=SIZE for files whose path, or documents whose id, begins with NAME; "
            "repeatable."
        ),
    ] = None,
) -> None:
    """Show or set how much a store may hold; what is worth least is removed at once."""
    from kvlink_rag.store import Budget

    with _caches(folder) as store:
        old = store.budget
        limits = dict(old.namespaces)
        for each in namespace or []:
            name, _, its = each.rpartition("=")
            if not name:
                raise InputError(f"--namespace {each!r}: write it as NAME=SIZE, or NAME=none")
            limits[name] = _limit(its) or 0
        new = Budget(
            old.max_bytes if size is None else _limit(size),
            old.document_bytes if document is None else _limit(document),
            {name: limit for name, limit in limits.items() if limit},
        )
        if new != old:
            store.set_budget(new)
        _print_budget(new)


@store_app.command()
def pin(folder: Folder, documents: Documents) -> None:
    """Never remove the caches of these documents to keep the budget."""
    with _caches(folder) as store:
        ids = _ids(folder, documents, [])
        store.pin(ids)
        typer.echo(f"pinned {len(ids)} documents ({len(store.pinned())} in all)")


@store_app.command()
def unpin(folder: Folder, documents: Documents) -> None:
    """Take pins back."""
    with _caches(folder) as store:
        store.unpin(_ids(folder, documents, store.pinned()))
        typer.echo(f"{len(store.pinned())} documents are pinned")


def _limit(text: str) -> int | None:
    return None if text.strip().lower() == "none" else parse_size(text)


def _ids(folder: Path, documents: list[str], pinned: list[str]) -> list[str]:
    """What documents are pinned by: files of an index by their path, all else by id."""
    from kvlink_rag.index.catalog import IndexCatalog
    from kvlink_rag.index.check import is_index

    if not is_index(folder):
        return documents
    catalog = IndexCatalog(folder)
    known = catalog.sources().keys() | set(pinned)
    ids: list[str] = []
    try:
        for document in documents:
            absolute = str(Path(document).absolute())
            if document not in known and document not in catalog and absolute not in known:
                raise InputError(f"{folder} has no file and no chunk {document!r}")
            ids.append(document if document in known or document in catalog else absolute)
    finally:
        catalog.close()
    return ids


@contextmanager
def _caches(folder: Path) -> Iterator[FolderStore]:
    """The store of an index, or a bare one; a mistyped folder must not become one."""
    from kvlink_rag.index.catalog import CACHES
    from kvlink_rag.index.check import is_index
    from kvlink_rag.store import FolderStore

    path = folder / CACHES if is_index(folder) else folder
    if path == folder and not any((path / name).exists() for name in ("catalog.sqlite", "chunks")):
        raise InputError(f"{folder} is neither an index nor a store of chunk caches")
    store = FolderStore(path)
    try:
        yield store
    finally:
        store.close()


def _print_stat(store: FolderStore) -> None:
    from kvlink_rag.store.folder.outbox import waiting

    found, usage = store.stat(), store.usage()
    typer.echo(
        f"caches       {found.entries} ({found.tokens} tokens, {size_text(found.nbytes)}, "
        f"codec {store.codec})"
    )
    typer.echo(f"in use by    {found.documents} documents ({found.unreferenced} caches by none)")
    _print_budget(usage.budget)
    rate = "nothing asked yet" if usage.hit_rate is None else f"{usage.hit_rate:.1%} hits"
    typer.echo(f"asked for    {usage.hits + usage.misses} times, {rate}")
    typer.echo(f"evicted      {usage.evicted} so far; {usage.pinned} caches are pinned")
    if (uploads := waiting(store.path)) is not None:
        typer.echo(f"remote       {uploads} uploads and deletions wait")
    if usage.oldest is not None and usage.last_used is not None:
        typer.echo(f"oldest       {_age(usage.oldest)}; last use {_age(usage.last_used)}")
    for model in usage.models:
        typer.echo(
            f"model        {model.fingerprint[:12]}: {model.entries} caches, "
            f"{model.tokens} tokens, {size_text(model.nbytes)}"
        )


def _print_budget(limits: Budget) -> None:
    sizes = [
        "no limit" if limits.max_bytes is None else size_text(limits.max_bytes),
        *([f"{size_text(limits.document_bytes)} a document"] if limits.document_bytes else []),
        *(f"{name}: {size_text(nbytes)}" for name, nbytes in limits.namespaces.items()),
    ]
    typer.echo(f"budget       {', '.join(sizes)}")


def _print_check(check: StoreCheck, prefix: str) -> None:
    for kind in ("corrupt", "orphans", "missing", "unreferenced"):
        print_list(f"{prefix}{kind}", getattr(check, kind))


def _age(when: float) -> str:
    seconds = max(time.time() - when, 0)
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} seconds ago"
