"""How `embed_many` cuts texts into jobs, and how many jobs are in flight: by the workers' live speed.

A job is about one second of one worker's work. Each worker has up to three: one that it computes, one that
fills its next batches, and one on its way. Any job that ends makes room for the next, whatever its place: a
worker may answer the oldest one last. Towards a known end the jobs become smaller, so that all workers
finish together (guided self-scheduling: Polychronopoulos and Kuck, IEEE Trans. Computers C-36, 1987).
"""

import asyncio
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from itertools import islice
from statistics import median
from typing import Final, NoReturn

from tqdm import tqdm

from penstock.calls import CALL_S
from penstock.errors import InvalidTextError, ResultTimeoutError
from penstock.job import AsyncJob
from penstock.options import EmbedOptions
from penstock.registry import ModelInfo, Registry
from penstock.result import Vectors
from penstock.retry import WaitPolicy
from penstock.sender import Sender, submit_limit_s

JOB_S: Final = 1.0
"""Work in one job, seconds of one worker."""
JOBS_PER_WORKER: Final = 3
"""Jobs in flight for each worker."""
UNREAD: Final = 2
"""Ended jobs may wait unread until all jobs are this many times what may be in flight.

Bounds memory when the oldest job is slow.
"""
TEXTS_PER_JOB: Final = 64
"""Texts of a job while the workers' speed is unknown."""
TEXTS_PER_WORKER: Final = 256
"""Keep at least this many texts in flight for each worker, so that it can batch texts of similar length."""
LAST_JOB_S: Final = 0.03
"""Smallest job near a known end, seconds of work."""
FEWEST_TEXTS: Final = 16
"""Texts of the smallest job near a known end while the workers' speed is unknown."""
MOST_TEXTS: Final = 4096
MOST_CHARACTERS: Final = 250_000
"""Most of one job: its first text waits until its last is tokenized. Fast workers tokenize several jobs."""
MOST_CHARACTERS_IN_FLIGHT: Final = 16_000_000


@dataclass(eq=False, slots=True, kw_only=True)
class _Sent:
    """A job that was sent.

    Attributes:
        job: the job itself.
        answer: task that waits for its vectors, shape (n_texts, dim).
        n_texts: number of its texts.
        n_characters: number of characters in these.
        is_ended: True once its end was seen.
    """

    job: AsyncJob[Vectors]
    answer: asyncio.Task[Vectors]
    n_texts: int
    n_characters: int
    is_ended: bool = False


class Cutter:
    """Cuts texts into jobs, by what workers do in `JOB_S`."""

    def __init__(self, texts: Iterable[str]) -> None:
        if isinstance(texts, str | bytes):  # whose items would be embedded one by one
            raise InvalidTextError(0, f"came as a {type(texts).__name__}: pass an iterable of strings")
        self._texts: Iterator[str] = iter(texts)
        self._left = len(texts) if isinstance(texts, Sized) else None
        self._tokens_per_character = 0.25
        self._job_characters, self._job_texts = float(MOST_CHARACTERS), TEXTS_PER_JOB
        self._n_workers, self._knows_speed = 1, False

    def learn_workers(self, registry: Registry, model: ModelInfo) -> None:
        """Learn how many workers a model has now, and how fast they are."""
        pool = registry.choose_pool(model)
        speeds = registry.speeds(model.name, pool)
        self._n_workers = max(1, registry.ready_workers(model.name, pool))
        if speeds:
            characters = median(speeds) * JOB_S / self._tokens_per_character
            self._job_characters = min(characters, MOST_CHARACTERS)
            self._job_texts, self._knows_speed = min(model.max_texts, MOST_TEXTS), True
        self._job_texts = min(self._job_texts, model.max_texts)

    def learn_tokens(self, n_tokens: int, n_characters: int) -> None:
        """Learn how many tokens the characters of a job were."""
        # Slowly: texts come in runs, and one job of code must not halve the next of prose.
        self._tokens_per_character += 0.2 * (max(n_tokens, 1) / n_characters - self._tokens_per_character)

    def is_enough(self, jobs: Sequence[_Sent], factor: int) -> bool:
        """Tell whether these jobs are this many times what may be in flight."""
        n_shares = factor * self._n_workers
        if sum(sent.n_characters for sent in jobs) >= MOST_CHARACTERS_IN_FLIGHT * factor:
            return True
        n_texts = sum(sent.n_texts for sent in jobs)
        return len(jobs) >= JOBS_PER_WORKER * n_shares and n_texts >= TEXTS_PER_WORKER * n_shares

    def cut(self) -> list[str]:
        """Read the texts of the next job; none at the end."""
        texts: list[str] = []
        n_characters, share = 0, self._job_texts
        if self._left is not None and self._n_workers > 1:
            share = self._left // (2 * self._n_workers)
        for text in islice(self._texts, self._job_texts):
            texts.append(text)
            n_characters += len(text) if isinstance(text, str) else 0
            is_large = (
                n_characters >= self._job_characters * LAST_JOB_S / JOB_S
                if self._knows_speed
                else len(texts) >= FEWEST_TEXTS
            )
            if n_characters >= self._job_characters or (is_large and len(texts) >= share):
                break
        if self._left is not None:
            self._left -= len(texts)
        return texts


class EmbedMany:
    """The jobs of one call of `embed_many`.

    First `look`. Then call `cut` and `send` in turn until nothing is cut, then `wait` and `read`, and so on
    until there is nothing to wait for.

    Args:
        texts: read as needed, never all at once.
        sender: sends the jobs.
        model: name it is served under.
        options: options of the call. Without `wait` it waits for room in the queue: a full one is what so
            many texts lead to.
        timeout_s: longest wait for the next job to end, seconds.
    """

    def __init__(
        self, texts: Iterable[str], sender: Sender, model: str, options: EmbedOptions, timeout_s: float | None
    ) -> None:
        self._cutter = Cutter(texts)
        self._sender, self._model, self._timeout_s = sender, model, timeout_s
        self._options = EmbedOptions(wait=WaitPolicy(attempts=None), priority="batch")
        self._options.update(options)
        self._sent: deque[_Sent] = deque()  # in the texts' order, until they are read

    async def look(self) -> None:
        """Learn how many workers there are now, and how fast they are."""
        async with self._sender.calls.limited(CALL_S):
            model = await self._sender.discovery.find(self._model, "embed")
            self._cutter.learn_workers(await self._sender.discovery.registry(), model)

    def cut(self) -> list[str]:
        """Read the texts of the next job; none if enough are in flight. Waits for nothing but the texts."""
        in_flight = self._in_flight()
        if in_flight and (self._cutter.is_enough(in_flight, 1) or self._cutter.is_enough(self._sent, UNREAD)):
            return []
        return self._cutter.cut()

    async def send(self, texts: list[str]) -> None:
        """Send what was cut, alone: of jobs that arrive together, the first idle worker takes all."""
        async with self._sender.calls.limited(submit_limit_s(self._options.get("wait"))):
            (job,) = await self._sender.submit_texts([texts], self._model, self._options, is_recorded=False)
        answer = asyncio.create_task(job.result(None))
        self._sent.append(
            _Sent(job=job, answer=answer, n_texts=len(texts), n_characters=_n_characters(texts))
        )

    async def wait(self) -> bool:
        """Wait until a job ends; False if none is in flight.

        Raises:
            ResultTimeoutError: no job ended in time.
        """
        if not (in_flight := self._in_flight()):
            return False
        answers = [sent.answer for sent in in_flight]
        done, _ = await asyncio.wait(answers, timeout=self._timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if not done:
            raise ResultTimeoutError(in_flight[0].job.id, float(self._timeout_s or 0))
        for sent in in_flight:
            if sent.answer.done():
                sent.is_ended = True
                if sent.job.usage is not None and sent.n_characters:
                    self._cutter.learn_tokens(sent.job.usage.prompt_tokens, sent.n_characters)
        await self.look()
        return True

    def read(self) -> Iterator[Vectors]:
        """Yield the vectors of the oldest jobs, up to the first that has not ended; shape (n, dim) each.

        Raises:
            PenstockError: the next of these jobs failed.
        """
        while self._sent and self._sent[0].is_ended:
            yield self._sent.popleft().answer.result()

    async def close(self) -> None:
        """Cancel the jobs that are in flight."""
        for sent in self._sent:
            sent.answer.cancel()
        await asyncio.gather(
            *(sent.answer for sent in self._sent),
            *(sent.job.take_back() for sent in self._in_flight()),
            return_exceptions=True,
        )

    def _in_flight(self) -> list[_Sent]:
        return [sent for sent in self._sent if not sent.is_ended]


def _n_characters(texts: Sequence[str]) -> int:
    return sum(len(text) for text in texts if isinstance(text, str))


def progress_bar(texts: Iterable[str], progress: bool) -> "tqdm[NoReturn]":
    """Return a bar that counts texts; it shows if `progress` is wanted and standard error is a terminal."""
    total = len(texts) if isinstance(texts, Sized) else None
    shows = progress and sys.stderr is not None  # a program without a console has none
    return tqdm(total=total, unit=" texts", disable=None if shows else True)
