"""Celery's result backend: many results in one round trip, none lost while Redis is away, no second ending.

Celery's own takes two round trips for each result, drops it when Redis is full, and lets a late failure
replace a result that was cancelled or is a failure already.
"""

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any, Final

import redis
from celery import states
from celery.backends.redis import RedisBackend
from celery.exceptions import BackendStoreError, Reject
from kombu.asynchronous import get_event_loop
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import NoScriptError, RedisError

from penstock.codec import MAX_RESULT_BYTES, encode_failure
from penstock.errors import JobCancelledError, ResultTooLargeError
from penstock.keys import record_key
from penstock.refusals import OutageError, attentive, is_for_now
from penstock.result_store import END_JOB, end_job_arguments
from penstock_workers.background import Background

logger = logging.getLogger(__name__)

PATIENCE_S: Final = 30.0
"""How long a result waits for a Redis that refuses to write, seconds, unless `result_patience_s` says."""
MAX_PENDING_BYTES: Final = 64 << 20
"""Results that wait to be stored; above, further ones are not even encoded. One may be larger alone."""
MAX_BATCH: Final = 128
MAX_BATCH_BYTES: Final = 8 << 20  # a small result does not wait long for large ones

_SCRIPT_ID: Final = hashlib.sha1(END_JOB.encode(), usedforsecurity=False).hexdigest()
_UNREACHABLE: Final = (redis.ConnectionError, redis.TimeoutError, OSError)
_LIMIT: Final = "proto-max-bulk-len"
_MIN_LIMIT_BYTES: Final = 1 << 20  # the smallest that Redis lets it be
_MOST_FAILURES: Final = 32  # that a pause is computed from: above 1,000 it overflows
_HANGUPS: Final = 3  # on one result, by a server that answers: no accident any more


class ResultBackend(RedisBackend):  # type: ignore[misc]  # Celery has no types
    """Stores results with `penstock.result_store.END_JOB`, those of all threads together."""

    connection_class: type = redis.Connection

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        kind = self.connparams.get("connection_class", self.connection_class)
        self.connparams["connection_class"] = attentive(kind)
        patience_s = float(self.app.conf.get("result_patience_s", PATIENCE_S))
        self._writer = Writer(lambda: self._create_client(**self.connparams), patience_s)
        self._room = threading.Condition()
        self._pending_bytes = 0

    def _params_from_url(self, url: str, defaults: dict[str, Any]) -> Any:
        if url.startswith("socket:"):  # keepalive is TCP's alone, and a socket's connections do not take it
            defaults = {name: value for name, value in defaults.items() if name != "socket_keepalive"}
        return super()._params_from_url(url, defaults)

    def is_ended(self, job_id: str) -> bool:
        """Whether the job was cancelled, or answered by an earlier delivery."""
        record: bytes | None = self._writer.put("GET", record_key(job_id)).result()
        return record is not None and record.decode(errors="replace") in states.READY_STATES

    def on_chord_part_return(self, request: Any, state: str, result: object, **options: Any) -> None:
        """Count a part of a chord, again if Redis was away: a chord waits for ever for a part not counted.

        A body that takes no results gets none: they would be stored once more, and read by the last part.
        """
        if state == states.SUCCESS and request.chord.get("immutable"):
            result = None
        self._ensure_retryable(super().on_chord_part_return, request, state, result, **options)

    def mark_as_retry(self, *args: object, **options: object) -> None:
        """Store nothing: a job that is delayed has no result yet, and its caller waits on."""

    def store_result(self, task_id: str, result: object, state: str, *args: Any, **options: Any) -> Any:
        """Store how a job ended; one that was found unwanted ended as if its caller had cancelled it."""
        if isinstance(result, JobCancelledError):
            state = states.REVOKED
        return super().store_result(task_id, result, state, *args, **options)

    def revoke(self, jobs: Iterable[tuple[str, str]]) -> None:
        """End jobs that will never run, given by id and `reply_to`; returns when their callers are told.

        A store that is away is waited for `PATIENCE_S` at most; then it is said that some do not know.
        """
        answers = []
        for job_id, reply_to in jobs:
            keys, arguments = end_job_arguments(
                job_id=job_id,
                payload=encode_failure(job_id, JobCancelledError(job_id)),
                status=states.REVOKED,
                is_final=True,
                result_ttl_s=int(self.expires),
                reply_to=reply_to,
            )
            answers.append(self._writer.put("EVALSHA", _SCRIPT_ID, len(keys), *keys, *arguments))
        _, untold = wait(answers, PATIENCE_S)
        if untold:
            logger.error("result store out of reach: %d callers of purged jobs are not told", len(untold))

    def _store_result(
        self,
        task_id: str,
        result: object,
        state: str,
        traceback: str | None = None,
        request: Any = None,
        **_: object,
    ) -> object:
        """Return when the result is stored, or the job has ended before.

        Raises:
            Reject: Redis refuses to write for too long; the job belongs back into its queue. Celery lets
                this one error through to the pool, and would store any other as the job's failure.
            ResultTooLargeError: Redis hangs up on a result of this size.
            BackendStoreError: Redis refuses this one result.
        """
        meta = self._get_result_meta(result=result, state=state, traceback=traceback, request=request)
        # Acknowledgements and signals are the event loop's work: it gives a result and does not wait.
        waits = not _is_event_loop()
        with self._room:
            if waits:
                self._room.wait_for(lambda: self._pending_bytes < MAX_PENDING_BYTES)
            payload: bytes = self.encode(meta | {"task_id": task_id})
            self._pending_bytes += len(payload)
        keys, arguments = end_job_arguments(
            job_id=task_id,
            payload=payload,
            status=state,
            is_final=state in states.READY_STATES,
            result_ttl_s=int(self.expires),
            reply_to=getattr(request, "reply_to", None),
        )
        stored = self._writer.put("EVALSHA", _SCRIPT_ID, len(keys), *keys, *arguments, n_bytes=len(payload))
        stored.add_done_callback(lambda _: self._make_room(len(payload)))
        if waits:
            stored.result()
        else:
            stored.add_done_callback(lambda future: _log_failure(task_id, future))
        return result

    def _make_room(self, n_bytes: int) -> None:
        with self._room:
            self._pending_bytes -= n_bytes
            self._room.notify_all()


@dataclass(eq=False, slots=True, kw_only=True)
class _Order:
    """A command that a thread waits to see answered.

    Attributes:
        n_bytes: Size of its payload.
        n_hangups: Number of times Redis answered a ping, and then hung up on this command.
    """

    command: tuple[bytes, ...]
    n_bytes: int
    n_hangups: int = 0
    given_at: float = field(default_factory=time.monotonic)
    answer: Future[Any] = field(default_factory=Future)


class Writer:
    """One thread and one connection that speak to Redis for all threads of a process.

    While one round trip is in flight, the commands of the next pile up: the busier, the larger its batches.
    A command that was not answered is sent again, so each has to be one that does no harm twice: `END_JOB`
    ends a job once.
    """

    def __init__(self, connect: Callable[[], redis.Redis], patience_s: float) -> None:
        self._connect, self._patience_s = connect, patience_s
        self._orders: SimpleQueue[_Order] = SimpleQueue()
        self._thread: Background | None = None
        self._starting = threading.Lock()
        self._backoff = ExponentialWithJitterBackoff(cap=1.0, base=0.02)

    def put(self, *command: str | bytes | int, n_bytes: int = 0) -> Future[Any]:
        """Take a command; the future gets Redis' answer, or why this one command cannot be sent."""
        try:
            # Here and not in the batch: one that cannot be encoded fails alone.
            order = _Order(command=tuple(map(_encoded, command)), n_bytes=n_bytes)
        except (TypeError, UnicodeEncodeError) as error:
            refused: Future[Any] = Future()
            refused.set_exception(BackendStoreError(f"no command for Redis: {type(error).__name__}"))
            return refused
        if self._thread is None:
            self._start()
        self._orders.put(order)
        return order.answer

    def _start(self) -> None:
        with self._starting:
            if self._thread is None:
                self._redis = self._connect()
                self._thread = Background("results", self._answer_some)
                self._thread.start()

    def _answer_some(self) -> None:
        orders = self._next_batch()
        try:
            self._carry_out(orders)
        except Exception as error:
            # A bug, or a server that is no Redis; nobody may wait for ever for an answer.
            for order in orders:
                if not order.answer.done():
                    order.answer.set_exception(error)
            raise

    def _next_batch(self) -> list[_Order]:
        batch = [self._orders.get()]
        n_bytes = batch[0].n_bytes
        while len(batch) < MAX_BATCH and n_bytes < MAX_BATCH_BYTES:
            try:
                batch.append(self._orders.get_nowait())
            except Empty:
                break
            n_bytes += batch[-1].n_bytes
        return batch

    def _carry_out(self, orders: list[_Order]) -> None:
        """Answer every order, however long Redis is out of reach."""
        n_failures = 0
        while orders:
            # After a failure one by one: what Redis hangs up on must not take its neighbours along.
            error = self._attempt(orders[:1], is_retry=True) if n_failures else self._attempt(orders)
            orders = [order for order in orders if not order.answer.done()]
            if error is None:
                n_failures = 0
                continue
            n_failures += 1
            if n_failures == 1:
                logger.warning("results wait for Redis: %s", error)
            self._redis.connection_pool.disconnect()  # the name may stand for another server by now
            time.sleep(self._backoff.compute(min(n_failures, _MOST_FAILURES)))

    def _attempt(self, orders: list[_Order], *, is_retry: bool = False) -> Exception | None:
        """Send the orders and answer those that can be; return why others cannot."""
        is_up = False
        try:
            if is_retry:
                is_up = bool(self._redis.ping())
            replies = self._send(orders)
        except OutageError as error:  # it answers: the first has waited for it the longest
            return self._answer(orders[0], error)
        except _UNREACHABLE as error:
            orders[0].n_hangups += is_up
            if orders[0].n_hangups < _HANGUPS or orders[0].n_bytes < _MIN_LIMIT_BYTES:
                return error
            orders[0].answer.set_exception(self._too_large(orders[0].n_bytes))
            return None
        errors = [self._answer(order, reply) for order, reply in zip(orders, replies, strict=True)]
        return next(filter(None, errors), None)

    def _send(self, orders: list[_Order]) -> list[Any]:
        """Return Redis' replies, errors among them."""
        while True:
            pipeline = self._redis.pipeline(transaction=False)
            for order in orders:
                pipeline.execute_command(*order.command)  # type: ignore[no-untyped-call]  # redis-py's own gap
            replies: list[Any] = pipeline.execute(raise_on_error=False)
            if not any(isinstance(reply, NoScriptError) for reply in replies):
                return replies
            self._redis.script_load(END_JOB)

    def _answer(self, order: _Order, reply: Any) -> Exception | None:
        """Tell the waiting thread; return the error that is worth another attempt."""
        if not isinstance(reply, RedisError):
            order.answer.set_result(reply)
        elif str(reply).startswith("Protocol error"):  # it hangs up next; often nothing but that is heard
            order.answer.set_exception(self._too_large(order.n_bytes))
        elif not is_for_now(reply):  # an error of this one result, and not of the server
            order.answer.set_exception(BackendStoreError(str(reply)))
        elif time.monotonic() - order.given_at > self._patience_s:
            order.answer.set_exception(Reject(f"result not stored: {reply}", requeue=True))
        else:
            return reply
        return None

    def _too_large(self, n_bytes: int) -> ResultTooLargeError:
        self._redis.connection_pool.disconnect()  # Redis has hung up, or is about to
        try:
            limit = int(self._redis.config_get(_LIMIT)[_LIMIT] or 0)
        except (RedisError, OSError, KeyError):  # administrators may forbid the question
            limit = MAX_RESULT_BYTES
        return ResultTooLargeError(n_bytes, min(limit, n_bytes - 1))


def _encoded(value: object) -> bytes:
    if isinstance(value, bytes):
        return value
    if type(value) is int or isinstance(value, str):
        return str(value).encode()
    raise TypeError(f"a {type(value).__name__} in a command")


def _is_event_loop() -> bool:
    return get_event_loop() is not None and threading.current_thread() is threading.main_thread()


def _log_failure(job_id: str, stored: Future[Any]) -> None:
    if (error := stored.exception()) is not None:
        logger.error("result not stored: %s", error, extra={"job_id": job_id})
