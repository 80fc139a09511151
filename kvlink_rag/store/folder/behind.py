"""What a tier passes on to the folder behind it, beside what every store can do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

from kvlink_rag.store.base import Budget, StoreUsage
from kvlink_rag.store.folder.store import FolderStore


class FolderBehind(ABC):
    """A store whose caches are in a folder: budget, pins and use are the folder's.

    All raise what :class:`~kvlink_rag.store.folder.store.FolderStore` raises.
    """

    @abstractmethod
    def folder_behind(self) -> FolderStore:
        """The folder."""

    @property
    def budget(self) -> Budget:
        """What the folder may hold."""
        return self.folder_behind().budget

    def set_budget(self, budget: Budget) -> None:
        """Say what the folder may hold from now on; evicts what is too much."""
        self.folder_behind().set_budget(budget)

    def usage(self) -> StoreUsage:
        """How the folder is used."""
        return self.folder_behind().usage()

    def pin(self, documents: Iterable[str]) -> None:
        """Never evict caches that these documents refer to, until :meth:`unpin`."""
        self.folder_behind().pin(documents)

    def unpin(self, documents: Iterable[str]) -> None:
        """Take pins back."""
        self.folder_behind().unpin(documents)

    def pinned(self) -> list[str]:
        """The documents that are pinned."""
        return self.folder_behind().pinned()
