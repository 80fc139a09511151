"""A query engine over any retriever."""

from __future__ import annotations

from typing import Any

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.callbacks import CallbackManager
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.settings import Settings
from llama_index.llms.kvlink.llm import KVLinkLLM
from llama_index.llms.kvlink.synthesizer import KVLinkSynthesizer

from kvlink_rag import KVLinkEngine


class KVLinkQueryEngine(RetrieverQueryEngine):
    """A ``RetrieverQueryEngine`` with a :class:`KVLinkSynthesizer`; the rest is the stock class'.

    Args:
        retriever: any.
        llm, engine: one of them.
        node_postprocessors: rerankers and others, applied in turn.
        callback_manager: of the LLM, too; that of ``Settings`` unless told otherwise.
        options: ``text_qa_template``, ``streaming``, ``empty_response`` (see the synthesizer).

    Raises:
        InputError: no KVLinkLLM, or an option that the synthesizer refuses.
    """

    def __init__(
        self,
        retriever: BaseRetriever,
        llm: KVLinkLLM | None = None,
        *,
        engine: KVLinkEngine | None = None,
        node_postprocessors: list[BaseNodePostprocessor] | None = None,
        callback_manager: CallbackManager | None = None,
        **options: Any,
    ) -> None:
        callback_manager = callback_manager or Settings.callback_manager  # the LLM's, too, as stock
        synthesizer = KVLinkSynthesizer(
            llm, engine=engine, callback_manager=callback_manager, **options
        )
        super().__init__(retriever, synthesizer, node_postprocessors, callback_manager)

    @classmethod
    def from_args(  # type: ignore[override]  # what shapes stock synthesizers is not taken
        cls, retriever: BaseRetriever, llm: KVLinkLLM | None = None, **options: Any
    ) -> KVLinkQueryEngine:
        """The constructor, under the stock class' name for it."""
        return cls(retriever, llm, **options)
