"""Small calls of `embed` that come at the same time, with the same options, share a job.

A lone call is sent at once. While its job is in flight, later calls wait for each other: 2 ms at most, or
until its result is there. Its jobs are recorded nowhere: nobody is told their ids.
"""

import asyncio
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Final

from penstock.calls import TAKEN_BACK, Call
from penstock.errors import (
    InputTooLongError,
    InvalidTextError,
    PenstockError,
    RequestTooLargeError,
    WorkerError,
)
from penstock.job import AsyncJob
from penstock.request import EmbedRequest, Lane
from penstock.result import Vectors
from penstock.sender import Sender

WINDOW_S: Final = 0.002
"""How long a call waits for others while a job is in flight, seconds."""
MOST_TEXTS: Final = 8
MOST_CHARACTERS: Final = 8_000
"""A call with more texts or characters than this becomes a job of its own."""
TEXTS_AT_ONCE: Final = 256
"""Send at once when this many texts wait."""
TEXTS_PER_WORKER: Final = 8
"""Make one job for each worker if each job gets at least this many texts."""

_OPTIONS: Final = tuple(EmbedRequest.model_fields.keys() - {"texts", "sent_at", "deadline"})
# Errors that one text may have caused. Any other error would come again for each call.
_OF_ONE_TEXT: Final = (InvalidTextError, InputTooLongError, RequestTooLargeError, WorkerError)


@dataclass(eq=False, slots=True)
class _Call:
    """Texts of one caller, and the answer that they wait for; done too when they have left."""

    request: EmbedRequest
    answer: asyncio.Future[Vectors]
    job_id: str = ""

    def fail(self, error: BaseException) -> None:
        if not self.answer.done():
            # A copy: one exception object would collect the tracebacks of all callers.
            self.answer.set_exception(type(error)(*error.args) if isinstance(error, PenstockError) else error)


@dataclass(eq=False, slots=True)
class _Group:
    """Calls with equal options.

    Attributes:
        lane: queue position that all of them asked for.
        waiting: calls that are not sent yet, oldest first.
        n_in_flight: number of their jobs that have not ended.
        timer: sends the waiting calls when it fires.
    """

    lane: Lane
    waiting: list[_Call] = field(default_factory=list)
    n_in_flight: int = 0
    timer: asyncio.Handle | None = None


class Coalescer:
    """Sends calls of `embed`, and gives each its own rows, its own error and its own time limit."""

    def __init__(self, sender: Sender) -> None:
        self._sender = sender
        self._groups: dict[tuple[object, ...], _Group] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def embed(self, request: EmbedRequest, lane: Lane, limit: Call) -> Vectors:
        """Return the request's vectors, shape (n_texts, dim).

        If the call ends early, its job is cancelled as soon as nobody else waits for it.

        Raises:
            PenstockError: see `AsyncClient.embed`.
        """
        call = _Call(request, asyncio.get_running_loop().create_future())
        if len(request.texts) > MOST_TEXTS or sum(map(len, request.texts)) > MOST_CHARACTERS:
            self._start([call], lane)
        else:
            self._join_others(call, lane)
        try:
            return await call.answer
        except asyncio.CancelledError:
            limit.job_id = call.job_id
            raise

    async def close(self) -> None:
        """Stop. Callers who still wait get an error."""
        for group in self._groups.values():
            if group.timer is not None:
                group.timer.cancel()
            _fail(group.waiting, TAKEN_BACK)
            group.waiting = []
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _join_others(self, call: _Call, lane: Lane) -> None:
        key = (lane, _urgency(call.request), *(getattr(call.request, name) for name in _OPTIONS))
        group = self._groups.setdefault(key, _Group(lane))
        group.waiting.append(call)
        loop = asyncio.get_running_loop()
        if sum(len(other.request.texts) for other in group.waiting) >= TEXTS_AT_ONCE:
            self._flush(key)
        elif group.timer is None:
            # After one turn of the loop: calls that were started together then share a job.
            flush = partial(self._flush, key)
            group.timer = loop.call_later(WINDOW_S, flush) if group.n_in_flight else loop.call_soon(flush)

    def _flush(self, key: tuple[object, ...]) -> None:
        group = self._groups[key]
        if group.timer is not None:
            group.timer.cancel()
            group.timer = None
        calls = [call for call in group.waiting if not call.answer.done()]
        group.waiting = []
        if calls:
            model, discovery = calls[0].request.model, self._sender.discovery
            n_texts = sum(len(call.request.texts) for call in calls)
            n_jobs = max(1, min(discovery.n_workers(model), n_texts // TEXTS_PER_WORKER))
            # One by one: of jobs that arrive together, the first idle worker takes all.
            most = discovery.max_texts(model)
            for those in chain.from_iterable(_cut(calls[start::n_jobs], most) for start in range(n_jobs)):
                group.n_in_flight += 1
                task = self._start(those, group.lane)
                task.add_done_callback(lambda _: self._returned(key))
        elif not group.n_in_flight:
            del self._groups[key]

    def _returned(self, key: tuple[object, ...]) -> None:
        group = self._groups[key]
        group.n_in_flight -= 1
        if not group.n_in_flight:
            self._flush(key)

    def _start(self, calls: Sequence[_Call], lane: Lane) -> asyncio.Task[None]:
        task = asyncio.create_task(self._carry_out(calls, lane), name="penstock-embed")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _carry_out(self, calls: Sequence[_Call], lane: Lane) -> None:
        """Send one job for these calls, and answer each of them."""
        try:
            jobs: list[AsyncJob[Vectors]] = await self._sender.send([_merge(calls)], lane, is_recorded=False)
            await self._answer(calls, jobs[0], lane)
        except asyncio.CancelledError:
            _fail(calls, TAKEN_BACK)
            raise
        except Exception as error:  # noqa: BLE001  whatever it is, no caller may wait for ever
            _fail(calls, error)

    async def _answer(self, calls: Sequence[_Call], job: AsyncJob[Vectors], lane: Lane) -> None:
        result = asyncio.create_task(job.wait())

        def cancel_if_unwanted(_: object) -> None:
            if all(call.answer.done() for call in calls):
                result.cancel()

        for call in calls:
            call.job_id = job.id
            call.answer.add_done_callback(cancel_if_unwanted)
        cancel_if_unwanted(None)
        try:
            await asyncio.wait([result])
        except asyncio.CancelledError:  # the client closes, and nobody else knows the id
            await job.take_back()
            raise
        finally:
            result.cancel()
        if result.cancelled():
            await job.take_back()
        elif (error := result.exception()) is None:
            _split(result.result(), calls)
        elif isinstance(error, _OF_ONE_TEXT) and len(calls) > 1:
            one_by_one = (self._carry_out([call], lane) for call in calls if not call.answer.done())
            await asyncio.gather(*one_by_one)
        else:
            _fail(calls, error)


def _cut(calls: Sequence[_Call], most: int) -> Iterator[list[_Call]]:
    """Yield the calls in parts of up to `most` texts; a call is never split."""
    part: list[_Call] = []
    n_texts = 0
    for call in calls:
        n_own = len(call.request.texts)
        if part and n_texts + n_own > most:
            yield part
            part, n_texts = [], 0
        part.append(call)
        n_texts += n_own
    if part:
        yield part


def _merge(calls: Sequence[_Call]) -> EmbedRequest:
    """Return one request for all of them. Its deadline is the latest one; they are close."""
    first = calls[0].request
    if len(calls) == 1:
        return first
    texts = [text for call in calls for text in call.request.texts]
    deadlines = [call.request.deadline for call in calls if call.request.deadline is not None]
    return first.model_copy(update={"texts": texts, "deadline": max(deadlines, default=None)})


def _split(vectors: Vectors, calls: Sequence[_Call]) -> None:
    start = 0
    for call in calls:
        end = start + len(call.request.texts)
        if not call.answer.done():
            # A copy: a caller who keeps one row must not keep everybody's.
            call.answer.set_result(vectors if len(calls) == 1 else vectors[start:end].copy())
        start = end


def _urgency(request: EmbedRequest) -> int | None:
    """Return a number that deadlines within a factor of two share."""
    if request.deadline is None or request.sent_at is None:
        return None
    return math.frexp(request.deadline - request.sent_at)[1]


def _fail(calls: Sequence[_Call], error: BaseException) -> None:
    for call in calls:
        call.fail(error)
