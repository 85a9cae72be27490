"""The forms in which vectors are returned: cut, of unit length, in fewer bits; always in this order.

Precisions are sentence-transformers' own. Its int8 may take each dimension's range from the batch at hand;
here ranges belong to the model, so that vectors of different jobs can be compared.

Source: `quantize_embeddings` of sentence-transformers 6.2.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from penstock.request import EmbedRequest, Precision
from penstock.result import Vectors

Floats = NDArray[np.float32]

_BITS: Final[dict[Precision, int]] = {"float32": 32, "float16": 16, "int8": 8, "binary": 1, "ubinary": 1}


def row_bytes(dim: int, request: EmbedRequest) -> int:
    """Return what one vector takes in the form that a request asks for, bytes."""
    return ((request.truncate_dim or dim) * _BITS[request.precision] + 7) // 8


def form(vectors: Floats, request: EmbedRequest, int8_ranges: Floats | None = None) -> Vectors:
    """Return a model's vectors in the form that a request asks for.

    Args:
        vectors: Vectors as the model gives them, float32, shape (n_texts, dim).
        request: Names the form.
        int8_ranges: Lowest and highest value, float32, shape (2, dim), or (2, 1) for all dimensions alike;
            `int8` needs them.

    Returns:
        C-contiguous, dtype of the precision (binary is int8, ubinary uint8), shape (n_texts, dim), or
        (n_texts, dim / 8, rounded up) where eight dimensions share a byte; dim is `truncate_dim` if set.
    """
    found = vectors[:, : request.truncate_dim]
    if request.normalize_embeddings:
        # Source: torch.nn.functional.normalize, which `encode` uses: norms are clamped to 1e-12.
        found = found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)
    if request.precision == "int8":
        assert int8_ranges is not None
        return _to_int8(found, _fit(int8_ranges, vectors.shape[1], request))
    if request.precision in ("binary", "ubinary"):
        packed = np.packbits(found > 0, axis=1)
        # less 128, modulo 256: what a library that knows signed bytes only stores
        return packed if request.precision == "ubinary" else (packed ^ 0x80).view(np.int8)
    return np.ascontiguousarray(found, dtype=request.precision)


def _fit(ranges: Floats, dim: int, request: EmbedRequest) -> Floats:
    """Return the ranges of the dimensions that are left."""
    if ranges.shape[1] > 1:
        return ranges[:, : request.truncate_dim]
    # Fewer dimensions of the same length: each is larger, by this much where all are alike.
    grows = request.normalize_embeddings and request.truncate_dim is not None
    return ranges * np.float32(np.sqrt(dim / (request.truncate_dim or dim)) if grows else 1)


def _to_int8(found: Floats, ranges: Floats) -> NDArray[np.int8]:
    steps = (ranges[1] - ranges[0]) / 255
    levels: Floats = (found - ranges[0]) / np.where(steps == 0, np.float32(1), steps)
    np.floor(levels, out=levels)
    np.clip(levels, 0, 255, out=levels)
    levels -= 128
    return levels.astype(np.int8)
