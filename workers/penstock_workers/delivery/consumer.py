"""Taking messages off the queues: whatever lies there, the worker lives and the sender gets an answer.

Stock Celery 5.7 ends the worker on a body of another shape, logs the body of what it refuses, and leaves its
sender waiting. What is no message at all never comes here: the transport puts it into the dead-letter list.
"""

import logging
import random
import time
from collections.abc import Callable
from typing import Any, Final

from billiard.einfo import ExceptionWithTraceback
from celery.app.task import Context
from celery.exceptions import InvalidTaskError
from celery.worker import state
from celery.worker.consumer import Consumer as CeleryConsumer
from celery.worker.request import Request as CeleryRequest
from kombu.exceptions import ContentDisallowed

from penstock.envelope import printable, problem_of_headers, sender_of
from penstock.errors import InvalidMessageError, UpstreamError
from penstock.messages import TASK_NAMES
from penstock.request import summarize
from penstock_workers.clock import BROKER_CLOCK
from penstock_workers.delivery.callbacks import EMBEDDED, CallbackError, awaited_ids
from penstock_workers.delivery.control import replace_commands
from penstock_workers.delivery.transport import RefusedError
from penstock_workers.tracebacks import forget_frames

logger = logging.getLogger(__name__)

RECONNECT_S: Final = (0.3, 1.0)
"""Between two tries to reach a broker that is away, seconds; drawn once for each outage."""

EVENTS_S: Final = 0.1
"""Events of so many seconds go out together."""

_OF_THE_BODY: Final = ("args", "kwargs", "headers", "callbacks", "errbacks", "chord")
"""Fields of Celery's protocol 1 that are no headers in protocol 2."""

_MALFORMED = (ValueError, TypeError, KeyError, AttributeError)


class Consumer(CeleryConsumer):  # type: ignore[misc]  # Celery has no types
    """Answers messages that cannot become tasks with `InvalidMessageError`, and keeps them as dead letters.

    Their content is not logged.
    """

    _events_at = _late_events_at = 0.0

    def __init__(self, *args: Any, **options: Any) -> None:
        if hasattr(options.get("app"), "penstock_queues"):
            replace_commands()
        super().__init__(*args, **options)

    def _flush_events(self) -> None:
        """Send the events that wait; Celery does so in every turn of its loop, half of the loop's time."""
        now = time.monotonic()
        if now >= self._events_at:
            self._events_at = now + EVENTS_S
            super()._flush_events()
        elif self._late_events_at < now:
            self._late_events_at = self._events_at
            self.hub.call_later(self._events_at - now, self._flush_events)

    def stop(self) -> None:
        """Stop; the last events are sent before."""
        super()._flush_events()
        super().stop()

    def ensure_connected(self, conn: Any) -> Any:
        """Connect, however long the broker is away; each new reason is logged.

        Celery's own waits 2 s, then 4, up to 30: for so long no job would be taken after a failover.
        """
        told = ""

        def tell(error: Exception, _: float) -> None:
            nonlocal told
            if (problem := f"{type(error).__name__}: {error}") != told:
                told = problem
                logger.error("no connection to %s, trying again for ever: %s", conn.as_uri(), problem)

        pause_s = random.uniform(*RECONNECT_S)  # noqa: S311  so that workers do not come back all at once
        conn.ensure_connection(
            tell,
            interval_start=pause_s,
            interval_step=0,
            interval_max=pause_s,
            callback=state.maybe_shutdown,
        )
        self.first_connection_attempt = False
        return conn

    def update_strategies(self) -> None:
        """Take the tasks of an app of ours alone: not Celery's own, nor those that `-I` brings."""
        super().update_strategies()
        if hasattr(self.app, "penstock_callbacks"):
            for name in self.strategies.keys() - set(TASK_NAMES.values()):
                del self.strategies[name]

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Callable[[Any], object]:
        """Return what takes a message; see Celery's own."""
        handle = super().create_task_handler(*args, **kwargs)

        def on_message(message: Any) -> object:
            try:
                return handle(message)
            except _MALFORMED as error:
                self._refuse(message, f"body of another shape ({type(error).__name__})")
                return None

        return on_message

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        """Refuse a message that the transport refuses, or a body that is not what its content type says."""
        if isinstance(exc, RefusedError):
            raise exc  # kombu asks again about what this function itself has raised
        if isinstance(exc, InvalidMessageError):
            self._refuse(message, exc.problem)
        self._refuse(message, f"body is not {message.content_type} ({type(exc).__name__})")

    def on_invalid_task(self, body: object, message: Any, exc: Exception) -> None:
        """Refuse a content type that is not read here, or a body of another shape."""
        if isinstance(exc, ContentDisallowed):
            self._refuse(message, f"content type {message.content_type} is not read here, only JSON")
        else:
            self._refuse_followers(message, str(exc))
            self._refuse(message, str(exc), body)

    def on_unknown_message(self, body: object, message: Any) -> None:
        """Refuse a message without a task name."""
        del body
        self._refuse(message, "it names no task")

    def on_unknown_task(self, body: object, message: Any, exc: Exception) -> None:
        """Refuse a task that does not exist."""
        del body
        self._refuse(message, f"there is no task {str(exc)[:80]}")

    def _refuse_followers(self, message: Any, problem: str) -> None:
        body = message.payload
        embedded = body[2] if isinstance(body, list) and len(body) > 2 else None
        for job_id in awaited_ids(embedded):
            error = InvalidMessageError(f"the job before it was refused: {problem}")
            self.app.backend.mark_as_failure(job_id, error, call_errbacks=False)

    def _refuse(self, message: Any, problem: str, body: object = None) -> None:
        problem = printable(problem)
        # In Celery's protocol 1 the body names the job.
        named = body if isinstance(body, dict) and not message.headers else message.headers
        sender = sender_of({"headers": named, "properties": message.properties})
        logger.error("message refused: %s", problem, extra={"job_id": sender and sender.job_id})
        if sender is not None:
            request = Context(id=sender.job_id, reply_to=sender.reply_to)
            error = InvalidMessageError(problem)
            self.app.backend.mark_as_failure(sender.job_id, error, request=request, call_errbacks=False)
        raise RefusedError(problem)


class Request(CeleryRequest):  # type: ignore[misc]  # Celery has no types
    """A task that was taken; shows how much it holds in place of its arguments.

    Senders that are not ours put the arguments' text into the headers, from where Celery sends it to
    logs, events and Flower.
    """

    def __init__(self, message: Any, **options: Any) -> None:
        if options.get("decoded"):
            self._check_old(options["headers"])
        try:
            super().__init__(message, **options)
        except _MALFORMED as error:
            raise InvalidTaskError(f"body of another shape ({type(error).__name__})") from error
        if not isinstance(self._args, list | tuple) or not isinstance(self._kwargs, dict):
            raise InvalidTaskError("arguments are not a list and a mapping")
        self._check_embedded()
        self._argsrepr = "()"
        self._kwargsrepr = summarize(self._kwargs)
        self._request_dict.update(argsrepr=self._argsrepr, kwargsrepr=self._kwargsrepr)

    def maybe_expire(self) -> bool:
        """Say whether the message is past its `expires`, by the broker's clock."""
        is_late = self.expires is not None and BROKER_CLOCK.now() > self.expires.timestamp()
        if is_late:
            state.revoked.add(self.id)
        return is_late

    def _check_old(self, fields: dict[str, Any]) -> None:
        """Check a message of Celery's protocol 1, in which the body's fields are what headers are in 2."""
        named = {name: value for name, value in fields.items() if name not in _OF_THE_BODY}
        if "task" not in named or (problem := problem_of_headers(named)):
            raise InvalidTaskError(problem if "task" in named else "it names no task")

    def _check_embedded(self) -> None:
        """Refuse, before it is computed, what could not be sent or kept after that."""
        embedded, headers = self._payload[2] or {}, self._request_dict
        # Celery reads them from the headers too, and any other name would replace what the headers say.
        if not isinstance(embedded, dict) or not embedded.keys() <= set(EMBEDDED):
            raise InvalidTaskError(f"the third part of its body holds more than {', '.join(EMBEDDED)}")
        if named := [name for name in EMBEDDED if headers.get(name) is not None]:
            raise InvalidTaskError(f"its headers hold {', '.join(named)}, which are part of its body")
        if any(limit is not None for limit in self.time_limits):
            raise InvalidTaskError(
                "it has a time limit; none is kept here, since a thread cannot be ended: send a deadline"
            )
        if any(value is not None for value in embedded.values()):
            try:
                self._app.penstock_callbacks.check(embedded)
            except CallbackError as error:
                raise InvalidTaskError(str(error)) from None

    def terminate(self, pool: Any, signal: Any = None) -> None:
        """Compute nothing more for the job; its thread ends by itself."""
        self._app.penstock_cancelled.add(self.id)
        super().terminate(pool, signal)

    def on_retry(self, exc_info: Any) -> None:
        """Put the job off; Celery would send it anew, and acknowledge this one afterwards."""
        self.message.channel.qos.retry(self.message.delivery_tag, _error_of(exc_info).when)
        super().on_retry(exc_info)

    def on_failure(self, exc_info: Any, *args: Any, **options: Any) -> Any:
        """Keep a job that was tried again in vain as a dead letter; after a deadline it is of no use."""
        error, retries = _error_of(exc_info), self._request_dict.get("retries") or 0
        is_transient = isinstance(error, UpstreamError) and error.retryable
        if retries and is_transient and self._kwargs.get("deadline") is None:
            self.message.channel.qos.dead_letter(
                self.message, f"tried {retries + 1} times: {type(error).__name__}"
            )
        try:
            return super().on_failure(exc_info, *args, **options)
        finally:
            forget_frames(error)  # all is told, and the frame of Celery's tracer, which holds it, is over

    def send_event(self, type: str, **fields: Any) -> None:  # noqa: A002  Celery's own name
        """Send an event, without a traceback: its last line is what the error says of the caller's words."""
        fields.pop("traceback", None)
        super().send_event(type, **fields)

    def info(self, safe: bool = False) -> dict[str, Any]:
        """Describe it for `celery inspect` and Flower, always without its texts."""
        del safe
        return dict(super().info(safe=True))


def _error_of(exc_info: Any) -> Any:
    error = exc_info.exception
    return error.exc if isinstance(error, ExceptionWithTraceback) else error
