"""Which prefix should chunks be encoded behind? Answers of one model, side by side.

    python benchmarks/encode_behind.py --questions 200 --out encode-behind.jsonl

For every question the prompt is the same, token for token; only what the chunks' caches were
encoded behind differs (nothing, the bare chat header, the default system prefix), with full
prefill beside them. Questions run one by one, answers are decoded in batches. Results are appended
to the file, so that an interrupted run goes on where it stopped; the table covers all of the file.
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
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kvlink_rag import Chunk, KVLinkEngine
from kvlink_rag.chunk import ChunkKV
from kvlink_rag.common.progress import bar
from kvlink_rag.evaluation.data import Example, data_folder, read_examples
from kvlink_rag.evaluation.metrics import best_subspan_em, token_f1
from kvlink_rag.rope import shift_groups
from kvlink_rag.runners.transformers.context import ContextCache
from kvlink_rag.runners.transformers.encode import Encoder
from kvlink_rag.runners.transformers.forward import run_behind

SETS = ("nq_multidoc10", "hotpotqa", "squad_multidoc")
MODES = ("alone", "header", "system")
ROWS = ("full", *MODES)
COUNTS = (5, 10)
BATCH = 6
"""Questions decoded together: eight rows each."""


@dataclass
class Context:
    """Keys and values ``[layers, kv_heads, tokens, head_dim]`` up to the question's tokens."""

    keys: torch.Tensor
    values: torch.Tensor
    question: list[int]


class Comparison:
    """Answers of several prompts in one batch, all ways of each side by side."""

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

    def contexts(
        self, example: Example, chunks: list[Chunk], caches: dict[str, list[ChunkKV]]
    ) -> list[Context]:
        """The prompt's cache up to the question, one for each of :data:`ROWS`."""
        full = self.engine.prefill(example.question, chunks, strategy="full")
        question = full.token_ids[full.segments[-1].start :]
        length = len(full.token_ids) - len(question)
        starts = [segment.start for segment in full.segments[1:-1]]
        contexts = []
        for mode in ROWS:
            keys = full.cache.key_buffer[:, 0, :, :length].clone()
            values = full.cache.value_buffer[:, 0, :, :length].clone()
            for record, start in zip(caches.get(mode, []), starts, strict=False):
                stop = start + len(record.token_ids)
                shift_groups(
                    record.keys,
                    torch.tensor([start - record.position]),
                    self.engine.architecture.groups,
                    out=keys[:, :, start:stop],
                )
                values[:, :, start:stop] = record.values
            contexts.append(Context(keys, values, question))
        return contexts

    @torch.inference_mode()
    def answers(self, contexts: list[Context]) -> list[str]:
        """Greedy answers, all in one batch: questions row by row, then every token for all rows.

        Shorter contexts lie at the end of their row; what is before them is masked.
        """
        lengths = [c.keys.shape[2] + len(c.question) for c in contexts]
        longest = max(lengths)
        cache = self.encoder.new_cache(longest + self.max_new_tokens, batch=len(contexts))
        cache.key_buffer.zero_()
        cache.value_buffer.zero_()
        first = []
        for row, (context, length) in enumerate(zip(contexts, lengths, strict=True)):
            single = self.encoder.new_cache(length)
            single.key_buffer[:, 0, :, : context.keys.shape[2]] = context.keys
            single.value_buffer[:, 0, :, : context.keys.shape[2]] = context.values
            single.set_length(context.keys.shape[2])
            logits = run_behind(self.engine.model, single, context.question)
            first.append(int(logits.argmax()))
            cache.key_buffer[:, row, :, longest - length : longest] = single.key_buffer[:, 0]
            cache.value_buffer[:, row, :, longest - length : longest] = single.value_buffer[:, 0]
        cache.set_length(longest)
        missing = torch.tensor([longest - length for length in lengths])[:, None]
        return [self._text(row) for row in self._decode(cache, first, missing)]

    def _decode(
        self, cache: ContextCache, first: list[int], missing: torch.Tensor
    ) -> list[list[int]]:
        rows = [[token] for token in first]
        while len(rows[0]) < self.max_new_tokens:
            start = cache.get_seq_length()
            logits = self.engine.model(
                input_ids=torch.tensor([[row[-1]] for row in rows]),
                position_ids=start - missing,
                attention_mask=(torch.arange(start + 1)[None] >= missing).long(),
                past_key_values=cache,
            ).logits[:, -1]
            for row, token in zip(rows, logits.argmax(-1).tolist(), strict=True):
                row.append(token)
            if all(self.engine.tokenizer.eos_token_id in row for row in rows):
                break
        return rows

    def _text(self, row: list[int]) -> str:
        end = self.engine.tokenizer.eos_token_id
        row = row[: row.index(end)] if end in row else row
        return self.engine.tokenizer.decode(row, skip_special_tokens=True).strip()


def attend(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Grouped-query attention of short queries as two matrix products.

    torch's CPU kernel takes ten times as long for one bfloat16 query over a long context; longer
    queries are left to it. Shapes: query ``[rows, heads, queries, dim]``, key and value
    ``[rows, kv_heads, tokens, dim]``.
    """
    rows, heads, queries, dim = query.shape
    if queries > 64 or (queries > 1 and attention_mask is None):  # None: causal
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    kv_heads, tokens = key.shape[1], key.shape[2]
    capacity = key.stride(1) // dim
    if attention_mask is not None and rows > 1:
        # All of the cache's buffer lies in one piece, its filled part does not: products over the
        # whole of it, with the rest masked, are several times faster.
        shape = (rows, kv_heads, capacity, dim)
        key = key.as_strided(shape, key.stride(), key.storage_offset())
        value = value.as_strided(shape, value.stride(), value.storage_offset())
        attention_mask = F.pad(attention_mask, (0, capacity - tokens), value=False)
    folded = (query * scaling).reshape(rows * kv_heads, -1, dim)
    scores = torch.bmm(folded, key.flatten(0, 1).transpose(1, 2))
    if attention_mask is not None:
        scores = scores.view(rows, heads, queries, -1).masked_fill(
            ~attention_mask, torch.finfo(scores.dtype).min
        )
    weights = scores.softmax(-1).view(rows * kv_heads, heads // kv_heads * queries, -1)
    mixed = torch.bmm(weights, value.flatten(0, 1)).view(rows, heads, queries, dim)
    return mixed.transpose(1, 2).contiguous(), None


def load_engine(model: str) -> KVLinkEngine:
    """The engine, with the attention above."""
    AttentionInterface.register("kvlink_folded", attend)
    AttentionMaskInterface.register("kvlink_folded", sdpa_mask)
    engine = KVLinkEngine.from_pretrained(model)
    engine.model.set_attn_implementation("kvlink_folded")
    return engine


def run(args: argparse.Namespace) -> None:
    """Answer what the file does not hold yet."""
    done = {(r["id"], r["chunks"]) for r in read_rows(args.out)}
    comparison = Comparison(load_engine(args.model), args.max_new_tokens)
    todo = [e for e in interleave(args.questions) if any((e[1].id, c) not in done for c in COUNTS)]
    shard, shards = map(int, args.shard.split("/"))
    todo = todo[shard::shards]
    with args.out.open("a", encoding="utf-8") as out, bar("Questions", len(todo)) as show:
        for start in range(0, len(todo), BATCH):
            show(start)
            rows, contexts = [], []
            for name, example in todo[start : start + BATCH]:
                all_chunks = example.with_chunks(max(COUNTS), random.Random(example.id))
                caches = comparison.caches(all_chunks)
                for count in COUNTS:
                    chunks = example.with_chunks(count, random.Random(example.id))
                    places = [all_chunks.index(chunk) for chunk in chunks]
                    its = {mode: [caches[mode][place] for place in places] for mode in MODES}
                    contexts += comparison.contexts(example, chunks, its)
                    rows.append({"set": name, "id": example.id, "chunks": count})
                    rows[-1]["gold"] = list(example.answers)
            answers = iter(comparison.answers(contexts))
            for row in rows:
                row["answers"] = {mode: next(answers) for mode in ROWS}
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
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
    parser.add_argument("--max-new-tokens", type=int, default=20)
    parser.add_argument("--shard", default="0/1", help="run only every n-th question: i/n")
    parser.add_argument("--out", type=Path, default=Path("encode-behind.jsonl"))
    parser.add_argument("--table-only", action="store_true")
    args = parser.parse_args()
    if not args.table_only:
        run(args)
    print(table(args.out))


if __name__ == "__main__":
    main()
