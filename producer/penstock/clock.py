"""The broker's clock, as far as its answers have told it.

Deadlines, and when a job was sent, are by Redis' clock: those of senders and workers may be minutes off.
Nobody asks for it: what is asked anyway (a look at the registry, a heartbeat) is answered with the time.
"""

import time
from typing import Final

# Goes on while the machine sleeps, where there is such a clock.
_BOOTTIME: Final[int | None] = getattr(time, "CLOCK_BOOTTIME", None)

_WAY_S: Final = 0.1  # of an ordinary answer, there and back


def ticks() -> float:
    """Return seconds since some moment, by a clock that nobody sets."""
    return time.monotonic() if _BOOTTIME is None else time.clock_gettime(_BOOTTIME)


class Clock:
    """One server's clock; any thread may ask it or teach it."""

    def __init__(self) -> None:
        self._ahead_s: float | None = None  # of `ticks`

    def now(self) -> float:
        """Return Unix seconds on the server's clock; on this machine's before the first answer."""
        ahead_s = self._ahead_s
        return time.time() if ahead_s is None else ticks() + ahead_s

    def learn(self, server_s: float, asked_at: float) -> None:
        """Take note of an answer.

        The server read its clock after it was asked and before now. What was known stays as far as that
        allows: an answer that was long on its way teaches little, and a clock that was set is believed.

        Args:
            server_s: Time on the server's clock, Unix seconds.
            asked_at: Value of `ticks()` when it was asked.
        """
        least, most = server_s - ticks(), server_s - asked_at
        known = self._ahead_s
        if known is None:  # a connection may have been made on the way there; the way back is short
            self._ahead_s = least + min(most - least, _WAY_S) / 2
        else:
            self._ahead_s = min(max(known, least), most)
