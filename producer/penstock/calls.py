"""The calls of one client: each has one time limit, and ends when the client closes."""

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
"""Time limit of calls that have none of their own, such as a look at what is served, seconds."""
TAKE_BACK_S: Final = 0.5
"""How long a call that ends early waits until its job is cancelled too, seconds; then it waits no more."""
CLOSE_S: Final = 5.0
_TURNS: Final = 20  # of the loop, in which a cancelled call tells the job that it shares

CLOSED: Final = "it was closed; make a new one"
CLOSING: Final = ClientUseError(CLOSED)
TAKEN_BACK: Final = JobCancelledError("of a client that was closed")
"""Error of a call whose job is cancelled because the client closes."""
_NO_LOOP: Final = "AsyncClient needs a running asyncio event loop, and here is none; Client needs none"
_OTHER_LOOP: Final = (
    "it belongs to another event loop, which still runs; make one for each loop, or a Client for all"
)


class Calls:
    """Calls of one client, in one event loop of one process.

    Attributes:
        is_closed: True once no more calls can be made.
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
        """True in a forked child: all that is here belongs to the parent."""
        return self._pid != os.getpid()

    @property
    def is_over(self) -> bool:
        """True if the loop has ended, or belongs to the parent process: the client then begins anew."""
        if self._loop is None:
            return self.is_inherited
        return self.is_inherited or self._loop.is_closed()

    def check(self) -> None:
        """Check that a call can be made here.

        Raises:
            ClientUseError: no call can be made; the error tells why.
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
            InvalidOptionError: `timeout_s` is no time.
        """
        if timeout_s is not None and not (is_number(timeout_s) and timeout_s >= 0):
            raise InvalidOptionError("timeout_s", repr(timeout_s)[:80], "seconds from 0 on, or None")
        return Call(self, None if timeout_s is None or timeout_s == math.inf else timeout_s, job_id, closing)

    async def settle(self, work: Coroutine[Any, Any, object]) -> None:
        """Do what a call that ends early has to clean up; goes on in the background if that takes long."""
        task = self.later(work)
        await asyncio.wait([task], timeout=TAKE_BACK_S)

    def later(self, work: Coroutine[Any, Any, object]) -> "asyncio.Task[None]":
        """Do it in the background; its errors are dropped."""

        async def carry_out() -> None:
            with contextlib.suppress(PenstockError, TimeoutError):
                async with asyncio.timeout(CALL_S):
                    await work

        task = asyncio.create_task(carry_out(), name="penstock-behind")
        self._behind.add(task)
        task.add_done_callback(self._behind.discard)
        return task

    async def settled(self) -> None:
        """Wait a moment for what cancelled calls clean up."""
        for _ in range(_TURNS):
            await asyncio.sleep(0)
        if self._behind:
            await asyncio.wait(list(self._behind), timeout=TAKE_BACK_S)

    async def close(self) -> None:
        """End all calls, and wait a moment for what they clean up."""
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
    """One call, as a block; see `Calls.limited`. Its error says what ended it.

    Attributes:
        job_id: job that the error of a call which took too long names.
        task: the task that makes it.
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

    def left_s(self) -> float | None:
        """Return how much of its time is left, seconds; None if it has no limit."""
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
