"""What becomes of a job when its caller's time is over, through a real worker and jobs of many seconds."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import redis
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
)

from penstock import AsyncClient, Client, JobState, PenstockError, ResultTimeoutError
from penstock.adapters.langchain import ChatPenstock, PenstockEmbeddings
from penstock.adapters.lightrag import CallTimeoutError, LightRAGModels
from penstock.adapters.llama_index import PenstockLLM
from penstock.keys import record_key
from penstock_workers.bundled import bundled_folder
from penstock_workers.command.local_redis import free_port
from tests.deployment import Server, WorkerProcess
from tests.eventually import eventually
from tests.models.test_generation import SIZES, make_folder

SHORT_S = 0.5
PROMPT = "Tell me all."
TEXTS = ["word " * 250] * 500
TOML = """
[models.reader]
task = "embed"
source = "bundled:minilm"
engine = "torch"
max_texts = 500
[models.judge]
task = "rerank"
source = "{judge}"
max_texts = 500
[models.talker]
task = "generate"
source = "{talker}"
max_batch_size = 1
generation = {{ max_new_tokens = 4000 }}
"""


def make_judge(folder: Path) -> Path:
    """Write a cross-encoder of random weights, as slow as a real one."""
    tokenizer = AutoTokenizer.from_pretrained(bundled_folder("minilm"))
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=384, num_hidden_layers=4, num_labels=1)
    BertForSequenceClassification(config).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_talker(folder: Path) -> Path:
    """Write a generation model of random weights that never ends an answer by itself."""
    make_folder(folder, LlamaConfig(**SIZES | {"hidden_size": 256, "max_position_embeddings": 8192}))
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight[1] = 0.0  # its end token
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a worker that serves a model for each task."""
    folder = tmp_path_factory.mktemp("limits")
    toml = TOML.format(judge=make_judge(folder / "judge"), talker=make_talker(folder / "talker"))
    with Server(free_port()).running() as server:
        worker = WorkerProcess(folder, server, toml=toml, queues="cpu.reader,cpu.judge,cpu.talker")
        try:
            worker.wait_until_ready()
            yield server
        finally:
            worker.stop()


@pytest.fixture
def results(served: Server) -> Iterator[redis.Redis]:
    """A connection to an empty result store."""
    with redis.Redis.from_url(served.results_url) as connection:
        connection.flushdb()
        yield connection


def records(results: redis.Redis) -> set[bytes | None]:
    """Return what is recorded of all jobs, each kind once."""
    return set(results.mget([*results.scan_iter(record_key("*"))] or ["none"]))


def n_held(served: Server) -> int:
    """Count the jobs that the worker holds."""
    with redis.Redis.from_url(served.broker_url) as broker:
        return int(broker.hlen("unacked"))


BLOCKING: dict[str, Callable[[Client], object]] = {
    "embed": lambda client: client.embed(TEXTS, model="reader", timeout_s=SHORT_S),
    "embed_many": lambda client: [*client.embed_many(TEXTS, model="reader", timeout_s=SHORT_S)],
    "generate": lambda client: client.generate(PROMPT, model="talker", timeout_s=SHORT_S),
    "rerank": lambda client: client.rerank(PROMPT, TEXTS, model="judge", timeout_s=SHORT_S),
}


@pytest.mark.parametrize("name", BLOCKING)
def test_a_call_that_waits_by_itself_takes_its_job_back(
    served: Server, results: redis.Redis, name: str
) -> None:
    """Nobody can ask for its result any more, so the job is cancelled, and its worker is free again."""
    with Client(served.broker_url) as client:
        with pytest.raises(ResultTimeoutError):
            BLOCKING[name](client)

        eventually(lambda: records(results) == {b"REVOKED"})
        eventually(lambda: n_held(served) == 0)


ASYNC: dict[str, Callable[[AsyncClient], Awaitable[object]]] = {
    "embed": lambda client: client.embed(TEXTS, model="reader", timeout_s=SHORT_S),
    "generate": lambda client: client.generate(PROMPT, model="talker", timeout_s=SHORT_S),
    "rerank": lambda client: client.rerank(PROMPT, TEXTS, model="judge", timeout_s=SHORT_S),
}


@pytest.mark.parametrize("name", ASYNC)
def test_an_async_call_takes_its_job_back(served: Server, results: redis.Redis, name: str) -> None:
    """It does so where the program ends right after the call, too."""

    async def call() -> None:
        async with AsyncClient(served.broker_url) as client:
            with pytest.raises(ResultTimeoutError):
                await ASYNC[name](client)

    asyncio.run(call())

    eventually(lambda: records(results) == {b"REVOKED"})
    eventually(lambda: n_held(served) == 0)


def test_a_stream_takes_its_job_back(served: Server, results: redis.Redis) -> None:
    """Its limit is between two pieces: here the second job waits for a place that the first one has."""
    with Client(served.broker_url) as client:
        first = client.stream(PROMPT, model="talker")
        next(first)
        with pytest.raises(ResultTimeoutError):
            [*client.stream(PROMPT, model="talker", timeout_s=SHORT_S)]

        eventually(lambda: b"REVOKED" in records(results))
        first.close()  # type: ignore[attr-defined]  # an iterator that is a generator
        eventually(lambda: records(results) == {b"REVOKED"})
        eventually(lambda: n_held(served) == 0)


ADAPTERS: dict[str, Callable[[str], object]] = {
    "langchain": lambda url: ChatPenstock(model="talker", url=url, timeout=SHORT_S).invoke(PROMPT),
    "langchain documents": lambda url: PenstockEmbeddings("reader", url=url, timeout=SHORT_S).embed_documents(
        TEXTS
    ),
    "lightrag": lambda url: asyncio.run(
        LightRAGModels(url, llm="talker", embedding="reader", llm_timeout_s=SHORT_S).llm_model_func(PROMPT)
    ),
    "llama-index": lambda url: PenstockLLM(model="talker", url=url, timeout_s=SHORT_S).complete(PROMPT),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapters_call_takes_its_job_back(served: Server, results: redis.Redis, name: str) -> None:
    """It tells the worker its time too, so its job may be over its deadline first."""
    with pytest.raises((PenstockError, CallTimeoutError)):
        ADAPTERS[name](served.broker_url)

    eventually(lambda: records(results) and records(results) <= {b"REVOKED", b"FAILURE"})
    eventually(lambda: n_held(served) == 0)


def test_a_submitted_job_goes_on(served: Server) -> None:
    """`result` that runs out of time leaves the job alone, and can be called again."""
    with Client(served.broker_url) as client:
        jobs = [
            client.submit_embed(TEXTS[:16], model="reader"),
            client.submit_rerank(PROMPT, TEXTS[:16], model="judge"),
            client.submit_generate(PROMPT, model="talker", max_new_tokens=200),
        ]
        for job in jobs:
            with pytest.raises(ResultTimeoutError, match=job.id):
                job.result(timeout_s=0.01)

        assert all(job.result(timeout_s=60) is not None for job in jobs)
        assert [job.state() for job in jobs] == [JobState.SUCCEEDED] * 3
