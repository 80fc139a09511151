"""An engine that is loaded when it is first needed, once."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from typing import Any

from kvlink_rag import InputError, KVLinkEngine

OPTIONS = ("device", "dtype", "adapter")
"""Options of ``KVLinkEngine.from_pretrained`` that a chat model has as fields of its own."""


def loading_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """What a chat model's fields say about loading, as one.

    Raises:
        InputError: the same is said twice.
    """
    named = {name: values[name] for name in OPTIONS if values.get(name) is not None}
    options = values.get("engine_options") or {}
    if not isinstance(options, Mapping):
        raise InputError(f"engine_options is {options!r}: pass a dict of further arguments")
    if twice := sorted(named.keys() & options.keys()):
        raise InputError(f"{twice} are given by themselves and in engine_options: leave one out")
    return {**options, **named}


class LazyEngine:
    """An engine given, or the arguments to load one with.

    A chat model shares it with all its copies, deep ones too, so that a model is in memory once.

    Args:
        engine: ready to use; leave the rest out.
        model: hub id, folder or GGUF file.
        store: folder or store for chunk caches; None keeps them in memory.
        options: further arguments of ``KVLinkEngine.from_pretrained``.

    Raises:
        InputError: neither an engine nor a model, or both.
    """

    def __init__(
        self,
        engine: KVLinkEngine | None = None,
        model: str | os.PathLike[str] | None = None,
        store: Any = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self._source = (model, store, dict(options or {}))
        self._given = engine is not None
        self._engine = engine
        self._lock = threading.Lock()
        if engine is None and model is None:
            raise InputError("there is no model: pass engine=..., or model='hub id or folder'")
        if engine is not None and not isinstance(engine, KVLinkEngine):
            raise InputError(f"engine is a {type(engine).__name__}: pass a kvlink_rag.KVLinkEngine")
        if engine is not None and not self.is_for(None, None, {}):
            raise InputError(
                "engine=... comes with its model and store: leave model, store, device, dtype, "
                "adapter and engine_options out"
            )

    def is_for(
        self, model: str | os.PathLike[str] | None, store: Any, options: Mapping[str, Any]
    ) -> bool:
        """Whether these arguments name the same engine."""
        return self._source == (model, store, dict(options))

    def get(self) -> KVLinkEngine:
        """The engine, loaded by the first caller while others wait.

        Raises:
            ModelNotFoundError, UnsupportedModelError, StoreError, InputError: it cannot be loaded.
                The next caller tries again.
        """
        with self._lock:
            if self._engine is None:
                model, store, options = self._source
                self._engine = KVLinkEngine.from_pretrained(str(model), store=store, **options)
            return self._engine

    @property
    def name(self) -> str:
        """What the model is named by; loads nothing."""
        return self._engine.name if self._engine else str(self._source[0])

    @property
    def identity(self) -> dict[str, Any]:
        """What tells the answers of two engines apart; loads nothing, and does not change later."""
        if not self._given or self._engine is None:
            return {"model_name": self.name, "engine_options": self._source[2]}
        engine = self._engine
        return {
            "model_name": engine.name,
            "fingerprint": engine.fingerprint,
            "adapter": engine.adapter and engine.adapter.fingerprint,
            "behind": engine.behind,
            "prompt": engine.layout.template,
            "engine_options": dict(engine.options),
        }

    def __deepcopy__(self, memo: dict[int, Any]) -> LazyEngine:
        return self
