"""Two workers are two, whatever they are called; and only the broker's clock decides what is late."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest
import redis
from celery import Celery

from penstock import Client
from penstock.identity import process_name, process_token
from penstock.keys import WORKERS_KEY
from penstock_workers.command.local_redis import free_port
from tests.deployment import ROOT, Server, WorkerProcess
from tests.eventually import eventually

AHEAD_S = 120
MINILM = '[models.minilm]\ntask = "embed"\nsource = "bundled:minilm"\nengine = "torch"\n'
ALONE = ("unshare", "--pid", "--fork", "--kill-child")
"""A process in a namespace of its own is number 1, as in a container."""

SENDER = """
import sys
from tests.faults.skewed import set_clock
set_clock(float(sys.argv[2]))
from penstock import Client

with Client(sys.argv[1]) as client:
    for ahead_s in (float(sys.argv[2]), 3600.0, -3600.0):  # somebody sets the clock while it runs
        set_clock(ahead_s)
        jobs = [client.submit_embed([f"{ahead_s} {i}"] * 8, model="minilm", deadline_s=60) for i in range(8)]
        for job in jobs:
            assert job.result(120).shape == (8, 384)
            assert 0 <= job.timings.queued_s < 60, job.timings
"""


def _can_unshare() -> bool:
    try:
        return subprocess.run([*ALONE, "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


@pytest.fixture(scope="module")
def broker() -> Iterator[Server]:
    """A server whose workers have wrong clocks."""
    with Server(free_port()).running() as running:
        yield running


@pytest.fixture(scope="module")
def pair(broker: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[WorkerProcess]]:
    """Two workers of one host name and process id, one two minutes fast, one two minutes slow."""
    under = ALONE if _can_unshare() else ()
    workers = [
        WorkerProcess(
            tmp_path_factory.mktemp("worker"),
            broker,
            toml=MINILM,
            queues="cpu.minilm",
            options=("-n", "celery@%h"),  # Celery's own default
            under=under,
            program=(str(ROOT / "tests/faults/skewed.py"), str(ahead_s), "celery"),
        )
        for ahead_s in (AHEAD_S, -AHEAD_S)
    ]
    try:
        for worker in workers:
            worker.wait_until_ready()
        yield workers
    finally:
        for worker in workers:
            worker.stop()


@pytest.mark.skipif(not _can_unshare(), reason="needs the right to make a namespace")
def test_workers_of_one_host_name_and_process_id_are_two(broker: Server, pair: list[WorkerProcess]) -> None:
    """Containers of one host name have processes of one id: two entries, two nodes, and neither is silent."""
    with Client(broker.broker_url) as client:
        found = client.registry().workers
    answers = Celery(broker=broker.broker_url).control.ping(timeout=30, limit=len(pair))

    assert len(found) == len(pair)
    assert len({worker.id for worker, _ in found}) == 2
    assert {(worker.host, worker.pid) for worker, _ in found} == {(socket.gethostname(), 1)}
    assert len({node for answer in answers for node in answer}) == 2


def test_a_fork_is_another_process() -> None:
    """What a fork inherits is not who it is."""
    mine = process_token()
    read, write = os.pipe()
    if not (child := os.fork()):
        os.write(write, process_token().encode())
        os._exit(0)
    os.waitpid(child, 0)

    assert os.read(read, 100).decode() not in ("", mine)
    assert process_name().endswith(mine)


@pytest.mark.parametrize("ahead_s", [-AHEAD_S, AHEAD_S])
def test_deadlines_are_by_the_brokers_clock(broker: Server, pair: list[WorkerProcess], ahead_s: int) -> None:
    """Senders and workers whose clocks are minutes off, or are set, keep deadlines; timings make sense."""
    del pair
    command = [sys.executable, "-c", SENDER, broker.broker_url, str(ahead_s)]
    sent = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)

    assert sent.returncode == 0, sent.stderr


def test_expiry_of_plain_senders_is_by_the_brokers_clock(broker: Server, pair: list[WorkerProcess]) -> None:
    """A message of Celery's own that expires in a minute is computed by a worker that is two minutes fast."""
    del pair
    app = Celery(broker=broker.broker_url, backend=broker.results_url)
    fields = {"version": 1, "model": "minilm", "texts": ["a"]}
    sent = [app.send_task("penstock.embed", kwargs=fields, queue="cpu.minilm", expires=60) for _ in range(8)]
    results = redis.Redis.from_url(broker.results_url)

    def ends() -> list[bytes | None]:
        return [results.get(f"penstock:job:{job.id}") for job in sent]

    assert eventually(lambda: all(ends()) and ends(), within_s=60) == [b"SUCCESS"] * 8


def test_entry_says_when_a_worker_started_by_the_brokers_clock(
    broker: Server, pair: list[WorkerProcess]
) -> None:
    """Entries of workers with wrong clocks agree with the server's."""
    del pair
    server = redis.Redis.from_url(broker.broker_url)

    def is_off() -> list[float]:
        now = server.time()[0]
        with Client(broker.broker_url) as client:
            return [
                now - worker.started_at
                for worker, _ in client.registry().workers
                if not 0 < now - worker.started_at < 100
            ]

    eventually(lambda: not is_off(), within_s=30, what=is_off)
    assert server.hlen(WORKERS_KEY) == 2
