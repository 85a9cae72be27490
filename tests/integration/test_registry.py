"""What workers announce: who wins, and what is forgotten."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import redis

from penstock.keys import ANNOUNCED_KEY, MODELS_KEY, RESULTS_KEY, TENANTS_KEY, WORKERS_KEY
from penstock.registry import BEAT, Announcement, Registry
from tests import announced
from tests.deployment import Server

INFO = announced.worker("cpu@host:1:a", models=("m",))
WEEK_S = 7 * 86_400


class Told:
    """A worker that beats when it is asked to."""

    def __init__(self, server: redis.Redis, name: str, values: Mapping[str, str], *others: str) -> None:
        self._script = server.register_script(BEAT)
        self._info = replace(INFO, id=name)
        self._told = Announcement(values={"results": "/1", **values}, others=others, queues=["cpu.m"])
        self.version = "new"

    def beat(self) -> bool:
        """Beat as a worker does; returns whether something had to be written again."""
        with_values = self.version == "new"
        while True:
            arguments = self._told.arguments(self._info, self.version, with_values=with_values)
            *_, version, is_asked = self._script(keys=self._told.keys(), args=arguments)
            self.version = version.decode()
            if not is_asked:
                return with_values
            with_values = True


@pytest.fixture
def broker(own: Server) -> redis.Redis:
    """Return a connection to an empty server."""
    return redis.Redis.from_url(own.broker_url)


def age(broker: redis.Redis, seconds: float) -> None:
    """Let time pass for what was announced, and for workers."""
    for entry, text in broker.hgetall(ANNOUNCED_KEY).items():
        *version, seen = text.split()
        broker.hset(ANNOUNCED_KEY, entry, b" ".join([*version, b"%d" % (int(seen) - seconds)]))
    for worker, text in broker.hgetall(WORKERS_KEY).items():
        second, _, info = text.partition(b"\n")
        broker.hset(WORKERS_KEY, worker, b"%d\n%s" % (int(second) - seconds, info))


def test_the_last_that_became_ready_wins_and_nobody_writes_in_turn(broker: redis.Redis) -> None:
    """In a rolling update workers of two settings beat beside each other; entries of the newer ones stay."""
    old = Told(broker, "old", {"model:m": '{"v": 1}'})
    new = Told(broker, "new", {"model:m": '{"v": 22}'})
    assert [old.beat(), new.beat()] == [True, True]

    writes = [worker.beat() for _ in range(5) for worker in (old, new)]

    assert broker.hget(MODELS_KEY, "m") == b'{"v": 22}'
    assert not any(writes)


def test_after_a_loss_the_last_that_became_ready_wins_again(broker: redis.Redis) -> None:
    """Whoever beats first writes; the newest has the last word, and then nobody writes."""
    old, new = Told(broker, "old", {"model:m": "1"}), Told(broker, "new", {"model:m": "22"})
    old.beat()
    new.beat()
    broker.flushall()

    assert [old.beat(), new.beat(), old.beat(), new.beat()] == [True, True, False, False]
    assert broker.hget(MODELS_KEY, "m") == b"22"
    assert broker.get(RESULTS_KEY) == b"/1"
    assert broker.smembers("_kombu.binding.cpu.m") == {b"cpu.m\x06\x16\x06\x16cpu.m"}


def test_a_server_clock_that_was_set_back_changes_nothing(broker: redis.Redis) -> None:
    """A version is later than all before, whatever the clock says."""
    broker.hset(MODELS_KEY, "m", "0")
    broker.hset(ANNOUNCED_KEY, "model:m", "99999999999999 9999999999")
    Told(broker, "new", {"model:m": "1"}).beat()

    assert broker.hget(MODELS_KEY, "m") == b"1"


def test_a_tenant_that_left_the_settings_loses_its_terms(broker: redis.Redis) -> None:
    """A minute after the last worker that knew it; those of others stay."""
    Told(broker, "old", {"tenant:alice": "3 10", "tenant:bob": "1 1"}).beat()
    new = Told(broker, "new", {"tenant:bob": "2 2"})
    age(broker, 30)
    new.beat()
    assert broker.hgetall(TENANTS_KEY) == {b"alice": b"3 10", b"bob": b"2 2"}

    age(broker, 61)
    new.beat()

    assert broker.hgetall(TENANTS_KEY) == {b"bob": b"2 2"}
    assert b"tenant:alice" not in broker.hkeys(ANNOUNCED_KEY)


def test_thousands_of_models_and_tenants_are_announced(broker: redis.Redis) -> None:
    """A worker's settings may name more than Lua passes to one command, 8,000; all are there, also again."""
    tenants = {f"tenant:t{n}": f"{n + 1} 0" for n in range(9000)}
    worker = Told(broker, "large", {**tenants, "model:m": "1"}, *(f"other{n}" for n in range(9000)))
    assert [worker.beat(), worker.beat()] == [True, False]
    broker.delete(TENANTS_KEY, ANNOUNCED_KEY)

    assert worker.beat()

    assert broker.hlen(TENANTS_KEY) == 9000
    assert broker.hget(TENANTS_KEY, "t8999") == b"9000 0"


def test_a_model_that_left_the_settings_is_forgotten_after_a_week(broker: redis.Redis) -> None:
    """One that some worker's settings have stays, though nobody serves it."""
    Told(broker, "old", {"model:gone": "1", "model:resting": "2"}).beat()
    new = Told(broker, "new", {"model:m": "3"}, "resting")
    age(broker, WEEK_S - 100)
    new.beat()
    assert sorted(broker.hkeys(MODELS_KEY)) == [b"gone", b"m", b"resting"]

    age(broker, 200)
    new.beat()

    assert sorted(broker.hkeys(MODELS_KEY)) == [b"m", b"resting"]


def test_models_of_workers_of_an_earlier_version_stay(broker: redis.Redis) -> None:
    """They do not say what they know; as long as they live, what they serve is known."""
    new, second = Told(broker, "new", {"model:m": "3"}), broker.time()[0]
    broker.hset(MODELS_KEY, mapping={"theirs": "1", "nobodys": "2"})
    new.beat()
    age(broker, WEEK_S + 100)
    broker.hset(
        WORKERS_KEY, "theirs", f"{second}\n{replace(INFO, id='theirs', models=('theirs',)).to_json()}"
    )

    new.beat()

    assert sorted(broker.hkeys(MODELS_KEY)) == [b"m", b"theirs"]


def entries(n: int, age_s: int) -> Callable[[redis.Redis], Mapping[str, str]]:
    """Return what makes entries of workers that were killed."""
    return lambda broker: {
        f"cpu@host:{i}": f"{broker.time()[0] - age_s}\n{replace(INFO, id=f'cpu@host:{i}').to_json()}"
        for i in range(n)
    }


@pytest.mark.parametrize(
    ("make", "n_left"),
    [
        (entries(5000, age_s=86_400), 0),
        (entries(5000, age_s=60), 100),
        (entries(50, age_s=60), 50),
        (entries(50, age_s=-600), 0),  # the server's clock was set back
        (lambda _: {"a": "", "b": "no time", "c": "\n", "d": "x\n{}"}, 0),
    ],
)
def test_entries_of_killed_workers_are_bounded(
    broker: redis.Redis, make: Callable[[redis.Redis], Mapping[str, str]], n_left: int
) -> None:
    """Those silent for ten minutes go, and of the others all but the last hundred; the living stay."""
    broker.hset(WORKERS_KEY, mapping=dict(make(broker)))
    broker.hset(WORKERS_KEY, "other", f"{broker.time()[0]}\n{INFO.to_json()}")

    Told(broker, "living", {}).beat()

    assert broker.hlen(WORKERS_KEY) == n_left + 2
    assert {b"living", b"other"} <= set(broker.hkeys(WORKERS_KEY))


def test_entries_that_cannot_be_read_hide_no_others() -> None:
    """One broken entry must not cost all clients the registry."""
    good = INFO.to_json().encode()
    broken = {b"a": b"", b"b": b"x\n{}", b"c": b"1\n[]", b"d": b"1\n{}", b"e": b"1\n" + good}

    read = Registry.read({b"m": b"[]", b"\xff": b"{}", b"n": b"{"}, broken, None, 2.0)

    assert read.models == {}
    assert [worker.id for worker, _ in read.workers] == [INFO.id]
