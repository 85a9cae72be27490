"""Which messages this process holds, each by its lease, and how much that is. Knows nothing of Redis."""

import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """The right to one message.

    Attributes:
        tag: Name in Redis; bytes that are no UTF-8 are surrogates.
        token: Names the pop that took it.
        queue: Queue that it waited in, without the priority.
        level: Priority there, as kombu numbers them; lower goes first.
        tokens: Cost of the message.
        n_lost: Number of leases on it that ran out before; None on its first delivery.
        n_tries: Number of times a worker put it off, to be tried again.
    """

    tag: str
    token: str
    queue: str
    level: int
    tokens: int
    n_lost: int | None
    n_tries: int = 0

    @property
    def key(self) -> bytes:
        """The tag as Redis has it: whatever bytes a sender chose."""
        return self.tag.encode(errors="surrogateescape")

    @property
    def id(self) -> str:
        """What tells this delivery from all others, also of the same message to the same process."""
        return f"{self.tag}@{self.token}"


class Held:
    """The leases of a process: those of messages that it works on, and those it has acknowledged.

    The latter stay until Redis knows; they are renewed until then, and take no places. Any thread may ask.

    Attributes:
        suspect_at: Number of lost leases that makes a suspected poison message; two more make a dead letter.
        n_suspects: Number of suspected messages that are held; a process takes one at a time.
    """

    def __init__(self, suspect_at: int) -> None:
        self.suspect_at = suspect_at
        self.n_suspects = 0
        self._lock = threading.Lock()
        self._leases: dict[str, Lease] = {}
        self._acknowledged: dict[str, Lease] = {}
        self._n_of_queue: Counter[str] = Counter()
        self._n_of: Counter[tuple[str, int]] = Counter()
        self._tokens_of: Counter[tuple[str, int]] = Counter()

    def __contains__(self, lease_id: str) -> bool:
        return lease_id in self._leases

    def n_of(self, queue: str) -> int:
        """Count the messages of a queue."""
        return self._n_of_queue[queue]

    def counts(self, queue: str, level: int) -> tuple[int, int]:
        """Count the messages of one level of a queue, and their tokens."""
        return self._n_of[queue, level], self._tokens_of[queue, level]

    def is_suspect(self, lease: Lease) -> bool:
        """Whether so many holders of a message have died that it may be why."""
        return (lease.n_lost or 0) >= self.suspect_at

    def ids(self) -> list[str]:
        """Return the ids of all leases, in the order they were taken."""
        return list(self._leases)

    def all(self) -> list[Lease]:
        """Return the leases to renew."""
        with self._lock:
            return [*self._leases.values(), *self._acknowledged.values()]

    def add(self, lease: Lease) -> None:
        """Hold a lease."""
        with self._lock:
            self._leases[lease.id] = lease
            self._count(lease, 1)

    def release(self, lease_id: str) -> Lease | None:
        """Hold a lease no longer; None if it is not held."""
        with self._lock:
            return self._pop(lease_id)

    def release_all(self, lease_ids: Iterable[str]) -> list[Lease]:
        """Hold these no longer; returns those that were held."""
        with self._lock:
            return [lease for lease_id in lease_ids if (lease := self._pop(lease_id)) is not None]

    def acknowledge(self, lease_id: str) -> Lease | None:
        """Keep a lease until Redis knows that it has ended; None if it is not held."""
        with self._lock:
            if (lease := self._pop(lease_id)) is not None:
                self._acknowledged[lease_id] = lease
        return lease

    @property
    def has_acknowledged(self) -> bool:
        """Whether Redis does not know of all that was acknowledged."""
        return bool(self._acknowledged)

    def acknowledged(self, most: int) -> list[Lease]:
        """Return some of those that Redis does not know of."""
        with self._lock:
            return list(islice(self._acknowledged.values(), most))

    def forget_acknowledged(self, leases: Iterable[Lease]) -> None:
        """Keep these no longer: Redis knows."""
        with self._lock:
            for lease in leases:
                self._acknowledged.pop(lease.id, None)

    def forget(self, lease: Lease) -> bool:
        """Drop a lease that another process has; False if this one had dropped it already."""
        with self._lock:
            # Acknowledged meanwhile, by another thread: then it was ours.
            return bool(self._pop(lease.id) or self._acknowledged.pop(lease.id, None))

    def _pop(self, lease_id: str) -> Lease | None:
        lease = self._leases.pop(lease_id, None)
        if lease is not None:
            self._count(lease, -1)
        return lease

    def _count(self, lease: Lease, n: int) -> None:
        self._n_of_queue[lease.queue] += n
        self._n_of[lease.queue, lease.level] += n
        self._tokens_of[lease.queue, lease.level] += n * lease.tokens
        self.n_suspects += n * self.is_suspect(lease)
