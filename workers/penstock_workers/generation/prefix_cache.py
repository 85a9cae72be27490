"""Prompt prefixes in memory: a system prompt is computed for one prompt, and copied for the others."""

from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Generic

from penstock_workers.generation.prompt_prefix import PromptPrefix
from penstock_workers.generation.running import Running
from penstock_workers.generation.sequence import A, ScheduledSequence

if TYPE_CHECKING:  # admission needs no torch
    from penstock_workers.generation.forward import Batch
    from penstock_workers.generation.kv_cache import RowPrefix

_MOST_KEPT = 16
_MOST_RECENT = 64


class PrefixCache(Generic[A]):
    """Prefixes of running sequences, and those that several recent prompts had.

    Nothing is kept of a prompt until another prompt begins like it; the least recently used prefix is evicted
    first.

    Args:
        running: sequences to copy from.
        make_batch: returns an empty batch, for a prefix that is kept.
        is_enabled: whether the model can go on from a copy; else nothing is found, and nothing kept.
    """

    def __init__(self, running: Running[A], make_batch: "Callable[[], Batch]", *, is_enabled: bool) -> None:
        self._running, self._make_batch, self._is_enabled = running, make_batch, is_enabled
        self._recent: deque[PromptPrefix] = deque(maxlen=_MOST_RECENT)
        self._kept: list[tuple[PromptPrefix, Batch]] = []  # the most recently used one is the last

    @property
    def n_slots(self) -> int:
        """Token slots that kept prefixes have allocated."""
        return sum(batch.n_slots for _, batch in self._kept)

    @property
    def n_bytes(self) -> int:
        """Bytes that kept prefixes have allocated."""
        return sum(batch.n_bytes for _, batch in self._kept)

    def find(self, sequence: ScheduledSequence[A]) -> "RowPrefix | None":
        """Return the longest prefix of a sequence that is in memory, without the sequence's last token."""
        if not self._is_enabled:
            return None
        best, found = self._find_kept(sequence.prefix)
        place = 0
        for index, other in enumerate(self._running.decoding):
            if (n := sequence.prefix.n_common(other.prefix)) > best:
                best, found, place = n, self._running.batch, index
        if (chunked := self._running.chunked) and chunked.batch.lengths:
            n = min(sequence.prefix.n_common(chunked.sequences[0].prefix), chunked.batch.lengths[0])
            if n > best:
                best, found, place = n, chunked.batch, 0
        # The last token gives the logits.
        return found.prefix(place, min(best, sequence.n_ids - 1)) if found else None

    def keep(self, sequences: Sequence[ScheduledSequence[A]], batch: "Batch", n_slots: int) -> None:
        """Keep what prompts that were just computed have in common with recent ones.

        Args:
            sequences: in the order of the batch's rows.
            batch: batch to copy from.
            n_slots: most token slots to keep, of all prefixes together.
        """
        if not self._is_enabled:
            return
        for place, sequence in enumerate(sequences):
            if 0 < (n := self._observe(sequence.prefix)) <= n_slots:
                self.evict_to(n_slots - n)
                kept = self._make_batch()
                kept.copy_prefixes([batch.prefix(place, n)], 0)
                self._put(PromptPrefix(sequence.prefix.ids[:n]), kept)

    def evict_to(self, n_slots: int) -> None:
        """Evict kept prefixes until they have no more than `n_slots` token slots."""
        while self._kept and self.n_slots > n_slots:
            del self._kept[0]

    def _find_kept(self, prompt: PromptPrefix) -> "tuple[int, Batch | None]":
        """Return the kept prefix that most of a prompt begins with, which is then the one used last."""
        common = [prompt.n_common(kept) for kept, _ in self._kept]
        if not (n := max(common, default=0)):
            return 0, None
        self._kept.append(self._kept.pop(common.index(n)))
        return n, self._kept[-1][1]

    def _observe(self, prompt: PromptPrefix) -> int:
        """Note a prompt; return how many tokens it shares with a recent one beyond what is kept, else 0."""
        n = max(map(prompt.n_common, self._recent), default=0)
        self._recent.append(prompt)
        return 0 if any(prompt.n_common(kept) >= n for kept, _ in self._kept) else n

    def _put(self, prefix: PromptPrefix, batch: "Batch") -> None:
        """Keep a prefix; shorter ones that it begins with go."""
        self._kept = [each for each in self._kept if prefix.n_common(each[0]) < len(each[0].ids)]
        self._kept.append((prefix, batch))
        del self._kept[:-_MOST_KEPT]
