"""Indexing: the step of a pipeline that reads nodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.schema import BaseNode, TransformComponent
from llama_index.llms.kvlink.holder import EngineHandle, EngineHolder
from llama_index.llms.kvlink.nodes import node_chunks

from kvlink_rag import KVLinkEngine


class KVLinkTransform(EngineHolder, TransformComponent):
    """Computes and stores the chunk caches of nodes, and returns the nodes as they were.

    Put it last, behind what changes texts and metadata: a cache is of what a response synthesizer
    gives the model, ``node.get_content(MetadataMode.LLM)``. What the store has is not computed
    again. Nothing is released: old nodes may still be in an index (:class:`KVLinkVectorStore` and
    :func:`prune` know).

    An ``IngestionCache`` that knows the nodes skips this step, as it skips every other; caches that
    are missing then are computed by :class:`KVLinkVectorStore`, or by the first answer that needs
    them.

    Args:
        engine: whose model reads, and whose store keeps.
        show_progress: a progress bar on stderr while nodes are encoded. A pipeline's own
            ``show_progress`` does not reach its steps.

    Pickling is refused, so ``IngestionPipeline.run`` needs ``num_workers=None``.

    Raises (when called):
        InputError: a node is longer than the model's context.
        StoreError: a cache cannot be written.
    """

    _handle: EngineHandle = PrivateAttr()
    caches: str = Field(description="Identity of the caches made: model, prefix and format.")
    show_progress: bool = Field(default=True, exclude=True)

    def __init__(self, engine: KVLinkEngine, show_progress: bool = True) -> None:
        fields: dict[str, Any] = {
            "caches": engine.keys(["caches"])[0],  # changes with whatever makes caches differ
            "show_progress": show_progress,
        }
        super().__init__(**fields)
        self._handle = EngineHandle(lambda: engine)

    @classmethod
    def class_name(cls) -> str:
        """The name in an ingestion cache's key."""
        return "KVLinkTransform"

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """Store the nodes' caches; returns ``nodes``."""
        self.engine.index(node_chunks(nodes), progress=self.show_progress)
        return nodes

    async def acall(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """:meth:`__call__` in a thread: the event loop stays free."""
        await self.engine.aindex(node_chunks(nodes), progress=self.show_progress)
        return nodes
