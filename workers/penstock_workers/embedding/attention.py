"""Attention over texts laid end to end, each of which sees itself alone.

Known to transformers as `PACKED`; a call outside of `packed(...)` is an ordinary one.
"""

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  its usual name
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from penstock_workers.embedding.c_kernels import find_kernels
from penstock_workers.embedding.row import RowLayout

PACKED: Final = "penstock_packed"

_layout: ContextVar[RowLayout | None] = ContextVar("layout", default=None)


@contextmanager
def packed(layout: RowLayout) -> Iterator[RowLayout]:
    """Let attention in this thread see texts that lie in a row like this."""
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
    """Compute attention, as transformers calls it.

    Args:
        module: The layer.
        query: Shape (batch, n_heads, n_tokens, dim); a packed row is a batch of one.
        key: Like `query`, perhaps with fewer heads.
        value: Like `key`. Its dtype decides: products in bfloat16 meet rotations in float32.
        attention_mask: None for a packed row.
        options: Further options of the layer: `scaling`, `is_causal`, `sliding_window`, ...

    Returns:
        Dtype of `value`, shape (batch, n_tokens, n_heads, dim).

    Raises:
        NotImplementedError: The layer wants something that texts in a row cannot have.
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
    kernels = find_kernels(value.device, value.dtype)
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
    return _in_rectangles(query, key, value, layout, window, is_causal, scale)[None], None


def _in_rectangles(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: RowLayout,
    window: int | None,
    is_causal: bool,
    scale: float,
) -> Tensor:
    """Compute attention rectangle by rectangle, by torch.

    Returns:
        Dtype of `value`, shape (n_tokens, n_heads, dim).
    """
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
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: RowLayout,
    window: int | None,
    is_causal: bool,
    scale: float,
) -> Tensor:
    """Compute attention by CUDA's kernels for texts of different lengths.

    Returns:
        Dtype of `value`, shape (n_tokens, n_heads, dim).
    """
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
    """Return torch's attention over texts in a row, and the options for keys with fewer heads."""
    from torch.nn.attention.varlen import varlen_attn  # not before it is needed: it compiles

    # torch 2.11 takes fewer heads without the option, and does not know it
    has_option = "enable_gqa" in inspect.signature(varlen_attn).parameters
    return varlen_attn, {"enable_gqa": True} if has_option else {}


def _softmax(
    query: Tensor, key: Tensor, value: Tensor, real: Tensor | None, mask: Tensor | None, scale: float
) -> Tensor:
    """Compute attention in a rectangle.

    Args:
        query: Shape (n_texts, length, n_heads, dim).
        key: Like `query`, perhaps with fewer heads.
        value: Like `key`.
        real: See `Rectangle.real`.
        mask: See `RowLayout.mask`.
        scale: Factor for the scores.

    Returns:
        Dtype of `value`, shape (n_texts, length, n_heads, dim).
    """
    if real is not None:
        # Padding sees itself: a query that sees nothing would give NaN.
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
    """Compute attention in a rectangle on a CPU with bfloat16: like `_softmax`, 2 to 4 times as fast.

    Torch's softmax of bfloat16 is slow where a length is no multiple of 32. This one does not subtract the
    maximum: exponentials of bfloat16 have the range of float32, and `RowLayout.is_safe` tells where that was
    not enough. The product with the values also gives the sums, from one more column of ones. That column
    and the values are 0 for padding, so padding needs no mask.

    Returns:
        What `_softmax` returns, and the sums, shape (n_texts, n_heads, length, 1); both bfloat16.
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
