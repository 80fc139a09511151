"""Repeated measurements, and what they were made on."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

if TYPE_CHECKING:
    from kvlink_rag.engine.engine import KVLinkEngine


@dataclass
class Series:
    """Repeated measurements of one thing: seconds, or tokens a second."""

    values: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def as_dict(self) -> dict[str, Any]:
        """Median, extremes and every value."""
        values = self.values
        return {"median": self.median, "min": min(values), "max": max(values), "all": values}


class Steps:
    """Counts what is done for a progress bar."""

    def __init__(self, show: Callable[[float], None]) -> None:
        self._show, self._done = show, 0

    def __call__(self) -> None:
        self._done += 1
        self._show(self._done)


def machine(engine: KVLinkEngine) -> dict[str, Any]:
    """What the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    device = engine.architecture.device
    return {
        "model": engine.name,
        "dtype": str(engine.architecture.dtype).removeprefix("torch."),
        "caches": str(engine.architecture.cache_dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
