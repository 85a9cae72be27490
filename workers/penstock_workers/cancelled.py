"""Which jobs their callers have cancelled: heard of, so that no job has to ask."""

import logging
import threading
from collections.abc import Iterable
from typing import Final, cast

import redis
from tenacity import Retrying, retry_if_exception_type, wait_random_exponential

from penstock.broker import connect_sync
from penstock.store import CANCELLED_KEY, MAX_CANCELLED

logger = logging.getLogger(__name__)

SILENCE_S: Final = 5.0
"""After this a connection is asked for a sign of life, and after as much again it is given up."""


class Cancelled(threading.Thread):
    """The ids of cancelled jobs, as far as this process has heard; `job_id in cancelled` costs nothing.

    What it misses while Redis is away it reads when it is back. A job that is computed all the same wastes
    a forward pass and no more: the result store keeps the first ending.
    """

    def __init__(self, url: str) -> None:
        super().__init__(name="cancelled", daemon=True)
        self._url = url
        self._ids: dict[str, None] = {}  # in the order heard

    def __contains__(self, job_id: object) -> bool:
        return job_id in self._ids

    def run(self) -> None:
        """Listen until the process ends."""
        self._redis = connect_sync(self._url)
        Retrying(
            retry=retry_if_exception_type((redis.RedisError, OSError)),
            wait=wait_random_exponential(multiplier=0.05, max=2.0),
        )(self._listen_again)

    def _listen_again(self) -> None:
        try:
            self._listen()
        except (redis.RedisError, OSError) as error:
            logger.warning("cancelled jobs are not heard of: %s", type(error).__name__)
            raise

    def _listen(self) -> None:
        with self._redis.pubsub() as pubsub:  # type: ignore[no-untyped-call]  # redis-py's own gap
            pubsub.subscribe(CANCELLED_KEY)
            pubsub.get_message(timeout=SILENCE_S)  # confirmed: from here on nothing is missed
            self._add(cast("list[bytes]", self._redis.zrange(CANCELLED_KEY, 0, -1)))
            is_asked = False
            while True:
                message = pubsub.get_message(timeout=SILENCE_S)
                if message is None and is_asked:
                    raise redis.ConnectionError("no sign of life")
                is_asked = message is None
                if message is None:
                    pubsub.ping()
                elif message["type"] == "message":
                    self._add([message["data"]])

    def _add(self, ids: Iterable[bytes]) -> None:
        self._ids.update(dict.fromkeys(job_id.decode() for job_id in ids))
        while len(self._ids) > MAX_CANCELLED:
            del self._ids[next(iter(self._ids))]
