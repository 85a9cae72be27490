"""The sequences that have a place: those that decode, and those whose prompt is prefilled in chunks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic

from penstock_workers.generation.sequence import A, ScheduledSequence

if TYPE_CHECKING:  # admission needs no torch
    from penstock_workers.generation.forward import Batch


@dataclass(slots=True, kw_only=True, eq=False)
class ChunkedPrefill(Generic[A]):
    """A long prompt of which a part is computed, a chunk at each step.

    Attributes:
        sequences: sequences that have this prompt, at least one; the others are duplicates of the first.
        batch: batch of one row, which holds the tokens that are computed.
    """

    sequences: list[ScheduledSequence[A]]
    batch: "Batch"


class Running(Generic[A]):
    """The sequences in memory.

    Attributes:
        decoding: sequences that decode, in the order of the batch's rows.
        batch: batch of the sequences that decode; None if nobody does.
        chunked: long prompt that is being prefilled; None if there is none.
    """

    def __init__(self) -> None:
        self.decoding: list[ScheduledSequence[A]] = []
        self.batch: Batch | None = None
        self.chunked: ChunkedPrefill[A] | None = None

    @property
    def prefilling(self) -> list[ScheduledSequence[A]]:
        """Those whose prompt is prefilled in chunks."""
        return self.chunked.sequences if self.chunked else []

    @property
    def everyone(self) -> list[ScheduledSequence[A]]:
        """Those that decode, then those whose prompt is prefilled in chunks."""
        return [*self.decoding, *self.prefilling]

    @property
    def n_slots(self) -> int:
        """Token slots that their caches have allocated."""
        return sum(batch.n_slots for batch in self._batches())

    @property
    def n_bytes(self) -> int:
        """Bytes that their caches have allocated."""
        return sum(batch.n_bytes for batch in self._batches())

    def add(self, sequences: Sequence[ScheduledSequence[A]], batch: "Batch") -> None:
        """Give sequences whose prompts are computed a place among those that decode.

        Args:
            sequences: in the order of the batch's rows.
            batch: not to be used again.

        Raises:
            Exception: whatever torch raises. The sequences are counted all the same: half of the layers may
                have grown, so that all have to leave with the batch.
        """
        if self.batch is None:
            self.batch, self.decoding = batch, list(sequences)
            return
        self.decoding += sequences
        self.batch.merge(batch)

    def drop(self, gone: Sequence[int]) -> None:
        """Drop those that decode at some places."""
        if len(gone) == len(self.decoding):
            self.clear()
        elif gone:
            assert self.batch is not None
            self.decoding = [self.decoding[place] for place in self.batch.drop(gone)]

    def drop_over(self) -> None:
        """Drop those whose answers nobody wants any more."""
        if gone := [place for place, sequence in enumerate(self.decoding) if sequence.is_over()]:
            self.drop(gone)
        if self.chunked:
            self.chunked.sequences = [each for each in self.chunked.sequences if not each.is_over()]
            self.chunked = self.chunked if self.chunked.sequences else None

    def clear(self) -> None:
        """Drop all that decode."""
        self.decoding, self.batch = [], None

    def _batches(self) -> "list[Batch]":
        return [batch for batch in (self.batch, self.chunked and self.chunked.batch) if batch]
