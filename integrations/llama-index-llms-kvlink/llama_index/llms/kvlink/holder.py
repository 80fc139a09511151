"""Components that hold an engine, and with it a model: copies share it, pickles are refused."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from kvlink_rag import InputError, KVLinkEngine


class EngineHandle:
    """One engine, loaded when it is first asked for. Every copy of a handle is the handle itself.

    Args:
        load: makes the engine; called at most once, unless it fails.
    """

    def __init__(self, load: Callable[[], KVLinkEngine]) -> None:
        self._load = load
        self._engine: KVLinkEngine | None = None
        self._lock = threading.Lock()

    def get(self) -> KVLinkEngine:
        """The engine."""
        with self._lock:
            if self._engine is None:
                self._engine = self._load()
            return self._engine

    def __copy__(self) -> EngineHandle:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> EngineHandle:
        return self


class EngineHolder:
    """What components with an engine have in common; stands before the framework's class."""

    _handle: EngineHandle

    @property
    def engine(self) -> KVLinkEngine:
        """The engine; loads the model when nobody has asked for it before."""
        return self._handle.get()

    def __getstate__(self) -> dict[Any, Any]:
        # LlamaIndex would drop what cannot be pickled and load a second model on the other side.
        raise InputError(
            f"{type(self).__name__} holds a model and cannot be pickled: it does not go to other "
            "processes, as IngestionPipeline does with num_workers > 1. Run the pipeline with "
            "num_workers=None; the engine batches the chunks itself"
        )
