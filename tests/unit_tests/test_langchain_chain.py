"""The documents chain: in the place of LangChain's own, with the answers of the engine."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import tiny
from langchain_classic.chains import create_retrieval_chain
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.language_models import FakeListChatModel
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.output_parsers import CommaSeparatedListOutputParser
from langchain_core.prompts import (
    ChatPromptTemplate,
    HumanMessagePromptTemplate,
    MessagesPlaceholder,
    PromptTemplate,
)
from langchain_core.runnables import RunnableLambda, RunnablePassthrough
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_kvlink import ChatKVLink, KVLinkVectorStore, create_kvlink_documents_chain

from kvlink_rag import CHUNKS, InputError, KVLinkEngine

TEXTS = ["The sky is green.", "Grass is blue."]
DOCUMENTS = [Document(text, metadata={"page": n}) for n, text in enumerate(TEXTS)]
INPUTS = {"input": "Colour?", "context": DOCUMENTS}
HISTORY = [HumanMessage("Hello!"), AIMessage("Hi.")]
SAID = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hi."}]


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


@pytest.fixture
def engine() -> KVLinkEngine:
    return tiny.engine(prompt=None)


@pytest.fixture
def chat(engine: KVLinkEngine) -> ChatKVLink:
    return ChatKVLink(engine=engine, max_tokens=10)


def all_ways(chain: Any, inputs: Any) -> list[Any]:
    async def gathered() -> list[Any]:
        return [piece async for piece in chain.astream(inputs)]

    pieces, later = list(chain.stream(inputs)), asyncio.run(gathered())
    assert pieces == later
    assert len(pieces) > 3
    return [chain.invoke(inputs), asyncio.run(chain.ainvoke(inputs)), "".join(pieces)]


def check(chain: Any, inputs: Any, engine: KVLinkEngine, question: Any, **options: Any) -> None:
    expected = engine.answer(question, TEXTS, max_new_tokens=10, **options).text
    assert all_ways(chain, inputs) == [expected] * 3


class TestWithoutAPrompt:
    def test_it_is_the_answer_of_the_engine(self, engine: KVLinkEngine, chat: ChatKVLink) -> None:
        check(create_kvlink_documents_chain(chat), INPUTS, engine, "Colour?")

    def test_behind_the_conversation_so_far(self, engine: KVLinkEngine, chat: ChatKVLink) -> None:
        chain = create_kvlink_documents_chain(chat)
        for history in (HISTORY, [("human", "Hello!"), ("ai", "Hi.")]):
            inputs = {**INPUTS, "chat_history": history}
            check(chain, inputs, engine, [*SAID, user("Colour?")])
        check(chain, {**INPUTS, "chat_history": []}, engine, "Colour?")

    def test_without_documents(self, engine: KVLinkEngine, chat: ChatKVLink) -> None:
        found = create_kvlink_documents_chain(chat).invoke({"input": "Colour?", "context": []})
        assert found == engine.answer("Colour?", [], max_new_tokens=10).text

    def test_models_that_are_bound_or_configured(
        self, engine: KVLinkEngine, chat: ChatKVLink
    ) -> None:
        for model in (chat.with_retry(), chat.with_config(tags=["a"]), chat.bind(top_p=1.0)):
            check(create_kvlink_documents_chain(model), INPUTS, engine, "Colour?")


PROMPTS: dict[str, tuple[Any, list[dict[str, Any]]]] = {
    "system": (
        ChatPromptTemplate.from_messages([("system", "Use:\n{context}"), ("human", "{input}")]),
        [{"role": "system", "content": ["Use:\n", CHUNKS]}, user("Colour?")],
    ),
    "human": (
        ChatPromptTemplate.from_messages([("human", "Q: {input}\n\n{context}\nBe brief.")]),
        [user(["Q: Colour?\n\n", CHUNKS, "\nBe brief."])],
    ),
    "history": (
        ChatPromptTemplate.from_messages(
            [
                ("system", "{context}"),
                MessagesPlaceholder("chat_history", optional=True),
                ("human", "{input}"),
            ]
        ),
        [{"role": "system", "content": [CHUNKS]}, *SAID, user("Colour?")],
    ),
    "blocks": (
        ChatPromptTemplate.from_messages(
            [
                HumanMessagePromptTemplate.from_template(
                    [{"type": "text", "text": "Use {context}"}, {"type": "text", "text": "{input}"}]
                )
            ]
        ),
        [user(["Use ", CHUNKS, "Colour?"])],
    ),
    "text": (
        PromptTemplate.from_template("{context}\n\nQ: {input}"),
        [user([CHUNKS, "\n\nQ: Colour?"])],
    ),
    "jinja": (
        ChatPromptTemplate.from_messages(
            [("human", "{% if input %}{{ context }}{% endif %}{{ input }}")],
            template_format="jinja2",
        ),
        [user([CHUNKS, "Colour?"])],
    ),
}


class TestWithAPrompt:
    @pytest.mark.parametrize("name", PROMPTS)
    def test_the_chunks_stand_where_it_says(
        self, engine: KVLinkEngine, chat: ChatKVLink, name: str
    ) -> None:
        prompt, said = PROMPTS[name]
        chain = create_kvlink_documents_chain(chat, prompt)
        check(chain, {**INPUTS, "chat_history": HISTORY}, engine, said)

    def test_inputs_that_look_like_variables_stay_text(
        self, engine: KVLinkEngine, chat: ChatKVLink
    ) -> None:
        prompt, _ = PROMPTS["system"]
        chain = create_kvlink_documents_chain(chat, prompt)
        said = [{"role": "system", "content": ["Use:\n", CHUNKS]}, user("{context}?")]
        check(chain, {**INPUTS, "input": "{context}?"}, engine, said)

    def test_the_prompt_must_take_the_documents_once(self, chat: ChatKVLink) -> None:
        without = ChatPromptTemplate.from_messages([("human", "{input}")])
        with pytest.raises(InputError, match="must have 'context'"):
            create_kvlink_documents_chain(chat, without)
        twice = ChatPromptTemplate.from_messages([("system", "{context}"), ("human", "{context}")])
        with pytest.raises(InputError, match=r"shows \{context\} 2 times"):
            create_kvlink_documents_chain(chat, twice).invoke(INPUTS)

    def test_nothing_is_shown_without_documents(
        self, engine: KVLinkEngine, chat: ChatKVLink
    ) -> None:
        prompt, said = PROMPTS["system"]
        found = create_kvlink_documents_chain(chat, prompt).invoke({**INPUTS, "context": []})
        assert found == engine.answer(said, [], max_new_tokens=10).text


class TestOptions:
    def test_a_document_prompt_of_the_chain_or_of_the_model(self, engine: KVLinkEngine) -> None:
        showing = PromptTemplate.from_template("{page}: {page_content}")
        texts = [f"{n}: {text}" for n, text in enumerate(TEXTS)]
        expected = engine.answer("Colour?", texts, max_new_tokens=10).text
        plain = ChatKVLink(engine=engine, max_tokens=10)
        chat = ChatKVLink(engine=engine, max_tokens=10, document_prompt=showing)
        prompt, said = PROMPTS["system"]
        for chain in (
            create_kvlink_documents_chain(plain, document_prompt=showing),
            create_kvlink_documents_chain(chat),
        ):
            assert chain.invoke(INPUTS) == expected
        expected = engine.answer(said, texts, max_new_tokens=10).text
        assert create_kvlink_documents_chain(chat, prompt).invoke(INPUTS) == expected

    def test_another_variable_and_another_parser(
        self, engine: KVLinkEngine, chat: ChatKVLink
    ) -> None:
        chain = create_kvlink_documents_chain(
            chat, document_variable_name="found", output_parser=CommaSeparatedListOutputParser()
        )
        found = chain.invoke({"input": "Colour?", "found": DOCUMENTS})
        assert isinstance(found, list)
        expected = engine.answer("Colour?", TEXTS, max_new_tokens=10).text
        assert "".join(found).replace(" ", "") == expected.replace(",", "").replace(" ", "")

    @pytest.mark.parametrize(
        ("inputs", "problem"),
        [
            ({"input": "Colour?"}, "no 'context' among the inputs"),
            ({"context": DOCUMENTS}, "'input' is None"),
            ({"context": DOCUMENTS, "input": " "}, "'input' is ' '"),
            ({"context": DOCUMENTS, "input": HISTORY}, "it must be the question"),
            ({"context": "formatted", "input": "Colour?"}, "pass a list of documents"),
            ({**INPUTS, "chat_history": "Hello!"}, "'chat_history' is a text"),
            ("Colour?", "no 'context' among the inputs 'Colour\\?'"),
        ],
    )
    def test_what_is_missing_is_named(
        self, chat: ChatKVLink, inputs: dict[str, Any], problem: str
    ) -> None:
        with pytest.raises(InputError, match=problem):
            create_kvlink_documents_chain(chat).invoke(inputs)

    def test_another_model_would_not_show_the_documents(self) -> None:
        model = FakeListChatModel(responses=["x"])
        for other in (model, model.bind(stop=["x"]), model.with_retry().with_config(tags=["a"])):
            with pytest.raises(InputError, match="FakeListChatModel, which takes no documents"):
                create_kvlink_documents_chain(other)


def answers(retriever: Any, chain: Any) -> Any:
    return {"context": retriever, "input": RunnablePassthrough()} | chain


def test_its_schemas_can_be_shown(chat: ChatKVLink) -> None:
    chain = create_kvlink_documents_chain(chat)
    assert chain.get_input_jsonschema()["type"] == "object"
    assert chain.get_output_jsonschema()["title"]


class TestInPipelines:
    @pytest.fixture
    def retriever(self, engine: KVLinkEngine) -> Any:
        vectors = InMemoryVectorStore(DeterministicFakeEmbedding(size=8))
        store = KVLinkVectorStore(vectors, engine)
        store.add_documents(DOCUMENTS)
        return store.as_retriever(search_kwargs={"k": 2})

    def test_expression_language(
        self, engine: KVLinkEngine, chat: ChatKVLink, retriever: Any
    ) -> None:
        chain = answers(retriever, create_kvlink_documents_chain(chat))
        found = [document.page_content for document in retriever.invoke("Colour?")]
        answer = engine.answer("Colour?", found, max_new_tokens=10)
        assert (answer.report.hits, answer.report.misses) == (2, 0)
        assert all_ways(chain, "Colour?") == [answer.text] * 3

    def test_a_reranker_in_between(
        self, engine: KVLinkEngine, chat: ChatKVLink, retriever: Any
    ) -> None:
        reranked = retriever | RunnableLambda(lambda documents: documents[::-1])
        found = [document.page_content for document in reranked.invoke("Colour?")]
        before = engine.store.stat()
        chain = answers(reranked, create_kvlink_documents_chain(chat))
        assert chain.invoke("Colour?") == engine.answer("Colour?", found, max_new_tokens=10).text
        assert engine.store.stat().entries == before.entries + 1  # the prefix
        report = engine.answer("Colour?", found, max_new_tokens=1).report
        assert (report.hits, report.misses) == (2, 0)

    @pytest.mark.parametrize("name", [None, "history"])
    def test_in_the_retrieval_chain(
        self, engine: KVLinkEngine, chat: ChatKVLink, retriever: Any, name: str | None
    ) -> None:
        prompt = PROMPTS[name][0] if name else None
        stock = create_retrieval_chain(
            retriever,
            create_stuff_documents_chain(FakeListChatModel(responses=["x"]), PROMPTS["history"][0]),
        ).invoke({"input": "Colour?"})
        chain = create_retrieval_chain(retriever, create_kvlink_documents_chain(chat, prompt))
        found = chain.invoke({"input": "Colour?"})
        assert found.keys() == stock.keys()
        assert found["context"] == stock["context"]
        texts = [document.page_content for document in found["context"]]
        said: Any = "Colour?"
        if prompt:
            said = [{"role": "system", "content": [CHUNKS]}, user("Colour?")]
        assert found["answer"] == engine.answer(said, texts, max_new_tokens=10).text
        streamed = [p["answer"] for p in chain.stream({"input": "Colour?"}) if "answer" in p]
        assert len(streamed) > 3
        assert "".join(streamed) == found["answer"]
        assert asyncio.run(chain.ainvoke({"input": "Colour?"})) == found
