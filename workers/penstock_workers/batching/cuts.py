"""How the next batch is cut from texts that wait: which go together, and how many."""

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

MIN_BATCH_TOKENS: Final = 128
"""No batch is cut smaller to save time: with this many tokens a CPU reaches five sixths of its speed."""
ATTENTION_BYTES: Final = 256 << 20
"""Attention scores of a padded batch in one layer, float32; the longest text alone may need more."""
PADDING_TOKENS: Final = 16
"""A text may always be padded by this much; by more, up to its own length."""
BATCH_OVERHEAD: Final = 1 / 16
"""Fixed cost of a padded batch, as a share of the largest one's: 2 to 4 ms of 70 were measured."""

Lengths = NDArray[np.int64]
Cut = Callable[[Lengths, float], Sequence[int]]
"""Choose the next batch from the token counts of waiting items; returns indices, always 0 among them.

The most urgent job comes first, its longest item first. The second argument lowers the limit of tokens.
"""


def cut_by_tokens(max_tokens: int, *, is_padded: bool = True, n_heads: int | None = None) -> Cut:
    """Return how to cut batches of texts that cost at most `max_tokens`.

    Args:
        max_tokens: Most tokens of a batch; a single text may be longer.
        is_padded: A batch costs its longest text times its number of texts, so those go together that waste
            least; else it costs their sum.
        n_heads: Attention heads whose scores a padded batch keeps in memory; None if it keeps none.
    """
    if not is_padded:
        return lambda lengths, limit: _cut_packed(lengths, min(max_tokens, limit))
    overhead = BATCH_OVERHEAD * max_tokens
    return lambda lengths, limit: _cut_padded(lengths, min(max_tokens, limit), n_heads or 0, overhead)


def _cut_padded(lengths: Lengths, max_tokens: float, n_heads: int, overhead: float) -> list[int]:
    """Choose the batch around the most urgent item that has the most real tokens for its cost."""
    order = np.argsort(-lengths, kind="stable")
    ordered = lengths[order]  # longest first
    urgent = int(np.flatnonzero(order == 0)[0])
    # The longest item of a batch is the first of its length, or else as far before as fits.
    firsts = np.flatnonzero(np.diff(ordered[: urgent + 1], prepend=-1)).tolist()
    n_real = np.concatenate(([0], np.cumsum(ordered)))
    best, chosen = 0.0, (urgent, urgent + 1)
    for first, end in zip(firsts, [*firsts[1:], urgent + 1], strict=True):
        longest = max(1, int(ordered[first]))
        most = int(max_tokens // longest)
        if n_heads:
            most = min(most, ATTENTION_BYTES // (4 * n_heads * longest * longest))
        start = max(first, urgent + 1 - most)
        lasts = np.arange(urgent + 1, min(start + most, len(ordered)) + 1)
        shortest = ordered[lasts - 1]
        lasts = lasts[longest - shortest <= np.maximum(shortest, PADDING_TOKENS)]
        if start >= end or not len(lasts):
            continue
        worth = (n_real[lasts] - n_real[start]) / (overhead + longest * (lasts - start))
        at = int(np.argmax(worth))
        if worth[at] > best:
            best, chosen = float(worth[at]), (start, int(lasts[at]))
    return order[slice(*chosen)].tolist()  # type: ignore[no-any-return]  # numpy's own gap


def _cut_packed(lengths: Lengths, max_tokens: float) -> list[int]:
    chosen, n_tokens = [0], int(lengths[0])
    for index, length in enumerate(lengths[1:].tolist(), 1):
        # A text that is longer than all before it together would delay them more than it gains.
        if length <= max_tokens - n_tokens and length <= max(n_tokens, MIN_BATCH_TOKENS // 2):
            chosen.append(index)
            n_tokens += length
        elif n_tokens >= max_tokens:
            break
    return chosen
