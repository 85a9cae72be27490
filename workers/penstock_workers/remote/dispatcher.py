"""Jobs that a server answers: an event loop with many requests in flight, in place of a model thread.

Waiting items of all jobs become requests as large as the server accepts, the most urgent first, as soon as
one may be sent; `permits` says when. Knows nothing of HTTP and of models: an engine sends, and says what went
wrong.
"""

import asyncio
import logging
import random
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from typing import Final, NoReturn, Protocol, TypeVar

from penstock.errors import (
    EngineError,
    PenstockError,
    UpstreamAnswerError,
    UpstreamError,
    UpstreamUnavailableError,
)
from penstock_workers.batching.feed import Job, Listen, TryLaterError
from penstock_workers.batching.model_thread import ModelThread
from penstock_workers.batching.work import PATIENCE_S, Work, stretch
from penstock_workers.clock import BROKER_CLOCK
from penstock_workers.remote.backlog import A, Backlog, Entry, I, Limits, Submission, count_tokens
from penstock_workers.remote.faults import Fault
from penstock_workers.remote.in_flight import Call, InFlight
from penstock_workers.remote.permits import RESERVE_S, Permits
from penstock_workers.remote.upstream import Permit, Upstream
from penstock_workers.settings import RemoteSettings

logger = logging.getLogger(__name__)

TICK_S: Final = 0.1
"""Time between two checks whether somebody still waits for a job."""
LOOK_S: Final = 2.0
"""Time between two looks at the server's state while nothing is sent."""
ASK_AGAIN_S: Final = 1.0
HOLD_S: Final = 5.0
"""Requeue jobs for a pause of the server that is longer: this process can hold others meanwhile."""
BACKOFF_S: Final = (0.5, 30.0)
MAX_BAD_ANSWERS: Final = 4
"""After this many unusable answers, blame the item and fail it."""

I_contra = TypeVar("I_contra", contravariant=True)
A_co = TypeVar("A_co", covariant=True)


class Remote(Protocol[I_contra, A_co]):
    """A server that answers items."""

    name: str
    limits: Limits

    @property
    def server(self) -> str:
        """Host of the server, for errors."""

    @property
    def settings(self) -> RemoteSettings:
        """How patiently, and how often at once, it is asked."""

    def open(self) -> AbstractAsyncContextManager[Upstream]:
        """Connect; entered in the event loop that then calls."""

    async def call(
        self, items: Sequence[I_contra], on_piece: Callable[[str], None] | None
    ) -> Sequence[A_co | UpstreamError]:
        """Answer items in one request.

        Raises:
            Fault: there is no answer.
        """


class Dispatcher(ModelThread[I, A]):
    """Answers the items of concurrent jobs by requests to a server.

    Args:
        remote: The server.

    Attributes:
        in_flight: Requests that are sent and not answered.
    """

    def __init__(self, remote: Remote[I, A]) -> None:
        self._remote = remote
        self._arrived: list[Entry[I, A]] = []
        self._submissions: list[Submission[I, A]] = []
        self._backlog: Backlog[I, A] = Backlog()
        self.in_flight: InFlight[I, A] = InFlight(remote.settings.max_concurrency)
        self._permits = Permits(remote.name)
        self._loop: asyncio.AbstractEventLoop | None = None
        super().__init__(remote.name)

    def submit(self, job: Job, items: Sequence[I], listen: Listen | None = None) -> Work[I, A]:
        """Queue a job's items; see `StreamingFeed.submit`. Listens in the event loop."""
        work: Work[I, A] = Work(job, items)
        stretch_s = stretch(work, (one.work for one in list(self._submissions)), self.tokens_per_s)
        work.due = min(work.due, BROKER_CLOCK.now() + PATIENCE_S[job.priority] + stretch_s)
        submission = Submission(work)
        with self._changed:
            if self._death is None:
                self._arrived += [Entry(submission, i, _piece_of(i, listen)) for i in range(len(items))]
                if self._loop is not None:
                    with suppress(RuntimeError):  # it has ended this moment, and requeues everything
                        self._loop.call_soon_threadsafe(self._wake.set)
        return work

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens per second of requests in flight, recent ones weighing most; None before the first."""
        return self.in_flight.tokens_per_s

    def trouble(self) -> str:
        """Return what is wrong with the server, as last heard; empty if nothing is."""
        return self._permits.trouble

    def _serve(self) -> NoReturn:
        asyncio.run(self._live_in_loop())
        raise AssertionError("unreachable: the loop has no end")

    def _give_up(self) -> Iterable[Work[I, A]]:
        self._loop = None
        works = {*(one.work for one in self._submissions), *(entry.work for entry in self._arrived)}
        self._submissions.clear()
        self._arrived.clear()
        return works

    async def _live_in_loop(self) -> None:
        self._wake = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        async with self._remote.open() as self._permits.upstream, asyncio.TaskGroup() as self._group:
            self._group.create_task(self._tick())
            self._group.create_task(self._watch())
            while True:
                await self._wait_for_items()
                await self._send_next()

    async def _wait_for_items(self) -> None:
        while True:
            self._wake.clear()
            with self._changed:
                arrived, self._arrived = self._arrived, []
            for entry in arrived:
                if entry.index == 0:
                    self._submissions.append(entry.submission)
                self._backlog.push(entry)
            if self._backlog and self.in_flight.has_room:
                return
            await self._wake.wait()

    async def _send_next(self) -> None:
        """Send the most urgent items if there is a permit; else wait a little."""
        entries = self._backlog.take(self._remote.limits)
        if not entries:
            return
        n_tokens = count_tokens(entries)
        for entry in entries:  # what comes meanwhile may be more urgent
            self._backlog.push(entry)
        permit = await self._permits.ask(n_tokens, self._remote.settings.timeout_s)
        if permit is None:
            await asyncio.sleep(ASK_AGAIN_S)
            return
        if not permit.is_granted:
            # a place in the rate is reserved shortly before its time
            wait_s = min(max(permit.wait_s - (RESERVE_S if permit.state == "full" else 0), 0.01), ASK_AGAIN_S)
            await asyncio.sleep(wait_s * random.uniform(1.0, 1.1))  # noqa: S311  spreads the workers, no secret
            return
        if permit.wait_s > 0:
            await asyncio.sleep(permit.wait_s)
            if permit.wait_s > RESERVE_S / 10 and (await self._permits.look()).state in ("hold", "open"):
                return  # what was reserved is lost: nothing could be sent in its time
        entries = self._backlog.take(self._remote.limits)
        if not entries:  # cancelled meanwhile
            upstream = self._permits.upstream
            await self._permits.tell(upstream.correct(-n_tokens, -1))
            await self._permits.tell(upstream.abandoned())
            return
        call = Call(entries, n_tokens)
        self.in_flight.add(call)
        call.task = self._group.create_task(self._send(call, permit))

    async def _send(self, call: Call[I, A], permit: Permit) -> None:
        """Send a request and settle its items."""
        entries = call.entries
        for entry in entries:
            entry.work.start()
        n_at_once = len(self.in_flight)
        try:
            answers = await self._ask_server(entries)
        except Fault as fault:
            self._remove(call)
            await self._on_failure(entries, fault)
            return
        except asyncio.CancelledError:
            self._remove(call)
            await self._permits.tell(self._permits.upstream.abandoned())
            raise
        except Exception as error:
            logger.error("call failed", extra={"model": self.name}, exc_info=error)
            self._remove(call)
            for entry in entries:
                entry.work.fail(EngineError(self.name, f"{type(error).__name__} in its call"))
            return
        seconds = time.monotonic() - call.began
        self._remove(call)
        self._remote.limits.accepted(len(entries))
        for entry, answer in zip(entries, answers, strict=True):
            if isinstance(answer, PenstockError):
                self._try_again([entry], answer)
            else:
                entry.work.settle(entry.index, answer)
        n_tokens = count_tokens(entries)
        self.in_flight.succeeded(n_tokens, seconds, n_at_once)
        await self._permits.tell(self._permits.upstream.correct(n_tokens - call.n_tokens))
        if permit.state == "doubt":
            await self._permits.tell(self._permits.upstream.answered())
            self._permits.note(Permit("go", 0.0, ""))

    async def _ask_server(self, entries: Sequence[Entry[I, A]]) -> Sequence[A | UpstreamError]:
        timeout_s = self._remote.settings.timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                return await self._remote.call([entry.item for entry in entries], entries[0].on_piece)
        except TimeoutError:
            problem = f"no answer within {timeout_s:g} s"
            error = UpstreamUnavailableError(self.name, self._remote.server, problem)
            raise Fault("failed", error) from None

    def _remove(self, call: Call[I, A]) -> None:
        self.in_flight.remove(call)
        self._wake.set()

    async def _on_failure(self, entries: list[Entry[I, A]], fault: Fault) -> None:
        """Do what a failed request asks for: fail, split, hold, or try again."""
        is_alone = len(entries) == 1
        level = logging.INFO if fault.kind in ("size", "item") else logging.WARNING
        logger.log(level, "%s: request of %d failed: %s", self.name, len(entries), fault.error)
        if fault.kind in ("busy", "failed", "broken"):
            self.in_flight.overloaded()
        await self._permits.tell(self._permits.upstream.report(fault))
        await self._permits.look()  # before anything waits again: it is not to be sent in between
        if fault.kind == "size" and not is_alone:
            self._remote.limits.refused(len(entries), count_tokens(entries))
            for entry in entries:
                self._backlog.push(entry)
        elif fault.kind == "item" and not is_alone:  # find which: each half goes by itself
            for half in (entries[: len(entries) // 2], entries[len(entries) // 2 :]):
                self._group.create_task(self._send_apart(half))
        elif fault.kind in ("busy", "failed"):
            self._try_again(entries, fault.error, is_failure=fault.kind == "failed")
        else:
            for entry in entries:
                entry.work.fail(fault.error)
        self._wake.set()

    async def _send_apart(self, entries: list[Entry[I, A]]) -> None:
        """Send items in a request of their own."""
        n_tokens = count_tokens(entries)
        while entries := [entry for entry in entries if not entry.work.is_over]:
            permit = None
            if self.in_flight.has_room:
                permit = await self._permits.ask(n_tokens, self._remote.settings.timeout_s)
            if permit is not None and permit.is_granted:
                await asyncio.sleep(permit.wait_s)
                call = Call(entries, n_tokens)
                self.in_flight.add(call)
                call.task = asyncio.current_task()
                await self._send(call, permit)
                break
            await asyncio.sleep(TICK_S if permit is None else min(permit.wait_s, ASK_AGAIN_S))

    def _try_again(
        self, entries: Sequence[Entry[I, A]], error: PenstockError, *, is_failure: bool = True
    ) -> None:
        """Let items wait for their next request, if it may be better."""
        for entry in entries:
            entry.submission.error = error
            entry.n_failures += is_failure
            entry.n_bad += isinstance(error, UpstreamAnswerError)
            if entry.n_bad >= MAX_BAD_ANSWERS:
                entry.work.fail(error)
        longest_s = 0.0  # the server's pause is enough
        if is_failure:
            first_s, most_s = BACKOFF_S
            longest_s = min(most_s, first_s * 2 ** (max(entry.n_failures for entry in entries) - 1))

        def push() -> None:
            for entry in entries:
                self._backlog.push(entry)
            self._wake.set()

        wait_s = random.uniform(0, longest_s)  # noqa: S311  full jitter, no secret
        asyncio.get_running_loop().call_later(wait_s, push)

    async def _tick(self) -> None:
        """Fail jobs that nobody waits for or that cannot be answered in time, and cancel their requests."""
        while True:
            if self._submissions:
                self._show_life()
            else:
                self._rest()
            for submission in self._submissions:
                self._judge(submission)
            self._submissions = [one for one in self._submissions if not one.work.is_over]
            for call in self.in_flight:
                if call.task is not None and call.is_unwanted:
                    call.task.cancel()
            await asyncio.sleep(TICK_S)

    def _judge(self, submission: Submission[I, A]) -> None:
        work = submission.work
        left_s = submission.since + self._remote.settings.patience_s - time.monotonic()
        if work.job.deadline is not None:
            left_s = work.job.deadline - BROKER_CLOCK.now()
        if (trouble := self.trouble()) and not self.in_flight.holds(work):
            wait_s = self._permits.wait_s
            error = UpstreamUnavailableError(self.name, self._remote.server, trouble, round(wait_s, 3))
            if left_s < wait_s:
                work.fail(error)
            elif wait_s > HOLD_S and not work.is_answered:
                work.fail(TryLaterError(error))
        elif left_s < 0 and submission.error is not None:
            work.fail(submission.error)
        work.is_dropped()

    async def _watch(self) -> None:
        """Look at the server's state from time to time: another worker may have put it on hold."""
        while True:
            await self._permits.look()
            await asyncio.sleep(LOOK_S)


def _piece_of(index: int, listen: Listen | None) -> Callable[[str], None] | None:
    return None if listen is None else (lambda piece: listen(index, piece))
