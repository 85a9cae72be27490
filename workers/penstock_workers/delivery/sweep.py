"""What each process does on a broker for all of them: the work of those that died, and what comes due."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from penstock_workers.delivery.upkeep import BATCH, Upkeep

RECOUNT_S: Final = 30.0
"""How often a queue's held jobs are counted anew: senders may write there too."""

MOVE_S: Final = 0.5
"""How late a delayed message is at most, seconds, when a sender adds one that is due first."""

GiveUp = Callable[[bytes, str, bytes, bytes, int, str], None]
"""Takes tag, token, list, message, deliveries and reason of a message that this process holds now."""


class Sweep:
    """Takes over from processes that died, moves delayed messages that are due, and counts anew.

    Args:
        upkeep: Runs the scripts.
        lease_s: How long a lease lasts, seconds.
        max_deliveries: How many processes may die with a message.
        new_token: Returns a token of this process.
        give_up: Is called for a message that no worker finished.

    Attributes:
        queues: Queues whose held messages are counted anew.
    """

    def __init__(
        self,
        upkeep: Upkeep,
        *,
        lease_s: float,
        max_deliveries: int,
        new_token: Callable[[], str],
        give_up: GiveUp,
    ) -> None:
        self.queues: set[str] = set()
        self._upkeep, self._lease_s, self._max_deliveries = upkeep, lease_s, max_deliveries
        self._new_token, self._give_up = new_token, give_up

    def take_over(self) -> float:
        """Requeue messages whose leases ran out, or give them up; a duty."""
        token = self._new_token()
        n_lapsed, *found = self._upkeep.call("take_over", self._lease_s, self._max_deliveries, BATCH, token)
        for source, tag, n_deliveries, message in _fours(found):
            reason = (
                f"delivered {n_deliveries} times, no worker finished it"
                if source
                else "left behind by another transport"
            )
            self._give_up(tag, token, source, message, n_deliveries, reason)
        return 0.0 if n_lapsed == BATCH else self._lease_s / 4

    def move_due(self) -> float:
        """Move delayed messages that are due into their lists; a duty."""
        n_moved, wait_ms = self._upkeep.call("move_due", BATCH)
        if n_moved == BATCH:
            return 0.0
        return min(MOVE_S, wait_ms / 1000) if wait_ms >= 0 else MOVE_S

    def recount(self) -> float:
        """Count anew what is held of the queues; a duty."""
        if queues := sorted(self.queues):
            self._upkeep.call("recount", keys=queues)
        return RECOUNT_S


def _fours(flat: Sequence[Any]) -> Iterable[tuple[Any, ...]]:
    """Split what `take_over` returns into fours: list, tag, deliveries, message."""
    return zip(*[iter(flat)] * 4, strict=True)
