"""Prompts as they are compared: how many tokens do two begin with in common?"""

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

MIN_PREFIX_TOKENS: Final = 64
"""Shorter prefixes are computed again: a copy and a step's waiting would cost as much."""


class PromptPrefix:
    """A prompt, or its first tokens.

    Attributes:
        ids: int64, shape (n_tokens,).
        key: equal in prompts that share enough tokens to copy; None for a prompt that is too short.
    """

    def __init__(self, ids: Sequence[int] | NDArray[np.int64]) -> None:
        self.ids = np.asarray(ids, dtype=np.int64)
        is_long = len(self.ids) >= MIN_PREFIX_TOKENS
        self.key = hash(self.ids[:MIN_PREFIX_TOKENS].tobytes()) if is_long else None

    def n_common(self, other: "PromptPrefix") -> int:
        """Return how many tokens both begin with; 0 where these are too few to share them."""
        if self.key is None or self.key != other.key:
            return 0
        n = min(len(self.ids), len(other.ids))
        differs = self.ids[:n] != other.ids[:n]
        n_same = int(differs.argmax()) if differs.any() else n
        return n_same if n_same >= MIN_PREFIX_TOKENS else 0
