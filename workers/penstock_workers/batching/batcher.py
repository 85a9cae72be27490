"""Batches from whatever waits: an engine's model thread takes the next batch the moment it is free.

There are no timers. While the device is busy work piles up, and the next batch is cut from the most urgent
of it; an idle device starts on a single item at once. A thread cuts a batch when its last one has ended, not
before: cutting takes less than a millisecond, and what came meanwhile may be more urgent. Knows nothing of
models, queues and processes: items have a number of tokens, jobs a moment at which they are due.
"""

import logging
import math
import time
from bisect import insort
from collections.abc import Iterable, Sequence
from typing import Final, NoReturn

import numpy as np

from penstock.errors import DeadlineExceededError, EngineError, OutOfMemoryError, PenstockError
from penstock.request import Priority
from penstock_workers.batching.cuts import MIN_BATCH_TOKENS, Cut, Lengths
from penstock_workers.batching.feed import A, I, Job, Run
from penstock_workers.batching.model_thread import ModelThread
from penstock_workers.batching.rate import Speed
from penstock_workers.batching.turns import Turn
from penstock_workers.batching.work import PATIENCE_S, Entry, Work, stretch
from penstock_workers.clock import BROKER_CLOCK

logger = logging.getLogger(__name__)

WINDOW_ITEMS: Final = 512
"""A batch is cut from this many of the most urgent items: by length inside, by urgency between windows."""
AGING_TOKENS: Final = 8
"""Aging: per this many tokens served ahead of a lower priority, it earns one. Same ratio as in the queue."""
SHARED_BATCH_S: Final = 0.05
"""Longest batch while other jobs wait, seconds, as far as the measured speed can tell."""
URGENT_BATCH_S: Final = 0.015
"""The same for `URGENT_S` after an interactive job: the next one is not to wait for a full batch."""
URGENT_S: Final = 10.0
HELD_S: Final = 0.1
"""Work that a process should hold, two jobs aside, seconds."""
_RECOVERY: Final = 1.01  # of the limit that a lack of memory has set, for each full batch since


class Batcher(ModelThread[I, A]):
    """Joins the items of concurrent jobs into batches and computes them in threads of its own.

    Args:
        name: Name of the model, for logs and errors.
        run: Computes a batch: an engine's `run`, which `serving.loading` passes.
        cut: Chooses what goes into it.
        turn: See `ModelThread`; a batch is a turn.
        n_threads: Number of batches in progress at once: one is laid out and copied to a GPU while another
            is computed there.
        measured: Tokens and seconds of a batch, if they are known before the first.
    """

    def __init__(
        self,
        name: str,
        run: Run[I, A],
        cut: Cut,
        turn: Turn | None = None,
        *,
        n_threads: int = 1,
        measured: tuple[int, float] | None = None,
    ) -> None:
        self._run, self._cut = run, cut
        self._works: list[Work[I, A]] = []  # with waiting items, most urgent first
        self._memory_tokens = math.inf  # most tokens of a batch, learned from lacks of memory
        self._speed = Speed()
        if measured is not None:
            self._speed.count(*measured)
        self._credits = dict.fromkeys(Priority, 0.0)  # of aging, tokens
        self._urgent_until = self._ended = 0.0
        super().__init__(name, turn, n_threads)

    def submit(self, job: Job, items: Sequence[I]) -> Work[I, A]:
        """Queue a job's items; see `Feed.submit`."""
        work: Work[I, A] = Work(job, items)
        priority = job.priority
        with self._changed:
            if priority == Priority.INTERACTIVE:
                self._urgent_until = BROKER_CLOCK.now() + URGENT_S
            # Parts of one bulk load go in their order: it is read in that, and done when its last is.
            stretch_s = 0.0 if priority == Priority.BATCH else stretch(work, self._works, self.tokens_per_s)
            work.due = min(work.due, BROKER_CLOCK.now() + PATIENCE_S[priority] + stretch_s)
            if items and self._death is None:
                insort(self._works, work, key=lambda work: work.due)
                self._changed.notify()
        return work

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens of items computed per second in full batches; None before the first."""
        return self._speed.tokens_per_s

    def token_budget(self) -> float:
        """Return how many tokens of jobs this process should hold: more would wait while others are free."""
        return HELD_S * (self.tokens_per_s or 0.0)

    def _serve(self) -> NoReturn:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._works)
            with self._turn:
                batch = self._take()  # not before its turn: what came meanwhile may be more urgent
                began = time.perf_counter()
                self._show_life()
                self._compute(batch)
                self._rest()
            if batch:  # else another thread was first, or all were dropped
                self._measure(batch, began)

    def _give_up(self) -> Iterable[Work[I, A]]:
        works, self._works = self._works, []
        return works

    def _take(self) -> list[Entry[I, A]]:
        with self._changed:
            now = BROKER_CLOCK.now()
            self._works = [work for work in self._works if not work.is_dropped()]
            self._drop_late(now)
            batch = self._next_batch(now) if self._works else []
            if self._works:
                self._changed.notify()  # another thread, if one waits
            return batch

    def _drop_late(self, now: float) -> None:
        """Fail jobs that cannot be computed before their deadlines: others can, in their place."""
        late = {
            work: late_s
            for work in self._works
            if work.job.deadline is not None
            and not work.is_started
            and (late_s := now + self._speed.seconds(float(work.tokens.sum())) - work.job.deadline) > 0
        }
        if late and len(late) == len(self._works):  # one is tried: the speed may be wrong
            del late[next(iter(late))]
        for work, late_s in late.items():
            work.fail(DeadlineExceededError(work.job.id, late_s))
        self._works = [work for work in self._works if not work.is_over]

    def _next_batch(self, now: float) -> list[Entry[I, A]]:
        aged = self._find_aged()
        works = self._works if aged is None else sorted(self._works, key=lambda work: work is not aged)
        parts: list[Lengths] = []
        room = WINDOW_ITEMS
        for work in works:
            parts.append(work.tokens[:room])
            room -= len(parts[-1])
            if not room:
                break
        chosen = np.sort(self._cut(np.concatenate(parts), self._limit(now)))
        ends = np.cumsum([len(part) for part in parts])
        batch: list[Entry[I, A]] = []
        start = low = 0
        for work, end, high in zip(
            works, ends.tolist(), np.searchsorted(chosen, ends).tolist(), strict=False
        ):
            if low < high:
                batch += work.take(chosen[low:high] - start)
            start, low = end, high
        self._works = [work for work in self._works if len(work.tokens)]
        self._count_aging(batch, aged)
        return batch

    def _find_aged(self) -> Work[I, A] | None:
        """Return a job whose priority has earned enough tokens by aging; None if there is none.

        Enough is as many as the job has, or as are worth a batch.
        """
        for work in self._works:
            if self._credits[work.job.priority] >= min(MIN_BATCH_TOKENS, max(1, work.tokens.sum())):
                return work
        return None

    def _count_aging(self, batch: list[Entry[I, A]], aged: Work[I, A] | None) -> None:
        """Count a batch for the priorities that it goes before, and against those that are in it."""
        levels = {work.job.priority for work, _ in batch}
        for level in {work.job.priority for work in self._works if work.job.priority > min(levels)}:
            self._credits[level] += _count(batch) / AGING_TOKENS
        for level in levels:
            left = self._credits[level] - _count([entry for entry in batch if entry[0].job.priority == level])
            # The level that spent its aging credit may go negative; others are clamped at 0.
            self._credits[level] = left if aged is not None and level == aged.job.priority else max(left, 0.0)

    def _limit(self, now: float) -> float:
        """Return the most tokens of the next batch: for memory, and for other jobs that wait or may come."""
        is_urgent = now < self._urgent_until
        if not self.tokens_per_s or (len(self._works) < 2 and not is_urgent):
            return self._memory_tokens
        longest_s = URGENT_BATCH_S if is_urgent else SHARED_BATCH_S
        seconds = min(longest_s, (self._works[0].job.deadline or math.inf) - now)
        return min(self._memory_tokens, max(MIN_BATCH_TOKENS, seconds * self.tokens_per_s))

    def _compute(self, batch: list[Entry[I, A]]) -> None:
        """Compute a batch; one that fails is halved until the item that fails is alone."""
        batch = [entry for entry in batch if not entry[0].is_over]
        if not batch:
            return
        left = dict(enumerate(batch))
        try:
            for done in self._run([work.items[index] for work, index in batch]):
                self._show_life()
                if done is not None:
                    work, index = left.pop(done[0])
                    work.settle(index, done[1])
        except Exception as error:
            rest = [entry for entry in left.values() if not entry[0].is_over]
            if len(rest) <= 1:
                for work, _ in rest:
                    work.fail(self._explain(error))
                return
            if isinstance(error, OutOfMemoryError | MemoryError):
                self._memory_tokens = min(self._memory_tokens, _count(batch) / 2)
            logger.warning(
                "batch failed and is halved", extra={"model": self.name, "n_items": len(rest)}, exc_info=True
            )
            for half in (rest[: len(rest) // 2], rest[len(rest) // 2 :]):
                self._compute(half)
            return
        for work, _ in left.values():
            work.fail(EngineError(self.name, "it gave no answer for an item"))

    def _explain(self, error: Exception) -> PenstockError:
        if isinstance(error, PenstockError):
            return error
        logger.error("item failed", extra={"model": self.name}, exc_info=error)
        return EngineError(self.name, f"{type(error).__name__} in its forward pass")

    def _measure(self, batch: list[Entry[I, A]], began: float) -> None:
        n_tokens = _count(batch)
        with self._changed:
            # Two batches overlapped: count time only from when the other one ended.
            now = time.perf_counter()
            seconds, self._ended = now - max(began, self._ended), now
            self._speed.count(n_tokens, seconds)
            if n_tokens > self._memory_tokens / 2:
                self._memory_tokens *= _RECOVERY


def _count(batch: Sequence[Entry[I, A]]) -> int:
    return sum(work.items[index].n_tokens for work, index in batch)
