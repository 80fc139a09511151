"""LangChain's own standard suites, on the default model."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage
from langchain_kvlink import ChatKVLink
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests

from kvlink_rag import KVLinkEngine
from kvlink_rag.runners.transformers import models

pytestmark = pytest.mark.model

for _name, _test in inspect.getmembers(ChatModelIntegrationTests, inspect.iscoroutinefunction):
    pytest.mark.asyncio(_test)  # the suite leaves that to a setting of its users

DOCUMENTS = ["The Eiffel Tower is in Paris. It was built from 1887 to 1889."]


@cache
def engine() -> KVLinkEngine:
    return KVLinkEngine.from_pretrained(models.DEFAULT_MODEL)


class DefaultModel:
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatKVLink

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"engine": engine(), "max_tokens": 24}

    @property
    def standard_chat_model_params(self) -> dict[str, Any]:
        return {"temperature": 0, "timeout": 60, "stop": [], "max_retries": 2, "api_key": "test"}

    @property
    def has_tool_calling(self) -> bool:
        return engine().layout.supports_tools  # SmolLM2-135M's chat template shows none

    @property
    def has_structured_output(self) -> bool:
        return self.has_tool_calling

    @property
    def supports_image_inputs(self) -> bool:
        return False

    @property
    def supports_model_override(self) -> bool:
        return False  # another model is another ChatKVLink

    @property
    def supported_usage_metadata_details(self) -> dict[str, list[str]]:
        return {"invoke": ["cache_read_input"], "stream": ["cache_read_input"]}

    def invoke_with_cache_read_input(self, *, stream: bool = False) -> AIMessage:
        chat = ChatKVLink(engine=engine(), max_tokens=4)
        question = "Where is the tower?"
        chat.invoke(question, documents=DOCUMENTS)
        if not stream:
            return chat.invoke(question, documents=DOCUMENTS)
        first, *rest = chat.stream(question, documents=DOCUMENTS)
        return first + rest


@pytest.mark.slow  # the same suites run on tiny models in the unit tests
class TestUnits(DefaultModel, ChatModelUnitTests):
    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"engine": engine()}  # the suite itself sets max_tokens


@pytest.mark.slow
class TestIntegration(DefaultModel, ChatModelIntegrationTests):
    pass


def test_tokens_were_read_from_the_cache() -> None:
    for stream in (False, True):
        usage = DefaultModel().invoke_with_cache_read_input(stream=stream).usage_metadata
        assert usage is not None
        assert usage["input_token_details"]["cache_read"] > 20


def test_the_default_model_says_that_it_calls_no_tools() -> None:
    with pytest.raises(NotImplementedError, match="SmolLM2-135M-Instruct cannot call tools"):
        ChatKVLink(engine=engine()).bind_tools([])
