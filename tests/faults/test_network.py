"""The network falls silent, Redis stands still, connections are cut: nothing is lost, and all go on."""

import asyncio
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import redis

from penstock import AsyncClient, BrokerUnavailableError, Client, ConfigError, JobState
from penstock.adapters.langchain import PenstockEmbeddings
from penstock.adapters.llama_index import PenstockEmbedding
from penstock.connections import ANSWER_TIMEOUT_S
from penstock.inbox import LOOK_AGAIN_S
from penstock.keys import record_key
from penstock_workers.command.local_redis import free_port
from tests.deployment import Server
from tests.eventually import eventually
from tests.faults.fleet import Fleet
from tests.faults.light import LEASE_S, MODEL, LightWorker
from tests.faults.proxy import Proxy


@pytest.fixture
def link(own: Server) -> Iterator[Proxy]:
    """A network between that server and somebody."""
    with Proxy(own.port).running() as proxy:
        yield proxy


def url(link: Proxy, database: int = 0) -> str:
    """Return the server's URL through that network."""
    return f"redis://127.0.0.1:{link.port}/{database}"


def answers(client: Client) -> bool:
    """Whether a job goes there and back; a connection that is dead in the pool may say no once."""
    try:
        return client.embed(["again 0"], model=MODEL, timeout_s=20).shape == (1, 3)
    except BrokerUnavailableError:
        return False


def test_a_client_gets_its_result_after_a_silence(own: Server, link: Proxy, tmp_path: Path) -> None:
    """A client whose connections went dead while it waited gets that result, and later ones without delay."""
    with LightWorker(tmp_path, own).running(), Client(url(link)) as client:
        client.embed(["warm 0"], model=MODEL)
        job = client.submit_embed(["late 0.5"], model=MODEL)
        waiting = threading.Timer(1.0, link.forward)
        link.swallow()
        waiting.start()
        began = time.monotonic()

        assert job.result(timeout_s=60).shape == (1, 3)
        assert time.monotonic() - began < LOOK_AGAIN_S + ANSWER_TIMEOUT_S + LOOK_AGAIN_S

        eventually(lambda: answers(client), within_s=2 * ANSWER_TIMEOUT_S)
        began = time.monotonic()
        client.embed(["next 0"], model=MODEL)
        assert time.monotonic() - began < LOOK_AGAIN_S / 2  # the note was heard


def test_a_send_into_silence_is_an_error_within_the_limit(own: Server, link: Proxy, tmp_path: Path) -> None:
    """What is sent over a dead connection is `BrokerUnavailableError` after one answer's time, not two."""
    with LightWorker(tmp_path, own).running(), Client(url(link)) as client:
        client.embed(["warm 0"], model=MODEL)
        link.swallow()
        began = time.monotonic()

        with pytest.raises(BrokerUnavailableError):
            client.submit_embed(["never 0"], model=MODEL)
        assert time.monotonic() - began < ANSWER_TIMEOUT_S + 3

        link.forward()
        eventually(lambda: answers(client), within_s=2 * ANSWER_TIMEOUT_S)


def test_a_worker_goes_on_after_a_silence(own: Server, link: Proxy, tmp_path: Path) -> None:
    """A worker cut off for longer than its lease acknowledges what it ran and takes jobs again."""
    worker = LightWorker(tmp_path, own, broker_url=url(link), results_url=url(link, 1))
    with worker.running() as process, Client(own.broker_url) as client:
        jobs = [client.submit_embed([f"j{i} 0.5"], model=MODEL) for i in range(8)]
        eventually(lambda: worker.runs()["j1"])
        link.swallow()
        time.sleep(1.5 * LEASE_S)
        link.forward()
        began = time.monotonic()

        for job in jobs:
            assert job.result(timeout_s=50).shape == (1, 3)
        assert client.embed(["next 0"], model=MODEL, timeout_s=30).shape == (1, 3)
        assert time.monotonic() - began < 20
        eventually(lambda: not worker.n_held())
        assert process.process.poll() is None
        assert max(worker.runs().values()) <= 2


def test_a_redis_that_stands_still_loses_nothing(own: Server, tmp_path: Path) -> None:
    """Redis stops for five leases: workers live, clients get every result, jobs run once or twice."""
    with redis.Redis.from_url(own.broker_url) as admin:
        pid = int(admin.info("server")["process_id"])
    worker = LightWorker(tmp_path, own)
    with worker.running() as process, Client(own.broker_url) as client:
        jobs = [client.submit_embed([f"j{i} 0.2"], model=MODEL) for i in range(20)]
        eventually(lambda: worker.runs()["j3"])
        os.kill(pid, signal.SIGSTOP)
        threading.Timer(5 * LEASE_S, os.kill, (pid, signal.SIGCONT)).start()

        for job in jobs:
            assert job.result(timeout_s=60).shape == (1, 3)
        eventually(lambda: not worker.n_held())
        assert process.process.poll() is None
        assert max(worker.runs().values()) <= 2
        assert client.job(jobs[0].id).state() is JobState.SUCCEEDED


def test_a_redis_that_was_restarted_owes_no_result(fleet: Fleet, tmp_path: Path) -> None:
    """Killed while jobs run and results are awaited, and back with its file: every caller is answered."""
    worker = LightWorker(tmp_path, fleet.broker)
    with worker.running() as process, Client(fleet.broker.broker_url) as client:
        jobs = [client.submit_embed([f"j{i} 0.1"], model=MODEL) for i in range(30)]
        eventually(lambda: worker.runs()["j5"])
        fleet.broker.kill()
        threading.Timer(LEASE_S, fleet.broker.start).start()

        for job in jobs:
            assert job.result(timeout_s=60).shape == (1, 3)
        eventually(lambda: not worker.n_held())
        assert process.process.poll() is None
        assert max(worker.runs().values()) <= 2
        assert client.job(jobs[0].id).state() is JobState.SUCCEEDED


def test_cut_connections_lose_no_note(own: Server, tmp_path: Path) -> None:
    """While 50 jobs are awaited, twice each, connections are cut again and again: every result arrives."""
    worker = LightWorker(tmp_path, own)

    async def run() -> tuple[list[np.ndarray], float]:
        async with AsyncClient(own.broker_url) as client:
            jobs = [await client.submit_embed([f"j{i} 0.04"], model=MODEL) for i in range(50)]
            waiting = [asyncio.create_task(job.result(timeout_s=60)) for job in jobs + jobs]
            began = time.monotonic()
            while not all(task.done() for task in waiting):
                for kind in ("pubsub", "normal"):
                    await asyncio.to_thread(worker.book.client_kill_filter, _type=kind, skipme=True)
                await asyncio.sleep(0.2)
            return [task.result() for task in waiting], time.monotonic() - began

    with worker.running() as process:
        results, seconds = asyncio.run(run())

        assert [vectors.shape for vectors in results] == [(1, 3)] * 100
        assert seconds < 20
        eventually(lambda: not worker.n_held())
        assert process.process.poll() is None
        assert set(worker.runs().values()) == {1}


def test_results_may_be_kept_elsewhere(own: Server, tmp_path: Path) -> None:
    """Results may have a server of their own; a client has to name it, and is told so."""
    with Server(free_port()).running() as other:
        worker = LightWorker(tmp_path, own, results_url=other.results_url)
        with (
            worker.running(),
            Client(own.broker_url, results_url=other.results_url) as client,
            Client(own.broker_url) as untold,
        ):
            with pytest.raises(ConfigError, match="name it, with its login"):
                untold.embed(["a 0"], model=MODEL, timeout_s=20)
            vectors = client.embed(["a 0", "b 0"], model=MODEL, timeout_s=20)
            urls = {"url": own.broker_url, "results_url": other.results_url}
            by_langchain = PenstockEmbeddings(MODEL, **urls).embed_query("a 0")
            by_llama_index = PenstockEmbedding(model_name=MODEL, **urls).get_query_embedding("a 0")
            waiting = client.submit_embed(["c 5"], model=MODEL)

            assert vectors.shape == (2, 3)
            assert by_langchain == by_llama_index == vectors[0].tolist()
            assert waiting.cancel()
            with (
                redis.Redis.from_url(own.results_url) as here,
                redis.Redis.from_url(other.results_url) as there,
            ):
                assert here.dbsize() == 0
                assert there.get(record_key(waiting.id)) == b"REVOKED"
