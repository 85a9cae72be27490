"""Continuous batching: sequences join and leave a running batch between any two decode steps.

One thread calls `step`. Each step gives every running sequence its next token, then admits newcomers: their
prompts are prefilled in forward passes of their own, so large that nobody waits for long, and a longer
prompt is prefilled in chunks, one a step. Nothing is computed twice that can be copied: duplicate prompts are
one row of such a pass, and a prompt begins with the keys and values of whichever other prompt began alike.
"""

import logging
import time
from collections.abc import Sequence
from typing import Generic

import torch
from torch import Tensor
from transformers import PreTrainedModel

from penstock.errors import EngineError, OutOfMemoryError, PenstockError
from penstock_workers.generation.admission import Admission
from penstock_workers.generation.batch_mode import BatchMode
from penstock_workers.generation.cache_budget import CacheBudget
from penstock_workers.generation.forward import Batch
from penstock_workers.generation.kv_cache import RowPrefix
from penstock_workers.generation.prefill_budget import PrefillBudget
from penstock_workers.generation.prefix_cache import PrefixCache
from penstock_workers.generation.running import Running
from penstock_workers.generation.sampling import sample
from penstock_workers.generation.sequence import A, ScheduledSequence

logger = logging.getLogger(__name__)

Outcome = tuple[ScheduledSequence[A], A | PenstockError]


class Decoding(Generic[A]):
    """The sequences of one model; for one thread only.

    Args:
        name: name of the model, for errors.
        model: ready for inference.
        mode: what the model can.
        max_rows: most sequences in the batch.
        budget_tokens: token slots that the caches may allocate.

    Attributes:
        n_tokens: tokens of prompts and answers so far, those that were copied counted.
    """

    def __init__(
        self, name: str, model: PreTrainedModel, mode: BatchMode, *, max_rows: int, budget_tokens: int
    ) -> None:
        self.name, self.n_tokens = name, 0
        self._model, self._mode = model, mode
        self._running: Running[A] = Running()
        self._prefixes = PrefixCache(self._running, self._new_batch, is_enabled=mode.can_chunk)
        self._budget = CacheBudget(budget_tokens, self._running, self._prefixes)
        self._prefill_budget = PrefillBudget(self._running)
        self._admission = Admission(
            mode,
            self._running,
            self._prefixes,
            self._budget,
            self._prefill_budget,
            max_rows=1 if mode is BatchMode.ALONE else max_rows,
            make_batch=self._new_batch,
        )

    def add(self, sequence: ScheduledSequence[A]) -> None:
        """Let a sequence wait for a place."""
        self._admission.add(sequence)

    @property
    def n_running(self) -> int:
        """Number of sequences that have a place."""
        return len(self._running.everyone)

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return self._admission.is_empty and not self.n_running

    @property
    def budget_tokens(self) -> int:
        """Token slots that the caches may allocate; lowered where memory runs out earlier."""
        return self._budget.n_slots

    @property
    def cache_bytes(self) -> int:
        """Bytes that the caches have allocated."""
        return self._running.n_bytes + self._prefixes.n_bytes

    def step(self) -> list[Outcome[A]]:
        """Drop who is over, give each running sequence a token, admit newcomers.

        Returns:
            Sequences that ended, with their answers or errors; those that are over have neither.
        """
        self._running.drop_over()
        return [*self._decode(), *self._prefill_chunk(), *self._prefill()]

    def sweep(self) -> None:
        """Forget waiting sequences that nobody wants any more: they hold memory."""
        self._admission.sweep()

    def _new_batch(self) -> Batch:
        return Batch(self._model, is_mergeable=self._mode.is_continuous)

    def _decode(self) -> list[Outcome[A]]:
        """Give each running sequence a token."""
        running = self._running
        if running.batch is None:
            return []
        began = time.perf_counter()
        try:
            logits = running.batch.forward([[sequence.tokens.output[-1]] for sequence in running.decoding])
        except Exception as error:  # noqa: BLE001  whatever torch raises
            return self._retreat(error)
        outcomes, gone = self._settle(running.decoding, logits)
        self._prefill_budget.step_s = time.perf_counter() - began
        running.drop(gone)
        return outcomes

    def _prefill_chunk(self) -> list[Outcome[A]]:
        """Compute a chunk of the long prompt; admits its sequences when that is the last one."""
        if self._running.chunked is None:
            return []
        sequences, batch = self._running.chunked.sequences, self._running.chunked.batch
        first, max_tokens = sequences[0], self._prefill_budget.n_tokens
        try:
            if not batch.lengths:
                batch.copy_prefixes([self._prefixes.find(first)], max_tokens)
                self.n_tokens += sum(batch.lengths)
            n_done = batch.lengths[0] if batch.lengths else 0
            chunk = first.ids[n_done : n_done + max_tokens]
            logits = batch.forward([chunk])
            is_whole = n_done + len(chunk) == first.n_ids
            if is_whole:
                self._keep_prefixes([first], batch, sequences)
                logits = _expand(batch, logits, [0] * len(sequences))
        except Exception as error:  # noqa: BLE001  whatever torch raises
            self._running.chunked = None
            return self._refuse(sequences, error)
        self.n_tokens += len(chunk)
        if not is_whole:
            return []
        self._running.chunked = None
        self.n_tokens += sum(duplicate.n_ids for duplicate in sequences[1:])
        return self._admit(sequences, batch, logits)

    def _prefill(self) -> list[Outcome[A]]:
        """Compute the prompts of newcomers, and admit them."""
        sequences = self._admission.next_prefill()
        if not sequences:
            return []
        began = time.perf_counter()
        distinct, order = _deduplicate(sequences)
        batch = self._new_batch()
        try:
            prefixes, n_new = _align(distinct, [self._prefixes.find(sequence) for sequence in distinct])
            batch.copy_prefixes(prefixes, n_new)
            logits = batch.forward([sequence.ids[-n_new:] for sequence in distinct])
            self._keep_prefixes(distinct, batch, sequences)
            logits = _expand(batch, logits, order)
        except Exception as error:  # noqa: BLE001  whatever torch raises
            return self._refuse(sequences, error)
        self.n_tokens += sum(sequence.n_ids for sequence in sequences)
        outcomes = self._admit(sequences, batch, logits)
        self._prefill_budget.measure(len(distinct) * n_new, time.perf_counter() - began)
        return outcomes

    def _keep_prefixes(
        self,
        distinct: Sequence[ScheduledSequence[A]],
        batch: Batch,
        newcomers: Sequence[ScheduledSequence[A]],
    ) -> None:
        """Keep what prompts that were just computed have in common with recent ones, if there is room."""
        n_slots = self._budget.left_for_prefixes([*self._running.decoding, *newcomers], batch.n_slots)
        self._prefixes.keep(distinct, batch, n_slots)

    def _admit(
        self, sequences: Sequence[ScheduledSequence[A]], batch: Batch, logits: Tensor
    ) -> list[Outcome[A]]:
        """Give sequences their first tokens, and those that go on a place in the running batch."""
        outcomes, gone = self._settle(sequences, logits)
        if len(gone) == len(sequences):
            return outcomes
        if gone:
            sequences = [sequences[place] for place in batch.drop(gone)]
        try:
            self._running.add(sequences, batch)
        except Exception as error:  # noqa: BLE001  whatever torch raises
            return [*outcomes, *self._retreat(error)]
        return outcomes

    def _settle(
        self, sequences: Sequence[ScheduledSequence[A]], logits: Tensor
    ) -> tuple[list[Outcome[A]], list[int]]:
        """Give sequences their next tokens; returns what ended, and at which places."""
        outcomes: list[Outcome[A]] = []
        gone = []
        self.n_tokens += len(sequences)
        chosen = sample(logits, [sequence.tokens for sequence in sequences])
        for place, (sequence, token) in enumerate(zip(sequences, chosen, strict=True)):
            outcome = self._take(sequence, token)
            if outcome is not None:
                outcomes.append((sequence, outcome))
                gone.append(place)
        return outcomes, gone

    def _take(self, sequence: ScheduledSequence[A], token: int | None) -> A | PenstockError | None:
        """Give a sequence its next token; returns its answer or error if that ends it."""
        if token is None:
            return EngineError(self.name, "logits are not finite")
        sequence.tokens.output.append(token)
        try:
            return sequence.take(token)
        except PenstockError as error:
            return error.with_traceback(None)  # it holds this frame, which holds it
        except Exception as error:  # one sequence's text must not end the others'
            logger.error("an answer's text failed", extra={"model": self.name}, exc_info=error)
            return EngineError(self.name, f"{type(error).__name__} in its text")

    def _refuse(self, sequences: Sequence[ScheduledSequence[A]], error: Exception) -> list[Outcome[A]]:
        """Prompts failed: try them again fewer at a time, until the one that fails is alone."""
        first, running = sequences[0], self._running.decoding
        if len(sequences) > 1:
            for sequence in sequences:
                sequence.max_prefill_rows = len(sequences) // 2
        elif _is_out_of_memory(error) and self._prefixes.n_slots:
            pass  # prefixes go first
        elif _is_out_of_memory(error) and running:
            first.max_batch_rows = len(running)  # waits for one of the others to leave
        else:
            return [(first, self._explain(first, error))]
        self._requeue([*running, *sequences], sequences, error)
        return []

    def _retreat(self, error: Exception) -> list[Outcome[A]]:
        """A step failed, and who is at fault cannot be seen: all leave, and come back in half the number.

        What a failed step left behind is not to be relied on, and recurrent states cannot be repeated:
        so their prompts and answers so far are computed again.
        """
        sequences = self._running.decoding
        self._running.clear()
        if _is_out_of_memory(error):  # a long prompt had memory too
            sequences = [*sequences, *self._running.prefilling]
            self._running.chunked = None
        if len(sequences) > 1:
            for sequence in sequences:
                sequence.max_batch_rows = len(sequences) // 2
        elif not (_is_out_of_memory(error) and self._prefixes.n_slots):
            return [(sequences[0], self._explain(sequences[0], error))]
        self._requeue(sequences, sequences, error)
        return []

    def _requeue(
        self,
        running: Sequence[ScheduledSequence[A]],
        sequences: Sequence[ScheduledSequence[A]],
        error: Exception,
    ) -> None:
        """Let sequences wait again, before all others.

        Args:
            running: those that were in memory when it failed, for the budget.
            sequences: those that wait again.
            error: what torch raised.
        """
        if _is_out_of_memory(error):
            self._budget.lower(running)
        logger.warning(
            "forward pass failed; its rows try again, fewer at a time",
            extra={"model": self.name, "n_rows": len(sequences), "budget_tokens": self.budget_tokens},
            exc_info=error,
        )
        if self._model.device.type == "cuda" and _is_out_of_memory(error):
            torch.cuda.empty_cache()
        self._admission.put_back(sequences)

    def _explain(self, sequence: ScheduledSequence[A], error: Exception) -> PenstockError:
        if _is_out_of_memory(error):
            return OutOfMemoryError(self.name, sequence.n_ids)
        logger.error("request failed", extra={"model": self.name}, exc_info=error)
        return EngineError(self.name, f"{type(error).__name__} in the forward pass")


def _deduplicate(
    sequences: Sequence[ScheduledSequence[A]],
) -> tuple[list[ScheduledSequence[A]], list[int]]:
    """Return the sequences that differ, and for each sequence which of these goes on from the same tokens."""
    distinct: list[ScheduledSequence[A]] = []
    order = []
    for sequence in sequences:
        found = (place for place, each in enumerate(distinct) if sequence.is_duplicate_of(each))
        place = next(found, len(distinct))
        if place == len(distinct):
            distinct.append(sequence)
        order.append(place)
    return distinct, order


def _align(
    sequences: Sequence[ScheduledSequence[A]], prefixes: Sequence[RowPrefix | None]
) -> tuple[list[RowPrefix | None], int]:
    """Shorten prefixes so that all rows compute the same number of tokens; returns them, and that number.

    A row that copied more would have padding inside.
    """
    pairs = list(zip(sequences, prefixes, strict=True))
    n_new = max(sequence.n_ids - (prefix.n_tokens if prefix else 0) for sequence, prefix in pairs)
    aligned = [
        prefix._replace(n_tokens=sequence.n_ids - n_new) if prefix and sequence.n_ids > n_new else None
        for sequence, prefix in pairs
    ]
    return aligned, n_new


def _expand(batch: Batch, logits: Tensor, order: Sequence[int]) -> Tensor:
    """Give distinct rows their duplicates, in the cache and among the logits.

    Returns:
        Logits of all rows, float32, shape (len(order), vocab).
    """
    if len(order) == len(logits):
        return logits
    batch.expand(order)
    return logits[list(order)]


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
