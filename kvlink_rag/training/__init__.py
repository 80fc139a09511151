"""Training of adapters: link tokens and LoRA."""

from kvlink_rag.training.run import train
from kvlink_rag.training.settings import TrainSettings, read_settings

__all__ = ["TrainSettings", "read_settings", "train"]
