"""A job that was sent: its state, its result, and a way to take it back."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from enum import StrEnum
from typing import Final, Generic, NoReturn, TypeVar, cast, get_args

from penstock.broker import Broker
from penstock.calls import CALL_S, Call
from penstock.codec import Outcome, decode_outcome
from penstock.errors import (
    BrokerUnavailableError,
    JobCancelledError,
    ResultDecodeError,
    ResultExpiredError,
    UnknownJobError,
)
from penstock.inbox import LOOK_AGAIN_S
from penstock.result import EmbedResult, GenerateResult, Result, Timings, Usage
from penstock.result_store import SENT, Entry, ResultStore
from penstock.stream import OnRestart, Part, Piece, Reader

T = TypeVar("T")

RESULT_TIMEOUT_S: Final = 600.0
"""How long `result` waits unless told otherwise: OpenAI's client waits as long."""


class JobState(StrEnum):
    """State of a job."""

    WAITING = "waiting"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    UNKNOWN = "unknown"


_ENDED: Final = {
    "SUCCESS": JobState.SUCCEEDED,
    "FAILURE": JobState.FAILED,
    "REVOKED": JobState.CANCELLED,
}


class AsyncJob(Generic[T]):
    """A job that was sent. Made by `AsyncClient.submit_embed`, `submit_generate` and `job`.

    Attributes:
        id: id of the job. Whoever knows it can read the result.
    """

    def __init__(
        self, job_id: str, broker: Broker, store: ResultStore, *, is_ours: bool, is_recorded: bool = True
    ) -> None:
        self.id = job_id
        self._broker, self._store = broker, store
        self._is_ours, self._is_recorded = is_ours, is_recorded
        self._note = store.inbox.expect(job_id)  # held here: the inbox forgets it with the job
        self._outcome: Outcome | None = None

    async def result(self, timeout_s: float | None = RESULT_TIMEOUT_S) -> T:
        """Wait for the result; can be called again, until it expires.

        Args:
            timeout_s: longest wait, seconds; None waits for as long as it takes.

        Returns:
            Vectors, see `penstock.result.Vectors`, of an embedding job; else the answer.

        Raises:
            ResultTimeoutError: the result did not come in time; the job goes on, and can be asked again.
            ResultExpiredError: the job ended, and its result is no longer kept.
            UnknownJobError: no job of this id was sent.
            PenstockError: whatever the worker raised.
        """
        async with self._store.calls.limited(timeout_s, self.id):
            return await self.wait()

    async def wait(self) -> T:
        """Wait within a call that has its limit already; see `result`."""
        if self._outcome is None:
            self._outcome = await self._wait()
            if not self._is_recorded:
                self._store.forget_soon(self.id)
        if self._outcome.error is not None:
            # A copy: one exception object would collect the tracebacks of all who ask.
            raise type(self._outcome.error)(*self._outcome.error.args)
        result = self._outcome.result
        return result.vectors if isinstance(result, EmbedResult) else result  # type: ignore[return-value]  # T is the task's

    async def answer(self, call: Call) -> T:
        """Wait for a call that waits by itself: if it ends early, nobody can ask again, and the job ends."""
        call.job_id = self.id
        try:
            return await self.wait()
        except asyncio.CancelledError:  # its caller has left, or its time is over
            await self.take_back()
            raise

    async def pieces(
        self, *, on_restart: OnRestart = "hide", timeout_s: float | None = RESULT_TIMEOUT_S
    ) -> AsyncIterator[Piece]:
        """Read the text of a generation job of this client that streams; see `AsyncClient.stream`."""
        reader, last_id = Reader(self.id, on_restart), "-"
        while True:
            entries, outcome = await self._next_entries(last_id, timeout_s)
            for entry_id, fields in entries:
                last_id, run, at, text, part = _read_entry(entry_id, fields)
                for piece in reader.take(run, at, text, part):
                    yield piece
            if outcome is not None:
                self._outcome = outcome
                for piece in reader.end(cast("GenerateResult", await self.result(timeout_s))):
                    yield piece
                return

    async def _next_entries(
        self, last_id: str, timeout_s: float | None
    ) -> tuple[list[Entry], Outcome | None]:
        """Wait for pieces behind the last one, or for the end of the job."""
        async with self._store.calls.limited(timeout_s, self.id):
            while True:
                self._note.clear()
                with contextlib.suppress(BrokerUnavailableError):  # it may come back before the timeout
                    entries = await self._store.read_stream(self.id, last_id)
                    # Pieces first: behind the last of them the next look finds none, and asks.
                    outcome = self._told() or (None if entries else await self._look())
                    if entries or outcome is not None:
                        return entries, outcome
                await self._hear()

    async def state(self) -> JobState:
        """Say where the job is."""
        async with self._store.calls.limited(CALL_S, self.id):
            outcome, record = await self._store.look(self.id)
            if record == SENT:
                return JobState.RUNNING if await self._broker.is_taken(self.id) else JobState.WAITING
            if record is None:
                return JobState.UNKNOWN
            return _ENDED[record] if outcome else JobState.EXPIRED

    async def cancel(self) -> bool:
        """Cancel the job; whoever waits for it gets `JobCancelledError`.

        Returns:
            True if it had not ended. A job that still waits is then never computed; of what a worker has
            begun, no further batch and no further step.
        """
        async with self._store.calls.limited(CALL_S, self.id):
            return await self.end()

    async def end(self) -> bool:
        """Cancel it within a call that has its limit already."""
        return await self._store.end(self.id, JobCancelledError(self.id), must_be_sent=self._is_recorded)

    async def take_back(self) -> None:
        """Cancel it for a caller who has left; errors of that are dropped."""
        if not self._store.calls.is_over:
            await self._store.calls.settle(self.end())

    async def forget(self) -> None:
        """Delete the stored result, for those who have read it and will not ask again."""
        async with self._store.calls.limited(CALL_S, self.id):
            await self._store.forget(self.id)

    def __reduce__(self) -> NoReturn:
        """Refuse: its connections stay in this process and loop."""
        raise TypeError(
            "an AsyncJob cannot be pickled; send its id, and ask the other process' client.job(id)"
        )

    def know(self, earlier: "AsyncJob[T]") -> None:
        """Take over the end of the job from an earlier object of it."""
        self._outcome = self._outcome or earlier._outcome

    @property
    def usage(self) -> Usage | None:
        """Tokens of the job; None until `result` has returned."""
        return self._answer.usage if self._answer else None

    @property
    def timings(self) -> Timings | None:
        """Where the job's time went; None until `result` has returned."""
        return self._answer.timings if self._answer else None

    @property
    def _answer(self) -> Result | None:
        return self._outcome.result if self._outcome else None

    async def _wait(self) -> Outcome:
        if self._is_ours:  # nothing can have been missed: the inbox was open before the job was sent
            await self._hear()
        elif (outcome := await self._look()) is not None:  # most that are asked for by id have ended
            return outcome
        else:
            await self._store.inbox.follow(self.id)
        try:
            while True:
                if (outcome := self._told() or await self._look()) is not None:
                    return outcome
                await self._hear()
        finally:
            if not self._is_ours:
                await self._store.inbox.unfollow(self.id)

    def _told(self) -> Outcome | None:
        payload, self._note.payload = self._note.payload, None  # it may be forgotten before the next look
        # Anyone who knows a channel's name may publish there; only what is stored is an answer, or an error.
        with contextlib.suppress(ResultDecodeError):
            return decode_outcome(self.id, payload) if payload else None
        return None

    async def _look(self) -> Outcome | None:
        try:
            outcome, record = await self._store.look(self.id)
        except BrokerUnavailableError:
            return None  # it may come back before the timeout, with the result
        if outcome is None and record != (SENT if self._is_recorded else None):
            raise UnknownJobError(self.id) if record is None else ResultExpiredError(self.id)
        return outcome

    async def _hear(self) -> None:
        try:
            async with asyncio.timeout(LOOK_AGAIN_S):
                await self._note.wait()
        except TimeoutError:
            return
        self._note.clear()


def _read_entry(entry_id: bytes, fields: dict[bytes, bytes]) -> tuple[str, str, int, str, Part]:
    """Return the id behind which to read on, and a piece: its run, place, text and part."""
    try:
        run, at, text = (fields[name].decode() for name in (b"run", b"at", b"text"))
        part = fields.get(b"part", b"text").decode()
        if part not in get_args(Part):
            raise ValueError
        return f"({entry_id.decode()}", run, int(at), text, cast("Part", part)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ResultDecodeError(f"{type(error).__name__} in a piece of its stream") from error
