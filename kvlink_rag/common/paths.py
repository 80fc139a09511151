"""Where things are kept on a user's machine."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """Our folder for models, the demo and copies of remotes: ``$KVLINK_CACHE`` or the user's."""
    import platformdirs

    override = os.environ.get("KVLINK_CACHE")
    return Path(override or platformdirs.user_cache_dir("kvlink-rag")).expanduser().absolute()
