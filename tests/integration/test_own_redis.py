"""The Redis that `penstock up` starts: for its user alone, and found by whoever of them stands beside it."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from penstock import BrokerRefusedError, Client, UnknownModelError
from penstock_workers.command.local_redis import free_port
from tests.deployment import Server
from tests.eventually import eventually

PENSTOCK = str(Path(sys.executable).with_name("penstock"))
MINILM = '[models.minilm]\ntask = "embed"\nsource = "bundled:minilm"\nengine = "torch"\n'


class Stack:
    """A running `penstock up` that has a Redis of its own."""

    def __init__(self, folder: Path, *, redis_section: str = "", models: str = MINILM) -> None:
        self.folder, self.log = folder, folder / "log"
        config = folder / "stack.toml"
        config.write_text(f"{redis_section}[pools.cpu]\nprocesses = 1\n[flower]\nport = 0\n{models}")
        self.environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache"), "NO_COLOR": "1"}
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [PENSTOCK, "up", "--config", str(config)],
                cwd=folder,
                env=self.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                umask=0o022,
            )

    @property
    def url(self) -> str:
        """What it tells clients to connect to."""
        return eventually(
            lambda: re.findall(r'clients: Client\("(.+)"\)', self.log.read_text()), within_s=60
        )[0]

    def run(self, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command in another terminal of this user."""
        return subprocess.run(
            [PENSTOCK, *arguments],
            cwd=cwd or self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """One worker process, and a Redis on the port that was free."""
    running = Stack(tmp_path_factory.mktemp("own"))
    try:
        eventually(lambda: "penstock | ready" in running.log.read_text(), within_s=100)
        yield running
    finally:
        running.process.send_signal(signal.SIGINT)
        running.process.wait(60)


def secret(stack: Stack) -> str:
    """Return the password."""
    (file,) = (stack.folder / "cache/penstock/stacks").iterdir()
    password: str = json.loads(file.read_text())["password"]
    return password


def test_status_finds_the_stack_whatever_its_port(stack: Stack, tmp_path: Path) -> None:
    """In its folder and in any other; it says which stack it describes, and no password."""
    for folder in (stack.folder, tmp_path):
        found = stack.run("status", cwd=folder)
        assert found.returncode == 0, found.stderr
        lines = found.stdout.splitlines()
        assert lines[0] == f"stack   process {stack.process.pid} in {stack.folder}, Redis at {stack.url}"
        assert lines[-1] == "ready"
    told = json.loads(stack.run("status", "--json").stdout)
    assert told["is_ready"]
    assert told["redis"] == stack.url
    assert "cpu.minilm" in stack.run("queues").stdout
    assert stack.run("dead", "list").stdout == "no dead letters\n"
    assert json.loads(stack.run("dead", "list", "--json").stdout) == []


NAMED = f'[redis]\nbroker_url = "{{url}}"\n{MINILM}'
CELERY = [sys.executable, "-m", "celery", "-A", "penstock_workers"]


@pytest.mark.parametrize("how", ["in its folder", "by its URL"])
def test_a_worker_that_is_started_beside_it_joins(stack: Stack, how: str) -> None:
    """`penstock worker` in the same folder, and Celery's own told its URL, need no password."""
    (stack.folder / "named.toml").write_text(NAMED.format(url=stack.url))
    environment = {**stack.environment, "PENSTOCK_WORKER__HEARTBEAT_FILE": str(stack.folder / "ready")}
    command = [PENSTOCK, "worker", "--pool", "cpu", "--config", "stack.toml"]
    if how == "by its URL":
        command = [*CELERY, "worker", "-Q", "cpu.minilm", "-n", "second@%h", "-l", "info"]
        environment["PENSTOCK_CONFIG"] = "named.toml"
    with (stack.folder / "second.log").open("wb") as output:
        second = subprocess.Popen(
            command, cwd=stack.folder, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        log = stack.folder / "second.log"
        eventually(lambda: second.poll() is not None or " ready." in log.read_text(), within_s=100)
        assert second.poll() is None, log.read_text()
        eventually(lambda: "2 in cpu" in stack.run("status").stdout, within_s=60)
    finally:
        second.terminate()
        second.wait(60)
    eventually(lambda: "1 in cpu" in stack.run("status").stdout, within_s=60)


@pytest.mark.parametrize("config", ["stack.toml", "named.toml"])
def test_celerys_commands_are_let_in(stack: Stack, config: str) -> None:
    """`celery inspect` in its folder, and anywhere with its URL."""
    (stack.folder / "named.toml").write_text(NAMED.format(url=stack.url))
    (node,) = eventually(lambda: re.findall(r"(cpu-1-\S+) ready\.", stack.log.read_text()), within_s=60)

    found = subprocess.run(
        [*CELERY, "inspect", "ping", "--timeout", "60", "--destination", node],
        cwd=stack.folder,
        env={**stack.environment, "PENSTOCK_CONFIG": config},
        capture_output=True,
        text=True,
        check=False,
    )

    assert found.returncode == 0, found.stdout + found.stderr
    assert "pong" in found.stdout


def test_up_says_when_it_is_ready(stack: Stack) -> None:
    """Once, in a line of its own."""
    line = "penstock | ready: minilm; Ctrl-C stops"

    assert eventually(lambda: stack.log.read_text().splitlines().count(line), within_s=60) == 1


def test_the_command_that_up_names_can_be_typed(stack: Stack) -> None:
    """Its status is a copy away, whether or not the shell finds `penstock` by its name."""
    (line,) = re.findall(r"^penstock \| status:  (.+)$", stack.log.read_text(), re.M)

    found = subprocess.run(
        line,
        shell=True,  # as it is typed
        cwd=stack.folder,
        env=stack.environment,
        capture_output=True,
        text=True,
        check=False,
    )

    assert found.returncode == 0, found.stderr
    assert found.stdout.endswith("ready\n")


def test_who_asks_another_redis_is_told_where_the_stack_is(
    stack: Stack, own: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Redis that was asked is named, and the one that was meant."""
    monkeypatch.setenv("XDG_CACHE_HOME", stack.environment["XDG_CACHE_HOME"])

    with Client(own.broker_url) as client, pytest.raises(UnknownModelError) as caught:
        client.embed(["a text"], model="minilm")

    told = str(caught.value)
    assert told.startswith(f"model 'minilm' is not served at {own.broker_url}; known models: none")
    assert told.endswith(f"elsewhere: process {stack.process.pid} in {stack.folder}, Redis at {stack.url}")


def test_a_configured_broker_is_asked_instead(stack: Stack, server: Server) -> None:
    """Who names a Redis means that one."""
    found = stack.run("status", "--set", f"redis.broker_url={server.broker_url}")

    assert found.stdout.splitlines()[0] == f"Redis   {server.broker_url}"


def test_its_user_connects_by_the_url_that_is_printed(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """No password is typed, copied or shown; another user, who has none, is refused."""
    wrong = stack.url.replace("//", "//:wrong@")
    for url, told in ((stack.url, "this Redis wants a password: redis:"), (wrong, "no such user")):
        with Client(url) as client, pytest.raises(BrokerRefusedError, match=told):
            client.models()
    monkeypatch.setenv("XDG_CACHE_HOME", stack.environment["XDG_CACHE_HOME"])

    with Client(stack.url) as client:
        assert client.embed(["a text"], model="minilm", timeout_s=60).shape == (1, 384)


def test_other_users_reach_and_read_nothing(stack: Stack) -> None:
    """Redis asks for a password that no process list shows, and its files are this user's."""
    with redis.Redis.from_url(stack.url) as anonymous, pytest.raises(redis.AuthenticationError):
        anonymous.ping()
    data = stack.folder / ".penstock/redis"
    modes = {path.stat().st_mode & 0o077 for path in (data, *data.rglob("*"))}
    lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if _is_readable(path)]

    assert len(list(data.rglob("*"))) > 2
    assert modes == {0}
    assert not [line for line in lines if secret(stack).encode() in line]
    assert secret(stack) not in stack.log.read_text()


def test_a_second_stack_in_the_same_folder_is_refused(stack: Stack) -> None:
    """Both would write the same files."""
    second = stack.run("up", "--config", "stack.toml")

    assert second.returncode == os.EX_CONFIG
    assert second.stderr.startswith("a stack runs in this folder: process")


@pytest.mark.parametrize("how", ["url", "variable", "file"])
def test_the_password_of_a_configured_redis_is_not_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """`penstock up` says that there is one; its file, which others of the user read, holds none."""
    with Server(free_port(), "hush-hush").running() as server:
        url = server.broker_url if how == "url" else server.broker_url.replace(":hush-hush@", "")
        section = f'[redis]\nbroker_url = "{url}"\nresults_url = "{url[:-1]}1"\n'
        if how == "variable":
            monkeypatch.setenv("PENSTOCK_REDIS__PASSWORD", "hush-hush")
        elif how == "file":
            (tmp_path / "secret").write_text("hush-hush")
            monkeypatch.setenv("PENSTOCK_REDIS__PASSWORD_FILE", str(tmp_path / "secret"))
        stack = Stack(tmp_path, redis_section=section)
        try:
            files = tmp_path / "cache/penstock/stacks"
            (file,) = eventually(lambda: files.is_dir() and list(files.iterdir()), within_s=60)
            told = eventually(file.read_text, within_s=60)
        finally:
            stack.process.terminate()
            stack.process.wait(60)
        log = stack.log.read_text()

    assert "hush-hush" not in log + told
    assert f"@127.0.0.1:{server.port}/0" in log if how == "url" else f"//127.0.0.1:{server.port}/0" in log
    assert ", with its password" in log
    assert not list(files.iterdir())


def _is_readable(path: Path) -> bool:
    try:
        path.read_bytes()
    except OSError:
        return False
    return True
