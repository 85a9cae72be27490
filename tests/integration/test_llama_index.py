"""LlamaIndex's models as LlamaIndex calls them, answered by a real worker; it ships no tests of its own."""

import asyncio
import json

import numpy as np
import pytest
from llama_index.core import Document, VectorStoreIndex
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.base.llms.types import ChatMessage, ImageBlock, MessageRole
from llama_index.core.tools import FunctionTool
from pydantic import BaseModel, ConfigDict, Field

from penstock import Client, InvalidOptionError, InvalidTextError
from penstock.adapters.llama_index import PenstockEmbedding, PenstockLLM
from tests.deployment import Server, WorkerProcess


@pytest.fixture
def embedding(server: Server, worker: WorkerProcess) -> PenstockEmbedding:
    """The bundled embedding model."""
    return PenstockEmbedding(model_name="minilm", url=server.broker_url)


@pytest.fixture
def llm(server: Server, worker: WorkerProcess) -> PenstockLLM:
    """The bundled chat model."""
    return PenstockLLM(model="chat", url=server.broker_url)


def test_embeddings_are_the_clients(client: Client, embedding: PenstockEmbedding) -> None:
    """Texts and queries get the vectors that `embed` gives, in order, from both twins."""
    texts = [f"text {i}" for i in range(300)]

    found = embedding.get_text_embedding_batch(texts)
    awaited = asyncio.run(embedding.aget_text_embedding_batch(texts))
    queries = [embedding.get_query_embedding("text 7"), asyncio.run(embedding.aget_query_embedding("text 7"))]

    expected = client.embed(texts, model="minilm")
    assert np.allclose([found, awaited], expected, atol=1e-2)
    assert np.allclose(queries, expected[7], atol=1e-2)
    assert np.allclose(embedding.get_text_embedding("text 7"), expected[7], atol=1e-2)


def test_an_index_finds_what_is_near(embedding: PenstockEmbedding, llm: PenstockLLM) -> None:
    """An index is built and asked with nothing but these two."""
    facts = ["The pump is red.", "The gate is blue.", "Ada has the key."]
    index = VectorStoreIndex(embed_model=embedding, nodes=[])
    for fact in facts:
        index.insert_nodes([Document(text=fact)])

    found = index.as_retriever(similarity_top_k=1).retrieve("What colour is the gate?")

    assert [each.node.get_content() for each in found] == ["The gate is blue."]
    assert "blue" in llm.complete(f"{found[0].node.get_content()} What colour is the gate?").text


def test_chat_takes_the_whole_conversation(llm: PenstockLLM) -> None:
    """System message and earlier turns show in the answer of all four ways to chat."""
    messages = [
        ChatMessage(role="system", content="Answer in upper case."),
        ChatMessage(role="user", content="My name is Ada."),
        ChatMessage(role="assistant", content="HELLO, ADA."),
        ChatMessage(role="user", content="What is my name?"),
    ]

    async def read() -> list[str | None]:
        pieces = [piece async for piece in await llm.astream_chat(messages)]
        return [(await llm.achat(messages)).message.content, pieces[-1].message.content]

    pieces = list(llm.stream_chat(messages))
    answers = [llm.chat(messages).message.content, pieces[-1].message.content, *asyncio.run(read())]

    assert answers[0] is not None
    assert "ADA" in answers[0]
    assert answers == [answers[0]] * 4
    assert "".join(piece.delta or "" for piece in pieces) == answers[0]
    assert pieces[-1].additional_kwargs["finish_reason"] == "stop"


def test_complete_is_the_same_four_ways(llm: PenstockLLM) -> None:
    """A prompt is answered with text and counts of tokens."""
    prompt = "What is 17 + 26?"

    async def read() -> list[str]:
        pieces = [piece async for piece in await llm.astream_complete(prompt)]
        return [(await llm.acomplete(prompt)).text, pieces[-1].text]

    answer = llm.complete(prompt)
    texts = [answer.text, list(llm.stream_complete(prompt))[-1].text, *asyncio.run(read())]

    assert "43" in answer.text
    assert texts == [answer.text] * 4
    assert answer.additional_kwargs["total_tokens"] > answer.additional_kwargs["completion_tokens"] > 0


def test_options_go_through(llm: PenstockLLM) -> None:
    """A call's options win, formats hold, and an unknown option is an error."""
    wanted = {"type": "json_schema", "json_schema": {"schema": {"enum": ["open", "closed"]}}}

    assert llm.complete("What is 17 + 26?", max_tokens=2).additional_kwargs["finish_reason"] == "length"
    assert json.loads(llm.complete("The gate?", response_format=wanted).text) in ("open", "closed")
    with pytest.raises(InvalidOptionError, match="colour"):
        llm.complete("?", colour="blue")
    with pytest.raises(InvalidOptionError, match="a tool's turn answers a call"):
        llm.chat([ChatMessage(role=MessageRole.TOOL, content="43")])
    with pytest.raises(InvalidTextError, match="ImageBlock"):
        llm.chat([ChatMessage(role="user", blocks=[ImageBlock(url="https://example.org/a.png")])])


def test_metadata_is_what_workers_announced(llm: PenstockLLM) -> None:
    """LlamaIndex cuts its prompts by the model's own window; the URL is told to nobody."""
    assert (llm.metadata.context_window, llm.metadata.is_chat_model) == (1024, True)
    assert llm.metadata.model_name == "chat"
    assert llm.url not in repr(llm) + json.dumps(llm.to_payload(), default=str)


class Stop(BaseModel):
    """A place on the way."""

    model_config = ConfigDict(extra="forbid")

    place: str = Field(max_length=8)


def plan(days: int, stop: Stop) -> str:
    """Plan a trip."""
    return f"{days} days in {stop}"


def test_a_required_call_follows_its_schema(server: Server, caller: str) -> None:
    """Tools are called with what they take: directly, and by LlamaIndex itself."""
    tool = FunctionTool.from_defaults(plan)
    llm = PenstockLLM(model=caller, url=server.broker_url, is_function_calling_model=True)

    answer = llm.chat_with_tools([tool], "Go to Ulm.", tool_required=True)
    *_, last = llm.stream_chat_with_tools([tool], "Go to Ulm.", tool_required=True)
    done = llm.predict_and_call([tool], "Go to Ulm.", tool_required=True)

    (call,) = llm.get_tool_calls_from_response(answer)
    assert call.tool_name == "plan"
    assert isinstance(call.tool_kwargs["days"], int)
    assert Stop(**call.tool_kwargs["stop"])
    assert llm.get_tool_calls_from_response(last)[0].tool_kwargs == call.tool_kwargs
    assert str(done).startswith(f"{call.tool_kwargs['days']} days in")


def test_calls_come_back_and_go_on(server: Server, caller: str) -> None:
    """An agent's turn: the call, its result, the answer; the call goes back into the prompt but once."""
    tool = FunctionTool.from_defaults(plan)
    llm = PenstockLLM(model=caller, url=server.broker_url)
    call = r'<tool_call>\{"name": "plan", "arguments": \{"days": [1-9], "stop": "Ulm"\}\}</tool_call>'
    asked = ChatMessage(role="user", content="Go.")

    answer = llm.chat_with_tools(
        [tool],
        chat_history=[asked],
        response_format={"type": "regex", "pattern": f"({call}){{2}}"},
        max_tokens=200,
    )

    assert len(answer.raw.tool_calls) == 2  # of which LlamaIndex, unless asked, wants one
    (called,) = llm.get_tool_calls_from_response(answer)
    assert called.tool_kwargs["stop"] == "Ulm"
    told = ChatMessage(role="tool", content="Done.", additional_kwargs={"tool_call_id": called.tool_id})
    bare = ChatMessage(role="assistant", blocks=[answer.message.blocks[-1]])
    n_tokens = [
        llm.chat([asked, before, told]).additional_kwargs["prompt_tokens"]
        for before in (answer.message, bare)
    ]
    assert n_tokens[0] == n_tokens[1]
    with pytest.raises(ValueError, match="called no tool"):
        llm.get_tool_calls_from_response(llm.chat([asked]))


# LlamaIndex's workflows read every attribute of the agent.
@pytest.mark.filterwarnings("ignore::pydantic.PydanticDeprecatedSince20")
@pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince211")
def test_an_agent_calls_and_answers(server: Server, caller: str) -> None:
    """LlamaIndex's own agent: it streams, has to call first, and goes on with what the tool said."""
    called: list[int] = []

    def add(a: int, b: int) -> str:
        """Add."""
        called.append(a + b)
        return "What is 17 + 26?"

    llm = PenstockLLM(model=caller, url=server.broker_url, is_function_calling_model=True)
    agent = FunctionAgent(tools=[add], llm=llm, initial_tool_choice="add")

    async def ask() -> str:
        return str(await agent.run("What is 17 + 26?"))

    assert "43" in asyncio.run(ask())
    assert len(called) == 1
