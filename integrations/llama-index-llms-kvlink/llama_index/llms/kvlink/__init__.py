"""LlamaIndex on linked chunk caches: what was read at indexing time is not read again to answer."""

from llama_index.llms.kvlink.chat_engine import KVLinkContextChatEngine
from llama_index.llms.kvlink.llm import KVLinkLLM
from llama_index.llms.kvlink.prune import prune
from llama_index.llms.kvlink.query_engine import KVLinkQueryEngine
from llama_index.llms.kvlink.synthesizer import KVLinkSynthesizer
from llama_index.llms.kvlink.transform import KVLinkTransform
from llama_index.llms.kvlink.vector_store import KVLinkVectorStore

__all__ = [
    "KVLinkContextChatEngine",
    "KVLinkLLM",
    "KVLinkQueryEngine",
    "KVLinkSynthesizer",
    "KVLinkTransform",
    "KVLinkVectorStore",
    "prune",
]
