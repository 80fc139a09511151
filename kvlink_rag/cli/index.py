"""The command ``kvlink index``."""

from __future__ import annotations

import os
import shutil
import sys
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvlink_rag.cli.options import Behind, Dtype, RemoteURL
from kvlink_rag.cli.shared import (
    complain,
    list_skipped,
    load_engine,
    prepare,
    print_list,
    size_text,
)
from kvlink_rag.errors import IndexMismatchError, InputError, StoreError

if TYPE_CHECKING:
    from kvlink_rag.engine.engine import KVLinkEngine
    from kvlink_rag.index.cost import Cost
    from kvlink_rag.index.ingest import Plan, Splitting, Summary, Work
    from kvlink_rag.store import EncryptionKey

ASK_ABOVE = 10**9
"""Bytes of new caches above which a person is asked."""

AT_FIRST = {"adapter": "", "dtype": "auto", "cache_after": "0"}
"""What an index has that does not say."""
KEPT = ("model", "model_name", "chunk_tokens", "overlap", *AT_FIRST)
"""Settings of an index that hold until others are given."""


@dataclass(frozen=True)
class Keeping:
    """How caches are to be kept."""

    codec: str | None
    after: int
    """The retrieval that stores a cache; 0 for indexing itself."""
    key: EncryptionKey | None
    remote: str | None


def index(
    paths: Annotated[
        list[str], typer.Argument(metavar="PATH...", help="Text, Markdown and PDF files, folders.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The index' folder.")],
    model: Annotated[
        str | None,
        typer.Option(help="Hub id, folder or GGUF file. Default: as before, or a small one."),
    ] = None,
    chunk_tokens: Annotated[
        int | None, typer.Option(help="Most tokens in a chunk. Default: as before, or 256.")
    ] = None,
    overlap: Annotated[
        int | None,
        typer.Option(help="Most tokens repeated from the chunk before. Default: as before, or 32."),
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(help="Folder or name of an adapter. Default: as before, or none."),
    ] = None,
    codec: Annotated[
        str | None,
        typer.Option(
            help="Of a new index: raw, bf16, fp8, int8, int4, or auto: the smallest that hardly "
            "changes answers. Default: int8."
        ),
    ] = None,
    cache_after: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Store caches now (0), or when a chunk is retrieved for the n-th time. "
            "Default: as before, or now.",
        ),
    ] = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="Of the model and its caches. Default: as before, or the checkpoint's."),
    ] = None,
    encode_behind: Annotated[
        Behind | None,
        typer.Option(
            help="What chunks are encoded behind. Default: as before, the adapter's, or documents."
        ),
    ] = None,
    encrypt: Annotated[
        bool,
        typer.Option("--encrypt", help="Of a new index: caches, with the key in KVLINK_STORE_KEY."),
    ] = False,
    remote: RemoteURL = None,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Do not ask before caches of more than 1 GB.")
    ] = False,
) -> None:
    """Bring an index up to date: index what changed, remove what vanished."""
    prepare()
    from kvlink_rag.index.ingest import make_plan
    from kvlink_rag.store import env_key
    from kvlink_rag.store.codec import check_codec

    if codec is not None and codec != "auto":
        check_codec(codec)
    known, recorded = _known(out)
    splitting = _splitting(out, known, model, chunk_tokens, overlap)
    adapter = _absolute(adapter) if adapter is not None else known.get("adapter", "")
    splitting = replace(
        splitting,
        adapter=adapter,
        dtype=dtype or known.get("dtype", "auto"),
        encode_behind=_behind(out, adapter, encode_behind),
    )
    after = int(known.get("cache_after", 0)) if cache_after is None else cache_after
    keeping = Keeping(codec, after, env_key if encrypt else None, remote or None)
    plan = make_plan(paths, recorded, splitting)
    if not recorded and not plan.changed:
        list_skipped(plan.skipped, plan.left_out)
        raise InputError(f"nothing to index: no text, Markdown or PDF in {', '.join(paths)}")
    if plan.nothing_to_do:
        _list_summary(out, _settle(out, plan, splitting, keeping))
    else:
        _list_summary(out, _update(out, plan, splitting, keeping, yes))


def _known(out: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Settings and files that an index was made with."""
    from kvlink_rag.index.catalog import IndexCatalog
    from kvlink_rag.index.check import is_index

    if not is_index(out):
        if out.exists() and not out.is_dir():
            raise StoreError(f"cannot open the index {out}: it is a file, name a folder")
        return {}, {}
    with closing(IndexCatalog(out)) as catalog:
        known = {name: value for name in KEPT if (value := catalog.meta(name))}
        return known, catalog.sources()


def _splitting(
    out: Path, known: dict[str, str], model: str | None, tokens: int | None, overlap: int | None
) -> Splitting:
    """The settings given, else those that the index was made with, else the defaults."""
    from kvlink_rag.index.ingest import Splitting
    from kvlink_rag.runners.transformers.models import DEFAULT_MODEL

    before = known.get("model") or known.get("model_name")
    model = model and _absolute(model)
    if model and before and model != before:
        raise IndexMismatchError(
            f"{out} was made with the model {before}: leave --model out, or index into another "
            f"folder for {model}"
        )
    return Splitting(
        tokens=tokens if tokens is not None else int(known.get("chunk_tokens", 256)),
        overlap=overlap if overlap is not None else int(known.get("overlap", 32)),
        model=model or before or DEFAULT_MODEL,
    )


def _behind(out: Path, adapter: str, given: Behind | None) -> Behind:
    """What is given, else what the index was made with, else the adapter's, or the default.

    Raises:
        InputError: the adapter was trained for something else than is given.
    """
    from kvlink_rag.adapters.adapter import reads_its_own
    from kvlink_rag.adapters.load import load_adapter
    from kvlink_rag.index.behind import recorded_behind
    from kvlink_rag.index.catalog import IndexCatalog
    from kvlink_rag.index.check import is_index
    from kvlink_rag.prompt.layout import DEFAULT_BEHIND

    trained = load_adapter(adapter) if adapter else None
    own = DEFAULT_BEHIND if trained is None else trained.encode_behind
    if given and given != own and reads_its_own(trained):
        raise InputError(
            f"--encode-behind {given}: the adapter {adapter} was trained for chunks encoded behind "
            f"{own!r}; leave the option out"
        )
    if given or not is_index(out):
        return given or own
    with closing(IndexCatalog(out)) as catalog:
        return recorded_behind(catalog, trained) or own


def _absolute(name: str) -> str:
    """A path that exists, from the root on: the index may be used from anywhere. Else the name."""
    path = Path(name).expanduser()
    return os.path.abspath(path) if name and path.exists() else name


def _settle(out: Path, plan: Plan, splitting: Splitting, keeping: Keeping) -> Summary:
    """What there is to do without a model when no file has changed."""
    from kvlink_rag.index.catalog import IndexCatalog
    from kvlink_rag.index.ingest import settle

    codec = None if keeping.codec == "auto" else keeping.codec
    summary = settle(plan, out, codec, keeping.key, keeping.remote)
    chosen = _chosen(splitting, keeping)
    with closing(IndexCatalog(out)) as catalog:
        if any((catalog.meta(name) or AT_FIRST[name]) != chosen[name] for name in AT_FIRST):
            catalog.set_meta(chosen)
    return summary


def _chosen(splitting: Splitting, keeping: Keeping) -> dict[str, str]:
    """Settings that may change and leave an index's files and caches as they are."""
    return {
        "adapter": splitting.adapter,
        "dtype": splitting.dtype,
        "cache_after": str(keeping.after),
    }


def _update(out: Path, plan: Plan, splitting: Splitting, keeping: Keeping, yes: bool) -> Summary:
    """Read what changed, say what its caches will take, and index it."""
    from kvlink_rag.index.behind import behind_to_record
    from kvlink_rag.index.catalog import CACHES
    from kvlink_rag.index.check import is_index
    from kvlink_rag.index.index import KVIndex
    from kvlink_rag.index.ingest import carry_out, read_files
    from kvlink_rag.tuning.codec import resolve_codec

    engine = load_engine(
        splitting.model, splitting.adapter, splitting.dtype, splitting.encode_behind
    )
    work = read_files(plan, engine, splitting)
    if not work.files and not is_index(out):
        list_skipped(work.skipped, plan.left_out)
        raise InputError("nothing to index: no file could be read and split")
    # `auto` is measured now, so that what it will take can be said
    codec = resolve_codec(keeping.codec, out / CACHES, engine, work.chunks)
    keeping = replace(keeping, codec=codec)
    if work.files:
        _announce(out, engine, work, keeping, yes)
    with KVIndex.open(
        out,
        engine,
        codec=keeping.codec,
        encryption_key=keeping.key,
        remote=keeping.remote,
        cache_after=keeping.after,
    ) as opened:
        settings = {"chunk_tokens": str(splitting.tokens), "overlap": str(splitting.overlap)}
        settings |= {"model": splitting.model}
        settings |= behind_to_record(engine.encode_behind, engine.adapter)
        opened.catalog.set_meta(settings | _chosen(splitting, keeping))
        return carry_out(work, opened)


def _announce(out: Path, engine: KVLinkEngine, work: Work, keeping: Keeping, yes: bool) -> None:
    """Say what indexing will take, and ask where that is much.

    Raises:
        typer.Exit: the answer is no. The folder is as it was.
    """
    if keeping.after:
        typer.echo(f"no caches yet: each is stored at retrieval {keeping.after} of its chunk")
        return
    cost, codec, budget = _cost(out, engine, work, keeping)
    nbytes = cost.nbytes if budget is None else min(cost.nbytes, budget)
    free = _free_bytes(out)
    if cost.tokens:
        s = "" if cost.caches == 1 else "s"
        most = "at most " if keeping.remote else ""  # what others have stored is not encoded
        kept = f", of which the budget keeps {size_text(nbytes)}" if nbytes < cost.nbytes else ""
        typer.echo(
            f"to encode: {most}{cost.tokens:,} tokens in {cost.caches:,} chunk{s}; their caches "
            f"take {size_text(cost.nbytes)} (codec {codec}){kept}; {size_text(free)} are free"
        )
    if nbytes <= min(ASK_ABOVE, free) or yes:
        return
    if not _on_terminal():
        complain("no terminal to ask on: going on")
    elif not typer.confirm("Go on?", err=True):
        complain("nothing was indexed")
        raise typer.Exit(1)


def _cost(
    out: Path, engine: KVLinkEngine, work: Work, keeping: Keeping
) -> tuple[Cost, str, int | None]:
    """What the caches take, with which codec, and the folder's budget in bytes.

    The folder is only looked at; the remote is not asked.
    """
    from kvlink_rag.index.catalog import CACHES
    from kvlink_rag.index.cost import cost_of
    from kvlink_rag.store import FolderStore, is_store
    from kvlink_rag.store.codec import DEFAULT_CODEC

    if not is_store(out / CACHES):
        codec = keeping.codec or DEFAULT_CODEC
        return cost_of(engine, work.chunks, codec), codec, None
    store = FolderStore(out / CACHES, keeping.codec, encryption_key=keeping.key)
    with closing(store):
        cost = cost_of(engine.with_store(store), work.chunks)
        return cost, store.codec, store.budget.max_bytes


def _free_bytes(folder: Path) -> int:
    """On the disk of a folder that may not be there yet."""
    there = folder.expanduser().absolute()
    while not there.exists():
        there = there.parent
    return shutil.disk_usage(there).free


def _on_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


def _list_summary(out: Path, summary: Summary) -> None:
    print_list("added", summary.added)
    print_list("changed", summary.changed)
    print_list("removed", summary.removed)
    print_list("note", [f"{path}: {note}" for path, note in summary.notes])
    list_skipped(summary.skipped, summary.left_out)
    typer.echo(
        f"{out}: {len(summary.added)} added, {len(summary.changed)} changed, "
        f"{summary.unchanged} unchanged, {len(summary.removed)} removed, "
        f"{len(summary.skipped)} skipped, {len(summary.left_out)} left out "
        f"({summary.chunks} chunks indexed, caches take {size_text(summary.nbytes)})"
    )
    if summary.waiting:
        typer.echo(f"{summary.waiting} uploads wait: the same command goes on with them")
