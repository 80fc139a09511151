"""Which document refers to which chunk cache, while documents come and go."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace

from langchain_core.documents import Document
from langchain_core.prompts import BasePromptTemplate

from kvlink_rag import InputError, KVLinkEngine, KVLinkWarning
from langchain_kvlink.documents import as_chunk

Held = list[str | None]
"""For each document the key of its chunk cache; None when it has no text."""


class DocumentCaches:
    """Encodes documents before a vector store takes them, and refers to their caches afterwards.

    The ids are known only then. Until then each cache is held by an owner named after its key, so
    that a process that is killed in between leaves nothing that adding the same documents again
    would not settle.

    Args:
        engine: encodes; its store keeps the caches.
        document_prompt: renders a document to its chunk's text.
        show_progress: while documents are encoded.
    """

    def __init__(
        self,
        engine: KVLinkEngine,
        document_prompt: BasePromptTemplate[str] | None = None,
        show_progress: bool = True,
    ) -> None:
        self.engine = engine
        self.document_prompt = document_prompt
        self.show_progress = show_progress

    def hold(self, documents: Iterable[Document]) -> Held:
        """Encode what has no cache yet, and hold all.

        Raises:
            InputError: a document is longer than the model's context, or cannot be rendered.
            StoreError: a cache cannot be written. Nothing is held then.
        """
        chunks = [as_chunk(document, self.document_prompt) for document in documents]
        keys = iter(self.engine.keys(chunk for chunk in chunks if chunk))
        held = [next(keys) if chunk else None for chunk in chunks]
        owned = [
            replace(chunk, id=_owner(key))
            for chunk, key in zip(chunks, held, strict=True)
            if chunk and key
        ]
        try:
            self.engine.index(owned, progress=self.show_progress)
        except BaseException:
            self.let_go(held)
            raise
        return held

    def refer(self, ids: Sequence[object] | None, held: Held) -> None:
        """Let documents refer to what is held for them, and to nothing else.

        Args:
            ids: of the documents, as the vector store returned them.
        """
        if ids is None or len(ids) != len(held):
            self.let_go(held)
            warnings.warn(
                f"the vector store returned {len(ids or ())} ids for {len(held)} documents, so "
                "their chunk caches were dropped; they will be computed when first asked for",
                KVLinkWarning,
                stacklevel=4,
            )
            return
        # of several with one id, the last is what the vector store has
        keys = {str(id): key for id, key in zip(ids, held, strict=True) if id is not None}
        self.engine.store.release(list(keys))
        self.engine.store.refer([(id, key) for id, key in keys.items() if key])
        self.let_go(held)

    def prefetch(self, found: Iterable[Document | tuple[Document, float]]) -> None:
        """Begin to load the caches of documents that were found, with or without scores."""
        chunks = []
        for each in found:
            with contextlib.suppress(InputError):  # cannot be shown: said when it is asked about
                document = each[0] if isinstance(each, tuple) else each
                chunks.append(as_chunk(document, self.document_prompt))
        self.engine.prefetch(chunk for chunk in chunks if chunk)

    def let_go(self, held: Held) -> None:
        """Hold no longer: what no document refers to is removed."""
        self.engine.store.release([_owner(key) for key in held if key])

    def release(self, ids: Iterable[object]) -> None:
        """These documents are gone, and with them the caches that no other refers to."""
        self.engine.store.release([str(id) for id in ids])

    def documents(self) -> list[str]:
        """Ids of everything that refers to a cache, other users of the store included."""
        return sorted({id for id, _ in self.engine.store.references()})


def _owner(key: str) -> str:
    return f"langchain-kvlink-adding-{key}"
