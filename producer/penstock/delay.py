"""How long a job will wait: what it costs, and what a queue has before it.

Costs are tokens: of the texts, or of the prompt and the expected answer. Senders estimate them from
characters, by what workers measured; the scripts of `delivery.lua` keep their sums for each queue.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from penstock.leases import Limits
from penstock.registry import ModelInfo, Registry
from penstock.request import EmbedRequest, Request

TOKENS_PER_CHARACTER: Final = 0.25
"""Until a worker has measured it."""
ANSWER_TOKENS: Final = 128
"""Of an answer, until a worker has measured it, unless `max_new_tokens` is less."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """How long a job that is sent now will wait.

    Attributes:
        queue: `<pool>.<model>`, where it would wait.
        predicted_wait_s: seconds until the model gets to it; None if no worker has told its speed.
        jobs: that wait, or that workers hold.
        tokens: of these jobs, as their senders estimated them.
        bytes: of their messages.
        tokens_ahead: of these tokens, those that are computed before the new job.
        tokens_per_s: what the ready workers of the queue do together, as measured.
        workers: that are ready.
    """

    queue: str
    predicted_wait_s: float | None
    jobs: int
    tokens: int
    bytes: int
    tokens_ahead: int
    tokens_per_s: float | None
    workers: int

    def __str__(self) -> str:
        if self.predicted_wait_s is None:
            return f"{self.queue}: unknown, {self.workers} workers have not told their speed"
        return (
            f"{self.queue}: {self.predicted_wait_s:,.2f} s = {self.tokens_ahead:,} tokens before it / "
            f"{self.tokens_per_s or 0:,.0f} tokens/s of {self.workers} workers"
        )


def predict(queue: str, load: list[int], registry: Registry) -> Estimate:
    """Return the estimate for a queue from what the script `load` answered."""
    jobs, tokens, n_bytes, ahead = load
    pool, _, model = queue.partition(".")
    speed = registry.tokens_per_s(model, pool)
    n_workers = registry.ready_workers(model, pool)
    if ahead == 0 and n_workers:
        wait_s: float | None = 0.0
    else:
        wait_s = ahead / speed if speed else None
    return Estimate(
        queue=queue,
        predicted_wait_s=wait_s,
        jobs=jobs,
        tokens=tokens,
        bytes=n_bytes,
        tokens_ahead=ahead,
        tokens_per_s=speed,
        workers=n_workers,
    )


def queue_limits(model: ModelInfo, registry: Registry, pool: str, requests: Sequence[Request]) -> Limits:
    """Return what the queue of a model takes of these requests."""
    now = time.time()
    deadlines = [request.deadline - now for request in requests if request.deadline is not None]
    return Limits(
        jobs=model.max_waiting_jobs,
        tokens=model.max_waiting_tokens,
        bytes=model.max_waiting_bytes,
        tokens_per_s=registry.tokens_per_s(model.name, pool),
        wait_s=max(0.0, min(deadlines)) if deadlines else None,
    )


def count_tokens(request: Request, registry: Registry, model: ModelInfo) -> int:
    """Return what a request will cost, tokens, as far as its characters tell."""
    ratio = registry.measured(model.name, "tokens_per_character") or TOKENS_PER_CHARACTER
    if isinstance(request, EmbedRequest):
        longest = (model.max_tokens or math.inf) / ratio  # the rest of a text is cut off
        return math.ceil(sum(min(len(text) + 1, longest) for text in request.texts) * ratio)
    answer = registry.measured(model.name, "answer_tokens") or ANSWER_TOKENS
    return math.ceil(request.n_characters * ratio + min(request.max_new_tokens or math.inf, answer))
