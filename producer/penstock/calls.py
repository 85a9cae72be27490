"""The calls of one client that are under way: each has one limit of time, and ends when the client closes."""

import asyncio
import contextlib
import math
import os
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Final, Self

from penstock.errors import (
    ClientUseError,
    InvalidOptionError,
    JobCancelledError,
    PenstockError,
    ResultTimeoutError,
)
from penstock.validation import is_number

CALL_S: Final = 60.0
"""Most that a call may take which has no limit of its own, such as a look at what is served."""
TAKE_BACK_S: Final = 0.5
"""How long a call that is left waits to see its job taken back; after that it is tried without it."""
CLOSE_S: Final = 5.0
_TURNS: Final = 20  # of the loop, in which a call that is left tells the job that it shares

CLOSED: Final = "it was closed; make a new one"
CLOSING: Final = ClientUseError(CLOSED)
TAKEN_BACK: Final = JobCancelledError("of a client that was closed")
"""What a caller gets whose job is taken back because the client closes."""
_NO_LOOP: Final = "AsyncClient needs a running asyncio event loop, and here is none; Client needs none"
_OTHER_LOOP: Final = (
    "it belongs to another event loop, which still runs; make one for each loop, or a Client for all"
)


class Calls:
    """Of one client, in one event loop of one process.

    Attributes:
        is_closed: whether no call can be made any more.
    """

    def __init__(self) -> None:
        self._pid, self._loop = os.getpid(), None
        self.is_closed = False
        self._under_way: set[Call] = set()
        self._behind: set[asyncio.Task[None]] = set()
        self._is_empty = asyncio.Event()

    _loop: asyncio.AbstractEventLoop | None

    @property
    def is_inherited(self) -> bool:
        """Whether a fork has left all that is here with the parent."""
        return self._pid != os.getpid()

    @property
    def is_over(self) -> bool:
        """Whether the loop has ended, or belongs to the parent process: whoever goes on begins anew."""
        if self._loop is None:
            return self.is_inherited
        return self.is_inherited or self._loop.is_closed()

    def check(self) -> None:
        """Say whether a call can be made here.

        Raises:
            ClientUseError: it cannot; tells why.
        """
        if self.is_closed:
            raise ClientUseError(CLOSED)
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            raise ClientUseError(_NO_LOOP) from None
        if self._loop is None:
            self._loop = loop
        if self._loop is not loop or self.is_inherited:
            raise ClientUseError(_OTHER_LOOP)

    def limited(
        self, timeout_s: float | None, job_id: str = "", *, closing: PenstockError = CLOSING
    ) -> "Call":
        """Return a block for one call; it ends after so many seconds, or with `closing` as the client does.

        Raises:
            InvalidOptionError: that is no time.
        """
        if timeout_s is not None and not (is_number(timeout_s) and timeout_s >= 0):
            raise InvalidOptionError("timeout_s", repr(timeout_s)[:80], "seconds from 0 on, or None")
        return Call(self, None if timeout_s is None or timeout_s == math.inf else timeout_s, job_id, closing)

    async def settle(self, work: Coroutine[Any, Any, object]) -> None:
        """Do what a call that was left has to put in order; goes on by itself if that takes long."""
        task = self.later(work)
        await asyncio.wait([task], timeout=TAKE_BACK_S)

    def later(self, work: Coroutine[Any, Any, object]) -> "asyncio.Task[None]":
        """Do it beside what goes on; its errors are nobody's."""

        async def carry_out() -> None:
            with contextlib.suppress(PenstockError, TimeoutError):
                async with asyncio.timeout(CALL_S):
                    await work

        task = asyncio.create_task(carry_out(), name="penstock-behind")
        self._behind.add(task)
        task.add_done_callback(self._behind.discard)
        return task

    async def settled(self) -> None:
        """Wait a moment for what calls that were left put in order."""
        for _ in range(_TURNS):
            await asyncio.sleep(0)
        if self._behind:
            await asyncio.wait(list(self._behind), timeout=TAKE_BACK_S)

    async def close(self) -> None:
        """End all calls, and wait a moment for what they put in order."""
        self.is_closed = True
        own = asyncio.current_task()
        self._is_empty.clear()
        for call in list(self._under_way):
            if call.task is not own:
                call.end()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(TAKE_BACK_S):
                while any(call.task is not own for call in self._under_way):
                    await self._is_empty.wait()
        if self._behind:
            await asyncio.wait(list(self._behind), timeout=TAKE_BACK_S)
        for task in self._behind:
            task.cancel()

    def _left(self, call: "Call") -> None:
        self._under_way.discard(call)
        self._is_empty.set()


class Call:
    """One call; see `Calls.limited`. What cancels it is told as what it was.

    Attributes:
        job_id: named by the error of a call that took too long.
        task: in which it is made.
    """

    task: asyncio.Task[Any] | None

    def __init__(self, calls: Calls, timeout_s: float | None, job_id: str, closing: PenstockError) -> None:
        self.job_id, self._calls, self._timeout_s, self._closing = job_id, calls, timeout_s, closing
        self._is_ended = False

    async def __aenter__(self) -> Self:
        self._calls.check()
        self.task = asyncio.current_task()
        self._n_cancelled = self.task.cancelling() if self.task else 0
        self._timeout = asyncio.timeout(self._timeout_s)
        await self._timeout.__aenter__()
        self._calls._under_way.add(self)
        return self

    @property
    def is_late(self) -> bool:
        """Whether its time is over."""
        return self._timeout.expired()

    def left_s(self) -> float | None:
        """Return how much of its time is left."""
        when = self._timeout.when()
        return None if when is None else max(0.0, when - asyncio.get_running_loop().time())

    def end(self) -> None:
        """End it: the client closes."""
        self._is_ended = True
        if self.task is not None:
            self.task.cancel()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._calls._left(self)
        try:
            await self._timeout.__aexit__(kind, error, traceback)
        except TimeoutError:
            raise ResultTimeoutError(self.job_id, float(self._timeout_s or 0)) from None
        if not self._is_ended or self.task is None:
            return
        if self.task.uncancel() <= self._n_cancelled and kind is asyncio.CancelledError:
            raise type(self._closing)(*self._closing.args) from None
