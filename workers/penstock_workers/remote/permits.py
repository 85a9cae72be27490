"""Permits to ask a server, as one worker process gets them, and what it last heard of the server's state.

Redis out of reach: nothing is permitted, and other workers hear nothing.
"""

import logging
import time
from collections.abc import Awaitable
from contextlib import suppress
from typing import Final

import redis

from penstock_workers.remote.upstream import Permit, Upstream

logger = logging.getLogger(__name__)

RESERVE_S: Final = 0.25
"""Reserve a place in the server's rate up to this long ahead; what to send is chosen when it comes."""


class Permits:
    """Permits of one model's server, and its state as last heard.

    Args:
        name: Name of the model, for logs.

    Attributes:
        upstream: State that all workers share; set once the event loop runs.
    """

    upstream: Upstream

    def __init__(self, name: str) -> None:
        self._name = name
        self._last = Permit("go", 0.0, "")
        self._until = 0.0

    @property
    def wait_s(self) -> float:
        """Seconds until it is worth asking again, by what was last heard."""
        return max(0.0, self._until - time.monotonic())

    @property
    def trouble(self) -> str:
        """What is wrong with the server, as last heard; empty if nothing is. Any thread may ask."""
        left_s = self._until - time.monotonic()
        if not (trouble := self._last.trouble):
            return ""
        return f"{trouble}; asked again in {left_s:.0f} s" if left_s > 0 else f"{trouble}; asked again now"

    async def ask(self, n_tokens: int, timeout_s: float) -> Permit | None:
        """Ask for a permit; None if Redis cannot give one now.

        Args:
            n_tokens: Estimated cost of the request.
            timeout_s: Longest time the request may take.
        """
        try:
            permit = await self.upstream.ask(n_tokens, within_s=RESERVE_S, timeout_s=timeout_s)
        except (redis.RedisError, OSError) as error:
            logger.warning("%s: nothing is sent while Redis is away: %s", self._name, type(error).__name__)
            return None
        self.note(permit)
        return permit

    async def look(self) -> Permit:
        """Return the server's state; the last one if Redis is out of reach."""
        with suppress(redis.RedisError, OSError):
            self.note(await self.upstream.look())
        return self._last

    def note(self, permit: Permit) -> None:
        """Remember what was heard."""
        self._last, self._until = permit, time.monotonic() + permit.wait_s

    async def tell(self, telling: Awaitable[None]) -> None:
        """Tell the other workers, if Redis is within reach."""
        try:
            await telling
        except (redis.RedisError, OSError) as error:
            logger.warning("%s: other workers do not hear: %s", self._name, type(error).__name__)
