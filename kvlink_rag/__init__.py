"""RAG that answers at once: chunk KV caches computed at indexing time, linked at question time.

The names below are imported when they are first used: `kvlink --help` needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvlink_rag.adapter import Adapter
    from kvlink_rag.answer import Answer, AnswerStream
    from kvlink_rag.chunk import Chunk, ScoredChunk
    from kvlink_rag.conversation import CHUNKS, Message
    from kvlink_rag.engine import KVLinkEngine
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
    from kvlink_rag.index import KVIndex
    from kvlink_rag.prompt import PromptTemplate
    from kvlink_rag.report import IndexReport, Report

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
    "CHUNKS": "conversation",
    "Adapter": "adapter",
    "Answer": "answer",
    "AnswerStream": "answer",
    "Chunk": "chunk",
    "IndexReport": "report",
    "KVIndex": "index",
    "KVLinkEngine": "engine",
    "Message": "conversation",
    "PromptTemplate": "prompt",
    "Report": "report",
    "ScoredChunk": "chunk",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES.get(name, 'errors')}"), name)


def __dir__() -> list[str]:
    return __all__
