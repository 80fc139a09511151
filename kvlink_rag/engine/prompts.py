"""From a request to a prompt: token ids, and what each of them is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from kvlink_rag.adapters.links import LinkTokens
from kvlink_rag.chunk import Chunk
from kvlink_rag.engine.request import Request
from kvlink_rag.errors import InputError
from kvlink_rag.prompt.layout import PromptLayout, PromptParts
from kvlink_rag.prompt.segments import Prompt, Segment, SegmentKind, Wanted, tokens_of
from kvlink_rag.runners.base import ModelRunner


class Prompts:
    """Makes prompts for a runner.

    Args:
        runner: whose adapter has link tokens and marks of its own.
        layout: the words around chunks and question.
        behind: token ids that chunks are encoded behind.
    """

    def __init__(self, runner: ModelRunner, layout: PromptLayout, behind: tuple[int, ...]) -> None:
        self.layout = layout
        self.behind = behind
        self._runner = runner

    def of(self, request: Request, new_tokens: int) -> Prompt:
        """The prompt's token ids and what they are.

        Args:
            new_tokens: of the answer, that are to fit behind it.

        Raises:
            InputError: it is too long, or its messages do not fit the chat template.
        """
        around = self._around(request)
        token_ids: list[int] = []
        segments: list[Segment] = []
        for kind, slot, ids in self._parts(request, around):
            start, stop = len(token_ids), len(token_ids) + len(ids)
            token_ids += ids
            if kind == "chunk" and request.strategy != "full":
                first = request.strategy == "recompute" and request.recompute_by == "first"
                view = range(tokens_of(request.recompute, len(ids)) if first else 0)
                segments.append(Segment(kind, start, stop, slot, self.behind, view))
            else:
                segments.append(Segment(kind, start, stop, slot, full_view=range(len(ids))))
        room = len(token_ids) + new_tokens
        self.check_length(room, "the prompt with its answer")
        return Prompt(token_ids, segments, room, around.lasting)

    def wanted(self, chunk: Chunk) -> Wanted:
        """The cache of a chunk that any prompt asks for."""
        return tuple(self.layout.chunk(chunk)), self.behind

    def check_length(self, tokens: int, what: str) -> None:
        """Refuse what the model has no room for.

        Raises:
            InputError: naming what it is.
        """
        limit = self._runner.max_tokens
        if tokens > limit:
            raise InputError(
                f"{what} takes {tokens} tokens and {self._runner.name} has a context of {limit}: "
                "use fewer or smaller chunks, or fewer new tokens"
            )

    def _around(self, request: Request) -> PromptParts:
        """Token ids around the chunks, the adapter's among them where chunks are linked."""
        parts = self.layout.lay_out(
            request.messages, tools=request.tools, with_chunks=bool(request.chunks)
        )
        adapter = self._runner.adapter
        if adapter is None or not request.chunks or request.strategy == "full":
            return parts
        before, behind = adapter.around
        return replace(parts, prefix=[*parts.prefix, *before], question=[*behind, *parts.question])

    def _parts(
        self, request: Request, around: PromptParts
    ) -> Iterator[tuple[SegmentKind, int | None, list[int]]]:
        """Kind, slot and token ids of the prompt's parts, in order."""
        links, count = self._links(request), len(request.chunks)
        yield "prefix", None, around.prefix
        for slot, chunk in enumerate(request.chunks):
            yield "chunk", slot, self.layout.chunk(chunk)
            if links is not None and (ids := links.ids(slot, count)):
                yield "link", slot, ids
        yield "question", None, around.question

    def _links(self, request: Request) -> LinkTokens | None:
        """The link tokens that are part of a request's prompt."""
        adapter = self._runner.adapter
        return adapter.links if adapter and request.strategy == "link" else None
