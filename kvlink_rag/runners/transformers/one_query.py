"""One new token's attention over spans and the prompt's own tokens, by the compiled kernel."""

from __future__ import annotations

import ctypes
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch

from kvlink_rag.runners.transformers.model_lock import openmp
from kvlink_rag.runners.transformers.scratch import Scratch

DTYPES = (torch.float32, torch.bfloat16)
"""Of caches that the kernel reads."""


@dataclass(frozen=True, eq=False)
class Part:
    """Keys and values that the query sees.

    Args:
        keys: of all layers, ``[layers, kv_heads, tokens, head_dim]``; ``values`` alike.
        bias: added to the scores, ``[tokens]`` float32; None adds nothing.
    """

    keys: torch.Tensor
    values: torch.Tensor
    bias: torch.Tensor | None

    @property
    def readable(self) -> bool:
        """Whether the kernel can read it: its number type, and rows that lie one after another."""
        return all(
            each.dtype in DTYPES and each.stride(3) == 1 and each.stride(2) == each.shape[3]
            for each in (self.keys, self.values)
        )


class OneQuery:
    """Attention of the token behind all others, prepared for all layers.

    Args:
        parts: spans that it sees, in the order of the queries that meet them.
        own: tokens that the prompt adds, up to the new one.
        own_bias: added to their scores, ``[own]`` float32.
        scratch: to compute in; its owner's lock is held.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        own: int,
        own_bias: torch.Tensor | None,
        scratch: Scratch,
    ) -> None:
        from kvlink_rag.runners.transformers.kernel import PIECE

        self.parts, self._piece, self._scratch = parts, PIECE, scratch
        self._own_bias, self._own = own_bias, own
        rows = [
            (
                number,
                address(part.keys, start, 2), address(part.values, start, 2),
                bytes_of(part.keys, 1), bytes_of(part.values, 1),
                int(part.keys.dtype == torch.bfloat16), min(PIECE, part.keys.shape[2] - start),
                0 if part.bias is None else address(part.bias, start, 0),
                bytes_of(part.keys, 0), bytes_of(part.values, 0),
            )
            for number, part in enumerate(parts)
            for start in range(0, part.keys.shape[2], PIECE)
        ]  # fmt: skip
        rows += [
            (
                len(parts), 0, 0, 0, 0, 0, min(PIECE, own - start),
                0 if own_bias is None else address(own_bias, start, 0), 0, 0,
            )
            for start in range(0, own, PIECE)
        ]  # fmt: skip
        self._table = np.array(rows, dtype=np.int64).T.copy()  # a row a field
        self._of_spans = sum(row[0] < len(parts) for row in rows)

    def attend(
        self,
        layer: int,
        queries: torch.Tensor,
        own_keys: torch.Tensor,
        own_values: torch.Tensor,
    ) -> torch.Tensor:
        """Values mixed by the softmax of the scores, ``[kv_heads * group, value_dim]`` float32.

        Args:
            queries: scaled, as they meet each part and last the own tokens, ``[parts + 1, kv_heads,
                group, head_dim]`` float32.
            own_keys: of the prompt's own tokens in this layer, ``[kv_heads, own, head_dim]``;
                ``own_values`` alike.
        """
        from kvlink_rag.runners.transformers.kernel import LAYER

        queries = queries.contiguous()
        out = queries.new_empty(math.prod(queries.shape[1:3]), own_values.shape[2])
        told = self.told(queries, own_keys[None], own_values[None], out)
        told[LAYER] = layer
        _run(told.ctypes.data)
        return out

    def told(
        self,
        queries: torch.Tensor,
        own_keys: torch.Tensor,
        own_values: torch.Tensor,
        out: torch.Tensor,
    ) -> Any:
        """What the kernel is told, ``[FIELDS]`` int64; it lives as long as this object does.

        Args:
            queries: as in :meth:`attend`, contiguous.
            own_keys: of one layer, whichever is asked for, or of all, ``[1 or layers, kv_heads,
                own, head_dim]``; ``own_values`` alike.
            out: where the values go, shaped as :meth:`attend` returns them, contiguous.
        """
        from kvlink_rag.runners.transformers import kernel as k

        _, kv_heads, group, key_dim = queries.shape
        value_dim = own_values.shape[3]
        table = self._table
        self._place_own(table[:, self._of_spans :], own_keys, own_values)
        pieces = table.shape[1]
        tasks = pieces * kv_heads
        sizes = (
            tasks * k.memory_of(group, key_dim, value_dim),
            tasks * group, tasks * group, tasks * group * value_dim,
        )  # fmt: skip
        self._memory = memory = [
            self._scratch.tensor(f"one query {name}", (size,), torch.float32)
            for name, size in zip(("memory", "most", "sums", "mixed"), sizes, strict=True)
        ]
        told = np.zeros(k.FIELDS, dtype=np.int64)
        told[k.PIECES : k.QUERIES + 1] = (
            pieces, kv_heads, group, key_dim, value_dim, queries.data_ptr()
        )  # fmt: skip
        told[k.WHICH_QUERY : k.MEMORY] = [field.ctypes.data for field in table]
        told[k.MEMORY : k.FIELDS] = [*(each.data_ptr() for each in memory), out.data_ptr()]
        return told

    def _place_own(self, table: Any, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Where the prompt's own tokens are, which is another place after growing."""
        starts = np.arange(0, self._own, self._piece)
        for field, each in ((1, keys), (2, values)):
            table[field] = each.data_ptr() + starts * bytes_of(each, 2)
            table[field + 2] = bytes_of(each, 1)
            table[field + 7] = bytes_of(each, 0) if len(each) > 1 else 0
        table[5] = keys.dtype == torch.bfloat16


def available() -> bool:
    """Whether the kernel can run here: torch computes with GCC's OpenMP, and numba is there."""
    return openmp() is not None and _code() is not None


def address(tensor: torch.Tensor, place: int, dim: int) -> int:
    """Of what stands at an index of a dimension, and first in the others."""
    return tensor.data_ptr() + place * bytes_of(tensor, dim)


def bytes_of(tensor: torch.Tensor, dim: int) -> int:
    """From one index of a dimension to the next."""
    return tensor.stride(dim) * tensor.element_size()


@cache
def _code() -> tuple[int, int] | None:
    """Addresses of the kernel's two functions; None where numba cannot be imported."""
    try:
        import numba  # noqa: F401 - it refuses a numpy that is too new for it
        from llvmlite import binding
    except ImportError as error:
        logging.getLogger("kvlink_rag").info("attention is not compiled: %s", error)
        return None
    library = openmp()
    for name in ("omp_get_thread_num", "omp_get_num_threads"):
        found = ctypes.cast(getattr(library, name), ctypes.c_void_p).value
        binding.add_symbol(name, found)
    from kvlink_rag.runners.transformers import kernel

    return kernel.compiled(kernel.attend), kernel.compiled(kernel.combine)


@cache
def team() -> Any:
    """``GOMP_parallel(function, argument, threads, flags)`` of torch's own OpenMP."""
    library = openmp()
    assert library is not None
    parallel = library.GOMP_parallel
    parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    parallel.restype = None
    return parallel


def _run(told: int) -> None:
    code = _code()
    assert code is not None
    team()(code[0], told, torch.get_num_threads(), 0)
    _combine(code[1])(told)


@cache
def _combine(address: int) -> Any:
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)
