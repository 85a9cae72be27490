"""How long a job will wait: what it costs, and what a queue has before it.

Costs are tokens: of the texts, or of the prompt and the expected answer. Senders estimate them from
characters, by what workers measured; the scripts keep their sums for each queue.
"""

import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

from penstock.keys import queue_name, split_queue
from penstock.registry import ModelInfo, Registry
from penstock.request import EmbedRequest, Lane, PoolName, Request, RerankRequest
from penstock.scripts import Limits

TOKENS_PER_CHARACTER: Final = 0.25
"""Until a worker has measured it."""
SPILL_S: Final = 1.0
"""By how much the wait in the preferred pool has to be longer for jobs to go to the next one, seconds."""
LOOK_S: Final = 0.5
"""How often a client looks at the queues of a model in two pools, seconds."""
PART_TO_WAIT: Final = 0.75
"""Of the time until a deadline, what a job may take by prediction: those err, and who misses his deadline has
cost another his place."""
BATCH_S: Final = 0.1
"""So many seconds of the tokens before a job that reads texts, half at most, are no wait: a part of the
batch under way is computed already, and the job's own batch holds texts of others."""
MOST_CHOICES: Final = 1000
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
            f"{self.queue}: {self.predicted_wait_s:,.2f} s, {self.tokens_ahead:,} tokens before it, "
            f"{self.tokens_per_s or 0:,.0f} tokens/s of {self.workers} workers"
        )


def predict(queue: str, load: list[int], registry: Registry) -> Estimate:
    """Return the estimate for a queue from what the script `load` answered."""
    jobs, tokens, n_bytes, ahead = load
    pool, model = split_queue(queue)
    speed = registry.tokens_per_s(model, pool)
    n_workers = registry.ready_workers(model, pool)
    if ahead == 0 and n_workers:
        wait_s: float | None = 0.0
    else:
        wait_s = ahead / speed if speed else None
    known = registry.models.get(model)
    if wait_s and known is not None and known.task != "generate":
        wait_s -= min(BATCH_S, wait_s / 2)
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


def queue_limits(
    model: ModelInfo,
    registry: Registry,
    pool: str,
    requests: Sequence[Request],
    n_tokens: Sequence[int],
    *,
    now_s: float,
) -> Limits:
    """Return what the queue of a model takes of these requests, which cost so many tokens.

    `now_s` is by the clock of their deadlines, the broker's.
    """
    speed = median(registry.speeds(model.name, pool) or [math.inf])
    waits = [
        PART_TO_WAIT * (request.deadline - now_s) - cost / speed
        for request, cost in zip(requests, n_tokens, strict=True)
        if request.deadline is not None
    ]
    return Limits(
        jobs=model.max_waiting_jobs,
        tokens=model.max_waiting_tokens,
        bytes=model.max_waiting_bytes,
        tokens_per_s=registry.tokens_per_s(model.name, pool),
        wait_s=max(0.0, min(waits)) if waits else None,
    )


def count_tokens(request: Request, registry: Registry, model: ModelInfo) -> int:
    """Return what a request will cost, tokens, as far as its characters tell."""
    ratio = registry.measured(model.name, "tokens_per_character") or TOKENS_PER_CHARACTER
    if isinstance(request, EmbedRequest):
        longest = (model.max_tokens or math.inf) / ratio  # the rest of a text is cut off
        return math.ceil(sum(min(len(text) + 1, longest) for text in request.texts) * ratio)
    if isinstance(request, RerankRequest):
        return math.ceil(request.n_characters * ratio)
    answer = registry.measured(model.name, "answer_tokens") or ANSWER_TOKENS
    return math.ceil(
        request.n_characters * ratio + request.n * min(request.max_new_tokens or math.inf, answer)
    )


@dataclass(slots=True)
class _Choice:
    """Which pool a model's jobs go to, and why.

    Attributes:
        waits: predicted wait of each pool, seconds, with what was sent since they were looked at.
        looked_at: when, on this process' monotonic clock.
        is_spilling: whether the preferred pool is passed by.
    """

    waits: dict[PoolName, float]
    looked_at: float
    is_spilling: bool = False


class Router:
    """Chooses the pool of each job: the preferred one, or the next where the wait is shorter by a margin.

    A client looks every `LOOK_S` and adds what it sends itself in between, so that it does not send all to
    one pool until the next look; it goes back at half the margin.

    Args:
        estimate: looks at a queue; takes its name and the lane.
    """

    def __init__(self, estimate: Callable[[str, Lane], Awaitable[Estimate]]) -> None:
        self._estimate = estimate
        self._choices: dict[tuple[str, Lane], _Choice] = {}

    async def choose(self, model: ModelInfo, registry: Registry, lane: Lane) -> PoolName:
        """Return the pool for the next job of `model`."""
        pools = [pool for pool in model.pools if registry.ready_workers(model.name, pool)]
        if len(pools) < 2:
            return registry.choose_pool(model)
        choice = self._choices.get((model.name, lane))
        if choice is None or time.monotonic() - choice.looked_at > LOOK_S:
            choice = await self._look(
                model, lane, pools, is_spilling=choice is not None and choice.is_spilling
            )
        first, second = (choice.waits.get(pool) for pool in pools[:2])
        if first is None or second is None:  # nobody has told a speed
            return pools[0]
        choice.is_spilling = first > second + (SPILL_S / 2 if choice.is_spilling else SPILL_S)
        return pools[1] if choice.is_spilling else pools[0]

    def sent(self, model: ModelInfo, registry: Registry, lane: Lane, pool: PoolName, n_tokens: int) -> None:
        """Take note of what was sent."""
        choice = self._choices.get((model.name, lane))
        speed = registry.tokens_per_s(model.name, pool)
        if choice is not None and pool in choice.waits and speed:
            choice.waits[pool] += n_tokens / speed

    async def _look(
        self, model: ModelInfo, lane: Lane, pools: Sequence[PoolName], *, is_spilling: bool
    ) -> _Choice:
        found = {pool: await self._estimate(queue_name(pool, model.name), lane) for pool in pools}
        waits = {
            pool: each.predicted_wait_s for pool, each in found.items() if each.predicted_wait_s is not None
        }
        if len(self._choices) > MOST_CHOICES:  # of tenants that come and go
            self._choices.clear()
        choice = self._choices[model.name, lane] = _Choice(waits, time.monotonic(), is_spilling)
        return choice
