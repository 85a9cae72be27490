"""How many rows and columns a KV cache has, and uses: the arithmetic of its memory, without tensors."""

from dataclasses import dataclass

_SPARE_COLUMNS = 64


@dataclass(slots=True)
class Grid:
    """Which part of every layer's tensors is in use: rows up to `n_rows`, columns from `start` to `end`.

    Attributes:
        n_rows: rows in use, from the first one on.
        start: first column in use.
        end: column behind the last one in use.
        allocated_rows: rows that the tensors have.
        allocated_columns: columns that the tensors have.
    """

    n_rows: int = 0
    start: int = 0
    end: int = 0
    allocated_rows: int = 0
    allocated_columns: int = 0

    @property
    def width(self) -> int:
        """Number of columns in use: tokens of the longest row."""
        return self.end - self.start

    @property
    def n_slots(self) -> int:
        """Token slots that are allocated."""
        return self.allocated_rows * self.allocated_columns


def with_spare_rows(n_rows: int) -> int:
    """Return how many rows to allocate for `n_rows`, so that not every newcomer moves all."""
    return n_rows + n_rows // 4


def with_spare_columns(width: int) -> int:
    """Return how many columns to allocate for `width`, so that not every step moves all."""
    return width + width // 8 + _SPARE_COLUMNS


def most_slots(n_rows: int, width: int) -> int:
    """Return how many token slots a cache that has grown to this shape allocates at most."""
    return with_spare_rows(n_rows) * with_spare_columns(width)
