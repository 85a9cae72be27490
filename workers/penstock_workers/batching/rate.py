"""Running means: what was counted of late, each time with less weight than the next."""

from typing import Final

_DECAY: Final = 0.98  # weight of a batch beside the next one
_PULL: Final = 0.05  # towards the ratio, as a share of the sum of squares


class Speed:
    """Time that batches take: a fixed part and a part per token, least squares over recent batches.

    Many single short texts say little about a full batch. If all batches are alike, nothing tells the two
    parts apart; so the slope is drawn towards the plain ratio of seconds and tokens.
    """

    def __init__(self) -> None:
        self._n = self._x = self._y = self._xx = self._xy = 0.0
        self._largest = self._fixed_s = self._token_s = 0.0

    def count(self, n_tokens: int, seconds: float) -> None:
        """Count a batch."""
        x, y = float(n_tokens), max(seconds, 1e-9)
        self._n, self._x, self._y = _DECAY * self._n + 1, _DECAY * self._x + x, _DECAY * self._y + y
        self._xx, self._xy = _DECAY * self._xx + x * x, _DECAY * self._xy + x * y
        self._largest = max(x, _DECAY * self._largest)
        ratio, pull = self._y / max(self._x, 1.0), _PULL * self._xx
        spread, together = self._xx - self._x**2 / self._n, self._xy - self._x * self._y / self._n
        slope = (together + pull * ratio) / max(spread + pull, _PULL)
        self._token_s = min(max(slope, ratio / 10), ratio)  # the fixed part is not below nothing
        self._fixed_s = (self._y - self._token_s * self._x) / self._n

    def seconds(self, n_tokens: float) -> float:
        """Return the time that a batch of `n_tokens` takes; 0 before the first."""
        return self._fixed_s + self._token_s * n_tokens

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens per second in batches as large as recent large ones; None before the first."""
        return self._largest / self.seconds(self._largest) if self._largest else None


class Ratio:
    """A ratio of two running sums, such as tokens per second.

    Args:
        decay: Weight of an observation beside the next one.

    Attributes:
        amount: Running sum of what is measured.
        per: Running sum of what it is measured by.
    """

    def __init__(self, decay: float = _DECAY) -> None:
        self._decay = decay
        self.amount = self.per = 0.0

    def count(self, amount: float, per: float) -> None:
        """Add an observation."""
        self.amount = self._decay * self.amount + amount
        self.per = self._decay * self.per + per

    @property
    def value(self) -> float | None:
        """The ratio; None before the first observation."""
        return self.amount / self.per if self.per else None
