"""Allowances that all processes share, in a real Redis."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import redis.asyncio as aioredis

from penstock.bucket import Bucket, read_taken, take, take_arguments
from penstock.connections import connect
from penstock.keys import BUCKET_PREFIX
from penstock.request import new_job_id
from penstock.scripts import script
from tests.deployment import Server


@asynccontextmanager
async def clients(server: Server, n: int) -> AsyncIterator[list[aioredis.Redis]]:
    """Connect as several processes would."""
    stores = [connect(server.broker_url) for _ in range(n)]
    try:
        yield stores
    finally:
        for store in stores:
            await store.aclose()


@pytest.fixture
def bucket() -> Callable[..., Bucket]:
    """Return fresh buckets."""

    def make(rate: float, burst: float) -> Bucket:
        return Bucket(f"{BUCKET_PREFIX}{new_job_id()}", rate, burst)

    return make


def test_a_burst_is_free_and_then_the_rate_counts(server: Server, bucket: Callable[..., Bucket]) -> None:
    """A full bucket gives its burst at once; whoever comes next is told when, and has taken nothing."""
    limit = bucket(rate=0.1, burst=3)

    async def ask() -> list[tuple[bool, float]]:
        async with clients(server, 1) as (store,):
            return [await take(store, limit.of(1)) for _ in range(5)]

    answers = asyncio.run(ask())

    assert answers[:3] == [(True, 0)] * 3
    assert [is_taken for is_taken, _ in answers[3:]] == [False, False]
    assert [wait_s for _, wait_s in answers[3:]] == pytest.approx([10, 10], abs=2)


def test_places_are_reserved_one_after_the_other(server: Server, bucket: Callable[..., Bucket]) -> None:
    """With `within_s`, each caller gets a place of its own, until the next would be too late."""
    limit = bucket(rate=0.1, burst=1)

    async def ask() -> list[tuple[bool, float]]:
        async with clients(server, 4) as stores:
            return [await take(store, limit.of(1), within_s=25) for store in stores]

    answers = asyncio.run(ask())

    assert [is_taken for is_taken, _ in answers] == [True, True, True, False]
    assert [wait_s for _, wait_s in answers] == pytest.approx([0, 10, 20, 30], abs=2)


def test_all_buckets_or_none(server: Server, bucket: Callable[..., Bucket]) -> None:
    """Where one bucket refuses, the others keep what they have."""
    requests, tokens = bucket(rate=0.1, burst=2), bucket(rate=1, burst=100)

    async def ask() -> list[tuple[bool, float]]:
        async with clients(server, 1) as (store,):
            first = await take(store, requests.of(1), tokens.of(90))
            refused = await take(store, requests.of(1), tokens.of(90))
            return [first, refused, await take(store, requests.of(1))]

    first, refused, untouched = asyncio.run(ask())

    assert first == (True, 0)
    assert not refused[0]
    assert refused[1] == pytest.approx(80, abs=2)
    assert untouched == (True, 0)


def test_a_cost_above_the_burst_leaves_a_debt(server: Server, bucket: Callable[..., Bucket]) -> None:
    """What never fits goes when the bucket is full; giving back shortens the wait of the next."""
    limit = bucket(rate=1, burst=10)

    async def ask() -> list[tuple[bool, float]]:
        async with clients(server, 1) as (store,):
            large = await take(store, limit.of(40))
            before = await take(store, limit.of(10))
            back = await take(store, limit.of(-35))
            return [large, before, back, await take(store, limit.of(5)), await take(store, limit.of(1))]

    large, before, back, after, empty = asyncio.run(ask())

    assert large == back == after == (True, 0)
    assert not before[0]
    assert before[1] == pytest.approx(40, abs=2)
    assert not empty[0]


def test_a_full_bucket_is_no_key(server: Server, bucket: Callable[..., Bucket]) -> None:
    """A key lives until its bucket is full again; what is given back to a full one is lost."""
    limit = bucket(rate=1, burst=10)

    async def ask() -> tuple[int, int]:
        async with clients(server, 1) as (store,):
            await take(store, limit.of(4))
            lives_ms = await store.pttl(limit.key)
            await take(store, limit.of(-100))
            return lives_ms, await store.exists(limit.key)

    lives_ms, n_keys = asyncio.run(ask())

    assert 2000 < lives_ms <= 4000
    assert n_keys == 0


def test_many_callers_use_a_rate_up_and_no_more(server: Server, bucket: Callable[..., Bucket]) -> None:
    """Eight processes that reserve together stay within rate and burst in every window, without gaps."""
    limit = bucket(rate=200, burst=4)
    times = sorted(asyncio.run(_reserve(server, limit, n_clients=8, n_each=25)))

    gaps = [latest - earliest for (earliest, _), (_, latest) in zip(times[4:], times[8:], strict=False)]
    assert min(gaps) >= 4 / 200 - 1e-3
    assert times[-1][0] - times[0][0] == pytest.approx((200 - 4) / 200, abs=0.5)


async def _reserve(
    server: Server, limit: Bucket, *, n_clients: int, n_each: int
) -> list[tuple[float, float]]:
    """Return between which seconds, on Redis's clock, lie those at which callers may act."""

    async def one(store: aioredis.Redis) -> list[tuple[float, float]]:
        reserved = []
        for _ in range(n_each):
            async with store.pipeline(transaction=True) as pipe:
                keys, arguments = take_arguments(limit.of(1), within_s=60)
                pipe.time()
                pipe.eval(script("take_tokens"), len(keys), *keys, *arguments)
                pipe.time()
                before, reply, after = await pipe.execute()
            wait_s = read_taken(reply).wait_s
            first, last = (second + microsecond / 1e6 + wait_s for second, microsecond in (before, after))
            reserved.append((first, last))
        return reserved

    async with clients(server, n_clients) as stores:
        return [times for reserved in await asyncio.gather(*map(one, stores)) for times in reserved]
