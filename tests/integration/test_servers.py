"""What cannot work well with a server is said at the start, in one line."""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis

from penstock import BrokerRefusedError, Client
from penstock.errors import ConfigError
from penstock_workers.command.local_redis import free_port
from penstock_workers.configuration import load_settings
from penstock_workers.preflight import check_servers
from penstock_workers.settings import Settings
from tests.deployment import BUNDLED, ROOT, Server, server_command
from tests.eventually import eventually


@contextmanager
def cluster(folder: Path) -> Iterator[str]:
    """Run a server in cluster mode; gives its URL."""
    port = free_port()
    # Its other port would be this one plus 10,000, which may be taken, or none.
    command = [*server_command(port=port), "--cluster-enabled", "yes", "--cluster-port", str(free_port())]
    command += ["--dir", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with redis.Redis(port=port) as probe:
            eventually(lambda: answers(probe), within_s=30)
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        process.kill()
        process.wait()


def answers(probe: redis.Redis) -> bool:
    """Whether the server is up."""
    try:
        return bool(probe.ping())
    except redis.ConnectionError:
        return False


@contextmanager
def old_server(reply: bytes) -> Iterator[str]:
    """Run what answers every command as a server does that is none of ours; gives its URL."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            while True:
                try:
                    link, _ = listening.accept()
                except OSError:
                    return
                with link:
                    while link.recv(4096):
                        link.sendall(reply)

        threading.Thread(target=serve, daemon=True).start()
        yield f"redis://127.0.0.1:{listening.getsockname()[1]}/0"


def settings(broker_url: str, results_url: str = "") -> Settings:
    """Return settings that name these servers."""
    environ = {
        "PENSTOCK_REDIS__BROKER_URL": broker_url,
        "PENSTOCK_REDIS__RESULTS_URL": results_url or broker_url,
    }
    return load_settings(None, environ=environ).settings


VERSION_6 = (
    b"%5\r\n$6\r\nserver\r\n$5\r\nredis\r\n$7\r\nversion\r\n$6\r\n6.2.14\r\n$5\r\nproto\r\n:3\r\n"
    b"$4\r\nmode\r\n$10\r\nstandalone\r\n$4\r\nrole\r\n$6\r\nmaster\r\n"
)


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (VERSION_6, "version 6.2.14"),
        (b"-ERR unknown command `HELLO`, with args beginning with: `3`\r\n", "too old"),
    ],
    ids=["6.2", "5"],
)
def test_an_old_server_is_refused_in_words(reply: bytes, words: str) -> None:
    """A server before version 7 is one line for workers, and a typed error for callers."""
    with old_server(reply) as url:
        with pytest.raises(ConfigError, match=words) as caught:
            check_servers(settings(url))
        assert len(str(caught.value).splitlines()) == 1
        with Client(url) as client, pytest.raises(BrokerRefusedError, match=words):
            client.models()


def test_a_cluster_is_refused_in_one_line(tmp_path: Path) -> None:
    """`penstock up` and a worker end with 78 and say why; a caller gets a typed error."""
    config = tmp_path / "deployment.toml"
    with cluster(tmp_path) as url:
        config.write_text(f'[redis]\nbroker_url = "{url}"\nresults_url = "{url}"\n{BUNDLED}')
        environment = {**os.environ, "PENSTOCK_CONFIG": str(config)}
        up = [sys.executable, "-c", "from penstock_workers.cli import main; main()", "up"]
        worker = [sys.executable, "-m", "celery", "-A", "penstock_workers", "worker", "-Q", "cpu.minilm"]
        for command in (up, [*worker, "-l", "error"]):
            ended = subprocess.run(
                command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120
            )
            assert ended.returncode == os.EX_CONFIG, ended.stderr
            assert "cluster mode" in ended.stderr
            assert "Traceback" not in ended.stderr
        with Client(url) as client, pytest.raises(BrokerRefusedError, match="cluster mode"):
            client.models()


def test_what_would_lose_jobs_is_a_warning(own: Server) -> None:
    """Eviction and a log that is off are told; a server that loses nothing gets no word."""
    here = settings(own.broker_url, own.results_url)
    with Server(free_port()).running() as other, redis.Redis.from_url(own.broker_url) as admin:
        assert [line for line in check_servers(here) if "appendonly" in line]
        admin.config_set("appendonly", "yes")
        assert check_servers(here) == []

        for policy in ("allkeys-lru", "volatile-ttl"):
            admin.config_set("maxmemory-policy", policy)
            (warning,) = check_servers(here)
            assert policy in warning
            assert "noeviction" in warning
            (of_results,) = check_servers(settings(own.broker_url.replace("/0", "/0"), other.results_url))
            assert of_results == warning
        admin.config_set("appendonly", "no")


def test_a_database_that_does_not_exist_is_refused(own: Server) -> None:
    """A number above the server's is one line; a server that is away is nobody's fault."""
    with pytest.raises(ConfigError, match="DB index"):
        check_servers(settings(own.broker_url.replace("/0", "/99")))

    assert check_servers(settings(f"redis://127.0.0.1:{free_port()}/0")) == []
