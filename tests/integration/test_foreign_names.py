"""Lists, tenants and sizes that a sender makes up, as the scripts of delivery meet them."""

from collections.abc import Iterator
from typing import Any

import pytest
import redis
from redis.exceptions import ResponseError

from penstock.envelope import MAX_ENTRY_BYTES, MAX_POP_BYTES
from penstock.scripts import NO_LIMITS, script
from penstock_workers.delivery.polling import pop_arguments
from tests.deployment import Server
from tests.faults.fleet import message

QUEUE = "cpu.m"
TENANTS = ("x\npenstock:dead", "a\x06\x17b", "a b", "\x00", "x" * 65, b"\xff", "-", "ä")
LISTS = (
    "penstock:dead",
    "penstock:models",
    "unacked",
    "celery-task-meta-1",
    "_kombu.binding.cpu.m",
    "cpu.m\n",
)


@pytest.fixture(scope="module")
def running(server: Server) -> Iterator[redis.Redis]:
    """A connection to the broker."""
    with redis.Redis.from_url(server.broker_url) as connected:
        yield connected


@pytest.fixture
def broker(running: redis.Redis) -> redis.Redis:
    """The same, with nothing in it."""
    running.flushall()
    return running


def run(client: redis.Redis, name: str, *arguments: Any, keys: tuple[Any, ...] = ()) -> Any:
    """Run one of the scripts."""
    return client.eval(script(name), len(keys), *keys, *arguments)


def push(client: redis.Redis, key: str | bytes, raw: bytes) -> Any:
    """Push as a client does."""
    return run(client, "push", *NO_LIMITS.arguments(), raw, "", keys=(key,))


def pop(client: redis.Redis, *, most: int = 32) -> list[list[Any]]:
    """Pop as a worker does; return rows of list, tag, lost leases, tries, tokens, message."""
    asked = pop_arguments(
        "w/1", lease_s=20, most=most, prefetch=[most], token_budgets=[None], held=[(0, 0)], share=1
    )
    reply = run(client, "pop", *asked, keys=(QUEUE,))
    return [reply[at : at + 6] for at in range(0, len(reply), 6)]


@pytest.mark.parametrize("tenant", TENANTS, ids=ascii)
def test_a_tenant_that_is_none_has_no_list(broker: redis.Redis, tenant: str | bytes) -> None:
    """Its message is refused when it is pushed; one that was put there by hand keeps nobody waiting."""
    key = b"cpu.m\x06\x17" + (tenant if isinstance(tenant, bytes) else tenant.encode())
    _, raw = message("task", [], queue=QUEUE)

    with pytest.raises(ResponseError, match="no queue has this name"):
        push(broker, key, raw)
    assert broker.keys("*") == []

    broker.lpush(key, raw)
    broker.zadd(f"penstock:turns:{QUEUE}", {tenant: -1e300})
    push(broker, QUEUE, raw)
    push(broker, f"{QUEUE}\x06\x17alice", raw)
    assert sorted(row[0] for row in pop(broker)) == [b"cpu.m", b"cpu.m\x06\x17alice"]


@pytest.mark.parametrize("name", LISTS, ids=ascii)
def test_no_message_goes_to_a_list_of_others(broker: redis.Redis, name: str) -> None:
    """A delayed entry that names a key of Penstock, Celery or kombu is dropped when it is due."""
    _, raw = message("task", [], queue=QUEUE)
    broker.hset("penstock:delayed", "evil", b"%d:%s%s" % (len(name), name.encode(), raw))
    broker.hset("penstock:delayed", "good", b"%d:%s%s" % (len(QUEUE), QUEUE.encode(), raw))
    broker.zadd("penstock:due", {"evil": 1, "good": 2})

    assert run(broker, "move_due", 10)[0] == 2
    with pytest.raises(ResponseError, match="no queue has this name"):
        push(broker, name, raw)

    assert not broker.exists("penstock:delayed", "penstock:due", name)
    assert [row[-1] for row in pop(broker)] == [raw]


def test_a_giant_does_not_leave_the_server(broker: redis.Redis) -> None:
    """Of an entry above the bound a worker gets the size and the end, and a pop ends with it."""
    _, raw = message("task", [], queue=QUEUE)
    giant = raw.replace(b'"body": "', b'"body": "' + b"A" * MAX_ENTRY_BYTES)
    broker.lpush(QUEUE, giant, raw)

    ((_, tag, _, _, _, told),) = pop(broker)

    assert told == b"\0%d\n" % len(giant) + giant[-16384:]
    assert broker.llen(QUEUE) == 1
    letter = run(broker, "dead_letter", tag, "w/1", "{}", 0, 40)
    assert letter is not None
    assert not broker.exists("unacked", "penstock:leases", f"penstock:load:{QUEUE}")


def test_a_pop_has_a_bound_in_bytes(broker: redis.Redis) -> None:
    """Of many large entries a pop takes as many as fit; the rest waits."""
    _, raw = message("task", [], queue=QUEUE)
    large = raw.replace(b'"body": "', b'"body": "' + b"A" * (MAX_POP_BYTES // 2))
    broker.lpush(QUEUE, *[large] * 5)

    assert len(pop(broker)) == 2
    assert broker.llen(QUEUE) == 3


def test_a_message_that_its_workers_fail_on_is_given_up(broker: redis.Redis) -> None:
    """Each failure counts as a delivery; after the last the caller holds the message, to dead-letter it."""
    _, raw = message("task", [], queue=QUEUE)
    broker.lpush(QUEUE, raw)
    ((_, tag, *_),) = pop(broker)
    assert run(broker, "fail", tag, "w/1", 2) == []
    ((_, _, n_lost, *_),) = pop(broker)

    assert n_lost == 1
    assert run(broker, "fail", tag, "w/1", 2) == [QUEUE.encode(), 2, raw]
    assert broker.hexists("unacked", tag)
    assert run(broker, "fail", tag, "w/2", 2) == []  # who holds nothing changes nothing


def test_a_key_that_is_no_list_keeps_nobody_waiting(broker: redis.Redis) -> None:
    """A string where a queue's list should be: it is passed by, and other levels are served."""
    _, raw = message("task", [], queue=QUEUE)
    broker.set(QUEUE, "text")
    broker.lpush(f"{QUEUE}\x06\x163", raw)
    asked = pop_arguments(
        "w/1", lease_s=20, most=9, prefetch=[9], token_budgets=[None], held=[(0, 0), (0, 0)], share=1
    )

    reply = run(broker, "pop", *asked, keys=(QUEUE, f"{QUEUE}\x06\x163"))

    assert reply[5::6] == [raw]
