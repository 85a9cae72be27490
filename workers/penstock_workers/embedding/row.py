"""A row of texts laid end to end: where each text lies in it, and how it is cut into rectangles."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Final, Self

import torch
from torch import Tensor

from penstock_workers.hardware.copies import upload

WASTE_SCORES: Final = 6144
"""Scores per head that padding may add to a rectangle: about what one more rectangle costs on a CPU."""
GPU_WASTE_SCORES: Final = 1 << 20
"""The same on a GPU: there a rectangle costs the launches of a dozen kernels, and scores next to nothing."""
TILE: Final = 64
"""Queries of a text that a GPU computes at once: half of them are short."""
SAFE_SUMS: Final = 1e-30, 1e35
"""Sums of exponentials between these lost nothing to under- or overflow of bfloat16 (1e-38 to 3e38).

In all-MiniLM-L6-v2 they reach 1e33: one head of one layer sees rows of digits with scores up to 76.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rectangle:
    """Neighbouring texts of nearly one length, computed as (n_texts, length).

    Attributes:
        start: Index of the first text's first token in the row.
        stop: One past the last text's last token.
        n_texts: Number of texts.
        length: Tokens of the longest text.
        rows: Index in the row of the token at each place of the rectangle; padding repeats the text's last
            token. int64, shape (n_texts * length,); None where nothing is padded.
        real: True for a token, False for padding; bool, shape (n_texts, length); None where nothing is
            padded.
        places: Places of the tokens that are no padding; int64, shape (stop - start,). None where nothing is
            padded.
    """

    start: int
    stop: int
    n_texts: int
    length: int
    rows: Tensor | None = None
    real: Tensor | None = None
    places: Tensor | None = None

    @classmethod
    def around(cls, lengths: Sequence[int], start: int, device: torch.device) -> Self:
        """Return the rectangle of texts that have these lengths and begin at `start`."""
        longest, stop = max(lengths), start + sum(lengths)
        if min(lengths) == longest:
            return cls(start=start, stop=stop, n_texts=len(lengths), length=longest)
        # computed there: the lengths are fewer to copy, and nothing waits for the device
        counts = upload(torch.tensor(lengths), device)
        starts = start + counts.cumsum(0) - counts
        columns = torch.arange(longest, device=device)
        rows = (starts[:, None] + torch.minimum(columns, counts[:, None] - 1)).flatten()
        ahead = torch.arange(0, longest * len(lengths), longest, device=device) - starts
        tokens = torch.arange(start, stop, device=device)
        return cls(
            start=start,
            stop=stop,
            n_texts=len(lengths),
            length=longest,
            rows=rows,
            real=columns < counts[:, None],
            places=tokens + ahead.repeat_interleave(counts, output_size=stop - start),
        )

    def pad(self, row: Tensor) -> Tensor:
        """Cut a row, shape (n_tokens, ...), to shape (n_texts, length, ...)."""
        chosen = row[self.start : self.stop] if self.rows is None else row.index_select(0, self.rows)
        return chosen.view(self.n_texts, self.length, *row.shape[1:])

    def unpad(self, padded: Tensor) -> Tensor:
        """Undo `pad`: shape (n_texts, length, ...) to (stop - start, ...)."""
        flat = padded.flatten(0, 1)
        return flat if self.places is None else flat.index_select(0, self.places)


class RowLayout:
    """Where each text lies in the row.

    Attributes:
        lengths: Tokens of each text, in the order of the row.
        n_tokens: Tokens of the whole row.
        longest: Tokens of the longest text.
        is_exact: Compute softmax in float32 throughout: the quick way may over- or underflow.
        n_calls: Number of times attention has used this layout.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device, *, is_exact: bool = False) -> None:
        self.lengths, self.device, self.is_exact = list(lengths), device, is_exact
        self.n_tokens, self.longest, self.n_calls = sum(lengths), max(lengths), 0
        self._sums: list[Tensor] = []
        self._masks: dict[tuple[int, int | None, bool], Tensor] = {}

    @cached_property
    def rectangles(self) -> list[Rectangle]:
        """The texts in groups whose attention is computed with little padding."""
        waste = WASTE_SCORES if self.device.type == "cpu" else GPU_WASTE_SCORES
        return self._group(2, waste)

    @cached_property
    def pooled(self) -> list[Rectangle]:
        """The texts in groups for what comes after the transformer; on a GPU few, however much is padded."""
        return self.rectangles if self.device.type == "cpu" else self._group(1, self.n_tokens)

    def _group(self, power: int, waste: int) -> list[Rectangle]:
        groups = group_lengths(self.lengths, power, waste)
        starts = accumulate(map(sum, groups), initial=0)
        return [
            Rectangle.around(group, start, self.device) for group, start in zip(groups, starts, strict=False)
        ]

    @cached_property
    def ends(self) -> Tensor:
        """Where texts begin and end; int32, shape (n_texts + 1,)."""
        ends = torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32)
        return upload(ends, self.device)

    @cached_property
    def tiles(self) -> Tensor:
        """Where groups of `TILE` queries lie; int32, shape (n_tiles, 3).

        A tile has three numbers: its text's first token, one past the text's last, and its first query.
        """
        lengths = torch.tensor(self.lengths, dtype=torch.int32)
        n_tiles = (lengths + TILE - 1) // TILE
        stops = lengths.cumsum(0, dtype=torch.int32).repeat_interleave(n_tiles)
        starts = stops - lengths.repeat_interleave(n_tiles)
        before = (n_tiles.cumsum(0) - n_tiles).repeat_interleave(n_tiles)
        number = torch.arange(len(before)) - before
        return upload(torch.stack([starts, stops, starts + TILE * number.int()], 1), self.device)

    def mask(self, length: int, window: int | None, is_causal: bool) -> Tensor | None:
        """Return which query sees which key; bool, shape (length, length), or None where each sees all."""
        if not is_causal and (window is None or length <= window):
            return None
        key = length, window, is_causal
        if key not in self._masks:
            places = torch.arange(length, device=self.device)
            ahead = places[:, None] - places  # query minus key
            seen = ahead >= 0 if is_causal else torch.ones_like(ahead, dtype=torch.bool)
            self._masks[key] = seen if window is None else seen & (ahead.abs() < window)
        return self._masks[key]

    def note_sums(self, sums: Tensor) -> None:
        """Remember sums of exponentials; `is_safe` looks at them once, after the forward pass."""
        self._sums.append(sums.flatten())

    def is_safe(self) -> bool:
        """Tell whether every sum of exponentials kept its precision."""
        if not self._sums:
            return True
        least, most = torch.cat(self._sums).aminmax()
        return bool(least > SAFE_SUMS[0]) and bool(most < SAFE_SUMS[1])  # not a number is neither


def group_lengths(lengths: Sequence[int], power: int, waste: int) -> list[list[int]]:
    """Cut the lengths of neighbouring texts into groups; similar neighbours give few groups.

    Args:
        lengths: Tokens of each text in a row.
        power: 1 where a text costs its length, 2 where it costs the square.
        waste: Cost that padding to the longest may add to a group.
    """
    groups: list[list[int]] = []
    longest = n_real = 0
    for length in lengths:
        longest, n_real = max(longest, length), n_real + length**power
        if not groups or longest**power * (len(groups[-1]) + 1) - n_real > waste:
            groups.append([])
            longest, n_real = length, length**power
        groups[-1].append(length)
    return groups
