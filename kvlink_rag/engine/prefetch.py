"""Chunk caches loaded ahead of the question, while a reranker or the network is busy."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future

from kvlink_rag.chunk import Chunk, ChunkKV
from kvlink_rag.common.threads import Threads
from kvlink_rag.prompt.segments import Wanted

MOST = 256
"""Caches that wait for their question; beyond, the oldest are let go of."""
THREADS = 2


class Prefetcher:
    """Loads caches in threads and hands each over once.

    Args:
        tokenise: a chunk's token ids and what they are encoded behind.
        load: the cache of these, or None when it is not stored.
    """

    def __init__(
        self, tokenise: Callable[[Chunk], Wanted], load: Callable[[Wanted], ChunkKV | None]
    ) -> None:
        self._tokenise = tokenise
        self._load = load
        self._loading: OrderedDict[Wanted, Future[ChunkKV | None]] = OrderedDict()
        self._lock = threading.Lock()
        self._threads = Threads("kvlink-prefetch", THREADS)
        self._owner = 0

    def start(self, chunks: Iterable[Chunk]) -> list[Future[None]]:
        """Begin to load; the futures are done when the caches are there."""
        with self._lock:
            if self._owner != os.getpid():  # nobody finishes what was begun before a fork
                self._owner = os.getpid()
                self._loading.clear()
        return [self._threads.submit(self._fetch, chunk) for chunk in chunks]

    def take(self, wanted: Wanted) -> ChunkKV | None:
        """A cache that was loaded ahead, or is just being loaded; None if there is none."""
        with self._lock:
            future = self._loading.pop(wanted, None)
        return future.result() if future else None

    def _fetch(self, chunk: Chunk) -> None:
        wanted = self._tokenise(chunk)
        future: Future[ChunkKV | None] = Future()
        with self._lock:
            if wanted in self._loading:
                self._loading.move_to_end(wanted)
                return
            self._loading[wanted] = future
            while len(self._loading) > MOST:
                self._loading.popitem(last=False)
        try:
            future.set_result(self._load(wanted))
        except BaseException:
            future.set_result(None)  # who waits for it loads it again, and meets the error
            raise
