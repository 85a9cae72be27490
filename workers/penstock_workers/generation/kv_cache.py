"""Keys and values of the rows of a continuous batch.

All rows end at the same column and differ in where they begin: columns before a short row are masked, as left
padding is. So a decode step writes one column for all rows, positions and windows count back from the same
edge, and every attention that understands left padding understands this.
"""

from collections.abc import Collection, Iterator, Sequence
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

from penstock_workers.generation.cache_grid import Grid, most_slots, with_spare_columns, with_spare_rows

Layer = CacheLayerMixin | LinearAttentionCacheLayerMixin | DummyLayer


class _KeysAndValues(CacheLayerMixin):  # type: ignore[no-untyped-call]  # transformers' caches are half annotated
    """Keys and values of one attention layer, each of shape (allocated_rows, heads, allocated_columns, dim).

    A layer with a sliding window keeps all columns too: the mask hides what is outside, and a longer
    row's window would else have cut off the columns that a shorter one still sees.
    """

    is_sliding = False

    def __init__(self, grid: Grid) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # not annotated
        self._grid = grid

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate tensors, shaped and typed like those of a first forward pass."""
        # Zeros: what a mask hides is multiplied by 0, and 0 times a NaN in fresh memory is NaN.
        self.keys, self.values = (
            t.new_zeros(self._grid.allocated_rows, t.shape[1], self._grid.allocated_columns, t.shape[3])
            for t in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write new columns behind the edge.

        Returns:
            Keys and values in use, the new ones included; each of shape (n_rows, heads, width, dim).
        """
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


class RowPrefix(NamedTuple):
    """The first tokens of a row, to be copied.

    Attributes:
        cache: cache that the row is in.
        row: place of the row in that cache.
        start: first column of the row.
        n_tokens: number of tokens to copy.
    """

    cache: "KVCache"
    row: int
    start: int
    n_tokens: int


class KVCache(Cache):
    """A cache for transformers whose rows come and go.

    Raises:
        TypeError: a layer keeps something whose rows cannot be merged; says what.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        self.grid = Grid()
        super().__init__(layers=[self._adapt(layer) for layer in DynamicCache(config=config).layers])

    def _adapt(self, layer: Layer) -> Layer:
        if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
            return _KeysAndValues(self.grid)
        # A recurrent state has no columns: rows of it are simply put one below the other.
        if type(layer) in (LinearAttentionLayer, DummyLayer):
            return layer
        raise TypeError(f"rows of a {type(layer).__name__} cannot be merged")

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one column of one row in all layers; 0 where layers keep states alone."""
        return sum(t.shape[1] * t.shape[3] * t.itemsize for t in self._tensors())

    @property
    def n_bytes(self) -> int:
        """Bytes allocated for keys and values."""
        return sum(t.nbytes for t in self._tensors())

    @property
    def n_slots(self) -> int:
        """Token slots that are allocated."""
        return self.grid.n_slots

    def reserve(self, n_rows: int, n_new: int) -> None:
        """Make room for `n_new` more columns; `n_rows` counts only in a cache that has no rows yet."""
        if not self.grid.n_rows:
            self.grid.n_rows = n_rows
            self._reallocate(n_rows, n_new)
        elif self.grid.end + n_new > self.grid.allocated_columns:
            self._reallocate(self.grid.n_rows, n_new + with_spare_columns(self.grid.width))

    def advance(self, n_new: int) -> None:
        """Count the columns that a forward pass wrote; one that failed can be repeated."""
        self.grid.end += n_new

    def copy_prefixes(self, prefixes: Sequence[RowPrefix | None], n_new: int) -> None:
        """Begin an empty cache with copies of the first tokens of other rows.

        Only columns are copied: a cache with recurrent states takes no prefixes.

        Args:
            prefixes: what each row begins with; None for a row that begins empty.
            n_new: further columns to make room for.
        """
        width = max(prefix.n_tokens for prefix in prefixes if prefix)
        self.grid.n_rows = self.grid.allocated_rows = len(prefixes)
        self.grid.end, self.grid.allocated_columns = width, width + n_new
        caches = [prefix.cache for prefix in prefixes if prefix]
        for layer, *theirs in zip(self.layers, *(cache.layers for cache in caches), strict=True):
            if not (isinstance(layer, _KeysAndValues) and cast(_KeysAndValues, theirs[0]).is_initialized):
                continue
            for name in ("keys", "values"):
                tensors = iter([getattr(their, name) for their in theirs])
                like = getattr(theirs[0], name)
                fresh = like.new_zeros(len(prefixes), like.shape[1], width + n_new, like.shape[3])
                for row, prefix in enumerate(prefixes):
                    if prefix:
                        columns = slice(prefix.start, prefix.start + prefix.n_tokens)
                        fresh[row, :, width - prefix.n_tokens : width] = next(tensors)[prefix.row, :, columns]
                setattr(layer, name, fresh)
            layer.is_initialized = True

    def expand(self, order: Sequence[int]) -> None:
        """Put the rows of `order` at its places; a row may be at several."""
        for layer, name, tensor in list(self._named_tensors()):
            setattr(layer, name, tensor[list(order)])
        self._pick_states(order)
        self.grid.n_rows = self.grid.allocated_rows = len(order)

    def merge(self, other: Self) -> None:
        """Put the other cache's rows behind ours; the other cache is not to be used again."""
        grid, n_ours, n_theirs = self.grid, self.grid.n_rows, other.grid.n_rows
        width = max(grid.width, other.grid.width)
        if n_ours + n_theirs > grid.allocated_rows or width > grid.end:
            self._reallocate_with_spare(n_ours + n_theirs, width)
        start, rows = grid.end - width, slice(n_ours, n_ours + n_theirs)
        for tensor, new in zip(self._tensors(), other._tensors(), strict=True):
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

    def compact(self, order: Sequence[int], width: int) -> None:
        """Keep the rows of `order` at its places, and the last `width` columns."""
        used = slice(self.grid.start, self.grid.end)
        for tensor in self._tensors():
            for place, row in enumerate(order):
                if place != row:
                    tensor[place, :, used] = tensor[row, :, used]
        self._pick_states(order)
        self.grid.n_rows, self.grid.start = len(order), self.grid.end - width
        if 2 * most_slots(len(order), width) < self.n_slots:
            self._reallocate_with_spare(len(order), width)

    def _pick_states(self, order: Sequence[int]) -> None:
        for states in self._states():
            for index, state in states.items():
                states[index] = None if state is None else state[list(order)]

    def _reallocate_with_spare(self, n_rows: int, width: int) -> None:
        self._reallocate(with_spare_rows(n_rows), with_spare_columns(width), width=width)

    def _reallocate(self, allocated_rows: int, allocated_columns: int, *, width: int | None = None) -> None:
        """Give every layer new tensors, with what is in use as the last of `width` columns from 0 on."""
        grid, width = self.grid, self.grid.width if width is None else width
        target = slice(width - grid.width, width)
        n_rows = min(grid.n_rows, grid.allocated_rows)
        for layer, name, tensor in list(self._named_tensors()):
            fresh = tensor.new_zeros(allocated_rows, tensor.shape[1], allocated_columns, tensor.shape[3])
            fresh[:n_rows, :, target] = tensor[:n_rows, :, grid.start : grid.end]
            setattr(layer, name, fresh)
        grid.start, grid.end, grid.allocated_rows, grid.allocated_columns = (
            target.start,
            width,
            allocated_rows,
            allocated_columns,
        )

    def _named_tensors(self) -> Iterator[tuple[_KeysAndValues, str, Tensor]]:
        for layer in self.layers:
            if isinstance(layer, _KeysAndValues) and layer.is_initialized:
                yield layer, "keys", cast(Tensor, layer.keys)
                yield layer, "values", cast(Tensor, layer.values)

    def _tensors(self) -> Iterator[Tensor]:
        return (tensor for _, _, tensor in self._named_tensors())

    def _states(self) -> Iterator[dict[int, Tensor | None]]:
        for layer in self.layers:
            if isinstance(layer, LinearAttentionLayer):
                yield layer.conv_states
                yield layer.recurrent_states


def order_without(n_rows: int, gone: Collection[int]) -> list[int]:
    """Return which row is at which place after some left: the last rows fill the gaps, so few move."""
    order = list(range(n_rows))
    for place in sorted(gone, reverse=True):
        last = order.pop()
        if place < len(order):
            order[place] = last
    return order
