"""One new token through a model by the compiled step."""

from __future__ import annotations

import ctypes
import logging
from functools import cache
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from kvlink_rag.chunk import ChunkKV
from kvlink_rag.errors import UnsupportedModelError
from kvlink_rag.rope import RopeGroup
from kvlink_rag.runners.transformers import one_query
from kvlink_rag.runners.transformers.architecture import Architecture
from kvlink_rag.runners.transformers.context import new_cache
from kvlink_rag.runners.transformers.in_place import Kind, LinkedContext
from kvlink_rag.runners.transformers.model_lock import openmp
from kvlink_rag.runners.transformers.one_query import OneQuery
from kvlink_rag.runners.transformers.scratch import Scratch
from kvlink_rag.runners.transformers.step_weights import StepWeights
from kvlink_rag.runners.transformers.together import Tokens, run_together
from kvlink_rag.runners.transformers.visibility import Span

_log = logging.getLogger("kvlink_rag")

LINE = 16
"""Numbers of a processor's cache line: no two threads write to one."""


class Step:
    """The compiled step over a model's weights as they are now.

    Args:
        model: on CPU; hold its lock.

    Raises:
        UnsupportedModelError: it is of a make that the step does not know.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._weights = StepWeights(model)
        self._embed = model.get_input_embeddings()
        self._rotary: Any = model.get_decoder().rotary_emb
        self.vocabulary = int(self._weights.linears[-1, 1])

    @torch.inference_mode()
    def run(self, context: LinkedContext, token_id: int) -> torch.Tensor | None:
        """Run a token behind all others of a context, and keep it there.

        Returns:
            its logits, ``[vocab]`` float32; None where the step cannot read the context or has no
            room in it, and nothing was done.
        """
        if not context.compiled or len(context.positions) >= context.own.capacity:
            return None
        place = context.stop
        context.expect([place])
        stream = self._embed(torch.tensor([token_id]))[0].float().contiguous()
        cos, sin = self._rotary(torch.empty(1, 1, 1), torch.tensor([[place]]))
        logits = torch.empty(self.vocabulary)
        heads = int(self._weights.linears[0, 1]) // context.architecture.head_dim
        attention = _Attention(context, heads, cos[0, 0], sin[0, 0])
        table = self._weights.layers.copy()
        attention.tell(table)
        told = self._told(stream, attention, table, logits, context.scratch)
        code, parallel = _code()
        parallel(code, told.ctypes.data, torch.get_num_threads(), 0)
        context.own.set_length(len(context.positions))
        return logits

    def _told(
        self,
        stream: torch.Tensor,
        attention: _Attention,
        table: Any,
        logits: torch.Tensor,
        scratch: Scratch,
    ) -> Any:
        """What the step is told, ``[STEP_FIELDS]`` int64."""
        from kvlink_rag.runners.transformers import step_kernel as k

        weights, hidden = self._weights, len(stream)
        room = -(-(hidden + weights.rank) // LINE) * LINE
        rows = weights.linears[: len(k.LINEARS), k.ROWS].tolist()
        sizes = {
            "queries": rows[0], "keys": 2 * rows[1], "values": rows[2], "gated": rows[4],
            "raised": rows[5], "own": room * torch.get_num_threads(),
        }  # fmt: skip
        self._memory = {
            name: scratch.tensor(f"step {name}", (size,), torch.float32)
            for name, size in sizes.items()
        }
        memory = {name: tensor.data_ptr() for name, tensor in self._memory.items()}
        told = np.zeros(k.STEP_FIELDS, dtype=np.int64)
        for field, number in {
            k.LAYERS: len(table) - 1, k.HIDDEN: hidden, k.NUMBERS: weights.numbers.ctypes.data,
            k.LAYER_TABLE: table.ctypes.data, k.LINEAR_TABLE: weights.linears.ctypes.data,
            k.STREAM: stream.data_ptr(), k.QUERIES: memory["queries"], k.KEYS: memory["keys"],
            k.VALUES: memory["values"], k.MIXED: attention.mixed.data_ptr(),
            k.GATED: memory["gated"], k.RAISED: memory["raised"], k.OWN: memory["own"],
            k.OWN_SIZE: room, k.LOGITS: logits.data_ptr(),
        }.items():  # fmt: skip
            told[field] = number
        return told


class _Attention:
    """What the layers are told of a context and the new token in it.

    Args:
        context: that expects the token.
        heads: of queries.
        cos, sin: of the angles at its position, ``[2 * pairs]`` float32.
    """

    def __init__(
        self,
        context: LinkedContext,
        heads: int,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> None:
        a = context.architecture
        self._context, self._heads = context, heads
        self._kept: list[Any] = [cos, sin]  # what the addresses belong to
        self.mixed = context.scratch.tensor("step mixed", (heads, a.value_dim), torch.float32)
        self._told = {kind: self._of(one, kind) for kind, one in context.one.items()}

    def _of(self, one: OneQuery, kind: Kind) -> int:
        """The address of what attention is told in layers of a kind."""
        a, own = self._context.architecture, self._context.own
        count = len(self._context.positions)
        shape = (len(one.parts) + 1, a.kv_heads, self._heads // a.kv_heads, a.head_dim)
        queries = self._context.scratch.tensor(f"step queries {kind}", shape, torch.float32)
        keys, values = (each[:, 0, :, :count] for each in (own.key_buffer, own.value_buffer))
        told = one.told(queries, keys, values, self.mixed)
        self._kept += [told, queries]
        return int(told.ctypes.data)

    def tell(self, table: Any) -> None:
        """Fill in the layers' table."""
        from kvlink_rag.runners.transformers import step_kernel as k

        context = self._context
        a, own, place = context.architecture, context.own, len(context.positions) - 1
        for at, each, room in (
            (k.KEY_ROOM, k.KEY_STRIDE, own.key_buffer),
            (k.VALUE_ROOM, k.VALUE_STRIDE, own.value_buffer),
        ):
            layer, _, head, token, _ = (step * room.element_size() for step in room.stride())
            table[:-1, at] = room.data_ptr() + place * token + np.arange(a.layers) * layer
            table[:-1, each] = head
        table[:-1, k.HALF_ROOM] = own.key_buffer.dtype == torch.bfloat16
        table[:-1, k.ATTENTION] = [self._told[kind] for kind in context.kinds]
        table[:-1, k.PARTS] = [len(context.one[kind].parts) for kind in context.kinds]
        for group in a.groups:
            if group.inv_freq is not None:
                self._tell_turns(table, group)

    def _tell_turns(self, table: Any, group: RopeGroup) -> None:
        """The angles of layers that share their frequencies."""
        from kvlink_rag.runners.transformers import step_kernel as k

        assert group.inv_freq is not None
        windows = self._context.architecture.windows
        cos, sin = self._kept[:2]
        table[group.layers, k.TURNED] = len(group.inv_freq)
        table[group.layers, k.COSINES] = cos.data_ptr()
        table[group.layers, k.SINES] = sin.data_ptr()
        numbers = range(*group.layers.indices(len(windows)))
        for window in {windows[number] for number in numbers}:
            its = [number for number in numbers if windows[number] == window]
            if (back := self._context.turns(its[0])) is not None:
                self._kept.append(back)
                table[its, k.BACK_COSINES] = back[0].data_ptr()
                table[its, k.BACK_SINES] = back[1].data_ptr()


@torch.inference_mode()
def serves(model: PreTrainedModel, architecture: Architecture, scratch: Scratch) -> bool:
    """Whether the step computes what the model does: measured on a few tokens."""
    if not one_query.available():
        return False
    try:
        step = Step(model)
    except UnsupportedModelError as error:
        _log.info("%s: a token at a time is run by torch: %s", architecture.name, error)
        return False
    # from all of the vocabulary: its first tokens are special ones, whose activations may be so
    # large that in half precision nothing can be measured beside them
    vocabulary = int(step.vocabulary)
    *chunk, token_id = (vocabulary * i // 8 for i in range(1, 7))
    own = new_cache(architecture, len(chunk))
    alone = LinkedContext(architecture, [], own, scratch)
    run_together(model, [Tokens(alone, chunk, range(len(chunk)))])
    keys, values = own.key_buffer[:, 0], own.value_buffer[:, 0]
    span = Span(ChunkKV(tuple(chunk), (), architecture.fingerprint, keys, values), start=3)
    context = LinkedContext(architecture, [span], new_cache(architecture, 1), scratch)
    expected = run_together(model, [Tokens(context, [token_id], [context.stop])])[0]
    context.forget()
    found = step.run(context, token_id)
    tolerance = 1e-3 if architecture.dtype == torch.float32 else 0.1
    return found is not None and bool((found - expected).norm() <= tolerance * expected.norm())


@cache
def _code() -> tuple[int, Any]:
    """The address of the step, and how a team is started."""
    from llvmlite import binding

    library = openmp()
    assert library is not None, "asked for only where attention is compiled"
    binding.add_symbol("GOMP_barrier", ctypes.cast(library.GOMP_barrier, ctypes.c_void_p).value)
    from kvlink_rag.runners.transformers import kernel, step_kernel

    return kernel.compiled(step_kernel.step), one_query.team()
