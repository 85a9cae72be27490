"""Continuous batching: rows join and leave a running batch between any two decode steps.

One thread calls `step`. Each step gives every running row its next token, then lets newcomers in: their
prompts are computed in forward passes of their own, so large that nobody waits for long, and a prompt that
is longer goes on at the next step. Nothing is computed twice that can be copied: equal prompts are one row of
such a pass, and a prompt begins with the keys and values of whichever other began alike.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Final, Generic, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from penstock.errors import EngineError, OutOfMemoryError, PenstockError
from penstock_workers.generation.causal_lm import Batch, Sharing
from penstock_workers.generation.kv_cache import Part, RowCache
from penstock_workers.generation.prefix_cache import LEAST_TOKENS, Opening, Prefixes
from penstock_workers.generation.sampling import Trail, choose

logger = logging.getLogger(__name__)

WINDOW_ROWS: Final = 128
"""How many of the oldest waiting rows a forward pass of prompts is cut from."""
PAUSE_S: Final = 0.1
"""How long running rows wait for the prompts of newcomers, per step, if a step is not longer itself."""
_KEPT_SHARE = 4  # of the budget, for beginnings of prompts
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

    @cached_property
    def opening(self) -> Opening:
        """Its prompt, to be compared with others'."""
        return Opening(self.trail.prompt)

    def is_twin_of(self, other: "Row[A]") -> bool:
        """Whether both go on from the same tokens."""
        mine, theirs = self.trail, other.trail
        is_same = mine.prompt is theirs.prompt or mine.prompt == theirs.prompt
        return is_same and mine.tokens == theirs.tokens

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
        n_tokens: of prompts and answers so far, those that were copied counted.
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
        self._long: tuple[list[Row[A]], Batch] | None = None  # rows of a prompt of which a part is computed
        self._prefixes = Prefixes()
        self._step_s = 0.0
        self._prompt_tokens_per_s: float | None = None

    def add(self, row: Row[A]) -> None:
        """Let a row wait for a place."""
        self._waiting.append(row)

    @property
    def n_running(self) -> int:
        """Rows that have a place."""
        return len(self._rows) + len(self._long_rows())

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self._waiting or self.n_running)

    @property
    def cache_bytes(self) -> int:
        """What the cache has allocated."""
        return sum(batch.n_bytes for batch in self._batches()) + self._prefixes.n_bytes

    def _long_rows(self) -> list[Row[A]]:
        return self._long[0] if self._long else []

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
        if self._long:
            left = [row for row in self._long[0] if not row.is_over()]
            self._long = (left, self._long[1]) if left else None

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
        rows, batch = self._long
        row = rows[0]
        try:
            if not batch.lengths:
                batch.begin([self._find_part(row)], self._prompt_tokens())
                self.n_tokens += sum(batch.lengths)
            done = batch.lengths[0] if batch.lengths else 0
            part = row.ids[done : done + self._prompt_tokens()]
            logits = batch.extend([part])
            is_whole = done + len(part) == row.n_ids
            if is_whole:
                self._keep_beginnings([row], batch, rows)
                logits = _spread(batch, logits, [0] * len(rows))
        except Exception as error:  # noqa: BLE001  whatever torch raises
            self._long = None
            return self._refuse(rows, error)
        self.n_tokens += len(part)
        if not is_whole:
            return []
        self._long = None
        self.n_tokens += sum(twin.n_ids for twin in rows[1:])
        return self._enter(rows, batch, logits)

    def _let_in(self) -> list[Outcome[A]]:
        group = self._next_group()
        if not group:
            return []
        began = time.perf_counter()
        firsts, order = _without_twins(group)
        batch = Batch(self._model, joins=self._joins)
        try:
            parts = [self._find_part(row) for row in firsts]
            n_new = max(row.n_ids - _length(part) for row, part in zip(firsts, parts, strict=True))
            # All compute as much: what a row could copy beyond that would be followed by padding.
            parts = [
                part._replace(n_tokens=n) if part and (n := row.n_ids - n_new) > 0 else None
                for row, part in zip(firsts, parts, strict=True)
            ]
            batch.begin(parts, n_new)
            logits = batch.extend([row.ids[-n_new:] for row in firsts])
            self._keep_beginnings(firsts, batch, group)
            logits = _spread(batch, logits, order)
        except Exception as error:  # noqa: BLE001  whatever torch raises
            return self._refuse(group, error)
        self.n_tokens += sum(row.n_ids for row in group)
        outcomes = self._enter(group, batch, logits)
        self._measure(len(firsts) * n_new, time.perf_counter() - began)
        return outcomes

    def _find_part(self, row: Row[A]) -> Part | None:
        """Return the most that is computed already of what a row begins with."""
        if not self._chunks:
            return None
        best, found = 0, None
        if kept := self._prefixes.find(row.opening):
            best, found = kept[0], (kept[1], 0)
        for place, other in enumerate(self._rows):
            if (n := row.opening.n_common(other.opening)) > best:
                assert self._batch is not None
                best, found = n, (self._batch, place)
        if self._long and self._long[1].lengths:
            rows, batch = self._long
            if (n := min(row.opening.n_common(rows[0].opening), batch.lengths[0])) > best:
                best, found = n, (batch, 0)
        # Its last token gives the logits.
        return found[0].part(found[1], min(best, row.n_ids - 1)) if found else None

    def _keep_beginnings(self, firsts: Sequence[Row[A]], batch: Batch, group: Sequence[Row[A]]) -> None:
        """Keep what prompts that were just computed have in common with others before them."""
        running = [*self._rows, *group]
        claim = self._claim(len(running), max(row.n_final for row in running)) + batch.n_cells
        most = min(self.budget_tokens - claim, self.budget_tokens // _KEPT_SHARE)
        for place, row in enumerate(firsts):
            if self._chunks and 0 < (n := self._prefixes.note(row.opening)) <= most:
                self._prefixes.shrink(most - n)
                kept = Batch(self._model, joins=True)
                kept.begin([batch.part(place, n)], 0)
                self._prefixes.keep(Opening(row.opening.ids[:n]), kept)

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
                    outcome = error.with_traceback(None)  # it holds this frame, which holds it
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
        widths: list[int] = []  # tokens to compute, of each that is no other's twin
        left: list[Row[A]] = []
        for row in self._window():
            long = self._long_rows()
            running = [*self._rows, *long, *group]
            n_rows = len(running) + 1
            if n_rows > min(self._max_rows, row.company, *(other.company for other in running), 1 << 30):
                left.append(row)
                break
            if not self._fits(running, [*group, row]):  # nobody overtakes whoever waits for memory
                left.append(row)
                break
            n_new = row.n_ids - _length(part := self._find_part(row))
            if long and row.is_twin_of(long[0]) and _may_grow(long, row):
                row.on_start()
                long.append(row)
            elif any(map(row.is_twin_of, group)) and _may_grow(group, row):
                row.on_start()
                group.append(row)
            elif self._comes_soon(row, part, group):
                left.append(row)
            elif self._chunks and n_new > most:
                if self._long is None:
                    row.on_start()
                    self._long = ([row], Batch(self._model, joins=True))
                else:
                    left.append(row)
            elif group and ((len(widths) + 1) * max(n_new, *widths, 0) > most or not _may_grow(group, row)):
                left.append(row)
            else:
                row.on_start()
                group.append(row)
                widths.append(n_new)
        self._waiting.extendleft(reversed(left))
        return group

    def _comes_soon(self, row: Row[A], part: Part | None, group: Sequence[Row[A]]) -> bool:
        """Say whether more of what a row begins with is about to be computed for others."""
        if not self._chunks:
            return False
        coming = max(
            (row.opening.n_common(other.opening) for other in [*group, *self._long_rows()[:1]]), default=0
        )
        return min(coming, row.n_ids - 1) - _length(part) >= LEAST_TOKENS

    def _window(self) -> Iterator[Row[A]]:
        """Take the oldest waiting rows out, one by one, as long as they are asked for."""
        for _ in range(min(WINDOW_ROWS, len(self._waiting))):
            row = self._waiting.popleft()
            if not row.is_over():
                yield row

    def _fits(self, running: Sequence[Row[A]], group: Sequence[Row[A]]) -> bool:
        """Say whether the last one of a group may enter beside all that run, the group's others counted."""
        width = max(row.n_final for row in (*running, *group))
        # Prompts are there twice while they join.
        own = RowCache.cells(len(group), max(row.n_ids for row in group)) if running else 0
        needed = self._claim(len(running) + 1, width) + own
        if running and needed > self.budget_tokens:
            return False
        self._prefixes.shrink(self.budget_tokens - needed)
        return True

    def _claim(self, n_rows: int, width: int) -> int:
        """Return what the batches may grow to, in tokens, with so many rows, the longest of this width."""
        return max(RowCache.cells(n_rows, width), sum(batch.n_cells for batch in self._batches()))

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
        elif _is_out_of_memory(error) and self._prefixes.n_cells:
            pass  # they go first
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
            rows, self._long = [*rows, *self._long[0]], None
        if len(rows) > 1:
            for row in rows:
                row.company = len(rows) // 2
        elif not (_is_out_of_memory(error) and self._prefixes.n_cells):
            return [(rows[0], self._explain(rows[0], error))]
        self._requeue(rows, rows, error)
        return []

    def _requeue(self, running: Sequence[Row[A]], rows: Sequence[Row[A]], error: Exception) -> None:
        if _is_out_of_memory(error):
            cells = RowCache.cells(len(running), max(row.n_ids for row in running))
            self.budget_tokens = min(self.budget_tokens, cells * 3 // 4)
            self._prefixes.shrink(0)
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


def _may_grow(group: Sequence[Row[A]], row: Row[A]) -> bool:
    return len(group) < min(row.group, *(other.group for other in group), 1 << 30)


def _without_twins(group: Sequence[Row[A]]) -> tuple[list[Row[A]], list[int]]:
    """Return the rows that differ, and for each row which of these goes on from the same tokens."""
    firsts: list[Row[A]] = []
    order = []
    for row in group:
        twin = next((place for place, first in enumerate(firsts) if row.is_twin_of(first)), len(firsts))
        if twin == len(firsts):
            firsts.append(row)
        order.append(twin)
    return firsts, order


def _spread(batch: Batch, logits: Tensor, order: Sequence[int]) -> Tensor:
    """Give rows that differ their twins, in the cache and among the logits, shape (n_rows, vocab)."""
    if len(order) == len(logits):
        return logits
    batch.spread(order)
    return logits[list(order)]


def _length(part: Part | None) -> int:
    return part.n_tokens if part else 0


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
