"""The users of configs/users.acl can do what the code does, and nothing else."""

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import redis
from redis.exceptions import NoPermissionError

import penstock
from penstock import Client, JobCancelledError, JobState, PenstockError
from penstock.keys import DEAD_KEY
from penstock_workers.command.local_redis import free_port, wait_until_ready
from penstock_workers.configuration import load_settings
from penstock_workers.serving.app import build_app
from tests.deployment import BUNDLED, ROOT, Server, WorkerProcess, server_command
from tests.eventually import eventually
from tests.faults.fleet import message
from tests.upstream import DIM, Upstream, says

USERS = ROOT / "configs" / "users.acl"
PLAIN_CELERY = """
import sys
from celery import Celery
if sys.argv[2] == "ours":
    from penstock_workers.delivery.transport import install
    install()
app = Celery(broker=sys.argv[1])
for options in ({}, {"priority": 9}, {"countdown": 60}):
    app.send_task("penstock.embed", kwargs={}, queue="cpu.minilm", **options)
"""
TOML = BUNDLED.split("[models.chat]")[0] + "cache = {}\n"


class GuardedServer(Server):
    """A Valkey with those users; its own URLs are the workers'."""

    def __init__(self) -> None:
        super().__init__(free_port())
        self.broker_url, self.results_url = self.url("worker", 0), self.url("worker", 1)

    def url(self, user: str, database: int) -> str:
        """Return the URL of one user; the passwords are the placeholders."""
        return f"redis://{user}:change-me-{user}@127.0.0.1:{self.port}/{database}"

    @contextmanager
    def running(self) -> Iterator["GuardedServer"]:
        """Run it while the block runs; keeps nothing."""
        command = [*server_command(port=self.port), "--include", str(USERS)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            wait_until_ready(self.url("operator", 0), within_s=10)
            yield self
        finally:
            process.kill()
            process.wait()

    @contextmanager
    def user(self, name: str) -> Iterator[redis.Redis]:
        """Connect as one of the users."""
        with redis.Redis.from_url(self.url(name, 0), decode_responses=True) as connected:
            yield connected

    def denied(self) -> list[str]:
        """Return what the server refused."""
        with self.user("operator") as operator:
            return [f"{entry['username']}: {entry['object']}" for entry in operator.acl_log()]


@pytest.fixture(scope="module")
def guarded() -> Iterator[GuardedServer]:
    """A server without workers, for what is refused."""
    with GuardedServer().running() as running:
        yield running


@pytest.fixture
def fresh() -> Iterator[GuardedServer]:
    """A server whose log of refusals is this test's."""
    with GuardedServer().running() as running:
        yield running


def test_the_users_can_do_their_work(fresh: GuardedServer, tmp_path: Path) -> None:
    """Jobs, states, cancelling, many texts, delays, dead letters, inspection: nothing of it is refused."""
    worker = WorkerProcess(tmp_path, fresh, toml=TOML, queues="cpu.minilm")
    try:
        worker.wait_until_ready()
        with Client(fresh.url("producer", 0)) as client, fresh.user("operator") as operator:
            job = client.submit_embed(["a text"], model="minilm")
            assert job.result(timeout_s=20).shape == (1, 384)
            assert client.job(job.id).result(timeout_s=20).shape == (1, 384)
            job.forget()
            assert job.state() is JobState.EXPIRED
            long = client.submit_embed(["slow " * 250] * 100, model="minilm")
            assert long.state() in (JobState.WAITING, JobState.RUNNING)
            assert long.cancel()
            with pytest.raises(JobCancelledError):
                long.result(timeout_s=5)
            parts = list(client.embed_many((f"text {i}" for i in range(200)), model="minilm", timeout_s=30))
            assert sum(map(len, parts)) == 200

            later = datetime.now(UTC) + timedelta(seconds=1)
            _, delayed = message("penstock.embed", [], queue="cpu.minilm", eta=later.isoformat())
            operator.lpush("cpu.minilm", "not a message", delayed)
            eventually(lambda: operator.llen(DEAD_KEY) == 1)
            eventually(lambda: operator.zcard("penstock:due") == 1)
            eventually(lambda: operator.zcard("penstock:due") == operator.hlen("unacked") == 0)
        config = tmp_path / "flower.toml"
        config.write_text(f'[redis]\nbroker_url = "{fresh.url("flower", 0)}"\n{TOML}')
        with build_app(load_settings(config, environ={}).settings) as flower:
            with flower.connection_for_read() as connection:
                receiver = flower.events.Receiver(connection)
                receiver.handlers = {"worker-heartbeat": lambda _: setattr(receiver, "should_stop", True)}
                receiver.capture(timeout=10)  # raises if none comes
            assert len(flower.control.ping(timeout=20, limit=1)) == 1
    finally:
        worker.stop()

    assert fresh.denied() == []


def test_workers_may_share_what_they_know_of_a_server(fresh: GuardedServer, tmp_path: Path) -> None:
    """Holds, failures and rates of remote models: nothing of it is refused."""
    with Upstream().running() as upstream:
        upstream.plan += [says(429, Retry_After="0.2"), says(500)]
        toml = (
            f'[models.hosted]\ntask = "embed"\nengine = "remote"\nsource = "{upstream.url}/v1"\n'
            f"remote = {{ dim = {DIM} }}\n"
            "rate_limit = { requests_per_minute = 600, tokens_per_minute = 6000 }\n"
        )
        worker = WorkerProcess(tmp_path, fresh, toml=toml, queues="cpu.hosted")
        try:
            worker.wait_until_ready()
            with Client(fresh.url("producer", 0)) as client:
                assert client.embed(["a text"], model="hosted").shape == (1, DIM)
        finally:
            worker.stop()

    assert fresh.denied() == []


@pytest.mark.parametrize(("transport", "lengths"), [("stock", [2, 1, 0]), ("ours", [1, 1, 1])])
def test_plain_celery_can_send(fresh: GuardedServer, transport: str, lengths: list[int]) -> None:
    """Celery's own producer, with either transport: at once, with a priority, with a countdown."""
    command = [sys.executable, "-c", PLAIN_CELERY, fresh.url("celery-producer", 0), transport]

    subprocess.run(command, check=True, capture_output=True, text=True)

    with fresh.user("operator") as operator:
        found = [operator.llen("cpu.minilm"), operator.llen("cpu.minilm\x06\x169")]
        assert [*found, operator.zcard("penstock:due")] == lengths
    assert fresh.denied() == []


@pytest.mark.parametrize("user", ["producer", "celery-producer"])
@pytest.mark.parametrize(
    "command",
    [
        # other people's jobs and results
        "LRANGE cpu.minilm 0 -1",
        "RPOP cpu.minilm",
        "LTRIM cpu.minilm 0 -1",
        "DEL cpu.minilm",
        "BRPOP penstock:wake:cpu.minilm 1",
        "HGETALL unacked",
        "HGET unacked tag",
        "HDEL unacked tag",
        "HGETALL penstock:leases",
        "HGETALL penstock:delayed",
        "HDEL penstock:delayed tag",
        "ZREM penstock:due tag",
        "LRANGE penstock:dead 0 -1",
        "LPUSH penstock:dead x",
        "KEYS *",
        "SCAN 0",
        "RANDOMKEY",
        "PSUBSCRIBE penstock:reply:*",
        "PSUBSCRIBE *",
        # which of others' jobs were cancelled: their ids open results and streams
        "SUBSCRIBE penstock:cancelled",
        "PSUBSCRIBE penstock:cancelled",
        "SSUBSCRIBE penstock:cancelled",
        "ZRANGE penstock:cancelled 0 -1",
        "ZPOPMIN penstock:cancelled",
        "ZSCAN penstock:cancelled 0",
        "XREAD STREAMS penstock:stream:x 0",
        "DEL penstock:stream:x",
        "PUBLISH penstock:cancelled:other x",
        # the registry, and other keys
        "HSET penstock:models minilm {}",
        "HDEL penstock:workers x",
        "SET penstock:results redis://elsewhere",
        "GET other",
        "SET other x",
        "LPUSH other x",
        # workers
        "PUBLISH /0.celery.pidbox {}",
        "SUBSCRIBE /0.celery.pidbox",
        "PUBLISH /0.celeryev/worker.heartbeat {}",
        "LPUSH x.reply.celery.pidbox x",
        "SADD _kombu.binding.celery.pidbox x",
        # the server
        "FLUSHALL",
        "FLUSHDB",
        "CONFIG GET *",
        "CONFIG SET maxmemory 1",
        "ACL LIST",
        "ACL SETUSER producer +@all",
        "CLIENT LIST",
        "CLIENT KILL TYPE normal",
        "SCRIPT FLUSH",
        "SCRIPT KILL",
        "FUNCTION LIST",
        "MONITOR",
        "SAVE",
        "REPLICAOF 127.0.0.1 1",
        "SHUTDOWN NOSAVE",
    ],
)
def test_a_producer_is_refused(guarded: GuardedServer, user: str, command: str) -> None:
    """A sender reads nothing of others, controls no worker and no server, and not from a script either."""
    words = command.split()
    call = ", ".join(f"'{word}'" for word in words)
    with guarded.user(user) as producer, guarded.user("operator") as operator:
        with pytest.raises(NoPermissionError):
            producer.execute_command(*words)
        with pytest.raises(redis.ResponseError, match=r"ACL failure|not allowed from script|Unknown Redis"):
            producer.eval(f"return redis.call({call})", 0)

        assert operator.ping()


@pytest.mark.parametrize(
    ("user", "command"),
    [
        ("worker", "LRANGE penstock:dead 0 -1"),
        ("worker", "GET other"),
        ("worker", "KEYS *"),
        ("worker", "FLUSHALL"),
        ("worker", "CONFIG SET maxmemory 1"),
        ("worker", "CLIENT KILL TYPE normal"),
        ("worker", "SUBSCRIBE other"),
        ("worker", "ACL LIST"),
        ("flower", "LRANGE cpu.minilm 0 -1"),
        ("flower", "LPUSH cpu.minilm x"),
        ("flower", "GET celery-task-meta-x"),
        ("flower", "LRANGE penstock:dead 0 -1"),
        ("flower", "HGETALL unacked"),
        ("flower", "FLUSHALL"),
    ],
)
def test_workers_and_flower_are_refused(guarded: GuardedServer, user: str, command: str) -> None:
    """Neither reads dead letters or keys of others, nor administers the server; Flower sees no job."""
    with guarded.user(user) as connected, pytest.raises(NoPermissionError):
        connected.execute_command(*command.split())


def test_nobody_comes_in_without_a_name(guarded: GuardedServer) -> None:
    """The default user is switched off."""
    with (
        Client(f"redis://127.0.0.1:{guarded.port}/0") as client,
        pytest.raises(PenstockError, match="refused"),
    ):
        client.models()


def test_workers_may_run_every_command_of_every_script(guarded: GuardedServer) -> None:
    """Also those of rare paths: a takeover that is refused a command would lose jobs."""
    files = (Path(penstock.__file__).parent / "lua").glob("*.lua")
    texts = [path.read_text() for path in files if path.stem != "revive"]
    called = {name for text in texts for name in re.findall(r"redis\.p?call\('(\w+)'", text)}
    called |= {"RPUSH", "LPUSH"}  # chosen at run time
    called -= {"ZREMRANGEBYRANK", "EXPIRE"}  # of cancelling, which is the callers' business

    with guarded.user("operator") as operator:
        allowed = operator.acl_getuser("worker")["commands"]

    assert len(called) > 20
    assert {f"+{name.lower()}" for name in called} <= set(allowed)
