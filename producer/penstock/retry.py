"""Calls that failed for now are made again: after a pause with jitter, before the deadline.

All clients and workers of a broker share one budget of retries.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception,
    stop_after_attempt,
    stop_any,
    stop_before_delay,
    stop_never,
)

from penstock.broker import Broker
from penstock.errors import PenstockError, ResultTimeoutError

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitPolicy:
    """How to retry a call when a queue is full, or a worker or Redis failed for now.

    Attributes:
        max_wait_s: latest start of an attempt, seconds after the first. The job's deadline is a limit too.
        attempts: largest number of attempts, the first included; None for any number.
        base_s: upper bound of the first random pause, seconds; it doubles with each failure. The pause comes
            on top of what the server asks for (`retry_after_s` of the error).
        most_s: upper bound of any random pause, seconds.
    """

    max_wait_s: float = 600.0
    attempts: int | None = 10
    base_s: float = 0.5
    most_s: float = 30.0

    def pause_s(self, n_failures: int, error: BaseException | None) -> float:
        """Return how long to wait after this number of failures, seconds."""
        drawn = random.uniform(0, min(self.most_s, self.base_s * 2 ** min(n_failures - 1, 30)))  # noqa: S311  no secret
        return float(getattr(error, "retry_after_s", 0.0)) + drawn


def is_transient(error: BaseException) -> bool:
    """Say whether the same call may succeed later. One that ran out of time has none left to try again."""
    return isinstance(error, PenstockError) and error.retryable and not isinstance(error, ResultTimeoutError)


async def try_again(
    policy: WaitPolicy | None, call: Callable[[], Awaitable[T]], *, left_s: float | None, broker: Broker
) -> T:
    """Call, and call again while it fails for now.

    Args:
        policy: None calls once.
        call: one attempt.
        left_s: latest start of an attempt, seconds from now; None where there is no deadline.
        broker: holds the budget; each retry is taken from it.

    Raises:
        PenstockError: the last attempt failed.
    """
    if policy is None:
        return await call()
    most_s = policy.max_wait_s if left_s is None else min(policy.max_wait_s, left_s)
    until = time.monotonic() + most_s
    last: BaseException | None = None

    async def attempt() -> T:
        nonlocal last
        if last is not None:
            wait_s = await broker.ask_for_retry(max(0.0, until - time.monotonic()))
            if wait_s is None:
                raise _BudgetSpentError
            await asyncio.sleep(wait_s)
        try:
            return await call()
        except BaseException as error:
            last = error
            raise

    def pause_s(state: RetryCallState) -> float:
        return policy.pause_s(state.attempt_number, state.outcome.exception() if state.outcome else None)

    stop = stop_any(
        stop_before_delay(max(0.0, most_s)),
        stop_never if policy.attempts is None else stop_after_attempt(policy.attempts),
    )
    retrying = AsyncRetrying(retry=retry_if_exception(is_transient), wait=pause_s, stop=stop, reraise=True)
    try:
        return await retrying(attempt)
    except _BudgetSpentError:
        assert last is not None
        raise last from None


class _BudgetSpentError(Exception):
    """No retry is left before it would be too late."""
