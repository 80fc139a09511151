"""Memory of one answer, beside the model, in multiples of the caches that it reads.

    python benchmarks/memory.py --dtype bfloat16

Ten chunks of 500 tokens from files, 16 tokens of answer; each way in a process of its own, which
has answered from two small chunks before. Linux: the peak is the kernel's count of resident pages.
"""

from __future__ import annotations

import argparse
import gc
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from kvlink_rag import KVLinkEngine
from kvlink_rag.bench.corpus import CHUNKS, QUESTION, corpus_ids, cut_chunk
from kvlink_rag.bench.series import machine
from kvlink_rag.common.corpus import corpus_files
from kvlink_rag.engine.options import AnswerOptions
from kvlink_rag.runners.transformers.models import DEFAULT_MODEL

SHARES = ("0", "0.02", "0.04", "0.08", "0.15")
"""Of the chunks' tokens, computed anew; of none, `reuse`."""
TOKENS = 500


def status(field: str) -> int:
    """Bytes, as the kernel tells them."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(re.findall(rf"{field}:\s+(\d+) kB", text)[0])


def measure(share: float, store: str, dtype: str) -> None:
    """One way, in this process; prints how many times the bytes read."""
    engine = KVLinkEngine.from_pretrained(DEFAULT_MODEL, store=store, dtype=dtype)
    ids = corpus_ids(engine, [file.read_text(encoding="utf-8") for file in corpus_files()])
    chunks = [cut_chunk(engine, ids, TOKENS, random.Random(n)) for n in range(CHUNKS)]
    few = [cut_chunk(engine, ids, 20, random.Random(n)) for n in range(2)]
    if engine.index([*chunks, *few], progress=False).misses:
        print(", ".join(f"{name} {value}" for name, value in machine(engine).items()))
        return  # what encoding took stays with the process
    options: AnswerOptions = {"strategy": "recompute", "recompute": share}
    if share == 0:
        options = {"strategy": "reuse"}
    engine.answer(QUESTION, few, max_new_tokens=8, **options)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is now
    before = status("VmRSS")
    order = random.Random(0).sample(chunks, CHUNKS)
    report = engine.answer(QUESTION, order, max_new_tokens=16, **options).report
    times = (status("VmHWM") - before) / report.bytes_read
    print(f"{report.way:15} {times:.2f} times {report.bytes_read / 1e6:.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--store", help=argparse.SUPPRESS)
    parser.add_argument("--share", type=float, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.store:
        measure(given.share, given.store, given.dtype)
        return
    with tempfile.TemporaryDirectory() as folder:
        for share in ("0", *SHARES):  # the first one indexes
            told = ["--dtype", given.dtype, "--store", folder, "--share", share]
            subprocess.run([sys.executable, __file__, *told], check=True, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
