"""The language model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

from llama_index.core.base.llms.generic_utils import (
    astream_chat_response_to_completion_response,
    chat_response_to_completion_response,
    stream_chat_response_to_completion_response,
)
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
    MessageRole,
)
from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.llms import CustomLLM
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.llms.kvlink.holder import EngineHandle, EngineHolder
from llama_index.llms.kvlink.messages import to_engine
from llama_index.llms.kvlink.nodes import TextOrNode, as_chunks

from kvlink_rag import Answer, AnswerStream, InputError, KVLinkEngine

Method = TypeVar("Method", bound=Callable[..., Any])

# Typed here once: the originals are annotated as bare callables.
chat_event: Callable[[Method], Method] = llm_chat_callback()
completion_event: Callable[[Method], Method] = llm_completion_callback()


class KVLinkLLM(EngineHolder, CustomLLM):
    """A local model that answers from linked chunk caches.

    Chats take documents: ``llm.chat(messages, documents=[...])`` puts texts, nodes or retrieved
    nodes into the last message of the user, with the engine's wording around them. A
    ``CitableBlock`` in a message puts one exactly there. Documents whose cache is not in the
    engine's store are computed in place and stored.

    Every response has ``raw["report"]`` (time to first token and its parts, hits, misses, tokens;
    see :class:`kvlink_rag.Report`), ``raw["token_ids"]``, ``raw["finish_reason"]`` and
    ``raw["usage"]``; of a stream, the last response, which adds no text.

    Args:
        model: hub id, local folder or GGUF file; loaded once, when it is first needed.
        engine: an engine that is there already, instead of ``model``.
        store: with ``model``: folder for chunk caches, or any store; None keeps them in memory.
        device, dtype, adapter: with ``model``: where it runs, its numbers, and trained link tokens
            (as of ``KVLinkEngine.from_pretrained``).
        engine_kwargs: with ``model``: further arguments of ``KVLinkEngine.from_pretrained``.
        settings: the fields below and those of every LLM (``system_prompt``, ``callback_manager``).

    Copies share the model. Pickling is refused.

    Raises:
        InputError: both or neither of ``model`` and ``engine``, what is for ``model`` with
            ``engine``, or something both by itself and in ``engine_kwargs``.
    """

    _handle: EngineHandle = PrivateAttr()
    model: str = Field(description="What the model is named by.")
    max_tokens: int = Field(default=64, description="The most tokens of an answer.")
    temperature: float = Field(default=0.0, description="0 is greedy; above it, sampling.")
    top_p: float = Field(default=1.0, description="Nucleus sampling.")
    stop: list[str] = Field(default_factory=list, description="An answer ends before these.")
    seed: int | None = Field(default=None, description="Makes sampling repeatable.")
    strategy: str | None = Field(
        default=None, description="auto, recompute, reuse, full or link; None is the engine's."
    )
    recompute: float | None = Field(
        default=None, description="Share of the chunks' tokens that recompute computes anew."
    )
    recompute_by: str | None = Field(default=None, description="Which: by question, or the first.")
    additional_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Further arguments of KVLinkEngine.answer."
    )

    def __init__(
        self,
        model: str | None = None,
        *,
        engine: KVLinkEngine | None = None,
        store: Any = None,
        device: Any = None,
        dtype: Any = None,
        adapter: Any = None,
        engine_kwargs: dict[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        if (model is None) == (engine is None):
            raise InputError("KVLinkLLM needs model='...' or engine=..., and only one of them")
        named = {"store": store, "device": device, "dtype": dtype, "adapter": adapter}
        named = {name: value for name, value in named.items() if value is not None}
        if engine is not None and (named or engine_kwargs):
            raise InputError(
                f"{', '.join([*named, *(engine_kwargs or {})])}: for model='...', an engine has "
                "its own; engine.with_store(...) and engine.with_adapter(...) make twins"
            )
        options = engine_kwargs or {}
        if twice := sorted(named.keys() & options.keys()):
            raise InputError(f"{twice} are given by themselves and in engine_kwargs: leave one out")

        def load() -> KVLinkEngine:
            return engine or KVLinkEngine.from_pretrained(self.model, **options, **named)

        super().__init__(model=engine.name if engine else model, **settings)
        self._handle = EngineHandle(load)

    @classmethod
    def class_name(cls) -> str:
        """The name in serialised components."""
        return "KVLinkLLM"

    @property
    def metadata(self) -> LLMMetadata:
        """Context window and answer length in tokens; loads the model."""
        engine = self.engine
        return LLMMetadata(
            context_window=engine.runner.max_tokens,
            num_output=self.max_tokens,
            is_chat_model=bool(engine.tokenizer.chat_template),
            model_name=self.model,
        )

    def to_payload(self) -> dict[str, Any]:
        """What observers are told of this LLM. Loads nothing: it is asked for in the event loop."""
        return {
            "class_name": self.class_name(),
            "model_name": self.model,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
        }

    # Chats

    @chat_event
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """The whole answer.

        Args:
            kwargs: ``documents``, and what overrides the fields for this answer (``max_tokens``,
                ``temperature``, ``top_p``, ``stop``, ``seed``, ``strategy``, ...).

        Raises:
            InputError: documents both here and in the messages, a setting out of range, or a prompt
                longer than the model's context.
        """
        return self._chat(messages, **kwargs)

    @chat_event
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """:meth:`chat` piece by piece; the last response has the report and no text."""
        return self._stream_chat(messages, **kwargs)

    @chat_event
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """:meth:`chat` in a thread: the event loop stays free."""
        return await asyncio.to_thread(self._chat, messages, **kwargs)

    @chat_event
    async def astream_chat(
        self, messages: Sequence[ChatMessage], **kwargs: Any
    ) -> ChatResponseAsyncGen:
        """:meth:`stream_chat` in a thread: the event loop stays free."""
        return await self._astream_chat(messages, **kwargs)

    # Completions: the prompt is what the user says.

    @completion_event
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """The answer to a prompt, which becomes a message of the user; else as :meth:`chat`."""
        return chat_response_to_completion_response(self._chat(_said(prompt), **kwargs))

    @completion_event
    def stream_complete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponseGen:
        """:meth:`complete` piece by piece."""
        return stream_chat_response_to_completion_response(
            self._stream_chat(_said(prompt), **kwargs)
        )

    @completion_event
    async def acomplete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponse:
        """:meth:`complete` in a thread."""
        response = await asyncio.to_thread(self._chat, _said(prompt), **kwargs)
        return chat_response_to_completion_response(response)

    @completion_event
    async def astream_complete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponseAsyncGen:
        """:meth:`stream_complete` in a thread."""
        return astream_chat_response_to_completion_response(
            await self._astream_chat(_said(prompt), **kwargs)
        )

    # What all of these are made of

    def _chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        stream = self._start(messages, **kwargs)
        for _ in stream:
            pass
        return _last(stream)

    def _stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        stream = self._start(messages, **kwargs)

        def responses() -> ChatResponseGen:
            text = ""
            for piece in stream:
                text += piece
                yield _response(text, piece)
            yield _last(stream)

        return responses()

    async def _astream_chat(
        self, messages: Sequence[ChatMessage], **kwargs: Any
    ) -> ChatResponseAsyncGen:
        stream = await asyncio.to_thread(self._start, messages, **kwargs)  # may load the model

        async def responses() -> ChatResponseAsyncGen:
            text = ""
            async for piece in stream:
                text += piece
                yield _response(text, piece)
            yield _last(stream)

        return responses()

    def _start(
        self,
        messages: Sequence[ChatMessage],
        documents: Sequence[TextOrNode] = (),
        **kwargs: Any,
    ) -> AnswerStream:
        """The answer, of which nothing is computed yet."""
        asked, placed = to_engine(messages)
        given = as_chunks(documents)
        if placed and given:
            raise InputError(
                "documents stand in the messages (CitableBlock) and in documents=...: "
                "leave one of them out"
            )
        settings = {
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "stop": self.stop,
            "seed": self.seed,
            "strategy": self.strategy,
            "recompute": self.recompute,
            "recompute_by": self.recompute_by,
            **self.additional_kwargs,
            **{name: value for name, value in kwargs.items() if value is not None},
        }
        settings["max_new_tokens"] = settings.pop("max_tokens")
        return self.engine.stream(asked, placed or given, **settings)


def as_llm(llm: object = None, engine: KVLinkEngine | None = None) -> KVLinkLLM:
    """The LLM of a component that takes ``llm`` or ``engine``.

    Raises:
        InputError: both, neither, or an LLM of another kind.
    """
    if (llm is None) == (engine is None):
        raise InputError("llm=KVLinkLLM(...) or engine=... is needed, and only one of them")
    if engine is not None:
        return KVLinkLLM(engine=engine)
    if not isinstance(llm, KVLinkLLM):
        raise InputError(
            f"llm is a {type(llm).__name__}, which does not answer from chunk caches: "
            "pass a KVLinkLLM"
        )
    return llm


def _said(prompt: str) -> list[ChatMessage]:
    return [ChatMessage(role=MessageRole.USER, content=prompt)]


def _response(text: str, delta: str | None = None, raw: Any = None) -> ChatResponse:
    message = ChatMessage(role=MessageRole.ASSISTANT, content=text)
    return ChatResponse(message=message, delta=delta, raw=raw)


def _last(stream: AnswerStream) -> ChatResponse:
    """The response at a stream's end: all of the text, and what it cost."""
    answer = stream.answer
    return _response(answer.text, "", _raw(answer))


def _raw(answer: Answer) -> dict[str, Any]:
    report = answer.report
    usage = {"prompt_tokens": report.context_tokens, "completion_tokens": report.new_tokens}
    return {
        "report": asdict(report),
        "token_ids": answer.token_ids,
        "finish_reason": answer.finish_reason,
        "usage": {**usage, "total_tokens": sum(usage.values())},
    }
