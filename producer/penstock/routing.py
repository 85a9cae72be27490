"""The choice of a pool: how long a job will wait there, and what its queue still takes.

A job costs tokens: those of its texts, or of its prompt and the expected answer. Senders estimate them from
characters, by what workers measured; the scripts keep the sums for each queue.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

from penstock.broker import Broker
from penstock.discovery import Discovery
from penstock.keys import queue_key, queue_name, split_queue
from penstock.registry import ModelInfo, Registry
from penstock.request import EmbedRequest, Lane, PoolName, Request, RerankRequest
from penstock.scripts import Limits

TOKENS_PER_CHARACTER: Final = 0.25
"""Used until a worker has measured it."""
OVERFLOW_S: Final = 1.0
"""Jobs go to the second pool when the wait in the preferred one is longer by this, seconds."""
LOOK_S: Final = 0.5
"""How often a client looks at the queues of a model in two pools, seconds."""
SHARE_OF_DEADLINE: Final = 0.75
"""Accept a job only if its predicted finish uses at most this share of the time to its deadline.

Predictions err, and a late job has wasted a slot.
"""
BATCH_S: Final = 0.1
"""For embedding jobs, do not count up to this much queued work (at most half of it) as waiting, seconds.

A part of the running batch is computed already, and the job's own batch holds texts of others.
"""
MOST_CHOICES: Final = 1000
ANSWER_TOKENS: Final = 128
"""Tokens of an answer until a worker has measured them, unless `max_new_tokens` is less."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """How long a job would wait if it was sent now.

    Attributes:
        queue: `<pool>.<model>`, the queue it would wait in.
        predicted_wait_s: seconds until the model starts on it; None if no worker has told its speed.
        jobs: number of jobs in the queue, those that workers hold included.
        tokens: tokens of all jobs in the queue, as their senders estimated them.
        bytes: size of their messages.
        tokens_ahead: tokens in the queue that are computed before the new job.
        tokens_per_s: measured throughput of the queue's ready workers together.
        workers: number of ready workers.
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
        before = f"{self.queue}: {self.predicted_wait_s:,.2f} s, {self.tokens_ahead:,} tokens before it"
        if not self.tokens_per_s:
            return f"{before}, speed of {self.workers} workers not measured yet"
        return f"{before}, {self.tokens_per_s:,.0f} tokens/s of {self.workers} workers"


def predict(queue: str, load: list[int], registry: Registry) -> Estimate:
    """Return the estimate for a queue, from the answer of the script `load`."""
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
    """Return the limits under which a queue takes these requests.

    Args:
        model: model that they ask.
        registry: workers that serve it.
        pool: pool that they go to.
        requests: requests of one send.
        n_tokens: estimated cost of each of them.
        now_s: time of the broker's clock, which their deadlines go by.
    """
    speed = median(registry.speeds(model.name, pool) or [math.inf])
    waits = [
        SHARE_OF_DEADLINE * (request.deadline - now_s) - cost / speed
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
    """Return what a request will cost, tokens, estimated from its characters."""
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
    """The choice between a model's pools, and its reasons.

    Attributes:
        waits: predicted wait of each pool, seconds; includes what was sent since the last look.
        looked_at: time of the last look, on this process' monotonic clock.
        is_overflowing: True while jobs go to the second pool.
    """

    waits: dict[PoolName, float]
    looked_at: float
    is_overflowing: bool = False


class Router:
    """Chooses the pool of each job: the preferred one, or the next where the wait is shorter by a margin.

    It looks at the queues every `LOOK_S` and adds what this client sends in between: else all jobs would go
    to one pool until the next look. It goes back to the preferred pool at half the margin.
    """

    def __init__(self, broker: Broker, discovery: Discovery) -> None:
        self._broker, self._discovery = broker, discovery
        self._choices: dict[tuple[str, Lane], _Choice] = {}

    async def estimate(self, queue: str, lane: Lane) -> Estimate:
        """Look at a queue."""
        load = await self._broker.load(queue_key(queue, *lane))
        return predict(queue, load, await self._discovery.registry())

    async def choose(self, model: ModelInfo, registry: Registry, lane: Lane) -> PoolName:
        """Return the pool for the next job of `model`."""
        pools = [pool for pool in model.pools if registry.ready_workers(model.name, pool)]
        if len(pools) < 2:
            return registry.choose_pool(model)
        choice = self._choices.get((model.name, lane))
        if choice is None or time.monotonic() - choice.looked_at > LOOK_S:
            choice = await self._look(
                model, lane, pools, is_overflowing=choice is not None and choice.is_overflowing
            )
        first, second = (choice.waits.get(pool) for pool in pools[:2])
        if first is None or second is None:  # no worker has told its speed
            return pools[0]
        choice.is_overflowing = first > second + (OVERFLOW_S / 2 if choice.is_overflowing else OVERFLOW_S)
        return pools[1] if choice.is_overflowing else pools[0]

    def sent(self, model: ModelInfo, registry: Registry, lane: Lane, pool: PoolName, n_tokens: int) -> None:
        """Add what was sent to the predicted wait."""
        choice = self._choices.get((model.name, lane))
        speed = registry.tokens_per_s(model.name, pool)
        if choice is not None and pool in choice.waits and speed:
            choice.waits[pool] += n_tokens / speed

    async def _look(
        self, model: ModelInfo, lane: Lane, pools: Sequence[PoolName], *, is_overflowing: bool
    ) -> _Choice:
        found = {pool: await self.estimate(queue_name(pool, model.name), lane) for pool in pools}
        waits = {
            pool: each.predicted_wait_s for pool, each in found.items() if each.predicted_wait_s is not None
        }
        if len(self._choices) > MOST_CHOICES:  # of tenants that come and go
            self._choices.clear()
        choice = self._choices[model.name, lane] = _Choice(waits, time.monotonic(), is_overflowing)
        return choice
