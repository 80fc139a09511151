"""A whole answer by a LangChain pipeline: as it was, and with `kvlink`'s model and chain in it.

    pip install langchain-huggingface
    python benchmarks/whole_answer.py --out benchmarks/results/whole_answer.json

The stock pipeline is `create_stuff_documents_chain` over `ChatHuggingFace` over transformers'
`text-generation`; both run the same model and produce the same number of tokens, greedily. In turn,
in one process; the documents come in a new order each time.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_core.documents import Document
from langchain_core.prompts import ChatPromptTemplate
from langchain_huggingface import ChatHuggingFace, HuggingFacePipeline
from langchain_kvlink import ChatKVLink, create_kvlink_documents_chain

from kvlink_rag.bench.corpus import QUESTION, corpus_ids, cut_chunk
from kvlink_rag.bench.series import Series, machine
from kvlink_rag.common.corpus import corpus_files
from kvlink_rag.common.progress import bar
from kvlink_rag.runners.transformers.models import DEFAULT_MODEL, resolve

SHAPES = ((8, 170), (10, 500))
"""Documents, and tokens of each."""
TOKENS = 60
PROMPT = ChatPromptTemplate.from_messages(
    [("system", "Answer from these documents:\n\n{context}"), ("user", "{input}")]
)


def stock() -> Any:
    """The chain as people write it, over a model that transformers runs."""
    folder = resolve(DEFAULT_MODEL)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    pipeline = transformers.pipeline(
        "text-generation", model=folder, tokenizer=tokenizer, return_full_text=False,
        max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False,
    )  # fmt: skip
    llm = ChatHuggingFace(llm=HuggingFacePipeline(pipeline=pipeline), tokenizer=tokenizer)
    return create_stuff_documents_chain(llm, PROMPT)


def measure(
    chains: dict[str, Callable[[list[Document]], Any]], documents: list[Document], repeats: int
) -> dict[str, Series]:
    """Seconds of whole answers, after one round that is not counted."""
    rng, series = random.Random(0), {name: Series() for name in chains}
    with bar("Answering", repeats + 1) as show:
        for turn in range(repeats + 1):
            for name, chain in chains.items():
                order = rng.sample(documents, len(documents))
                start = time.perf_counter()
                chain(order)
                if turn:
                    series[name].values.append(time.perf_counter() - start)
            show(turn + 1)
    return series


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        llm = ChatKVLink(model=DEFAULT_MODEL, store=folder, max_new_tokens=TOKENS)
        engine = llm.engine
        engine.stop_ids = frozenset()  # as many tokens as the other
        ours = create_kvlink_documents_chain(llm, PROMPT)
        quick = create_kvlink_documents_chain(llm.bind(strategy="reuse"), PROMPT)
        theirs = stock()
        ids = corpus_ids(engine, [file.read_text(encoding="utf-8") for file in corpus_files()])
        for count, tokens in SHAPES:
            rng = random.Random(tokens)
            chunks = [cut_chunk(engine, ids, tokens, rng) for _ in range(count)]
            documents = [Document(chunk.text) for chunk in chunks]
            chains = {
                name: lambda its, chain=chain: chain.invoke({"context": its, "input": QUESTION})
                for name, chain in (("stock", theirs), ("auto", ours), ("reuse", quick))
            }
            series = measure(chains, documents, given.repeats)
            print(f"\n{count} documents of {tokens} tokens, answers of {TOKENS} tokens")
            for name, each in series.items():
                share = each.median / series["stock"].median
                print(
                    f"{name:6} {each.median:6.2f} s ({min(each.values):.2f}-"
                    f"{max(each.values):.2f}), {share:.2f} of stock"
                )
            found[f"{count}x{tokens}"] = {name: each.values for name, each in series.items()}
        told = {"machine": machine(engine), "tokens": TOKENS, "seconds": found}
    if given.out:
        given.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
