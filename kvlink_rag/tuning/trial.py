"""Twins of an engine to measure codecs with: nothing of it is stored, counted or told."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path

from kvlink_rag.chunk import RAW, Chunk
from kvlink_rag.engine.engine import KVLinkEngine
from kvlink_rag.engine.report import Observers
from kvlink_rag.engine.request import Request
from kvlink_rag.errors import StoreError
from kvlink_rag.prompt.conversation import Message
from kvlink_rag.prompt.segments import Prompt
from kvlink_rag.store import FolderStore
from kvlink_rag.store.codec import CODECS, codec_for


@contextmanager
def trial_engines(
    engine: KVLinkEngine, folder: Path | None = None
) -> Iterator[dict[str, KVLinkEngine]]:
    """Twins by codec, each with an empty folder of that codec, until the block ends.

    Args:
        folder: where these are made; None takes the place for temporary files.
    """
    with tempfile.TemporaryDirectory(prefix="kvlink-trial-", dir=folder) as name, ExitStack() as on:
        twins = {}
        for codec in CODECS:
            if codec_for(codec, engine.architecture.cache_dtype) == codec:
                store = on.enter_context(closing(FolderStore(Path(name) / codec, codec)))
                twins[codec] = twin = engine.with_store(store)
                twin.pipeline = replace(twin.pipeline, observers=Observers())
        yield twins


Asked = str | Sequence[Message]


def reuse_of(engine: KVLinkEngine, question: Asked, chunks: Sequence[str | Chunk]) -> Request:
    """The request for `reuse`.

    Raises:
        InputError: question or chunks have no meaning.
    """
    return Request.of(question, chunks, {"strategy": "reuse"}, {}, engine.runner)


def prompt_of(engine: KVLinkEngine, question: Asked, chunks: Sequence[str | Chunk]) -> Prompt:
    """The prompt of `reuse`, with room for the first token.

    Raises:
        InputError: it is too long, or empty.
    """
    return engine.pipeline.prompts.of(reuse_of(engine, question, chunks), 1)


def store_wanted(
    twins: dict[str, KVLinkEngine], question: Asked, chunks: Sequence[str | Chunk]
) -> dict[str, str]:
    """Compute what a prompt wants, and store it in every twin.

    Returns:
        why, by codec, for those that cannot hold it; they are removed from ``twins``.

    Raises:
        InputError: the prompt is too long, or empty.
        StoreError: not even `raw` can be written.
    """
    raw, refused = twins[RAW], {}
    caches = raw.pipeline.caches
    for wanted in prompt_of(raw, question, chunks).wanted:
        if not wanted[0] or raw.store.has(caches.key_of(wanted)):
            continue
        record = caches.one(wanted, keep=False)
        for codec, twin in list(twins.items()):  # `raw` is the first of them
            try:
                twin.store.put(record)
            except StoreError as error:
                if codec == RAW:
                    raise
                refused[codec] = str(error)
                del twins[codec]
    return refused
