"""Calls of `embed` become jobs: small ones that come together and ask the same share one.

A lone call is sent at once. While an earlier one is under way, those that follow pile up for 2 ms at most,
or until it is back. Knows what a call is; not how a job is sent.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterator, Sequence
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

JOIN_S: Final = 0.002
"""How long a call waits for company while another is under way, seconds."""
MOST_TEXTS: Final = 8
MOST_CHARACTERS: Final = 8_000
"""A call of more texts or characters is a job of its own."""
TEXTS_AT_ONCE: Final = 256
"""So many waiting texts are sent without waiting for more."""
TEXTS_PER_WORKER: Final = 8
"""Calls are shared out among the workers when each gets as many texts."""

_OPTIONS: Final = tuple(EmbedRequest.model_fields.keys() - {"texts", "sent_at", "deadline"})
# Errors that may be about one text; the others would come again, for each call.
_OF_ONE_TEXT: Final = (InvalidTextError, InputTooLongError, RequestTooLargeError, WorkerError)

Send = Callable[[EmbedRequest, Lane], Awaitable[AsyncJob[Vectors]]]
"""Sends a job whose id nobody else is told."""


@dataclass(eq=False, slots=True)
class _Call:
    """A caller's texts and what he waits for; done too when he has left."""

    request: EmbedRequest
    answer: asyncio.Future[Vectors]
    job_id: str = ""

    def fail(self, error: BaseException) -> None:
        if not self.answer.done():
            # A copy: one exception object would collect the tracebacks of all who get it.
            self.answer.set_exception(type(error)(*error.args) if isinstance(error, PenstockError) else error)


@dataclass(eq=False, slots=True)
class _Group:
    """Calls with equal options.

    Attributes:
        waiting: not sent yet, oldest first.
        n_under_way: sendings whose answers are not all there.
        timer: when those that wait are sent.
    """

    lane: Lane
    waiting: list[_Call] = field(default_factory=list)
    n_under_way: int = 0
    timer: asyncio.Handle | None = None


class Joiner:
    """Sends calls and gives each its own rows, its own error and its own time limit.

    Args:
        send: sends a request as a job.
        n_workers: counts the live workers of a model.
        max_texts: says how many texts a job of a model may have.
    """

    def __init__(self, send: Send, n_workers: Callable[[str], int], max_texts: Callable[[str], int]) -> None:
        self._send, self._n_workers, self._max_texts = send, n_workers, max_texts
        self._groups: dict[tuple[object, ...], _Group] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def embed(self, request: EmbedRequest, lane: Lane, limit: Call) -> Vectors:
        """Return the request's vectors, shape (n_texts, dim).

        When the call ends before, the job is taken back if nobody else waits for it.

        Raises:
            PenstockError: see `AsyncClient.embed`.
        """
        call = _Call(request, asyncio.get_running_loop().create_future())
        if len(request.texts) > MOST_TEXTS or sum(map(len, request.texts)) > MOST_CHARACTERS:
            self._start([call], lane)
        else:
            self._wait_for_company(call, lane)
        try:
            return await call.answer
        except asyncio.CancelledError:
            limit.job_id = call.job_id
            raise

    async def close(self) -> None:
        """Stop; whoever still waits gets an error."""
        for group in self._groups.values():
            if group.timer is not None:
                group.timer.cancel()
            _fail(group.waiting, TAKEN_BACK)
            group.waiting = []
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _wait_for_company(self, call: _Call, lane: Lane) -> None:
        key = (lane, _urgency(call.request), *(getattr(call.request, name) for name in _OPTIONS))
        group = self._groups.setdefault(key, _Group(lane))
        group.waiting.append(call)
        loop = asyncio.get_running_loop()
        if sum(len(other.request.texts) for other in group.waiting) >= TEXTS_AT_ONCE:
            self._flush(key)
        elif group.timer is None:
            # Not before the loop has come round: calls that were started together go together.
            flush = partial(self._flush, key)
            group.timer = loop.call_later(JOIN_S, flush) if group.n_under_way else loop.call_soon(flush)

    def _flush(self, key: tuple[object, ...]) -> None:
        group = self._groups[key]
        if group.timer is not None:
            group.timer.cancel()
            group.timer = None
        calls = [call for call in group.waiting if not call.answer.done()]
        group.waiting = []
        if calls:
            n_texts = sum(len(call.request.texts) for call in calls)
            n_jobs = max(1, min(self._n_workers(calls[0].request.model), n_texts // TEXTS_PER_WORKER))
            # Each by itself: of jobs that come together the first idle worker takes all.
            most = self._max_texts(calls[0].request.model)
            for part in chain.from_iterable(_cut(calls[start::n_jobs], most) for start in range(n_jobs)):
                group.n_under_way += 1
                task = self._start(part, group.lane)
                task.add_done_callback(lambda _: self._returned(key))
        elif not group.n_under_way:
            del self._groups[key]

    def _returned(self, key: tuple[object, ...]) -> None:
        group = self._groups[key]
        group.n_under_way -= 1
        if not group.n_under_way:
            self._flush(key)

    def _start(self, part: Sequence[_Call], lane: Lane) -> asyncio.Task[None]:
        task = asyncio.create_task(self._carry_out(part, lane), name="penstock-embed")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _carry_out(self, part: Sequence[_Call], lane: Lane) -> None:
        """Send one job for these calls, and answer them."""
        try:
            await self._answer(part, await self._send(_join(part), lane), lane)
        except asyncio.CancelledError:
            _fail(part, TAKEN_BACK)
            raise
        except Exception as error:  # noqa: BLE001  whatever it is, nobody may wait for ever
            _fail(part, error)

    async def _answer(self, part: Sequence[_Call], job: AsyncJob[Vectors], lane: Lane) -> None:
        result = asyncio.create_task(job.wait())

        def leave(_: object) -> None:
            if all(call.answer.done() for call in part):
                result.cancel()

        for call in part:
            call.job_id = job.id
            call.answer.add_done_callback(leave)
        leave(None)
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
            _share_out(result.result(), part)
        elif isinstance(error, _OF_ONE_TEXT) and len(part) > 1:
            alone = (self._carry_out([call], lane) for call in part if not call.answer.done())
            await asyncio.gather(*alone)
        else:
            _fail(part, error)


def _cut(calls: Sequence[_Call], most: int) -> Iterator[list[_Call]]:
    """Yield the calls in parts of so many texts at most; a call stays whole."""
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


def _join(part: Sequence[_Call]) -> EmbedRequest:
    """Return one request for all; of their deadlines, which are close, the last."""
    first = part[0].request
    if len(part) == 1:
        return first
    texts = [text for call in part for text in call.request.texts]
    deadlines = [call.request.deadline for call in part if call.request.deadline is not None]
    return first.model_copy(update={"texts": texts, "deadline": max(deadlines, default=None)})


def _share_out(vectors: Vectors, part: Sequence[_Call]) -> None:
    start = 0
    for call in part:
        end = start + len(call.request.texts)
        if not call.answer.done():
            # A copy: whoever keeps one row would keep everybody's.
            call.answer.set_result(vectors if len(part) == 1 else vectors[start:end].copy())
        start = end


def _urgency(request: EmbedRequest) -> int | None:
    """Return the same number for deadlines within a factor of two."""
    if request.deadline is None or request.sent_at is None:
        return None
    return math.frexp(request.deadline - request.sent_at)[1]


def _fail(part: Sequence[_Call], error: BaseException) -> None:
    for call in part:
        call.fail(error)
