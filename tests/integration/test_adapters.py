"""What all adapters do alike: wait for room in a queue, and say whose jobs they send."""

import asyncio
import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import redis

from penstock import Client, PenstockError, WaitPolicy
from penstock.adapters.langchain import ChatPenstock, PenstockEmbeddings
from penstock.adapters.lightrag import LightRAGModels
from penstock.adapters.llama_index import PenstockEmbedding, PenstockLLM
from penstock.bucket import RETRIES
from penstock.errors import QueueDelayError
from penstock.keys import queue_key
from tests.deployment import BUNDLED, Server, WorkerProcess
from tests.eventually import eventually

SUM = "What is 17 + 26?"
LIMITED = BUNDLED.replace("task =", "max_waiting_jobs = 1\ntask =")


def lightrag(url: str, seconds: float, **options: Any) -> LightRAGModels:
    """Make LightRAG's functions with a limit of time."""
    own_s = seconds / 1.8  # of what LightRAG waits, they take so much
    return LightRAGModels(
        url, llm="chat", embedding="minilm", llm_timeout_s=own_s, embedding_timeout_s=own_s, **options
    )


async def listen(models: LightRAGModels) -> str:
    """Read a streamed answer."""
    return "".join([piece async for piece in await models.llm_model_func(SUM, stream=True)])


Call = Callable[..., Any]
CHATS: dict[str, Call] = {
    "lightrag": lambda *a, **k: asyncio.run(lightrag(*a, **k).llm_model_func(SUM)),
    "lightrag stream": lambda *a, **k: asyncio.run(listen(lightrag(*a, **k))),
    "langchain": lambda url, s, **k: ChatPenstock(model="chat", url=url, timeout=s, **k).invoke(SUM).text,
    "langchain stream": lambda url, s, **k: "".join(
        str(chunk.text) for chunk in ChatPenstock(model="chat", url=url, timeout=s, **k).stream(SUM)
    ),
    "llama-index": lambda url, s, **k: (
        PenstockLLM(model="chat", url=url, timeout_s=s, **k).complete(SUM).text
    ),
    "llama-index stream": lambda url, s, **k: (
        [*PenstockLLM(model="chat", url=url, timeout_s=s, **k).stream_complete(SUM)][-1].text
    ),
}
EMBEDDINGS: dict[str, Call] = {
    "lightrag": lambda *a, **k: asyncio.run(lightrag(*a, **k).embedding_func([SUM]))[0],
    "langchain": lambda url, s, **k: PenstockEmbeddings("minilm", url=url, timeout=s, **k).embed_query(SUM),
    "langchain documents": lambda url, s, **k: PenstockEmbeddings(
        "minilm", url=url, timeout=s, **k
    ).embed_documents([SUM])[0],
    "llama-index": lambda url, s, **k: PenstockEmbedding(
        model_name="minilm", url=url, timeout_s=s, **k
    ).get_text_embedding(SUM),
}
ALL = [("chat", name, call) for name, call in CHATS.items()]
ALL += [("minilm", name, call) for name, call in EMBEDDINGS.items()]


@pytest.fixture
def full(own: Server, client: Client) -> Iterator[Server]:
    """A server that knows the models, each with a queue of one job that is full, and nobody who works."""
    with redis.Redis.from_url(own.broker_url) as broker:
        for name, info in client.models().items():
            limited = json.loads(info.to_json()) | {"max_waiting_jobs": 1}
            broker.hset("penstock:models", name, json.dumps(limited))
        broker.set("penstock:results", "/1")
    with Client(own.broker_url) as sender:
        sender.submit_embed(["first"], model="minilm")
        sender.submit_generate(SUM, model="chat")
        yield own


def test_all_wait_for_room(full: Server, tmp_path: Path) -> None:
    """Calls that a full queue refuses are answered when it has emptied, and their frameworks hear nothing."""
    with ThreadPoolExecutor(len(ALL)) as threads, redis.Redis.from_url(full.broker_url) as broker:
        wait = WaitPolicy(attempts=None, base_s=0.2, most_s=1)
        answers = [threads.submit(call, full.broker_url, 100, wait=wait) for _, _, call in ALL]
        eventually(lambda: broker.exists(RETRIES.key), within_s=20)
        assert not any(answer.done() for answer in answers)
        worker = WorkerProcess(tmp_path, full, toml=LIMITED, queues="cpu.minilm,cpu.chat")
        try:
            found = [answer.result(100) for answer in answers]
        finally:
            worker.stop()

    assert ["43" in text for text in found[: len(CHATS)]] == [True] * len(CHATS)
    assert [len(vector) for vector in found[len(CHATS) :]] == [384] * len(EMBEDDINGS)


@pytest.mark.parametrize(("model", "name", "call"), ALL, ids=[f"{a} {b}" for a, b, _ in ALL])
def test_waiting_ends_with_the_calls_time(full: Server, model: str, name: str, call: Call) -> None:
    """Where the queue stays full, the call tells so within its own time."""
    with pytest.raises(PenstockError, match="is full: jobs") as caught:
        call(full.broker_url, 1)
    with pytest.raises(PenstockError, match="is full: jobs"):
        call(full.broker_url, 100, wait=None)

    assert isinstance(caught.value, QueueDelayError) or isinstance(caught.value.__cause__, QueueDelayError)


@pytest.mark.parametrize(("model", "name", "call"), ALL, ids=[f"{a} {b}" for a, b, _ in ALL])
def test_tenants_are_told(full: Server, model: str, name: str, call: Call) -> None:
    """A job lies in its tenant's list, and its message says whose it is."""
    keys = [queue_key(f"cpu.{model}", level, "acme") for level in (0, 3, 6)]
    with ThreadPoolExecutor() as threads, redis.Redis.from_url(full.broker_url) as broker:
        for key in broker.scan_iter(f"cpu.{model}*"):
            broker.delete(key)
        answer: Future[Any] = threads.submit(call, full.broker_url, 2, tenant="acme")
        (raw,) = eventually(lambda: [found for key in keys for found in broker.lrange(key, 0, -1)])
        assert isinstance(answer.exception(30), PenstockError)

    assert json.loads(raw)["headers"]["tenant"] == "acme"
