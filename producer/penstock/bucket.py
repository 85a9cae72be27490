"""Token buckets in Redis: what all processes of a cluster together may do in a time.

Knows the script `take_tokens` and nothing of what is counted. One call asks and takes, on Redis's own clock;
a call that may wait reserves its place, so that a rate is used up although every process wakes a little late.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, cast

import redis.asyncio as aioredis

from penstock.keys import BUCKET_PREFIX
from penstock.scripts import script


@dataclass(frozen=True, slots=True)
class Bucket:
    """An allowance.

    Attributes:
        key: Redis key; begins with `BUCKET_PREFIX`, which users' rights name.
        rate: Inflow per second; above 0.
        burst: Content of a full bucket; above 0.
    """

    key: str
    rate: float
    burst: float

    def of(self, cost: float) -> "Share":
        """Return a share of it.

        Args:
            cost: Above `burst` it waits for a full bucket and leaves a debt; below 0 it is given back.
        """
        return Share(self, cost)


RETRIES: Final = Bucket(f"{BUCKET_PREFIX}retries", rate=100.0, burst=200.0)
"""What all clients and workers of a broker together may try again, per second."""


class Share(NamedTuple):
    """What is wanted from a bucket."""

    bucket: Bucket
    cost: float


class Taken(NamedTuple):
    """The answer of a bucket.

    Attributes:
        is_taken: True if all buckets gave, False if none did.
        wait_s: Seconds to wait before acting; where nothing was taken, before asking again.
    """

    is_taken: bool
    wait_s: float


async def take(store: aioredis.Redis, *shares: Share, within_s: float = 0.0) -> Taken:
    """Take from buckets, from all or from none.

    Args:
        store: The Redis that holds them.
        shares: Amounts from different buckets.
        within_s: Longest wait that is reserved, seconds; with 0, now or not at all.
    """
    keys, arguments = take_arguments(*shares, within_s=within_s)
    return read_taken(await store.register_script(script("take_tokens"))(keys=keys, args=arguments))


def take_arguments(*shares: Share, within_s: float = 0.0) -> tuple[list[str], list[float]]:
    """Return the keys and arguments of the script `take_tokens`; for clients that do not await, too."""
    arguments = [within_s]
    for bucket, cost in shares:
        arguments += [bucket.rate, bucket.burst, cost]
    return [bucket.key for bucket, _ in shares], arguments


def read_taken(reply: object) -> Taken:
    """Read what the script `take_tokens` returns."""
    is_taken, wait_s = cast("Sequence[Any]", reply)
    return Taken(bool(is_taken), float(wait_s))
