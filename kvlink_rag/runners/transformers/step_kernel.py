"""One new token through all layers of a model, compiled: every weight is read once, as it lies.

As a forward pass of torch it is some fifteen small operations a layer, each started by Python and
waiting for all threads, and products of one row that reach half of what the memory gives. Here a
team of threads goes through all of it together: each takes its share of the rows of every matrix,
and they wait for one another seven times a layer. All numbers on the way are float32, whatever the
weights are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit, types

from kvlink_rag.runners.transformers import kernel as k
from kvlink_rag.runners.transformers.kernel import MATH, num_threads, pointer, thread_num

(
    LAYERS, HIDDEN, NUMBERS, LAYER_TABLE, LINEAR_TABLE, STREAM, QUERIES, KEYS, VALUES, MIXED, GATED,
    RAISED, OWN, OWN_SIZE, LOGITS, STEP_FIELDS,
) = range(16)  # fmt: skip
"""What the step is told, by its place: numbers, and addresses of arrays.

``NUMBERS`` are float32: what norms add to the variance, and what scores are multiplied by. The
other arrays are float32, too, and what is computed in: the residual stream ``[hidden]``; queries,
keys (twice as many, for those that RoPE has turned) and values of all heads; what attention mixed;
gate and up projection; of each thread ``OWN_SIZE`` numbers of its own, ``hidden`` and the highest
rank of a LoRA. ``LOGITS`` come out. The tables are described below: a row for each layer, and one
of which only ``BEFORE_ATTENTION`` counts, the norm before the head; a row for each linear layer,
seven a layer (:data:`LINEARS`), and the head.
"""
(
    ATTENTION, PARTS, BEFORE_ATTENTION, BEFORE_MLP, QUERY_NORM, KEY_NORM, KEY_ROOM, VALUE_ROOM,
    KEY_STRIDE, VALUE_STRIDE, HALF_ROOM, TURNED, COSINES, SINES, BACK_COSINES, BACK_SINES,
    LAYER_FIELDS,
) = range(17)  # fmt: skip
"""Of a layer: what its attention is told (:mod:`kvlink_rag.runners.transformers.kernel`), and how
many spans it sees; weights of its norms, float32, or 0; where the new key and value of the first
head go, the bytes from one head to the next, and whether they are bfloat16; how many pairs of
numbers RoPE turns, by which angles, ``[pairs]`` float32, and those back to each span, ``[parts,
pairs]``."""

(
    WEIGHT, ROWS, COLUMNS, HALF, BIAS, RANK, SMALL, LARGE, HALF_LORA, SCALING, LINEAR_FIELDS,
) = range(11)  # fmt: skip
"""Of a linear layer: its weight ``[rows, columns]``, its bias in float32, or 0, and its LoRA ``x →
large (small x)``: ``[rank, columns]`` and ``[rows, rank]``, and where the factor is, float32."""

LINEARS = ("query", "key", "value", "out", "gate", "up", "down")
_OUT, _GATE, _UP, _DOWN = range(3, len(LINEARS))

barrier: Any = types.ExternalFunction("GOMP_barrier", types.void())


@njit(fastmath=MATH)
def _product(
    address: int, half: bool, first: int, last: int, columns: int, x: Any, out: Any
) -> None:
    """Rows of a matrix times ``x``."""
    if half:
        halves = carray(pointer(address), (last, columns), np.uint16)
        for row in range(first, last):
            total = np.float32(0)
            for i in range(columns):
                total += k.wide(halves[row, i]) * x[i]
            out[row] = total
    else:
        whole = carray(pointer(address), (last, columns), np.float32)
        for row in range(first, last):
            total = np.float32(0)
            for i in range(columns):
                total += whole[row, i] * x[i]
            out[row] = total


@njit(fastmath=MATH)
def _linear(it: Any, first: int, last: int, x: Any, out: Any, own: Any) -> None:
    """Rows of a linear layer's result; ``own`` has room for as many numbers as its LoRA's rank."""
    _product(it[WEIGHT], it[HALF] != 0, first, last, it[COLUMNS], x, out)
    if it[BIAS] != 0:
        bias = carray(pointer(it[BIAS]), (last,), np.float32)
        for row in range(first, last):
            out[row] += bias[row]
    rank = it[RANK]
    if rank == 0:
        return
    _product(it[SMALL], it[HALF_LORA] != 0, 0, rank, it[COLUMNS], x, own)  # every thread all of it
    scaling = carray(pointer(it[SCALING]), (1,), np.float32)[0]
    if it[HALF_LORA] != 0:
        halves = carray(pointer(it[LARGE]), (last, rank), np.uint16)
        for row in range(first, last):
            for i in range(rank):
                out[row] += scaling * k.wide(halves[row, i]) * own[i]
    else:
        whole = carray(pointer(it[LARGE]), (last, rank), np.float32)
        for row in range(first, last):
            for i in range(rank):
                out[row] += scaling * whole[row, i] * own[i]


@njit(fastmath=MATH)
def _norm(weight: int, epsilon: Any, x: Any, start: int, size: int, out: Any, to: int) -> None:
    """Root mean square norm of ``size`` numbers of ``x`` to as many of ``out``."""
    weights = carray(pointer(weight), (size,), np.float32)
    squares = np.float32(0)
    for i in range(size):
        squares += x[start + i] * x[start + i]
    factor = np.float32(1) / np.sqrt(squares / np.float32(size) + epsilon)
    for i in range(size):
        out[to + i] = weights[i] * (x[start + i] * factor)


@njit(fastmath=MATH)
def _turn(
    x: Any, start: int, dim: int, cosines: int, sines: int, pairs: int, out: Any, to: int
) -> None:
    """RoPE of one head; numbers beyond the pairs stay as they are."""
    cos = carray(pointer(cosines), (pairs,), np.float32)
    sin = carray(pointer(sines), (pairs,), np.float32)
    for i in range(pairs):
        first, second = x[start + i], x[start + pairs + i]
        out[to + i] = first * cos[i] - second * sin[i]
        out[to + pairs + i] = second * cos[i] + first * sin[i]
    for i in range(2 * pairs, dim):
        out[to + i] = x[start + i]


@njit(fastmath=MATH)
def _keep(x: Any, start: int, dim: int, address: int, half: bool) -> None:
    """Numbers to the cache, rounded to what it holds."""
    if half:
        halves = carray(pointer(address), (dim,), np.uint16)
        for i in range(dim):
            halves[i] = k.nearest_half(x[start + i])
    else:
        whole = carray(pointer(address), (dim,), np.float32)
        for i in range(dim):
            whole[i] = x[start + i]


@njit(fastmath=MATH)
def _head(told: Any, layer: Any, attention: Any, head: int) -> None:
    """The new queries, key and value of one key head, where attention finds them."""
    kv_heads, group = attention[k.KV_HEADS], attention[k.GROUP]
    key_dim, value_dim = attention[k.KEY_DIM], attention[k.VALUE_DIM]
    parts, pairs = layer[PARTS], layer[TURNED]
    numbers = carray(pointer(told[NUMBERS]), (2,), np.float32)
    projected = carray(pointer(told[QUERIES]), (kv_heads * group * key_dim,), np.float32)
    rows = (parts + 1) * kv_heads * group
    queries = carray(pointer(attention[k.QUERIES]), (rows * key_dim,), np.float32)
    for g in range(group):
        query = (head * group + g) * key_dim
        if layer[QUERY_NORM] != 0:
            _norm(layer[QUERY_NORM], numbers[0], projected, query, key_dim, projected, query)
        last = ((parts * kv_heads + head) * group + g) * key_dim
        _turn(projected, query, key_dim, layer[COSINES], layer[SINES], pairs, queries, last)
        for i in range(key_dim):
            queries[last + i] *= numbers[1]
        for part in range(parts):  # back to where the span was computed
            to = ((part * kv_heads + head) * group + g) * key_dim
            cosines = layer[BACK_COSINES] + 4 * part * pairs
            sines = layer[BACK_SINES] + 4 * part * pairs
            _turn(queries, last, key_dim, cosines, sines, pairs, queries, to)
    keys = carray(pointer(told[KEYS]), (2 * kv_heads * key_dim,), np.float32)
    key, turned = head * key_dim, (kv_heads + head) * key_dim
    if layer[KEY_NORM] != 0:
        _norm(layer[KEY_NORM], numbers[0], keys, key, key_dim, keys, key)
    _turn(keys, key, key_dim, layer[COSINES], layer[SINES], pairs, keys, turned)
    half = layer[HALF_ROOM] != 0
    _keep(keys, turned, key_dim, layer[KEY_ROOM] + head * layer[KEY_STRIDE], half)
    values = carray(pointer(told[VALUES]), (kv_heads * value_dim,), np.float32)
    room = layer[VALUE_ROOM] + head * layer[VALUE_STRIDE]
    _keep(values, head * value_dim, value_dim, room, half)


@njit(fastmath=MATH)
def _attend(told: Any, number: int, layer: Any, linears: Any, own: Any) -> None:
    """A layer's attention, from the residual stream to the residual stream."""
    me, team, hidden = thread_num(), num_threads(), told[HIDDEN]
    attention = carray(pointer(layer[ATTENTION]), (k.FIELDS,), np.int64)
    stream = carray(pointer(told[STREAM]), (hidden,), np.float32)
    numbers = carray(pointer(told[NUMBERS]), (2,), np.float32)
    _norm(layer[BEFORE_ATTENTION], numbers[0], stream, 0, hidden, own, 0)
    for which in range(3):  # QUERIES, KEYS and VALUES follow one another
        it = linears[which]
        rows = it[ROWS]
        out = carray(pointer(told[QUERIES + which]), (rows,), np.float32)
        _linear(it, rows * me // team, rows * (me + 1) // team, own, out, own[hidden:])
    barrier()
    for head in range(me, attention[k.KV_HEADS], team):
        _head(told, layer, attention, head)
    barrier()
    for task in range(me, attention[k.PIECES] * attention[k.KV_HEADS], team):
        k.mix_piece(attention, number, task)
    barrier()
    for row in range(me, attention[k.KV_HEADS] * attention[k.GROUP], team):
        k.combine_row(attention, row)
    barrier()
    it = linears[_OUT]
    mixed = carray(pointer(told[MIXED]), (it[COLUMNS],), np.float32)
    _add(it, mixed, stream, own)
    barrier()


@njit(fastmath=MATH)
def _add(it: Any, x: Any, stream: Any, own: Any) -> None:
    """A linear layer's result, added to the residual stream."""
    me, team = thread_num(), num_threads()
    first, last = it[ROWS] * me // team, it[ROWS] * (me + 1) // team
    _linear(it, first, last, x, own, own[it[ROWS] :])
    for row in range(first, last):
        stream[row] += own[row]


@njit(fastmath=MATH)
def _feed_forward(told: Any, layer: Any, linears: Any, own: Any) -> None:
    """A layer's gated linear unit, from the residual stream to the residual stream."""
    me, team, hidden = thread_num(), num_threads(), told[HIDDEN]
    stream = carray(pointer(told[STREAM]), (hidden,), np.float32)
    numbers = carray(pointer(told[NUMBERS]), (2,), np.float32)
    _norm(layer[BEFORE_MLP], numbers[0], stream, 0, hidden, own, 0)
    size = linears[_GATE, ROWS]
    first, last = size * me // team, size * (me + 1) // team
    gated = carray(pointer(told[GATED]), (size,), np.float32)
    raised = carray(pointer(told[RAISED]), (size,), np.float32)
    _linear(linears[_GATE], first, last, own, gated, own[hidden:])
    _linear(linears[_UP], first, last, own, raised, own[hidden:])
    for i in range(first, last):
        gated[i] *= raised[i] / (np.float32(1) + np.exp(-gated[i]))
    barrier()
    _add(linears[_DOWN], gated, stream, own)
    barrier()


def step(address: Any) -> None:
    """All layers and the head, by every thread of a team; ``address`` is that of what is told."""
    told = carray(address, (STEP_FIELDS,), np.int64)
    me, team, count, hidden = thread_num(), num_threads(), told[LAYERS], told[HIDDEN]
    layers = carray(pointer(told[LAYER_TABLE]), (count + 1, LAYER_FIELDS), np.int64)
    linears = carray(
        pointer(told[LINEAR_TABLE]), (count * len(LINEARS) + 1, LINEAR_FIELDS), np.int64
    )
    own = carray(pointer(told[OWN] + 4 * me * told[OWN_SIZE]), (told[OWN_SIZE],), np.float32)
    for number in range(count):
        its = linears[number * len(LINEARS) : (number + 1) * len(LINEARS)]
        _attend(told, number, layers[number], its, own)
        _feed_forward(told, layers[number], its, own)
    stream = carray(pointer(told[STREAM]), (hidden,), np.float32)
    numbers = carray(pointer(told[NUMBERS]), (2,), np.float32)
    it = linears[count * len(LINEARS)]
    out = carray(pointer(told[LOGITS]), (it[ROWS],), np.float32)
    _norm(layers[count, BEFORE_ATTENTION], numbers[0], stream, 0, hidden, own, 0)
    _linear(it, it[ROWS] * me // team, it[ROWS] * (me + 1) // team, own, out, own[hidden:])
