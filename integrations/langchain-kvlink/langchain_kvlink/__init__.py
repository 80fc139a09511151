"""LangChain components that read documents from chunk KV caches (:mod:`kvlink_rag`)."""

from langchain_kvlink.chain import create_kvlink_documents_chain
from langchain_kvlink.chat_model import ChatKVLink
from langchain_kvlink.vectorstore import KVLinkVectorStore

__all__ = ["ChatKVLink", "KVLinkVectorStore", "create_kvlink_documents_chain"]
