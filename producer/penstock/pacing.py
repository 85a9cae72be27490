"""How `embed_many` cuts texts into jobs, and how many of them are under way: by the workers' live speed.

A job is a second of one worker's work. Three for each worker: it computes one, the next fills its
batches, and one is on its way. Towards a known end they become smaller, so that all workers end together
(guided self-scheduling: Polychronopoulos and Kuck, IEEE Trans. Computers C-36, 1987).
"""

import asyncio
from collections import deque
from collections.abc import Iterable, Iterator, Sequence, Sized
from itertools import islice
from statistics import median
from typing import Final, Protocol

from penstock.job import AsyncJob
from penstock.registry import ModelInfo, Registry
from penstock.result import Vectors

JOB_S: Final = 1.0
"""Work in one job, seconds of one worker."""
JOBS_PER_WORKER: Final = 3
TEXTS_PER_JOB: Final = 64
"""Until the workers' speed is known."""
TEXTS_PER_WORKER: Final = 256
"""As many at least are under way: batches of texts of like length are cut from these."""
FEWEST_TEXTS: Final = 16
MOST_TEXTS: Final = 4096
MOST_CHARACTERS: Final = 1_000_000
"""Of one job; its message may take four bytes for each."""
MOST_CHARACTERS_UNDER_WAY: Final = 16_000_000


class Sender(Protocol):
    """What sends the jobs: an `AsyncClient` with its options."""

    async def look(self) -> tuple[Registry, ModelInfo]:
        """Return what is served now, and the model."""

    async def send(self, part: list[str]) -> AsyncJob[Vectors]:
        """Send a job."""


class Pacer:
    """The jobs of one `embed_many`.

    Call `take` and `send` in turn until nothing is taken, then `next`, and so on until that returns None.
    """

    def __init__(self, texts: Iterable[str], sender: Sender, timeout_s: float | None) -> None:
        self._texts: Iterator[str] = iter(texts)
        self._left = len(texts) if isinstance(texts, Sized) else None
        self._sender, self._timeout_s = sender, timeout_s
        self._jobs: deque[tuple[AsyncJob[Vectors], int]] = deque()
        self._n_characters = self._n_texts = 0
        self._tokens_per_character = 0.25
        self._part_characters, self._part_texts = float(MOST_CHARACTERS), TEXTS_PER_JOB
        self._n_workers = 1

    async def open(self) -> None:
        """Learn how fast the workers are now."""
        registry, model = await self._sender.look()
        pool = registry.choose_pool(model)
        speeds = registry.speeds(model.name, pool)
        self._n_workers = max(1, registry.ready_workers(model.name, pool))
        if speeds:
            characters = median(speeds) * JOB_S / self._tokens_per_character
            self._part_characters = min(characters, MOST_CHARACTERS)
            self._part_texts = min(model.max_texts, MOST_TEXTS)
        self._part_texts = min(self._part_texts, model.max_texts)

    def take(self) -> list[str]:
        """Read the next job's texts, none if enough is under way; does not wait, except for the texts."""
        n_jobs = len(self._jobs)
        is_enough = (
            n_jobs >= JOBS_PER_WORKER * self._n_workers
            and self._n_texts >= TEXTS_PER_WORKER * self._n_workers
        ) or self._n_characters >= MOST_CHARACTERS_UNDER_WAY
        return [] if n_jobs and is_enough else self._cut()

    async def send(self, part: list[str]) -> None:
        """Send what was taken, by itself: of jobs that come together the first idle worker takes all."""
        self._jobs.append((await self._sender.send(part), n_characters := _count(part)))
        self._n_characters, self._n_texts = self._n_characters + n_characters, self._n_texts + len(part)

    async def next(self) -> Vectors | None:
        """Return the oldest job's vectors, shape (n, dim); None when there is none."""
        if not self._jobs:
            return None
        job, n_characters = self._jobs[0]
        vectors = await job.result(self._timeout_s)
        self._jobs.popleft()
        self._n_characters, self._n_texts = self._n_characters - n_characters, self._n_texts - len(vectors)
        if job.usage is not None and n_characters:
            # Slowly: texts come in runs, and one job of code must not halve the next of prose.
            self._tokens_per_character += 0.2 * (
                max(job.usage.prompt_tokens, 1) / n_characters - self._tokens_per_character
            )
        await self.open()
        return vectors

    async def close(self) -> None:
        """Take back what is under way."""
        await asyncio.gather(*(job.cancel() for job, _ in self._jobs), return_exceptions=True)

    def _cut(self) -> list[str]:
        part: list[str] = []
        n_characters, most = 0, self._part_texts
        if self._left is not None and self._n_workers > 1:
            most = min(most, max(FEWEST_TEXTS, self._left // (2 * self._n_workers)))
        for text in islice(self._texts, most):
            part.append(text)
            n_characters += len(text) if isinstance(text, str) else 0
            if n_characters >= self._part_characters:
                break
        if self._left is not None:
            self._left -= len(part)
        return part


def _count(part: Sequence[str]) -> int:
    return sum(len(text) for text in part if isinstance(text, str))
