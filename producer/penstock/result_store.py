"""The Redis that holds results: the script that ends a job, and a client's view of the store.

docs/reference/keys.md tells what each key holds. A job whose id nobody was told has no record until it
ends: its sender is the only one who can ask.
"""

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Final, cast, get_args

import redis.asyncio as aioredis

from penstock.calls import Calls
from penstock.codec import Outcome, Status, decode_outcome, encode_failure
from penstock.connections import connect_sync, get_large, redis_errors
from penstock.errors import JobCancelledError, PenstockError
from penstock.inbox import Inbox
from penstock.keys import CANCELLED_KEY, RECORD_TTL_S, is_reply_channel, record_key, result_key, stream_key
from penstock.scripts import script
from penstock.threads import Threads

SENT: Final = "sent"
"""Record of a job that has not ended."""
ENDED: Final = frozenset(get_args(Status))
"""Records of jobs that ended."""
MAX_CANCELLED: Final = 100_000
"""How many cancelled jobs are remembered; a worker that misses one computes in vain."""
FORGET_EVERY_S: Final = 1.0
"""How long results that nobody can ask for again are collected before they are deleted, seconds."""
LATE_DELIVERY_S: Final = 600
"""How long a message may be delivered again after its job ended, seconds."""
PIECES_AT_ONCE: Final = 1000
LARGE_BYTES: Final = 1 << 16
"""A result from this size on is read by a thread."""

Entry = tuple[bytes, dict[bytes, bytes]]
"""One entry of a stream: its id and its fields."""

END_JOB: Final = script("end_job")
"""Ends a job, once; its arguments are those of `end_job_arguments`."""


def end_job_arguments(
    *,
    job_id: str,
    payload: bytes,
    status: str,
    is_final: bool,
    is_cancel: bool = False,
    must_be_sent: bool = False,
    result_ttl_s: int,
    reply_to: str | None,
) -> tuple[list[str], list[str | bytes | int]]:
    """Return the keys and arguments of `END_JOB`."""
    channel = str(reply_to) if is_reply_channel(reply_to) else ""
    keys = [result_key(job_id), record_key(job_id), *([CANCELLED_KEY] if is_cancel else [])]
    ttls = (result_ttl_s, result_ttl_s + RECORD_TTL_S)
    flags = (int(is_final), int(must_be_sent))
    return keys, [payload, *ttls, status, *flags, channel, job_id, MAX_CANCELLED]


class ResultStore:
    """The Redis that holds results, as one client sees it.

    Large results come through blocking connections, in threads: asyncio would hold the loop for megabytes.
    """

    def __init__(self, redis: aioredis.Redis, url: str, inbox: Inbox, calls: Calls) -> None:
        self.redis, self.url, self.inbox, self.calls = redis, url, inbox, calls
        self._threads = Threads()
        self._blocking = connect_sync(url)
        self._unwanted: list[str] = []
        self._clearing: asyncio.Task[None] | None = None

    async def look(self, job_id: str) -> tuple[Outcome | None, str | None]:
        """Return how the job ended, if it has, and its record."""
        with redis_errors(self.url):
            async with self.redis.pipeline(transaction=False) as pipe:
                pipe.getrange(result_key(job_id), 0, LARGE_BYTES - 1)
                pipe.get(record_key(job_id))
                head, record = cast("tuple[bytes | None, bytes | None]", await pipe.execute())
            payload: bytes | memoryview | None = head
            known = record.decode(errors="replace") if record else None
            if head and len(head) == LARGE_BYTES:
                loop, key = asyncio.get_running_loop(), result_key(job_id)
                payload = await loop.run_in_executor(self._threads, get_large, self._blocking, key)
        # A retry in between is stored too, with a status that is not the end.
        outcome = decode_outcome(job_id, payload) if payload and known in ENDED else None
        return outcome, known

    async def record_sent(self, job_ids: Sequence[str]) -> None:
        """Note, in one round trip, that jobs are sent: whoever is told their ids may ask for them."""
        with redis_errors(self.url):
            async with self.redis.pipeline(transaction=False) as pipe:
                for job_id in job_ids:
                    pipe.set(record_key(job_id), SENT, ex=RECORD_TTL_S, nx=True)
                await pipe.execute()

    async def forget_sent(self, job_ids: Sequence[str]) -> None:
        """Delete what `record_sent` noted: these jobs were not sent."""
        with redis_errors(self.url):
            await self.redis.delete(*map(record_key, job_ids))

    async def read_stream(self, job_id: str, after: str) -> list[Entry]:
        """Return the entries of a job's stream behind the one of this id, in their order."""
        with redis_errors(self.url):
            entries = await self.redis.xrange(stream_key(job_id), after, "+", count=PIECES_AT_ONCE)
        return cast("list[Entry]", entries)

    async def end(self, job_id: str, error: JobCancelledError, *, must_be_sent: bool) -> bool:
        """End a job that was sent and has not ended; False if it has, or is unknown and must be known."""
        keys, arguments = end_job_arguments(
            job_id=job_id,
            payload=encode_failure(job_id, error),
            status="REVOKED",
            is_final=True,
            is_cancel=True,
            must_be_sent=must_be_sent,
            result_ttl_s=RECORD_TTL_S,
            reply_to=self.inbox.reply_to,
        )
        with redis_errors(self.url):
            return bool(await self.redis.eval(END_JOB, len(keys), *keys, *arguments))

    async def forget(self, job_id: str) -> None:
        """Delete the result; the record stays, so that a later look hears "expired"."""
        with redis_errors(self.url):
            await self.redis.delete(result_key(job_id))

    def forget_soon(self, job_id: str) -> None:
        """Delete the result of a job that nobody can ask for again, together with others of the moment."""
        self._unwanted.append(job_id)
        if self._clearing is None or self._clearing.done():
            self._clearing = asyncio.create_task(self._clear(), name="penstock-forget")

    async def _clear(self) -> None:
        with contextlib.suppress(asyncio.CancelledError):  # by `close`: there is no time left to wait
            await asyncio.sleep(FORGET_EVERY_S)
        ids, self._unwanted = self._unwanted, []
        with contextlib.suppress(PenstockError), redis_errors(self.url):  # else they expire by themselves
            async with self.redis.pipeline(transaction=False) as pipe:
                pipe.delete(*map(result_key, ids))
                for job_id in ids:
                    # For as long as a second delivery may come, the record says that it need not be computed.
                    pipe.set(record_key(job_id), "SUCCESS", ex=LATE_DELIVERY_S, xx=True)
                await pipe.execute()

    async def close(self) -> None:
        """Stop listening and close all connections."""
        if self._clearing is not None:
            self._clearing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._clearing
        await self.inbox.close()
        await self.redis.aclose()
        self._blocking.close()
        self._threads.shutdown()
