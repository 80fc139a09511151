"""Conversations over retrieved nodes."""

from __future__ import annotations

from typing import Any

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.llms.types import ChatMessage, MessageRole
from llama_index.core.callbacks import CallbackManager
from llama_index.core.chat_engine import ContextChatEngine
from llama_index.core.llms import LLM
from llama_index.core.memory import BaseMemory
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.prompts import ChatPromptTemplate, PromptTemplate
from llama_index.llms.kvlink.llm import as_llm
from llama_index.llms.kvlink.synthesizer import KVLinkSynthesizer

from kvlink_rag import InputError, KVLinkEngine


class KVLinkContextChatEngine(ContextChatEngine):
    """A ``ContextChatEngine`` whose retrieved nodes come from their caches; memory, sources and
    streaming are the stock class'.

    What was said before and the system prompt are computed anew in each turn, the nodes are not.

    Args (of :meth:`from_defaults`, beside the stock ones):
        llm, engine: one of them.
        context_template: with it the nodes stand where the stock class puts them, in the system
            message at ``{context_str}``; by default they stand in the user's last message, in the
            engine's wording.
        context_refine_template: refused; all nodes are in one prompt.

    Raises:
        InputError: no KVLinkLLM, or a ``context_refine_template``.
    """

    def __init__(
        self,
        retriever: BaseRetriever,
        llm: LLM,
        memory: BaseMemory,
        prefix_messages: list[ChatMessage],
        node_postprocessors: list[BaseNodePostprocessor] | None = None,
        context_template: str | PromptTemplate | None = None,
        context_refine_template: str | PromptTemplate | None = None,
        callback_manager: CallbackManager | None = None,
    ) -> None:
        if context_refine_template is not None:
            raise InputError(
                "context_refine_template cannot be used: all nodes are in one prompt and nothing "
                "is refined; leave it out"
            )
        super().__init__(
            retriever,
            as_llm(llm),
            memory,
            prefix_messages,
            node_postprocessors,
            context_template,
            None,
            callback_manager,
        )
        self._names_place = context_template is not None

    @classmethod
    def from_defaults(  # type: ignore[override]  # the stock arguments, by name
        cls,
        retriever: BaseRetriever,
        llm: LLM | None = None,
        *,
        engine: KVLinkEngine | None = None,
        **options: Any,
    ) -> KVLinkContextChatEngine:
        """A chat engine with an empty memory, unless ``memory`` or ``chat_history`` is given."""
        made = super().from_defaults(retriever, llm=as_llm(llm, engine), **options)
        assert isinstance(made, cls)
        return made

    def _get_response_synthesizer(  # type: ignore[override]  # any synthesizer will do
        self, chat_history: list[ChatMessage], streaming: bool = False
    ) -> KVLinkSynthesizer:
        said, system, context = [*self._prefix_messages, *chat_history], "", []
        if self._names_place:
            if self._prefix_messages and self._prefix_messages[0].role == MessageRole.SYSTEM:
                system = (said.pop(0).content or "").strip()
            words = self._context_template.template + "{system_prompt}"
            context = [ChatMessage(role=self._llm.metadata.system_role, content=words)]
        # What was said is no template: braces in it stay as they are.
        variables: dict[str, Any] = {
            f"said_{place}": message.content or "" for place, message in enumerate(said)
        }
        history = [
            ChatMessage(role=message.role, content=f"{{{variable}}}")
            for message, variable in zip(said, variables, strict=True)
        ]
        template = ChatPromptTemplate(
            [*context, *history, ChatMessage(role=MessageRole.USER, content="{query_str}")],
            function_mappings=self._context_template.function_mappings if context else None,
            system_prompt=system,
            **variables,
        )
        return KVLinkSynthesizer(
            as_llm(self._llm),
            text_qa_template=template,
            streaming=streaming,
            callback_manager=self.callback_manager,
        )
