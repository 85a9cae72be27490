"""How much memory the KV caches of one model may take: counted in token slots, lowered when it runs out."""

from collections.abc import Sequence
from typing import Final, Generic

from penstock_workers.generation.cache_grid import most_slots
from penstock_workers.generation.prefix_cache import PrefixCache
from penstock_workers.generation.running import Running
from penstock_workers.generation.sequence import A, ScheduledSequence

_PREFIX_SHARE: Final = 4
"""Kept prefixes take at most the budget divided by this."""


class CacheBudget(Generic[A]):
    """The bound of what running sequences and kept prefixes allocate together.

    Attributes:
        n_slots: token slots; lowered where memory runs out earlier.
    """

    def __init__(self, n_slots: int, running: Running[A], prefixes: PrefixCache[A]) -> None:
        self.n_slots = n_slots
        self._running, self._prefixes = running, prefixes

    def make_room(self, sequence: ScheduledSequence[A], group: Sequence[ScheduledSequence[A]]) -> bool:
        """Say whether a sequence fits beside all that run, evicting prefixes where that helps.

        A sequence that could run alone is never refused when nothing runs.

        Args:
            sequence: one that waits.
            group: those that are prefilled together with it.
        """
        running, group = [*self._running.everyone, *group], [*group, sequence]
        width = max(each.n_final for each in (*running, *group))
        # Prompts are in memory twice while they are merged.
        prefill = most_slots(len(group), max(each.n_ids for each in group)) if running else 0
        needed = self._claim(len(running) + 1, width) + prefill
        if running and needed > self.n_slots:
            return False
        self._prefixes.evict_to(self.n_slots - needed)
        return True

    def left_for_prefixes(self, sequences: Sequence[ScheduledSequence[A]], n_prefill_slots: int) -> int:
        """Return how many token slots kept prefixes may take.

        Args:
            sequences: those that are going to decode.
            n_prefill_slots: what the batch of a prefill has allocated besides.
        """
        claim = self._claim(len(sequences), max(each.n_final for each in sequences)) + n_prefill_slots
        return min(self.n_slots - claim, self.n_slots // _PREFIX_SHARE)

    def lower(self, sequences: Sequence[ScheduledSequence[A]]) -> None:
        """Allow less than sequences took for which memory ran out, and evict all prefixes."""
        failed = most_slots(len(sequences), max(each.n_ids for each in sequences))
        self.n_slots = min(self.n_slots, failed * 3 // 4)
        self._prefixes.evict_to(0)

    def _claim(self, n_rows: int, width: int) -> int:
        """Return how many slots batches may grow to with so many rows, the longest of this width."""
        return max(most_slots(n_rows, width), self._running.n_slots)
