"""What a process does on its broker in the background: scripts in their order, and duties now and then.

It outlives connections: what could not be done while Redis was away is done later.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, NamedTuple

import redis
from redis.commands.core import Script

from penstock.refusals import in_words
from penstock.scripts import Value, script
from penstock_workers.background import Background

logger = logging.getLogger(__name__)

_SCRIPTS: Final = (
    *("ack", "dead_letter", "claim_notices", "fail", "requeue", "move_due", "nudge", "delay", "undo_pop"),
    *("recount", "renew", "retry", "take_over"),
)
_BACKOFF_S: Final = (0.05, 1.0)

BATCH: Final = 200
"""Messages that one call of a script moves at most: Redis serves nobody else meanwhile."""

Duty = Callable[[], float]
"""Does something on the broker; returns seconds until it is to be done again."""


class _Chore(NamedTuple):
    """A script that is to be run; `then` is given what it returns."""

    script: str
    keys: Sequence[str]
    arguments: Sequence[Value]
    then: Callable[[Any], None] | None


class Upkeep:
    """The thread `leases` of one process and one broker.

    Any thread may call its methods; `call` and `settle` alone wait for Redis.

    Args:
        client: Connects to the broker.
        most_pause_s: Longest pause after a failure, seconds.
    """

    def __init__(self, client: redis.Redis, most_pause_s: float) -> None:
        self._client = client
        self._scripts: dict[str, Script] = {name: client.register_script(script(name)) for name in _SCRIPTS}
        self._most_pause_s = min(most_pause_s, _BACKOFF_S[1])
        self._chores: deque[_Chore] = deque()
        self._settled = threading.Condition()
        self._wake, self._closing = threading.Event(), threading.Event()
        self._backoff_s, self._is_away = 0.0, False
        self._first: Callable[[], object] = lambda: None
        self._duties: dict[Duty, float] = {}  # when each is due, on this process' monotonic clock
        self._thread = Background("leases", self._look_after)

    @property
    def is_running(self) -> bool:
        """Whether the thread was started, in this process, and not closed."""
        # A fork has a copy of this, of what is its parent's.
        return self._thread.is_alive() and not self._closing.is_set()

    def start(self, first: Callable[[], object], duties: Iterable[Duty]) -> None:
        """Start the thread.

        Args:
            first: Is called each time before chores are done.
            duties: Are due at once, and then as each says.
        """
        self._first = first
        self._duties |= dict.fromkeys(duties, 0.0)
        self._thread.start()

    def close(self) -> None:
        """Let the thread end after what it is doing, and close the connections."""
        self._closing.set()
        self._thread.end()
        self._wake.set()
        self._thread.join(1.0)
        self._client.close()

    def wake(self) -> None:
        """Let the thread look for what there is to do."""
        self._wake.set()

    def do(
        self,
        name: str,
        *arguments: Value,
        keys: Sequence[str] = (),
        then: Callable[[Any], None] | None = None,
    ) -> None:
        """Run a script as soon as possible, after those that were asked for before."""
        self._chores.append(_Chore(name, keys, arguments, then))
        self._wake.set()

    def call(self, name: str, *arguments: Value, keys: Sequence[str] = ()) -> Any:
        """Run a script now; waits for Redis.

        Raises:
            redis.RedisError: it could not be run.
        """
        return self._scripts[name](keys=keys, args=arguments)

    def settle(self, within_s: float, is_settled: Callable[[], bool]) -> bool:
        """Wait until nothing is left to do; False if it does not come to that in time.

        Args:
            within_s: Longest wait, seconds.
            is_settled: Says whether `first` has nothing left.
        """
        self._wake.set()
        with self._settled:
            return self._settled.wait_for(lambda: is_settled() and not self._chores, within_s)

    def tell_settled(self) -> None:
        """Let those who wait in `settle` look again."""
        with self._settled:
            self._settled.notify_all()

    def _look_after(self) -> None:
        self._wake.wait(max(0.0, min(self._duties.values()) - time.monotonic()))
        self._wake.clear()
        if self._round():
            self._backoff_s, self._is_away = 0.0, False
        else:
            self._backoff_s = min(max(2 * self._backoff_s, _BACKOFF_S[0]), self._most_pause_s)
            self._closing.wait(self._backoff_s)
            self._wake.set()

    def _round(self) -> bool:
        """Do what there is to do; False if some of it failed."""
        is_fine = self._attempt(self._flush) is not None
        for duty, due in list(self._duties.items()):
            if due <= time.monotonic():
                wait_s = self._attempt(duty)
                if wait_s is None:
                    is_fine = False
                else:
                    self._duties[duty] = time.monotonic() + wait_s
        return is_fine

    def _attempt(self, duty: Duty) -> float | None:
        try:
            return duty()
        except (redis.RedisError, OSError) as error:
            if not self._is_away:
                self._is_away = True
                logger.warning("broker out of reach: %s", in_words(error))
        except Exception as error:  # noqa: BLE001  the other duties must not wait for this one
            self._thread.failed(error)
        return None

    def _flush(self) -> float:
        self._first()
        for _ in range(len(self._chores)):
            chore = self._chores[0]
            try:
                # The token is checked there: twice does no harm.
                reply = self.call(chore.script, *chore.arguments, keys=chore.keys)
            except redis.ResponseError:
                self._chores.rotate(-1)  # refused, perhaps for ever: the others must not wait for it
                raise
            except (redis.DataError, ValueError, TypeError):
                self._chores.popleft()  # it cannot even be sent; the lease runs out
                raise
            if chore.then is not None:
                chore.then(reply)
            self._chores.popleft()
            self.tell_settled()
        return 0.0
