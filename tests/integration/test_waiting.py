"""One number says how much waits; nothing that others write makes it, or anything else, wrong for ever."""

import json
import time
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import pytest
import redis
from celery import Celery
from kombu import Connection

from penstock import Client, QueueDelayError, RateLimitError
from penstock.keys import MODELS_KEY, TENANTS_KEY, WORKERS_KEY, queue_key
from penstock.scripts import NO_LIMITS, script
from penstock_workers.command.queues import Queues
from penstock_workers.configuration import load_settings
from penstock_workers.delivery.leases import Leases
from penstock_workers.delivery.polling import pop_arguments
from penstock_workers.delivery.process import HOOKS
from tests import announced
from tests.deployment import Server
from tests.eventually import eventually
from tests.faults.fleet import message

QUEUE = "cpu.minilm"
WAITING = f"penstock:waiting:{QUEUE}"
LISTS = tuple(queue_key(QUEUE, level) for level in (0, 3, 6, 9))
MODEL = announced.model(max_waiting_jobs=1000)


@pytest.fixture
def broker(own: Server) -> Iterator[redis.Redis]:
    """A server that knows a model, and no worker."""
    with redis.Redis.from_url(own.broker_url) as connected:
        connected.hset(MODELS_KEY, "minilm", MODEL.to_json())
        connected.set("penstock:results", "/1")
        yield connected


@pytest.fixture
def client(own: Server, broker: redis.Redis) -> Iterator[Client]:
    """A sender."""
    del broker
    with Client(own.broker_url) as connected:
        yield connected


def run(client: redis.Redis, name: str, *arguments: str | bytes | float, keys: tuple[str, ...] = ()) -> Any:
    """Run one of the scripts."""
    return client.register_script(script(name))(keys=keys, args=arguments)


def pop(broker: redis.Redis, token: str, most: int = 32) -> list[bytes]:
    """Take messages; return their tags."""
    arguments = pop_arguments(
        token, lease_s=1, most=most, prefetch=[most], token_budgets=[None], held=[(0, 0)] * 4, share=1
    )
    return list(run(broker, "pop", *arguments, keys=LISTS)[1::6])


def counts(own: Server, broker: redis.Redis) -> set[int]:
    """Return how much waits, as everybody who can be asked says it."""
    arguments = {"redis.broker_url": own.broker_url, "redis.results_url": own.results_url}
    settings = load_settings(arguments=arguments, environ={}).settings
    (state,) = (state for state in Queues(settings).states() if state.queue == QUEUE)
    with Connection(own.broker_url, transport="penstock_workers.delivery.transport:Transport") as connection:
        channel = connection.default_channel
        found = channel.queue_declare(QUEUE, passive=True).message_count if state.waiting else 0
    return {broker.llen(WAITING), state.waiting, found}


def send_some(client: Client) -> int:
    """Send jobs of all priorities, some of tenants; return how many."""
    for tenant in (None, "alice", "bob"):
        for priority in ("interactive", "default", "batch"):
            client.submit_many([["a"]] * 3, model="minilm", priority=priority, tenant=tenant)  # type: ignore[arg-type]
    return 27


def test_jobs_at_the_default_priority_are_in_the_number(client: Client, broker: redis.Redis) -> None:
    """Ten jobs as people send them are ten, by a plain command."""
    for _ in range(10):
        client.submit_embed(["a"], model="minilm")

    assert broker.llen(WAITING) == 10


def test_all_who_count_agree(own: Server, client: Client, broker: redis.Redis) -> None:
    """Priorities and tenants are in the number, whoever is asked; what workers hold or is delayed is not."""
    n = send_some(client)
    assert broker.llen(WAITING) == n
    assert counts(own, broker) == {n}

    tags = pop(broker, "one", most=5)
    assert len(tags) == 5
    assert counts(own, broker) == {n - 5}

    run(broker, "requeue", 1, tags[0], "one", tags[1], "one")
    assert broker.llen(WAITING) == n - 3
    run(broker, "ack", tags[2], "one")
    run(broker, "delay", tags[3], "one", time.time() + 3600)

    assert counts(own, broker) == {n - 3}


def test_the_number_is_right_after_a_crash_a_purge_and_a_requeue(
    own: Server, client: Client, broker: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is a step that counts."""
    for hook in fields(HOOKS):
        monkeypatch.setattr(HOOKS, hook.name, None)  # no app of another test is told
    n = send_some(client)
    for tag in pop(broker, "dead", most=3):
        broker.zadd("unacked_index", {tag: 0})  # its worker has died
    eventually(
        lambda: run(broker, "take_over", 1, 4, 100, "other") and broker.llen(WAITING) == n, within_s=30
    )
    assert counts(own, broker) == {n}

    (tag,) = pop(broker, "poisoned", most=1)
    raw = broker.hget("unacked", tag)
    letter = {"id": tag.decode(), "queue": QUEUE, "n_deliveries": 4, "message": raw.decode()}
    run(broker, "dead_letter", tag, "poisoned", json.dumps(letter), 0, 40)
    assert counts(own, broker) == {n - 1}
    settings = load_settings(
        arguments={"redis.broker_url": own.broker_url, "redis.results_url": own.results_url}, environ={}
    ).settings
    queues = Queues(settings)
    queues.requeue(queues.dead()[0])
    assert counts(own, broker) == {n}

    with Connection(own.broker_url, transport="penstock_workers.delivery.transport:Transport") as connection:
        assert connection.default_channel.queue_purge(QUEUE) == n
    assert counts(own, broker) == {0}
    assert not broker.exists(WAITING)


def test_a_queue_of_tenants_alone_is_there(own: Server, client: Client, broker: redis.Redis) -> None:
    """Whoever declares it passively is told how much waits."""
    client.submit_embed(["a"], model="minilm", tenant="alice")

    assert counts(own, broker) == {1}


def test_what_others_put_there_is_counted_when_somebody_looks(
    own: Server, client: Client, broker: redis.Redis
) -> None:
    """Stock Celery, and a plain LPUSH; a worker's look, a client's, or that of `penstock queues`."""
    app = Celery(broker=own.broker_url)
    for priority in (0, 6):
        app.send_task("penstock.embed", kwargs={}, queue=QUEUE, priority=priority)
    broker.lpush(LISTS[0], message("penstock.embed", [], queue=QUEUE)[1])
    client.estimate("minilm")
    assert broker.llen(WAITING) == 3

    broker.lpush(LISTS[3], *[message("penstock.embed", [], queue=QUEUE)[1]] * 2500)
    assert counts(own, broker) == {2503}
    broker.delete(*LISTS)
    assert pop(broker, "one") == []
    assert broker.llen(WAITING) == 0


def test_purged_messages_leave_no_past(broker: redis.Redis) -> None:
    """Counts of lost leases and of tries go with the messages that they are of."""
    run(broker, "push", *NO_LIMITS.arguments(), message("penstock.embed", [])[1], "", keys=(QUEUE,))
    (tag,) = pop(broker, "one")
    run(broker, "requeue", 1, tag, "one")
    broker.hset("penstock:tries", tag, 3)
    assert broker.hlen("penstock:lost") == 1

    assert run(broker, "purge", 1000, keys=LISTS)[0] == 1

    assert not broker.exists("penstock:lost", "penstock:tries")


def test_the_past_of_messages_that_others_removed_is_bounded(broker: redis.Redis) -> None:
    """A stock purge tells nobody; what is left of it is cut."""
    for past in ("penstock:lost", "penstock:tries"):
        broker.hset(past, mapping={f"{i}": 1 for i in range(100_500)})

    run(broker, "take_over", 1, 4, 100, "one")
    broker.hset("penstock:sweep", "from", 0)
    eventually(
        lambda: run(broker, "take_over", 1, 4, 100, "one") and broker.hlen("penstock:lost") <= 100_000,
        within_s=30,
    )

    assert broker.hlen("penstock:tries") <= 100_000


def test_dead_letters_are_bounded_and_what_went_is_counted(own: Server, broker: redis.Redis) -> None:
    """The oldest go first."""
    broker.rpush("penstock:dead", *[json.dumps({"id": f"{i}"}) for i in range(10_002)])
    run(broker, "push", *NO_LIMITS.arguments(), message("penstock.embed", [])[1], "", keys=(QUEUE,))
    (tag,) = pop(broker, "one")

    run(broker, "dead_letter", tag, "one", '{"id": "new"}', 1, 40)

    assert broker.llen("penstock:dead") == 10_000
    assert json.loads(broker.lindex("penstock:dead", 0))["id"] == "3"
    assert json.loads(broker.lindex("penstock:dead", -1))["id"] == "new"
    arguments = {"redis.broker_url": own.broker_url, "redis.results_url": own.results_url}
    assert Queues(load_settings(arguments=arguments, environ={}).settings).n_dropped() == 3


# What a sender writes where they may


@pytest.mark.parametrize("cost", [0, "0", 10**30, -5])
def test_nothing_is_free(broker: redis.Redis, cost: object) -> None:
    """A job costs a token at least, and one for 4 KiB, so that a tenant's turns end."""
    for name in ("greedy", "alice"):
        for i in range(30):
            job_id, raw = message("penstock.embed", [])
            envelope = json.loads(raw)
            envelope["properties"]["cost"] = cost if name == "greedy" else 5
            envelope["properties"]["delivery_tag"] = f"{name} {i} {job_id}"
            body = json.dumps(envelope)
            run(broker, "push", *NO_LIMITS.arguments(), body, "", keys=(f"{QUEUE}\x06\x17{name}",))

    taken = [tag for n in range(20) for tag in pop(broker, f"one{n}", most=1)]

    assert len(taken) == 20
    assert sum(tag.startswith(b"alice") for tag in taken) >= 3


@pytest.mark.parametrize("value", ["99999999999", "abc", "nan", "-inf", "inf", "1e308", ""])
def test_a_bucket_holds_nobody_up_for_ever(client: Client, broker: redis.Redis, value: str) -> None:
    """What stands in it counts for some minutes at most; what is no number is an empty key."""
    broker.hset(TENANTS_KEY, "alice", "1 1000")
    broker.set("penstock:bucket:tenant:alice", value)

    refusals = []
    try:
        client.submit_embed(["a"], model="minilm", tenant="alice")
    except RateLimitError as error:
        refusals.append(error.retry_after_s)

    assert all(0 < wait_s <= 700 for wait_s in refusals)
    assert broker.pttl("penstock:bucket:tenant:alice") <= 700_000


def test_forged_sums_are_right_again(client: Client, own: Server, broker: redis.Redis) -> None:
    """What is held is counted anew by workers; until then a forged sum can refuse others."""
    second = broker.time()[0]
    worker = announced.worker("w", started_at=second, units_per_s={"minilm": 1000.0})
    broker.hset(WORKERS_KEY, "w", f"{second}\n{worker.to_json()}")
    broker.hset(f"penstock:load:{QUEUE}", "held:0", "999999999 9999999999999 1")
    with pytest.raises(QueueDelayError):
        client.submit_embed(["a"], model="minilm", deadline_s=30)

    leases = Leases(redis.Redis.from_url(own.broker_url))
    leases.queues.add(QUEUE)
    leases.start()
    try:
        eventually(lambda: not broker.hexists(f"penstock:load:{QUEUE}", "held:0"), within_s=30)
        client.submit_embed(["a"], model="minilm", deadline_s=30)
    finally:
        leases.close()


@pytest.mark.parametrize("garbage", ["nan", "inf", "-inf", "abc", "1e400", ""])
def test_garbage_in_a_queues_sums_stops_nobody(broker: redis.Redis, garbage: str) -> None:
    """Each field that senders may write is read as a number that can be counted with."""
    load = f"penstock:load:{QUEUE}"
    fields = [f"{kind}{level}" for kind in ("age:", "turn:", "held:", "") for level in (0, 3, 6, 9)]
    for list_ in (*LISTS, f"{LISTS[1]}\x06\x17alice", f"{LISTS[1]}\x06\x17bob"):
        broker.hset(load, mapping=dict.fromkeys(fields, garbage))
        for _ in range(3):
            run(broker, "push", *NO_LIMITS.arguments(), message("penstock.embed", [])[1], "", keys=(list_,))
    broker.hset(load, mapping=dict.fromkeys(fields, garbage))

    taken = [tag for n in range(18) for tag in pop(broker, f"one{n}", most=1)]
    for n, tag in enumerate(taken):
        run(broker, "ack", tag, f"one{n}")
    run(broker, "recount", keys=(QUEUE,))

    assert len(taken) == 18
    assert not broker.exists("unacked", *LISTS)
    assert garbage.encode() not in broker.hmget(load, [f"held:{level}" for level in (0, 3, 6, 9)])
