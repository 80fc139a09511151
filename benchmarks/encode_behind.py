"""Which prefix should chunks be encoded behind? Answers of one model, side by side.

    python benchmarks/encode_behind.py --questions 200 --out encode-behind.jsonl

For every question the prompt is the same, token for token; only what the chunks' caches were
encoded behind differs (nothing, the bare chat header, the default system prefix), with full
prefill beside them. The rows of one question are decoded as one batch. Results are appended to the
file, so that an interrupted run goes on where it stopped; the table covers all of the file.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from kvlink_rag import Chunk, KVLinkEngine
from kvlink_rag.chunk import ChunkKV
from kvlink_rag.encode import Encoder
from kvlink_rag.evaluation.data import Example, data_folder, read_examples
from kvlink_rag.evaluation.metrics import best_subspan_em, token_f1
from kvlink_rag.link import ContextCache
from kvlink_rag.rope import shift_groups

SETS = ("nq_multidoc10", "hotpotqa", "squad_multidoc")
MODES = ("alone", "header", "system")
ROWS = ("full", *MODES)
COUNTS = (5, 10)


@dataclass
class Prompt:
    """Chunks of one prompt and, per mode, their caches in the same order."""

    chunks: list[Chunk]
    caches: dict[str, list[ChunkKV]]


class Comparison:
    """All rows of one question in one batch."""

    def __init__(self, engine: KVLinkEngine, max_new_tokens: int) -> None:
        self.engine = engine
        self.encoder = Encoder(engine.model, engine.architecture)
        self.max_new_tokens = max_new_tokens
        self.behind = {mode: engine.layout.behind(mode) for mode in MODES}

    def caches(self, chunks: list[Chunk]) -> dict[str, list[ChunkKV]]:
        """Per mode the chunk caches, in the order of ``chunks``."""
        texts = [self.engine.layout.chunk(chunk) for chunk in chunks]
        made = {}
        for mode, behind in self.behind.items():
            batches = self.encoder.encode(texts, behind, max_batch_tokens=1536)
            found = dict(pair for batch in batches for pair in batch)
            made[mode] = [found[place] for place in range(len(texts))]
        return made

    @torch.inference_mode()
    def answers(self, example: Example, prompts: list[Prompt]) -> list[dict[str, str]]:
        """The greedy answers of each prompt's rows; all rows are decoded in one batch."""
        layout = self.engine.layout
        prefix, question = layout.prefix(), layout.question(example.question)
        fulls = [
            self.engine.prefill(example.question, prompt.chunks, strategy="full")
            for prompt in prompts
        ]
        contexts = [len(full.token_ids) - len(question) for full in fulls]
        longest, count = max(contexts), len(ROWS) * len(prompts)
        cache = self.encoder.new_cache(longest + len(question) + self.max_new_tokens, batch=count)
        cache.key_buffer.zero_()
        cache.value_buffer.zero_()
        row = 0
        for prompt, full, context in zip(prompts, fulls, contexts, strict=True):
            # Shorter contexts lie at the end of their row; what is before them is masked.
            gap = longest - context
            for mode in ROWS:
                keys, values = cache.key_buffer[:, row], cache.value_buffer[:, row]
                keys[:, :, gap:longest] = full.cache.key_buffer[:, 0, :, :context]
                values[:, :, gap:longest] = full.cache.value_buffer[:, 0, :, :context]
                start = len(prefix)
                for record in prompt.caches.get(mode, []):
                    self._place(record, start, keys[:, :, gap:], values[:, :, gap:])
                    start += len(record.token_ids)
                row += 1
        cache.set_length(longest)
        gaps = [longest - context for context in contexts for _ in ROWS]
        texts = [self._text(tokens) for tokens in self._decode(cache, question, gaps)]
        size = len(ROWS)
        return [dict(zip(ROWS, texts[at : at + size], strict=True)) for at in range(0, count, size)]

    def _place(self, record: ChunkKV, start: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        stop = start + len(record.token_ids)
        shift_groups(
            record.keys,
            torch.arange(start, stop),
            self.engine.architecture.groups,
            out=keys[:, :, start:stop],
        )
        values[:, :, start:stop] = record.values

    def _decode(self, cache: ContextCache, question: list[int], gaps: list[int]) -> list[list[int]]:
        rows: list[list[int]] = [[] for _ in gaps]
        missing = torch.tensor(gaps)[:, None]
        ids = torch.tensor([question] * len(rows))
        for _ in range(self.max_new_tokens):
            start = cache.get_seq_length()
            stop = start + ids.shape[1]
            logits = self.engine.model(
                input_ids=ids,
                position_ids=torch.arange(start, stop)[None] - missing,
                attention_mask=(torch.arange(stop)[None] >= missing).long(),
                past_key_values=cache,
                logits_to_keep=1,
            ).logits[:, -1]
            ids = logits.argmax(-1, keepdim=True)
            for row, token in zip(rows, ids[:, 0].tolist(), strict=True):
                row.append(token)
            if all(self.engine.tokenizer.eos_token_id in row for row in rows):
                break
        return rows

    def _text(self, row: list[int]) -> str:
        end = self.engine.tokenizer.eos_token_id
        row = row[: row.index(end)] if end in row else row
        return self.engine.tokenizer.decode(row, skip_special_tokens=True).strip()


def run(args: argparse.Namespace) -> None:
    """Answer what the file does not hold yet."""
    done = {(r["id"], r["chunks"]) for r in read_rows(args.out)}
    comparison = Comparison(KVLinkEngine.from_pretrained(args.model), args.max_new_tokens)
    todo = [e for e in interleave(args.questions) if any((e[1].id, c) not in done for c in COUNTS)]
    shard, shards = map(int, args.shard.split("/"))
    todo = todo[shard::shards]
    with args.out.open("a", encoding="utf-8") as out:
        for name, example in tqdm(todo, desc="questions"):
            all_chunks = example.with_chunks(10, random.Random(example.id))
            caches = comparison.caches(all_chunks)
            prompts = []
            for count in COUNTS:
                chunks = example.with_chunks(count, random.Random(example.id))
                places = [all_chunks.index(chunk) for chunk in chunks]
                its = {mode: [caches[mode][place] for place in places] for mode in MODES}
                prompts.append(Prompt(chunks, its))
            for count, answers in zip(COUNTS, comparison.answers(example, prompts), strict=True):
                row = {"set": name, "id": example.id, "chunks": count, "gold": example.answers}
                out.write(json.dumps(row | {"answers": answers}, ensure_ascii=False) + "\n")
            out.flush()


def interleave(limit: int) -> Iterator[tuple[str, Example]]:
    """Examples of all sets in turn, so that a partial run is balanced."""
    sets = [read_examples(data_folder() / "dev" / f"{name}.jsonl.gz", limit) for name in SETS]
    for examples in zip(*sets, strict=True):
        yield from zip(SETS, examples, strict=True)


def read_rows(path: Path) -> list[dict]:
    """Rows of earlier runs; a line cut by a kill is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


def table(path: Path) -> str:
    """Best-subspan EM / F1 in percent, a Markdown table, with a 95 % bootstrap interval of EM."""
    scores: dict[tuple[str, int, str], list[tuple[float, float]]] = defaultdict(list)
    for row in read_rows(path):
        for mode, answer in row["answers"].items():
            pair = best_subspan_em(answer, row["gold"]), token_f1(answer, row["gold"])
            for name in (row["set"], "all"):
                scores[name, row["chunks"], mode].append(pair)
    lines = [f"| set | chunks | questions | {' | '.join(ROWS)} |", "|---|---|---|" + "---|" * 4]
    for name in (*SETS, "all"):
        for count in COUNTS:
            cells = [cell(scores[name, count, mode]) for mode in ROWS]
            questions = len(scores[name, count, "full"])
            lines.append(f"| {name} | {count} | {questions} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(pairs: list[tuple[float, float]]) -> str:
    """EM with half the width of its interval, and F1."""
    if not pairs:
        return "-"
    values = torch.tensor(pairs)
    draws = torch.randint(len(pairs), (1000, len(pairs)), generator=torch.manual_seed(0))
    means = values[draws, 0].mean(1)
    half = (means.quantile(0.975) - means.quantile(0.025)) / 2
    em, f1 = values.mean(0)
    return f"{100 * em:.1f} ± {100 * half:.1f} / {100 * f1:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--questions", type=int, default=200, help="of each set")
    parser.add_argument("--max-new-tokens", type=int, default=24)
    parser.add_argument("--shard", default="0/1", help="run only every n-th question: i/n")
    parser.add_argument("--out", type=Path, default=Path("encode-behind.jsonl"))
    parser.add_argument("--table-only", action="store_true")
    args = parser.parse_args()
    if not args.table_only:
        run(args)
    print(table(args.out))


if __name__ == "__main__":
    main()
