"""Beginnings that prompts share: a system prompt is computed for one of them, and copied for the others."""

from collections import deque
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from penstock_workers.generation.causal_lm import Batch

LEAST_TOKENS: Final = 64
"""Shorter beginnings are computed again: a copy and a step's waiting would cost as much."""
_MOST_KEPT = 16
_MOST_RECENT = 64


class Opening:
    """A prompt, or a part from its first token on, as these are compared.

    Attributes:
        ids: int64, shape (n_tokens,).
        head: what prompts have in common that share enough; None for one that is too short.
    """

    def __init__(self, ids: Sequence[int] | NDArray[np.int64]) -> None:
        self.ids = np.asarray(ids, dtype=np.int64)
        self.head = hash(self.ids[:LEAST_TOKENS].tobytes()) if len(self.ids) >= LEAST_TOKENS else None

    def n_common(self, other: "Opening") -> int:
        """Return how many tokens both begin with; 0 where these are too few to share them."""
        if self.head is None or self.head != other.head:
            return 0
        n = min(len(self.ids), len(other.ids))
        differs = self.ids[:n] != other.ids[:n]
        n_same = int(differs.argmax()) if differs.any() else n
        return n_same if n_same >= LEAST_TOKENS else 0


class Prefixes:
    """Beginnings that several recent prompts had, the one longest unused goes first.

    Nothing is kept of a prompt until another one begins like it.
    """

    def __init__(self) -> None:
        self._recent: deque[Opening] = deque(maxlen=_MOST_RECENT)
        self._kept: list[tuple[Opening, Batch]] = []  # the one used last is the last

    @property
    def n_cells(self) -> int:
        """What is kept, in tokens."""
        return sum(batch.n_cells for _, batch in self._kept)

    @property
    def n_bytes(self) -> int:
        """What is kept, bytes."""
        return sum(batch.n_bytes for _, batch in self._kept)

    def find(self, prompt: Opening) -> tuple[int, Batch] | None:
        """Return the kept row that most of a prompt begins with, and how much; that is then in use."""
        common = [prompt.n_common(kept) for kept, _ in self._kept]
        if not (n := max(common, default=0)):
            return None
        self._kept.append(self._kept.pop(common.index(n)))
        return n, self._kept[-1][1]

    def note(self, prompt: Opening) -> int:
        """Note a prompt; return how many tokens it begins with that others had and nobody kept, else 0."""
        n = max(map(prompt.n_common, self._recent), default=0)
        self._recent.append(prompt)
        return 0 if any(prompt.n_common(kept) >= n for kept, _ in self._kept) else n

    def keep(self, prompt: Opening, batch: Batch) -> None:
        """Keep a beginning, in a batch of its own; shorter ones that it begins with go."""
        self._kept = [each for each in self._kept if prompt.n_common(each[0]) < len(each[0].ids)]
        self._kept.append((prompt, batch))
        del self._kept[:-_MOST_KEPT]

    def shrink(self, n_cells: int) -> None:
        """Give up beginnings until no more than this is kept, in tokens."""
        while self._kept and self.n_cells > n_cells:
            del self._kept[0]
