"""Which number type a processor computes fastest in, and in which one caches are kept.

Checkpoints are in half precision, and what that costs on a CPU depends on the processor: with
matrix units for bfloat16 (AMX) its products take a quarter of float32's time, without any they take
seven times as long. Which it is gets measured, once a machine. Caches stay in the checkpoint's type
whatever computes them, so that a store made on one processor serves on the other, in half the
bytes of float32.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import platform
import time
from pathlib import Path

import psutil
import torch
from transformers import PreTrainedModel

from kvlink_rag.common.paths import cache_dir
from kvlink_rag.common.whole import write_whole

ROWS = (1, 32, 256)
"""Of the products that are timed: a token of an answer, a question, a batch of chunks."""
SIZES = (1024, 2048)
TRIES = 5
MEMORY = 0.7
"""Share of the free memory that a model in float32 may take."""

_KEPT = "_kvlink_cache_dtype"


def cache_dtype(model: PreTrainedModel) -> torch.dtype:
    """The number type of a model's caches: its own, or that from which it was converted."""
    kept: torch.dtype = getattr(model, _KEPT, model.dtype)
    return kept


def to_fastest(model: PreTrainedModel) -> PreTrainedModel:
    """Let a half-precision model on a CPU compute in float32 where that is faster.

    Its numbers stay those of the checkpoint, which float32 holds all, and its caches are kept in
    the checkpoint's type. A model whose weights have several types stays as it is, and so does one
    that would not fit into memory.
    """
    tensors = [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]
    types = {parameter.dtype for parameter in model.parameters()}
    half = types <= {torch.bfloat16} or types <= {torch.float16}
    if not types or not half or any(tensor.device.type != "cpu" for tensor in tensors):
        return model
    dtype = types.pop()
    more = sum(t.numel() * 4 - t.nbytes for t in tensors if t.dtype == dtype)
    if more > MEMORY * psutil.virtual_memory().available or not float32_is_faster(dtype):
        return model
    module: torch.nn.Module = model
    module.to(torch.float32)
    setattr(model, _KEPT, dtype)
    return model


def in_cache_dtype(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A weight in the checkpoint's type, if it is one of its numbers, else as it is."""
    if weight.dtype != torch.float32 or dtype == torch.float32:
        return weight
    before = weight.to(dtype)
    return before if torch.equal(before.float(), weight) else weight


def float32_is_faster(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies float32 matrices faster than those of ``dtype``.

    Measured when it is first asked on a machine, for its processor, number of threads and torch;
    kept in the user's cache folder.
    """
    file, key = cache_dir() / "number-types.json", _machine(dtype)
    known = _read(file)
    if key not in known:
        known[key] = measure(dtype)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, json.dumps(known, indent=1) + "\n")
        except OSError as error:  # the next process measures again
            logging.getLogger("kvlink_rag").info("%s is not kept: %s", file.name, error)
    return known[key] > 1


def measure(dtype: torch.dtype) -> float:
    """How much longer products of a number type take than those of float32, over some sizes.

    Both in turn, the best of a few tries each: a neighbour on the processor slows some of them.
    """
    ratios = []
    for rows in ROWS:
        pairs = {
            kind: (torch.ones(rows, SIZES[0], dtype=kind), torch.ones(*SIZES[::-1], dtype=kind))
            for kind in (dtype, torch.float32)
        }
        seconds = dict.fromkeys(pairs, math.inf)
        for _ in range(TRIES + 1):  # the first one makes kernels
            for kind, (a, weight) in pairs.items():
                start = time.perf_counter()
                torch.nn.functional.linear(a, weight)
                seconds[kind] = min(seconds[kind], time.perf_counter() - start)
        ratios.append(seconds[dtype] / seconds[torch.float32])
    return math.prod(ratios) ** (1 / len(ratios))


def _machine(dtype: torch.dtype) -> str:
    """What decides how fast products are."""
    cpuinfo = Path("/proc/cpuinfo")
    processor = platform.processor()
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        processor = next((x for x in lines if x.startswith("model name")), processor)
        processor += next((x for x in lines if x.startswith("flags")), "")
    digest = hashlib.sha256(processor.encode()).hexdigest()[:16]
    kind = str(dtype).removeprefix("torch.")
    return f"{kind}, processor {digest}, {torch.get_num_threads()} threads, {torch.__version__}"


def _read(file: Path) -> dict[str, float]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none yet, or another program's
        return {}
    return found if isinstance(found, dict) else {}
