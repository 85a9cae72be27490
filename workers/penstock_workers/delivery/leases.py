"""Leases: a process' right to the messages it took, renewed while it works and taken over when it dies.

Knows Redis and the scripts of `penstock.scripts`; must not know Celery or kombu.
"""

import atexit
import logging
import secrets
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import count
from typing import Any, Final

import redis

from penstock.bucket import RETRIES
from penstock.envelope import printable
from penstock.identity import process_name
from penstock.scripts import Value
from penstock_workers.delivery.dead_letters import DeadLetters, OnDead, letter_of
from penstock_workers.delivery.held import Held, Lease
from penstock_workers.delivery.sweep import Sweep
from penstock_workers.delivery.upkeep import BATCH, Upkeep

logger = logging.getLogger(__name__)

LEASE_S: Final = 20.0
LEASE_RANGE_S: Final = (1.0, 300.0)
MAX_DELIVERIES: Final = 4

SETTLE_S: Final = 5.0
"""How long a process that ends waits for Redis; after that its leases run out."""

IsAlive = Callable[[], bool]


class Leases:
    """All leases of this process on one broker.

    Any thread may call its methods; none of them waits for Redis unless it says so. `Upkeep` has the thread
    that acknowledges in batches, renews, and does what this class asks for.

    Attributes:
        process: Token of this process.
        lease_s: Life of a lease that is not renewed, seconds.
        held: The leases themselves.
        is_healthy: False once `is_alive` said no, until it says yes again.
    """

    def __init__(
        self,
        client: redis.Redis,
        *,
        lease_s: float = LEASE_S,
        max_deliveries: int = MAX_DELIVERIES,
        is_alive: IsAlive | None = None,
        on_dead: OnDead | None = None,
    ) -> None:
        self.process = f"{process_name()}:{secrets.token_hex(4)}"  # of one process and one broker
        self.lease_s = lease_s
        self.held = Held(suspect_at=max(1, max_deliveries - 2))
        self.is_healthy = True
        self._max_deliveries, self._is_alive = max_deliveries, is_alive
        self._numbers = count(1)
        self._upkeep = Upkeep(client, most_pause_s=lease_s / 6)
        self._letters = DeadLetters(client, self._upkeep, on_dead, lease_s)
        self._sweep = Sweep(
            self._upkeep,
            lease_s=lease_s,
            max_deliveries=max_deliveries,
            new_token=self.new_token,
            give_up=self._letters.give_up,
        )
        self._patience_s = SETTLE_S

    @property
    def queues(self) -> set[str]:
        """The queues that this process takes messages from, or did."""
        return self._sweep.queues

    def start(self) -> None:
        """Start the threads."""
        sweep, letters = self._sweep, self._letters
        duties = (self._renew, sweep.take_over, sweep.move_due, letters.claim_notices, sweep.recount)
        self._upkeep.start(self._send_acks, duties)
        self._letters.start()
        atexit.register(self.close)

    def close(self) -> None:
        """Requeue what is held and stop; waits for Redis, `SETTLE_S` at most."""
        if self._upkeep.is_running:
            self.requeue_all()
            self._letters.close()
            self._upkeep.close()
            atexit.unregister(self.close)

    def new_token(self) -> str:
        """Return the token of the next pop."""
        return f"{self.process}/{next(self._numbers)}"

    def ack(self, lease_id: str) -> Lease | None:
        """Acknowledge; the lease is renewed until Redis knows. Returns None if it is not held."""
        lease = self.held.acknowledge(lease_id)
        self._upkeep.wake()
        return lease

    def requeue(self, lease_ids: Iterable[str], *, as_next: bool) -> list[Lease]:
        """Requeue messages, without counting a delivery.

        Args:
            lease_ids: In the order they were taken.
            as_next: Whether they are the next that are taken from their queues, else the last.
        """
        leases = self.held.release_all(lease_ids)
        # The first that was taken goes back last, and so is the next one again.
        ordered = leases[::-1] if as_next else leases
        for start in range(0, len(ordered), BATCH):
            self._upkeep.do("requeue", int(as_next), *_pairs(ordered[start : start + BATCH]))
        return leases

    def fail(self, lease_id: str) -> Lease | None:
        """Requeue a message that its worker failed on: it counts as lost, and is given up as those are."""
        lease = self.held.release(lease_id)
        if lease is not None:
            then = partial(self._failed, lease)
            self._upkeep.do("fail", lease.key, lease.token, self._max_deliveries, then=then)
        return lease

    def requeue_all(self) -> None:
        """Requeue all that is held, for a process that stops; waits once for Redis, `SETTLE_S` at most."""
        self.requeue(self.held.ids(), as_next=True)
        if not self.settle(self._patience_s) and self._patience_s:
            self._patience_s = 0.0
            logger.warning(
                "broker out of reach: what is held is delivered again when its leases have run out"
            )

    def dead_letter(self, lease_id: str, message: bytes, reason: str, *, must_notify: bool) -> Lease | None:
        """Dead-letter a message.

        Args:
            lease_id: The lease on it.
            message: The message itself.
            reason: Says why, in a few words without its content.
            must_notify: Whether `on_dead` is called for it, here or in another process.
        """
        lease = self.held.release(lease_id)
        if lease is not None:
            n_deliveries = (lease.n_lost or 0) + lease.n_tries + 1
            entry = letter_of(message, queue=lease.queue, reason=reason, n_deliveries=n_deliveries)
            self._letters.add(lease.key, lease.token, entry, must_notify=must_notify)
        return lease

    def delay(self, lease_id: str, due_at: float) -> Lease | None:
        """Delay a message that was taken before it is due."""
        lease = self.held.release(lease_id)
        if lease is not None:
            self._upkeep.do("delay", lease.key, lease.token, due_at)
        return lease

    def retry(self, lease_id: str, pause_s: float) -> Lease | None:
        """Delay a message until it is worth another try, at the rate that all of a broker share."""
        lease = self.held.release(lease_id)
        if lease is not None:
            arguments = (lease.key, lease.token, pause_s, RETRIES.rate, RETRIES.burst)
            self._upkeep.do("retry", *arguments, keys=(RETRIES.key,))
        return lease

    def undo_pop(self, token: str) -> None:
        """Requeue what a pop took whose reply never arrived."""
        self._upkeep.do("undo_pop", token)

    def nudge(self) -> None:
        """Wake this process' wait for messages."""
        self._upkeep.do("nudge", self.process)

    def confirm(self) -> None:
        """Ask Redis which leases are still ours, and forget the others; waits for Redis.

        For a process that may have been stopped for longer than a lease.

        Raises:
            redis.RedisError: it could not be asked.
        """
        leases = self.held.all()
        for start in range(0, len(leases), BATCH):
            batch = leases[start : start + BATCH]
            theirs = set(self._upkeep.call("renew", self.lease_s, *_pairs(batch)))
            self._forget(lease for lease in batch if lease.key in theirs)

    def settle(self, within_s: float = SETTLE_S) -> bool:
        """Wait until Redis knows of everything that was asked for; False if it does not in time."""
        return self._upkeep.settle(within_s, lambda: not self.held.has_acknowledged)

    def _send_acks(self) -> None:
        while batch := self.held.acknowledged(BATCH):
            theirs = set(self._upkeep.call("ack", *_pairs(batch)))
            self._forget(lease for lease in batch if lease.key in theirs)
            self.held.forget_acknowledged(batch)
            self._upkeep.tell_settled()

    def _renew(self) -> float:
        self.is_healthy = _ask(self._is_alive)
        if self.is_healthy:
            self.confirm()
        return self.lease_s / 3

    def _failed(self, lease: Lease, found: Sequence[Any]) -> None:
        if found:
            source, n_deliveries, message = found
            reason = f"delivered {n_deliveries} times, each worker failed on it"
            self._letters.give_up(lease.key, lease.token, source, message, n_deliveries, reason)

    def _forget(self, leases: Iterable[Lease]) -> None:
        for lease in leases:
            if self.held.forget(lease):
                logger.warning("lease was taken over by another process", extra={"tag": printable(lease.tag)})


def _ask(is_alive: IsAlive | None) -> bool:
    try:
        return is_alive is None or is_alive()
    except Exception:
        logger.exception("is_alive failed; leases are not renewed")
        return False


def _pairs(leases: Iterable[Lease]) -> list[Value]:
    return [value for lease in leases for value in (lease.key, lease.token)]
