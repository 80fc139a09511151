"""Async twins of methods that work: the work runs in a thread, the event loop stays free."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import wraps
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def in_thread(method: Callable[P, T]) -> Callable[P, Coroutine[Any, Any, T]]:
    """A coroutine method that runs a method of the same object in a thread."""

    @wraps(method)
    async def run(*args: P.args, **kwargs: P.kwargs) -> T:
        self, *rest = args
        result: T = await asyncio.to_thread(getattr(self, method.__name__), *rest, **kwargs)
        return result

    run.__doc__ = f":meth:`{method.__name__}` in a thread."
    return run
