"""Which jobs their callers have cancelled: heard of, so that no job has to ask.

A client hears of results by a loop of its own (`penstock.inbox`): that one is a task of the caller's event
loop, this one a thread on redis-py's blocking client, which goes on while Celery's loop is busy. They ask a
silent connection for a sign of life in the same way, but share no call that waits.
"""

import logging
import time
from collections.abc import Iterable
from typing import Any, Final, cast

import redis
from redis.backoff import ExponentialWithJitterBackoff

from penstock.connections import connect_sync
from penstock.envelope import is_clean
from penstock.inbox import RENEW_S
from penstock.keys import CANCELLED_KEY
from penstock.refusals import in_words
from penstock.result_store import MAX_CANCELLED
from penstock_workers.background import Background

logger = logging.getLogger(__name__)

SILENCE_S: Final = 5.0
"""After this a connection is asked for a sign of life, and after as much again it is given up."""


class Cancelled(Background):
    """The ids of cancelled jobs, as far as this process has heard; `job_id in cancelled` costs nothing.

    What it misses while Redis is away it reads when it is back. A job that is computed all the same wastes
    a forward pass and no more: the result store keeps the first ending. Whoever may cancel can write anything
    into set and channel: what cannot be an id is passed by.
    """

    def __init__(self, url: str) -> None:
        super().__init__("cancelled", self._listen)
        self._url = url
        self._ids: dict[str, None] = {}  # in the order heard
        self._redis: redis.Redis | None = None
        self._pubsub: Any = None
        self._is_asked = False
        self._n_failures_of_redis = 0
        self._backoff = ExponentialWithJitterBackoff(cap=2.0, base=0.05)

    def __contains__(self, job_id: object) -> bool:
        return job_id in self._ids

    def add(self, job_id: str) -> None:
        """Take note of a job that was ended in another way, by this process alone."""
        self._ids[job_id] = None

    def _listen(self) -> None:
        """Hear of one job, or begin to."""
        try:
            if self._pubsub is None:
                self._begin()
            else:
                self._hear()
            self._n_failures_of_redis = 0
        except (redis.RedisError, OSError) as error:
            self._hang_up()
            if not self._n_failures_of_redis:
                logger.warning("cancelled jobs are not heard of: %s", in_words(error))
            self._n_failures_of_redis = min(
                self._n_failures_of_redis + 1, 32
            )  # above 1,000 a pause overflows
            time.sleep(self._backoff.compute(self._n_failures_of_redis))
        except Exception:
            self._hang_up()
            raise

    def _begin(self) -> None:
        self._redis = self._redis or connect_sync(self._url, n_retries=0)
        self._is_asked = False
        self._pubsub = self._redis.pubsub()  # type: ignore[no-untyped-call]  # redis-py's own gap
        self._pubsub.subscribe(CANCELLED_KEY)
        self._pubsub.get_message(timeout=SILENCE_S)  # confirmed: from here on nothing is missed
        # The latest ones: others may have put more into the set than our clients keep there.
        self._add(cast("list[bytes]", self._redis.zrange(CANCELLED_KEY, -MAX_CANCELLED, -1)))

    def _hear(self) -> None:
        message = self._pubsub.get_message(timeout=SILENCE_S)
        if message is None and self._is_asked:
            raise redis.ConnectionError("no sign of life")
        self._is_asked = message is None
        if message is None:
            assert self._redis is not None
            self._redis.execute_command("HELLO")  # type: ignore[no-untyped-call]  # an error if it is no primary
            connection = self._pubsub.connection
            if connection.is_replaced or connection.age_s > RENEW_S:
                self._hang_up()  # in silence: to be heard of from whichever server it is now
            else:
                self._pubsub.ping()
        elif message["type"] == "message":
            self._add([message["data"]])

    def _hang_up(self) -> None:
        pubsub, self._pubsub = self._pubsub, None
        if pubsub is not None:
            pubsub.close()

    def _add(self, ids: Iterable[bytes]) -> None:
        found = (job_id.decode(errors="surrogateescape") for job_id in ids)
        self._ids.update(dict.fromkeys(job_id for job_id in found if is_clean(job_id)))
        while len(self._ids) > MAX_CANCELLED:
            del self._ids[next(iter(self._ids))]
