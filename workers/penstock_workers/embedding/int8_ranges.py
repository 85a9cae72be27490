"""Ranges of a model's dimensions, in which its vectors become int8: read, or chosen by a probe."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

_UNIT_TOLERANCE: Final = 2e-3
"""How far from 1 the length of a vector may be that a float16 model normalised."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8Ranges:
    """Ranges of one model, and which of its vectors they fit.

    Attributes:
        values: Lowest and highest value of each dimension, float32, shape (2, dim); or (2, 1) for all alike.
        fit_any_length: True if they fit the vectors as the model gives them; False if those of unit length
            alone.
    """

    values: Floats
    fit_any_length: bool

    @classmethod
    def decide(cls, probe: Floats, path: Path | None, dim: int) -> Self:
        """Return the ranges that the settings name, or else those of the probe.

        Args:
            probe: Vectors of the model, float32, shape (n_texts, dim).
            path: See `ModelSettings.int8_ranges`.
            dim: Width that the model announces.

        Raises:
            ValueError: See `read_ranges`.
            OSError: See `read_ranges`.
        """
        if path is not None:
            return cls(values=read_ranges(path, dim), fit_any_length=True)
        return cls(values=choose_ranges(probe), fit_any_length=are_unit(probe))


def read_ranges(path: Path, dim: int) -> Floats:
    """Read `int8_ranges` of a model's settings; float32, shape (2, dim).

    Raises:
        ValueError: not such an array, not finite, or a lowest value above the highest.
        OSError: the file cannot be read.
    """
    ranges = np.load(path, allow_pickle=False)
    if ranges.shape != (2, dim) or not np.issubdtype(ranges.dtype, np.floating):
        raise ValueError(
            f"an array of floats of shape (2, {dim}) is wanted, not {ranges.dtype}{ranges.shape}"
        )
    if not (np.isfinite(ranges).all() and (ranges[0] <= ranges[1]).all()):
        raise ValueError("finite lowest values in the first row, highest in the second are wanted")
    return np.asarray(ranges, dtype=np.float32)


def choose_ranges(probe: Floats) -> Floats:
    """Return a range for a model whose settings name none; float32, shape (2, 1).

    Symmetric, for vectors of unit length: the power of two at or above what the probe reaches. Coarse, so
    that the rounding of one machine or another does not change it.

    Args:
        probe: Vectors of the model, float32, shape (n_texts, dim).
    """
    highest = np.abs(probe / np.linalg.norm(probe, axis=1, keepdims=True)).max()
    limit = 2.0 ** np.ceil(np.log2(highest))
    return np.array([[-limit], [limit]], dtype=np.float32)


def are_unit(vectors: Floats) -> bool:
    """Tell whether all vectors, shape (n_texts, dim), have length 1."""
    return bool(np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=_UNIT_TOLERANCE))
