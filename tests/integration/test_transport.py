import asyncio
import inspect
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import kombu.transport
import pytest
import redis
import redis.asyncio as aioredis
from celery import Celery
from kombu import Connection, Consumer, Exchange, Queue
from kombu.transport import redis as kombu_redis
from kombu.transport import virtual

from penstock import transport as named
from penstock.errors import ConfigError
from penstock.keys import DEAD_KEY, UNTOLD_KEY, queue_key
from penstock.scripts import NO_LIMITS, push_arguments, script
from penstock_workers.command.local_redis import free_port, wait_until_ready
from penstock_workers.delivery import transport
from penstock_workers.delivery.held import Lease
from penstock_workers.delivery.leases import Leases
from penstock_workers.delivery.polling import pop_arguments
from tests.deployment import Server, server_command
from tests.eventually import eventually
from tests.faults.fleet import message

SEPARATOR = "\x06\x16"

# What the transport uses of kombu's insides, with the arguments that it relies on.
INTERNALS: list[tuple[Any, str, tuple[str, ...]]] = [
    (kombu.transport, "TRANSPORT_ALIASES", ()),
    (kombu.transport, "_transport_cache", ()),
    (virtual.QoS, "append", ("message", "delivery_tag")),
    (virtual.QoS, "ack", ("delivery_tag",)),
    (virtual.QoS, "reject", ("delivery_tag", "requeue")),
    (virtual.QoS, "can_consume", ()),
    (virtual.QoS, "can_consume_max_estimate", ()),
    (virtual.QoS, "restore_unacked", ()),
    (virtual.QoS, "restore_unacked_once", ("stderr",)),
    (virtual.QoS, "restore_visible", ()),
    (virtual.QoS, "prefetch_count", ()),
    (virtual.Message, "delivery_tag", ()),
    (virtual.Channel, "basic_consume", ("queue", "no_ack", "callback", "consumer_tag")),
    (virtual.Channel, "basic_get", ("queue", "no_ack")),
    (virtual.Channel, "_get_message_priority", ("message", "reverse")),
    (kombu_redis.Channel, "_basic_cancel", ("consumer_tag",)),
    (kombu_redis.Channel, "_brpop_start", ("timeout",)),
    (kombu_redis.Channel, "_brpop_read", ()),
    (kombu_redis.Channel, "_on_connection_disconnect", ("connection",)),
    (kombu_redis.Channel, "_flush_brpop_reauth", ()),
    (kombu_redis.Channel, "_put", ("queue", "message")),
    (kombu_redis.Channel, "_queue_bind", ("exchange", "routing_key", "pattern", "queue")),
    (kombu_redis.Channel, "_refresh_bindings", ("queues",)),
    (kombu_redis.Channel, "_has_queue", ("queue",)),
    (kombu_redis.Channel, "_fanout_queues", ()),
    (kombu_redis.Channel, "_q_for_pri", ("queue", "pri")),
    (kombu_redis.Channel, "_maybe_update_queues_expire", ("client", "queue")),
    (kombu_redis.Channel, "_get_pool", ()),
    (kombu_redis.Channel, "_in_poll", ()),
    (kombu_redis.Channel, "_brpop_sent_at", ()),
    (kombu_redis.Channel, "active_queues", ()),
    (kombu_redis.Channel, "conn_or_acquire", ()),
    (kombu_redis.Channel, "from_transport_options", ()),
    (kombu_redis.Channel, "priority_steps", ()),
    (kombu_redis.Channel, "sep", ()),
    (kombu_redis.Channel, "close", ()),
    (kombu_redis.SentinelChannel, "from_transport_options", ()),
    (kombu_redis.PublishBatch, "add", ("name",)),
    (kombu_redis.Transport, "brpop_timeout", ()),
    (kombu_redis.MultiChannelPoller, "on_readable", ("fileno",)),
]


@pytest.fixture
def broker(monkeypatch: pytest.MonkeyPatch) -> Iterator[redis.Redis]:
    """A Valkey for one test, and kombu's aliases as they were afterwards; this is no Celery worker."""
    monkeypatch.setattr(kombu.transport, "TRANSPORT_ALIASES", dict(kombu.transport.TRANSPORT_ALIASES))
    monkeypatch.setattr(kombu.transport, "_transport_cache", {})
    monkeypatch.delitem(sys.modules, "celery.worker.state", raising=False)
    transport.install()
    with Server(free_port()).running() as server, redis.Redis.from_url(server.broker_url) as client:
        yield client


@pytest.fixture
def connect(broker: redis.Redis) -> Iterator[Callable[..., Connection]]:
    """Open connections of kombu to that broker."""
    port = broker.connection_pool.connection_kwargs["port"]
    opened: list[Connection] = []

    def connection(**options: Any) -> Connection:
        opened.append(Connection(f"redis://127.0.0.1:{port}/0", transport_options={"lease_s": 1, **options}))
        return opened[-1]

    yield connection
    for each in opened:
        if each.default_channel.has_leased:
            each.default_channel.leases.close()
        each.release()


@pytest.fixture
def process(broker: redis.Redis) -> Iterator[Callable[..., Leases]]:
    """Make the leases of what stands for one process each; none is started."""
    made: list[Leases] = []

    def leases(**options: Any) -> Leases:
        pool = redis.ConnectionPool(**broker.connection_pool.connection_kwargs)
        made.append(Leases(redis.Redis(connection_pool=pool), lease_s=1, **options))
        return made[-1]

    yield leases
    for each in made:
        each.close()


def run(client: redis.Redis, name: str, *arguments: str | bytes | float, keys: tuple[str, ...] = ()) -> Any:
    """Run one of the scripts."""
    return client.register_script(script(name))(keys=keys, args=arguments)


def pop(client: redis.Redis, token: str, queue: str = "q", most: int = 10, lease_s: float = 1) -> list[Lease]:
    """Pop as a process does."""
    reply = run(client, "pop", *ask(token, most=most, lease_s=lease_s, share=1), keys=(queue,))
    return [
        Lease(
            tag=tag.decode(),
            token=token,
            queue=queue,
            level=0,
            tokens=n_tokens,
            n_lost=n_lost if n_lost >= 0 else None,
        )
        for _, tag, n_lost, _, n_tokens, _ in zip(*[iter(reply)] * 6, strict=True)
    ]


def ask(
    token: str, *, most: int = 10, lease_s: float = 1, n_queues: int = 1, n_lists: int = 0, **others: Any
) -> Any:
    """Return the arguments of a pop by a process that holds nothing."""
    return pop_arguments(
        token,
        lease_s=lease_s,
        most=most,
        prefetch=[most] * n_queues,
        token_budgets=[None] * n_queues,
        held=[(0, 0)] * (n_lists or n_queues),
        **others,
    )


def put(client: redis.Redis, *names: str, queue: str = "q") -> list[str]:
    """Put messages into a queue; return their ids."""
    made = [message("task", [name], queue=queue) for name in names]
    for _, raw in made:
        client.lpush(queue, raw)
    return [job_id for job_id, _ in made]


def lapse(client: redis.Redis) -> None:
    """Let all leases run out, as if their holders were gone for long, while others looked through them."""
    tags: Any = client.zrange("unacked_index", 0, -1)
    for tag in tags:
        client.zadd("unacked_index", {tag: 1})
    client.hset("penstock:sweep", mapping={"last": _now(client), "from": 0})


def _now(client: redis.Redis) -> float:
    second, microsecond = client.time()
    return float(second + microsecond / 1e6)


def drain(
    connection: Connection, names: list[str], n: int, *, prefetch: int = 0, ack: bool = True
) -> list[Any]:
    """Consume `n` messages; return them in the order they came."""
    got: list[Any] = []
    channel = connection.default_channel
    channel.basic_qos(0, prefetch, False)

    def take(message: Any) -> None:
        got.append(message)
        if ack:
            message.ack()

    with Consumer(channel, [Queue(name) for name in names], on_message=take, auto_declare=False):
        while len(got) < n:
            connection.drain_events(timeout=5)
    return got


def test_install_takes_the_names_of_kombu(broker: redis.Redis) -> None:
    """URLs stay as they are, also where kombu had looked up its own transport before."""
    kombu.transport.TRANSPORT_ALIASES["redis"] = "kombu.transport.redis:Transport"
    assert kombu.transport.get_transport_cls("redis") is kombu_redis.Transport

    transport.install()

    assert kombu.transport.get_transport_cls("redis") is transport.Transport
    assert kombu.transport.get_transport_cls("rediss") is transport.Transport
    assert kombu.transport.get_transport_cls("sentinel") is transport.SentinelTransport
    assert kombu.transport.get_transport_cls("penstock.transport:Transport") is transport.Transport


def test_an_app_names_the_transport_and_sends_over_it(broker: redis.Redis) -> None:
    """`broker_transport` takes the name that other programs have; kombu's own knows no tenants."""
    kombu.transport.TRANSPORT_ALIASES["redis"] = "kombu.transport.redis:Transport"
    app = Celery(broker=f"redis://127.0.0.1:{broker.connection_pool.connection_kwargs['port']}/0")
    app.conf.broker_transport = "penstock.transport:Transport"
    with app:
        app.send_task("penstock.embed", kwargs={}, queue="q", headers={"tenant": "team-a"})

    assert broker.llen(queue_key("q", 0, "team-a")) == 1
    assert named.install is transport.install


@pytest.mark.parametrize(
    ("owner", "name", "arguments"), INTERNALS, ids=lambda value: getattr(value, "__name__", None)
)
def test_kombu_has_what_is_overridden(owner: Any, name: str, arguments: tuple[str, ...]) -> None:
    """A version of kombu that renames one of its insides is noticed here."""
    assert (
        hasattr(owner, name) or name in inspect.signature(owner.__init__).parameters or name == "delivery_tag"
    )
    if arguments:
        assert [
            word for word in inspect.signature(getattr(owner, name)).parameters if word in arguments
        ] == list(arguments)


def test_options_are_checked(connect: Callable[..., Connection]) -> None:
    """Options out of their range, and kombu's that have no effect here, are named all at once."""
    options = {"lease_s": 0.5, "max_deliveries": 0, "visibility_timeout": 60}
    with pytest.raises(ConfigError) as caught, connect() as connection:
        connection.clone(transport_options=options).connect()

    assert [problem.split(";")[0].split(":")[0] for problem in caught.value.problems] == [
        "transport option visibility_timeout",
        "lease_s is 0.5",
        "max_deliveries is 0",
    ]


def test_urgent_first_and_queues_in_turn(broker: redis.Redis, connect: Callable[..., Connection]) -> None:
    """Priority 0 comes before 9 in whatever queue; within a level queues take turns, each in its order."""
    for name in ("a", "b"):
        put(broker, *(f"{name}9-{i}" for i in range(2)), queue=f"{name}{SEPARATOR}9")
        put(broker, *(f"{name}0-{i}" for i in range(2)), queue=name)

    got = drain(connect(), ["a", "b"], 8)

    assert [each.payload[0][0] for each in got] == [
        *("a0-0", "b0-0", "a0-1", "b0-1"),
        *("a9-0", "b9-0", "a9-1", "b9-1"),
    ]


def test_put_fills_the_list_of_the_priority(broker: redis.Redis, connect: Callable[..., Connection]) -> None:
    """Messages lie where stock kombu puts them, so its size, Flower's lengths and its purge hold."""
    with connect() as connection:
        queue = connection.SimpleQueue("q")
        for priority in (0, 3, 3, 9):
            queue.put({}, priority=priority)
        lengths = [broker.llen(key) for key in ("q", f"q{SEPARATOR}3", f"q{SEPARATOR}9")]

        assert lengths == [1, 2, 1]
        assert queue.qsize() == 4
        assert queue.clear() == 4
        assert not broker.exists("q", f"q{SEPARATOR}3", f"q{SEPARATOR}9")
        queue.close()


def test_a_batch_of_messages_arrives(broker: redis.Redis, connect: Callable[..., Connection]) -> None:
    """Batch publishing goes through the same script."""
    with connect() as connection, connection.Producer() as producer, producer.batch(max_size=50):
        for i in range(120):
            producer.publish({"i": i}, routing_key="q", exchange="")

    assert broker.llen("q") == 120


async def _push_and_wait(url: str) -> tuple[int, Any]:
    async with aioredis.from_url(url) as client:
        push = client.register_script(script("push"))
        keys, arguments = push_arguments("q", b"message")
        n_waiting = await push(keys=keys, args=arguments)
        woken = await client.brpop(["penstock:wake:q"], timeout=1)
    return n_waiting, woken


def test_clients_push_in_one_round_trip(broker: redis.Redis) -> None:
    """The client's push queues the message and leaves a token for one idle worker."""
    url = f"redis://127.0.0.1:{broker.connection_pool.connection_kwargs['port']}/0"

    n_waiting, woken = asyncio.run(_push_and_wait(url))

    assert n_waiting == 1
    assert list(woken) == [b"penstock:wake:q", b"1"]
    assert broker.lrange("q", 0, -1) == [b"message"]


def test_wake_lists_stay_tiny(broker: redis.Redis) -> None:
    """A thousand messages that nobody takes leave one token, and that for two seconds."""
    for _ in range(1000):
        run(broker, "push", *NO_LIMITS.arguments(), "{}", "", keys=("q",))

    assert broker.llen("penstock:wake:q") == 1
    assert broker.pttl("penstock:wake:q") <= 2000


def test_prefetch_is_per_queue(broker: redis.Redis, connect: Callable[..., Connection]) -> None:
    """A queue whose places are taken leaves those of the other alone; what is acknowledged makes room."""
    put(broker, *"abcdef", queue="slow")
    connection = connect()
    channel = connection.default_channel
    held: list[Any] = []
    channel.basic_qos(0, 2, False)
    with Consumer(channel, [Queue("slow"), Queue("fast")], on_message=held.append, auto_declare=False):
        connection.drain_events(timeout=5)
        put(broker, "x", "y", "z", queue="fast")
        eventually(lambda: connection.drain_events(timeout=5) or len(held) == 4)
        at_most = len(held), channel.qos.can_consume()
        held[0].ack()
        connection.drain_events(timeout=5)

    assert at_most == (4, False)
    assert [each.payload[0][0] for each in held] == ["a", "b", "x", "y", "c"]
    channel.close()
    assert (broker.llen("slow"), broker.llen("fast")) == (5, 3)


def costly(client: redis.Redis, names: str, n_tokens: int, *, level: int = 0) -> None:
    """Put messages of this cost into the queue `q`."""
    for name in names:
        envelope = json.loads(message("task", [name], queue="q")[1])
        envelope["properties"]["cost"] = n_tokens
        run(client, "push", *NO_LIMITS.arguments(), json.dumps(envelope), "", keys=(queue_key("q", level),))


def test_tokens_are_bounded_level_by_level(
    broker: redis.Redis, connect: Callable[..., Connection], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a process cannot compute soon is left to others, but two jobs; urgent ones have a budget."""
    monkeypatch.setattr(transport.Transport, "brpop_timeout", 60)  # it is told, and does not look
    transport.install(token_budget=lambda _: 100)
    costly(broker, "abcd", 400, level=6)
    connection = connect()
    channel = connection.default_channel
    held: list[Any] = []
    channel.basic_qos(0, 32, False)

    def take(within_s: float = 0.3) -> str:
        n_before = len(held)
        with suppress(TimeoutError):
            while True:
                connection.drain_events(timeout=within_s)
                within_s = 0.3
        return "".join(each.payload[0][0] for each in held[n_before:])

    with Consumer(channel, [Queue("q")], on_message=held.append, auto_declare=False):
        taken = [take()]
        costly(broker, "uvwxyz", 30)
        taken.append(take(within_s=10))
        for each in held[:2]:
            each.ack()
        taken.append(take())
        for each in held[2:]:
            each.ack()
        taken.append(take(within_s=10))

    assert taken == ["ab", "uvwx", "", "yzc"]


def test_a_message_is_held_from_the_moment_it_is_popped(broker: redis.Redis) -> None:
    """After the pop it is in `unacked`, leased, and in no list; there is no step in between."""
    (job_id,) = put(broker, "job")

    (lease,) = pop(broker, "one/1")

    assert lease == Lease(tag=job_id, token="one/1", queue="q", level=0, tokens=lease.tokens, n_lost=None)
    assert (broker.llen("q"), broker.hkeys("unacked")) == (0, [job_id.encode()])
    left_s = (broker.zscore("unacked_index", job_id) or 0) - broker.time()[0]
    assert 0 <= left_s <= 2


def test_two_messages_of_one_tag_are_two(broker: redis.Redis) -> None:
    """A sender that pushed twice, or gives all its messages one tag, loses none."""
    _, raw = message("task", [])
    broker.lpush("q", raw, raw, raw)

    leases = pop(broker, "one/1")
    run(broker, "ack", leases[0].tag, "one/1")

    assert len({lease.tag for lease in leases}) == 3
    assert broker.hlen("unacked") == 2


@pytest.mark.parametrize("script", ["ack", "renew", "requeue", "delay", "dead_letter"])
def test_only_the_holder_may(broker: redis.Redis, script: str) -> None:
    """A process neither acknowledges, renews, requeues, delays nor dead-letters by a lease that it lost."""
    put(broker, "job")
    (lease,) = pop(broker, "one/1")
    lapse(broker)
    run(broker, "take_over", 1, 4, 10, "two/1")
    pop(broker, "one/2")
    before = broker.zrange("unacked_index", 0, -1, withscores=True)

    arguments: dict[str, tuple[str | float, ...]] = {
        "ack": (lease.tag, lease.token),
        "renew": (60, lease.tag, lease.token),
        "requeue": (1, lease.tag, lease.token),
        "delay": (lease.tag, lease.token, 9e9),
        "dead_letter": (lease.tag, lease.token, "{}", 0, 1),
    }
    run(broker, script, *arguments[script])

    assert broker.zrange("unacked_index", 0, -1, withscores=True) == before
    assert broker.hlen("unacked") == 1
    assert not broker.exists("q", DEAD_KEY, "penstock:due")


def test_nothing_is_left_of_an_acknowledged_message(broker: redis.Redis) -> None:
    """Also its count of lost leases goes, and a requeue counts none."""
    put(broker, "job")
    (lease,) = pop(broker, "one/1")
    run(broker, "requeue", 1, lease.tag, lease.token)
    (again,) = pop(broker, "one/2")
    lapse(broker)
    run(broker, "take_over", 1, 4, 10, "two/1")
    (last,) = pop(broker, "two/2")

    run(broker, "ack", last.tag, last.token)

    assert (again.n_lost, last.n_lost) == (0, 1)
    broker.delete("penstock:sweep", "penstock:wake:q")
    assert broker.keys() == []


def test_what_is_delayed_waits_for_its_share_of_all_retries(broker: redis.Redis) -> None:
    """Each is due after its own pause, and no more of them a second than the budget allows."""
    put(broker, *"abc")
    for lease in pop(broker, "one/1"):
        run(broker, "retry", lease.tag, lease.token, 5, 0.1, 1, keys=("bucket",))
        run(broker, "retry", lease.tag, "another", 5, 0.1, 1, keys=("bucket",))  # who holds nothing

    dues = [due for _, due in broker.zrange("penstock:due", 0, -1, withscores=True)]
    assert [round(due - _now(broker)) for due in dues] == [5, 15, 25]
    assert (broker.hvals("penstock:tries"), broker.hlen("unacked")) == ([b"1"] * 3, 0)


def test_no_takeover_right_after_the_server_was_away(broker: redis.Redis) -> None:
    """When nobody looked for long, holders get half a lease to renew before any is taken over."""
    put(broker, "job")
    (lease,) = pop(broker, "one/1", lease_s=0.01)
    eventually(lambda: broker.zcount("unacked_index", 0, _now(broker)))

    first = run(broker, "take_over", 60, 4, 10, "two/1")
    second = run(broker, "take_over", 60, 4, 10, "two/2")

    assert first == second == [0]
    assert broker.hlen("unacked") == 1
    assert run(broker, "renew", 60, lease.tag, lease.token) == []


def test_a_clock_that_was_set_back_keeps_nobody_from_a_takeover(broker: redis.Redis) -> None:
    """Leases that ended in an hour by the old clock end a lease from now, after holders could renew."""
    put(broker, "dead", "alive")
    dead, alive = pop(broker, "one/1", lease_s=3600)
    broker.hset("penstock:sweep", mapping={"last": _now(broker) + 3600, "from": _now(broker) + 3000})

    run(broker, "take_over", 1, 4, 10, "two/1")

    def is_taken_over() -> bool:
        run(broker, "renew", 60, alive.tag, alive.token)
        return run(broker, "take_over", 1, 4, 10, "two/2") == [1]

    eventually(is_taken_over, within_s=30)
    assert broker.hkeys("unacked") == [alive.tag.encode()]
    assert dead.tag.encode() in broker.lindex("q", -1)


def test_a_pop_leaves_half_to_others(broker: redis.Redis) -> None:
    """Jobs sent together are not all taken by the first; what is left goes before what is less urgent."""
    ids = put(broker, *"abcde") + put(broker, "later", queue="q\x06\x163")

    pops = [run(broker, "pop", *ask(f"one/{n}", n_lists=2), keys=("q", "q\x06\x163")) for n in range(4)]

    assert [len(reply) // 6 for reply in pops] == [3, 1, 2, 0]
    assert [tag.decode() for reply in pops for tag in reply[1::6]] == ids


def test_one_suspect_at_a_time(broker: redis.Redis) -> None:
    """Messages that two holders died with are taken one by one, so the guilty does not take others along."""
    put(broker, *"abc")
    for i in range(2):
        pop(broker, f"one/{i}")
        lapse(broker)
        run(broker, "take_over", 1, 4, 10, f"two/{i}")
    put(broker, "fresh", queue="other")

    reply = run(broker, "pop", *ask("three/1", n_queues=2, share=1), keys=("q", "other"))
    none = run(broker, "pop", *ask("three/2", n_suspects=0, share=1), keys=("q",))

    assert [bytes(source) for source in reply[::6]] == [b"q", b"other"]
    assert none == []
    assert broker.llen("q") == 2


def test_a_full_server_can_be_emptied(broker: redis.Redis) -> None:
    """At its memory limit the server refuses new messages, and lets the waiting ones be worked off."""
    put(broker, "job")
    broker.config_set("maxmemory-policy", "noeviction")
    broker.config_set("maxmemory", 1)

    with pytest.raises(redis.OutOfMemoryError):
        run(broker, "push", *NO_LIMITS.arguments(), "{}", "", keys=("q",))
    (lease,) = pop(broker, "one/1")
    theirs = run(broker, "ack", lease.tag, lease.token)

    assert theirs == []
    assert broker.hlen("unacked") == 0


def test_a_delayed_message_moves_when_it_is_due(broker: redis.Redis) -> None:
    """Redis' clock decides; equal messages stay apart, and the earliest is the next in its list."""
    now = _now(broker)
    put(broker, "waiting")
    run(broker, "push", *NO_LIMITS.arguments(), "late", now + 60, keys=("q",))
    run(broker, "push", *NO_LIMITS.arguments(), "past", now - 1, keys=("q",))
    for text, due in (("second", 0.06), ("same", 0.04), ("same", 0.05)):
        run(broker, "push", *NO_LIMITS.arguments(), text, now + due, keys=("q",))
    n_delayed = broker.zcard("penstock:due")

    eventually(lambda: broker.zcount("penstock:due", 0, _now(broker)) == 3)
    n_moved, wait_ms = run(broker, "move_due", 100)

    assert n_delayed == 4
    assert broker.lrange("q", -3, -1)[::-1] == [b"same", b"same", b"second"]
    assert broker.lindex("q", 0) == b"past"
    assert n_moved == 3
    assert 50_000 < wait_ms <= 60_000


def test_what_cannot_be_moved_stops_no_other(broker: redis.Redis) -> None:
    """A delayed message whose list is none, or that is none, waits on; the others go to their lists."""
    now = _now(broker)
    broker.set("no list", "a string")
    for key, text in (("no list", "a"), ("q", "b")):
        run(broker, "push", *NO_LIMITS.arguments(), text, now + 0.05, keys=(key,))
    broker.hset("penstock:delayed", "garbage", "no length")
    broker.zadd("penstock:due", {"garbage": 1})
    eventually(lambda: broker.zcount("penstock:due", 0, _now(broker)) == 3)

    _, wait_ms = run(broker, "move_due", 100)

    assert broker.lrange("q", 0, -1) == [b"b"]
    assert broker.hlen("penstock:delayed") == 2
    assert 50_000 < wait_ms <= 60_000


def test_a_foreign_queue_key_of_another_type_harms_nobody(broker: redis.Redis) -> None:
    """A string where a list should be is passed over; other queues are served."""
    broker.set("q", "not a list")
    put(broker, "job", queue="other")

    reply = run(broker, "pop", *ask("one/1", n_queues=2, share=1), keys=("q", "other"))

    assert reply[0] == b"other"


def test_what_stock_kombu_left_behind_is_a_dead_letter(
    broker: redis.Redis, process: Callable[..., Leases]
) -> None:
    """Messages of stock workers that died before the change are not ours to deliver, and are not lost."""
    broker.hset("unacked", "old", '[{"headers": {"id": "old"}}, "", "q"]')
    broker.zadd("unacked_index", {"old": broker.time()[0] - 4000})
    lapse_free = process()
    broker.hset("penstock:sweep", mapping={"last": broker.time()[0], "from": 0})

    lapse_free.start()
    (entry,) = eventually(lambda: broker.lrange(DEAD_KEY, 0, -1))

    assert json.loads(entry)["reason"] == "left behind by another transport"
    assert broker.hlen("unacked") == 0


def test_acknowledgements_survive_an_outage(broker: redis.Redis, process: Callable[..., Leases]) -> None:
    """What is acknowledged while the broker refuses everything is acknowledged when it answers again."""
    put(broker, "job")
    leases = process()
    (lease,) = pop(broker, leases.new_token())
    leases.held.add(lease)
    leases.start()
    broker.client_pause(1500, all=True)

    leases.ack(lease.id)
    knew_at_once = leases.settle(0.1)

    assert not knew_at_once
    assert leases.held.n_of("q") == 0
    assert leases.settle(5)
    assert broker.hlen("unacked") == 0


def test_held_leases_are_renewed_while_the_process_is_alive(
    broker: redis.Redis, process: Callable[..., Leases]
) -> None:
    """A lease that is held does not run out; it does once `is_alive` says no."""
    alive = threading.Event()
    alive.set()
    put(broker, "job")
    leases = process(is_alive=alive.is_set)
    (lease,) = pop(broker, leases.new_token())
    leases.held.add(lease)
    leases.start()
    first = broker.zscore("unacked_index", lease.tag) or 0

    eventually(lambda: (broker.zscore("unacked_index", lease.tag) or 0) > first + 1)
    alive.clear()

    eventually(lambda: broker.llen("q") == 1)
    assert not leases.is_healthy


def test_of_a_dead_letter_its_sender_hears_once(broker: redis.Redis, process: Callable[..., Leases]) -> None:
    """A teller that fails, or dies, is replaced by another process; one that succeeded by nobody."""
    told: list[tuple[str, str, int]] = []

    def fail(_: Any, n_deliveries: int) -> None:
        told.append(("first", "", n_deliveries))
        raise OSError

    def tell(message: Any, n_deliveries: int) -> None:
        told.append(("second", message["headers"]["id"], n_deliveries))

    (job_id,) = put(broker, "job")
    raw: Any = broker.lindex("q", 0)
    dying = process(on_dead=fail)
    (lease,) = pop(broker, dying.new_token())
    dying.held.add(lease)
    dying.start()
    dying.dead_letter(lease.id, raw, "a reason", must_notify=True)
    eventually(lambda: told)
    dying.close()
    others = [process(on_dead=tell) for _ in range(3)]
    for other in others:
        other.start()

    eventually(lambda: not broker.exists(UNTOLD_KEY))

    assert told == [("first", "", 1), ("second", job_id, 1)]
    (entry,) = broker.lrange(DEAD_KEY, 0, -1)
    letter = json.loads(entry)
    assert (letter["id"], letter["task"], letter["queue"], letter["reason"]) == (
        job_id,
        "task",
        "q",
        "a reason",
    )
    assert abs(letter["at"] - broker.time()[0]) < 10


def test_a_reply_that_came_too_late_is_checked(
    broker: redis.Redis, connect: Callable[..., Connection]
) -> None:
    """Messages whose leases ran out between pop and reply are not begun: another has them by then."""
    connection = connect()
    got: list[Any] = []
    with Consumer(connection.default_channel, [Queue("q")], on_message=got.append, auto_declare=False):
        put(broker, "job")
        connection.transport.cycle.on_poll_start()
        (tag,) = eventually(lambda: broker.hkeys("unacked"))
        lapse(broker)
        run(broker, "take_over", 1, 4, 10, "two/1")
        pop(broker, "two/2", lease_s=60)
        late = time.monotonic() + 0.6  # more than half a lease
        eventually(lambda: time.monotonic() > late)
        with suppress(TimeoutError):
            connection.drain_events(timeout=0.1)

    assert got == []
    assert broker.hget("penstock:leases", tag).startswith(b"two/2\nq\n")


def test_a_pop_whose_reply_is_lost_is_undone(broker: redis.Redis, connect: Callable[..., Connection]) -> None:
    """What a pop took when its connection broke is requeued at once, and not counted as a death."""
    connection = connect(lease_s=60)
    (job_id,) = put(broker, "job")
    with Consumer(connection.default_channel, [Queue("q")], on_message=print, auto_declare=False):
        connection.transport.cycle.on_poll_start()
        eventually(lambda: broker.hlen("unacked"))
        connection.default_channel.client.connection._sock.close()
        with suppress(OSError, redis.ConnectionError):
            connection.drain_events(timeout=0.1)
        connection.default_channel.client.connection.disconnect()

    eventually(lambda: broker.llen("q") == 1)
    assert broker.hgetall("penstock:lost") == {job_id.encode(): b"0"}


def test_a_place_that_becomes_free_is_filled_at_once(
    broker: redis.Redis, connect: Callable[..., Connection]
) -> None:
    """Also while the worker waits for another queue."""
    connection = connect()
    channel = connection.default_channel
    channel.basic_qos(0, 1, False)
    put(broker, *"ab", queue="full")
    held: list[Any] = []
    with Consumer(channel, [Queue("full"), Queue("empty")], on_message=held.append, auto_declare=False):
        connection.drain_events(timeout=5)
        with suppress(TimeoutError):
            connection.drain_events(timeout=0.1)  # waits for the empty one now
        began = time.monotonic()
        held[0].ack()
        connection.drain_events(timeout=5)

    assert time.monotonic() - began < 0.8  # it waits for 0.9 s
    assert [each.payload[0][0] for each in held] == ["a", "b"]


def test_a_lost_connection_requeues_nothing(
    broker: redis.Redis, connect: Callable[..., Connection], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a worker that goes on, a job outlives its connection, and is acknowledged without one."""
    import celery.worker.state as state

    monkeypatch.setitem(sys.modules, "celery.worker.state", state)
    put(broker, "job")
    connection = connect()
    (held,) = drain(connection, ["q"], 1, ack=False)
    leases = connection.default_channel.leases

    connection.default_channel.close()
    still = broker.hlen("unacked"), broker.llen("q"), leases.held.n_of("q")
    held.ack()

    assert still == (1, 0, 1)
    assert leases.settle()
    assert broker.hlen("unacked") == 0
    leases.close()


def test_a_worker_that_stops_requeues_what_it_holds(
    broker: redis.Redis, connect: Callable[..., Connection], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 0 is a reason to stop too; the oldest is the next one again."""
    import celery.worker.state as state

    monkeypatch.setitem(sys.modules, "celery.worker.state", state)
    monkeypatch.setattr(state, "should_stop", 0)
    ids = put(broker, *"abcd")
    connection = connect()
    drain(connection, ["q"], 3, prefetch=3, ack=False)
    leases = connection.default_channel.leases

    connection.default_channel.close()

    assert [json.loads(raw)["headers"]["id"] for raw in broker.lrange("q", 0, -1)[::-1]] == ids
    assert broker.hlen("unacked") == 0
    leases.close()


def test_rejected_messages_are_dropped_or_requeued_last(
    broker: redis.Redis, connect: Callable[..., Connection]
) -> None:
    """As in stock kombu on Redis; who gets one again sees that it was delivered before."""
    put(broker, *"abc")
    connection = connect()
    first, second, _ = drain(connection, ["q"], 3, ack=False)

    first.reject()
    second.requeue()
    eventually(lambda: broker.llen("q") == 1)
    (again,) = drain(connection, ["q"], 1)

    assert again.payload == second.payload
    assert (again.delivery_info["redelivered"], first.delivery_info.get("redelivered")) == (True, None)


def test_messages_can_be_fetched_one_by_one(broker: redis.Redis, connect: Callable[..., Connection]) -> None:
    """`basic_get` leases too, passes over garbage, and without acknowledgement just takes."""
    broker.lpush("q", "garbage")
    put(broker, *"ab")
    channel = connect().default_channel

    first = channel.basic_get("q")
    n_held = broker.hlen("unacked")
    first.ack()
    second = channel.basic_get("q", no_ack=True)

    assert (first.payload[0], second.payload[0], n_held >= 1) == (["a"], ["b"], True)
    assert channel.basic_get("q") is None
    eventually(lambda: broker.hlen("unacked") == 0 and broker.llen(DEAD_KEY) == 1)


def test_forgotten_scripts_are_loaded_again(broker: redis.Redis, connect: Callable[..., Connection]) -> None:
    """SCRIPT FLUSH, or a restart of the server, costs one round trip."""
    connection = connect()
    put(broker, "a")
    drain(connection, ["q"], 1)

    broker.script_flush()
    put(broker, "b")

    assert drain(connection, ["q"], 1)[0].payload[0] == ["b"]


def test_a_message_that_its_consumer_cannot_take_is_a_dead_letter(
    broker: redis.Redis, connect: Callable[..., Connection]
) -> None:
    """An error of the consumer's ends neither the loop nor the messages behind."""
    put(broker, *"abc")
    connection = connect()
    got: list[str] = []

    def take(each: Any) -> None:
        (name,) = each.payload[0]
        got.append(name)
        if name == "b":
            raise KeyError(name)
        each.ack()

    with Consumer(connection.default_channel, [Queue("q")], on_message=take, auto_declare=False):
        while len(got) < 3:
            connection.drain_events(timeout=5)

    assert got == ["a", "b", "c"]
    (entry,) = eventually(lambda: broker.lrange(DEAD_KEY, 0, -1))
    assert json.loads(entry)["reason"] == "refused: KeyError"


def test_sentinel_names_the_master(broker: redis.Redis, tmp_path: Path) -> None:
    """Messages go to the master, and so does the connection that looks after leases."""
    master, port = broker.connection_pool.connection_kwargs["port"], free_port()
    settings = tmp_path / "sentinel.conf"
    settings.write_text(f"port {port}\nbind 127.0.0.1\nsentinel monitor ours 127.0.0.1 {master} 1\n")
    server = server_command(port=port)[0]
    sentinel = subprocess.Popen([server, str(settings), "--sentinel"], stdout=subprocess.DEVNULL)
    try:
        wait_until_ready(f"redis://127.0.0.1:{port}", within_s=10)
        options = {"master_name": "ours", "lease_s": 1}
        urls = f"sentinel://127.0.0.1:{port}/0;sentinel://localhost:{port}/0"
        with Connection(urls, transport_options=options) as connection:
            with connection.Producer() as producer:
                producer.publish([["job"], {}, {}], routing_key="q", exchange="")
            (got,) = drain(connection, ["q"], 1, ack=False)
            leases = connection.default_channel.leases
            index: Any = broker.zrange("unacked_index", 0, -1, withscores=True)
            ((tag, held_until),) = index
            eventually(lambda: (broker.zscore("unacked_index", tag) or 0) > held_until)
            connection.maybe_switch_next()  # to the other sentinel of the same master
            assert connection.default_channel.leases is leases
            got.ack()
            assert leases.settle()
            leases.close()
    finally:
        sentinel.kill()
        sentinel.wait()

    assert broker.hlen("unacked") == 0


def test_broadcasts_go_on_working(broker: redis.Redis, connect: Callable[..., Connection]) -> None:
    """Fanout exchanges, which carry remote control and events, use neither leases nor lists."""
    exchange = Exchange("news", type="fanout")
    queues = [Queue("listener", exchange, exclusive=True, auto_delete=True)]
    got: list[Any] = []
    connection = connect()
    with Consumer(
        connection.default_channel, queues, callbacks=[lambda body, _: got.append(body)], no_ack=True
    ):
        with suppress(TimeoutError):
            connection.drain_events(timeout=0.2)  # subscribes
        with connect() as other, other.Producer() as producer:
            producer.publish({"hello": 1}, exchange=exchange, declare=[exchange])
            eventually(lambda: connection.drain_events(timeout=2) or got)

    assert got == [{"hello": 1}]
    assert not connection.default_channel.has_leased
