"""Requests in flight to a server: how many there may be, and how fast they are answered.

The limit grows by one after as many answers as it allows requests, and is halved after an overload.
"""

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, Generic

from penstock_workers.batching.rate import Ratio
from penstock_workers.batching.work import Work
from penstock_workers.remote.backlog import A, Entry, I

FIRST_CONCURRENCY: Final = 4


@dataclass(slots=True, eq=False)
class Call(Generic[I, A]):
    """One request in flight.

    Attributes:
        entries: Items of the request.
        n_tokens: Tokens that its permit was given for.
        began: Moment it was sent, monotonic seconds.
        task: Waits for the answer.
    """

    entries: list[Entry[I, A]]
    n_tokens: int
    began: float = field(default_factory=time.monotonic)
    task: asyncio.Task[None] | None = None

    @property
    def is_unwanted(self) -> bool:
        """Whether nobody waits for any of its items."""
        return all(entry.work.is_over for entry in self.entries)


class InFlight(Generic[I, A]):
    """All requests in flight; for one event loop.

    Args:
        most: Highest number of them that the settings allow.

    Attributes:
        concurrency: The limit, as far as the server seems to bear it; its integer part counts.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self.concurrency = float(min(FIRST_CONCURRENCY, most))
        self._calls: set[Call[I, A]] = set()
        self._halved_at = 0.0
        self._speed = Ratio()

    def __len__(self) -> int:
        return len(self._calls)

    def __iter__(self) -> Iterator[Call[I, A]]:
        return iter(list(self._calls))

    @property
    def has_room(self) -> bool:
        """Whether one more may be sent."""
        return len(self._calls) < int(self.concurrency)

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens per second of all together, recent ones weighing most; None before the first answer."""
        return self._speed.value

    def add(self, call: Call[I, A]) -> None:
        """Count a request that is sent now."""
        self._calls.add(call)

    def remove(self, call: Call[I, A]) -> None:
        """Stop counting a request that was answered or has failed."""
        self._calls.discard(call)

    def holds(self, work: Work[I, A]) -> bool:
        """Whether any item of a job is in flight."""
        return any(entry.work is work for call in self._calls for entry in call.entries)

    def succeeded(self, n_tokens: int, seconds: float, n_at_once: int) -> None:
        """Learn from an answer.

        Args:
            n_tokens: Cost of the request, tokens.
            seconds: Time it took.
            n_at_once: Number of requests in flight when it was sent, itself included.
        """
        if n_at_once >= int(self.concurrency) - 1:  # else it tells nothing about more
            self.concurrency = min(self.concurrency + 1 / self.concurrency, self._most)
        self._speed.count(n_tokens, max(seconds / n_at_once, 1e-9))

    def overloaded(self) -> None:
        """Halve the limit, once for all requests that were in flight together."""
        if all(call.began > self._halved_at for call in self._calls):
            self.concurrency = max(1.0, self.concurrency / 2)
            self._halved_at = time.monotonic()
