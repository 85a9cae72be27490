"""Tokens that nobody here can count: estimated from bytes, corrected by what the server counts."""

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Final

BYTES_PER_TOKEN: Final = 4.0
"""Estimate until the server has counted something."""


class TokenEstimate:
    """Bytes per token of one model, as its server counts."""

    def __init__(self) -> None:
        self._bytes_per_token = BYTES_PER_TOKEN

    def estimate(self, text: str) -> int:
        """Return how many tokens a text may have; at least 1."""
        return max(1, math.ceil(len(text.encode()) / self._bytes_per_token))

    def counted(self, n_bytes: int, n_tokens: object) -> int | None:
        """Learn from what the server counted; None where it did not."""
        if not isinstance(n_tokens, int) or n_tokens < 1:
            return None
        self._bytes_per_token += 0.1 * (n_bytes / n_tokens - self._bytes_per_token)
        return n_tokens


def share_out(n_tokens: int, weights: Sequence[int]) -> list[int]:
    """Split what the server counted for all by what each is thought to have; the sum stays exact."""
    whole = max(1, sum(weights))
    ends = [round(n_tokens * before / whole) for before in accumulate(weights, initial=0)]
    return [end - start for start, end in pairwise(ends)]
