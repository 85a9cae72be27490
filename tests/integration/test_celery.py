"""What Celery offers to whoever sends jobs with it works, or is refused in words."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import redis
from celery import Celery, Signature, chain, chord, group
from kombu.serialization import register

from penstock import Client, InvalidMessageError, Job, JobCancelledError, ResultTimeoutError
from penstock.codec import CONTENT_TYPE, SERIALIZER, decode_meta, encode_meta
from penstock.keys import record_key
from penstock_workers.command.status import read_status
from penstock_workers.configuration import load_settings
from penstock_workers.delivery.callbacks import MAX_SIGNATURES
from penstock_workers.settings import Settings
from tests.deployment import ROOT, Server, WorkerProcess
from tests.eventually import eventually
from tests.integration.ordinary_app import CALLS

QUEUE = "cpu.minilm"
RUN = {
    "celery": "from celery.__main__ import main; main()",
    "penstock": "from penstock_workers.cli import main; main()",
}
TOML = """
[models.minilm]
task = "embed"
source = "bundled:minilm"
engine = "torch"

[models.other]
task = "embed"
source = "bundled:minilm"

[models.chat]
task = "generate"
source = "bundled:tiny-chat"

[worker]
callback_queues = ["ordinary"]
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server for these tests."""
    from penstock_workers.command.local_redis import free_port

    with Server(free_port()).running() as running:
        yield running


@pytest.fixture(scope="module")
def worker(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    """A worker of one of two models, which sends callbacks to the queue `ordinary`."""
    process = WorkerProcess(tmp_path_factory.mktemp("celery"), server, toml=TOML, queues=f"{QUEUE},cpu.chat")
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


def needs_none_of(package: str) -> pytest.MarkDecorator:
    """Skip where the package is installed."""
    return pytest.mark.skipif(find_spec(package) is not None, reason=f"{package} is installed")


@pytest.mark.parametrize(
    ("command", "arguments", "words"),
    [
        ("rate_limit", {"task_name": "penstock.embed", "rate_limit": "5/m"}, "tokens_per_minute"),
        ("time_limit", {"task_name": "penstock.embed", "hard": 5, "soft": 3}, "a deadline"),
        ("pool_restart", {}, "stop the process"),
        ("pool_grow", {"n": 1}, "start another worker process"),
        ("pool_shrink", {"n": 1}, "start another worker process"),
        ("autoscale", {"max": 8, "min": 2}, "start another worker process"),
        ("add_consumer", {"queue": "cpu.other"}, "has loaded; it has cpu.chat, cpu.minilm"),
        ("add_consumer", {"queue": "emails"}, "start another worker with -Q"),
        ("add_consumer", {"queue": ["cpu.minilm"]}, "start another worker with -Q"),
        ("add_consumer", {"queue": QUEUE, "exchange": "theirs"}, "no exchange"),
        ("cancel_consumer", {"queue": "emails"}, "only from cpu.chat, cpu.minilm"),
        ("revoke_by_stamped_headers", {"headers": ["customer"]}, "NAME=VALUE"),
        ("revoke_by_stamped_headers", {"headers": 5}, "a mapping"),
        ("election", {}, "missing 2 required"),
        ("revoke", {"task_id": "x", "terminate": True, "signal": "NOSUCH"}, "does not take these arguments"),
        ("query_task", {"surprise": 1}, "does not take these arguments"),
        pytest.param("memsample", {}, "psutil", marks=needs_none_of("psutil")),
        pytest.param("objgraph", {}, "objgraph", marks=needs_none_of("objgraph")),
    ],
)
def test_commands_without_effect_are_refused(
    worker: WorkerProcess, sender: Celery, command: str, arguments: dict[str, object], words: str
) -> None:
    """A command that a worker does not carry out is answered with the reason and with what to do instead."""
    assert words in told(sender, worker, command, **arguments)["error"]
    assert "Traceback" not in worker.log, worker.log


@pytest.mark.parametrize(
    "command",
    [
        *("active", "active_queues", "clock", "conf", "memdump", "ping", "registered", "report"),
        *("reserved", "revoked", "scheduled", "stats", "enable_events", "disable_events", "enable_events"),
    ],
)
def test_other_commands_do_what_celery_documents(worker: WorkerProcess, sender: Celery, command: str) -> None:
    """Commands that ask, and those about events, are answered without an error."""
    answer = told(sender, worker, command)

    assert "error" not in answer if isinstance(answer, dict) else answer is not None


def test_a_cancelled_queue_is_not_ready_and_its_jobs_wait(
    worker: WorkerProcess, client: Client, sender: Celery
) -> None:
    """After `cancel_consumer` the registry says so, jobs wait, and `add_consumer` takes them again."""
    assert "ok" in told(sender, worker, "cancel_consumer", queue=QUEUE)
    settings = load_settings(worker.config, environ={}).settings
    eventually(lambda: "0 in cpu" in model_line(settings), within_s=30)
    job = client.submit_embed(["waits"], model="minilm")
    with pytest.raises(ResultTimeoutError):
        job.result(timeout_s=1)
    assert job.state() == "waiting"
    assert client.generate("Hello", model="chat", max_new_tokens=2)

    assert "ok" in told(sender, worker, "add_consumer", queue=QUEUE)

    assert job.result(timeout_s=60).shape == (1, 384)
    eventually(lambda: "1 in cpu" in model_line(settings), within_s=30)


def test_revoked_jobs_end_for_their_callers(worker: WorkerProcess, client: Client, sender: Celery) -> None:
    """Waiting jobs that are revoked, by id or by stamp, and a running one that is terminated, end."""
    running = client.submit_generate("Hello", model="chat", mode="complete", max_new_tokens=1000)
    eventually(lambda: running.state() == "running", within_s=60)
    told(sender, worker, "cancel_consumer", queue=QUEUE)
    waiting = client.submit_embed(["waits"], model="minilm")
    stamped = embed(sender)
    stamped.stamp(customer="ada")
    by_stamp = stamped.apply_async()

    told(sender, worker, "revoke", task_id=waiting.id)
    told(sender, worker, "revoke_by_stamped_headers", headers=["customer=ada"])
    told(sender, worker, "revoke", task_id=running.id, terminate=True)
    told(sender, worker, "add_consumer", queue=QUEUE)

    for job in (waiting, running):
        with pytest.raises(JobCancelledError):
            job.result(timeout_s=60)
    eventually(lambda: by_stamp.state == "REVOKED", within_s=60)
    assert client.embed(["goes on"], model="minilm").shape == (1, 384)
    eventually(lambda: told(sender, worker, "active") == [], within_s=60)


@pytest.mark.parametrize("command", ["celery -A penstock_workers purge -f", "penstock purge --all"])
def test_purged_jobs_end_for_their_callers(
    worker: WorkerProcess, client: Client, sender: Celery, server: Server, command: str
) -> None:
    """Without a list of queues purge finds all models' jobs, tenants' too, and each caller is told."""
    told(sender, worker, "cancel_consumer", queue=QUEUE)
    priorities, tenants = ("interactive", "default", "batch"), (None, "ada")
    jobs = [
        client.submit_embed(["waits"], model="minilm", priority=priority, tenant=tenant)
        for priority in priorities
        for tenant in tenants
    ]
    other = sender.send_task("penstock.embed", kwargs={"model": "other", "texts": ["a"]}, queue="cpu.other")

    purged = subprocess.run(
        [sys.executable, "-c", RUN[command.split()[0]], *command.split()[1:]],
        env=worker.environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )

    assert "7" in purged.stdout
    for job in (*jobs, ended(client, server, other.id)):
        with pytest.raises(JobCancelledError):
            job.result(timeout_s=60)
    told(sender, worker, "add_consumer", queue=QUEUE)
    assert client.embed(["goes on"], model="minilm").shape == (1, 384)


def told(sender: Celery, worker: WorkerProcess, command: str, **arguments: object) -> Any:
    """Give the worker a command; return its answer."""
    options = {
        "destination": [worker.node],
        "reply": True,
        "timeout": 10,
        "limit": 1,
    }
    answers = eventually(lambda: sender.control.broadcast(command, arguments=arguments, **options), 60)
    return next(iter(answers[0].values()))


def model_line(settings: Settings) -> str:
    """Return what `penstock status` says of the model."""
    return next(line.detail for line in read_status(settings).models if line.name == "minilm")
