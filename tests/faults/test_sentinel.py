"""A master dies behind Sentinel: clients and workers find the next one by themselves."""

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self, cast

import pytest
import redis

from penstock.broker import Broker
from penstock.codec import decode_meta
from penstock.connections import connect, connect_sync, get_large
from penstock.errors import BrokerUnavailableError
from penstock.inbox import Inbox
from penstock.keys import result_key
from penstock.request import Lane, Priority
from penstock.scripts import NO_LIMITS
from penstock.urls import locate_results
from penstock_workers.command.local_redis import free_port, wait_until_ready
from tests.deployment import BUNDLED, ROOT, WorkerProcess, server_command
from tests.eventually import eventually
from tests.faults.fleet import APP, Fleet, Worker, message
from tests.faults.fleet import Broker as Book

NAME, PASSWORD, SENTINEL_PASSWORD = "main", "hush-server", "hush-sentinel"
DOWN_AFTER_MS = 1000
FAILOVER_S = 20.0  # 1 s until it counts as down, a vote, and up to 10 s if two sentinels ask at once
RESUMED_S = 4.0  # from the next master's first moment until its first job begins
LEASE_S = 5  # longer than a failover, as the default of 20 s is


class Deployment:
    """A master, its replica and three sentinels, each a process of its own."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder, self._stack = folder, stack
        self.master_port, self.replica_port = free_port(), free_port()
        self.master = self._start_server(self.master_port)
        self._start_server(self.replica_port, "--replicaof", "127.0.0.1", str(self.master_port))
        self.replica = self._client(self.replica_port)
        eventually(lambda: self.replica.info("replication")["master_link_status"] == "up", within_s=10)
        self._sentinel_ports = ports = [free_port() for _ in range(3)]
        self.sentinels = [self._start_sentinel(port) for port in ports]
        hosts = ",".join(f"127.0.0.1:{port}" for port in ports)
        query = f"master_name={NAME}&sentinel_password={SENTINEL_PASSWORD}"
        self.broker_url = f"sentinel://:{PASSWORD}@{hosts}/0?{query}"
        self.results_url = locate_results(self.broker_url, "/1")
        for port in ports:
            self._wait_until_informed(port)

    def kill_master(self) -> None:
        """Kill it and the first sentinel, as the end of their machine does."""
        for process in (self.master, self.sentinels[0]):
            process.kill()
            process.wait()

    def relieve_master(self) -> None:
        """Make the replica the master and the master its replica, as for an upgrade."""
        port = self._sentinel_ports[0]
        with redis.Redis(port=port, password=SENTINEL_PASSWORD) as sentinel:
            sentinel.execute_command("SENTINEL", "FAILOVER", NAME)
        master = self._client(self.master_port)
        # What is written to it until then is lost.
        eventually(lambda: _role(master) == "slave" and _role(self.replica) == "master", within_s=FAILOVER_S)

    def wait_for_master(self) -> float:
        """Return when the replica became the master, Unix seconds."""
        eventually(lambda: _role(self.replica) == "master", within_s=FAILOVER_S)
        return time.time()

    def wait_for_replica(self) -> None:
        """Return when the replica has all that was written to the master before."""
        master = self._client(self.master_port)
        written = master.info("replication")["master_repl_offset"]
        eventually(lambda: self.replica.info("replication")["slave_repl_offset"] >= written)

    def _start_server(self, port: int, *options: str) -> subprocess.Popen[bytes]:
        command = server_command(port=port, folder=self._folder / str(port), password=PASSWORD)
        command += ["--masterauth", PASSWORD, "--repl-diskless-sync-delay", "0", *options]
        process = self._start(command)
        wait_until_ready(f"redis://:{PASSWORD}@127.0.0.1:{port}/0", within_s=10)
        return process

    def _start_sentinel(self, port: int) -> subprocess.Popen[bytes]:
        config = self._folder / f"sentinel-{port}.conf"
        config.write_text(
            f"port {port}\nbind 127.0.0.1\ndir {self._folder}\nrequirepass {SENTINEL_PASSWORD}\n"
            f"sentinel monitor {NAME} 127.0.0.1 {self.master_port} 2\n"
            f"sentinel auth-pass {NAME} {PASSWORD}\n"
            f"sentinel sentinel-pass {SENTINEL_PASSWORD}\n"
            f"sentinel down-after-milliseconds {NAME} {DOWN_AFTER_MS}\n"
            f"sentinel failover-timeout {NAME} 5000\n"
        )
        binary = server_command(port=port)[0]
        return self._start([binary, str(config), "--sentinel"])

    def _wait_until_informed(self, port: int) -> None:
        """Return when a sentinel knows the replica and its peers."""
        url = f"redis://:{SENTINEL_PASSWORD}@127.0.0.1:{port}"
        wait_until_ready(url, within_s=10)
        with redis.Redis.from_url(url, decode_responses=True) as sentinel:

            def knows() -> bool:
                found = sentinel.execute_command("SENTINEL", "MASTER", NAME)
                return (int(found["num-slaves"]), int(found["num-other-sentinels"])) == (1, 2)

            eventually(knows, within_s=15)

    def _client(self, port: int) -> redis.Redis:
        client = redis.Redis(port=port, password=PASSWORD, decode_responses=True)
        return self._stack.enter_context(client)

    def _start(self, command: list[str]) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._stack.callback(process.wait)
        self._stack.callback(process.kill)
        return process


def _role(server: redis.Redis) -> str:
    try:
        found: Any = server.info("replication")
    except redis.ConnectionError:  # it hangs up as it changes its role
        return ""
    return str(found["role"])


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    """A Redis behind Sentinel; all of its processes end with the test."""
    with ExitStack() as stack:
        yield Deployment(tmp_path, stack)


@pytest.fixture
def fleet(tmp_path: Path, deployment: Deployment) -> Iterator[Fleet]:
    """The book of what ran, on a server that lives on, and one worker behind Sentinel."""
    book = Book(tmp_path / "book", free_port())
    book.start()
    urls = {"broker_url": deployment.broker_url, "results_url": deployment.results_url}
    running = Fleet(tmp_path, book, **urls, options={"lease_s": LEASE_S})
    try:
        running.start()
        yield running
    finally:
        running.stop()
        book.kill()


def add(left: int, right: int, reply_to: str) -> tuple[str, bytes]:
    """Return the id and the bytes of a job with a result, and a note to a client."""
    job_id, raw = message(f"{APP}.add", [left, right])
    fields = json.loads(raw)
    fields["properties"]["reply_to"] = reply_to
    return job_id, json.dumps(fields).encode()


class Caller:
    """What `AsyncClient` is made of, sending to a worker without a model.

    Attributes:
        n_refused: how often there was no master to send to.
    """

    def __init__(self, deployment: Deployment) -> None:
        self.n_refused = 0
        self._broker = Broker(deployment.broker_url)
        self._results = connect(deployment.results_url)
        self._inbox = Inbox(self._results, deployment.results_url, "caller")

    async def __aenter__(self) -> Self:
        await self._inbox.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._inbox.close()
        await self._results.aclose()
        await self._broker.close()

    async def work(self, name: str, seconds: float) -> None:
        """Send a job without a result."""
        await self._send(message(f"{APP}.work", [name, seconds])[1])

    async def add(self, left: int, right: int) -> int:
        """Send a job, again while there is no master, and return its result when its note has come."""
        job_id, raw = add(left, right, self._inbox.reply_to)
        note = self._inbox.expect(job_id)
        async with asyncio.timeout(FAILOVER_S):
            while not await self._is_sent(raw):
                self.n_refused += 1
                await asyncio.sleep(0.1)
            while (stored := await self._results.get(result_key(job_id))) is None:
                await note.wait()
                note.clear()  # a reconnect sets it too
        return int(decode_meta(stored)["result"])

    async def _send(self, raw: bytes) -> None:
        await self._broker.push("celery", Lane(Priority.INTERACTIVE), raw, limits=NO_LIMITS)

    async def _is_sent(self, raw: bytes) -> bool:
        try:
            await self._send(raw)
        except BrokerUnavailableError:
            return False
        return True


async def work_through(deployment: Deployment, fleet: Fleet, failover: Callable[[], None]) -> int:
    """Let the master change while 4 jobs run and 8 wait; all run, and 4 that are sent afterwards.

    Returns:
        How often the caller found no master to send to.
    """
    before, after = ([f"{when}{number}" for number in range(n)] for when, n in (("before", 12), ("after", 4)))
    async with Caller(deployment) as caller:
        assert await caller.add(1, 1) == 2
        for name in before:
            await caller.work(name, 1.0)
        await asyncio.to_thread(eventually, lambda: len(fleet.runs()) >= 4)
        await asyncio.to_thread(deployment.wait_for_replica)

        await asyncio.to_thread(failover)
        changing = asyncio.create_task(asyncio.to_thread(deployment.wait_for_master))

        assert await caller.add(2, 1) == 3
        changed_at = await changing
        for name in after:
            await caller.work(name, 0.0)
    await asyncio.to_thread(eventually, lambda: not {*before, *after} - fleet.runs().keys(), 15)
    assert min(at for at in fleet.began_at().values() if at > changed_at) - changed_at < RESUMED_S
    return caller.n_refused


def assert_on_the_replica(deployment: Deployment, worker: Worker) -> None:
    """Check that the master is another, that nothing is held there, and that no log holds a password."""
    with connect_sync(deployment.broker_url) as master:
        server: Any = master.info()
        eventually(lambda: not master.hlen("unacked"))
    assert (server["role"], server["tcp_port"]) == ("master", deployment.replica_port)
    assert worker.process.poll() is None
    assert PASSWORD not in worker.log
    assert SENTINEL_PASSWORD not in worker.log


def test_a_large_result_comes_from_the_master(deployment: Deployment) -> None:
    """What is read past redis-py comes through the connection that Sentinel found."""
    payload = os.urandom(1 << 20)
    with connect_sync(deployment.broker_url) as master:
        master.set("large", payload)

        assert get_large(master, "large") == payload


def test_no_remote_command_tells_a_password(deployment: Deployment, tmp_path: Path) -> None:
    """What `celery inspect` and Flower show of a worker holds no password."""
    worker = WorkerProcess(tmp_path, cast("Any", deployment), toml=BUNDLED, queues="cpu.minilm")
    try:
        worker.wait_until_ready()
        inspect = [sys.executable, "-m", "celery", "-A", "penstock_workers", "inspect"]
        inspect += ["-t", "30", "-d", worker.node]  # it waits for its whole time unless it knows who answers
        for command in ("stats", "conf"):
            shown = subprocess.run(
                [*inspect, command],
                env=worker.environment,
                cwd=ROOT,
                capture_output=True,
                text=True,
                check=True,
            )
            assert "1 node online" in shown.stdout
            assert PASSWORD not in shown.stdout
            assert SENTINEL_PASSWORD not in shown.stdout
    finally:
        worker.stop()


def test_a_killed_master_is_survived(deployment: Deployment, fleet: Fleet) -> None:
    """What the replica had when the master died runs, and what is sent to the next one, results included.

    The first sentinel dies with the master, and the two others suffice. Replication is asynchronous: the test
    waits for the replica before it kills. Without that, what was sent in the last moments is lost, and what
    was acknowledged in them runs again.
    """
    n_refused = asyncio.run(work_through(deployment, fleet, deployment.kill_master))

    assert n_refused > 0
    assert sum(fleet.runs().values()) <= 12 + 4 + 4  # again: what the worker held
    assert_on_the_replica(deployment, fleet.workers[0])


def test_a_master_that_was_relieved_is_left(deployment: Deployment, fleet: Fleet) -> None:
    """After `SENTINEL FAILOVER` the old master lives on as a replica: nobody stays with it.

    For some seconds both are masters. What the old one is told in them is lost: jobs that are acknowledged
    there run again, once.
    """
    asyncio.run(work_through(deployment, fleet, deployment.relieve_master))

    assert max(fleet.runs().values()) <= 2
    assert_on_the_replica(deployment, fleet.workers[0])
