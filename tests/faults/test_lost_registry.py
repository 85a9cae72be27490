"""What a worker writes once is there again after the server has lost it."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Celery

from penstock import Client
from penstock.keys import ANNOUNCED_KEY, MODELS_KEY, RESULTS_KEY, TENANTS_KEY, WORKERS_KEY
from penstock_workers.command.local_redis import free_port
from tests.deployment import ROOT, Server, WorkerProcess
from tests.eventually import eventually
from tests.faults.fleet import Broker

TOML = """
[models.minilm]
task = "embed"
source = "bundled:minilm"
engine = "torch"
[tenants.alice]
share = 3
tokens_per_minute = 600000
"""
FLUSH = "FLUSHALL"


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """A server that can be replaced by another one on its port."""
    found = Broker(tmp_path_factory.mktemp("broker"), free_port())
    found.start()
    yield found
    found.kill()


@pytest.fixture(scope="module")
def worker(broker: Broker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    """A worker that announced itself once, a model and a tenant."""
    server = Server(int(broker.url.rpartition(":")[2]))
    process = WorkerProcess(tmp_path_factory.mktemp("worker"), server, toml=TOML, queues="cpu.minilm")
    try:
        process.wait_until_ready()
        yield process
    finally:
        process.stop()


def told(server: redis.Redis) -> dict[str, Any]:
    """Return what workers have told it once."""
    sets = {name.decode(): server.smembers(name) for name in server.keys("_kombu.binding*cpu.minilm")}
    return sets | {
        MODELS_KEY: server.hgetall(MODELS_KEY),
        RESULTS_KEY: server.get(RESULTS_KEY),
        TENANTS_KEY: server.hgetall(TENANTS_KEY),
        WORKERS_KEY: server.hkeys(WORKERS_KEY),
        ANNOUNCED_KEY: sorted(server.hkeys(ANNOUNCED_KEY)),
    }


@pytest.mark.parametrize(
    "commands",
    [
        [FLUSH],
        ["FLUSHDB"],
        [f"DEL {MODELS_KEY}"],
        [f"HDEL {MODELS_KEY} minilm"],
        [f"HSET {MODELS_KEY} minilm {{}}"],
        [f"DEL {RESULTS_KEY}", f"DEL {TENANTS_KEY}"],
        [f"DEL {ANNOUNCED_KEY}", "DEL _kombu.binding.cpu.minilm", f"DEL {WORKERS_KEY}"],
        [FLUSH, "SCRIPT FLUSH"],
    ],
)
def test_what_was_told_once_is_there_again(
    broker: Broker, worker: WorkerProcess, commands: list[str]
) -> None:
    """Whatever of it is lost comes back with a heartbeat, and a client that knew the model waits for that."""
    server = redis.Redis.from_url(broker.broker_url)
    with Client(broker.broker_url) as client:
        client.embed(["a"], model="minilm")
        eventually(lambda: server.hlen(ANNOUNCED_KEY) == 4, within_s=30)
        before = told(server)

        for command in commands:
            server.execute_command(*command.split())
        vectors = client.embed(["a"], model="minilm", tenant="alice", timeout_s=60)

        assert vectors.shape == (1, 384)
        eventually(lambda: told(server) == before, within_s=60, what=lambda: (before, told(server)))
    assert before[TENANTS_KEY] == {b"alice": b"3 10000"}
    assert worker.process.poll() is None


def test_an_empty_server_on_the_same_port_is_told_everything(
    broker: Broker, worker: WorkerProcess, tmp_path: Path
) -> None:
    """A server without a disk that was restarted, or another in its place."""
    before = told(redis.Redis.from_url(broker.broker_url))
    port = int(broker.url.rpartition(":")[2])
    broker.kill()
    empty = Broker(tmp_path / "empty", port)
    empty.start()
    try:
        server = redis.Redis.from_url(empty.broker_url)
        eventually(lambda: told(server) == before, within_s=60, what=lambda: (before, told(server)))
        with Client(empty.broker_url) as client:
            assert client.embed(["a"], model="minilm", timeout_s=60).shape == (1, 384)
    finally:
        empty.kill()
        broker.start()
    eventually(lambda: server.hlen(WORKERS_KEY) == 1, within_s=60)
    assert worker.process.poll() is None


def test_a_celery_sender_that_declared_its_queue_before_the_loss_reaches_workers(
    broker: Broker, worker: WorkerProcess
) -> None:
    """Stock Celery declares a queue once; without its table it would drop messages in silence."""
    del worker
    server = redis.Redis.from_url(broker.broker_url)
    results = redis.Redis.from_url(broker.results_url)
    app = Celery(broker=broker.broker_url, backend=broker.results_url)
    fields = {"version": 1, "model": "minilm", "texts": ["a"]}

    def end(job: Any) -> bytes | None:
        return results.get(f"penstock:job:{job.id}")

    with app.producer_pool.acquire(block=True) as producer:
        first = app.send_task("penstock.embed", kwargs=fields, queue="cpu.minilm", producer=producer)
        assert eventually(lambda: end(first), within_s=60) == b"SUCCESS"
        server.flushdb()
        eventually(lambda: server.exists("_kombu.binding.cpu.minilm"), within_s=30)
        second = app.send_task("penstock.embed", kwargs=fields, queue="cpu.minilm", producer=producer)

        assert eventually(lambda: end(second), within_s=60) == b"SUCCESS"


def test_an_old_snapshot_is_brought_up_to_date(broker: Broker, worker: WorkerProcess) -> None:
    """What an earlier deployment told, and a restored snapshot still says, gives way to living workers."""
    del worker
    server = redis.Redis.from_url(broker.broker_url)
    now = json.loads(server.hget(MODELS_KEY, "minilm"))

    server.hset(MODELS_KEY, "minilm", json.dumps(now | {"max_texts": 7}))
    server.hset(ANNOUNCED_KEY, "model:minilm", "1700000000000 1700000000")
    server.hset(TENANTS_KEY, "alice", "1 1")
    server.hset(ANNOUNCED_KEY, "tenant:alice", "1700000000000 1700000000")

    eventually(lambda: json.loads(server.hget(MODELS_KEY, "minilm")) == now, within_s=30)
    eventually(lambda: server.hget(TENANTS_KEY, "alice") == b"3 10000", within_s=30)


def test_callers_at_work_see_no_loss(broker: Broker, worker: WorkerProcess) -> None:
    """Calls that begin while the server has nothing succeed a heartbeat later."""
    del worker
    server = redis.Redis.from_url(broker.broker_url)
    with Client(broker.broker_url) as client:
        client.embed(["a"], model="minilm", timeout_s=60)

        server.delete(MODELS_KEY, RESULTS_KEY, ANNOUNCED_KEY)
        with ThreadPoolExecutor(4) as callers:
            calls = [
                callers.submit(client.embed, [f"text {n}"], model="minilm", timeout_s=60) for n in range(40)
            ]

        assert [call.result().shape for call in calls] == [(1, 384)] * 40


ASKER = """
import os, sys
from celery import Celery
app = Celery(broker=sys.argv[1])
app.control.mailbox(app.connection_for_write())._publish("ping", {}, reply_ticket="t")
os._exit(1)
"""


def documented() -> dict[re.Pattern[str], str]:
    """Return what bounds a key, by its pattern, as docs/reference/keys.md says it."""
    found = {}
    lines = (ROOT / "docs/reference/keys.md").read_text().splitlines()
    for line in (line for line in lines if line.startswith("| `")):
        names, *_, bound = line.removeprefix("| ").removesuffix(" |").split(" | ")
        for name in re.findall(r"`([^`]+)`", names):
            known = name.replace(r"\x06", "\x06").replace(r"\x16", "\x16").replace(r"\x17", "\x17")
            parts = re.split(r"<(\w+)[^>]*>", known)
            kinds = {"queue": r"[cg]pu\.[\w.-]+", "list": r"[cg]pu\.[\w.-]+(\x06\x16\d)?(\x06\x17\w+)?"}
            texts = [kinds.get(part, ".+") if i % 2 else re.escape(part) for i, part in enumerate(parts)]
            found[re.compile("".join(texts))] = bound
    return found


def test_every_key_is_one_whose_bound_is_told(
    broker: Broker, worker: WorkerProcess, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """After jobs, commands, askers and workers that were killed, each key left is bounded as documented."""
    del worker
    server, port = redis.Redis.from_url(broker.broker_url), int(broker.url.rpartition(":")[2])
    other = WorkerProcess(tmp_path_factory.mktemp("killed"), Server(port), toml=TOML, queues="cpu.minilm")
    # The worker that the tests before took the server from may have told of itself, and not yet of its model.
    eventually(lambda: server.hlen(WORKERS_KEY) == 2 and server.hlen(MODELS_KEY), within_s=60)
    with Client(broker.broker_url) as client:
        for tenant in (None, "alice"):
            client.submit_embed(["a"], model="minilm", tenant=tenant, priority="batch").result(60)
        client.submit_embed(["a"], model="minilm").cancel()
    app = Celery(broker=broker.broker_url)
    assert app.control.ping(timeout=5)
    app.send_task("penstock.embed", kwargs={}, queue="cpu.minilm", countdown=3600)
    subprocess.run([sys.executable, "-c", ASKER, broker.broker_url], check=False)
    eventually(lambda: server.keys("*.reply.celery.pidbox"), within_s=30)
    other.process.kill()
    other.process.wait()

    bounds, problems = documented(), []
    for url in (broker.broker_url, broker.results_url):
        database = redis.Redis.from_url(url)
        for key in database.scan_iter():
            told = [bound for name, bound in bounds.items() if name.fullmatch(key.decode())]
            if not told or (told[0].startswith("time") and database.ttl(key) == -1):
                problems.append((key, told))

    assert len(bounds) > 30
    assert problems == []
