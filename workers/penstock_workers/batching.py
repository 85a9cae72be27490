"""Batches from whatever waits: an engine's model thread takes the next batch the moment it is free.

There are no timers. While the device is busy work piles up, and the next batch is cut from the most urgent
of it; an idle device starts on a single item at once. A thread cuts a batch when its last one has ended, not
before: cutting takes a tenth of a millisecond, and what came meanwhile may be more urgent. Knows nothing of
models, queues and processes: items have a number of tokens, jobs a moment at which they are due.
"""

import logging
import math
import threading
import time
from abc import ABC, abstractmethod
from bisect import insort
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import nullcontext, suppress
from copy import copy
from typing import Final, Generic, NoReturn, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from penstock.errors import (
    DeadlineExceededError,
    EngineError,
    JobCancelledError,
    OutOfMemoryError,
    PenstockError,
)
from penstock.request import Priority
from penstock_workers.clock import BROKER_CLOCK
from penstock_workers.failures import forget_frames
from penstock_workers.turns import Turn

logger = logging.getLogger(__name__)

WINDOW_ITEMS: Final = 512
"""How many of the most urgent items a batch is cut from: by length inside it, by urgency between windows."""
PATIENCE_S: Final = {Priority.INTERACTIVE: 1.0, Priority.DEFAULT: 30.0, Priority.BATCH: 100.0}
"""After how long a job of each priority is due, if its deadline is not before; who waited long goes first."""
PASSED: Final = 8
"""Of so many tokens that go before less urgent jobs, one is for these: as in the queue."""
STRETCH: Final = 10
"""How many times its own computing time a job may be made to wait by smaller ones that came later."""
SHARED_BATCH_S: Final = 0.05
"""How long a batch may take while other jobs wait, as far as the measured speed can tell."""
URGENT_BATCH_S: Final = 0.015
"""The same for so many seconds after an interactive job: the next one is not to wait for a full batch."""
URGENT_S: Final = 10.0
MIN_BATCH_TOKENS: Final = 128
"""Batches are not cut smaller for the sake of time: at so many a processor has five sixths of its speed."""
ATTENTION_BYTES: Final = 256 << 20
"""Attention scores of a padded batch in one layer, float32; the longest text alone may need more."""
PADDING_TOKENS: Final = 16
"""A text may always be padded by this much; by more, up to its own length."""
BATCH_OVERHEAD: Final = 1 / 16
"""What a padded batch costs besides its tokens, in parts of its most: 2 to 4 ms of 70 were measured."""
_DECAY: Final = 0.98  # of what each batch before the last tells about the speed
_PULL: Final = 0.05  # towards the ratio, in parts of the sum of squares
_RECOVERY: Final = 1.01  # of the limit that was learned from a lack of memory, for each full batch


class HasTokens(Protocol):
    """What a batch is made of."""

    @property
    def n_tokens(self) -> int:
        """Real tokens, padding not counted."""


class HandBackError(Exception):
    """The model thread ended before it saw the job, which belongs back into its queue."""


class TryLaterError(Exception):
    """The job cannot be answered now, and its place is better used by others until it can.

    Attributes:
        error: why; what its caller gets if nobody tries again. Says in `retry_after_s` when that is worth it.
    """

    def __init__(self, error: PenstockError) -> None:
        super().__init__(error)
        self.error = error


I = TypeVar("I", bound=HasTokens)  # noqa: E741  an item, as in typing's own examples
A = TypeVar("A")

Run = Callable[[Sequence[I]], Iterator[tuple[int, A | PenstockError] | None]]
"""Compute a batch: yields (index, answer or its error) as each is ready, None as a sign of life."""
Lengths = NDArray[np.int64]
Cut = Callable[[Lengths, float], Sequence[int]]
"""Choose the next batch from the waiting items' tokens: the most urgent job first, its longest item first.

The second argument lowers the cut's own limit of tokens. Index 0 is always chosen.
"""


def cut_by_tokens(max_tokens: int, *, is_padded: bool = True, n_heads: int | None = None) -> Cut:
    """Cut batches of texts that cost at most so many tokens.

    Args:
        max_tokens: of a batch, unless one text alone is longer.
        is_padded: a batch costs its longest text times its number of texts, so those go together that waste
            least; else it costs their sum.
        n_heads: attention heads of a padded batch whose scores are kept in memory; None where they are not.
    """
    if not is_padded:
        return lambda lengths, limit: _cut_packed(lengths, min(max_tokens, limit))
    overhead = BATCH_OVERHEAD * max_tokens
    return lambda lengths, limit: _cut_padded(lengths, min(max_tokens, limit), n_heads or 0, overhead)


def _cut_padded(lengths: Lengths, max_tokens: float, n_heads: int, overhead: float) -> list[int]:
    """Choose the batch around the most urgent item that has most real tokens for what it costs."""
    order = np.argsort(-lengths, kind="stable")
    ordered = lengths[order]  # longest first
    urgent = int(np.flatnonzero(order == 0)[0])
    # The longest item of a batch is the first of its length, or else as far before as fits.
    firsts = np.flatnonzero(np.diff(ordered[: urgent + 1], prepend=-1)).tolist()
    n_real = np.concatenate(([0], np.cumsum(ordered)))
    best, chosen = 0.0, (urgent, urgent + 1)
    for first, end in zip(firsts, [*firsts[1:], urgent + 1], strict=True):
        longest = max(1, int(ordered[first]))
        most = int(max_tokens // longest)
        if n_heads:
            most = min(most, ATTENTION_BYTES // (4 * n_heads * longest * longest))
        start = max(first, urgent + 1 - most)
        lasts = np.arange(urgent + 1, min(start + most, len(ordered)) + 1)
        shortest = ordered[lasts - 1]
        lasts = lasts[longest - shortest <= np.maximum(shortest, PADDING_TOKENS)]
        if start >= end or not len(lasts):
            continue
        worth = (n_real[lasts] - n_real[start]) / (overhead + longest * (lasts - start))
        at = int(np.argmax(worth))
        if worth[at] > best:
            best, chosen = float(worth[at]), (start, int(lasts[at]))
    return order[slice(*chosen)].tolist()  # type: ignore[no-any-return]  # numpy's own gap


def _cut_packed(lengths: Lengths, max_tokens: float) -> list[int]:
    chosen, n_tokens = [0], int(lengths[0])
    for index, length in enumerate(lengths[1:].tolist(), 1):
        # A text that is longer than all before it together would delay them more than it gains.
        if length <= max_tokens - n_tokens and length <= max(n_tokens, MIN_BATCH_TOKENS // 2):
            chosen.append(index)
            n_tokens += length
        elif n_tokens >= max_tokens:
            break
    return chosen


def why_unwanted(
    job_id: str, deadline: float | None, is_unwanted: Callable[[], bool]
) -> DeadlineExceededError | JobCancelledError | None:
    """Return why nobody waits for a job any more; None while somebody does.

    Args:
        job_id: the job.
        deadline: Unix seconds, on the broker's clock.
        is_unwanted: says whether it was cancelled.
    """
    if deadline is not None and (late_s := BROKER_CLOCK.now() - deadline) > 0:
        return DeadlineExceededError(job_id, late_s)
    return JobCancelledError(job_id) if is_unwanted() else None


class Work(Generic[I, A]):
    """One job's items, answered as a whole.

    Attributes:
        job_id: the job.
        items: in the caller's order.
        deadline: Unix seconds; what is in no batch by then, or cannot be computed by then, is dropped.
        is_unwanted: says whether the job was cancelled.
        due: Unix seconds; the job with the smallest goes first.
        tenant: who sent it; empty for nobody who is named.
        priority: of the job.
        tokens: of the items that are in no batch yet, int64, shape (n_waiting,), longest first.
        is_over: whether it was answered, or failed.
        batched_s: seconds that its first item waited for a batch; set when the answer is there, or the error.
        computed_s: seconds from the first batch that held one of its items to the end of the last.
    """

    def __init__(
        self,
        job_id: str,
        items: Sequence[I],
        deadline: float | None,
        is_unwanted: Callable[[], bool] = lambda: False,
        tenant: str = "",
        priority: Priority = Priority.DEFAULT,
    ) -> None:
        self.job_id, self.items, self.deadline, self.is_unwanted = job_id, items, deadline, is_unwanted
        self.batched_s = self.computed_s = 0.0
        self.due = math.inf if deadline is None else deadline
        self.tenant, self.priority = tenant, priority
        tokens: Lengths = np.array([item.n_tokens for item in items], dtype=np.int64)
        self._waiting = np.argsort(-tokens, kind="stable")
        self.tokens = tokens[self._waiting]
        self.is_over = False
        self._future: Future[list[A]] = Future()
        self._answers: dict[int, A] = {}
        self._submitted = time.perf_counter()
        self._started: float | None = None
        if not items:
            self._end(result=[])

    def wait(self) -> list[A]:
        """Return the answers in the items' order.

        Raises:
            PenstockError: why one of the items has none.
            HandBackError: they will not come from here.
            TryLaterError: they will not come soon.
        """
        if (error := self._future.exception()) is None:
            return self._future.result()
        raise copy(error)  # its traceback will hold this job, which holds the error

    def fail(self, error: BaseException) -> None:
        """Answer with an error; what still waits of it is dropped. Any thread may call."""
        self._end(error=error)

    def is_dropped(self) -> bool:
        """Fail it if nobody waits for it any more; return whether it is over."""
        if not self.is_over and (error := why_unwanted(self.job_id, self.deadline, self.is_unwanted)):
            self.fail(error)
        return self.is_over

    @property
    def is_started(self) -> bool:
        """Whether the model has seen any item of it."""
        return self._started is not None

    @property
    def is_answered(self) -> bool:
        """Whether any item of it is."""
        return bool(self._answers)

    def start(self) -> None:
        """Note that an item of it goes into a batch."""
        if self._started is None:
            self._started = time.perf_counter()
            self.batched_s = self._started - self._submitted

    def take(self, positions: NDArray[np.intp]) -> list[tuple["Work[I, A]", int]]:
        """Take waiting items for a batch; positions are those in `tokens`."""
        self.start()
        taken = self._waiting[positions]
        left = np.ones(len(self.tokens), dtype=bool)
        left[positions] = False
        self._waiting, self.tokens = self._waiting[left], self.tokens[left]
        return [(self, index) for index in taken.tolist()]

    def settle(self, index: int, answer: A | PenstockError) -> None:
        """Take one item's answer, or the error that answers for all."""
        if isinstance(answer, PenstockError):
            return self.fail(answer)
        self._answers[index] = answer
        if len(self._answers) == len(self.items):
            self.computed_s = time.perf_counter() - (self._started or self._submitted)
            self._end(result=[self._answers[i] for i in range(len(self.items))])
        return None

    def _end(self, *, result: list[A] | None = None, error: BaseException | None = None) -> None:
        if error is not None and not self.is_over:
            now = time.perf_counter()
            if self._started is None:
                self.batched_s = now - self._submitted
            else:
                self.computed_s = now - self._started
        self.is_over = True
        self.is_unwanted = _never  # what was asked may hold this job
        with suppress(InvalidStateError):  # whoever is first decides
            if error is not None:
                self._future.set_exception(forget_frames(error))
            else:
                self._future.set_result(result or [])


def _never() -> bool:
    return False


Entry = tuple[Work[I, A], int]


def stretch(work: Work[I, A], others: Iterable[Work[I, A]], tokens_per_s: float | None) -> float:
    """Return how much later a job is due for its size, seconds; what waits of its tenant counts with it."""
    n_tokens = float(work.tokens.sum())
    if work.tenant:
        n_tokens += sum(float(other.tokens.sum()) for other in others if other.tenant == work.tenant)
    return STRETCH * n_tokens / (tokens_per_s or math.inf)


class ModelThread(ABC, Generic[I, A]):
    """The thread that touches a model; on a card there are two.

    When one ends, what it has not seen is handed back. What it has seen may be why it ended, and stays with
    this process, which ends too: its lease runs out and is counted, and a job that ends every worker is given
    up in the end.

    Args:
        name: of the model, for logs and errors.
        turn: its turns on a device that other engines want too; None where it need not ask.
        n_threads: more than one only without `turn`.
    """

    def __init__(self, name: str, turn: Turn | None = None, n_threads: int = 1) -> None:
        self.name = name
        self._turn = turn or nullcontext()
        self._changed = threading.Condition()
        self._signs: dict[int, float] = {}  # of life, by thread; infinite while it waits
        self._death: BaseException | None = None
        for _ in range(n_threads):
            threading.Thread(target=self._live, name=f"model-{name}", daemon=True).start()

    def is_stalled(self, stall_s: float) -> bool:
        """Whether a thread has ended, or shown no sign of life for this long, in seconds."""
        oldest = min(self._signs.values(), default=math.inf)
        return self._death is not None or time.perf_counter() - oldest > stall_s

    @abstractmethod
    def _serve(self) -> NoReturn:
        """Take jobs and answer them; with signs of life, and `_rest` where there is nothing to do."""

    def _show_life(self) -> None:
        self._signs[threading.get_ident()] = time.perf_counter()

    def _rest(self) -> None:
        self._signs[threading.get_ident()] = math.inf

    @abstractmethod
    def _give_up(self) -> Iterable[Work[I, A]]:
        """Forget all jobs that were not answered, and return them."""

    def _live(self) -> None:
        self._rest()
        try:
            self._serve()
        except BaseException as death:
            logger.critical("model thread ended", extra={"model": self.name}, exc_info=True)
            with self._changed:
                # From now on jobs wait until the process ends, so that no further ones are taken.
                self._death = death
                for work in self._give_up():
                    if not work.is_started:
                        work.fail(HandBackError(f"the model thread of {self.name} has ended"))


class Speed:
    """How long batches take: a fixed part and a part for each token, least squares over recent batches.

    Many single short texts say little about a full batch. Where all batches are alike nothing tells the parts
    apart, so the slope is drawn towards the plain ratio of seconds and tokens.
    """

    def __init__(self) -> None:
        self._n = self._x = self._y = self._xx = self._xy = 0.0
        self._largest = self._fixed_s = self._token_s = 0.0

    def count(self, n_tokens: int, seconds: float) -> None:
        """Take note of a batch."""
        x, y = float(n_tokens), max(seconds, 1e-9)
        self._n, self._x, self._y = _DECAY * self._n + 1, _DECAY * self._x + x, _DECAY * self._y + y
        self._xx, self._xy = _DECAY * self._xx + x * x, _DECAY * self._xy + x * y
        self._largest = max(x, _DECAY * self._largest)
        ratio, pull = self._y / max(self._x, 1.0), _PULL * self._xx
        spread, together = self._xx - self._x**2 / self._n, self._xy - self._x * self._y / self._n
        slope = (together + pull * ratio) / max(spread + pull, _PULL)
        self._token_s = min(max(slope, ratio / 10), ratio)  # the fixed part is not below nothing
        self._fixed_s = (self._y - self._token_s * self._x) / self._n

    def seconds(self, n_tokens: float) -> float:
        """Return how long a batch of so many tokens takes; 0 before the first."""
        return self._fixed_s + self._token_s * n_tokens

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens per second in batches as large as the largest of late; None before the first."""
        return self._largest / self.seconds(self._largest) if self._largest else None


class Batcher(ModelThread[I, A]):
    """Joins the items of concurrent jobs into batches and computes them in threads of its own.

    Args:
        name: of the model, for logs and errors.
        run: computes a batch.
        cut: chooses what goes into it.
        turn: see `ModelThread`; a batch is a turn.
        n_threads: how many batches are under way at once: one is laid out and copied to a card while another
            is computed there.
        measured: tokens and seconds of a batch, where they are known before the first.
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
        self._memory_tokens = math.inf  # what a batch may hold, as far as lacks of memory have told
        self._speed = Speed()
        if measured is not None:
            self._speed.count(*measured)
        self._ages = dict.fromkeys(Priority, 0.0)  # tokens that are for those who were passed by
        self._urgent_until = self._ended = 0.0
        super().__init__(name, turn, n_threads)

    def submit(
        self,
        job_id: str,
        items: Sequence[I],
        deadline: float | None,
        *,
        priority: Priority = Priority.DEFAULT,
        is_unwanted: Callable[[], bool] = lambda: False,
        tenant: str = "",
    ) -> Work[I, A]:
        """Queue a job's items.

        Args:
            job_id: for errors.
            items: may be empty.
            deadline: items that are not in a batch by then, in Unix seconds, are dropped.
            priority: decides with the deadline, the age and the size who goes first.
            is_unwanted: the job was cancelled; asked in the model thread before each batch.
            tenant: who sent it: what waits of his counts for its size, so that others go between.
        """
        work: Work[I, A] = Work(job_id, items, deadline, is_unwanted, tenant, priority)
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
            if work.deadline is not None
            and not work.is_started
            and (late_s := now + self._speed.seconds(float(work.tokens.sum())) - work.deadline) > 0
        }
        if late and len(late) == len(self._works):  # one is tried: the speed may be wrong
            del late[next(iter(late))]
        for work, late_s in late.items():
            work.fail(DeadlineExceededError(work.job_id, late_s))
        self._works = [work for work in self._works if not work.is_over]

    def _next_batch(self, now: float) -> list[Entry[I, A]]:
        passed = self._find_passed()
        works = self._works if passed is None else sorted(self._works, key=lambda work: work is not passed)
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
        self._age(batch, passed)
        return batch

    def _find_passed(self) -> Work[I, A] | None:
        """Return a job that others have passed for long enough, however urgent; None if there is none.

        Long enough is for as many tokens as it has, or as are worth a batch.
        """
        for work in self._works:
            if self._ages[work.priority] >= min(MIN_BATCH_TOKENS, max(1, work.tokens.sum())):
                return work
        return None

    def _age(self, batch: list[Entry[I, A]], passed: Work[I, A] | None) -> None:
        """Count a batch for those that it goes before, and against those that are in it."""
        levels = {work.priority for work, _ in batch}
        for level in {work.priority for work in self._works if work.priority > min(levels)}:
            self._ages[level] += _count(batch) / PASSED
        for level in levels:
            age = self._ages[level] - _count([entry for entry in batch if entry[0].priority == level])
            # Whose turn it was may owe what was too much; others had it without.
            self._ages[level] = age if passed is not None and level == passed.priority else max(age, 0.0)

    def _limit(self, now: float) -> float:
        """Return how many tokens the next batch may have, for memory and for those who wait or may come."""
        is_urgent = now < self._urgent_until
        if not self.tokens_per_s or (len(self._works) < 2 and not is_urgent):
            return self._memory_tokens
        longest_s = URGENT_BATCH_S if is_urgent else SHARED_BATCH_S
        seconds = min(longest_s, (self._works[0].deadline or math.inf) - now)
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
            # One that was under way with another has had the device since that ended.
            now = time.perf_counter()
            seconds, self._ended = now - max(began, self._ended), now
            self._speed.count(n_tokens, seconds)
            if n_tokens > self._memory_tokens / 2:
                self._memory_tokens *= _RECOVERY


def _count(batch: Sequence[Entry[I, A]]) -> int:
    return sum(work.items[index].n_tokens for work, index in batch)
