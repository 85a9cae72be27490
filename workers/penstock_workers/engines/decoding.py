"""Continuous batching: rows join and leave a running batch between any two decode steps.

One thread calls `step`. Each step gives every running row its next token, then lets newcomers in: their
prompts are computed in forward passes of their own, so large that nobody waits for long, and a prompt that
is longer goes on at the next step.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Final, Generic, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from penstock.errors import EngineError, OutOfMemoryError, PenstockError
from penstock_workers.engines.cache import RowCache
from penstock_workers.engines.causal_lm import Batch, Sharing
from penstock_workers.engines.sampling import Trail, choose

logger = logging.getLogger(__name__)

WINDOW_ROWS: Final = 128
"""How many of the oldest waiting rows a forward pass of prompts is cut from."""
PAUSE_S: Final = 0.1
"""How long running rows wait for the prompts of newcomers, per step, if a step is not longer itself."""
_FIRST_PROMPT_TOKENS, _MOST_PROMPT_TOKENS, _GRAIN = 256, 8192, 64

A = TypeVar("A")


class Row(Generic[A]):
    """One request on its way through the batch.

    Attributes:
        trail: its tokens, and how they are chosen.
        max_new_tokens: bound of its answer.
        group: how many prompts it may share a forward pass with, itself counted; less after a failure.
        company: how many rows the batch may have with it; less after a failure.
    """

    def __init__(
        self,
        trail: Trail,
        max_new_tokens: int,
        *,
        take: Callable[[int], A | None],
        is_over: Callable[[], bool] = lambda: False,
        on_start: Callable[[], None] = lambda: None,
    ) -> None:
        """Make a row.

        Args:
            trail: with no tokens yet.
            max_new_tokens: bound of its answer.
            take: takes its newest token, which is in the trail; returns the answer if that ends it, or
                raises the error that does.
            is_over: says that nobody wants the answer any more.
            on_start: called before its prompt is computed.
        """
        self.trail, self.max_new_tokens = trail, max_new_tokens
        self.take, self.is_over, self.on_start = take, is_over, on_start
        self.group = self.company = 1 << 30

    @property
    def ids(self) -> list[int]:
        """All its tokens; also what is computed again after it had to leave the batch."""
        return [*self.trail.prompt, *self.trail.tokens]

    @property
    def n_ids(self) -> int:
        """How many tokens it has now."""
        return len(self.trail.prompt) + len(self.trail.tokens)

    @property
    def n_final(self) -> int:
        """How many it may have in the end."""
        return len(self.trail.prompt) + self.max_new_tokens


Outcome = tuple[Row[A], A | PenstockError]


class Decoding(Generic[A]):
    """The rows of one model; for one thread only.

    Args:
        name: of the model, for errors.
        model: ready for inference.
        sharing: what the model can.
        max_rows: rows in the batch.
        budget_tokens: what the cache may allocate, in tokens; lowered where memory runs out earlier.

    Attributes:
        n_tokens: computed so far, of prompts and answers.
    """

    def __init__(
        self, name: str, model: PreTrainedModel, sharing: Sharing, *, max_rows: int, budget_tokens: int
    ) -> None:
        self.name, self.budget_tokens, self.n_tokens = name, budget_tokens, 0
        self._model, self._max_rows = model, 1 if sharing is Sharing.ALONE else max_rows
        self._joins, self._chunks = sharing.joins, sharing is Sharing.CONTINUOUS
        self._waiting: deque[Row[A]] = deque()
        self._rows: list[Row[A]] = []
        self._batch: Batch | None = None
        self._long: tuple[Row[A], Batch] | None = None  # a prompt of which a part is computed
        self._step_s = 0.0
        self._prompt_tokens_per_s: float | None = None

    def add(self, row: Row[A]) -> None:
        """Let a row wait for a place."""
        self._waiting.append(row)

    @property
    def n_running(self) -> int:
        """Rows that have a place."""
        return len(self._rows) + (self._long is not None)

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self._waiting or self.n_running)

    @property
    def cache_bytes(self) -> int:
        """What the cache has allocated."""
        return sum(batch.n_bytes for batch in self._batches())

    def _batches(self) -> list[Batch]:
        return [batch for batch in (self._batch, self._long and self._long[1]) if batch]

    def step(self) -> list[Outcome[A]]:
        """Let who is over go, give each running row a token, let newcomers in.

        Returns:
            Rows that ended, with their answers or errors; those that are over have neither.
        """
        self._leave_over()
        return [*self._decode(), *self._go_on_with_long(), *self._let_in()]

    def _leave_over(self) -> None:
        if gone := [place for place, row in enumerate(self._rows) if row.is_over()]:
            self._drop(gone)
        if self._long and self._long[0].is_over():
            self._long = None

    def _drop(self, gone: Sequence[int]) -> None:
        if len(gone) == len(self._rows):
            self._rows, self._batch = [], None
        elif gone:
            assert self._batch is not None
            order = self._batch.drop(gone)
            self._rows = [self._rows[place] for place in order]

    def _decode(self) -> list[Outcome[A]]:
        if self._batch is None:
            return []
        began = time.perf_counter()
        try:
            logits = self._batch.extend([[row.trail.tokens[-1]] for row in self._rows])
        except Exception as error:  # noqa: BLE001  whatever torch raises
            return self._retreat(error)
        outcomes, gone = self._settle(self._rows, logits)
        self._step_s = time.perf_counter() - began
        self._drop(gone)
        return outcomes

    def _go_on_with_long(self) -> list[Outcome[A]]:
        if self._long is None:
            return []
        row, batch = self._long
        done = batch.lengths[0] if batch.lengths else 0
        part = row.ids[done : done + self._prompt_tokens()]
        try:
            logits = batch.extend([part])
        except Exception as error:  # noqa: BLE001  whatever torch raises
            self._long = None
            return self._refuse([row], error)
        self.n_tokens += len(part)
        if done + len(part) < row.n_ids:
            return []
        self._long = None
        return self._enter([row], batch, logits)

    def _let_in(self) -> list[Outcome[A]]:
        group = self._next_group()
        if not group:
            return []
        began = time.perf_counter()
        batch = Batch(self._model, joins=self._joins)
        try:
            logits = batch.extend([row.ids for row in group])
        except Exception as error:  # noqa: BLE001  whatever torch raises
            return self._refuse(group, error)
        self.n_tokens += sum(row.n_ids for row in group)
        outcomes = self._enter(group, batch, logits)
        self._measure(len(group) * max(row.n_ids for row in group), time.perf_counter() - began)
        return outcomes

    def _enter(self, rows: list[Row[A]], batch: Batch, logits: Tensor) -> list[Outcome[A]]:
        """Give rows their first tokens, and those that go on a place in the running batch."""
        outcomes, gone = self._settle(rows, logits)
        if len(gone) == len(rows):
            return outcomes
        if gone:
            rows = [rows[place] for place in batch.drop(gone)]
        if self._batch is None:
            self._batch, self._rows = batch, list(rows)
            return outcomes
        try:
            self._batch.join(batch)
        except Exception as error:  # noqa: BLE001  whatever torch raises
            # Half of the layers may have grown: what is in them is given up with the batch.
            self._rows += rows
            return [*outcomes, *self._retreat(error)]
        self._rows += rows
        return outcomes

    def _settle(self, rows: Sequence[Row[A]], logits: Tensor) -> tuple[list[Outcome[A]], list[int]]:
        """Give rows their next tokens; returns what ended, and at which places."""
        outcomes: list[Outcome[A]] = []
        gone = []
        self.n_tokens += len(rows)
        for place, (row, token) in enumerate(zip(rows, choose(logits, [r.trail for r in rows]), strict=True)):
            outcome: A | PenstockError | None
            if token is None:
                outcome = EngineError(self.name, "logits are not finite")
            else:
                row.trail.tokens.append(token)
                try:
                    outcome = row.take(token)
                except PenstockError as error:
                    outcome = error
                except Exception as error:  # one row's text must not end the others'
                    logger.error("an answer's text failed", extra={"model": self.name}, exc_info=error)
                    outcome = EngineError(self.name, f"{type(error).__name__} in its text")
            if outcome is not None:
                outcomes.append((row, outcome))
                gone.append(place)
        return outcomes, gone

    def _next_group(self) -> list[Row[A]]:
        """Take from the waiting rows whose prompts share the next forward pass; starts a long one."""
        if self._rows and not self._joins:
            return []
        most = self._prompt_tokens() if self._joins else self.budget_tokens
        group: list[Row[A]] = []
        left: list[Row[A]] = []
        for row in self._window():
            running = [*self._rows, *([self._long[0]] if self._long else []), *group]
            n_rows = len(running) + 1
            if n_rows > min(self._max_rows, row.company, *(other.company for other in running), 1 << 30):
                left.append(row)
                break
            if not self._fits(running, [*group, row]):  # nobody overtakes whoever waits for memory
                left.append(row)
                break
            n_group = len(group) + 1
            width = max(row.n_ids, *(other.n_ids for other in group), 0)
            if self._chunks and row.n_ids > most:
                if self._long is None:
                    row.on_start()
                    self._long = (row, Batch(self._model, joins=True))
                else:
                    left.append(row)
            elif group and (n_group * width > most or n_group > min(row.group, *(r.group for r in group))):
                left.append(row)
            else:
                row.on_start()
                group.append(row)
        self._waiting.extendleft(reversed(left))
        return group

    def _window(self) -> Iterator[Row[A]]:
        """Take the oldest waiting rows out, one by one, as long as they are asked for."""
        for _ in range(min(WINDOW_ROWS, len(self._waiting))):
            row = self._waiting.popleft()
            if not row.is_over():
                yield row

    def _fits(self, running: Sequence[Row[A]], group: Sequence[Row[A]]) -> bool:
        """Say whether the last one of a group may enter beside all that run, the group's others counted."""
        if not running:
            return True
        width = max(row.n_final for row in (*running, *group))
        # Prompts are there twice while they join.
        own = RowCache.cells(len(group), max(row.n_ids for row in group))
        held = sum(batch.n_cells for batch in self._batches())
        return max(RowCache.cells(len(running) + 1, width), held) + own <= self.budget_tokens

    def sweep(self) -> None:
        """Forget waiting rows that are over: one that nobody wants holds no memory."""
        if any(row.is_over() for row in self._waiting):
            self._waiting = deque(row for row in self._waiting if not row.is_over())

    def _prompt_tokens(self) -> int:
        """Return how many tokens of prompts are computed between two steps."""
        if self._prompt_tokens_per_s is None:
            return _FIRST_PROMPT_TOKENS
        # When nobody waits there is only the next newcomer to think of.
        pause_s = max(PAUSE_S, self._step_s) if self._rows else 4 * PAUSE_S
        n = int(self._prompt_tokens_per_s * pause_s) // _GRAIN * _GRAIN
        return max(_GRAIN, min(n, _MOST_PROMPT_TOKENS))

    def _measure(self, n_tokens: int, seconds: float) -> None:
        if n_tokens < 2 * _GRAIN:  # tells what a forward pass costs, not what a token does
            return
        speed, previous = n_tokens / max(seconds, 1e-9), self._prompt_tokens_per_s
        self._prompt_tokens_per_s = speed if previous is None else 0.8 * previous + 0.2 * speed

    def _refuse(self, group: list[Row[A]], error: Exception) -> list[Outcome[A]]:
        """Prompts failed: try them again fewer at a time, until the one that fails is alone."""
        if len(group) > 1:
            for row in group:
                row.group = len(group) // 2
        elif _is_out_of_memory(error) and self._rows:
            group[0].company = len(self._rows)  # waits for one of the others to leave
        else:
            return [(group[0], self._explain(group[0], error))]
        self._requeue([*self._rows, *group], group, error)
        return []

    def _retreat(self, error: Exception) -> list[Outcome[A]]:
        """A step failed, and who is at fault cannot be seen: all leave, and come back in half the company.

        What a failed step left behind is not to be relied on, and recurrent states cannot be repeated:
        so their prompts and answers so far are computed again.
        """
        rows, self._rows, self._batch = self._rows, [], None
        if self._long and _is_out_of_memory(error):  # it had memory too
            rows, self._long = [*rows, self._long[0]], None
        if len(rows) == 1:
            return [(rows[0], self._explain(rows[0], error))]
        for row in rows:
            row.company = len(rows) // 2
        self._requeue(rows, rows, error)
        return []

    def _requeue(self, running: Sequence[Row[A]], rows: Sequence[Row[A]], error: Exception) -> None:
        if _is_out_of_memory(error):
            cells = RowCache.cells(len(running), max(row.n_ids for row in running))
            self.budget_tokens = min(self.budget_tokens, cells * 3 // 4)
        logger.warning(
            "forward pass failed; its rows try again, fewer at a time",
            extra={"model": self.name, "n_rows": len(rows), "budget_tokens": self.budget_tokens},
            exc_info=error,
        )
        if self._model.device.type == "cuda" and _is_out_of_memory(error):
            torch.cuda.empty_cache()
        self._waiting.extendleft(reversed(rows))

    def _explain(self, row: Row[A], error: Exception) -> PenstockError:
        if _is_out_of_memory(error):
            return OutOfMemoryError(self.name, row.n_ids)
        logger.error("request failed", extra={"model": self.name}, exc_info=error)
        return EngineError(self.name, f"{type(error).__name__} in the forward pass")


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
