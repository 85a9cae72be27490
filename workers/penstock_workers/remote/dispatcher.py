"""Jobs answered by a server: many requests under way in one event loop, where `batching` has a model thread.

Waiting items of all jobs become requests as large as the server takes, most urgent first, the moment one may
leave: `upstream` says when. Knows nothing of HTTP and models: an engine calls, and says what went wrong.
"""

import asyncio
import heapq
import logging
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Final, Generic, NoReturn, Protocol, TypeVar

import redis

from penstock.errors import (
    EngineError,
    PenstockError,
    UpstreamAnswerError,
    UpstreamError,
    UpstreamUnavailableError,
)
from penstock.request import Priority
from penstock_workers.batching import PATIENCE_S, HasTokens, ModelThread, TryLaterError, Work, stretch
from penstock_workers.clock import BROKER_CLOCK
from penstock_workers.remote.upstream import Fault, Leave, Upstream

logger = logging.getLogger(__name__)

TICK_S: Final = 0.1
"""How often jobs are looked at: whether anybody still waits for them."""
LOOK_S: Final = 2.0
"""How often the server's state is read while nothing is sent."""
BOOK_S: Final = 0.25
"""A place in the server's rate is booked so far ahead; what leaves in it is chosen when its time is there."""
ASK_AGAIN_S: Final = 1.0
HOLD_S: Final = 5.0
"""A longer pause of the server is waited for in the queue: the places of this process are for others."""
BACKOFF_S: Final = (0.5, 30.0)
MAX_BAD_ANSWERS: Final = 4
"""What has no usable answer so often is to blame for it."""
FIRST_CONCURRENCY: Final = 4


class HasCost(HasTokens, Protocol):
    """What a request is made of; its numbers are estimates until it was answered."""

    @property
    def cost_tokens(self) -> int:
        """What counts against the server's limits: tokens of the text, and of the answer if that is text."""


I = TypeVar("I", bound=HasCost)  # noqa: E741  an item, as in typing's own examples
I_contra = TypeVar("I_contra", contravariant=True)
A = TypeVar("A")
A_co = TypeVar("A_co", covariant=True)
Listen = Callable[[int, str], None]


class Limits:
    """What a server takes in one request; learned from what it refuses.

    Attributes:
        items: at most.
        tokens: at most, unless one item alone has more.
    """

    def __init__(self, items: int, tokens: float) -> None:
        self.items, self.tokens = items, tokens
        self._accepted_items = 1

    def accepted(self, n_items: int) -> None:
        """Note that so many items were taken."""
        self._accepted_items = max(self._accepted_items, n_items)

    def refused(self, n_items: int, n_tokens: int) -> None:
        """Note that a request was too large: by its items, or where as many were taken before, its tokens."""
        if n_items > self._accepted_items:
            self.items = min(self.items, max(self._accepted_items, n_items // 2))
        else:
            self.tokens = min(self.tokens, n_tokens / 2)


class Remote(Protocol[I_contra, A_co]):
    """A server that answers items."""

    name: str
    server: str
    timeout_s: float
    patience_s: float
    max_concurrency: int
    limits: Limits

    def open(self) -> AbstractAsyncContextManager[Upstream]:
        """Connect; entered in the event loop that then calls."""

    async def call(
        self, items: Sequence[I_contra], on_piece: Callable[[str], None] | None
    ) -> Sequence[A_co | UpstreamError]:
        """Answer items in one request.

        Raises:
            Fault: there is no answer.
        """


@dataclass(slots=True)
class _Job(Generic[I, A]):
    work: Work[I, A]
    since: float = field(default_factory=time.monotonic)
    error: PenstockError | None = None  # the last, of any of its items


@dataclass(slots=True)
class _Entry(Generic[I, A]):
    job: _Job[I, A]
    index: int
    on_piece: Callable[[str], None] | None
    n_bad: int = 0
    n_failures: int = 0

    @property
    def work(self) -> Work[I, A]:
        return self.job.work

    @property
    def item(self) -> I:
        return self.work.items[self.index]


@dataclass(slots=True, eq=False)
class _Flight(Generic[I, A]):
    entries: list[_Entry[I, A]]
    n_tokens: int
    began: float = field(default_factory=time.monotonic)
    task: asyncio.Task[None] | None = None


class Caller(ModelThread[I, A]):
    """Answers the items of concurrent jobs by requests to a server.

    Requests under way are adapted: one more after as many answers as there may be, half as many after an
    overload.

    Args:
        remote: the server.

    Attributes:
        concurrency: how many requests may be under way now.
    """

    def __init__(self, remote: Remote[I, A]) -> None:
        self._remote = remote
        self._arrived: list[_Entry[I, A]] = []
        self._heap: list[tuple[float, int, _Entry[I, A]]] = []
        self._serial = count()
        self._jobs: list[_Job[I, A]] = []
        self._flights: set[_Flight[I, A]] = set()
        self.concurrency = float(min(FIRST_CONCURRENCY, remote.max_concurrency))
        self._halved_at = 0.0
        self._leave = Leave("go", 0.0, "")
        self._leave_until = 0.0
        self._n_tokens = self._seconds = 0.0
        self._loop: asyncio.AbstractEventLoop | None = None
        super().__init__(remote.name)

    def submit(
        self,
        job_id: str,
        items: Sequence[I],
        deadline: float | None,
        *,
        priority: Priority = Priority.DEFAULT,
        is_unwanted: Callable[[], bool] = lambda: False,
        listen: Listen | None = None,
        tenant: str = "",
    ) -> Work[I, A]:
        """Queue a job's items.

        Args:
            job_id: for errors.
            items: may be empty.
            deadline: after this, Unix seconds, nobody waits for them.
            priority: decides with the deadline who goes first.
            is_unwanted: the job was cancelled; a request that nobody waits for is given up.
            listen: takes the index of an item and the next piece of its text.
            tenant: who sent it; what waits of his puts it off.
        """
        work: Work[I, A] = Work(job_id, items, deadline, is_unwanted, tenant, priority)
        stretch_s = stretch(work, (job.work for job in list(self._jobs)), self.tokens_per_s)
        work.due = min(work.due, BROKER_CLOCK.now() + PATIENCE_S[priority] + stretch_s)
        job = _Job(work)
        with self._changed:
            if self._death is None:
                self._arrived += [_Entry(job, index, _piece_of(index, listen)) for index in range(len(items))]
                if self._loop is not None:
                    with suppress(RuntimeError):  # it has ended this moment, and hands everything back
                        self._loop.call_soon_threadsafe(self._wake.set)
        return work

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens per second of requests under way, recent ones weighing most; None before the first."""
        return self._n_tokens / self._seconds if self._seconds else None

    @property
    def trouble(self) -> str:
        """What is wrong with the server, as last heard; empty where nothing is."""
        left_s = self._leave_until - time.monotonic()
        if not (trouble := self._leave.trouble):
            return ""
        return f"{trouble}; asked again in {left_s:.0f} s" if left_s > 0 else f"{trouble}; asked again now"

    def _serve(self) -> NoReturn:
        asyncio.run(self._live_in_loop())
        raise AssertionError("unreachable: the loop has no end")

    def _give_up(self) -> Iterable[Work[I, A]]:
        self._loop = None
        works = {*(job.work for job in self._jobs), *(entry.work for entry in self._arrived)}
        self._jobs.clear()
        self._arrived.clear()
        return works

    async def _live_in_loop(self) -> None:
        self._wake = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        async with self._remote.open() as self._upstream, asyncio.TaskGroup() as self._group:
            self._group.create_task(self._tick())
            self._group.create_task(self._watch())
            while True:
                await self._wait_for_items()
                await self._depart()

    async def _wait_for_items(self) -> None:
        while True:
            self._wake.clear()
            with self._changed:
                arrived, self._arrived = self._arrived, []
            for entry in arrived:
                if entry.index == 0:
                    self._jobs.append(entry.job)
                self._push(entry)
            if self._heap and len(self._flights) < int(self.concurrency):
                return
            await self._wake.wait()

    def _push(self, entry: _Entry[I, A]) -> None:
        heapq.heappush(self._heap, (entry.work.due, next(self._serial), entry))

    async def _depart(self) -> None:
        """Send the most urgent items, if the server may be asked now; else wait a little."""
        entries = self._cut()
        if not entries:
            return
        n_tokens = _count(entries)
        for entry in entries:  # what comes meanwhile may be more urgent
            self._push(entry)
        leave = await self._ask(n_tokens)
        if leave is None:
            await asyncio.sleep(ASK_AGAIN_S)
            return
        if not leave.may_leave:
            # shortly before the time is there, the place is booked
            wait_s = min(max(leave.wait_s - (BOOK_S if leave.state == "full" else 0), 0.01), ASK_AGAIN_S)
            await asyncio.sleep(wait_s * random.uniform(1.0, 1.1))  # noqa: S311  spreads the workers, no secret
            return
        if leave.wait_s > 0:
            await asyncio.sleep(leave.wait_s)
            if leave.wait_s > BOOK_S / 10 and (await self._look()).state in ("hold", "open"):
                return  # what was booked is lost: nothing could be sent in its time
        entries = self._cut()
        if not entries:  # cancelled meanwhile
            await self._tell(self._upstream.correct(-n_tokens, -1))
            await self._tell(self._upstream.abandoned())
            return
        flight = _Flight(entries, n_tokens)
        self._flights.add(flight)
        flight.task = self._group.create_task(self._fly(flight, leave))

    def _cut(self) -> list[_Entry[I, A]]:
        """Take the most urgent items, as many as one request holds."""
        limits = self._remote.limits
        entries: list[_Entry[I, A]] = []
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

    async def _ask(self, n_tokens: int) -> Leave | None:
        try:
            leave = await self._upstream.ask(n_tokens, within_s=BOOK_S, timeout_s=self._remote.timeout_s)
        except (redis.RedisError, OSError) as error:
            logger.warning("%s: nothing is sent while Redis is away: %s", self.name, type(error).__name__)
            return None
        self._note(leave)
        return leave

    async def _look(self) -> Leave:
        with suppress(redis.RedisError, OSError):  # else it is as it was
            self._note(await self._upstream.look())
        return self._leave

    def _note(self, leave: Leave) -> None:
        self._leave, self._leave_until = leave, time.monotonic() + leave.wait_s

    async def _tell(self, telling: Awaitable[None]) -> None:
        try:
            await telling
        except (redis.RedisError, OSError) as error:
            logger.warning("%s: other workers do not hear: %s", self.name, type(error).__name__)

    async def _fly(self, flight: _Flight[I, A], leave: Leave) -> None:
        entries = flight.entries
        for entry in entries:
            entry.work.start()
        n_at_once = len(self._flights)
        try:
            answers = await self._call(entries)
        except Fault as fault:
            self._land(flight)
            await self._suffer(entries, fault)
            return
        except asyncio.CancelledError:
            self._land(flight)
            await self._tell(self._upstream.abandoned())
            raise
        except Exception as error:
            logger.error("call failed", extra={"model": self.name}, exc_info=error)
            self._land(flight)
            for entry in entries:
                entry.work.fail(EngineError(self.name, f"{type(error).__name__} in its call"))
            return
        seconds = time.monotonic() - flight.began
        self._land(flight)
        self._remote.limits.accepted(len(entries))
        if n_at_once >= int(self.concurrency) - 1:  # else it tells nothing about more
            self.concurrency = min(self.concurrency + 1 / self.concurrency, self._remote.max_concurrency)
        for entry, answer in zip(entries, answers, strict=True):
            if isinstance(answer, PenstockError):
                self._again([entry], answer)
            else:
                entry.work.settle(entry.index, answer)
        n_tokens = _count(entries)
        self._n_tokens = 0.98 * self._n_tokens + n_tokens
        self._seconds = 0.98 * self._seconds + max(seconds / n_at_once, 1e-9)
        await self._tell(self._upstream.correct(n_tokens - flight.n_tokens))
        if leave.state == "doubt":
            await self._tell(self._upstream.answered())
            self._note(Leave("go", 0.0, ""))

    async def _call(self, entries: Sequence[_Entry[I, A]]) -> Sequence[A | UpstreamError]:
        timeout_s = self._remote.timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                return await self._remote.call([entry.item for entry in entries], entries[0].on_piece)
        except TimeoutError:
            problem = f"no answer within {timeout_s:g} s"
            error = UpstreamUnavailableError(self.name, self._remote.server, problem)
            raise Fault("failed", error) from None

    def _land(self, flight: _Flight[I, A]) -> None:
        self._flights.discard(flight)
        self._wake.set()

    async def _suffer(self, entries: Sequence[_Entry[I, A]], fault: Fault) -> None:
        """Do what a failed request asks for: fail, split, hold, or try again."""
        alone = len(entries) == 1
        logger.log(
            logging.INFO if fault.kind in ("size", "item") else logging.WARNING,
            "%s: request of %d failed: %s",
            self.name,
            len(entries),
            fault.error,
        )
        if fault.kind in ("busy", "failed", "broken"):
            self._shrink()
        if fault.kind == "busy":
            await self._tell(self._upstream.hold(_why(fault.error), fault.retry_after_s))
        elif fault.kind in ("failed", "broken"):
            await self._tell(self._upstream.failed(_why(fault.error)))
        else:
            await self._tell(self._upstream.answered())
        await self._look()  # before anything waits again: it is not to leave in between
        if fault.kind == "size" and not alone:
            self._remote.limits.refused(len(entries), _count(entries))
            for entry in entries:
                self._push(entry)
        elif fault.kind == "item" and not alone:
            await self._halve(entries)
        elif fault.kind in ("busy", "failed"):
            self._again(entries, fault.error, is_failure=fault.kind == "failed")
        else:
            for entry in entries:
                entry.work.fail(fault.error)
        self._wake.set()

    async def _halve(self, entries: Sequence[_Entry[I, A]]) -> None:
        """Find the item that is refused: each half goes by itself."""
        for half in (entries[: len(entries) // 2], entries[len(entries) // 2 :]):
            self._group.create_task(self._send_apart(half))

    async def _send_apart(self, entries: Sequence[_Entry[I, A]]) -> None:
        n_tokens = _count(entries)
        while entries := [entry for entry in entries if not entry.work.is_over]:
            leave = await self._ask(n_tokens) if len(self._flights) < int(self.concurrency) else None
            if leave is not None and leave.may_leave:
                await asyncio.sleep(leave.wait_s)
                flight = _Flight(list(entries), n_tokens)
                self._flights.add(flight)
                flight.task = asyncio.current_task()
                await self._fly(flight, leave)
                break
            await asyncio.sleep(TICK_S if leave is None else min(leave.wait_s, ASK_AGAIN_S))

    def _again(
        self, entries: Sequence[_Entry[I, A]], error: PenstockError, *, is_failure: bool = True
    ) -> None:
        """Let items wait for their next request, if it may be better."""
        for entry in entries:
            entry.job.error = error
            entry.n_failures += is_failure
            entry.n_bad += isinstance(error, UpstreamAnswerError)
            if entry.n_bad >= MAX_BAD_ANSWERS:
                entry.work.fail(error)
        first, longest = BACKOFF_S
        n_failures = max(entry.n_failures for entry in entries)
        wait_s = (
            min(longest, first * 2 ** (n_failures - 1)) if is_failure else 0.0
        )  # else the pause is enough

        def push() -> None:
            for entry in entries:
                self._push(entry)
            self._wake.set()

        wait_s = random.uniform(0, wait_s)  # noqa: S311  full jitter, no secret
        asyncio.get_running_loop().call_later(wait_s, push)

    def _shrink(self) -> None:
        """Halve the requests under way, once for all that were under way together."""
        if all(flight.began > self._halved_at for flight in self._flights):
            self.concurrency = max(1.0, self.concurrency / 2)
            self._halved_at = time.monotonic()

    async def _tick(self) -> None:
        """Fail jobs that nobody waits for or that cannot be answered in time, and give their requests up."""
        while True:
            if self._jobs:
                self._show_life()
            else:
                self._rest()
            for job in self._jobs:
                self._judge(job)
            self._jobs = [job for job in self._jobs if not job.work.is_over]
            for flight in list(self._flights):
                if flight.task is not None and all(entry.work.is_over for entry in flight.entries):
                    flight.task.cancel()
            await asyncio.sleep(TICK_S)

    def _judge(self, job: _Job[I, A]) -> None:
        work, now = job.work, time.monotonic()
        left_s = job.since + self._remote.patience_s - now
        if work.deadline is not None:
            left_s = work.deadline - BROKER_CLOCK.now()
        wait_s = max(0.0, self._leave_until - now)
        if (trouble := self.trouble) and not self._is_flying(work):
            error = UpstreamUnavailableError(self.name, self._remote.server, trouble, round(wait_s, 3))
            if left_s < wait_s:
                work.fail(error)
            elif wait_s > HOLD_S and not work.is_answered:
                work.fail(TryLaterError(error))
        elif left_s < 0 and job.error is not None:
            work.fail(job.error)
        work.is_dropped()

    def _is_flying(self, work: Work[I, A]) -> bool:
        return any(entry.work is work for flight in self._flights for entry in flight.entries)

    async def _watch(self) -> None:
        """Read the server's state now and then: others may have put it on hold."""
        while True:
            await self._look()
            await asyncio.sleep(LOOK_S)


def _piece_of(index: int, listen: Listen | None) -> Callable[[str], None] | None:
    return None if listen is None else (lambda piece: listen(index, piece))


def _count(entries: Sequence[_Entry[I, A]]) -> int:
    return sum(entry.item.cost_tokens for entry in entries)


def _why(error: PenstockError) -> str:
    return str(getattr(error, "problem", error))
