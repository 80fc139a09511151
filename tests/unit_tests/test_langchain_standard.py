"""LangChain's own standard suites, on tiny models."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import faiss
import pytest
import tiny
import tiny_tools
from langchain_community.docstore.in_memory import InMemoryDocstore
from langchain_community.vectorstores import FAISS
from langchain_core.language_models import BaseChatModel
from langchain_core.vectorstores import InMemoryVectorStore, VectorStore
from langchain_kvlink import ChatKVLink, KVLinkVectorStore
from langchain_tests.integration_tests import (
    ChatModelIntegrationTests,
    VectorStoreIntegrationTests,
)
from langchain_tests.integration_tests.vectorstores import EMBEDDING_SIZE
from langchain_tests.unit_tests import ChatModelUnitTests

from kvlink_rag import KVLinkEngine

for _suite in (VectorStoreIntegrationTests, ChatModelIntegrationTests):
    for _name, _test in inspect.getmembers(_suite, inspect.iscoroutinefunction):
        pytest.mark.asyncio(_test)  # the suites leave that to a setting of their users


def ids_in_use(error: type[Exception]) -> pytest.MarkDecorator:
    reason = "FAISS refuses ids that it has; the wrapper changes nothing about that"
    return pytest.mark.xfail(reason=reason, raises=error, strict=True)


unknown_ids = pytest.mark.xfail(
    reason="FAISS raises for ids that it does not have; the wrapper changes nothing about that",
    raises=ValueError,
    strict=True,
)


class TestInMemory(VectorStoreIntegrationTests):
    @pytest.fixture
    def vectorstore(self) -> VectorStore:
        return KVLinkVectorStore(InMemoryVectorStore(self.get_embeddings()), tiny.engine())


class TestFaiss(VectorStoreIntegrationTests):
    @pytest.fixture
    def vectorstore(self) -> VectorStore:
        index = faiss.IndexFlatL2(EMBEDDING_SIZE)
        wrapped = FAISS(self.get_embeddings(), index, InMemoryDocstore(), {})
        return KVLinkVectorStore(wrapped, tiny.engine())

    @ids_in_use(ValueError)
    def test_add_documents_with_ids_is_idempotent(self, vectorstore: VectorStore) -> None:
        super().test_add_documents_with_ids_is_idempotent(vectorstore)

    @ids_in_use(ValueError)
    def test_add_documents_by_id_with_mutation(self, vectorstore: VectorStore) -> None:
        super().test_add_documents_by_id_with_mutation(vectorstore)

    @pytest.mark.asyncio
    @ids_in_use(ValueError)
    async def test_add_documents_with_ids_is_idempotent_async(
        self, vectorstore: VectorStore
    ) -> None:
        await super().test_add_documents_with_ids_is_idempotent_async(vectorstore)

    @pytest.mark.asyncio
    @ids_in_use(ValueError)
    async def test_add_documents_by_id_with_mutation_async(self, vectorstore: VectorStore) -> None:
        await super().test_add_documents_by_id_with_mutation_async(vectorstore)

    @unknown_ids
    def test_delete_missing_content(self, vectorstore: VectorStore) -> None:
        super().test_delete_missing_content(vectorstore)

    @pytest.mark.asyncio
    @unknown_ids
    async def test_delete_missing_content_async(self, vectorstore: VectorStore) -> None:
        await super().test_delete_missing_content_async(vectorstore)


@cache
def obliging_engine() -> KVLinkEngine:
    return tiny_tools.obliging_engine()


class WithTools:
    """A model whose chat template shows tools; the default model's does not."""

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatKVLink

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"engine": obliging_engine()}

    @property
    def supports_model_override(self) -> bool:
        return False  # another model is another ChatKVLink


class TestChatModelUnits(WithTools, ChatModelUnitTests):
    pass


class TestChatModel(WithTools, ChatModelIntegrationTests):
    @property
    def standard_chat_model_params(self) -> dict[str, Any]:
        return {**super().standard_chat_model_params, "max_tokens": 1000}  # of one byte each
