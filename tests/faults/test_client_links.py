"""A client behind a network that drops connections, or is slow: what each costs, and what it does not."""

import asyncio
import os
import threading
import time
from collections.abc import Callable

import pytest
import redis

from penstock import BrokerUnavailableError
from penstock.broker import Broker
from penstock.connections import connect, connect_sync, get_large, redis_errors
from tests.deployment import Server
from tests.faults.proxy import Proxy

ANSWER_S = 1.0
"""Stands for `ANSWER_TIMEOUT_S` here, so that the tests are short."""


def test_a_dropped_network_costs_one_error(own: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a silent drop the first caller waits in vain; idle connections of that time are not tried."""
    answer_s = 5 * ANSWER_S  # longer than eight calls take on a busy machine
    monkeypatch.setattr("penstock.connections.ANSWER_TIMEOUT_S", answer_s)

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
        assert asyncio.run(run(link)) < answer_s


def by_tasks(url: str) -> bytes | None:
    """Get the large value as an `AsyncClient` gets what is small."""

    async def run() -> bytes | None:
        store = connect(url)
        with redis_errors(""):
            found = await store.get("large")
        await store.aclose()
        return found  # type: ignore[no-any-return]  # bytes, as the client decodes nothing

    return asyncio.run(run())


def by_blocking(url: str) -> bytes | memoryview | None:
    """Get the large value as both clients do."""
    with connect_sync(url) as store, redis_errors(""):
        return get_large(store, "large")


@pytest.mark.parametrize("get", [by_tasks, by_blocking])
def test_a_large_reply_may_take_longer_than_the_limit(
    own: Server, monkeypatch: pytest.MonkeyPatch, get: Callable[[str], bytes | memoryview | None]
) -> None:
    """The time limit is one of silence: a reply that flows for three times as long arrives."""
    monkeypatch.setattr("penstock.connections.ANSWER_TIMEOUT_S", ANSWER_S)
    payload = large(own, 3_000_000)

    with Proxy(own.port, bytes_per_s=1_000_000).running() as link:
        began = time.monotonic()
        found = get(f"redis://127.0.0.1:{link.port}/1")

    assert found == payload
    assert time.monotonic() - began > 2 * ANSWER_S


def test_silence_within_a_large_reply_is_an_error(own: Server) -> None:
    """A reply that stops is waited for as long as silence may last, once."""
    large(own, 3_000_000)
    with Proxy(own.port, bytes_per_s=1_000_000).running() as link:
        store = connect_sync(f"redis://127.0.0.1:{link.port}/1", answer_timeout_s=ANSWER_S)
        silence = threading.Timer(0.5, link.swallow)
        silence.start()
        began = time.monotonic()
        with store, pytest.raises(BrokerUnavailableError, match="timed out"), redis_errors(""):
            get_large(store, "large")

    assert time.monotonic() - began < 2.5 * ANSWER_S


def test_a_large_reply_that_is_cut_is_asked_for_again(own: Server) -> None:
    """A connection that ends in the middle of a value costs time, and no byte."""
    payload = large(own, 2_000_000)
    with Proxy(own.port, bytes_per_s=2_000_000).running() as link:
        cut = threading.Timer(0.5, link.cut)
        cut.start()
        began = time.monotonic()
        with connect_sync(f"redis://127.0.0.1:{link.port}/1") as store:
            assert get_large(store, "large") == payload

    assert time.monotonic() - began > 1.4  # all of it flowed again


@pytest.mark.parametrize("protocol", [2, 3])
def test_a_value_is_what_redis_py_reads(own: Server, protocol: int) -> None:
    """Of every size, whatever is in it; what is no value is told as redis-py tells it."""
    with redis.Redis.from_url(own.results_url, protocol=protocol) as store:
        for n_bytes in (0, 1, 2, *range(4080, 4100), 70_000, 1 << 20):
            payload = (b"\r\n$5\r\n" + os.urandom(n_bytes))[:n_bytes]
            store.set("large", payload)
            assert get_large(store, "large") == payload == store.get("large")
        assert get_large(store, "none") is None
        store.rpush("list", "a")
        with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
            get_large(store, "list")
        assert get_large(store, "large") == payload


def large(own: Server, n_bytes: int) -> bytes:
    """Store a value under `large`, and return it."""
    payload = os.urandom(n_bytes)
    with redis.Redis.from_url(own.results_url) as results:
        results.set("large", payload)
    return payload
