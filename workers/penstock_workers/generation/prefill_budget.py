"""How many prompt tokens are computed between two decode steps."""

from typing import Any, Final

from penstock_workers.generation.running import Running

PAUSE_S: Final = 0.1
"""Running sequences wait this long at each step for newcomers' prompts, or as long as a longer step takes."""
_FIRST_TOKENS, _MOST_TOKENS, _GRAIN = 256, 8192, 64


class PrefillBudget:
    """As many tokens as running sequences can wait for, by the speed of earlier prefills.

    Attributes:
        step_s: duration of the last decode step, seconds.
    """

    def __init__(self, running: Running[Any]) -> None:
        self.step_s = 0.0
        self._running = running
        self._tokens_per_s: float | None = None

    @property
    def n_tokens(self) -> int:
        """Most prompt tokens of the next forward pass."""
        if self._tokens_per_s is None:
            return _FIRST_TOKENS
        # When nobody decodes there is only the next newcomer to think of.
        pause_s = max(PAUSE_S, self.step_s) if self._running.decoding else 4 * PAUSE_S
        n = int(self._tokens_per_s * pause_s) // _GRAIN * _GRAIN
        return max(_GRAIN, min(n, _MOST_TOKENS))

    def measure(self, n_tokens: int, seconds: float) -> None:
        """Learn from a prefill how long tokens take."""
        if n_tokens < 2 * _GRAIN:  # tells what a forward pass costs, not what a token does
            return
        speed, previous = n_tokens / max(seconds, 1e-9), self._tokens_per_s
        self._tokens_per_s = speed if previous is None else 0.8 * previous + 0.2 * speed
