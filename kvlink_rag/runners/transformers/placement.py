"""A layer's keys and values of spans, each at its position, by the compiled kernel.

Numbers are read once from where they lie, turned, and written where attention finds them in the
processor's cache. Codes are decoded on the way: nothing larger is ever in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch

from kvlink_rag.runners.transformers import one_query
from kvlink_rag.runners.transformers.part import DTYPES, Part, value_groups
from kvlink_rag.runners.transformers.scratch import Scratch


def available(dtype: torch.dtype) -> bool:
    """Whether the kernel can run here, and write numbers of this type."""
    return dtype in DTYPES and one_query.available()


class Placement:
    """Keys and values for layers that share their frequencies.

    Args:
        parts: :meth:`Part.at_its_place`.
        pairs: that RoPE turns in these layers.
    """

    def __init__(self, parts: Sequence[Part], pairs: int) -> None:
        self._parts, self._pairs = parts, pairs  # the table has addresses in them
        self._table = np.concatenate([part.table for part in parts], 1)
        self._value_groups = value_groups(parts)

    def place(self, layer: int, keys: torch.Tensor, values: torch.Tensor, scratch: Scratch) -> None:
        """Write a layer's keys and values to their positions.

        Args:
            keys: ``[kv_heads, positions, head_dim]``, contiguous; ``values`` alike.
            scratch: to compute in; its owner's lock is held.
        """
        from kvlink_rag.runners.transformers import placement_kernel as k

        kv_heads, positions, key_dim = keys.shape
        value_dim, threads = values.shape[2], torch.get_num_threads()
        size = threads * k.memory_of(key_dim, value_dim)
        memory = scratch.tensor("placement", (size,), torch.float32)
        told = np.zeros(k.FIELDS, dtype=np.int64)
        told[: k.OF_PIECES] = (
            layer, self._table.shape[1], kv_heads, key_dim, value_dim, self._pairs,
            keys.dtype == torch.bfloat16, self._value_groups, keys.data_ptr(), values.data_ptr(),
            positions, memory.data_ptr(),
        )  # fmt: skip
        told[k.OF_PIECES :] = [field.ctypes.data for field in self._table]
        one_query.team()(_code(), told.ctypes.data, threads, 0)


@cache
def _code() -> int:
    from kvlink_rag.runners.transformers import kernel, placement_kernel

    return kernel.compiled(placement_kernel.place)
