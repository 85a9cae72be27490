"""Connections to Redis: their time limits, the way through Sentinel, and its errors as ours.

Nothing above this module meets an error of redis-py.
"""

import asyncio
import math
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, cast

import numpy as np
import redis
import redis.asyncio as aioredis
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel as AsyncSentinel
from redis.asyncio.sentinel import SentinelConnectionPool
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    NoPermissionError,
    OutOfMemoryError,
    RedisError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry as SyncRetry
from redis.sentinel import Sentinel

from penstock.codec import MAX_RESULT_BYTES
from penstock.errors import BrokerRefusedError, BrokerUnavailableError, ConfigError, ResultDecodeError
from penstock.refusals import attentive
from penstock.sentinel_urls import SentinelUrl, is_sentinel
from penstock.urls import mask_url
from penstock.validation import is_number

CONNECT_TIMEOUT_S: Final = 5.0
MOST_CONNECT_S: Final = 600.0
ANSWER_TIMEOUT_S: Final = 10.0
MAX_CONNECTIONS: Final = 8
HEALTH_CHECK_S: Final = 25
"""A connection that was idle for this long is checked before it is used, seconds."""

_HEAD_BYTES: Final = 1 << 12
_MOST_DIGITS: Final = 12
# Raised by redis-py, and by code that reads replies, when a server sends something unexpected.
_GARBLED = (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError)
_REFUSALS = (AuthenticationError, AuthorizationError, NoPermissionError, OutOfMemoryError, ResponseError)


def checked_connect_timeout(connect_timeout_s: object) -> float:
    """Return the time limit of connecting that a caller gave, seconds.

    Raises:
        ConfigError: the value is no time, or too long.
    """
    if not (is_number(connect_timeout_s) and 0 < connect_timeout_s <= MOST_CONNECT_S):
        told = repr(connect_timeout_s)[:80]
        raise ConfigError([f"connect_timeout_s is {told}; seconds above 0, up to {MOST_CONNECT_S:g}"])
    return float(connect_timeout_s)


def connect(url: str, *, connect_timeout_s: float = CONNECT_TIMEOUT_S) -> aioredis.Redis:
    """Return a client of one Redis; it connects when it is first used.

    Behind Sentinel, each new connection goes to the server that is the master then.
    """
    options: dict[str, Any] = {
        "max_connections": MAX_CONNECTIONS,
        "timeout": connect_timeout_s + ANSWER_TIMEOUT_S,
        "socket_connect_timeout": connect_timeout_s,
        "socket_timeout": ANSWER_TIMEOUT_S,
        "socket_keepalive": True,
        "health_check_interval": HEALTH_CHECK_S,
        # Once, for a pooled connection that the server closed meanwhile, and not after a silence: that would
        # double the limits above. A message that is pushed twice in this way has one id, and a job ends once.
        "retry": Retry(NoBackoff(), 1, supported_errors=(RedisConnectionError,)),
    }
    if not is_sentinel(url):
        if url.startswith("unix:"):
            del options["socket_keepalive"]  # of TCP alone
        return aioredis.Redis.from_pool(_Pool.from_url(url, **options))
    found = SentinelUrl.parse(url)
    sentinels = AsyncSentinel(found.sentinels, sentinel_kwargs=found.sentinel_options)  # type: ignore[no-untyped-call]  # redis-py's own gap
    pool = _MasterPool(found.master_name, sentinels, **_login(found), **options)  # type: ignore[no-untyped-call]  # the same
    return aioredis.Redis.from_pool(pool)


def connect_sync(url: str, *, answer_timeout_s: float = ANSWER_TIMEOUT_S, n_retries: int = 1) -> redis.Redis:
    """Return a client that does not await; see `connect`.

    Args:
        url: URL of the server.
        answer_timeout_s: longest wait for the next bytes of an answer, seconds.
        n_retries: retries after a connection broke; 0 if the caller must notice that: redis-py hides a retry.
    """
    options: dict[str, Any] = {
        "socket_connect_timeout": CONNECT_TIMEOUT_S,
        "socket_timeout": answer_timeout_s,
        "health_check_interval": HEALTH_CHECK_S,
        "retry": SyncRetry(NoBackoff(), n_retries, supported_errors=(RedisConnectionError,)),
    }
    if not is_sentinel(url):
        return _attentive(redis.Redis.from_url(url, **options))
    found = SentinelUrl.parse(url)
    sentinels = Sentinel(found.sentinels, sentinel_kwargs=found.sentinel_options)  # type: ignore[no-untyped-call]  # redis-py's own gap
    client: redis.Redis = sentinels.master_for(found.master_name, **_login(found), **options)  # type: ignore[no-untyped-call]  # the same
    return _attentive(client)


def _attentive(client: redis.Redis) -> redis.Redis:
    pool = client.connection_pool
    pool.connection_class = attentive(pool.connection_class)
    return client


def get_large(client: redis.Redis, key: str) -> bytes | memoryview | None:
    """Return what `client.get` returns, read from the socket into its final place.

    redis-py copies a value five times: 6 MiB take four times as long. Whatever is not a value (none, an
    error, a connection that broke) is left to `client.get`.

    Raises:
        OSError: silence for longer than the client's limit.
        redis.RedisError: see `client.get`.
        ResultDecodeError: the value is larger than a result can be.
    """
    pool = client.connection_pool
    connection: Any = pool.get_connection()
    value = None
    try:
        connection.send_command("GET", key)
        value = _read_string(connection._sock)  # no public name; kombu's transport polls it under this one
    except (RedisConnectionError, ConnectionError):
        pass
    finally:
        if value is None:
            connection.disconnect()
        pool.release(connection)
    return cast("bytes | None", client.get(key)) if value is None else value


def _read_string(connected: socket.socket) -> memoryview | None:
    """Read one reply; None if it is not a string.

    Source: https://redis.io/docs/latest/develop/reference/protocol-spec/, "Bulk strings".
    """
    head = connected.recv(_HEAD_BYTES)
    length, end, start = head.partition(b"\r\n")
    if not (end and length[:1] == b"$" and length[1:].isdigit()):
        return None
    if len(length) > 1 + _MOST_DIGITS or int(length[1:]) > MAX_RESULT_BYTES:
        raise ResultDecodeError(f"it is announced as larger than {MAX_RESULT_BYTES} bytes")
    n_bytes, at = int(length[1:]), len(start)
    if at > n_bytes + len(end):
        return None
    # Pages of it are taken as bytes come, not for what a server claims.
    whole = np.empty(n_bytes + len(end), dtype=np.uint8).data
    whole[:at] = start
    while at < len(whole):
        n_read = connected.recv_into(whole[at:])
        if not n_read:
            return None
        at += n_read
    return whole[:n_bytes].toreadonly()


def _login(url: SentinelUrl) -> dict[str, Any]:
    return {"db": url.db, "username": url.username, "password": url.password}


class _Pool(aioredis.BlockingConnectionPool):
    """Connections to one server; whoever finds all of them taken waits."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        kind = self.connection_class  # plain, TLS, or Sentinel's
        self.connection_class = attentive(type(kind.__name__, (_PatientConnection, kind), {}))

    async def release(self, connection: AbstractConnection) -> None:
        """Take a connection back; one that broke casts doubt on all that lie idle.

        A network that dropped its connections tells nobody: each would cost one more caller their time limit.
        """
        await super().release(connection)
        if not connection.is_connected:
            await self.disconnect(inuse_connections=False)


class _PatientConnection(AbstractConnection):
    """A connection whose time limit counts silence alone: a large reply may take as long as bytes come.

    redis-py's asyncio connections, unlike its others, limit the whole reply.
    """

    _limit: asyncio.Timeout | None = None

    async def _connect(self) -> None:
        await super()._connect()  # type: ignore[safe-super, no-untyped-call]  # before a class that has it
        assert self._reader is not None
        feed = self._reader.feed_data

        def feed_data(data: bytes) -> None:
            if self._limit is not None:
                self._limit.reschedule(asyncio.get_running_loop().time() + (self.socket_timeout or 0))
            feed(data)

        self._reader.feed_data = feed_data  # type: ignore[method-assign, assignment]  # nothing else hears of bytes

    async def read_response(
        self, disable_decoding: bool = False, timeout: float | None = None, **options: Any
    ) -> Any:
        """See redis-py's; without `timeout`, `socket_timeout` counts from the last byte that came."""
        if timeout is not None or self.socket_timeout is None:
            return await super().read_response(disable_decoding, timeout, **options)
        try:
            async with asyncio.timeout(self.socket_timeout) as self._limit:
                return await super().read_response(disable_decoding, math.inf, **options)
        except TimeoutError:
            raise RedisTimeoutError(f"silent for {self.socket_timeout:g} s") from None
        finally:
            self._limit = None


class _MasterPool(SentinelConnectionPool, _Pool):
    """Connections to the master; whoever finds all of them taken waits."""

    async def aclose(self) -> None:
        """Close them, and those to the sentinels."""
        await super().aclose()
        await self.sentinel_manager.aclose()


@contextmanager
def redis_errors(url: str) -> Iterator[None]:
    """Turn what redis-py raises into our errors; `url` is named in them without its password.

    Raises:
        BrokerRefusedError: the server refused, or sent what is no answer of Redis.
        BrokerUnavailableError: the server did not answer in time.
    """
    try:
        yield
    except _REFUSALS as error:  # first: an AuthenticationError is a ConnectionError too
        raise BrokerRefusedError(mask_url(url), str(error)) from error
    except (RedisError, OSError) as error:
        raise BrokerUnavailableError(mask_url(url), str(error) or type(error).__name__) from error
    except _GARBLED as error:
        reason = f"what it sent cannot be read ({type(error).__name__})"
        raise BrokerRefusedError(mask_url(url), reason) from error
