"""What Celery offers to whoever sends jobs with it works, or is refused in words."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
from celery import Celery, Signature, chain, chord, group
from kombu.serialization import register

from penstock import Client, InvalidMessageError, Job
from penstock.codec import CONTENT_TYPE, SERIALIZER, decode_meta, encode_meta
from penstock.store import record_key
from penstock_workers.callbacks import MAX_SIGNATURES
from tests.deployment import ROOT, Server, WorkerProcess
from tests.eventually import eventually
from tests.integration.ordinary_app import CALLS

QUEUE = "cpu.minilm"
TOML = """
[models.minilm]
task = "embed"
source = "bundled:minilm"
engine = "torch"

[models.other]
task = "embed"
source = "bundled:minilm"

[worker]
callback_queues = ["ordinary"]
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server for these tests."""
    from penstock_workers.local_redis import free_port

    with Server(free_port()).running() as running:
        yield running


@pytest.fixture(scope="module")
def worker(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    """A worker of one of two models, which sends callbacks to the queue `ordinary`."""
    process = WorkerProcess(tmp_path_factory.mktemp("celery"), server, toml=TOML, queues=QUEUE)
    try:
        process.wait_until_ready()
        yield process
    finally:
        process.stop()


@pytest.fixture(scope="module")
def ordinary(server: Server, worker: WorkerProcess) -> Iterator[None]:
    """An ordinary Celery worker beside it."""
    command = [sys.executable, "-m", "celery", "-A", "tests.integration.ordinary_app", "worker"]
    process = subprocess.Popen(
        [*command, "-P", "threads", "-c", "2", "-n", "ordinary@%h", "--without-mingle", "--without-gossip"],
        env=os.environ | {"ORDINARY_BROKER": server.broker_url},
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="module")
def sender(server: Server) -> Iterator[Celery]:
    """A Celery app that sends with its own transport and reads our results."""
    register(SERIALIZER, encode_meta, decode_meta, content_type=CONTENT_TYPE, content_encoding="binary")
    with Celery("sender", broker=server.broker_url, backend=server.results_url, set_as_current=False) as app:
        app.conf.result_serializer = SERIALIZER
        app.conf.result_accept_content = [SERIALIZER]
        app.conf.task_default_queue = "ordinary"
        yield app
        app.backend.result_consumer.stop()
        app.backend.client.connection_pool.disconnect()


@pytest.fixture(scope="module")
def client(server: Server, worker: WorkerProcess) -> Iterator[Client]:
    """A client of that worker."""
    with Client(server.broker_url) as connected:
        yield connected


@pytest.fixture
def calls(server: Server) -> Iterator[Callable[[int], list[Any]]]:
    """Wait for so many calls of the ordinary worker's task; return their arguments."""
    with redis.Redis.from_url(server.broker_url) as book:
        book.delete(CALLS)

        def wait(n: int) -> list[Any]:
            eventually(lambda: book.llen(CALLS) >= n, within_s=60)
            return sorted(json.loads(call) for call in book.lrange(CALLS, 0, -1))

        yield wait


def ended(client: Client, server: Server, job_id: str) -> Job[Any]:
    """Return a job that somebody else sent, once it has ended."""
    with redis.Redis.from_url(server.results_url) as store:
        eventually(lambda: store.exists(record_key(job_id)), within_s=60)
    return client.job(job_id)


def embed(sender: Celery, **kwargs: object) -> Signature:
    """Return the signature of a job."""
    fields = {"model": "minilm", "texts": ["a text"]} | kwargs
    return sender.signature("penstock.embed", kwargs=fields, options={"queue": QUEUE}, immutable=True)


def note(sender: Celery, *args: object, queue: str | None = "ordinary", **options: object) -> Signature:
    """Return the signature of an ordinary task that takes no result."""
    if queue:
        options["queue"] = queue
    return sender.signature("ordinary.note", args=args, options=options, immutable=True)


def test_callbacks_chains_and_chords_of_an_ordinary_app_work(
    ordinary: None, sender: Celery, calls: Callable[[int], list[Any]]
) -> None:
    """What takes no result is sent after the job, to an ordinary worker, in Celery's own words."""
    linked = embed(sender).apply_async(link=[note(sender, "link"), note(sender, "late", countdown=0.2)])
    chain(embed(sender), note(sender, "chain 1"), embed(sender), note(sender, "chain 2")).apply_async()
    chain(embed(sender), group(note(sender, "group 1"), note(sender, "group 2"))).apply_async()
    embed(sender).apply_async(link=chain(note(sender, "nested 1"), note(sender, "nested 2")))
    chord([embed(sender), embed(sender)], note(sender, "chord")).apply_async()
    chord(
        [chain(embed(sender), embed(sender)), embed(sender)], note(sender, "chord of a chain")
    ).apply_async()

    found = calls(10)

    assert found == sorted(
        [
            [word]
            for word in ("link", "late", "chain 1", "chain 2", "group 1", "group 2", "nested 1", "nested 2")
        ]
        + [["chord"], ["chord of a chain"]]
    )
    assert linked.get(timeout=60).vectors.shape == (1, 384)
    assert len(linked.children) == 1  # a group of two


def test_an_error_callback_gets_the_jobs_id(
    ordinary: None, sender: Celery, calls: Callable[[int], list[Any]]
) -> None:
    """A job that fails calls its error callbacks with its id, as Celery does across apps."""
    told = sender.signature("ordinary.note", options={"queue": "ordinary"})

    failed = embed(sender, texts="no list").apply_async(link_error=told)

    assert calls(1) == [[failed.id]]
    assert failed.state == "FAILURE"


def test_a_group_of_jobs_is_fetched_as_a_whole(worker: WorkerProcess, sender: Celery) -> None:
    """A group's results come in its order."""
    jobs = group([embed(sender, texts=["a"] * n) for n in (1, 2, 3)], app=sender).apply_async()

    assert [result.vectors.shape[0] for result in jobs.get(timeout=60)] == [1, 2, 3]


def sent_with(**options: Any) -> Callable[[Celery], Any]:
    """Return what sends a job with these options; functions among them are given the sender."""
    return lambda sender: embed(sender).apply_async(
        **{name: value(sender) if callable(value) else value for name, value in options.items()}
    )


REFUSED = {
    "a callback that takes the result": (
        sent_with(link=lambda app: app.signature("ordinary.note", options={"queue": "ordinary"})),
        "immutable",
    ),
    "a chain whose next step takes the result": (
        lambda app: chain(
            embed(app), app.signature("ordinary.note", options={"queue": "ordinary"})
        ).apply_async(),
        "immutable",
    ),
    "a chord whose body takes the results": (
        lambda app: chord(
            [embed(app), embed(app)], app.signature("ordinary.note", options={"queue": "ordinary"})
        ).apply_async(),
        "immutable",
    ),
    "a queue that is not named": (sent_with(link=lambda app: note(app, queue="theirs")), "callback_queues"),
    "no queue": (sent_with(link=lambda app: note(app, queue=None)), "no queue, so it goes to celery"),
    "a key of the broker": (sent_with(link=lambda app: note(app, queue="penstock:dead")), "callback_queues"),
    "an exchange": (sent_with(link=lambda app: note(app, exchange="celery.pidbox")), "option exchange"),
    "one of Celery's own tasks": (
        sent_with(link=lambda app: app.signature("celery.backend_cleanup", options={"queue": "ordinary"})),
        "one of Celery's own",
    ),
    "a strange task for our queue": (sent_with(link=lambda app: note(app, queue=QUEUE)), "not for"),
    "too many": (
        sent_with(link=lambda app: [note(app, n) for n in range(MAX_SIGNATURES + 1)]),
        f"more than {MAX_SIGNATURES}",
    ),
    "too many, nested": (
        sent_with(
            link=lambda app: [
                note(app, n, link=[note(app, m, link=[note(app)] * 3) for m in range(3)]) for n in range(3)
            ]
        ),
        f"more than {MAX_SIGNATURES}",
    ),
    "a chord in a chain": (
        lambda app: chain(embed(app), group(note(app), note(app)), note(app)).apply_async().parent.parent,
        "holds a chord",
    ),
    "a time limit": (sent_with(time_limit=5), "send a deadline"),
    "a soft time limit": (sent_with(soft_time_limit=5), "send a deadline"),
    "a map": (
        lambda app: app.send_task("celery.map", kwargs={"task": embed(app), "it": [[]]}, queue=QUEUE),
        "no task",
    ),
    "an endless task": (
        lambda app: app.send_task(
            "celery.chord_unlock", ("g", dict(note(app))), {"interval": 0, "max_retries": None}, queue=QUEUE
        ),
        "no task",
    ),
    "a task that sends": (
        lambda app: app.send_task("celery.accumulate", (1, 2), queue=QUEUE, link=[note(app)]), "no task"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_safe_is_refused_before_it_is_computed(
    worker: WorkerProcess, client: Client, sender: Celery, server: Server, name: str
) -> None:
    """The caller is told what was wrong, and nothing is sent."""
    send, words = REFUSED[name]

    job_id = send(sender).id

    with pytest.raises(InvalidMessageError, match=words):
        ended(client, server, job_id).result(timeout_s=5)
    with redis.Redis.from_url(server.broker_url) as broker:
        assert not broker.exists("theirs")
