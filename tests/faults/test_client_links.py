"""A client behind a network that drops connections, or is slow: what each costs, and what it does not."""

import asyncio
import os
import time

import pytest
import redis

from penstock import BrokerUnavailableError
from penstock.broker import Broker, connect, redis_errors
from tests.deployment import Server
from tests.faults.proxy import Proxy

ANSWER_S = 1.0
"""Stands for `ANSWER_TIMEOUT_S` here, so that the tests are short."""


def test_a_dropped_network_costs_one_error(own: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a silent drop the first caller waits in vain; idle connections of that time are not tried."""
    monkeypatch.setattr("penstock.broker.ANSWER_TIMEOUT_S", ANSWER_S)

    async def run(link: Proxy) -> float:
        broker = Broker(f"redis://127.0.0.1:{link.port}/0")
        await asyncio.gather(*(broker.registry() for _ in range(8)))  # as many connections
        link.swallow()
        link.forward()  # for connections made from now on
        with pytest.raises(BrokerUnavailableError):
            await broker.registry()
        began = time.monotonic()
        await asyncio.gather(*(broker.registry() for _ in range(8)))
        seconds = time.monotonic() - began
        await broker.close()
        return seconds

    with Proxy(own.port).running() as link:
        assert asyncio.run(run(link)) < ANSWER_S


def test_a_large_reply_may_take_longer_than_the_limit(own: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time limit is one of silence: a reply that flows for three times as long arrives."""
    monkeypatch.setattr("penstock.broker.ANSWER_TIMEOUT_S", ANSWER_S)
    payload = os.urandom(3_000_000)
    with redis.Redis.from_url(own.results_url) as results:
        results.set("large", payload)

    async def run(link: Proxy) -> bytes | None:
        store = connect(f"redis://127.0.0.1:{link.port}/1")
        with redis_errors(""):
            found = await store.get("large")
        await store.aclose()
        return found  # type: ignore[no-any-return]  # bytes, as the client decodes nothing

    with Proxy(own.port, bytes_per_s=1_000_000).running() as link:
        began = time.monotonic()
        found = asyncio.run(run(link))

    assert found == payload
    assert time.monotonic() - began > 2 * ANSWER_S
