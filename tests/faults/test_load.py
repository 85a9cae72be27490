"""What queues are said to hold is what they hold, whatever is done to them and whoever dies."""

import json
import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import kombu.transport
import pytest
import redis
from celery import Celery
from kombu import Connection

from penstock import (
    Client,
    DeadlineExceededError,
    QueueDelayError,
    RateLimitError,
    ResultTimeoutError,
    WaitPolicy,
)
from penstock.bucket import RETRIES
from penstock.keys import DEAD_KEY, MODELS_KEY, WORKERS_KEY
from penstock.many import TEXTS_PER_WORKER, UNREAD
from penstock.request import PoolName
from penstock.routing import BATCH_S
from penstock.scripts import push_arguments, script
from penstock_workers.delivery.polling import pop_arguments
from penstock_workers.delivery.transport import install
from tests import announced
from tests.deployment import Server
from tests.eventually import eventually
from tests.faults.fleet import LEASE_S, Fleet, message
from tests.faults.light import MODEL, LightWorker

QUEUE: Final = "cpu.minilm"
LISTS: Final = (QUEUE, *(f"{QUEUE}\x06\x16{level}" for level in (3, 6, 9)))
PARTS: Final = tuple(f"{name}\x06\x17{tenant}" for name in LISTS for tenant in ("a", "b"))


@pytest.fixture
def light(own: Server, tmp_path: Path) -> LightWorker:
    """A worker without torch, not started."""
    return LightWorker(tmp_path, own)


def level_of(name: str) -> str:
    """Return the level of a list."""
    base, _, tenant = name.partition("\x06\x17")
    return (base.partition("\x06\x16")[2] or "0") + ("+" if tenant else "")


def cost_of(raw: bytes) -> tuple[int, bool]:
    """Return tokens, and whether the sender told them."""
    try:
        told = json.loads(raw)["properties"].get("cost")
    except ValueError:
        told = None
    return (-(-len(raw) // 4), False) if told is None else (told, True)


def recount(client: redis.Redis) -> dict[str, tuple[int, ...]]:
    """Return what the counters of the queue should be, from the messages themselves."""
    found: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0, 0])

    def add(what: str, n_tokens: int, raw: bytes) -> None:
        found[what] = [sum(pair) for pair in zip(found[what], (1, n_tokens, len(raw)), strict=True)]

    for name in (*LISTS, *PARTS):
        raws: Any = client.lrange(name, 0, -1)
        for raw in raws:
            n_tokens, is_told = cost_of(raw)
            if is_told or name in PARTS:
                add(level_of(name), n_tokens, raw)
    held: Any = client.hgetall("unacked")
    for tag, raw in held.items():
        lease: Any = client.hget("penstock:leases", tag)
        _, source, *_ = lease.decode().split("\n")
        add(f"held:{level_of(source)[0]}", cost_of(raw)[0], raw)
    return {name: tuple(sums) for name, sums in found.items()}


def counters(client: redis.Redis, queue: str = QUEUE) -> dict[str, tuple[int, ...]]:
    """Return jobs, tokens and bytes by level, and of what is held."""
    found: Any = client.hgetall(f"penstock:load:{queue}")
    return {
        name.decode(): tuple(map(int, sums.split()))
        for name, sums in found.items()
        if not name.startswith((b"age:", b"turn:"))
    }


SCRIPTS = (
    "push",
    "pop",
    "ack",
    "requeue",
    "undo_pop",
    "delay",
    "retry",
    "dead_letter",
    "revive",
    "take_over",
    "move_due",
)


class Life:
    """Does something to the queue, at random."""

    def __init__(self, client: redis.Redis, seed: int) -> None:
        self.client, self.random = client, random.Random(seed)
        self._scripts = {name: client.register_script(script(name)) for name in SCRIPTS}
        self._n_pops = 0
        self.held: list[tuple[bytes, str]] = []

    def run(self, name: str, *arguments: Any, keys: tuple[str, ...] = ()) -> Any:
        """Run one of the scripts."""
        return self._scripts[name](keys=keys, args=arguments)

    def message(self) -> bytes:
        """Return a message, of our senders or of others."""
        _, raw = message("penstock.embed", ["x" * self.random.randrange(200)], queue=QUEUE)
        if self.random.random() < 0.3:
            return raw
        envelope = json.loads(raw)
        envelope["properties"]["cost"] = self.random.randrange(1, 5000)
        return json.dumps(envelope).encode()

    def push(self) -> None:
        """Send one or several."""
        keys, arguments = push_arguments(
            self.random.choice(LISTS + PARTS), *(self.message() for _ in range(self.random.randrange(1, 4)))
        )
        self.run("push", *arguments, keys=tuple(keys))

    def push_late(self) -> None:
        """Send one that is due soon."""
        due_at = self.client.time()[0] + self.random.choice((0, 1, 5))
        keys, arguments = push_arguments(self.random.choice(LISTS + PARTS), self.message(), due_at=due_at)
        self.run("push", *arguments, keys=tuple(keys))

    def push_foreign(self) -> None:
        """Send as others do, whose messages say no cost."""
        self.client.lpush(self.random.choice(LISTS), message("penstock.embed", [], queue=QUEUE)[1])
        if self.random.random() < 0.1:
            self.client.lpush(self.random.choice(LISTS), b"garbage")

    def pop(self) -> None:
        """Take some."""
        self._n_pops += 1
        token, most = f"worker/{self._n_pops}", self.random.randrange(1, 6)
        arguments = pop_arguments(
            token,
            lease_s=60,
            most=most,
            prefetch=[most],
            token_budgets=[self.random.choice((None, 100, 1000))],
            held=[(0, 0)] * len(LISTS),
            share=self.random.choice((1, 2)),
        )
        reply = self.run("pop", *arguments, keys=LISTS)
        self.held += [(tag, token) for tag in reply[1::6]]

    def some(self) -> list[Any]:
        """Return tags and tokens of some that are held, or were."""
        self.random.shuffle(self.held)
        n = self.random.randrange(1, 4)
        chosen, self.held = self.held[:n], self.held[n:]
        return [value for pair in chosen for value in pair]

    def ack(self) -> None:
        """Be done with some."""
        self.run("ack", *self.some())

    def requeue(self) -> None:
        """Return some."""
        self.run("requeue", self.random.randrange(2), *self.some())

    def undo_pop(self) -> None:
        """Return all of a pop whose reply was lost."""
        self.run("undo_pop", f"worker/{self.random.randrange(1, self._n_pops + 2)}")

    def delay(self) -> None:
        """Delay one."""
        for pair in self.some()[:2] and [self.some()[:2]]:
            if pair:
                self.run("delay", *pair, self.client.time()[0] + 1)

    def retry(self) -> None:
        """Put one off."""
        if pair := self.some()[:2]:
            self.run("retry", *pair, 1, 100, 200, keys=("penstock:bucket:retries",))

    def dead_letter(self) -> None:
        """Give one up."""
        if pair := self.some()[:2]:
            raw: Any = self.client.hget("unacked", pair[0])
            letter = {"message": raw.decode(errors="replace")} if raw else {}
            self.run("dead_letter", *pair, json.dumps(letter), 0, 60)

    def revive(self) -> None:
        """Put a dead letter back, or die between the two steps of it."""
        entries: Any = self.client.lrange(DEAD_KEY, 0, -1)
        if entries:
            entry = self.random.choice(entries)
            raw = json.loads(entry).get("message", "{}")
            tag = self.run("revive", entry, raw, self.random.choice(LISTS + PARTS), "people/1", 60)
            if tag and self.random.random() < 0.7:
                self.run("requeue", 0, tag, "people/1")

    def die(self) -> None:
        """Let some leases run out, and take them over."""
        tags: Any = self.client.zrange("unacked_index", 0, -1)
        for tag in tags:
            if self.random.random() < 0.3:
                self.client.zadd("unacked_index", {tag: 1})
        self.client.hset("penstock:sweep", mapping={"last": self.client.time()[0], "from": 0})
        reply = self.run("take_over", 60, 4, 100, "sweeper/1")
        self.held += [(tag, "sweeper/1") for tag in reply[2::4]]

    def move_due(self) -> None:
        """Let what is due go on."""
        self.run("move_due", 10)

    def purge(self) -> None:
        """Empty a list as kombu does, which knows nothing of counters; then somebody sends."""
        key = self.random.choice(LISTS)
        self.client.delete(key)
        envelope = json.loads(message("penstock.embed", [], queue=QUEUE)[1])
        envelope["properties"]["cost"] = 7
        self.run("push", *push_arguments(key, json.dumps(envelope))[1], keys=(key,))

    def step(self) -> str:
        """Do one thing; return what."""
        often = [self.push, self.push, self.pop, self.pop, self.ack]
        seldom = [self.push_late, self.push_foreign, self.requeue, self.undo_pop, self.delay]
        seldom += [self.dead_letter, self.retry]
        seldom += [self.revive, self.die, self.move_due, self.purge]
        deed: Callable[[], None] = self.random.choice(often if self.random.random() < 0.6 else seldom)
        deed()
        return deed.__name__


@pytest.mark.parametrize("seed", range(5))
def test_counters_never_drift(own: Server, seed: int) -> None:
    """After each of hundreds of deeds, in any order, the counters are what a recount finds."""
    with redis.Redis.from_url(own.broker_url) as client:
        life = Life(client, seed)
        for n in range(400):
            deed = life.step()
            assert counters(client) == recount(client), (n, deed)
        while life.held or any(client.llen(name) for name in (*LISTS, *PARTS)):
            life.pop()
            life.ack()
        left: Any = client.keys("penstock:[tp][ua]*")

    assert left == []  # nobody's turn, when nobody waits


def test_nothing_is_left_when_workers_were_killed(fleet: Fleet, sender: Celery) -> None:
    """Workers die at work, under a load of jobs whose costs are told: the counters end where they began."""
    fleet.start(3)
    sent = [f"j{n}" for n in range(150)]
    for n, name in enumerate(sent):
        sender.send_task("tests.integration.noop_app.work", (name, 0.05), priority=(0, 3, 9)[n % 3])
    for _ in range(3):
        eventually(lambda: fleet.n_held() > 2)
        next(worker for worker in fleet.workers if worker.process.poll() is None).kill()
        fleet.start(1, wait=False)

    fleet.wait_for(sent, within_s=40)

    eventually(lambda: counters(fleet.redis, "celery") == {}, within_s=3 * LEASE_S)


def test_the_wait_is_predicted_from_load_and_speed(own: Server) -> None:
    """Tokens that go before a new job, over what the ready workers do together; urgent ones wait less."""
    with redis.Redis.from_url(own.broker_url) as client, Client(own.broker_url) as sender:
        announce(client, tokens_per_s=100.0, n_workers=2)
        idle = sender.estimate("minilm")
        sender.submit_many([["x" * 39] * 10] * 4, model="minilm", priority="default")
        sender.submit_embed(["x" * 399], model="minilm", priority="batch")
        push = partial(sender.estimate, "minilm")
        found = {name: push(priority=name) for name in ("interactive", "default", "batch")}

    assert (idle.predicted_wait_s, idle.jobs, idle.workers) == (0.0, 0, 2)
    waits = {name: each.predicted_wait_s for name, each in found.items()}
    assert waits == {"interactive": 0.0, "default": 2.0 - BATCH_S, "batch": 2.5 - BATCH_S}
    assert (found["batch"].jobs, found["batch"].tokens, found["batch"].tokens_per_s) == (5, 500, 200.0)
    assert str(found["batch"]) == "cpu.minilm: 2.40 s, 500 tokens before it, 200 tokens/s of 2 workers"


def announce(
    client: redis.Redis,
    *,
    tokens_per_s: float | None,
    n_workers: int = 1,
    pool: PoolName = "cpu",
    **limits: Any,
) -> None:
    """Put a model and its workers into the registry; nobody works."""
    info = announced.model(dim=3, max_tokens=None, max_texts=16)
    client.hset(MODELS_KEY, "minilm", info.to_json())
    for n in range(n_workers):
        speed = {"minilm": tokens_per_s} if tokens_per_s else {}
        worker = announced.worker(f"{pool}{n}", pid=n, pool=pool, units_per_s=speed)
        client.hset(WORKERS_KEY, worker.id, f"{client.time()[0] + 3600}\n{worker.to_json()}")
    if limits:
        client.hset(MODELS_KEY, "minilm", replace(info, **limits).to_json())


@pytest.mark.parametrize(
    ("limits", "exceeded"),
    [
        ({"max_waiting_jobs": 4}, "jobs"),
        ({"max_waiting_tokens": 450}, "tokens"),
        ({"max_waiting_bytes": 4000}, "bytes"),
    ],
)
def test_a_full_queue_takes_all_or_nothing(own: Server, limits: dict[str, int], exceeded: str) -> None:
    """What exceeds a limit is refused as a whole, with the time until it fits, and leaves no trace."""
    with redis.Redis.from_url(own.broker_url) as client, Client(own.broker_url) as sender:
        announce(client, tokens_per_s=100.0, **limits)
        first = sender.submit_many([["x" * 399]] * 3, model="minilm")  # 100 tokens each
        before, records = counters(client), n_records(own)

        with pytest.raises(QueueDelayError) as caught:
            sender.submit_many([["x" * 399]] * 2, model="minilm")
        after = counters(client), n_records(own)
        client.delete(*LISTS)
        sender.submit_many([["x" * 399]] * 9, model="minilm")  # an empty queue takes anything

    assert len(first) == 3
    assert after == (before, records)
    assert (caught.value.exceeded, caught.value.predicted_wait_s) == (exceeded, 3.0)
    assert 0 < caught.value.retry_after_s <= 3
    assert caught.value.retryable


def n_records(own: Server) -> int:
    """Count the jobs that are known to have been sent."""
    with redis.Redis.from_url(own.results_url) as results:
        return len(results.keys("penstock:job:*"))  # type: ignore[arg-type]  # redis-py: sync or async


def test_a_wait_past_the_deadline_is_refused(own: Server) -> None:
    """Whoever would be answered too late hears it at once; without a known speed nothing is predicted."""
    with redis.Redis.from_url(own.broker_url) as client, Client(own.broker_url) as sender:
        announce(client, tokens_per_s=None)
        sender.submit_many([["x" * 399]] * 3, model="minilm", deadline_s=1)
        announce(client, tokens_per_s=10.0)
    with redis.Redis.from_url(own.broker_url) as client, Client(own.broker_url) as sender:
        sender.submit_embed(["x"], model="minilm", deadline_s=50)
        sender.submit_embed(["x"], model="minilm", deadline_s=10, priority="interactive")
        with pytest.raises(QueueDelayError) as caught:
            sender.embed(["x"], model="minilm", deadline_s=35)  # predicted to be just in time

    assert caught.value.exceeded == "deadline"
    assert caught.value.predicted_wait_s == pytest.approx(30.2)
    assert 2.29 < caught.value.retry_after_s < 5  # more by what passed since the call


def test_callers_can_wait_for_room(own: Server) -> None:
    """A policy tries again after what the server asks for, until there is room or no time left."""
    with redis.Redis.from_url(own.broker_url) as client, Client(own.broker_url) as sender:
        announce(client, tokens_per_s=1000.0, max_waiting_jobs=1)
        sender.submit_embed(["x" * 399], model="minilm")
        began = time.monotonic()
        with pytest.raises(QueueDelayError):
            sender.submit_embed(["x"], model="minilm", deadline_s=1, wait=WaitPolicy(attempts=None))
        gave_up_s = time.monotonic() - began  # without the deadline, 600
        waiting = threading.Timer(0.5, lambda: client.delete(*LISTS))
        waiting.start()
        job = sender.submit_embed(["x"], model="minilm", wait=WaitPolicy(attempts=None, base_s=0.2))
        waiting.join()

    assert job.id
    assert gave_up_s < 60


def test_retries_of_all_share_a_budget(own: Server) -> None:
    """When the cluster's retries are used up and none comes in time, the error is told instead."""
    with redis.Redis.from_url(own.broker_url) as client, Client(own.broker_url) as sender:
        announce(client, tokens_per_s=1000.0, max_waiting_jobs=1)
        sender.submit_embed(["x"], model="minilm")
        client.set(RETRIES.key, client.time()[0] + 3600)
        began = time.monotonic()

        with pytest.raises(QueueDelayError):
            sender.submit_embed(["x"], model="minilm", wait=WaitPolicy(attempts=None, base_s=0.1))

    assert time.monotonic() - began < 60  # with retries, 600


def test_many_texts_wait_for_room(light: LightWorker, own: Server) -> None:
    """`embed_many` paces itself where the queue takes less than it would send."""
    with light.running(), Client(own.broker_url) as sender:
        info = json.loads(light.book.hget(MODELS_KEY, MODEL) or b"")
        light.book.hset(MODELS_KEY, MODEL, json.dumps(info | {"max_waiting_jobs": 1}))
        parts = list(sender.embed_many((f"t{n} 0.01" for n in range(60)), model=MODEL, timeout_s=30))

    assert sum(map(len, parts)) == 60


def test_a_slow_first_job_does_not_hold_up_the_rest(own: Server, tmp_path: Path) -> None:
    """While one worker is at the oldest job, the other goes on, as far as results may wait to be read."""
    light, n_texts, n_read = LightWorker(tmp_path, own), 3000, 0

    def texts() -> Iterator[str]:
        nonlocal n_read
        for n_read in range(n_texts):
            yield f"t{n_read} 0" if n_read else "gate inf"

    with light.running(), LightWorker(tmp_path, own).running(), Client(own.broker_url) as sender:
        eventually(lambda: len(sender.registry().workers) == 2)
        rows: list[float] = []
        reader = threading.Thread(
            target=lambda: rows.extend(
                float(v[0]) for part in sender.embed_many(texts(), model=MODEL) for v in part
            )
        )
        reader.start()
        most = 2 * TEXTS_PER_WORKER  # under way, of two workers
        eventually(lambda: light.runs().total() > most + most // 2, within_s=30)
        eventually(lambda: n_read >= UNREAD * most - 16, within_s=30)
        time.sleep(0.5)
        assert n_read <= UNREAD * most + 16
        assert not rows
        light.book.set("gate", 1)
        reader.join(60)

    assert len(rows) == n_texts
    assert rows[0] == float("inf")
    assert not any(rows[1:])


def test_many_texts_whose_worker_hangs_time_out(light: LightWorker, own: Server) -> None:
    """The time counts from the last job that ended; what is under way is taken back."""
    with light.running(), Client(own.broker_url) as sender:
        parts = sender.embed_many(["a 0.1"] * 16 + ["b 0.1"] * 16 + ["gate inf"], model=MODEL, timeout_s=2.5)
        assert [len(next(parts)) for _ in range(2)] == [16, 16]
        with pytest.raises(ResultTimeoutError):
            next(parts)
        light.book.set("gate", 1)
        eventually(lambda: not light.n_held(), within_s=10)


def order(client: redis.Redis, n: int) -> list[str]:
    """Take messages one by one; return the part of the queue that each came from."""
    pop = client.register_script(script("pop"))
    taken = []
    for number in range(n):
        held = [(0, 0)] * len(LISTS)
        arguments = pop_arguments(
            f"w/{number}", lease_s=60, most=1, prefetch=[1], token_budgets=[None], held=held, share=1
        )
        name, tag, *_ = pop(keys=LISTS, args=arguments)
        taken.append(name.decode().removeprefix(QUEUE))
        client.register_script(script("ack"))(args=[tag, f"w/{number}"])
    return taken


def costly(n_tokens: int) -> bytes:
    """Return a message of this cost."""
    envelope = json.loads(message("penstock.embed", [], queue=QUEUE)[1])
    envelope["properties"]["cost"] = n_tokens
    return json.dumps(envelope).encode()


def send(client: redis.Redis, key: str, n: int, n_tokens: int) -> None:
    """Push messages of one cost."""
    keys, arguments = push_arguments(key, *(costly(n_tokens) for _ in range(n)))
    client.register_script(script("push"))(keys=keys, args=arguments)


def test_tenants_take_turns_by_tokens(own: Server) -> None:
    """One who sends 1,000 jobs does not hold back one who sends ten; a share of 3 is three times as much."""
    default = f"{QUEUE}\x06\x163"
    bulk, small, big = (f"{default}\x06\x17{name}" for name in ("bulk", "small", "big"))
    with redis.Redis.from_url(own.broker_url) as client:
        send(client, bulk, 1000, 100)
        order(client, 50)
        send(client, small, 10, 100)
        fair = order(client, 20)
        client.hset("penstock:tenants", "big", "3 0")
        send(client, big, 100, 200)
        send(client, default, 100, 50)
        shares = order(client, 90)

    assert fair.count("\x06\x163\x06\x17small") >= 9
    tokens = {name: shares.count(name.removeprefix(QUEUE)) for name in (bulk, big, default)}
    assert tokens[big] * 200 == pytest.approx(3 * tokens[bulk] * 100, rel=0.15)
    assert tokens[default] * 50 == pytest.approx(tokens[bulk] * 100, rel=0.15)


def test_a_tenant_is_not_better_off_one_by_one(own: Server) -> None:
    """Who sends the next large job when the one before was taken gets no more than their share of tokens."""
    with redis.Redis.from_url(own.broker_url) as client:
        patient, eager = (f"{QUEUE}\x06\x17{name}" for name in ("patient", "eager"))
        send(client, patient, 200, 100)
        taken = []
        for _ in range(110):
            if not client.llen(eager):
                send(client, eager, 1, 1000)
            taken += order(client, 1)

    n_eager = taken.count("\x06\x17eager")
    assert n_eager * 1000 == pytest.approx((len(taken) - n_eager) * 100, rel=0.2)


def test_nothing_starves_behind_urgent_jobs(own: Server) -> None:
    """However many urgent jobs wait, of eight tokens one is for the level behind; urgent ones go first."""
    default, batch = (f"{QUEUE}\x06\x16{level}" for level in (3, 6))
    with redis.Redis.from_url(own.broker_url) as client:
        send(client, batch, 20, 500)
        send(client, default, 100, 500)
        send(client, QUEUE, 400, 500)
        taken = order(client, 200)

    assert taken[:10] == [""] * 10
    counts = {name: taken.count(name) for name in ("", "\x06\x163", "\x06\x166")}
    assert counts[""] > 150
    assert counts["\x06\x163"] >= 15
    assert counts["\x06\x166"] >= 10


def test_a_tenant_may_send_so_much(own: Server) -> None:
    """Above its tokens per minute a tenant is told when to come again; others are not concerned."""
    with redis.Redis.from_url(own.broker_url) as client, Client(own.broker_url) as sender:
        announce(client, tokens_per_s=None)
        client.hset("penstock:tenants", "noisy", "1 10")
        sender.submit_embed(["x" * 2399], model="minilm", tenant="noisy")
        records = n_records(own)
        with pytest.raises(RateLimitError) as caught:
            sender.submit_embed(["x" * 399], model="minilm", tenant="noisy")
        left = n_records(own) - records
        sender.submit_embed(["x" * 399], model="minilm", tenant="other")
        lengths = [client.llen(f"{QUEUE}\x06\x163\x06\x17{name}") for name in ("noisy", "other")]

    assert (caught.value.tenant, left, lengths) == ("noisy", 0, [1, 1])
    assert 5 < caught.value.retry_after_s <= 10  # less by what passed since the first job


def test_a_tenant_waits_for_its_own_jobs(own: Server) -> None:
    """The wait that is predicted for a small tenant is not that of the bulk beside it."""
    with redis.Redis.from_url(own.broker_url) as client, Client(own.broker_url) as sender:
        announce(client, tokens_per_s=100.0)
        sender.submit_many([["x" * 399]] * 50, model="minilm", tenant="bulk")
        sender.submit_embed(["x" * 399], model="minilm", tenant="small")
        waits = [sender.estimate("minilm", tenant=name).predicted_wait_s for name in ("bulk", "small", None)]

    assert waits == [51.0 - BATCH_S, 2.0 - BATCH_S, 0.0]


def test_celery_sends_and_counts_for_tenants(own: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A header names the tenant; lengths and purge take its messages along."""
    monkeypatch.setattr(kombu.transport, "TRANSPORT_ALIASES", dict(kombu.transport.TRANSPORT_ALIASES))
    monkeypatch.setattr(kombu.transport, "_transport_cache", {})
    install()
    with redis.Redis.from_url(own.broker_url) as client, Connection(own.broker_url) as connection:
        queue = connection.SimpleQueue("q")
        for tenant in ("a", "b", None, "not a name"):
            headers = {"task": "t", **({"tenant": tenant} if tenant else {})}
            queue.put({}, headers=headers)
        lengths = [client.llen(key) for key in ("q", "q\x06\x17a", "q\x06\x17b")]
        n_waiting, n_dropped = queue.qsize(), queue.clear()
        left: Any = client.keys("*penstock:[lt]*")

    assert (lengths, n_waiting, n_dropped, left) == ([2, 1, 1], 4, 4, [])


def test_a_late_job_tells_where_its_time_went(light: LightWorker, own: Server) -> None:
    """A job that waited behind others until its deadline says so, and is not computed."""
    with light.running(), Client(own.broker_url) as sender:
        slow = sender.submit_embed(["slow inf"], model=MODEL)
        eventually(lambda: light.runs()["slow"])
        late = sender.submit_embed(["late 0"], model=MODEL, deadline_s=1)
        deadline = time.time() + 1
        eventually(lambda: light.n_held() == 2 and time.time() > deadline)
        light.book.set("slow", "over")
        with pytest.raises(DeadlineExceededError, match=r"late for its deadline by .* \(queued") as caught:
            late.result(timeout_s=10)
        slow.result(timeout_s=10)

    assert set(caught.value.timings) == {"queued_s", "prepared_s", "batched_s", "computed_s"}
    assert sum(caught.value.timings.values()) > 1
    assert caught.value.timings["batched_s"] > 0
    assert caught.value.timings["computed_s"] == 0
    assert not light.runs()["late"]


def test_jobs_overflow_where_the_wait_is_shorter(own: Server) -> None:
    """The second pool takes what would wait longer in the first, until it would not; it is counted."""
    with redis.Redis.from_url(own.broker_url) as client, Client(own.broker_url) as sender:
        announce(client, tokens_per_s=100.0, pool="gpu", pools=("gpu", "cpu"))
        announce(client, tokens_per_s=50.0, pool="cpu", pools=("gpu", "cpu"))
        for _ in range(30):
            sender.submit_embed(["x" * 199], model="minilm")  # 50 tokens
        lengths = [client.llen(f"{pool}.minilm\x06\x163") for pool in ("gpu", "cpu")]
        spilled = client.hget("penstock:load:cpu.minilm", "spilled")
        client.delete("gpu.minilm\x06\x163")
        eventually(lambda: sender.estimate("minilm").queue == "gpu.minilm", within_s=5)

    waits = [lengths[0] * 50 / 100, lengths[1] * 50 / 50]
    assert waits[0] - waits[1] == pytest.approx(1.0, abs=1.1)
    assert sum(lengths) == 30
    assert int(spilled or 0) == lengths[1] > 5


def test_a_count_that_fails_refuses_nothing(own: Server) -> None:
    """Jobs that were sent to the second pool are sent, also where they cannot be counted."""
    with redis.Redis.from_url(own.broker_url) as client, Client(own.broker_url) as sender:
        announce(client, tokens_per_s=1.0, pool="gpu", pools=("gpu", "cpu"))
        announce(client, tokens_per_s=1.0, pool="cpu", pools=("gpu", "cpu"))
        client.execute_command("ACL", "SETUSER", "default", "-hincrby")
        for _ in range(2):
            sender.submit_embed(["x" * 199], model="minilm")
        lengths = [client.llen(f"{pool}.minilm\x06\x163") for pool in ("gpu", "cpu")]

    assert lengths == [1, 1]
