"""The softmax of scores of which each query may see some, by the compiled kernel."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

from kvlink_rag.runners.transformers import one_query
from kvlink_rag.runners.transformers.part import DTYPES
from kvlink_rag.runners.transformers.scratch import Scratch


def available(dtype: torch.dtype) -> bool:
    """Whether the kernel can run here, on numbers of this type."""
    return dtype in DTYPES and one_query.available()


def softmax_seen(
    scores: torch.Tensor,
    first: np.ndarray,
    stop: np.ndarray,
    scratch: Scratch,
    paid: torch.Tensor | None = None,
) -> None:
    """Turn each row's scores, in place, to weights that sum to 1; 0 where it does not see.

    Args:
        scores: ``[rows, columns]``, one row after another.
        first, stop: each row sees columns from ``first`` up to ``stop``, ``[rows]`` int64; each at
            least one.
        scratch: to compute in.
        paid: to which the weights are added, summed over rows, ``[up to columns]`` float32.
    """
    from kvlink_rag.runners.transformers import softmax_kernel as k

    rows, columns = scores.shape
    threads = torch.get_num_threads()
    memory = scratch.tensor("softmax", (threads, columns), torch.float32)
    sums: torch.Tensor | None = None
    if paid is not None:
        sums = scratch.tensor("softmax paid", (threads, columns), torch.float32).zero_()
    told = np.zeros(k.FIELDS, dtype=np.int64)
    told[:] = (
        rows, columns, scores.dtype == torch.bfloat16, scores.data_ptr(), first.ctypes.data,
        stop.ctypes.data, memory.data_ptr(), 0 if sums is None else sums.data_ptr(),
    )  # fmt: skip
    one_query.team()(_code(), told.ctypes.data, threads, 0)
    if paid is not None and sums is not None:
        paid += sums.sum(0)[: len(paid)]


@cache
def _code() -> int:
    from kvlink_rag.runners.transformers import kernel, softmax_kernel

    return kernel.compiled(softmax_kernel.softmax)
