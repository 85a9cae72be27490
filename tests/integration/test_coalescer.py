"""Calls that come together share jobs, and nothing else."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
import redis

from penstock import (
    AsyncClient,
    Client,
    EngineError,
    InvalidOptionError,
    InvalidTextError,
    JobCancelledError,
    ResultTimeoutError,
)
from penstock.coalescer import MOST_TEXTS
from penstock.keys import result_key
from penstock_workers.command.local_redis import free_port
from tests.deployment import Server, WorkerProcess
from tests.eventually import eventually
from tests.faults.light import MODEL, LightWorker


@pytest.fixture(scope="module")
def own() -> Iterator[Server]:
    """A server whose queue only these tests fill."""
    with Server(free_port()).running() as running:
        yield running


@pytest.fixture(scope="module")
def light(own: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LightWorker]:
    """A worker whose texts say how long they take."""
    worker = LightWorker(tmp_path_factory.mktemp("light"), own)
    with worker.running():
        yield worker


@asynccontextmanager
async def busy(client: AsyncClient, seconds: float = 0.5) -> AsyncIterator[None]:
    """Keep the worker from the jobs that are sent in the block until it ends."""
    first = asyncio.create_task(client.embed([f"busy {seconds}"], model=MODEL))
    await asyncio.sleep(0.05)
    yield
    await first


def n_records(own: Server) -> int:
    """Count the jobs that ended."""
    with redis.Redis.from_url(own.results_url) as results:
        return len(results.keys("penstock:job:*"))


def test_callers_at_once_become_few_jobs(own: Server, light: LightWorker) -> None:
    """Tasks that embed one text each share a job, and each gets its own row."""

    async def run() -> list[float]:
        async with AsyncClient(own.broker_url) as client:
            calls = [client.embed([f"c{i} 0.00{i:02}"], model=MODEL) for i in range(16)]
            found = await asyncio.gather(*calls)
            assert [vectors.shape for vectors in found] == [(1, 3)] * 16
            return [float(vectors[0, 0]) for vectors in found]

    before = n_records(own)

    assert asyncio.run(run()) == pytest.approx([i / 10_000 for i in range(16)])
    assert n_records(own) - before == 1


def test_threads_share_jobs(own: Server, light: LightWorker) -> None:
    """Threads of one client that call while a job is under way share the next."""
    before = n_records(own)
    with Client(own.broker_url) as client:
        client.models()
        found: dict[int, float] = {}

        def ask(i: int) -> None:
            found[i] = float(client.embed([f"t{i} 0.0{i}"], model=MODEL)[0, 0])

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(1, 10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert found == pytest.approx({i: i / 100 for i in range(1, 10)})
    assert n_records(own) - before < 9


def test_different_options_are_different_jobs(own: Server, light: LightWorker) -> None:
    """Calls share a job only if they ask the same."""

    async def run() -> None:
        async with AsyncClient(own.broker_url) as client:
            await asyncio.gather(
                client.embed(["a 0"], model=MODEL),
                client.embed(["b 0"], model=MODEL, prompt="query: "),
                client.embed(["c 0"], model=MODEL, priority="batch"),
                client.embed(["d 0"], model=MODEL, deadline_s=600),
                client.embed(["e 0"], model=MODEL, deadline_s=601),
                client.embed([f"f{i} 0" for i in range(MOST_TEXTS + 1)], model=MODEL),
            )

    before = n_records(own)
    asyncio.run(run())

    assert n_records(own) - before == 5


def test_one_bad_text_fails_alone(own: Server, light: LightWorker) -> None:
    """A text that the engine cannot take costs its caller an error, and the others of its job nothing."""

    async def run() -> list[object]:
        async with AsyncClient(own.broker_url) as client:
            texts = ["good 0", "no-number", "fine 0.01"]
            calls = [client.embed([text], model=MODEL, timeout_s=30) for text in texts]
            return list(await asyncio.gather(*calls, return_exceptions=True))

    good, bad, fine = asyncio.run(run())

    assert isinstance(bad, EngineError)
    assert float(good[0, 0]) == 0  # type: ignore[index]  # an array, or the test fails here
    assert float(fine[0, 0]) == pytest.approx(0.01)  # type: ignore[index]  # the same


def test_a_bad_call_is_refused_before_it_joins(own: Server, light: LightWorker) -> None:
    """What is wrong with one caller's arguments is told to that caller, with its own index."""

    async def run() -> list[object]:
        async with AsyncClient(own.broker_url) as client:
            calls = [
                client.embed(["a 0"], model=MODEL),
                client.embed(["b 0", 1], model=MODEL),  # type: ignore[list-item]  # on purpose
                client.embed(["c 0"], model=MODEL, truncate_dim=0),
            ]
            return list(await asyncio.gather(*calls, return_exceptions=True))

    good, bad_text, bad_option = asyncio.run(run())

    assert good.shape == (1, 3)  # type: ignore[attr-defined]  # an array, or the test fails here
    assert isinstance(bad_text, InvalidTextError)
    assert bad_text.index == 1
    assert isinstance(bad_option, InvalidOptionError)


def test_who_leaves_takes_nobody_along(own: Server, light: LightWorker) -> None:
    """A caller that times out and one that is cancelled leave; the third of their job gets its row."""

    async def run() -> tuple[list[object], float]:
        async with AsyncClient(own.broker_url) as client:
            async with busy(client, 2.0):
                began = time.monotonic()
                short = asyncio.create_task(client.embed(["short 0"], model=MODEL, timeout_s=0.1))
                dropped = asyncio.create_task(client.embed(["dropped 0"], model=MODEL))
                kept = asyncio.create_task(client.embed(["kept 0.01"], model=MODEL))
                await asyncio.sleep(0.02)
                dropped.cancel()
                await asyncio.wait([short])
                seconds = time.monotonic() - began
            found = await asyncio.gather(short, dropped, kept, return_exceptions=True)
            return list(found), seconds

    (short, dropped, kept), seconds = asyncio.run(run())

    assert isinstance(short, ResultTimeoutError)
    assert len(short.job_id) == 36
    assert seconds < 1.5
    assert isinstance(dropped, asyncio.CancelledError)
    assert float(kept[0, 0]) == pytest.approx(0.01)  # type: ignore[index]  # an array, or the test fails here


def test_a_job_that_nobody_waits_for_is_taken_back(own: Server, light: LightWorker) -> None:
    """When all callers of a job have left, it is cancelled."""

    async def run() -> None:
        async with AsyncClient(own.broker_url) as client, busy(client):
            calls = [
                asyncio.create_task(client.embed([f"left{i} 0"], model=MODEL, timeout_s=0.1))
                for i in range(3)
            ]
            await asyncio.wait(calls)
            assert all(isinstance(call.exception(), ResultTimeoutError) for call in calls)
            await asyncio.to_thread(eventually, lambda: n_cancelled() == 1)

    def n_cancelled() -> int:
        with redis.Redis.from_url(own.results_url) as results:
            return results.mget(results.keys("penstock:job:*")).count(b"REVOKED")

    asyncio.run(run())

    eventually(lambda: light.n_held() == 0)


def test_a_client_that_is_closed_leaves_nobody_waiting(own: Server, light: LightWorker) -> None:
    """Who waits in `embed` when the client is closed gets an error."""

    async def run() -> list[object]:
        client = AsyncClient(own.broker_url)
        calls = [asyncio.create_task(client.embed([f"x{i} 1"], model=MODEL)) for i in range(2)]
        await asyncio.sleep(0.3)
        late = asyncio.create_task(client.embed(["y 1"], model=MODEL))
        await asyncio.sleep(0)
        await client.close()
        return list(await asyncio.gather(*calls, late, return_exceptions=True))

    assert [type(answer) for answer in asyncio.run(run())] == [JobCancelledError] * 3


def test_results_that_nobody_can_ask_for_are_deleted(client: Client, server: Server) -> None:
    """`embed` leaves no result behind; `submit_embed` does, for its `ttl`."""
    with redis.Redis.from_url(server.results_url) as results:
        before = set(results.keys("celery-task-meta-*"))
        client.embed(["a"], model="minilm")
        client.embed(["a"] * 100, model="minilm")
        kept = client.submit_embed(["a"], model="minilm")
        kept.result()

        eventually(lambda: set(results.keys("celery-task-meta-*")) - before == {result_key(kept.id).encode()})


def test_many_jobs_are_sent_at_once(client: Client, worker: WorkerProcess) -> None:
    """`submit_many` sends a job for each list, in order, and each has an id."""
    jobs = client.submit_many([["a"], [], ["b", "c"]], model="minilm")

    assert [job.result().shape for job in jobs] == [(1, 384), (0, 384), (2, 384)]
    assert len({job.id for job in jobs}) == 3
    assert client.submit_many([], model="minilm") == []


def test_of_many_jobs_all_or_none_are_sent(client: Client, worker: WorkerProcess, server: Server) -> None:
    """One list that cannot be sent keeps all at home."""
    with redis.Redis.from_url(server.results_url) as results:
        before = len(results.keys("penstock:job:*"))
        with pytest.raises(InvalidTextError):
            client.submit_many([["a"], ["b", None]], model="minilm")  # type: ignore[list-item]  # on purpose

        assert len(results.keys("penstock:job:*")) == before
