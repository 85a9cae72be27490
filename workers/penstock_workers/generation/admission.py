"""Decide who is admitted to the batch: by rows, memory, duplicates, prefixes, and the prefill's size."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Final, Generic

from penstock_workers.generation.batch_mode import BatchMode
from penstock_workers.generation.cache_budget import CacheBudget
from penstock_workers.generation.prefill_budget import PrefillBudget
from penstock_workers.generation.prefix_cache import PrefixCache
from penstock_workers.generation.prompt_prefix import MIN_PREFIX_TOKENS
from penstock_workers.generation.running import ChunkedPrefill, Running
from penstock_workers.generation.sequence import A, ScheduledSequence

if TYPE_CHECKING:  # admission needs no torch
    from penstock_workers.generation.forward import Batch

WINDOW_SEQUENCES: Final = 128
"""Prefills are cut from this many of the oldest waiting sequences."""


class Admission(Generic[A]):
    """The waiting sequences of one model, and which of them are prefilled next.

    Args:
        mode: what the model can.
        running: sequences that have a place; a long prompt is put there to be prefilled in chunks.
        prefixes: what newcomers need not compute.
        budget: memory that there is.
        prefill_budget: prompt tokens that a step may compute.
        max_rows: most sequences in the batch.
        make_batch: returns an empty batch, for a long prompt.
    """

    def __init__(
        self,
        mode: BatchMode,
        running: Running[A],
        prefixes: PrefixCache[A],
        budget: CacheBudget[A],
        prefill_budget: PrefillBudget,
        *,
        max_rows: int,
        make_batch: "Callable[[], Batch]",
    ) -> None:
        self._mode, self._running, self._prefixes = mode, running, prefixes
        self._budget, self._prefill_budget = budget, prefill_budget
        self._max_rows, self._make_batch = max_rows, make_batch
        self._waiting: deque[ScheduledSequence[A]] = deque()

    @property
    def is_empty(self) -> bool:
        """Whether nobody waits."""
        return not self._waiting

    def add(self, sequence: ScheduledSequence[A]) -> None:
        """Let a sequence wait behind all others."""
        self._waiting.append(sequence)

    def put_back(self, sequences: Sequence[ScheduledSequence[A]]) -> None:
        """Let sequences wait before all others, in their order."""
        self._waiting.extendleft(reversed(sequences))

    def sweep(self) -> None:
        """Forget waiting sequences that nobody wants any more: they hold memory."""
        if any(sequence.is_over() for sequence in self._waiting):
            self._waiting = deque(sequence for sequence in self._waiting if not sequence.is_over())

    def next_prefill(self) -> list[ScheduledSequence[A]]:
        """Take out the sequences whose prompts share the next forward pass; may begin a chunked prefill."""
        is_continuous = self._mode.is_continuous
        if not self._waiting or (self._running.decoding and not is_continuous):
            return []
        max_tokens = self._prefill_budget.n_tokens if is_continuous else self._budget.n_slots
        prefill: _Prefill[A] = _Prefill(max_tokens)
        left: list[ScheduledSequence[A]] = []
        for sequence in self._oldest():
            if not self._has_place(sequence, prefill):  # nobody overtakes whoever waits for a row or memory
                left.append(sequence)
                break
            if self._admit(sequence, prefill):
                sequence.on_start()
            else:
                left.append(sequence)
        self.put_back(left)
        return prefill.sequences

    def _oldest(self) -> Iterator[ScheduledSequence[A]]:
        """Take the oldest waiting sequences out, one by one, as long as they are asked for."""
        for _ in range(min(WINDOW_SEQUENCES, len(self._waiting))):
            sequence = self._waiting.popleft()
            if not sequence.is_over():
                yield sequence

    def _has_place(self, sequence: ScheduledSequence[A], prefill: "_Prefill[A]") -> bool:
        """Say whether there is a row, and memory."""
        mates = [*self._running.everyone, *prefill.sequences]
        max_rows = min(self._max_rows, *(each.max_batch_rows for each in (*mates, sequence)))
        return len(mates) < max_rows and self._budget.make_room(sequence, prefill.sequences)

    def _admit(self, sequence: ScheduledSequence[A], prefill: "_Prefill[A]") -> bool:
        """Let a sequence take part in a prefill; False if it has to wait for a later step."""
        prefix = self._prefixes.find(sequence)
        n_cached = prefix.n_tokens if prefix else 0
        if self._joins_chunked(sequence) or prefill.add_duplicate(sequence):
            return True
        if self._has_longer_prefix_soon(sequence, n_cached, prefill):
            return False
        n_new = sequence.n_ids - n_cached
        if self._mode.can_chunk and n_new > prefill.max_tokens:
            return self._begins_chunked(sequence)
        return prefill.add(sequence, n_new)

    def _joins_chunked(self, sequence: ScheduledSequence[A]) -> bool:
        """Let a duplicate of the long prompt share its prefill."""
        others = self._running.prefilling
        if not (others and sequence.is_duplicate_of(others[0]) and _may_share_prefill(others, sequence)):
            return False
        others.append(sequence)
        return True

    def _begins_chunked(self, sequence: ScheduledSequence[A]) -> bool:
        """Let a long prompt be prefilled in chunks, if no other one is."""
        if self._running.chunked is not None:
            return False
        self._running.chunked = ChunkedPrefill(sequences=[sequence], batch=self._make_batch())
        return True

    def _has_longer_prefix_soon(
        self, sequence: ScheduledSequence[A], n_cached: int, prefill: "_Prefill[A]"
    ) -> bool:
        """Say whether more of what a sequence begins with is about to be computed for others."""
        if not self._mode.can_chunk:
            return False
        others = [*prefill.sequences, *self._running.prefilling[:1]]
        n_coming = max((sequence.prefix.n_common(other.prefix) for other in others), default=0)
        return min(n_coming, sequence.n_ids - 1) - n_cached >= MIN_PREFIX_TOKENS


class _Prefill(Generic[A]):
    """Sequences whose prompts share a forward pass.

    Attributes:
        max_tokens: most tokens of that pass, padding counted; a single prompt may have more.
        sequences: members of the pass, oldest first.
    """

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.sequences: list[ScheduledSequence[A]] = []
        self._widths: list[int] = []  # tokens to compute, of each that is no duplicate

    def add_duplicate(self, sequence: ScheduledSequence[A]) -> bool:
        """Add a sequence if another one goes on from the same tokens: it costs no forward pass."""
        is_duplicate = any(map(sequence.is_duplicate_of, self.sequences))
        if not (is_duplicate and _may_share_prefill(self.sequences, sequence)):
            return False
        self.sequences.append(sequence)
        return True

    def add(self, sequence: ScheduledSequence[A], n_new: int) -> bool:
        """Add a sequence with `n_new` tokens to compute, if the pass has room for them."""
        n_padded = (len(self._widths) + 1) * max([n_new, *self._widths])
        if self.sequences and (
            n_padded > self.max_tokens or not _may_share_prefill(self.sequences, sequence)
        ):
            return False
        self.sequences.append(sequence)
        self._widths.append(n_new)
        return True


def _may_share_prefill(others: Sequence[ScheduledSequence[A]], sequence: ScheduledSequence[A]) -> bool:
    return len(others) < min(each.max_prefill_rows for each in (*others, sequence))
