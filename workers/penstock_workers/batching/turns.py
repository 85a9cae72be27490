"""Turns on a device that the engines of one process share, each by its weight.

Fair queueing by start times: time on the device, over the engine's share, is added to its account; the engine
with the least goes next, and an engine that has not asked for a while starts at the account of the turn in
progress: it goes first, and has no claim on the time it did not want.

Source: Goyal, Vin and Cheng 1996, "Start-time Fair Queueing", section 2.
"""

import threading
import time
from collections.abc import Callable
from typing import Self


class Device:
    """A device that has one user at a time.

    Args:
        clock: Returns seconds since any moment.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._changed = threading.Condition()
        self._holder: Turn | None = None
        self._waiting: list[Turn] = []
        self._account_s = 0.0  # at which the turn in progress started

    def turn(self, share: float) -> "Turn":
        """Return an engine's turns; with twice another's share it has twice the time."""
        return Turn(self, share)


class Turn:
    """One engine's turns, each as long as the block; for its model thread alone."""

    def __init__(self, device: Device, share: float) -> None:
        self._device, self._share = device, share
        self._account_s = self._since = 0.0

    def __enter__(self) -> Self:
        device = self._device
        with device._changed:
            self._account_s = max(self._account_s, device._account_s)
            device._waiting.append(self)
            device._changed.wait_for(self._is_next)
            device._waiting.remove(self)
            device._holder, device._account_s = self, self._account_s
            self._since = device._clock()
        return self

    def __exit__(self, *_: object) -> None:
        device = self._device
        with device._changed:
            self._charge()
            device._holder = None
            device._changed.notify_all()

    def pause(self) -> None:
        """Let an engine that is behind go first, in the middle of a turn."""
        device = self._device
        if not device._waiting:  # as nearly always, without the lock
            return
        with device._changed:
            self._charge()
            is_ahead = any(other._account_s < self._account_s for other in device._waiting)
        if is_ahead:
            self.__exit__()
            self.__enter__()

    def _is_next(self) -> bool:
        waiting = self._device._waiting
        return self._device._holder is None and min(waiting, key=lambda turn: turn._account_s) is self

    def _charge(self) -> None:
        now = self._device._clock()
        self._account_s += (now - self._since) / self._share
        self._since = now
