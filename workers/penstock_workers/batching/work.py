"""One job's items on their way through an engine: what waits, what was answered, when it is due."""

import math
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from copy import copy
from typing import Final, Generic

import numpy as np
from numpy.typing import NDArray

from penstock.errors import PenstockError
from penstock.request import Priority
from penstock_workers.batching.cuts import Lengths
from penstock_workers.batching.feed import A, I, Job
from penstock_workers.tracebacks import forget_frames

PATIENCE_S: Final = {Priority.INTERACTIVE: 1.0, Priority.DEFAULT: 30.0, Priority.BATCH: 100.0}
"""Seconds after which a job of each priority is due, if its deadline is not before."""
STRETCH: Final = 10
"""A job may have to wait for smaller ones that came later, up to this multiple of its own computing time."""


class Work(Generic[I, A]):
    """One job's items, answered as a whole; see `engine.Pending`.

    Attributes:
        job: The job.
        items: Items of the job, in the order of the answers.
        due: Unix seconds; the job with the smallest goes first.
        tokens: Token counts of the items that are in no batch yet, int64, shape (n_waiting,), longest first.
        is_over: True once it was answered or has failed.
        batched_s: Seconds that its first item waited for a batch; set with the answer or the error.
        computed_s: Seconds from the first batch that held one of its items to the end of the last.
    """

    def __init__(self, job: Job, items: Sequence[I]) -> None:
        self.job, self.items = job, items
        self.batched_s = self.computed_s = 0.0
        self.due = math.inf if job.deadline is None else job.deadline
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
        """Return the answers in the items' order; see `engine.Pending.wait`."""
        if (error := self._future.exception()) is None:
            return self._future.result()
        raise copy(error)  # its traceback will hold this job, which holds the error

    def fail(self, error: BaseException) -> None:
        """Answer with an error; what still waits of it is dropped. Any thread may call."""
        self._end(error=error)

    def is_dropped(self) -> bool:
        """Fail it if nobody waits for it any more; return whether it is over."""
        if not self.is_over and (error := self.job.why_unwanted()):
            self.fail(error)
        return self.is_over

    @property
    def is_started(self) -> bool:
        """Whether the model has seen any item of it."""
        return self._started is not None

    @property
    def is_answered(self) -> bool:
        """Whether the model has answered any item of it."""
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
        with suppress(InvalidStateError):  # the first to come decides
            if error is not None:
                self._future.set_exception(forget_frames(error))
            else:
                self._future.set_result(result or [])


Entry = tuple[Work[I, A], int]


def stretch(work: Work[I, A], others: Iterable[Work[I, A]], tokens_per_s: float | None) -> float:
    """Return how much later a job is due for its size, seconds; its tenant's other waiting jobs count too."""
    n_tokens = float(work.tokens.sum())
    if work.job.tenant:
        n_tokens += sum(float(other.tokens.sum()) for other in others if other.job.tenant == work.job.tenant)
    return STRETCH * n_tokens / (tokens_per_s or math.inf)
