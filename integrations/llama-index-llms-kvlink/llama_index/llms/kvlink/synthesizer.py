"""Answers from retrieved nodes."""

from __future__ import annotations

import copy
import uuid
from collections.abc import AsyncGenerator, Generator, Sequence
from typing import Any

from llama_index.core.base.llms.types import ChatMessage, ChatResponse
from llama_index.core.base.response.schema import RESPONSE_TYPE
from llama_index.core.callbacks import CallbackManager
from llama_index.core.instrumentation import get_dispatcher  # type: ignore[attr-defined]
from llama_index.core.instrumentation.events.llm import LLMPredictEndEvent, LLMPredictStartEvent
from llama_index.core.instrumentation.events.synthesis import (
    GetResponseEndEvent,
    GetResponseStartEvent,
)
from llama_index.core.prompts import BasePromptTemplate, PromptTemplate
from llama_index.core.prompts.mixin import PromptDictType
from llama_index.core.response_synthesizers import BaseSynthesizer
from llama_index.core.schema import BaseNode, NodeWithScore, QueryType
from llama_index.core.types import RESPONSE_TEXT_TYPE
from llama_index.llms.kvlink.llm import KVLinkLLM, as_llm
from llama_index.llms.kvlink.messages import put_documents
from llama_index.llms.kvlink.nodes import reference

from kvlink_rag import Chunk, InputError, KVLinkEngine

dispatcher = get_dispatcher(__name__)

ENGINES_WORDING = PromptTemplate("{query_str}")
"""No place for the context: the engine puts it before the question, in its own words."""


class KVLinkSynthesizer(BaseSynthesizer):
    """Gives each retrieved node to the model as one chunk, whose cache is linked and not computed.

    All nodes are in one prompt, in the order of the retriever and its postprocessors. The answer is
    that of ``engine.answer(query, [node.get_content(MetadataMode.LLM) for node in nodes])``.

    ``response.metadata["kvlink"]`` holds the fields of :class:`kvlink_rag.Report` (hits, misses,
    ttft_s, ...), of a streaming response once it has been read to the end.

    Args:
        llm: a :class:`KVLinkLLM`; its settings hold.
        engine: an engine instead, with default settings.
        text_qa_template: any prompt template. Where it has ``{context_str}`` the nodes stand;
            without that they stand in the last message of the user, in the engine's wording, which
            is also the default.
        streaming: answer piece by piece (a query engine's ``streaming=True`` does not reach a
            synthesizer that it is given).
        output_cls: refused; structured output does not go with linked caches yet.

    Raises:
        InputError: no KVLinkLLM, an ``output_cls``, or a stream and an output parser.
    """

    _llm: KVLinkLLM

    def __init__(
        self,
        llm: KVLinkLLM | None = None,
        *,
        engine: KVLinkEngine | None = None,
        text_qa_template: BasePromptTemplate | None = None,
        streaming: bool = False,
        callback_manager: CallbackManager | None = None,
        empty_response: str | None = None,
        output_cls: None = None,
    ) -> None:
        if output_cls is not None:
            raise InputError(
                f"output_cls={output_cls!r} cannot be used: answers from linked caches are text; "
                "parse response.response, or use a stock synthesizer"
            )
        super().__init__(
            llm=as_llm(llm, engine),
            callback_manager=callback_manager,
            streaming=streaming,
            empty_response=empty_response,
        )
        self._text_qa_template = text_qa_template or ENGINES_WORDING
        self._nodes: Sequence[NodeWithScore] = ()
        self._report: dict[str, Any] = {}

    def _get_prompts(self) -> PromptDictType:
        return {"text_qa_template": self._text_qa_template}

    def _update_prompts(self, prompts: PromptDictType) -> None:
        self._text_qa_template = prompts.get("text_qa_template", self._text_qa_template)

    # The base class does all of this. It hands on texts only, and a cache is remembered by its
    # node: each call works on a twin of this synthesizer that knows the nodes.

    def synthesize(
        self,
        query: QueryType,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
        **response_kwargs: Any,
    ) -> RESPONSE_TYPE:
        """The answer to a query from nodes."""
        return super(KVLinkSynthesizer, self._twin(nodes)).synthesize(
            query, nodes, additional_source_nodes, **response_kwargs
        )

    async def asynthesize(
        self,
        query: QueryType,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
        **response_kwargs: Any,
    ) -> RESPONSE_TYPE:
        """:meth:`synthesize`; the event loop stays free."""
        return await super(KVLinkSynthesizer, self._twin(nodes)).asynthesize(
            query, nodes, additional_source_nodes, **response_kwargs
        )

    def _twin(self, nodes: Sequence[NodeWithScore]) -> KVLinkSynthesizer:
        twin = copy.copy(self)
        twin._nodes, twin._report = nodes, {}
        return twin

    def _get_metadata_for_response(self, nodes: list[BaseNode]) -> dict[str, Any]:
        return {**(super()._get_metadata_for_response(nodes) or {}), "kvlink": self._report}

    def get_response(
        self, query_str: str, text_chunks: Sequence[str], **response_kwargs: Any
    ) -> RESPONSE_TEXT_TYPE:
        """The answer to a query from texts.

        Args:
            response_kwargs: further variables of the prompt template.
        """
        dispatcher.event(GetResponseStartEvent(query_str=query_str, text_chunks=list(text_chunks)))
        response: RESPONSE_TEXT_TYPE
        if self._streaming:
            response = self._stream(query_str, text_chunks, response_kwargs)
        else:
            messages, documents = self._ask(query_str, text_chunks, response_kwargs)
            response = self._answered(self._llm.chat(messages, documents=documents))
        dispatcher.event(GetResponseEndEvent())
        return response

    async def aget_response(
        self, query_str: str, text_chunks: Sequence[str], **response_kwargs: Any
    ) -> RESPONSE_TEXT_TYPE:
        """:meth:`get_response`; the event loop stays free."""
        dispatcher.event(GetResponseStartEvent(query_str=query_str, text_chunks=list(text_chunks)))
        response: RESPONSE_TEXT_TYPE
        if self._streaming:
            response = self._astream(query_str, text_chunks, response_kwargs)
        else:
            messages, documents = self._ask(query_str, text_chunks, response_kwargs)
            response = self._answered(await self._llm.achat(messages, documents=documents))
        dispatcher.event(GetResponseEndEvent())
        return response

    def _costs(self, response: ChatResponse) -> None:
        self._report |= (response.raw or {}).get("report", {})

    def _answered(self, response: ChatResponse) -> str:
        self._costs(response)
        text = self._llm._parse_output(response.message.content or "")
        dispatcher.event(LLMPredictEndEvent(output=text))
        return text or self._empty_response

    def _stream(
        self, query_str: str, texts: Sequence[str], variables: dict[str, Any]
    ) -> Generator[str, None, None]:
        messages, documents = self._ask(query_str, texts, variables)
        for response in self._llm.stream_chat(messages, documents=documents):
            self._costs(response)
            if response.delta:
                yield response.delta

    async def _astream(
        self, query_str: str, texts: Sequence[str], variables: dict[str, Any]
    ) -> AsyncGenerator[str, None]:
        messages, documents = self._ask(query_str, texts, variables)
        async for response in await self._llm.astream_chat(messages, documents=documents):
            self._costs(response)
            if response.delta:
                yield response.delta

    def _ask(
        self, query_str: str, texts: Sequence[str], variables: dict[str, Any]
    ) -> tuple[list[ChatMessage], list[Chunk]]:
        """The messages, and the chunks whose place is not in them."""
        llm, template = self._llm, self._text_qa_template
        if self._streaming and (llm.output_parser or template.output_parser):
            raise InputError("an output parser needs the whole answer: leave streaming out")
        told = {"context_str": "\n\n".join(texts), "query_str": query_str, **variables}
        llm._log_template_data(template, **told)
        dispatcher.event(LLMPredictStartEvent(template=template, template_args=told))
        place = uuid.uuid4().hex  # nobody can have written it into a text
        messages = llm._get_messages(template, **{**told, "context_str": place})
        chunks = self._chunks(texts)
        placed = put_documents(messages, place, chunks)
        return (messages, chunks) if placed is None else (placed, [])

    def _chunks(self, texts: Sequence[str]) -> list[Chunk]:
        """The texts that are not blank, each with its node's reference."""
        ids: list[str | None] = [reference(node.node) for node in self._nodes]
        ids = ids or [None] * len(texts)  # asked without nodes
        pairs = zip(texts, ids, strict=True)
        return [Chunk(text, id=id_) for text, id_ in pairs if text.strip()]
