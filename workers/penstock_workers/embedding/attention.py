"""Attention over texts laid end to end, each of which sees itself alone.

Known to transformers as `PACKED`; a call outside of `packed(...)` is an ordinary one.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate
from typing import Any, Final, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  its usual name
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from penstock_workers.embedding.c_kernels import find_kernels
from penstock_workers.hardware.copies import upload

PACKED: Final = "penstock_packed"
WASTE_SCORES: Final = 6144
"""Scores per head that padding may add to a rectangle: about what one more rectangle costs on a processor."""
CARD_WASTE_SCORES: Final = 1 << 20
"""The same on a card: there a rectangle costs the launches of a dozen kernels, and scores next to nothing."""
TILE: Final = 64
"""Queries of a text that a card computes at once: half of them are short."""
SAFE_SUMS: Final = 1e-30, 1e35
"""Sums of exponentials between these lost nothing to under- or overflow of bfloat16 (1e-38 to 3e38).

In all-MiniLM-L6-v2 they reach 1e33: one head of one layer sees rows of digits with scores up to 76.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rectangle:
    """Neighbouring texts of nearly one length, computed as (n_texts, length).

    Attributes:
        start: first token of the first text.
        stop: one past the last token of the last text.
        n_texts: how many.
        length: of the longest, tokens.
        rows: for each place its token in the row, padding repeats the text's last token; int64, shape
            (n_texts * length,). None where nothing is padded.
        real: 1 for a token, 0 for padding; bool, shape (n_texts, length). None where nothing is padded.
        places: of the real tokens; int64, shape (stop - start,). None where nothing is padded.
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
        """Return the rectangle of texts of these lengths."""
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
        """Cut a row of shape (n_tokens, ...) to (n_texts, length, ...)."""
        chosen = row[self.start : self.stop] if self.rows is None else row.index_select(0, self.rows)
        return chosen.view(self.n_texts, self.length, *row.shape[1:])

    def unpad(self, padded: Tensor) -> Tensor:
        """Undo `pad`: shape (stop - start, ...)."""
        flat = padded.flatten(0, 1)
        return flat if self.places is None else flat.index_select(0, self.places)


class Layout:
    """Where each text lies in the row.

    Attributes:
        lengths: of the texts in their order, tokens.
        n_tokens: their sum.
        longest: the most of them.
        is_exact: softmax in float32 throughout, where the quick way may over- or underflow.
        n_calls: how often attention has asked for it.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device, *, is_exact: bool = False) -> None:
        self.lengths, self.device, self.is_exact = list(lengths), device, is_exact
        self.n_tokens, self.longest, self.n_calls = sum(lengths), max(lengths), 0
        self._sums: list[Tensor] = []
        self._masks: dict[tuple[int, int | None, bool], Tensor] = {}

    @cached_property
    def rectangles(self) -> list[Rectangle]:
        """The texts in groups whose attention is computed with little padding."""
        waste = WASTE_SCORES if self.device.type == "cpu" else CARD_WASTE_SCORES
        return self._group(2, waste)

    @cached_property
    def pooled(self) -> list[Rectangle]:
        """The texts in groups for what comes after the transformer; on a card few, however much is padded."""
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

        Of each the first token of its text, one past the text's last, and the first query.
        """
        lengths = torch.tensor(self.lengths, dtype=torch.int32)
        n_tiles = (lengths + TILE - 1) // TILE
        stops = lengths.cumsum(0, dtype=torch.int32).repeat_interleave(n_tiles)
        starts = stops - lengths.repeat_interleave(n_tiles)
        before = (n_tiles.cumsum(0) - n_tiles).repeat_interleave(n_tiles)
        number = torch.arange(len(before)) - before
        return upload(torch.stack([starts, stops, starts + TILE * number.int()], 1), self.device)

    def mask(self, length: int, window: int | None, is_causal: bool) -> Tensor | None:
        """Return who sees whom; bool, shape (length, length), or None for all."""
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
        """Remember sums of exponentials, to be looked at once after the forward pass."""
        self._sums.append(sums.flatten())

    def is_safe(self) -> bool:
        """Whether no sum of exponentials lost anything."""
        if not self._sums:
            return True
        least, most = torch.cat(self._sums).aminmax()
        return bool(least > SAFE_SUMS[0]) and bool(most < SAFE_SUMS[1])  # not a number is neither


def group_lengths(lengths: Sequence[int], power: int, waste: int) -> list[list[int]]:
    """Group neighbouring lengths; fewest groups where neighbours are of similar length.

    Args:
        lengths: of texts in a row.
        power: 1 where a text costs its length, 2 where it costs the square.
        waste: what padding to the longest may cost in a group.
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


_layout: ContextVar[Layout | None] = ContextVar("layout", default=None)


@contextmanager
def packed(layout: Layout) -> Iterator[Layout]:
    """Let attention in this thread see texts laid out like this."""
    token = _layout.set(layout)
    try:
        yield layout
    finally:
        _layout.reset(token)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it.

    Args:
        module: the layer.
        query: shape (batch, n_heads, n_tokens, dim); a packed row is a batch of one.
        key: as `query`, perhaps with fewer heads.
        value: as `key`. Its dtype decides: products in bfloat16 meet rotations in float32.
        attention_mask: None for a packed row.
        options: what the layer adds: `scaling`, `is_causal`, `sliding_window`, ...

    Returns:
        Dtype of `value`, shape (batch, n_tokens, n_heads, dim).

    Raises:
        NotImplementedError: the layer wants what texts in a row cannot have.
    """
    query, key = query.to(value.dtype), key.to(value.dtype)
    layout = _layout.get()
    if layout is None:
        found, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return found, None
    if any(options.get(name) is not None for name in ("softcap", "s_aux", "position_bias")):
        raise NotImplementedError("softcap, sinks or a position bias")
    if (query.shape[0], query.shape[2], key.shape[2]) != (1, layout.n_tokens, layout.n_tokens):
        raise NotImplementedError("attention to other than the row itself")
    layout.n_calls += 1
    is_causal = options.get("is_causal")
    is_causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    window, scale = options.get("sliding_window"), options.get("scaling") or query.shape[-1] ** -0.5
    query, key, value = (
        states[0].transpose(0, 1) for states in (query, key, value)
    )  # (n_tokens, n_heads, dim)
    if value.is_cuda and value.dtype != torch.float32:
        return _flash(query, key, value, layout, window, is_causal, scale)[None], None
    kernels = find_kernels(value.device) if value.dtype == torch.bfloat16 else None
    if kernels is not None:
        computed = kernels.attend(
            query,
            key,
            value,
            layout.ends,
            longest=layout.longest,
            scale=scale,
            window=window,
            is_causal=is_causal,
        )
        if computed is not None:
            return computed[None], None
    is_quick = value.dtype == torch.bfloat16 and value.device.type == "cpu" and not layout.is_exact
    parts = []
    for part in layout.rectangles:
        mask = layout.mask(part.length, window, is_causal)
        states = part.pad(query), part.pad(key), part.pad(value)
        if is_quick:
            found, sums = _exponentials(*states, part.real, mask, scale)
            layout.note_sums(sums)
        else:
            found = _softmax(*states, part.real, mask, scale)
        parts.append(part.unpad(found))
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[None], None


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    window: int | None,
    is_causal: bool,
    scale: float,
) -> Tensor:
    varlen_attn, grouped = _find_flash()
    reach = -1 if window is None else window - 1
    found: Tensor = varlen_attn(
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        layout.ends,
        layout.ends,
        layout.longest,
        layout.longest,
        scale=scale,
        window_size=(reach, 0 if is_causal else reach),
        **(grouped if query.shape[1] != key.shape[1] else {}),
    )
    return found


@cache
def _find_flash() -> tuple[Callable[..., Any], dict[str, bool]]:
    """Return torch's attention over texts in a row, and what it wants to be told of fewer heads of keys."""
    from torch.nn.attention.varlen import varlen_attn  # not before it is needed: it compiles

    # torch 2.11 takes them untold, and does not know the word
    is_told = "enable_gqa" in inspect.signature(varlen_attn).parameters
    return varlen_attn, {"enable_gqa": True} if is_told else {}


def _softmax(
    query: Tensor, key: Tensor, value: Tensor, real: Tensor | None, mask: Tensor | None, scale: float
) -> Tensor:
    """Attention in a rectangle.

    Args:
        query: shape (n_texts, length, n_heads, dim).
        key: as `query`, perhaps with fewer heads.
        value: as `key`.
        real: see `Rectangle.real`.
        mask: see `Layout.mask`.
        scale: of the scores.

    Returns:
        Dtype of `value`, shape (n_texts, length, n_heads, dim).
    """
    if real is not None:
        # Padding sees itself: what sees nothing is not a number.
        keys = real[:, None, None, :] | torch.eye(real.shape[1], dtype=torch.bool, device=real.device)
        mask = keys if mask is None else mask & keys
    found = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=mask,
        scale=scale,
        enable_gqa=query.shape[2] != key.shape[2],
    )
    return found.transpose(1, 2)


def _exponentials(
    query: Tensor, key: Tensor, value: Tensor, real: Tensor | None, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention in a rectangle on a processor with bfloat16; as `_softmax`, 2 to 4 times as fast.

    Torch's softmax of bfloat16 is slow where a length is no multiple of 32. This one takes no maximum away:
    exponentials of bfloat16 have the range of float32, and `Layout.is_safe` tells where that was not enough.
    Their sum comes out of the product with the values, as one more column of ones; it is 0 for padding, as
    are the values, so that padding needs no mask.

    Returns:
        What `_softmax` does, and the sums, shape (n_texts, n_heads, length, 1); both bfloat16.
    """
    n_texts, length, n_heads, dim = query.shape
    if key.shape[2] != n_heads:
        key, value = (states.repeat_interleave(n_heads // states.shape[2], 2) for states in (key, value))
    query, key = (states.transpose(1, 2).reshape(-1, length, dim) for states in (query, key))
    values = F.pad(value.transpose(1, 2), (0, 1), value=1.0)  # (n_texts, n_heads, length, dim + 1)
    if real is not None:
        values *= real[:, None, :, None]
    unused = query.new_empty(1, 1, 1)
    scores = torch.baddbmm(unused, query, key.transpose(1, 2), beta=0, alpha=scale * math.log2(math.e))
    scores.exp2_()
    if mask is not None:
        scores *= mask
    found = torch.bmm(scores, values.view(-1, length, values.shape[-1])).view(values.shape)
    sums = found[..., -1:]
    if mask is not None and real is not None:
        sums.masked_fill_(~real[:, None, :, None], 1.0)  # padding may see no token at all
    out = value.new_empty(n_texts, length, n_heads, value.shape[-1])
    torch.div(found[..., :-1], sums, out=out.transpose(1, 2))
    return out, sums


def _no_mask(*args: Any, **options: Any) -> Tensor | None:
    return sdpa_mask(*args, **options) if _layout.get() is None else None


AttentionInterface.register(PACKED, _attend)
AttentionMaskInterface.register(PACKED, _no_mask)
