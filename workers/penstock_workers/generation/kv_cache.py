"""Keys and values of rows that join and leave a running batch.

All rows end at the same column and differ in where they begin: what lies before a short row is masked, as
left padding is. So a step writes one column for all rows, positions and windows count back from the same
edge, and every attention that understands left padding understands this.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self, cast

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

_SPARE_COLUMNS = 64

Layer = CacheLayerMixin | LinearAttentionCacheLayerMixin | DummyLayer


@dataclass(slots=True)
class Grid:
    """Which part of every layer's tensors is in use: rows up to `n_rows`, columns from `start` to `end`.

    Attributes:
        n_places: rows that the tensors have.
        n_columns: columns that they have.
    """

    n_rows: int = 0
    start: int = 0
    end: int = 0
    n_places: int = 0
    n_columns: int = 0

    @property
    def width(self) -> int:
        """Columns in use: tokens of the longest row."""
        return self.end - self.start


class _Keys(CacheLayerMixin):  # type: ignore[no-untyped-call]  # transformers' caches are half annotated
    """Keys and values of one attention layer, each (n_places, heads, n_columns, dim).

    A layer with a sliding window keeps all columns too: the mask hides what is outside, and a longer
    row's window would else have cut off the columns that a shorter one still sees.
    """

    is_sliding = False

    def __init__(self, grid: Grid) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # not annotated
        self._grid = grid

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take shapes and number format from a first forward pass."""
        # Zeros: what a mask hides is multiplied by 0, and 0 times a NaN in fresh memory is NaN.
        self.keys, self.values = (
            t.new_zeros(self._grid.n_places, t.shape[1], self._grid.n_columns, t.shape[3])
            for t in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write new columns behind the edge; return those in use with them, (n_rows, heads, width, dim)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        grid, end = self._grid, self._grid.end + key_states.shape[2]
        keys, values = cast(Tensor, self.keys)[: grid.n_rows], cast(Tensor, self.values)[: grid.n_rows]
        keys[:, :, grid.end : end] = key_states
        values[:, :, grid.end : end] = value_states
        return keys[:, :, grid.start : end], values[:, :, grid.start : end]

    def get_seq_length(self) -> int:
        """Return how many columns were in use before this forward pass."""
        return self._grid.width

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return length and offset of what `update` is going to return."""
        return self._grid.width + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: it grows."""
        return -1


class Part(NamedTuple):
    """The first tokens of a row.

    Attributes:
        cache: where it is.
        row: its place there.
        start: its first column there.
        n_tokens: how many are meant.
    """

    cache: "RowCache"
    row: int
    start: int
    n_tokens: int


class RowCache(Cache):
    """A cache of transformers' whose rows come and go.

    Raises:
        TypeError: a layer keeps something that cannot be joined; says what.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        self.grid = Grid()
        super().__init__(layers=[self._own(layer) for layer in DynamicCache(config=config).layers])

    def _own(self, layer: Layer) -> Layer:
        if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
            return _Keys(self.grid)
        # A recurrent state has no columns: rows of it are simply put one below the other.
        if type(layer) in (LinearAttentionLayer, DummyLayer):
            return layer
        raise TypeError(f"rows of a {type(layer).__name__} cannot be joined")

    @property
    def bytes_per_token(self) -> int:
        """What one column of one row takes in all layers, bytes; 0 where only states are kept."""
        return sum(t.shape[1] * t.shape[3] * t.itemsize for _, t in self._tensors())

    @property
    def n_bytes(self) -> int:
        """What is allocated for keys and values, bytes."""
        return sum(t.nbytes for _, t in self._tensors())

    @property
    def n_cells(self) -> int:
        """What is allocated, in tokens."""
        return self.grid.n_places * self.grid.n_columns

    @staticmethod
    def cells(n_rows: int, width: int) -> int:
        """Return what a cache that has grown to this shape allocates at most, in tokens."""
        return (n_rows + n_rows // 4) * (width + width // 8 + _SPARE_COLUMNS)

    def open(self, n_rows: int, n_new: int) -> None:
        """Make room for `n_new` more columns; `n_rows` are the rows of a cache that has none yet."""
        if not self.grid.n_rows:
            self.grid.n_rows = n_rows
            self._lay_out(n_rows, n_new)
        elif self.grid.end + n_new > self.grid.n_columns:
            self._lay_out(self.grid.n_rows, self.grid.width + n_new + self.grid.width // 8 + _SPARE_COLUMNS)

    def advance(self, n_new: int) -> None:
        """Count the columns that a forward pass wrote: one that failed can so be repeated."""
        self.grid.end += n_new

    def begin(self, parts: Sequence[Part | None], n_new: int) -> None:
        """Begin with copies of the first tokens of rows elsewhere, None for a row without.

        Takes room for `n_new` more columns. Columns alone: a cache with recurrent states has no such parts.
        """
        width = max(part.n_tokens for part in parts if part)
        self.grid.n_rows = self.grid.n_places = len(parts)
        self.grid.end, self.grid.n_columns = width, width + n_new
        for layer, *theirs in zip(self.layers, *(part.cache.layers for part in parts if part), strict=True):
            if not (isinstance(layer, _Keys) and cast(_Keys, theirs[0]).is_initialized):
                continue
            for name in ("keys", "values"):
                tensors = iter([getattr(their, name) for their in theirs])
                like = getattr(theirs[0], name)
                fresh = like.new_zeros(len(parts), like.shape[1], width + n_new, like.shape[3])
                for row, part in enumerate(parts):
                    if part:
                        columns = slice(part.start, part.start + part.n_tokens)
                        fresh[row, :, width - part.n_tokens : width] = next(tensors)[part.row, :, columns]
                setattr(layer, name, fresh)
            layer.is_initialized = True

    def spread(self, order: Sequence[int]) -> None:
        """Put the rows of `order` at its places; a row may be at several."""
        for layer, name, tensor in list(self._attributes()):
            setattr(layer, name, tensor[list(order)])
        self._pick_states(order)
        self.grid.n_rows = self.grid.n_places = len(order)

    def join(self, other: Self) -> None:
        """Put the other cache's rows behind ours; the other one is not to be used again."""
        grid, n_ours, n_theirs = self.grid, self.grid.n_rows, other.grid.n_rows
        width = max(grid.width, other.grid.width)
        if n_ours + n_theirs > grid.n_places or width > grid.end:
            self._lay_out_spaciously(n_ours + n_theirs, width)
        start, rows = grid.end - width, slice(n_ours, n_ours + n_theirs)
        for (_, tensor), (_, new) in zip(self._tensors(), other._tensors(), strict=True):
            tensor[:n_ours, :, start : grid.start] = 0  # whatever was there once, it may have been NaN
            tensor[rows, :, start : grid.end - other.grid.width] = 0
            tensor[rows, :, grid.end - other.grid.width : grid.end] = new[
                :n_theirs, :, other.grid.start : other.grid.end
            ]
        for ours, theirs in zip(self._states(), other._states(), strict=True):
            for index, state in ours.items():
                more = theirs[index]
                ours[index] = None if state is None or more is None else torch.cat([state, more])
        grid.n_rows, grid.start = n_ours + n_theirs, start

    def move(self, order: Sequence[int], width: int) -> None:
        """Keep the rows of `order` at its places, and the last `width` columns."""
        used = slice(self.grid.start, self.grid.end)
        for _, tensor in self._tensors():
            for place, row in enumerate(order):
                if place != row:
                    tensor[place, :, used] = tensor[row, :, used]
        self._pick_states(order)
        self.grid.n_rows, self.grid.start = len(order), self.grid.end - width
        if 2 * self.cells(len(order), width) < self.n_cells:
            self._lay_out_spaciously(len(order), width)

    def _pick_states(self, order: Sequence[int]) -> None:
        for states in self._states():
            for index, state in states.items():
                states[index] = None if state is None else state[list(order)]

    def _lay_out_spaciously(self, n_rows: int, width: int) -> None:
        self._lay_out(n_rows + n_rows // 4, width + width // 8 + _SPARE_COLUMNS, width=width)

    def _lay_out(self, n_places: int, n_columns: int, *, width: int | None = None) -> None:
        """Give every layer new tensors, with what is in use as the last of `width` columns from 0 on."""
        grid, width = self.grid, self.grid.width if width is None else width
        target = slice(width - grid.width, width)
        n_rows = min(grid.n_rows, grid.n_places)
        for layer, name, tensor in list(self._attributes()):
            fresh = tensor.new_zeros(n_places, tensor.shape[1], n_columns, tensor.shape[3])
            fresh[:n_rows, :, target] = tensor[:n_rows, :, grid.start : grid.end]
            setattr(layer, name, fresh)
        grid.start, grid.end, grid.n_places, grid.n_columns = target.start, width, n_places, n_columns

    def _attributes(self) -> Iterator[tuple[_Keys, str, Tensor]]:
        for layer in self.layers:
            if isinstance(layer, _Keys) and layer.is_initialized:
                yield layer, "keys", cast(Tensor, layer.keys)
                yield layer, "values", cast(Tensor, layer.values)

    def _tensors(self) -> Iterator[tuple[_Keys, Tensor]]:
        return ((layer, tensor) for layer, _, tensor in self._attributes())

    def _states(self) -> Iterator[dict[int, Tensor | None]]:
        for layer in self.layers:
            if isinstance(layer, LinearAttentionLayer):
                yield layer.conv_states
                yield layer.recurrent_states


def order_without(n_rows: int, gone: Collection[int]) -> list[int]:
    """Return which row is where after some left: the last ones take their places, few have to move."""
    order = list(range(n_rows))
    for place in sorted(gone, reverse=True):
        last = order.pop()
        if place < len(order):
            order[place] = last
    return order
