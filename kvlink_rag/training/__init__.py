"""Training of adapters: link tokens and LoRA. The names below are imported when first used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = ["TrainSettings", "read_settings", "train"]

_MODULES = {"TrainSettings": "settings", "read_settings": "settings", "train": "run"}

if TYPE_CHECKING:
    from kvlink_rag.training.run import train as train
    from kvlink_rag.training.settings import TrainSettings as TrainSettings
    from kvlink_rag.training.settings import read_settings as read_settings


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
