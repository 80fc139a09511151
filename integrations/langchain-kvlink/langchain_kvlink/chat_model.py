"""A LangChain chat model whose documents are linked chunk caches."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LangSmithParams, LanguageModelInput
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.messages.ai import InputTokenDetails, UsageMetadata
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.prompts import BasePromptTemplate
from langchain_core.runnables import Runnable
from langchain_core.tools import BaseTool
from pydantic import ConfigDict, Field, ValidationError

from kvlink_rag import AnswerStream, InputError, KVLinkEngine
from langchain_kvlink.conversation import Conversation
from langchain_kvlink.lazy_engine import LazyEngine, loading_options
from langchain_kvlink.tool_calls import (
    ContentFilter,
    Produced,
    as_chunks,
    chosen_tools,
    read_calls,
)

WITHOUT_MEANING = frozenset({"api_key", "base_url", "max_retries", "timeout"})
"""LangChain's standard parameters of remote models: accepted, since there is nothing they could do
to a local one."""
SETTINGS = (
    "max_tokens",
    "temperature",
    "top_p",
    "seed",
    "strategy",
    "recompute",
    "recompute_by",
    "system",
)
"""Fields that a call may override."""


@dataclass(frozen=True)
class _Call:
    """One call of the model, as the engine takes it."""

    conversation: Conversation
    options: dict[str, Any]

    @property
    def has_tools(self) -> bool:
        return bool(self.options["tools"])

    def stream(self, engine: KVLinkEngine) -> AnswerStream:
        return engine.stream(self.conversation.messages, self.conversation.chunks, **self.options)


class ChatKVLink(BaseChatModel):
    """A chat model that reads documents from their chunk caches.

    Documents reach it in any of these ways, and stand together where the first of them stood:

    - the keyword ``documents=`` of a call, or of :meth:`bind`: documents, dicts with
      ``page_content``, or texts. Without any document in the messages they stand in the last human
      message, with the engine's words around them, as in ``engine.answer(question, chunks)``;
    - `text-plain` content blocks of a message, or `document` blocks with a text source. An empty
      one marks the place for ``documents=``;
    - the artifact of a retriever tool's message. Its text, which repeats them, is not shown.

    What has no cache yet is computed in place and stored. Without documents this is an ordinary
    chat model. Messages carry ``usage_metadata`` (`cache_read` counts tokens from caches) and in
    ``response_metadata`` the ``model_name``, the ``finish_reason`` and the answer's ``report`` (the
    fields of :class:`kvlink_rag.Report`). A call may override every setting below but the model.

    It cannot be serialised: it holds a model in memory. Copies share that model.

    Args:
        engine: a :class:`kvlink_rag.KVLinkEngine`; or
        model: hub id, folder or GGUF file, loaded when first used, with
        store: a folder or store for chunk caches (None: memory),
        device, dtype: where the model runs, and its numbers; None is `auto`,
        adapter: folder or name of trained link tokens and LoRA, and
        engine_options: further arguments of ``KVLinkEngine.from_pretrained``.
        max_tokens: the most tokens to produce, also ``max_new_tokens``; None is the engine's 64.
        temperature: 0 (the engine's default) is greedy.
        top_p: nucleus sampling.
        seed: makes sampling repeatable.
        stop: the answer ends before the first of these strings.
        strategy: `auto`, `recompute`, `reuse`, `full` or `link`; None is the engine's.
        recompute: with `recompute`, the share of the chunks' tokens that is computed anew; None is
            the engine's.
        recompute_by: which: those that the `question` attends to most, or the `first` of each
            chunk; None is the engine's.
        system: a system prompt; leave it out when the messages bring one.
        document_prompt: renders a document to its chunk's text; None shows ``page_content`` alone.
            Give the same to :class:`KVLinkVectorStore`: other texts have other caches.
        streaming: whether ``invoke`` streams inside, so that callbacks see each token.

    Raises:
        InputError: an unknown or unusable argument; neither an engine nor a model.
    """

    model: str | os.PathLike[str] | None = None
    store: Any = Field(default=None, repr=False)
    device: Any = None
    dtype: Any = None
    adapter: Any = Field(default=None, repr=False)
    engine_options: dict[str, Any] = Field(default_factory=dict)
    max_tokens: int | None = Field(default=None, alias="max_new_tokens")
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    strategy: str | None = None
    recompute: float | None = None
    recompute_by: str | None = None
    system: str | None = None
    document_prompt: BasePromptTemplate[str] | None = None
    streaming: bool = False
    lazy_engine: LazyEngine = Field(exclude=True, repr=False)

    model_config = ConfigDict(arbitrary_types_allowed=True, populate_by_name=True)

    def __init__(self, **values: Any) -> None:
        fields = type(self).model_fields
        known = {"engine", *fields, *(field.alias for field in fields.values())}
        if unknown := values.keys() - known - WITHOUT_MEANING:
            raise InputError(f"ChatKVLink takes no {sorted(unknown)}: it takes {sorted(fields)}")
        model, store, options = values.get("model"), values.get("store"), loading_options(values)
        lazy = values.pop("lazy_engine", None)  # given when LangChain copies a model
        if not isinstance(lazy, LazyEngine) or not lazy.is_for(model, store, options):
            lazy = LazyEngine(values.get("engine"), model, store, options)
        values = {name: value for name, value in values.items() if name in known - {"engine"}}
        try:
            super().__init__(**{**values, "lazy_engine": lazy})
        except ValidationError as error:
            problems = [f"{_path(e['loc'])} is {e['input']!r}: {e['msg']}" for e in error.errors()]
            raise InputError("; ".join(problems)) from error

    @property
    def engine(self) -> KVLinkEngine:
        """The engine; loads the model if that has not been done.

        Raises:
            ModelNotFoundError, UnsupportedModelError, StoreError, InputError: it cannot be loaded.
        """
        return self.lazy_engine.get()

    @property
    def model_name(self) -> str:
        """What the model is named by."""
        return self.lazy_engine.name

    @property
    def _llm_type(self) -> str:
        return "kvlink"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        """Everything that an answer depends on, so that caches of answers tell them apart."""
        settings = {name: getattr(self, name) for name in (*SETTINGS, "document_prompt")}
        # "stop" is the call's: LangChain sets it, to None if there is none
        return {**self.lazy_engine.identity, **settings, "own_stop": self.stop}

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        own = [self.stop] if isinstance(self.stop, str) else self.stop
        model = kwargs.pop("model", self.model_name)
        return super()._get_ls_params(stop=stop or own, model=model, **kwargs)

    # One call

    def _call(self, messages: Sequence[BaseMessage], stop: Any, kwargs: Mapping[str, Any]) -> _Call:
        """Check and translate.

        Raises:
            InputError: an unknown keyword, or a message or document that cannot be read.
        """
        given = {name: value for name, value in kwargs.items() if value is not None}
        given.pop("stream", None)  # LangChain's own
        if (model := str(given.pop("model", self.model_name))) != self.model_name:
            raise InputError(
                f"the model is {self.model_name}, not {model}: make another ChatKVLink"
            )
        if "max_new_tokens" in given:
            given["max_tokens"] = given.pop("max_new_tokens")
        options = {name: given.pop(name, getattr(self, name)) for name in SETTINGS}
        options["max_new_tokens"] = options.pop("max_tokens")
        options["stop"] = self.stop if stop is None else stop
        options = {name: value for name, value in options.items() if value is not None}
        options["tools"] = chosen_tools(given.pop("tools", ()), given.pop("tool_choice", None))
        documents = given.pop("documents", ())
        document_prompt = given.pop("document_prompt", self.document_prompt)
        if given:
            allowed = [*SETTINGS, "stop", "documents", "document_prompt", "tools", "tool_choice"]
            raise InputError(f"a call takes no {sorted(given)}: it takes {allowed}")
        return _Call(Conversation(messages, documents, document_prompt), options)

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        call = self._call(messages, stop, kwargs)
        stream = call.stream(self.engine)
        for _ in stream:
            pass
        return self._result(stream, call)

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        call = self._call(messages, stop, kwargs)
        stream = call.stream(await asyncio.to_thread(self.lazy_engine.get))
        async for _ in stream:  # piece by piece: a cancelled call ends with the token it is at
            pass
        return self._result(stream, call)

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        call = self._call(messages, stop, kwargs)
        stream = call.stream(self.engine)
        content = ContentFilter()
        for piece in stream:
            if shown := content.push(piece) if call.has_tools else piece:
                chunk = ChatGenerationChunk(message=AIMessageChunk(content=shown))
                if run_manager:
                    run_manager.on_llm_new_token(shown, chunk=chunk)
                yield chunk
        chunk = self._last(stream, *content.finish())
        if run_manager:
            run_manager.on_llm_new_token(chunk.text, chunk=chunk)
        yield chunk

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        call = self._call(messages, stop, kwargs)
        stream = call.stream(await asyncio.to_thread(self.lazy_engine.get))
        content = ContentFilter()
        async for piece in stream:
            if shown := content.push(piece) if call.has_tools else piece:
                chunk = ChatGenerationChunk(message=AIMessageChunk(content=shown))
                if run_manager:
                    await run_manager.on_llm_new_token(shown, chunk=chunk)
                yield chunk
        chunk = self._last(stream, *content.finish())
        if run_manager:
            await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
        yield chunk

    def _result(self, stream: AnswerStream, call: _Call) -> ChatResult:
        produced = read_calls(stream.text) if call.has_tools else Produced(stream.text)
        message = AIMessage(
            produced.content,
            tool_calls=produced.calls,
            invalid_tool_calls=produced.invalid,
            usage_metadata=_usage(stream),
            response_metadata=_metadata(stream, self.model_name),
        )
        return ChatResult(generations=[ChatGeneration(message=message)])

    def _last(self, stream: AnswerStream, rest: str, produced: Produced) -> ChatGenerationChunk:
        """The chunk that ends a stream; all that would be added up wrongly is on it alone."""
        message = AIMessageChunk(
            content=rest,
            tool_call_chunks=as_chunks(produced),
            usage_metadata=_usage(stream),
            response_metadata=_metadata(stream, self.model_name),
            chunk_position="last",
        )
        return ChatGenerationChunk(message=message)

    # Tools and tokens

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: str | dict[str, Any] | bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """A model that may call tools. Loads the model, whose chat template must show them.

        Args:
            tools: whatever ``convert_to_openai_tool`` takes.
            tool_choice: a tool's name shows that one alone, `none` shows none. `any` and
                `required` show all, as `auto` does: this model cannot be made to call one.

        Raises:
            NotImplementedError: the chat template shows no tools.
            InputError: there is no tool of that name.
        """
        if not self.engine.layout.supports_tools:
            raise NotImplementedError(
                f"{self.model_name} cannot call tools: its chat template shows none. Use a model "
                "that was trained for it, such as Qwen3 or SmolLM3"
            )
        chosen = chosen_tools(tools, tool_choice)
        return self.bind(tools=chosen, **kwargs)

    def get_token_ids(self, text: str) -> list[int]:
        """The tokens of a text as the model's tokenizer makes them."""
        if self.custom_get_token_ids is not None:
            return self.custom_get_token_ids(text)
        return self.engine.layout.encode_text(text)


def _usage(stream: AnswerStream) -> UsageMetadata:
    report = stream.report
    return UsageMetadata(
        input_tokens=report.context_tokens,
        output_tokens=report.new_tokens,
        total_tokens=report.context_tokens + report.new_tokens,
        input_token_details=InputTokenDetails(cache_read=report.reused_tokens),
    )


def _metadata(stream: AnswerStream, model_name: str) -> dict[str, Any]:
    return {
        "model_name": model_name,
        "finish_reason": stream.finish_reason,
        "report": asdict(stream.report),
    }


def _path(location: Sequence[int | str]) -> str:
    return ".".join(map(str, location))
