"""The result backend: many results in a round trip, none lost, each job ended once."""

import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Celery, chain, chord, group
from celery.exceptions import BackendStoreError
from kombu.serialization import register

from penstock.codec import decode_meta, encode_failure, encode_meta
from penstock.errors import JobCancelledError
from penstock.keys import record_key, result_key
from penstock.result_store import END_JOB, SENT, end_job_arguments
from penstock_workers.command.local_redis import free_port
from penstock_workers.delivery.backend import MAX_PENDING_BYTES, ResultBackend
from tests.deployment import Server
from tests.eventually import eventually
from tests.integration.noop_app import QUEUE, REPLIES, TASKS, NoopWorker, build_noop_app


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server of this module's own: its tests send commands to all workers and empty databases."""
    with Server(free_port()).running() as running:
        yield running


@pytest.fixture
def results(server: Server) -> Iterator[redis.Redis]:
    """A connection to the server's results."""
    with redis.Redis.from_url(server.results_url) as connection:
        connection.flushall()
        yield connection


@pytest.fixture
def app(server: Server) -> Iterator[Celery]:
    """An app whose backend a test calls itself, or whose worker it asks for results."""
    with build_noop_app(server.broker_url, server.results_url) as app:
        yield app


@contextmanager
def notes(results: redis.Redis) -> Iterator[Callable[[], list[str]]]:
    """Listen to the reply channel; gives what it heard since the last time."""
    with results.pubsub(ignore_subscribe_messages=True) as channel:
        channel.subscribe(REPLIES)
        channel.get_message(timeout=5)  # the confirmation

        def heard() -> list[str]:
            found = []
            while (message := channel.get_message(timeout=0.3)) is not None:
                found.append(message["data"].partition(b"\n")[0].decode())
            return found

        yield heard


def n_reads(results: redis.Redis) -> int:
    """Return how often the server read from a connection: at least once for each round trip."""
    return int(results.info("stats")["total_reads_processed"])


def cancel(results: redis.Redis, job_id: str) -> None:
    """Do what `Job.cancel` does to a job that our client sent."""
    results.set(record_key(job_id), SENT)
    keys, arguments = end_job_arguments(
        job_id=job_id,
        payload=encode_failure(job_id, JobCancelledError(job_id)),
        status="REVOKED",
        is_final=True,
        is_cancel=True,
        result_ttl_s=60,
        reply_to=REPLIES,
    )
    assert results.eval(END_JOB, len(keys), *keys, *arguments) == 1


def test_results_share_round_trips(app: Celery, results: redis.Redis) -> None:
    """What piles up while one round trip is under way makes the next one, together."""
    backend: ResultBackend = app.backend
    backend.store_result("first", 0, "SUCCESS")
    results.config_resetstat()
    with ThreadPoolExecutor(128) as threads:  # one each: all wait at the same time
        results.client_pause(2000)

        stored = [threads.submit(backend.store_result, f"job-{n}", n, "SUCCESS") for n in range(64)]
        looks = [threads.submit(backend.is_ended, "first") for _ in range(64)]

        assert all(look.result() for look in looks)
        assert [future.result() for future in stored] == list(range(64))
    assert n_reads(results) < 128 / 4
    assert results.info("commandstats")["cmdstat_evalsha"]["calls"] == 64
    payloads = results.mget([result_key(f"job-{n}") for n in range(64)])
    assert [decode_meta(payload)["result"] for payload in payloads] == list(range(64))


def test_busy_threads_need_fewer_round_trips_than_results(app: Celery, results: redis.Redis) -> None:
    """Nothing has to slow Redis down: threads that end jobs as fast as they can share round trips as well."""
    n_connections = len(results.client_list())
    app.backend.store_result("first", 0, "SUCCESS")
    results.config_resetstat()

    def work(thread: int) -> None:
        for n in range(40):
            assert not app.backend.is_ended(f"job-{thread}-{n}")
            app.backend.store_result(f"job-{thread}-{n}", n, "SUCCESS")

    with ThreadPoolExecutor(32) as threads:
        list(threads.map(work, range(32)))

    assert results.info("commandstats")["cmdstat_evalsha"]["calls"] == 32 * 40
    assert n_reads(results) < 32 * 40 / 4
    assert len(results.client_list()) == n_connections + 1


def test_a_job_ends_once(app: Celery, results: redis.Redis) -> None:
    """Whatever comes second changes nothing, and nobody is told twice."""
    backend: ResultBackend = app.backend
    request = type("Request", (), {"reply_to": REPLIES, "group": None, "parent_id": None, "children": []})()
    with notes(results) as heard:
        backend.store_result("job", "first", "SUCCESS", request=request)
        backend.store_result("job", "second", "SUCCESS", request=request)
        backend.store_result("job", ValueError("late"), "FAILURE", request=request)

        assert heard() == ["job"]
    assert backend.get_result("job") == "first"
    assert results.get(record_key("job")) == b"SUCCESS"


def test_a_cancelled_jobs_late_result_changes_nothing(server: Server, tmp_path: Path) -> None:
    """What was cancelled while it ran stays cancelled, and its message is acknowledged."""
    with NoopWorker(tmp_path, server) as worker, notes(worker.results) as heard:
        job = worker.hold("cancelled")
        cancel(worker.results, job)

        worker.release("cancelled")

        eventually(lambda: worker.n_held() == 0)
        assert worker.result(job)[1] == "REVOKED"
        assert heard() == [job]


def test_a_forgotten_script_is_loaded_again(app: Celery, results: redis.Redis) -> None:
    """A server that was restarted, or whose scripts were flushed, stores the next results as well."""
    for n in range(3):
        results.script_flush()

        app.backend.store_result(f"job-{n}", n, "SUCCESS")

    assert [app.backend.get_result(f"job-{n}") for n in range(3)] == [0, 1, 2]


def test_results_wait_for_a_restarting_server(server: Server, tmp_path: Path) -> None:
    """Jobs that end while the result server is away are stored when it is back; none runs again."""
    own = Server(free_port())
    with ExitStack() as until_killed:
        until_killed.enter_context(own.running())
        with NoopWorker(tmp_path, server, results=own) as worker:
            jobs = {name: worker.hold(name) for name in ("a", "b", "c", "d")}
            until_killed.close()
            worker.release(*jobs)
            eventually(lambda: "results wait for Redis" in worker.log)

            with own.running():
                eventually(lambda: all(worker.result(job) for job in jobs.values()), within_s=10)

                eventually(lambda: worker.n_held() == 0)
                assert [worker.result(job) for job in jobs.values()] == [(n, "SUCCESS") for n in jobs]
                assert worker.n_queued() == 0
                assert worker.broker.keys("started:*") == []
                assert worker.log.count("results wait for Redis") == 1


def test_results_that_wait_are_bounded_by_the_drain(server: Server, tmp_path: Path) -> None:
    """A worker that stops while the result server is away requeues what it could not store."""
    own = Server(free_port())
    with ExitStack() as until_killed:
        until_killed.enter_context(own.running())
        with NoopWorker(tmp_path, server, results=own, worker_drain_s=0.5) as worker:
            worker.hold("a")
            until_killed.close()
            worker.release("a")
            eventually(lambda: "results wait for Redis" in worker.log)

            worker.signal(signal.SIGTERM)
            code = worker.wait(5)

            assert code == 0, worker.log
            assert (worker.n_queued(), worker.n_held()) == (1, 0)


def test_the_event_loop_does_not_wait_for_results(server: Server, tmp_path: Path) -> None:
    """While the result server is away messages are taken; what the loop itself stores is stored later."""
    own = Server(free_port())
    with ExitStack() as until_killed:
        until_killed.enter_context(own.running())
        with NoopWorker(tmp_path, server, results=own) as worker:
            worker.hold("first")
            until_killed.close()
            unknown = worker.send("no_such_task")
            eventually(lambda: "there is no task" in worker.log)

            worker.hold("second")

            with own.running():
                eventually(lambda: worker.result(unknown), within_s=10)
                assert worker.result(unknown)[0]["exc_type"] == "InvalidMessageError"


def test_a_full_server_is_waited_for(server: Server, tmp_path: Path) -> None:
    """A result that finds no memory is stored as soon as there is some; its job does not run again."""
    own = Server(free_port())
    with own.running(), NoopWorker(tmp_path, server, results=own, threads=1) as worker:
        job = worker.hold("a")
        worker.results.config_set("maxmemory", 1)
        worker.release("a")
        eventually(lambda: "results wait for Redis: command not allowed when used memory" in worker.log)
        assert worker.result(job) is None

        worker.results.config_set("maxmemory", 0)

        eventually(lambda: worker.result(job))
        eventually(lambda: worker.n_held() == 0)
        assert worker.broker.llen("started:a") == 0


def test_a_server_that_stays_full_costs_no_place(server: Server, tmp_path: Path) -> None:
    """After a bounded time the job is requeued; its place takes it again, and then it is stored."""
    own = Server(free_port())
    settings = {"threads": 1, "result_patience_s": 0.3}
    with own.running(), NoopWorker(tmp_path, server, results=own, **settings) as worker:
        job = worker.hold("a")
        worker.results.config_set("maxmemory", 1)
        worker.release("a")

        worker.wait_until_started("a")

        assert "job handed back: result not stored: command not allowed when used memory" in worker.log
        assert worker.n_held() == 1
        worker.results.config_set("maxmemory", 0)
        worker.release("a")
        eventually(lambda: worker.result(job))
        eventually(lambda: (worker.n_queued(), worker.n_held()) == (0, 0))
        assert worker.result(job) == ("a", "SUCCESS")


def test_a_result_that_redis_hangs_up_on_fails_alone(server: Server, tmp_path: Path) -> None:
    """The caller of a result above the server's own limit hears so; its neighbours are stored."""
    own = Server(free_port())
    sizes = {"small": 0, "large": 3 << 20, "medium": 900_000, "tiny": 1}
    with own.running(), NoopWorker(tmp_path, server, results=own) as worker:
        worker.results.config_set("proto-max-bulk-len", 1 << 20)
        jobs = {name: worker.hold(name, n_bytes) for name, n_bytes in sizes.items()}
        worker.results.client_pause(300)

        worker.release(*jobs)

        eventually(lambda: all(worker.result(job) for job in jobs.values()), within_s=10)
        failure, status = worker.result(jobs["large"])
        n_bytes, limit = failure["exc_message"]
        assert (status, failure["exc_type"]) == ("FAILURE", "ResultTooLargeError")
        assert n_bytes > sizes["large"]
        assert limit == 1 << 20
        assert {worker.result(jobs[name])[1] for name in ("small", "medium", "tiny")} == {"SUCCESS"}
        eventually(lambda: (worker.n_queued(), worker.n_held()) == (0, 0))


def test_a_result_that_redis_refuses_fails_alone(app: Celery, results: redis.Redis) -> None:
    """An error of one result is told to its thread, at once, and to no other."""
    results.lpush(record_key("refused"), "not a string")
    with ThreadPoolExecutor(3) as threads:
        results.client_pause(200)

        stored = {
            job: threads.submit(app.backend.store_result, job, 1, "SUCCESS") for job in ("a", "refused", "b")
        }

        with pytest.raises(BackendStoreError, match="WRONGTYPE"):
            stored["refused"].result(timeout=5)
        assert [stored["a"].result(timeout=5), stored["b"].result(timeout=5)] == [1, 1]


def test_results_that_wait_are_bounded_in_bytes(server: Server, results: redis.Redis) -> None:
    """Of many large results only so many are encoded at a time; all are stored in the end."""
    encoded: list[str] = []

    def encode(meta: dict[str, Any]) -> bytes:
        encoded.append(meta["task_id"])
        return encode_meta(meta)

    register("counted", encode, decode_meta, content_type="application/x-counted", content_encoding="binary")
    large, fit = "x" * (MAX_PENDING_BYTES // 4), 4
    with (
        build_noop_app(server.broker_url, server.results_url, result_serializer="counted") as app,
        ThreadPoolExecutor(8) as threads,
    ):
        app.backend.is_ended("connected")
        results.client_pause(10_000, all=False)
        stored = [threads.submit(app.backend.store_result, f"job-{n}", large, "SUCCESS") for n in range(8)]
        eventually(lambda: len(encoded) == fit)

        with pytest.raises(AssertionError):
            eventually(lambda: len(encoded) > fit, within_s=0.5)
        results.client_unpause()

        assert all(future.result(timeout=20) for future in stored)
    assert results.exists(*(result_key(f"job-{n}") for n in range(8))) == 8
    results.flushall()


def test_groups_chains_and_chords_work(server: Server, tmp_path: Path, app: Celery) -> None:
    """Celery's own ways to combine jobs find their results in this backend."""
    add, total = app.tasks[f"{TASKS}.add"], app.tasks[f"{TASKS}.total"]
    with NoopWorker(tmp_path, server):
        sums = group(add.s(n, n) for n in range(20)).apply_async(queue=QUEUE)
        chained = chain(add.s(1, 2), add.s(3), add.s(4)).apply_async(queue=QUEUE)
        joined = chord([add.s(n, 1) for n in range(20)], total.s()).apply_async(queue=QUEUE)
        failed = chord([add.s(1, 1), add.s(1, "x")], total.s()).apply_async(queue=QUEUE)

        assert sums.get(timeout=10) == [2 * n for n in range(20)]
        assert chained.get(timeout=10) == 10
        assert joined.get(timeout=10) == sum(range(1, 21))
        with pytest.raises(TypeError, match="unsupported operand"):
            failed.get(timeout=10)
