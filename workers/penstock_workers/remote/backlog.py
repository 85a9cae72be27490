"""Items that wait for a request to a server, the most urgent first, and how many one request takes."""

import heapq
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Generic, Protocol, TypeVar

from penstock.errors import PenstockError
from penstock_workers.batching.feed import HasTokens
from penstock_workers.batching.work import Work


class HasCost(HasTokens, Protocol):
    """An item of a request; its numbers are estimates until it was answered."""

    @property
    def cost_tokens(self) -> int:
        """Tokens that count against the server's limits: the text's, and the answer's if that is text."""


I = TypeVar("I", bound=HasCost)  # noqa: E741  an item, as in typing's own examples
A = TypeVar("A")


class Limits:
    """Size of a request that a server accepts; learned from what it refuses.

    Attributes:
        items: Most items of a request.
        tokens: Most tokens of a request; a single item may have more.
    """

    def __init__(self, items: int, tokens: float) -> None:
        self.items, self.tokens = items, tokens
        self._accepted_items = 1

    def accepted(self, n_items: int) -> None:
        """Note that the server accepted a request of `n_items`."""
        self._accepted_items = max(self._accepted_items, n_items)

    def refused(self, n_items: int, n_tokens: int) -> None:
        """Note that a request was too large.

        It had too many items, or, if the server has accepted as many before, too many tokens.
        """
        if n_items > self._accepted_items:
            self.items = min(self.items, max(self._accepted_items, n_items // 2))
        else:
            self.tokens = min(self.tokens, n_tokens / 2)


@dataclass(slots=True)
class Submission(Generic[I, A]):
    """A job that was submitted.

    Attributes:
        work: Items of the job, and where the answers go.
        since: Moment of the submission, monotonic seconds.
        error: Last error of any of its items.
    """

    work: Work[I, A]
    since: float = field(default_factory=time.monotonic)
    error: PenstockError | None = None


@dataclass(slots=True)
class Entry(Generic[I, A]):
    """One item of a job.

    Attributes:
        submission: The job.
        index: Place of the item in the job.
        on_piece: Takes the next piece of its text; None if nobody listens.
        n_bad: Number of its unusable answers.
        n_failures: Number of its failed requests.
    """

    submission: Submission[I, A]
    index: int
    on_piece: Callable[[str], None] | None
    n_bad: int = 0
    n_failures: int = 0

    @property
    def work(self) -> Work[I, A]:
        """The job's work."""
        return self.submission.work

    @property
    def item(self) -> I:
        """The item itself."""
        return self.work.items[self.index]


class Backlog(Generic[I, A]):
    """Items that are in no request, by the moment they are due; for one event loop."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Entry[I, A]]] = []
        self._serial = count()

    def __bool__(self) -> bool:
        return bool(self._heap)

    def push(self, entry: Entry[I, A]) -> None:
        """Add an item."""
        heapq.heappush(self._heap, (entry.work.due, next(self._serial), entry))

    def take(self, limits: Limits) -> list[Entry[I, A]]:
        """Take the most urgent items, as many as one request holds."""
        entries: list[Entry[I, A]] = []
        n_tokens = 0
        while self._heap and len(entries) < limits.items:
            entry = self._heap[0][2]
            if not entry.work.is_over:
                if entries and n_tokens + entry.item.cost_tokens > limits.tokens:
                    break
                entries.append(entry)
                n_tokens += entry.item.cost_tokens
            heapq.heappop(self._heap)
        return entries


def count_tokens(entries: list[Entry[I, A]]) -> int:
    """Return what items cost together, tokens."""
    return sum(entry.item.cost_tokens for entry in entries)
