"""LightRAG's functions as LightRAG calls them, answered by a real worker."""

import asyncio
import copy
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import redis
from lightrag.utils import EmbeddingFunc, TruncatedResponse, create_prefixed_exception

from penstock import Client, UnknownModelError, WrongTaskError
from penstock.adapters.lightrag import CallFailedError, CallTimeoutError, LightRAGModels
from penstock.keys import queue_key, queue_name
from penstock_workers.command.local_redis import free_port
from tests.deployment import ROOT, Server, WorkerProcess
from tests.eventually import eventually


@pytest.fixture
def models(server: Server, worker: WorkerProcess) -> Iterator[LightRAGModels]:
    """The functions, over the session's worker."""
    with LightRAGModels(server.broker_url, llm="chat", embedding="minilm") as made:
        yield made


@pytest.fixture
def nobody(server: Server, client: Client) -> Iterator[Server]:
    """A server that knows the models and has no worker: jobs wait."""
    with Server(free_port()).running() as empty:
        copy_registry(server, empty)
        yield empty


def copy_registry(source: Server, target: Server) -> None:
    """Let a server know the models of another one."""
    with redis.Redis.from_url(source.broker_url) as known, redis.Redis.from_url(target.broker_url) as fresh:
        fresh.hset("penstock:models", mapping=known.hgetall("penstock:models"))
        fresh.set("penstock:results", "/1")


def test_vectors_are_the_clients(models: LightRAGModels, client: Client) -> None:
    """`embedding_func` says width, length limit and name, and gives what `embed` gives, as float32."""
    texts = ["A penstock feeds a turbine.", "A gate closes it."]

    vectors = asyncio.run(models.embedding_func(texts, context="document"))
    none = asyncio.run(models.embedding_func([]))

    expected = client.embed(texts, model="minilm")
    assert isinstance(models.embedding_func, EmbeddingFunc)
    assert (models.embedding_func.embedding_dim, models.embedding_func.max_token_size) == (384, 256)
    assert models.embedding_func.model_name == "minilm"
    assert (vectors.dtype, vectors.shape, none.shape) == (np.float32, (2, 384), (0, 384))
    assert np.allclose(vectors, expected, atol=1e-2)


def test_answers_take_prompt_system_prompt_and_history(models: LightRAGModels) -> None:
    """What LightRAG hands over besides is left out: its storage, flags of its own, options unknown here."""
    history = [
        {"role": "user", "content": "My name is Ada."},
        {"role": "assistant", "content": "Hello, Ada."},
    ]

    answer = asyncio.run(
        models.llm_model_func(
            "What is my name?",
            system_prompt="Answer in upper case.",
            history_messages=history,
            hashing_kv=SimpleNamespace(global_config={"default_llm_timeout": 20}),
            enable_cot=True,
            priority="interactive",
            temperature=0,
            max_tokens=40,
            whatever=object(),
        )
    )

    assert "ADA" in answer
    assert answer == answer.upper()
    assert not isinstance(answer, TruncatedResponse)


def test_cut_answers_are_marked(models: LightRAGModels) -> None:
    """LightRAG does not cache a `TruncatedResponse`; cut JSON is one too."""
    cut = asyncio.run(models.llm_model_func("What is 17 + 26?", max_tokens=2))
    cut_json = asyncio.run(
        models.llm_model_func("Who are you?", max_tokens=2, response_format={"type": "json_object"})
    )

    assert isinstance(cut, TruncatedResponse)
    assert isinstance(cut_json, TruncatedResponse)


def test_keywords_are_json(models: LightRAGModels) -> None:
    """Any model, however small, answers the keyword call with the two lists that LightRAG reads."""
    asked = {**models.arguments()["role_llm_configs"]["keyword"]["kwargs"], "max_tokens": 900, "stop": ["\n"]}

    answer = asyncio.run(
        models.llm_model_func("The gate is blue.", response_format={"type": "json_object"}, **asked)
    )

    keywords = json.loads(answer)
    assert set(keywords) == {"high_level_keywords", "low_level_keywords"}
    assert all(isinstance(word, str) for words in keywords.values() for word in words)


def test_a_response_format_holds(models: LightRAGModels) -> None:
    """`response_format` becomes constrained output."""
    wanted = {"type": "json_schema", "json_schema": {"schema": {"enum": ["yes", "no"]}}}

    answer = asyncio.run(models.llm_model_func("Is the gate open?", response_format=wanted))

    assert json.loads(answer) in ("yes", "no")


def test_streams_are_pieces_of_text(models: LightRAGModels) -> None:
    """With `stream` an async iterator of text comes back, which may be left."""

    async def read() -> tuple[str, str]:
        pieces = await models.llm_model_func("What is 17 + 26?", stream=True)
        assert isinstance(pieces, AsyncIterator)
        whole = "".join([piece async for piece in pieces])
        left = await models.llm_model_func("What is 17 + 26?", stream=True)
        async for piece in left:
            first = piece
            break
        await left.aclose()
        return whole, first

    whole, first = asyncio.run(read())

    assert "43" in whole
    assert whole.startswith(first)


def test_functions_survive_copies(models: LightRAGModels) -> None:
    """LightRAG copies itself, deeply, with all it was given."""

    @dataclass
    class Owner:
        arguments: dict[str, Any]
        embedding_func: EmbeddingFunc

    found = asdict(Owner(models.arguments(), models.embedding_func))
    copied = copy.deepcopy(models.llm_model_func)

    assert found["embedding_func"]["func"] is models.embedding_func.func
    assert "43" in asyncio.run(copied("What is 17 + 26?"))


def test_any_event_loop_may_call(models: LightRAGModels) -> None:
    """Loops come and go, and two at once share the connections."""

    def ask() -> str:
        return asyncio.run(models.llm_model_func("What is 17 + 26?"))

    async def ask_twice() -> list[str]:
        return list(await asyncio.gather(asyncio.to_thread(ask), models.llm_model_func("What is 17 + 26?")))

    assert ["43" in answer for answer in [ask(), ask(), *asyncio.run(ask_twice())]] == [True] * 4


@pytest.mark.parametrize("call", ["llm", "stream", "embedding"])
def test_a_cancelled_call_takes_its_job_back(nobody: Server, call: str) -> None:
    """LightRAG cancels what takes too long; nobody computes it then."""
    with LightRAGModels(nobody.broker_url, llm="chat", embedding="minilm") as models:
        asyncio.run(cancel_when_queued(models, nobody, call))

        eventually(lambda: cancelled_jobs(nobody) == 1)


async def cancel_when_queued(models: LightRAGModels, server: Server, call: str) -> None:
    """Make a call, and leave it when its job waits."""

    async def read() -> None:
        async for _ in await models.llm_model_func("?", stream=True):
            pass

    calls: dict[str, Callable[[], Any]] = {
        "llm": lambda: models.llm_model_func("?"),
        "stream": read,
        "embedding": lambda: models.embedding_func(["?"]),
    }
    queue = queue_name("cpu", "minilm" if call == "embedding" else "chat")
    task = asyncio.create_task(calls[call]())
    await asyncio.to_thread(eventually, lambda: n_waiting(server, queue) == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def n_waiting(server: Server, queue: str) -> int:
    """Count the jobs of default priority in a queue."""
    with redis.Redis.from_url(server.broker_url) as connection:
        return int(connection.llen(queue_key(queue, 3)))


def cancelled_jobs(server: Server) -> int:
    """Count the jobs that were taken back."""
    with redis.Redis.from_url(server.results_url) as connection:
        return sum(connection.get(key) == b"REVOKED" for key in connection.scan_iter("penstock:job:*"))


def test_queries_go_first(nobody: Server) -> None:
    """An embedding for a query waits in the lane of interactive jobs, and so do calls of the query role."""
    with LightRAGModels(nobody.broker_url, llm="chat", embedding="minilm", embedding_timeout_s=0.5) as models:
        priority = models.arguments()["role_llm_configs"]["query"]["kwargs"]["priority"]
        calls: list[Callable[[], Any]] = [
            lambda: models.embedding_func(["?"], context="query"),
            lambda: models.llm_model_func("?", priority=priority, timeout=0.5),
        ]
        for call in calls:
            with pytest.raises(CallTimeoutError):
                asyncio.run(call())

    with redis.Redis.from_url(nobody.broker_url) as connection:
        assert [connection.llen(queue_key(f"cpu.{name}", 0)) for name in ("minilm", "chat")] == [1, 1]


def test_late_answers_are_told_before_lightrag_cancels(nobody: Server) -> None:
    """A call ends within LightRAG's time, with an error that is not taken for LightRAG's own."""
    with (
        LightRAGModels(nobody.broker_url, llm="chat", embedding="minilm", llm_timeout_s=0.5) as models,
        pytest.raises(CallTimeoutError) as caught,
    ):
        asyncio.run(asyncio.wait_for(models.llm_model_func("?"), 2 * 0.5))

    assert not isinstance(caught.value, TimeoutError)


def test_a_server_that_returns_is_no_error(client: Client, server: Server) -> None:
    """What passes is tried again within the call's time, and LightRAG hears nothing of it."""
    home = Server(free_port())
    with home.running():
        copy_registry(server, home)
        models = LightRAGModels(home.broker_url, llm="chat", embedding="minilm")

    async def ask() -> None:
        task = asyncio.create_task(models.llm_model_func("?"))
        await asyncio.wait([task], timeout=0.2)  # in which an error would have come
        assert not task.done()
        with home.running():
            copy_registry(server, home)
            await asyncio.to_thread(eventually, lambda: n_waiting(home, "cpu.chat") == 1, within_s=20)
            task.cancel()
            await asyncio.wait([task])

    with models:
        asyncio.run(ask())


def test_errors_take_a_prefix(models: LightRAGModels) -> None:
    """LightRAG builds an error anew with a chunk's name in front; class and text stay."""
    with pytest.raises(CallFailedError, match="InvalidOptionError: temperature is 7") as caught:
        asyncio.run(models.llm_model_func("?", temperature=7))
    with pytest.raises(CallFailedError, match="takes no images"):
        asyncio.run(models.llm_model_func("?", image_inputs=["x"]))

    prefixed = create_prefixed_exception(caught.value, "chunk-1")
    assert type(prefixed) is CallFailedError
    assert str(prefixed) == f"chunk-1: {caught.value}"


def test_wrong_models_are_told_at_once(server: Server, worker: WorkerProcess) -> None:
    """A name that is not served, or for something else, does not wait for the first document."""
    with pytest.raises(UnknownModelError):
        LightRAGModels(server.broker_url, llm="chat", embedding="nothing")
    with pytest.raises(WrongTaskError):
        LightRAGModels(server.broker_url, llm="minilm", embedding="minilm")


def demo(server: Server, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the example as people do."""
    command = [sys.executable, "examples/lightrag_demo.py", "--url", server.broker_url, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=ROOT)


def test_the_example_inserts_and_asks_in_every_mode(server: Server, worker: WorkerProcess) -> None:
    """LightRAG itself, over a real worker and the bundled models, offline."""
    done = demo(server)

    assert done.returncode == 0, done.stderr
    lines = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert [lines[f"document {name}"] for name in ("gate", "pump", "hall", "key")] == ["processed"] * 4
    answers = {mode: lines[mode].split("? ")[1] for mode in ("naive", "local", "global", "hybrid", "mix")}
    assert "blue" in answers["naive"]
    assert all(answers.values())


def test_the_example_tells_of_failed_documents(server: Server, worker: WorkerProcess) -> None:
    """LightRAG's own prompt for extraction is too long for tiny-chat: the exit code says so, and why."""
    done = demo(server, "--extract")

    assert done.returncode == 1
    assert "document gate failed" in done.stderr
    assert "InputTooLongError: chat accepts" in done.stderr


def test_import_installs_nothing() -> None:
    """LightRAG's wrapper of pip stays idle: no process is started and no connection opened."""
    code = """
import sys
def refuse(event, arguments):
    if event in ("subprocess.Popen", "os.system", "os.posix_spawn", "os.exec", "socket.connect"):
        raise SystemExit(f"{event} {arguments}")
sys.addaudithook(refuse)
import penstock.adapters.lightrag
print(*sorted(sys.modules.keys() & {"torch", "transformers", "celery", "kombu"}))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=90, check=False
    )

    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr
