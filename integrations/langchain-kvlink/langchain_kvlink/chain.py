"""The chain that answers from documents, in the place of `create_stuff_documents_chain`."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

from langchain_core.language_models import BaseLanguageModel, LanguageModelInput
from langchain_core.messages import BaseMessage, HumanMessage, convert_to_messages
from langchain_core.output_parsers import BaseOutputParser, StrOutputParser
from langchain_core.prompts import BasePromptTemplate
from langchain_core.runnables import Runnable, RunnableLambda
from langchain_core.runnables.base import RunnableBindingBase

from kvlink_rag import InputError
from langchain_kvlink.chat_model import ChatKVLink

PLACE: dict[Any, Any] = {"type": "text-plain", "mime_type": "text/plain", "text": ""}
"""An empty document: where it stands, ``documents=`` stand (:class:`ChatKVLink`)."""


def create_kvlink_documents_chain(
    model: Runnable[LanguageModelInput, Any],
    prompt: BasePromptTemplate[Any] | None = None,
    *,
    document_prompt: BasePromptTemplate[str] | None = None,
    document_variable_name: str = "context",
    output_parser: BaseOutputParser[Any] | None = None,
) -> Runnable[dict[str, Any], Any]:
    """A chain that passes documents to the model as chunk caches.

    It takes what the chain of ``create_stuff_documents_chain`` takes: a dict with the documents
    under `context`, and the prompt's variables. It streams, sync and async.

    Args:
        model: a :class:`ChatKVLink`, or one that is bound, configured or retried.
        prompt: with the document variable once, in a system or human message; the chunks stand
            there. None takes the engine's own words around documents and the text under `input`,
            behind the messages under `chat_history`, if any: the answer is that of
            ``engine.answer(input, documents)``.
        document_prompt: renders a document to its chunk's text; None is the model's.
        document_variable_name: the key of the documents.
        output_parser: reads the model's message; None gives its text.

    Raises:
        InputError: the prompt does not take the documents. When the chain runs: the documents, or
            `input`, are missing or of another type.
    """
    if prompt is not None and document_variable_name not in prompt.input_variables:
        raise InputError(
            f"the prompt has the variables {prompt.input_variables}: it must have "
            f"{document_variable_name!r}, where the documents stand"
        )
    _check_model(model)
    parser = output_parser or StrOutputParser()
    rendering = {"document_prompt": document_prompt} if document_prompt is not None else {}

    def answer(inputs: dict[str, Any]) -> Any:
        if not isinstance(inputs, Mapping) or document_variable_name not in inputs:
            given = sorted(inputs) if isinstance(inputs, Mapping) else repr(inputs)
            raise InputError(
                f"there is no {document_variable_name!r} among the inputs {given}: pass a dict "
                "with the documents under it"
            )
        if prompt is None:
            messages = _asked(inputs)
        else:
            messages = _filled(prompt, inputs, document_variable_name)
        bound = model.bind(documents=inputs[document_variable_name], **rendering)
        return RunnableLambda(lambda _: messages) | bound | parser

    return RunnableLambda(answer).with_config(run_name="kvlink_documents_chain")


def _check_model(model: object) -> None:
    """Another model would not show the documents, and say nothing about it."""
    while isinstance(model, RunnableBindingBase):
        model = model.bound
    if isinstance(model, BaseLanguageModel) and not isinstance(model, ChatKVLink):
        raise InputError(
            f"the model is a {type(model).__name__}, which takes no documents: pass a ChatKVLink"
        )


def _asked(inputs: Mapping[str, Any]) -> list[BaseMessage]:
    """The question behind the conversation so far; the engine puts its words around it."""
    question = inputs.get("input")
    if not isinstance(question, str) or not question.strip():
        raise InputError(f"'input' is {question!r}: without a prompt it must be the question")
    history = inputs.get("chat_history") or []
    if isinstance(history, str):
        raise InputError("'chat_history' is a text: pass a list of messages")
    return [*convert_to_messages(history), HumanMessage(question)]


def _filled(
    prompt: BasePromptTemplate[Any], inputs: Mapping[str, Any], name: str
) -> list[BaseMessage]:
    """The prompt's messages with :data:`PLACE` where the documents go."""
    mark = f"documents-{secrets.token_hex(16)}"  # no input can hold it
    messages = prompt.invoke({**inputs, name: mark}).to_messages()
    found = 0
    for place, message in enumerate(messages):
        content = message.content
        blocks = [content] if isinstance(content, str) else content
        parts = [part for block in blocks for part in _cut(block, mark)]
        if PLACE in parts:
            found += parts.count(PLACE)
            messages[place] = message.model_copy(update={"content": parts})
    if found != 1:
        raise InputError(f"the prompt shows {{{name}}} {found} times: show the documents once")
    return messages


def _cut(block: str | dict[Any, Any], mark: str) -> list[str | dict[Any, Any]]:
    """A block of text with :data:`PLACE` for each mark in it."""
    text = block if isinstance(block, str) else block.get("text")
    if not isinstance(text, str) or mark not in text:
        return [block]
    first, *rest = text.split(mark)
    return [first, *(part for behind in rest for part in (PLACE, behind))]
