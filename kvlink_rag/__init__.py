"""RAG that answers at once: chunk KV caches computed at indexing time, linked at question time.

The names below are imported when they are first used: `kvlink --help` needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvlink_rag.adapters.adapter import Adapter
    from kvlink_rag.chunk import Chunk, ScoredChunk
    from kvlink_rag.engine.answer import Answer, AnswerStream
    from kvlink_rag.engine.engine import KVLinkEngine
    from kvlink_rag.engine.report import IndexReport, Report
    from kvlink_rag.errors import (
        AdapterError,
        AdapterRequiredError,
        IndexMismatchError,
        InputError,
        KVLinkError,
        KVLinkWarning,
        ModelNotFoundError,
        StoreError,
        UnsupportedModelError,
    )
    from kvlink_rag.index.index import KVIndex
    from kvlink_rag.prompt.conversation import CHUNKS, Message
    from kvlink_rag.prompt.layout import PromptTemplate

__all__ = [
    "CHUNKS",
    "Adapter",
    "AdapterError",
    "AdapterRequiredError",
    "Answer",
    "AnswerStream",
    "Chunk",
    "IndexMismatchError",
    "IndexReport",
    "InputError",
    "KVIndex",
    "KVLinkEngine",
    "KVLinkError",
    "KVLinkWarning",
    "Message",
    "ModelNotFoundError",
    "PromptTemplate",
    "Report",
    "ScoredChunk",
    "StoreError",
    "UnsupportedModelError",
]

_MODULES = {
    "CHUNKS": "prompt.conversation",
    "Adapter": "adapters.adapter",
    "Answer": "engine.answer",
    "AnswerStream": "engine.answer",
    "Chunk": "chunk",
    "IndexReport": "engine.report",
    "KVIndex": "index.index",
    "KVLinkEngine": "engine.engine",
    "Message": "prompt.conversation",
    "PromptTemplate": "prompt.layout",
    "Report": "engine.report",
    "ScoredChunk": "chunk",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES.get(name, 'errors')}"), name)


def __dir__() -> list[str]:
    return __all__
