"""The Redis that holds the queues: what is served there, how full it is, and the way in for messages."""

from typing import cast

from penstock.bucket import RETRIES, take
from penstock.clock import Clock, ticks
from penstock.connections import CONNECT_TIMEOUT_S, connect, redis_errors
from penstock.errors import QueueDelayError, RateLimitError
from penstock.keys import MODELS_KEY, RESULTS_KEY, UNACKED_KEY, WORKERS_KEY, load_key, queue_key
from penstock.registry import Registry
from penstock.request import Lane
from penstock.scripts import Limits, push_arguments, script


class Broker:
    """The Redis that holds the queues and the registry.

    Attributes:
        clock: clock of this server; each look at the registry sets it.
    """

    def __init__(self, url: str, *, connect_timeout_s: float = CONNECT_TIMEOUT_S) -> None:
        self.url, self.clock = url, Clock()
        self._redis = connect(url, connect_timeout_s=connect_timeout_s)
        self._push = self._redis.register_script(script("push"))
        self._load = self._redis.register_script(script("load"))

    async def registry(self) -> Registry:
        """Read what is served, in one round trip."""
        with redis_errors(self.url):
            async with self._redis.pipeline(transaction=False) as pipe:
                for command in (("HGETALL", MODELS_KEY), ("HGETALL", WORKERS_KEY), ("GET", RESULTS_KEY)):
                    pipe.execute_command(*command)
                pipe.time()
                pipe.execute_command("HELLO")  # an error where this is the primary no more
                asked_at = ticks()
                models, workers, results, (second, microsecond), _ = await pipe.execute()
            now_s = second + microsecond / 1e6
            registry = Registry.read(models, workers, results, now_s)
        self.clock.learn(now_s, asked_at)
        return registry

    async def push(self, queue: str, lane: Lane, *messages: bytes, limits: Limits) -> None:
        """Put messages at the end of a queue, and wake idle workers: all in one step, or none.

        Raises:
            QueueDelayError: one of the limits would be exceeded; nothing was sent.
            RateLimitError: the tenant sends too much; nothing was sent.
        """
        keys, arguments = push_arguments(queue_key(queue, *lane), *messages, limits=limits)
        with redis_errors(self.url):
            reply = await self._push(keys=keys, args=arguments)
            if isinstance(reply, list):
                retry_s, wait_s, exceeded = (text.decode() for text in reply)
                if exceeded == "rate":
                    raise RateLimitError(lane.tenant, float(retry_s))
                raise QueueDelayError(queue, exceeded, float(retry_s), float(wait_s) if wait_s else None)

    async def load(self, key: str) -> list[int]:
        """Return jobs, tokens and bytes of a queue, and the tokens that go before what is pushed now."""
        with redis_errors(self.url):
            return cast("list[int]", await self._load(keys=[key]))

    async def count_overflow(self, queue: str, n_jobs: int) -> None:
        """Count jobs that came to this queue because the wait in the preferred pool was longer."""
        with redis_errors(self.url):
            await self._redis.hincrby(load_key(queue), "spilled", n_jobs)

    async def ask_for_retry(self, within_s: float) -> float | None:
        """Take one retry from the budget that all clients and workers share, if one comes within this time.

        Returns:
            How long to wait before it, seconds; None if there is none in time.
        """
        with redis_errors(self.url):
            taken = await take(self._redis, RETRIES.of(1), within_s=within_s)
        return taken.wait_s if taken.is_taken else None

    async def is_taken(self, job_id: str) -> bool:
        """Say whether a worker holds the job; its id is its delivery tag."""
        with redis_errors(self.url):
            return bool(await self._redis.hexists(UNACKED_KEY, job_id))

    async def close(self) -> None:
        """Close all connections."""
        await self._redis.aclose()
