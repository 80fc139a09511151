"""Pipelines of stock parts, the three lines that change in them, and answers in a new process."""

from __future__ import annotations

import difflib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvlink_rag import CHUNKS, KVLinkEngine

pytestmark = pytest.mark.model

IMPORTS = """\
from langchain_classic.chains import create_retrieval_chain
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_community.vectorstores import FAISS
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.language_models import FakeListChatModel
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnablePassthrough
from langchain_kvlink import ChatKVLink, KVLinkVectorStore, create_kvlink_documents_chain
"""
STOCK = """\
documents = [
    Document("The Eiffel Tower was built from 1887 to 1889.", metadata={"page": 1}),
    Document("The Golden Gate Bridge opened in 1937.", metadata={"page": 2}),
    Document("The Great Pyramid was built for Khufu.", metadata={"page": 3}),
]
prompt = ChatPromptTemplate.from_messages(
    [("system", "Answer from these documents.\\n\\n{context}"), ("human", "{input}")]
)
embeddings = DeterministicFakeEmbedding(size=16)

llm = FakeListChatModel(responses=["From 1887 to 1889."])
vectors = FAISS.from_documents(documents, embeddings)
retriever = vectors.as_retriever(search_kwargs={"k": 2})
"""
EXPRESSION = """\
context = retriever | (lambda found: "\\n\\n".join(d.page_content for d in found))
chain = {"context": context, "input": RunnablePassthrough()} | prompt | llm | StrOutputParser()
answer = chain.invoke("When was the tower built?")
"""
RETRIEVAL = """\
answer_chain = create_stuff_documents_chain(llm, prompt)
chain = create_retrieval_chain(retriever, answer_chain)
answer = chain.invoke({"input": "When was the tower built?"})["answer"]
"""
CHANGES = {
    'llm = FakeListChatModel(responses=["From 1887 to 1889."])': (
        'llm = ChatKVLink(model="HuggingFaceTB/SmolLM2-135M-Instruct", store=folder, max_tokens=12)'
    ),
    "vectors = FAISS.from_documents(documents, embeddings)": (
        "vectors = KVLinkVectorStore.from_documents(\n"
        "    documents, embeddings, engine=llm.engine, vectorstore_class=FAISS\n"
        ")"
    ),
    'chain = {"context": context, "input": RunnablePassthrough()} | prompt | llm | '
    "StrOutputParser()": (
        'chain = {"context": retriever, "input": RunnablePassthrough()} | '
        "create_kvlink_documents_chain(llm, prompt)"
    ),
    "answer_chain = create_stuff_documents_chain(llm, prompt)": (
        "answer_chain = create_kvlink_documents_chain(llm, prompt)"
    ),
}


def run(code: str, folder: Path) -> dict[str, Any]:
    names: dict[str, Any] = {"folder": str(folder)}
    exec(IMPORTS + code, names)
    return names


@pytest.mark.parametrize("pipeline", [EXPRESSION, pytest.param(RETRIEVAL, marks=pytest.mark.slow)])
def test_three_lines_of_a_stock_pipeline_change(pipeline: str, tmp_path: Path) -> None:
    stock = STOCK + pipeline
    assert run(stock, tmp_path)["answer"] == "From 1887 to 1889."
    lines = [CHANGES.get(line, line) for line in stock.splitlines()]
    changed = [line for line in difflib.ndiff(stock.splitlines(), lines) if line[0] == "-"]
    assert len(changed) == 3
    names = run("\n".join(lines), tmp_path)
    engine: KVLinkEngine = names["llm"].engine
    found = [d.page_content for d in names["retriever"].invoke("When was the tower built?")]
    said = [
        {"role": "system", "content": ["Answer from these documents.\n\n", CHUNKS]},
        {"role": "user", "content": "When was the tower built?"},
    ]
    expected = engine.answer(said, found, max_new_tokens=12)
    assert (expected.report.hits, expected.report.misses) == (2, 0)
    assert names["answer"] == expected.text
    assert engine.store.stat().documents == 3


INDEX = """
vectors = KVLinkVectorStore.from_documents(
    documents, embeddings, engine=ChatKVLink(model=model, store=folder + "/kv").engine,
    vectorstore_class=FAISS,
)
vectors.vectorstore.save_local(folder + "/faiss")
"""
ASK = """
llm = ChatKVLink(model=model, store=folder + "/kv", max_tokens=12)
loaded = FAISS.load_local(folder + "/faiss", embeddings, allow_dangerous_deserialization=True)
vectors = KVLinkVectorStore(loaded, llm.engine)
found = vectors.similarity_search("When was the tower built?", k=3)
message = llm.invoke("When was the tower built?", documents=found)
report = message.response_metadata["report"]
print([report["hits"], report["misses"], message.usage_metadata["output_tokens"] > 1])
print(message.content == llm.engine.answer(
    "When was the tower built?", [d.page_content for d in found], max_new_tokens=12
).text)
"""


@pytest.mark.slow
def test_a_new_process_answers_without_a_miss(tmp_path: Path) -> None:
    given = f"model = 'HuggingFaceTB/SmolLM2-135M-Instruct'\nfolder = {str(tmp_path)!r}\n"
    setup = STOCK[: STOCK.index("\nllm = ")]
    printed = [
        subprocess.run(
            [sys.executable, "-c", "\n".join([IMPORTS, given, setup, code])],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
        for code in (INDEX, ASK)
    ]
    assert printed == [[], ["[3, 0, True]", "True"]]
