"""Batches from whatever waits: one model thread per engine takes the next batch the moment it is free.

There are no timers. While the device is busy work piles up, and the next batch is cut from the oldest of
it; an idle device starts on a single item at once. Knows nothing of models: items have a number of tokens.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from itertools import islice
from typing import Final, Generic, Protocol, TypeVar

from penstock.errors import DeadlineExceededError, EngineError, PenstockError

logger = logging.getLogger(__name__)

WINDOW_ITEMS: Final = 512
"""How many of the oldest items a batch is cut from: order by length inside it, by age between windows."""


class HasTokens(Protocol):
    """What a batch is made of."""

    @property
    def n_tokens(self) -> int:
        """Real tokens, padding not counted."""


I = TypeVar("I", bound=HasTokens)  # noqa: E741  an item, as in typing's own examples
A = TypeVar("A")

Run = Callable[[Sequence[I]], Iterator[tuple[int, A | PenstockError] | None]]
"""Compute a batch: yields (index, answer or its error) as each is ready, None as a sign of life."""
Cut = Callable[[Sequence[int]], list[int]]
"""Choose the next batch from the waiting items' token counts, oldest first; index 0 is always in it."""


def cut_by_tokens(max_tokens: int) -> Cut:
    """Cut batches of texts of similar length, so that little of a padded batch is padding.

    Args:
        max_tokens: longest text times number of texts; one text alone may be longer.
    """

    def cut(lengths: Sequence[int]) -> list[int]:
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        first = last = order.index(0)  # the oldest never waits for a better fit
        while last + 1 < len(order) and lengths[order[first]] * (last + 2 - first) <= max_tokens:
            last += 1
        while first > 0 and lengths[order[first - 1]] * (last + 2 - first) <= max_tokens:
            first -= 1
        return order[first : last + 1]

    return cut


def cut_by_count(max_items: int) -> Cut:
    """Cut batches of the oldest items, whatever their length."""
    return lambda lengths: list(range(min(len(lengths), max_items)))


class Work(Generic[I, A]):
    """One job's items, answered as a whole.

    Attributes:
        job_id: the job.
        batched_s: seconds that its first item waited for a batch; set when the answer is there.
        computed_s: seconds from the first batch that held one of its items to the end of the last.
    """

    def __init__(self, job_id: str, items: Sequence[I], deadline: float | None) -> None:
        self.job_id, self.items, self.deadline = job_id, items, deadline
        self.batched_s = self.computed_s = 0.0
        self._future: Future[list[A]] = Future()
        self._answers: dict[int, A] = {}
        self._submitted = time.perf_counter()
        self._started: float | None = None
        if not items:
            self._future.set_result([])

    def wait(self) -> list[A]:
        """Return the answers in the items' order.

        Raises:
            PenstockError: why one of the items has none.
        """
        return self._future.result()

    @property
    def is_over(self) -> bool:
        """Whether it was answered, or failed."""
        return self._future.done()

    def fail(self, error: BaseException) -> None:
        """Answer with an error; what still waits of it is dropped."""
        if not self.is_over:
            self._future.set_exception(error)

    def start(self) -> None:
        """Note that an item of it goes into a batch."""
        if self._started is None:
            self._started = time.perf_counter()
            self.batched_s = self._started - self._submitted

    def settle(self, index: int, answer: A | PenstockError) -> None:
        """Take one item's answer, or the error that answers for all."""
        if isinstance(answer, PenstockError):
            return self.fail(answer)
        self._answers[index] = answer
        if len(self._answers) == len(self.items) and not self.is_over:
            self.computed_s = time.perf_counter() - (self._started or self._submitted)
            self._future.set_result([self._answers[i] for i in range(len(self.items))])
        return None


class Batcher(Generic[I, A]):
    """Joins the items of concurrent jobs into batches and computes them in a thread of its own.

    Args:
        name: of the model, for logs and errors.
        run: computes a batch.
        cut: chooses what goes into it.
    """

    def __init__(self, name: str, run: Run[I, A], cut: Cut) -> None:
        self.name = name
        self._run, self._cut = run, cut
        self._waiting: deque[tuple[Work[I, A], int]] = deque()
        self._running: list[tuple[Work[I, A], int]] = []
        self._changed = threading.Condition()
        self._busy_since: float | None = None
        self._death: BaseException | None = None
        self._tokens_per_s: float | None = None
        self._thread = threading.Thread(target=self._live, name=f"model-{name}", daemon=True)
        self._thread.start()

    def submit(self, job_id: str, items: Sequence[I], deadline: float | None) -> Work[I, A]:
        """Queue a job's items.

        Args:
            job_id: for errors.
            items: may be empty.
            deadline: items that are not in a batch by then, in Unix seconds, are dropped.
        """
        work: Work[I, A] = Work(job_id, items, deadline)
        with self._changed:
            if self._death is not None:
                work.fail(EngineError(self.name, "its model thread has ended"))
                return work
            self._waiting.extend((work, index) for index in range(len(items)))
            self._changed.notify()
        return work

    def is_stalled(self, stall_s: float) -> bool:
        """Whether the model thread has ended, or shown no sign of life for this long, in seconds."""
        since = self._busy_since
        return self._death is not None or (since is not None and time.perf_counter() - since > stall_s)

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens of items computed per second, recent batches weighing most; None before the first."""
        return self._tokens_per_s

    def _live(self) -> None:
        try:
            while True:
                self._running = batch = self._take()
                self._busy_since = started = time.perf_counter()
                self._compute(batch)
                self._busy_since = None
                self._measure(batch, time.perf_counter() - started)
        except BaseException as death:
            # Whatever ends this thread, nobody waits for answers that cannot come.
            logger.critical("model thread ended", extra={"model": self.name}, exc_info=True)
            with self._changed:
                self._death = death
                for work, _ in (*self._running, *self._waiting):
                    work.fail(EngineError(self.name, "its model thread has ended"))
                self._waiting.clear()

    def _take(self) -> list[tuple[Work[I, A], int]]:
        while True:
            with self._changed:
                self._drop_late()
                while not self._waiting:
                    self._changed.wait()
                    self._drop_late()
                window = list(islice(self._waiting, WINDOW_ITEMS))
                chosen = set(self._cut([work.items[index].n_tokens for work, index in window]))
                for _ in window:
                    self._waiting.popleft()
                self._waiting.extendleft(
                    entry for i, entry in reversed(list(enumerate(window))) if i not in chosen
                )
            return [entry for i, entry in enumerate(window) if i in chosen]

    def _drop_late(self) -> None:
        now = time.time()
        for work, _ in self._waiting:
            if work.deadline is not None and work.deadline < now:
                work.fail(DeadlineExceededError(work.job_id, now - work.deadline))
        if any(work.is_over for work, _ in self._waiting):
            self._waiting = deque(entry for entry in self._waiting if not entry[0].is_over)

    def _compute(self, batch: list[tuple[Work[I, A], int]]) -> None:
        """Compute a batch; one that fails is halved until the item that fails is alone."""
        batch = [entry for entry in batch if not entry[0].is_over]
        if not batch:
            return
        for work, _ in batch:
            work.start()
        left = dict(enumerate(batch))
        try:
            for done in self._run([work.items[index] for work, index in batch]):
                self._busy_since = time.perf_counter()
                if done is not None:
                    work, index = left.pop(done[0])
                    work.settle(index, done[1])
        except Exception as error:
            rest = [entry for entry in left.values() if not entry[0].is_over]
            if len(rest) <= 1:
                for work, _ in rest:
                    work.fail(self._explain(error))
                return
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

    def _measure(self, batch: list[tuple[Work[I, A], int]], seconds: float) -> None:
        speed = sum(work.items[index].n_tokens for work, index in batch) / max(seconds, 1e-9)
        previous = self._tokens_per_s
        self._tokens_per_s = speed if previous is None else 0.9 * previous + 0.1 * speed
