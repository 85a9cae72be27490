"""Redis as a sender of jobs meets it: connections, the broker's queues, and what can go wrong."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import redis.asyncio as aioredis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    NoPermissionError,
    OutOfMemoryError,
    RedisError,
    ResponseError,
)

from penstock.errors import BrokerRefusedError, BrokerUnavailableError
from penstock.leases import push_arguments, scripts
from penstock.registry import MODELS_KEY, RESULTS_KEY, WORKERS_KEY, Registry, mask_url
from penstock.store import RECORD_TTL_S, SENT, record_key

CONNECT_TIMEOUT_S: Final = 5.0
ANSWER_TIMEOUT_S: Final = 10.0
MAX_CONNECTIONS: Final = 8
UNACKED_KEY: Final = "unacked"  # hash of messages that workers hold, by delivery tag: see delivery.lua

_REFUSALS = (AuthenticationError, AuthorizationError, NoPermissionError, OutOfMemoryError, ResponseError)


def connect(url: str, *, connect_timeout_s: float = CONNECT_TIMEOUT_S) -> aioredis.Redis:
    """Return a client of one Redis; it connects when it is first used."""
    pool = aioredis.BlockingConnectionPool.from_url(
        url,
        max_connections=MAX_CONNECTIONS,
        timeout=connect_timeout_s + ANSWER_TIMEOUT_S,
        socket_connect_timeout=connect_timeout_s,
        socket_timeout=ANSWER_TIMEOUT_S,
        socket_keepalive=True,
        health_check_interval=25,
        # Once, for a pooled connection that the server closed meanwhile. A message that is pushed twice
        # in this way has one id, and a job ends once.
        retry=Retry(NoBackoff(), 1),
    )
    return aioredis.Redis.from_pool(pool)


@contextmanager
def redis_errors(url: str) -> Iterator[None]:
    """Turn what redis-py raises into our errors; `url` is named in them without its password.

    Raises:
        BrokerRefusedError: it answered and refused.
        BrokerUnavailableError: it did not answer in time.
    """
    try:
        yield
    except _REFUSALS as error:  # first: an AuthenticationError is a ConnectionError too
        raise BrokerRefusedError(mask_url(url), str(error)) from error
    except (RedisError, OSError) as error:
        raise BrokerUnavailableError(mask_url(url), str(error) or type(error).__name__) from error


class Broker:
    """The Redis that holds the queues and the registry."""

    def __init__(self, url: str, *, connect_timeout_s: float = CONNECT_TIMEOUT_S) -> None:
        self.url = url
        self._redis = connect(url, connect_timeout_s=connect_timeout_s)
        self._push = self._redis.register_script(scripts()["push"])

    async def registry(self) -> Registry:
        """Read what is served, in one round trip."""
        with redis_errors(self.url):
            async with self._redis.pipeline(transaction=False) as pipe:
                for command in (("HGETALL", MODELS_KEY), ("HGETALL", WORKERS_KEY), ("GET", RESULTS_KEY)):
                    pipe.execute_command(*command)
                pipe.time()
                models, workers, results, (second, microsecond) = await pipe.execute()
        return Registry.read(models, workers, results, second + microsecond / 1e6)

    async def push(self, key: str, message: bytes) -> None:
        """Put a message at the end of a queue's list, and wake an idle worker, in one step."""
        keys, arguments = push_arguments(key, message)
        with redis_errors(self.url):
            await self._push(keys=keys, args=arguments)

    async def is_taken(self, job_id: str) -> bool:
        """Say whether a worker holds the job; its id is its delivery tag."""
        with redis_errors(self.url):
            return bool(await self._redis.hexists(UNACKED_KEY, job_id))

    async def close(self) -> None:
        """Close all connections."""
        await self._redis.aclose()


async def record_sent(results: aioredis.Redis, url: str, job_id: str) -> None:
    """Note that a job was sent, unless a worker was so fast that it has ended."""
    with redis_errors(url):
        await results.set(record_key(job_id), SENT, ex=RECORD_TTL_S, nx=True)
