"""What storing the caches of chunks would cost and save, before any is stored.

from kvlink_rag.tuning.estimate import estimate

found = estimate(engine, chunks)
print(found.distinct, found.tokens, found.compute_s, *found.rows(), sep="\\n")
"""

from __future__ import annotations

import math
import os
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from kvlink_rag.chunk import RAW, Chunk, as_chunks
from kvlink_rag.common.progress import bar
from kvlink_rag.engine.engine import KVLinkEngine
from kvlink_rag.errors import InputError
from kvlink_rag.prompt.segments import Strategy
from kvlink_rag.runners.transformers.encode import plan_batches
from kvlink_rag.runners.transformers.runner import TransformersRunner
from kvlink_rag.tuning.trial import prompt_of, store_wanted, trial_engines

QUESTION = "What do these documents tell about it?"

SAMPLE = 4
"""Chunks that are measured, of typical lengths."""
ROUNDS = 3
"""Each thing is measured so often, in turns."""
LOADS = 3
"""And loading, which takes little, so often in each round."""
ENOUGH_S = 3.0
"""After this time no other round begins."""


@dataclass(frozen=True)
class CodecEstimate:
    """What one codec would cost and save.

    Attributes:
        nbytes: of the files of all distinct chunks, headers included.
        index_s: to encode all distinct chunks and write them, one after the other; indexing writes
            while it encodes, and takes a little less.
        load_s: that an average chunk adds to the time to the first token with its cache: read from
            the operating system's memory, verified, decoded, re-positioned, attended to. A disk
            that has to be read comes on top.
        saved_s: of that time by one retrieval of an average chunk: ``compute_s - load_s``.
        retrievals: after how many an average chunk has paid for its indexing; None where loading
            takes as long as computing: it never does.
    """

    codec: str
    nbytes: int
    index_s: float
    load_s: float
    saved_s: float
    retrievals: int | None


@dataclass(frozen=True)
class Estimate:
    """What storing chunks would cost and save, on this machine.

    Attributes:
        chunks: given.
        distinct: of these, with different tokens, each stored once.
        tokens: of the distinct ones.
        compute_s: that an average chunk adds to the time to the first token in full prefill.
        codecs: smallest first.
        refused: why other codecs cannot hold the model's caches, by name.
    """

    chunks: int
    distinct: int
    tokens: int
    compute_s: float
    codecs: tuple[CodecEstimate, ...]
    refused: dict[str, str]

    def rows(self) -> list[tuple[str, ...]]:
        """A table for people: a heading, and a row for each codec."""
        rows: list[tuple[str, ...]] = [
            ("codec", "GB", "indexing", "load a chunk", "a retrieval saves", "pays after")
        ]
        for each in self.codecs:
            size, times = (
                f"{each.nbytes / 1e9:.3g}",
                (_duration(each.index_s), _duration(each.load_s)),
            )
            if each.retrievals is None:
                worth = ("nothing", "never: loading takes as long as computing")
            else:
                s = "" if each.retrievals == 1 else "s"
                worth = (_duration(each.saved_s), f"{each.retrievals:,} retrieval{s}")
            rows.append((each.codec, size, *times, *worth))
        return rows


@dataclass(frozen=True)
class _Measured:
    """Medians in seconds for a token of the sample; what depends on the codec, by codec.

    ``encode`` is for a token of a batch as the model runs it, padding included.
    """

    encode: float
    compute: float
    write: Mapping[str, float]
    load: Mapping[str, float]
    nbytes: Mapping[str, float]


def estimate(
    engine: KVLinkEngine,
    chunks: Iterable[str | Chunk],
    *,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Estimate:
    """Measure a few chunks, count all, and say what storing them would cost and save.

    All chunks are tokenised; four of typical lengths are encoded, written with every codec to
    temporary folders, and read back by whole prefills, some times in turns. What was measured holds
    for chunks like them, retrieved four at a time; longer prompts make computing dearer. The
    engine's own store is left alone and not looked at.

    Args:
        folder: on the disk that the store is to be on; None takes the place for temporary files.
        progress: show a bar.

    Raises:
        InputError: there are no chunks, one is empty or longer than the model's context, or
            ``folder`` is none.
        StoreError: the temporary folders cannot be written.
    """
    given = as_chunks(chunks)
    if not given:
        raise InputError("there are no chunks to estimate for: pass at least one")
    if folder is not None and not Path(folder).is_dir():
        raise InputError(f"{folder} is no folder: name one on the disk that is to hold the store")
    distinct = _distinct(engine, given)
    with (
        trial_engines(engine, None if folder is None else Path(folder)) as twins,
        bar("Estimating", ROUNDS, enabled=progress) as show,
    ):
        sample = _sample(twins[RAW], distinct)
        refused = store_wanted(twins, QUESTION, sample)
        measured = _measure(twins, sample, show)
    lengths = [len(token_ids) for token_ids in distinct]
    found = [_of_codec(codec, measured, lengths, _padded(engine, lengths)) for codec in twins]
    found.sort(key=lambda each: each.nbytes)
    tokens = sum(lengths)
    compute_s = measured.compute * tokens / len(lengths)
    return Estimate(len(given), len(lengths), tokens, compute_s, tuple(found), refused)


def _of_codec(
    codec: str, measured: _Measured, lengths: Sequence[int], padded: int
) -> CodecEstimate:
    """For chunks of these lengths, which are ``padded`` tokens in batches."""
    tokens = sum(lengths)
    average = tokens / len(lengths)
    index_s = measured.encode * padded + measured.write[codec] * tokens
    load_s, saved_s = measured.load[codec], measured.compute - measured.load[codec]
    return CodecEstimate(
        codec,
        round(measured.nbytes[codec] * tokens),
        index_s,
        load_s * average,
        saved_s * average,
        math.ceil(index_s / (saved_s * tokens)) if saved_s > 0 else None,
    )


def _padded(engine: KVLinkEngine, lengths: Sequence[int]) -> int:
    """Tokens that the model runs to encode texts of these lengths."""
    runner = engine.runner
    if not isinstance(runner, TransformersRunner):
        return sum(lengths)  # how others batch is their own business
    batches = plan_batches(lengths, runner.batch_tokens)
    return sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)


def _distinct(engine: KVLinkEngine, chunks: Sequence[Chunk]) -> dict[tuple[int, ...], Chunk]:
    """The first chunk of each token sequence."""
    found: dict[tuple[int, ...], Chunk] = {}
    prompts = engine.pipeline.prompts
    for chunk in chunks:
        token_ids, behind = prompts.wanted(chunk)
        prompts.check_length(len(behind) + len(token_ids), f"chunk {chunk.document_id!r}")
        found.setdefault(token_ids, chunk)
    return found


def _sample(engine: KVLinkEngine, distinct: Mapping[tuple[int, ...], Chunk]) -> list[Chunk]:
    """Chunks from the middles of equal parts by length, as many as fit in one prompt.

    Raises:
        InputError: not even one does.
    """
    by_length = sorted(distinct, key=len)
    for count in range(min(SAMPLE, len(by_length)), 0, -1):
        middles = [(2 * part + 1) * len(by_length) // (2 * count) for part in range(count)]
        sample = [distinct[by_length[middle]] for middle in middles]
        try:
            prompt_of(engine, QUESTION, sample)
            break
        except InputError:
            if count == 1:
                raise
    return sample


def _measure(
    twins: Mapping[str, KVLinkEngine], sample: Sequence[Chunk], show: Callable[[float], None]
) -> _Measured:
    """Everything in turns, so that a slow moment of the machine falls on all alike."""
    raw, rng = twins[RAW], random.Random(0)
    texts = [raw.layout.chunk(chunk) for chunk in sample]
    encode: list[float] = []
    compute: list[float] = []
    write: dict[str, list[float]] = defaultdict(list)
    load: dict[str, list[float]] = defaultdict(list)
    began = time.perf_counter()
    for done in range(1, ROUNDS + 1):
        start = time.perf_counter()
        batches = raw.runner.encode(texts, raw.behind)
        records = [record for batch in batches for _, record in batch.records]
        encode.append(time.perf_counter() - start)
        without = _ttft(raw, [], "full")
        compute.append(_ttft(raw, sample, "full") - without)
        for codec in rng.sample(list(twins), len(twins)):
            start = time.perf_counter()
            for record in records:
                twins[codec].store.put(record)
            write[codec].append(time.perf_counter() - start)
        for codec in rng.sample([*twins] * LOADS, len(twins) * LOADS):
            load[codec].append(_ttft(twins[codec], sample, "reuse") - without)
        show(done)
        if time.perf_counter() - began > ENOUGH_S:
            break
    lengths = [len(text) for text in texts]
    tokens = sum(lengths)
    stats = {codec: twin.store.stat() for codec, twin in twins.items()}
    return _Measured(
        median(encode) / _padded(raw, lengths),
        median(compute) / tokens,
        {codec: median(times) / tokens for codec, times in write.items()},
        # a question over no chunks may be slower than over few, by chance
        {codec: max(median(times), 0.0) / tokens for codec, times in load.items()},
        {codec: stat.nbytes / stat.tokens for codec, stat in stats.items()},
    )


def _ttft(engine: KVLinkEngine, chunks: Sequence[Chunk], strategy: Strategy) -> float:
    return engine.prefill(QUESTION, chunks, strategy=strategy).report.ttft_s


def _duration(seconds: float) -> str:
    for unit, size in (("h", 3600.0), ("min", 60.0), ("s", 1.0)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds * 1000:.3g} ms"
