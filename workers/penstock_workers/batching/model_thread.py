"""The thread that a model runs in: signs of life, and what happens to jobs if it ends."""

import logging
import math
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Generic, NoReturn

from penstock_workers.batching.feed import A, I, RequeueError
from penstock_workers.batching.turns import Turn
from penstock_workers.batching.work import Work

logger = logging.getLogger(__name__)


class ModelThread(ABC, Generic[I, A]):
    """The thread that touches a model; on a GPU there are two.

    If one ends, jobs that it has not seen are requeued. A job that it has seen may be why it ended, and stays
    with this process, which ends too: its lease runs out and is counted, and a job that ends every worker is
    given up at last.

    Args:
        name: Name of the model, for logs and errors.
        turn: Turns on a device that other engines use too; None if it is alone.
        n_threads: Number of threads; more than one only without `turn`.
    """

    def __init__(self, name: str, turn: Turn | None = None, n_threads: int = 1) -> None:
        self.name = name
        self._turn = turn or nullcontext()
        self._changed = threading.Condition()
        self._signs: dict[int, float] = {}  # of life, by thread; infinite while it waits
        self._death: BaseException | None = None
        for _ in range(n_threads):
            threading.Thread(target=self._live, name=f"model-{name}", daemon=True).start()

    def token_budget(self) -> float | None:
        """Return None: jobs that join a running batch are bounded by its places, requests by their server."""
        return None

    def trouble(self) -> str:
        """Return nothing: what is computed here depends on nobody."""
        return ""

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
                        work.fail(RequeueError(f"the model thread of {self.name} has ended"))
