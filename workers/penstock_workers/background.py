"""Background threads, for `delivery` and `serving`: no error ends one, and one that has ended is noticed."""

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Final

logger = logging.getLogger(__name__)

FAILING_S: Final = 60.0
"""A thread whose every turn has failed for so long, seconds, is of no more use than one that ended."""
PAUSE_S: Final = (0.05, 1.0)
"""How long a thread pauses after a turn that failed: twice as long each time, within these, seconds."""

_watched: set["Background"] = set()
os.register_at_fork(after_in_child=_watched.clear)  # a fork has no thread but its own


class Background(threading.Thread):
    """A thread that takes turns at one work until `end` is called.

    A turn looks after the errors that it expects. Whatever else it raises is logged, and it goes on.

    Args:
        name: Name of the thread.
        turn: The work of one turn; waits by itself while there is nothing to do.
    """

    def __init__(self, name: str, turn: Callable[[], object]) -> None:
        super().__init__(name=name, daemon=True)
        self._turn = turn
        self._over = threading.Event()
        self._n_failures = 0
        self._failing_since: float | None = None

    def start(self) -> None:
        """Start it; from now on `lost` watches it."""
        super().start()
        _watched.add(self)

    def end(self) -> None:
        """Let it end after its turn; it is not watched any more."""
        self._over.set()
        _watched.discard(self)

    def run(self) -> None:
        """Take turns until `end`."""
        pause_s = 0.0
        while not self._over.is_set():
            n_before = self._n_failures
            try:
                self._turn()
            except Exception as error:  # noqa: BLE001  a thread that others count on must not end
                self.failed(error)
            if self._n_failures == n_before:
                pause_s, self._failing_since = 0.0, None
            else:
                pause_s = min(max(2 * pause_s, PAUSE_S[0]), PAUSE_S[1])
                self._over.wait(pause_s)

    def failed(self, error: Exception) -> None:
        """Take note of an error that nobody expected, with its traceback where it is the first in a row."""
        self._n_failures += 1
        if self._failing_since is None:
            self._failing_since = time.monotonic()
            logger.error("background thread %s failed and goes on", self.name, exc_info=error)

    def is_lost(self) -> bool:
        """Whether it has ended unasked, or fails for ever."""
        since = self._failing_since
        is_failing = since is not None and time.monotonic() - since > FAILING_S
        return not self._over.is_set() and (is_failing or not self.is_alive())


def lost() -> list[str]:
    """Name the threads of this process that ended unasked or fail for ever: it is no longer healthy."""
    return sorted(thread.name for thread in list(_watched) if thread.is_lost())
