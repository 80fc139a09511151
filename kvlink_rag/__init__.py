"""RAG that answers at once: chunk KV caches computed at indexing time, linked at question time."""

from kvlink_rag.chunk import Chunk, ScoredChunk
from kvlink_rag.engine import Answer, AnswerStream, KVLinkEngine
from kvlink_rag.errors import (
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
    "ModelNotFoundError",
    "PromptTemplate",
    "Report",
    "ScoredChunk",
    "StoreError",
    "UnsupportedModelError",
]
