"""What is said once in a process, through the logger ``kvlink_rag``."""

from __future__ import annotations

import logging
from functools import cache


@cache
def say_once_that_memory_ends() -> None:
    """Say that chunk caches in memory are gone with the process, where no store was named.

    A warning of ``logging``, which Python shows on stderr unless logging is set up otherwise.
    """
    logging.getLogger("kvlink_rag").warning(
        "chunk caches are kept in memory and end with this process: name a folder to keep them "
        "(store='kv'), or pass store=kvlink_rag.store.MemoryStore() if that is what you want"
    )
