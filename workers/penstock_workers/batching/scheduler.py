"""Continuous batching of jobs: one batch per engine, which jobs join and leave between steps.

The counterpart of `batcher` for text that grows: a batch there is cut once, here it never ends. Knows nothing
of models: an engine has sequences and steps.
"""

import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Final, Generic, NoReturn, Protocol, TypeVar

from penstock.errors import PenstockError
from penstock_workers.batching.feed import A, A_co, I, I_contra, Job, Listen
from penstock_workers.batching.model_thread import ModelThread
from penstock_workers.batching.rate import Ratio
from penstock_workers.batching.turns import Turn
from penstock_workers.batching.work import Work

SWEEP_S: Final = 0.2
"""Seconds between two checks of waiting jobs; running ones are checked at every step."""

S_co = TypeVar("S_co", covariant=True)
S = TypeVar("S", bound=Hashable)


class Steps(Protocol[S, A_co]):
    """Sequences of a model that share steps."""

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""

    @property
    def n_tokens(self) -> int:
        """Tokens computed so far."""

    def add(self, sequence: S, /) -> None:
        """Let a sequence wait for admission."""

    def step(self) -> Sequence[tuple[S, A_co | PenstockError]]:
        """Take a step with all sequences; those that are over leave.

        Returns:
            Sequences that ended, each with its answer or error.
        """

    def sweep(self) -> None:
        """Forget waiting sequences that are over."""


class MakeSequence(Protocol[I_contra, S_co]):
    """Makes an item's sequence; what it is given is called in the model thread."""

    def __call__(
        self,
        item: I_contra,
        /,
        *,
        is_over: Callable[[], bool],
        on_start: Callable[[], None],
        on_piece: Callable[[str], None] | None,
    ) -> S_co:
        """Return the sequence."""


class Scheduler(ModelThread[I, A], Generic[I, S, A]):
    """Answers the items of concurrent jobs in one batch that they join and leave.

    Args:
        name: Name of the model, for logs and errors.
        steps: Its batch; touched by the model thread alone.
        make_sequence: Turns an item into a sequence of it.
        turn: See `ModelThread`; a step is a turn.
    """

    def __init__(
        self, name: str, steps: Steps[S, A], make_sequence: MakeSequence[I, S], turn: Turn | None = None
    ) -> None:
        self._steps, self._make_sequence = steps, make_sequence
        self._arrived: list[tuple[Work[I, A], int, S]] = []
        self._sequences: dict[S, tuple[Work[I, A], int]] = {}
        self._speed = Ratio()
        super().__init__(name, turn)

    def submit(self, job: Job, items: Sequence[I], listen: Listen | None = None) -> Work[I, A]:
        """Admit a job's items; see `StreamingFeed.submit`. Listens in the model thread."""
        work: Work[I, A] = Work(job, items)
        arrived = [(work, i, self._sequence(work, i, item, listen)) for i, item in enumerate(items)]
        with self._changed:
            if self._death is None:
                self._arrived += arrived
                self._changed.notify()
        return work

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens of prompts and answers per busy second, recent steps weighing most; None before."""
        return self._speed.value

    def _sequence(self, work: Work[I, A], index: int, item: I, listen: Listen | None) -> S:
        on_piece = None if listen is None else (lambda piece: listen(index, piece))
        return self._make_sequence(item, is_over=work.is_dropped, on_start=work.start, on_piece=on_piece)

    def _serve(self) -> NoReturn:
        swept = time.perf_counter()
        while True:
            self._take()
            began, n_before = time.perf_counter(), self._steps.n_tokens
            self._show_life()
            if began - swept > SWEEP_S:
                swept = began
                self._sweep()
            self._step()
            self._speed.count(self._steps.n_tokens - n_before, time.perf_counter() - began)

    def _give_up(self) -> Iterable[Work[I, A]]:
        works = [*(work for work, _ in self._sequences.values()), *(work for work, _, _ in self._arrived)]
        self._sequences.clear()
        self._arrived.clear()
        return works

    def _take(self) -> None:
        """Admit the jobs that have arrived; waits for one if there is nothing to do."""
        with self._changed:
            while not self._arrived and self._steps.is_idle:
                self._sequences.clear()  # all have left
                self._rest()
                self._changed.wait()
            arrived, self._arrived = self._arrived, []
            self._sequences |= {sequence: (work, index) for work, index, sequence in arrived}
        for _, _, sequence in arrived:
            self._steps.add(sequence)

    def _step(self) -> None:
        with self._turn:
            self._show_life()
            outcomes = self._steps.step()
        for sequence, outcome in outcomes:
            with self._changed:
                found = self._sequences.pop(sequence, None)
            if found is not None:  # else it was cancelled a moment ago
                work, index = found
                work.settle(index, outcome)

    def _sweep(self) -> None:
        self._steps.sweep()
        with self._changed:
            over = [sequence for sequence, (work, _) in self._sequences.items() if work.is_over]
            for sequence in over:
                del self._sequences[sequence]
