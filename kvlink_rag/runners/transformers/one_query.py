"""One new token's attention over spans and the prompt's own tokens, by the compiled kernel."""

from __future__ import annotations

import ctypes
import logging
import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch

from kvlink_rag.runners.transformers.model_lock import openmp
from kvlink_rag.runners.transformers.part import (
    FIELDS,
    FLOAT,
    HALF,
    KEY_HEADS,
    KEY_LAYERS,
    KEYS,
    KIND,
    PIECE,
    TOKENS,
    VALUE_HEADS,
    VALUE_LAYERS,
    VALUES,
    Part,
    bytes_of,
    value_groups,
)
from kvlink_rag.runners.transformers.scratch import Scratch


class OneQuery:
    """Attention of the token behind all others, prepared for layers that share frequencies.

    Args:
        parts: what it sees, in the order of the queries that meet them; codes meet the last one.
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
        self.parts, self._scratch = parts, scratch
        self._own_bias, self._starts = own_bias, np.arange(0, own, PIECE)
        mine = np.zeros((FIELDS, len(self._starts)), dtype=np.int64)
        mine[TOKENS] = np.minimum(PIECE, own - self._starts)
        self._table = np.concatenate([*(part.table for part in parts), mine], 1)
        self._of_spans = self._table.shape[1] - len(self._starts)
        counts = [part.table.shape[1] for part in parts]
        met = [number if p.params is None else len(parts) for number, p in enumerate(parts)]
        self._which = np.repeat([*met, len(parts)], [*counts, len(self._starts)])
        biases = [*((part.bias, part.keys.shape[2]) for part in parts), (own_bias, own)]
        self._biases = np.concatenate([_addresses(*each) for each in biases])
        turns = next((part.turns for part in parts if part.turns is not None), None)
        self._pairs = 0 if turns is None else turns[0].shape[1]

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
        told[k.PIECES : k.OF_PIECES] = (
            pieces, kv_heads, group, key_dim, value_dim, self._pairs, value_groups(self.parts),
            queries.data_ptr(), self._which.ctypes.data, self._biases.ctypes.data,
            *(each.data_ptr() for each in memory), out.data_ptr(),
        )  # fmt: skip
        told[k.OF_PIECES :] = [field.ctypes.data for field in table]
        return told

    def _place_own(self, table: Any, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Where the prompt's own tokens are, which is another place after growing."""
        for at, heads, layers, each in (
            (KEYS, KEY_HEADS, KEY_LAYERS, keys),
            (VALUES, VALUE_HEADS, VALUE_LAYERS, values),
        ):
            table[at] = each.data_ptr() + self._starts * bytes_of(each, 2)
            table[heads] = bytes_of(each, 1)
            table[layers] = bytes_of(each, 0) if len(each) > 1 else 0
        table[KIND] = HALF if keys.dtype == torch.bfloat16 else FLOAT


def _addresses(bias: torch.Tensor | None, tokens: int) -> Any:
    """Of what is added to the scores of each piece; 0 where nothing is."""
    starts = np.arange(0, tokens, PIECE)
    return starts * 0 if bias is None else bias.data_ptr() + starts * bias.element_size()


def available() -> bool:
    """Whether the kernel can run here: torch computes with GCC's OpenMP, and numba is there."""
    return openmp() is not None and _code() is not None


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
