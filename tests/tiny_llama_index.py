"""What tests of the LlamaIndex integration share: documents, embeddings, what is counted."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import faiss
import tiny
from llama_index.core import Document, StorageContext, VectorStoreIndex
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.bridge.pydantic import Field
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.base import BaseEvent
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.schema import NodeWithScore, TransformComponent
from llama_index.core.vector_stores import SimpleVectorStore
from llama_index.core.vector_stores.types import BasePydanticVectorStore
from llama_index.llms.kvlink import KVLinkLLM
from llama_index.vector_stores.faiss import FaissVectorStore

from kvlink_rag import KVLinkEngine
from kvlink_rag.chunk import ChunkKV
from kvlink_rag.store import FolderStore, MemoryStore

TOPICS = ["bees", "towers", "bridges", "rivers", "planets", "whales", "clocks", "salt"]
DIMENSION = 512


class CountingStore(MemoryStore):
    """Remembers the key of every cache that is stored, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.stored: list[str] = []

    def put(self, record: ChunkKV, documents: Iterable[str] = ()) -> None:
        self.stored.append(record.key)
        super().put(record, documents)


class CountingFolder(FolderStore):
    """The same on disk."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.stored: list[str] = []

    def put(self, record: ChunkKV, documents: Iterable[str] = ()) -> None:
        self.stored.append(record.key)
        super().put(record, documents)

    def disk(self) -> int:
        """Bytes of the cache files."""
        return sum(file.stat().st_size for file in self.path.rglob("*.safetensors"))


class WordEmbedding(BaseEmbedding):
    """Counts words by their checksum: texts with the same words are near."""

    def _get_text_embedding(self, text: str) -> list[float]:
        vector = [0.01] * DIMENSION
        for word in text.lower().split():
            vector[zlib.crc32(word.strip(".,?").encode()) % DIMENSION] += 1.0
        norm = sum(count * count for count in vector) ** 0.5
        return [count / norm for count in vector]

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)


def text(topic: str, number: int = 0) -> str:
    hum = " ".join(f"{topic}{n}" for n in range(number + 1))  # no two are as far from a question
    return f"All about {topic}. {topic.capitalize()} were seen {number + 2} times. They {hum}."


def documents(topics: Sequence[str] = TOPICS) -> list[Document]:
    return [
        Document(text=text(topic, n), id_=topic, metadata={"shelf": n})
        for n, topic in enumerate(topics)
    ]


def engine(**options: Any) -> KVLinkEngine:
    return tiny.engine(**{"store": CountingStore(), **options})


def llm(made: KVLinkEngine | None = None, **settings: Any) -> KVLinkLLM:
    return KVLinkLLM(engine=made or engine(), **{"max_tokens": 12, **settings})


def vector_store(kind: str) -> BasePydanticVectorStore:
    if kind == "faiss":
        return FaissVectorStore(faiss.IndexFlatL2(DIMENSION))
    return SimpleVectorStore()


def index(
    docs: Sequence[Document],
    *transformations: TransformComponent,
    store: BasePydanticVectorStore | None = None,
) -> VectorStoreIndex:
    return VectorStoreIndex.from_documents(
        docs,
        transformations=list(transformations) or [SentenceSplitter()],
        embed_model=WordEmbedding(),
        storage_context=StorageContext.from_defaults(vector_store=store or SimpleVectorStore()),
    )


def ids(nodes: Sequence[NodeWithScore]) -> list[str | None]:
    return [node.node.ref_doc_id for node in nodes]


class Recorder(BaseEventHandler):
    """The instrumentation events since it was made, while it is entered."""

    events: list[BaseEvent] = Field(default_factory=list)

    def handle(self, event: BaseEvent, **kwargs: Any) -> None:
        self.events.append(event)

    def __enter__(self) -> Recorder:
        get_dispatcher().add_event_handler(self)
        return self

    def __exit__(self, *error: object) -> None:
        get_dispatcher().event_handlers.remove(self)

    @property
    def names(self) -> list[str]:
        """Types in order; of the many that tell of progress, the first of a row."""
        names = [event.class_name() for event in self.events]
        rows = zip(names, ["", *names], strict=False)
        return [name for name, before in rows if name != before or "InProgress" not in name]

    def last(self, name: str) -> Any:
        return [event for event in self.events if event.class_name() == name][-1]
