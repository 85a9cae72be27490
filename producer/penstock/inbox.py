"""Waiting for results: one connection hears of all jobs of a client.

Workers publish a note (the job's id) on the client's reply channel when a job has ended; a small payload
comes with it, a larger one is then fetched once, by whoever waits for it. A note can be lost with the
connection, so every waiter looks for itself after a reconnect, and now and then.

A worker hears of cancelled jobs by a loop of its own (`penstock_workers.delivery.cancelled`): that one is a
thread on redis-py's blocking client, this one a task of the caller's event loop. They ask a silent connection
for a sign of life in the same way, but share no call that waits.
"""

import asyncio
import contextlib
import logging
import weakref
from typing import Any, Final

import redis.asyncio as aioredis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError
from tenacity import AsyncRetrying, retry_if_exception_type, wait_random_exponential

from penstock.connections import redis_errors
from penstock.keys import reply_channel, result_key

logger = logging.getLogger(__name__)

LOOK_AGAIN_S: Final = 5.0
"""How long a waiter trusts the notes alone; bounds what a lost note costs."""
RENEW_S: Final = 30.0
"""A silent subscription is made anew after this: nobody may write to its server any more."""


class Note(asyncio.Event):
    """Set when a job may have ended.

    Attributes:
        payload: the job's result as bytes, if it came with the note.
    """

    payload: bytes | None = None


class Inbox:
    """Hears which jobs ended. Belongs to one event loop."""

    def __init__(self, results: aioredis.Redis, url: str, client_id: str) -> None:
        self.reply_to = reply_channel(client_id)
        self._results, self._url = results, url
        self._pubsub = results.pubsub()
        self._notes: weakref.WeakValueDictionary[str, Note] = weakref.WeakValueDictionary()
        self._listener: asyncio.Task[None] | None = None
        self._opening = asyncio.Lock()
        self._is_asked = False

    async def open(self) -> None:
        """Subscribe, and return when Redis has confirmed it: from then on no note is missed.

        Raises:
            TransportError: the result store cannot be reached, or refuses.
        """
        async with self._opening:
            if self._listener is None:
                with redis_errors(self._url):
                    await self._pubsub.subscribe(self.reply_to)
                    if await self._pubsub.get_message(timeout=LOOK_AGAIN_S) is None:
                        raise RedisTimeoutError("it does not confirm a subscription")
                self._listener = asyncio.create_task(self._listen(), name="penstock-inbox")

    def expect(self, job_id: str) -> Note:
        """Return the note that is set when the job may have ended; forgotten with its last holder."""
        return self._notes.setdefault(job_id, Note())

    async def follow(self, job_id: str) -> Note:
        """Like `expect`, for a job whose notes go to another client."""
        with redis_errors(self._url):
            await self._pubsub.subscribe(result_key(job_id))
        return self.expect(job_id)

    async def unfollow(self, job_id: str) -> None:
        """Undo `follow`."""
        with contextlib.suppress(RedisError, OSError):
            await self._pubsub.unsubscribe(result_key(job_id))

    async def close(self) -> None:
        """Stop listening."""
        while self._listener is not None and not self._listener.done():
            self._listener.cancel()  # again: one that meets the end of a connection gets lost on its way
            await asyncio.wait([self._listener], timeout=0.1)
        await self._pubsub.aclose()  # type: ignore[no-untyped-call]  # redis-py's own gap

    async def _listen(self) -> None:
        """Deliver notes until `close`; whatever the server sends, later notes are still heard."""
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(Exception),
            wait=wait_random_exponential(multiplier=0.05, max=2.0),
        )
        while True:
            try:
                while True:
                    message = await self._next_message()
                    if message is not None and message["type"] == "message":
                        self._deliver(message["channel"], message["data"])
            except Exception as error:  # noqa: BLE001  nobody would notice a listener that ended
                if not isinstance(error, RedisError | OSError):
                    logger.warning("notes of results cannot be read: %s", type(error).__name__)
                async for attempt in retrying:
                    with attempt:
                        await self._resubscribe()

    async def _next_message(self) -> Any:
        """Return what came within `LOOK_AGAIN_S`, or None; a connection that went dead is an error."""
        message = await self._pubsub.get_message(timeout=LOOK_AGAIN_S)
        if message is None and self._is_asked:
            # Nothing closed it, and nothing comes any more: TCP itself would notice after many minutes.
            self._is_asked = False
            if self._pubsub.connection is not None:
                await self._pubsub.connection.disconnect()
            raise RedisConnectionError("no sign of life")
        self._is_asked = message is None
        if self._is_asked:
            # An error if the server is no primary any more.
            await self._results.execute_command("HELLO")  # type: ignore[no-untyped-call]  # redis-py's own gap
            await self._leave_old_server()
            await self._pubsub.ping()
        return message

    async def _leave_old_server(self) -> None:
        connection: Any = self._pubsub.connection
        if connection is not None and (connection.is_replaced or connection.age_s > RENEW_S):
            await connection.disconnect()
            raise RedisConnectionError("it may be another server's turn")

    async def _resubscribe(self) -> None:
        await self._pubsub.connect()  # type: ignore[no-untyped-call]  # subscribes again to all that it had
        for note in list(self._notes.values()):
            note.set()

    def _deliver(self, channel: bytes, data: bytes) -> None:
        payload = None
        # An id that is no text is nobody's; it must not end the listener.
        name = channel.decode(errors="replace")
        if name == self.reply_to:
            job_id, _, payload = data.partition(b"\n")
            name = job_id.decode(errors="replace")
        else:
            name = name.removeprefix(result_key(""))
        if (note := self._notes.get(name)) is not None:
            note.payload = payload or None
            note.set()
