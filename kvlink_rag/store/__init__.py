"""Where chunk caches are kept: in memory, in a folder, and for several machines on a remote.

`base` says what every store can do and which kinds there are; `open` makes one from what a user
says. `record` is one cache as one file, `layout` its tensors, `codec` what their numbers are
written as, `encryption` how a file is sealed. `memory`, `folder/`, `ram` and `remote/` are the
kinds. Nothing here knows a model: a store is given caches, and asked for them.
"""

from kvlink_rag.store.base import Budget, KVStore, ModelUsage, StoreCheck, StoreStat, StoreUsage
from kvlink_rag.store.encryption import EncryptionKey, env_key
from kvlink_rag.store.folder.store import FolderStore, is_store
from kvlink_rag.store.memory import MemoryStore
from kvlink_rag.store.open import open_store
from kvlink_rag.store.ram import RamTier
from kvlink_rag.store.remote.base import URL as URL  # not public; was importable from here
from kvlink_rag.store.remote.base import Remote, RemoteError, RemoteRefused, redacted
from kvlink_rag.store.remote.object_store import FsspecRemote
from kvlink_rag.store.remote.open import open_remote
from kvlink_rag.store.remote.redis_server import RedisRemote
from kvlink_rag.store.remote.tier import RemoteTier

__all__ = [
    "Budget",
    "EncryptionKey",
    "FolderStore",
    "FsspecRemote",
    "KVStore",
    "MemoryStore",
    "ModelUsage",
    "RamTier",
    "RedisRemote",
    "Remote",
    "RemoteError",
    "RemoteRefused",
    "RemoteTier",
    "StoreCheck",
    "StoreStat",
    "StoreUsage",
    "env_key",
    "is_store",
    "open_remote",
    "open_store",
    "redacted",
]
