"""Pieces of text on their way to readers: of all jobs together, at most every 50 ms."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, get_args
from uuid import uuid4

import redis

from penstock.connections import connect_sync
from penstock.keys import STREAM_TTL_S, is_reply_channel, stream_key
from penstock.refusals import in_words
from penstock.stream import APPEND, MAX_PIECES, Part
from penstock_workers.background import Background

logger = logging.getLogger(__name__)

COALESCE_S: Final = 0.05
"""Pieces that come within this time travel together; a first one does not wait."""


class Stream:
    """The text of one job, as far as it is there. Made by `Streams.open`."""

    def __init__(self, job_id: str, channel: str, streams: "Streams") -> None:
        # Bytes: what one stream is called must not keep those of other jobs from being written.
        self.job_id, self.channel = _encoded(job_id), _encoded(channel)
        self.key = _encoded(stream_key(job_id))
        self._streams = streams
        self.run = uuid4().hex[:12]  # tells readers that another worker begins again
        self.n_sent: dict[Part, int] = {}
        self._unread_since: float | None = None
        self.is_begun = False

    def write(self, piece: str, part: Part = "text") -> None:
        """Add a piece; does not wait for Redis."""
        self.is_begun = True
        self._streams.add(self, part, piece)

    def is_unread(self) -> bool:
        """Whether nobody has listened to the last pieces for longer than the timeout of readers."""
        since = self._unread_since
        return since is not None and time.monotonic() - since > self._streams.reader_timeout_s

    def sent(self, part: Part, n_characters: int, n_readers: int) -> None:
        """Note that Redis has a piece, and how many readers heard of it."""
        self.n_sent[part] = self.n_sent.get(part, 0) + n_characters
        if n_readers:
            self._unread_since = None
        elif self._unread_since is None:
            self._unread_since = time.monotonic()


class Streams(Background):
    """Writes the pieces of all jobs of a process, in one round trip at a time.

    While Redis is out of reach, pieces wait and become one. A piece that was sent and not answered is sent
    again; readers know by its place that they have it.

    Args:
        url: URL of the result store.
        reader_timeout_s: Seconds that pieces may go unheard before a stream counts as unread.
    """

    def __init__(self, url: str, reader_timeout_s: float) -> None:
        super().__init__("streams", self._write_some)
        self._url, self.reader_timeout_s = url, reader_timeout_s
        self._lock = threading.Lock()
        self._waiting: dict[tuple[Stream, Part], str] = {}
        self._unwanted: set[str] = set()  # jobs whose text is to go
        self._wake = threading.Event()
        self._redis: redis.Redis | None = None
        self._is_away = False

    @contextmanager
    def open(
        self, job_id: str, reply_to: str | None, is_unwanted: Callable[[], bool] = lambda: False
    ) -> Iterator[Stream]:
        """Begin the text of a job; what is not sent when it is over is in the job's result.

        Args:
            job_id: Id of the job.
            reply_to: Channel that its message names.
            is_unwanted: Says that the job was cancelled; called at the end, to remove the text that was sent.
        """
        channel = str(reply_to) if is_reply_channel(reply_to) else stream_key(job_id)
        stream = Stream(job_id, channel, self)
        try:
            yield stream
        finally:
            with self._lock:
                for part in get_args(Part):
                    self._waiting.pop((stream, part), None)
            if stream.is_begun and is_unwanted():
                self.discard(job_id)

    def discard(self, job_id: str) -> None:
        """Remove what Redis holds of a job's text, after pieces that are on their way; does not wait."""
        with self._lock:
            self._unwanted.add(job_id)
        self._wake.set()

    def add(self, stream: Stream, part: Part, piece: str) -> None:
        """Queue a piece of a stream."""
        with self._lock:
            self._waiting[stream, part] = self._waiting.get((stream, part), "") + piece
        self._wake.set()

    def _write_some(self) -> None:
        self._wake.wait()
        self._wake.clear()
        try:
            self._send()
            self._is_away = False
        except (redis.RedisError, OSError) as error:
            if not self._is_away:
                logger.warning("streamed text waits for Redis: %s", in_words(error))
            self._is_away = True
            self._wake.set()
            time.sleep(1.0)
        except Exception:
            self._wake.set()
            raise
        time.sleep(COALESCE_S)

    def _send(self) -> None:
        self._redis = self._redis or connect_sync(self._url)
        with self._lock:
            pieces, unwanted = dict(self._waiting), sorted(self._unwanted)
        with self._redis.pipeline(transaction=False) as pipe:
            for (stream, part), piece in pieces.items():
                text = piece.encode(errors="replace")  # a tokenizer may give half of a surrogate pair
                arguments = (stream.run, stream.n_sent.get(part, 0), text, MAX_PIECES, STREAM_TTL_S)
                pipe.eval(APPEND, 1, stream.key, *arguments, stream.channel, stream.job_id, part)
            for job_id in unwanted:
                pipe.delete(_encoded(stream_key(job_id)))
            answers = pipe.execute(raise_on_error=False)
        failures = []
        with self._lock:
            for ((stream, part), piece), n_readers in zip(pieces.items(), answers, strict=False):
                if isinstance(n_readers, Exception):
                    # Its key holds something else: its reader gets all of it with the result.
                    if str(n_readers).startswith("WRONGTYPE"):
                        self._waiting.pop((stream, part), None)
                    else:
                        failures.append(n_readers)
                    continue
                stream.sent(part, len(piece), n_readers)
                if rest := self._waiting.get((stream, part), "")[len(piece) :]:
                    self._waiting[stream, part] = rest
                else:
                    self._waiting.pop((stream, part), None)
            for job_id, n_removed in zip(unwanted, answers[len(pieces) :], strict=True):
                if not isinstance(n_removed, Exception):
                    self._unwanted.discard(job_id)
        if failures:
            raise failures[0]


def _encoded(name: str) -> bytes:
    return name.encode(errors="backslashreplace")
