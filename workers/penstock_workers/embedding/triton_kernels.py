"""Kernels in Triton for a GPU: what lies between an encoder's products, each number read and written once.

Products are computed by the vendor's kernels. Torch would use several kernels for each of ours, and its
attention reads rows in tiles of 128, of which a short text fills little.
"""

from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from penstock_workers.embedding.row import TILE

HEAD_SIZES: Final = (16, 32, 64, 128)
LOG2_E: Final = 1.4426950408889634


def embed(
    places: tuple[Tensor, Tensor, Tensor],
    tables: tuple[Tensor, Tensor, Tensor],
    norm: nn.LayerNorm,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Sum three embeddings of each token, and normalise.

    Args:
        places: Row of each token in each of the tables, int64, shape (n_tokens,) each; not checked.
        tables: Embeddings of words, positions and types; float32, shape (n_rows, dim) each.
        norm: The norm of the sum.
        dtype: Format of the rounded result.

    Returns:
        The result in float32, and the same rounded, shape (n_tokens, dim) each.
    """
    n_tokens, dim = len(places[0]), tables[0].shape[1]
    found = torch.empty(n_tokens, dim, dtype=torch.float32, device=tables[0].device)
    rounded = torch.empty_like(found, dtype=dtype)
    _embed[(n_tokens,)](
        *places, *tables, norm.weight, norm.bias, found, rounded, norm.eps, **_row_options(dim)
    )
    return found, rounded


def add_norm(states: Tensor, update: Tensor, norm: nn.LayerNorm) -> Tensor:
    """Add to hidden states and normalise, in place.

    Args:
        states: Hidden states, float32, shape (n_tokens, dim), contiguous; overwritten.
        update: Their update, 16 bits, shape (n_tokens, dim), contiguous.
        norm: The norm of the sum.

    Returns:
        The new states in the dtype of `update`, shape (n_tokens, dim).
    """
    n_tokens, dim = states.shape
    rounded = torch.empty_like(update)
    _add_norm[(n_tokens,)](states, update, norm.weight, norm.bias, rounded, norm.eps, **_row_options(dim))
    return rounded


def attend(heads: Tensor, tiles: Tensor, scale: float) -> Tensor:
    """Compute attention in which each text of a row sees itself alone.

    Args:
        heads: Queries, keys and values, 16 bits each, shape (n_tokens, 3, n_heads, size), contiguous;
            size is one of `HEAD_SIZES`.
        tiles: See `RowLayout.tiles`.
        scale: Factor for the scores.

    Returns:
        Dtype of `heads`, shape (n_tokens, n_heads * size).

    Source: Dao et al. 2022, arXiv:2205.14135, algorithm 1, without dropout.
    """
    n_tokens, _, n_heads, size = heads.shape
    found = torch.empty(n_tokens, n_heads * size, dtype=heads.dtype, device=heads.device)
    _attend[(len(tiles), n_heads)](
        heads, tiles, found, scale * LOG2_E, dim=n_heads * size, size=size, tile=TILE, num_warps=4
    )
    return found


def _row_options(dim: int) -> dict[str, Any]:
    block = triton.next_power_of_2(dim)
    return {"dim": dim, "block": block, "num_warps": 4 if block <= 1024 else 8}


@triton.jit
def _norm_row(row, columns, weight, bias, eps, dim: tl.constexpr):
    mask = columns < dim
    row = tl.where(mask, row - tl.sum(row, 0) / dim, 0.0)
    row *= tl.rsqrt(tl.sum(row * row, 0) / dim + eps)
    row *= tl.load(weight + columns, mask=mask, other=0.0)
    return row + tl.load(bias + columns, mask=mask, other=0.0)


@triton.jit
def _embed(
    words,
    positions,
    types,
    word_table,
    position_table,
    type_table,
    weight,
    bias,
    found,
    rounded,
    eps,
    dim: tl.constexpr,
    block: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    mask = columns < dim
    row = tl.load(word_table + tl.load(words + token) * dim + columns, mask=mask, other=0.0)
    row += tl.load(position_table + tl.load(positions + token) * dim + columns, mask=mask, other=0.0)
    row += tl.load(type_table + tl.load(types + token) * dim + columns, mask=mask, other=0.0)
    row = _norm_row(row, columns, weight, bias, eps, dim)
    tl.store(found + token * dim + columns, row, mask=mask)
    tl.store(rounded + token * dim + columns, row.to(rounded.dtype.element_ty), mask=mask)


@triton.jit
def _add_norm(states, update, weight, bias, rounded, eps, dim: tl.constexpr, block: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    mask = columns < dim
    row = tl.load(states + token * dim + columns, mask=mask, other=0.0)
    row += tl.load(update + token * dim + columns, mask=mask, other=0.0).to(tl.float32)
    row = _norm_row(row, columns, weight, bias, eps, dim)
    tl.store(states + token * dim + columns, row, mask=mask)
    tl.store(rounded + token * dim + columns, row.to(rounded.dtype.element_ty), mask=mask)


@triton.jit
def _attend(heads, tiles, found, scale, dim: tl.constexpr, size: tl.constexpr, tile: tl.constexpr):
    tiles += 3 * tl.program_id(0)
    start, stop, first = tl.load(tiles), tl.load(tiles + 1), tl.load(tiles + 2)
    heads += tl.program_id(1) * size
    columns = tl.arange(0, size)[None, :]
    rows = (first + tl.arange(0, tile)).to(tl.int64)[:, None]
    query = tl.load(heads + rows * (3 * dim) + columns, mask=rows < stop, other=0.0)
    most = tl.full([tile], float("-inf"), tl.float32)
    total = tl.zeros([tile], tl.float32)
    summed = tl.zeros([tile, size], tl.float32)
    for begin in range(start, stop, tile):
        keys = begin + tl.arange(0, tile)
        places = keys.to(tl.int64)[:, None] * (3 * dim) + columns
        key = tl.load(heads + dim + places, mask=keys[:, None] < stop, other=0.0)
        value = tl.load(heads + 2 * dim + places, mask=keys[:, None] < stop, other=0.0)
        scores = tl.dot(query, tl.trans(key)) * scale
        scores = tl.where(keys[None, :] < stop, scores, float("-inf"))
        highest = tl.maximum(most, tl.max(scores, 1))
        weights = tl.exp2(scores - highest[:, None])
        shrink = tl.exp2(most - highest)
        total = total * shrink + tl.sum(weights, 1)
        summed = tl.dot(weights.to(value.dtype), value, summed * shrink[:, None])
        most = highest
    found += tl.program_id(1) * size
    answer = (summed / total[:, None]).to(found.dtype.element_ty)
    tl.store(found + rows * dim + columns, answer, mask=rows < stop)
