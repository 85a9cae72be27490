"""How `embed_many` cuts texts into jobs, and how many of them are under way: by the workers' live speed.

A job is a second of one worker's work. Three for each worker: it computes one, the next fills its
batches, and one is on its way. Whichever ends makes room for another, also before its turn: a worker may
answer the oldest last. Towards a known end they become smaller, so that all workers end together
(guided self-scheduling: Polychronopoulos and Kuck, IEEE Trans. Computers C-36, 1987).
"""

import asyncio
from collections import deque
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from itertools import islice
from statistics import median
from typing import Final, Protocol

from penstock.errors import InvalidTextError, ResultTimeoutError
from penstock.job import AsyncJob
from penstock.registry import ModelInfo, Registry
from penstock.result import Vectors

JOB_S: Final = 1.0
"""Work in one job, seconds of one worker."""
JOBS_PER_WORKER: Final = 3
UNREAD: Final = 2
"""So many times what is under way may wait to be read, so that memory is bounded if the oldest takes long."""
TEXTS_PER_JOB: Final = 64
"""Until the workers' speed is known."""
TEXTS_PER_WORKER: Final = 256
"""As many at least are under way: batches of texts of like length are cut from these."""
FEWEST_TEXTS: Final = 16
LAST_JOB_S: Final = 0.03
"""Jobs towards a known end are no smaller than this, or than so many texts while the speed is not known."""
MOST_TEXTS: Final = 4096
MOST_CHARACTERS: Final = 250_000
"""Of one job, whose first text waits until its last is tokenized; fast workers tokenize several at once."""
MOST_CHARACTERS_UNDER_WAY: Final = 16_000_000


class Sender(Protocol):
    """What sends the jobs: an `AsyncClient` with its options."""

    async def look(self) -> tuple[Registry, ModelInfo]:
        """Return what is served now, and the model."""

    async def send(self, part: list[str]) -> AsyncJob[Vectors]:
        """Send a job."""


@dataclass(eq=False, slots=True, kw_only=True)
class _Part:
    """What one job has of the texts.

    Attributes:
        answer: its vectors, shape (n, dim).
        is_ended: whether it makes room for others.
    """

    job: AsyncJob[Vectors]
    answer: asyncio.Task[Vectors]
    n_texts: int
    n_characters: int
    is_ended: bool = False


class Pacer:
    """The jobs of one `embed_many`.

    Call `take` and `send` in turn until nothing is taken, then `wait` and `read`, and so on until there is
    nothing to wait for.
    """

    def __init__(self, texts: Iterable[str], sender: Sender, timeout_s: float | None) -> None:
        if isinstance(texts, str | bytes):  # whose items would be embedded one by one
            raise InvalidTextError(0, f"came as a {type(texts).__name__}: pass an iterable of strings")
        self._texts: Iterator[str] = iter(texts)
        self._left = len(texts) if isinstance(texts, Sized) else None
        self._sender, self._timeout_s = sender, timeout_s
        self._parts: deque[_Part] = deque()  # in the texts' order, until they are read
        self._tokens_per_character = 0.25
        self._part_characters, self._part_texts = float(MOST_CHARACTERS), TEXTS_PER_JOB
        self._n_workers, self._knows_speed = 1, False

    async def open(self) -> None:
        """Learn how fast the workers are now."""
        registry, model = await self._sender.look()
        pool = registry.choose_pool(model)
        speeds = registry.speeds(model.name, pool)
        self._n_workers = max(1, registry.ready_workers(model.name, pool))
        if speeds:
            characters = median(speeds) * JOB_S / self._tokens_per_character
            self._part_characters = min(characters, MOST_CHARACTERS)
            self._part_texts, self._knows_speed = min(model.max_texts, MOST_TEXTS), True
        self._part_texts = min(self._part_texts, model.max_texts)

    def take(self) -> list[str]:
        """Read the next job's texts, none if enough is under way; does not wait, except for the texts."""
        under_way = self._under_way()
        if under_way and (self._is_enough(under_way, 1) or self._is_enough(self._parts, UNREAD)):
            return []
        return self._cut()

    async def send(self, part: list[str]) -> None:
        """Send what was taken, by itself: of jobs that come together the first idle worker takes all."""
        job = await self._sender.send(part)
        answer = asyncio.create_task(job.result(None))
        self._parts.append(_Part(job=job, answer=answer, n_texts=len(part), n_characters=_count(part)))

    async def wait(self) -> bool:
        """Wait until a job ends; False if none is under way.

        Raises:
            ResultTimeoutError: none did in time.
        """
        if not (under_way := self._under_way()):
            return False
        answers = [part.answer for part in under_way]
        done, _ = await asyncio.wait(answers, timeout=self._timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if not done:
            raise ResultTimeoutError(under_way[0].job.id, float(self._timeout_s or 0))
        for part in under_way:
            if part.answer.done():
                part.is_ended = True
                self._learn(part)
        await self.open()
        return True

    def read(self) -> Iterator[Vectors]:
        """Yield the vectors of the oldest jobs as far as they have ended, shape (n, dim) each.

        Raises:
            PenstockError: the next of them failed.
        """
        while self._parts and self._parts[0].is_ended:
            yield self._parts.popleft().answer.result()

    async def close(self) -> None:
        """Take back what is under way."""
        for part in self._parts:
            part.answer.cancel()
        await asyncio.gather(
            *(part.answer for part in self._parts),
            *(part.job.take_back() for part in self._under_way()),
            return_exceptions=True,
        )

    def _under_way(self) -> list[_Part]:
        return [part for part in self._parts if not part.is_ended]

    def _is_enough(self, parts: Sequence[_Part], factor: int) -> bool:
        most = factor * self._n_workers
        return (
            len(parts) >= JOBS_PER_WORKER * most
            and sum(part.n_texts for part in parts) >= TEXTS_PER_WORKER * most
        ) or sum(part.n_characters for part in parts) >= MOST_CHARACTERS_UNDER_WAY * factor

    def _learn(self, part: _Part) -> None:
        if part.job.usage is not None and part.n_characters:
            # Slowly: texts come in runs, and one job of code must not halve the next of prose.
            self._tokens_per_character += 0.2 * (
                max(part.job.usage.prompt_tokens, 1) / part.n_characters - self._tokens_per_character
            )

    def _cut(self) -> list[str]:
        part: list[str] = []
        n_characters, share = 0, self._part_texts
        if self._left is not None and self._n_workers > 1:
            share = self._left // (2 * self._n_workers)
        for text in islice(self._texts, self._part_texts):
            part.append(text)
            n_characters += len(text) if isinstance(text, str) else 0
            is_large = (
                n_characters >= self._part_characters * LAST_JOB_S / JOB_S
                if self._knows_speed
                else len(part) >= FEWEST_TEXTS
            )
            if n_characters >= self._part_characters or (is_large and len(part) >= share):
                break
        if self._left is not None:
            self._left -= len(part)
        return part


def _count(part: Sequence[str]) -> int:
    return sum(len(text) for text in part if isinstance(text, str))
