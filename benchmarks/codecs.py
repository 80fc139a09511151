"""What the codecs of a store cost: bytes, time to the first token, and how far it moves.

    python benchmarks/codecs.py --questions 100 --repeats 20

Answers under the codecs are compared by `kvlink eval --config benchmarks/eval_codecs.json`.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch

from kvlink_rag import Chunk, KVLinkEngine
from kvlink_rag.bench.corpus import QUESTION, corpus_ids, cut_chunks
from kvlink_rag.bench.series import machine
from kvlink_rag.common.progress import bar
from kvlink_rag.evaluation.data import Example, data_folder, read_examples
from kvlink_rag.evaluation.rows import CodedStore
from kvlink_rag.runners.transformers.models import DEFAULT_MODEL
from kvlink_rag.store import FolderStore
from kvlink_rag.store.codec import CODECS

SETS = ("nq_multidoc10", "hotpotqa", "squad_multidoc")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--adapter", default="smollm2-135m-link5", help="empty for none")
    parser.add_argument("--questions", type=int, default=100, help="of each set")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--length", type=int, default=5000, help="tokens of the timed prompt")
    args = parser.parse_args()
    base = KVLinkEngine.from_pretrained(args.model)
    codecs = [c for c in CODECS if c != "bf16" or base.architecture.dtype != torch.bfloat16]
    with tempfile.TemporaryDirectory(prefix="kvlink-codecs-") as name:
        engines = {c: base.with_store(FolderStore(Path(name) / c, c)) for c in codecs}
        nbytes = measure_bytes_and_time(engines, args.length, args.repeats)
    reader = base.with_adapter(args.adapter) if args.adapter else base
    divergences = measure_divergence(reader, codecs, args.questions)
    print("| codec | bytes a token | of raw | first token, ms | divergence, nats | same token |")
    print("|---|---|---|---|---|---|")
    for codec in codecs:
        size, times = nbytes[codec]
        share = 100 * size / nbytes["raw"][0]
        cells = [f"{size:.0f}", f"{share:.1f} %", spread([1000 * t for t in times])]
        if found := divergences.get(codec):
            same = 100 * statistics.mean(top for _, top in found)
            cells += [f"{statistics.mean(kl for kl, _ in found):.4f}", f"{same:.1f} %"]
        else:
            cells += ["", ""]
        print(f"| {codec} | {' | '.join(cells)} |")
    print(", ".join(f"{name} {value}" for name, value in machine(base).items()))


def spread(values: Sequence[float]) -> str:
    """Median and extremes."""
    return f"{statistics.median(values):.0f} ({min(values):.0f}-{max(values):.0f})"


def measure_bytes_and_time(
    engines: dict[str, KVLinkEngine], length: int, repeats: int
) -> dict[str, tuple[float, list[float]]]:
    """Bytes of files a token, and seconds to the first token of ten chunks in random order."""
    rng = random.Random(0)
    raw = engines["raw"]
    texts = [c.text for e in examples(1000)[:200] for c in e.chunks]
    chunks = cut_chunks(raw, corpus_ids(raw, texts), length, rng)
    sizes, times = {}, defaultdict(list)
    for codec, engine in engines.items():
        engine.index(chunks, progress=False)
        stat = engine.store.stat()
        sizes[codec] = stat.nbytes / stat.tokens
        for _ in range(2):  # the prefix is stored, and what is used first is loaded
            engine.prefill(QUESTION, chunks)
    with bar("Timing", repeats) as show:
        for done in range(repeats):
            order = rng.sample(chunks, len(chunks))
            for codec in rng.sample(list(engines), len(engines)):
                report = engines[codec].answer(QUESTION, order, max_new_tokens=1).report
                assert report.misses == 0
                times[codec].append(report.ttft_s)
            show(done + 1)
    return {codec: (sizes[codec], times[codec]) for codec in engines}


def examples(count: int) -> list[Example]:
    """The first questions of each set."""
    folder = data_folder() / "dev"
    return [e for name in SETS for e in read_examples(folder / f"{name}.jsonl.gz", count)]


def measure_divergence(
    engine: KVLinkEngine, codecs: Sequence[str], questions: int
) -> dict[str, list[tuple[float, bool]]]:
    """KL divergence (nats) of the first token's distribution from that over raw caches.

    Returns:
        by codec, for each question: the divergence, and whether the likeliest token is the same.
    """
    found: dict[str, list[tuple[float, bool]]] = defaultdict(list)
    asked = examples(questions)
    with bar("Comparing", len(asked)) as show:
        for done, example in enumerate(asked, 1):
            store = engine.with_store(None)
            for _ in range(2):  # computed, then read
                raw = logits(store, example.question, example.chunks)
            for codec in codecs:
                if codec != "raw":
                    coded = store.with_store(CodedStore(store.store, codec))
                    other = logits(coded, example.question, example.chunks)
                    kl = float((raw.exp() * (raw - other)).sum())
                    found[codec].append((kl, bool(raw.argmax() == other.argmax())))
            show(done)
    return found


def logits(engine: KVLinkEngine, question: str, chunks: Sequence[Chunk]) -> torch.Tensor:
    """Logarithms of the first token's probabilities, ``[vocab]``."""
    return engine.prefill(question, chunks, strategy="reuse").logits.double().log_softmax(-1)


if __name__ == "__main__":
    main()
