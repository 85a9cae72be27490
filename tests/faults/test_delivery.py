"""Whatever dies, every job runs, and hardly any runs twice."""

import base64
import json
import os
import random
import signal
import time
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest
import redis
from celery import Celery, chord, group

from penstock.keys import UNTOLD_KEY
from penstock.scripts import push_arguments, script
from tests.deployment import Server
from tests.eventually import eventually
from tests.faults.fleet import APP, LEASE_S, Fleet, Worker, message

N_KILLS = 12


def two_ready(workers: list[Worker]) -> bool:
    """Say whether one of them can be killed."""
    return sum(worker.is_ready for worker in workers) > 1


@pytest.mark.parametrize("n_jobs", [60, 1], ids=["busy", "idle"])
def test_kill_9_loses_nothing(fleet: Fleet, n_jobs: int) -> None:
    """A dozen workers are killed, under load or as the one job arrives: every job runs."""
    fleet.start(3)
    sent: list[str] = []
    killed = 0
    while killed < N_KILLS:
        living = [worker for worker in fleet.workers if worker.process.poll() is None]
        ready = [worker for worker in living if worker.is_ready]
        if len(ready) < 2:
            eventually(partial(two_ready, living), within_s=40)
            continue
        for _ in range(n_jobs):
            sent.append(f"j{len(sent)}")
            fleet.push(sent[-1], 0.02 if n_jobs > 1 else 0)
        time.sleep(random.uniform(0, 0.1 if n_jobs > 1 else 0.004))  # where in its work it is hit
        random.choice(ready).kill()
        killed += 1
        fleet.start(1, wait=False)

    fleet.wait_for(sent)

    assert fleet.dead() == []
    again = sum(fleet.runs().values()) - len(sent)
    assert again <= 4 * N_KILLS  # no more than a killed worker can have held


def test_takeover_takes_two_leases_at_most(fleet: Fleet) -> None:
    """The job of a killed worker begins in another within two leases."""
    first, second = fleet.start(2)
    fleet.push("job", 60)
    eventually(lambda: fleet.ran_in("job"))
    owner, other = (first, second) if fleet.ran_in("job") == [first.pid] else (second, first)

    owner.kill()
    died = time.monotonic()
    eventually(lambda: len(fleet.ran_in("job")) == 2, within_s=3 * LEASE_S)

    assert time.monotonic() - died <= 2 * LEASE_S
    assert fleet.ran_in("job") == [owner.pid, other.pid]


def test_a_hung_worker_loses_its_job(fleet: Fleet) -> None:
    """A process whose engine makes no progress renews nothing, takes nothing, and another takes over."""
    first, second = fleet.start(2)
    fleet.push("job", 60)
    (owner,) = eventually(lambda: fleet.ran_in("job"))

    (fleet.folder / f"hung-{owner}").touch()
    eventually(lambda: len(fleet.ran_in("job")) == 2, within_s=3 * LEASE_S)
    fleet.push("next")
    eventually(lambda: fleet.ran_in("next"))

    assert {*fleet.ran_in("job")} == {first.pid, second.pid}
    assert owner not in fleet.ran_in("next")


def test_a_worker_that_was_stopped_touches_nothing_of_the_next_owner(fleet: Fleet) -> None:
    """A worker that was stopped for longer than its lease neither acknowledges nor renews what it lost."""
    first, second = fleet.start(2)
    fleet.push("job", 5)
    eventually(lambda: fleet.ran_in("job"))
    stopped, owner = (first, second) if fleet.ran_in("job") == [first.pid] else (second, first)

    stopped.signal(signal.SIGSTOP)
    eventually(lambda: len(fleet.ran_in("job")) == 2, within_s=3 * LEASE_S)
    stopped.signal(signal.SIGCONT)
    # The first has finished, and would have acknowledged by now.
    eventually(lambda: fleet.book.sismember("done", f"job {stopped.pid}"), within_s=6)
    eventually(lambda: "taken over" in stopped.log)
    n_held = fleet.n_held()
    owner.kill()

    assert n_held == 1
    eventually(lambda: len(fleet.ran_in("job")) == 3, within_s=3 * LEASE_S)
    assert fleet.ran_in("job")[-1] == stopped.pid


def test_killed_connections_neither_lose_nor_repeat(fleet: Fleet) -> None:
    """All connections are cut 15 times under load: every job runs, once."""
    workers = fleet.start(2)
    sent: list[str] = []
    for _ in range(15):
        for _ in range(30):
            sent.append(f"j{len(sent)}")
            fleet.push(sent[-1], 0.02)
        fleet.redis.client_kill_filter(_type="normal", skipme=True)
        time.sleep(0.2)  # work goes on between two cuts

    fleet.wait_for(sent, within_s=30)

    assert set(fleet.runs().values()) == {1}
    assert all(worker.process.poll() is None for worker in workers)


def test_a_restarted_broker_loses_nothing(fleet: Fleet) -> None:
    """The broker is killed three times under load, once for longer than a lease: workers live, jobs run."""
    workers = fleet.start(2)
    sent: list[str] = []
    for away_s in (0.3, 1.5 * LEASE_S, 0.3):
        for _ in range(40):
            sent.append(f"j{len(sent)}")
            fleet.push(sent[-1], 0.1)
        eventually(lambda: len(fleet.runs()) > len(sent) - 35, within_s=15)
        fleet.broker.kill()
        time.sleep(away_s)
        fleet.broker.start()

    fleet.wait_for(sent, within_s=40)

    assert all(worker.process.poll() is None for worker in workers)
    again = sum(fleet.runs().values()) - len(sent)
    assert again <= 3 * 8  # no more than what both held


def test_a_full_broker_is_worked_off(fleet: Fleet, own: Server) -> None:
    """At its memory limit the broker refuses new jobs; the waiting ones run, and then it takes some again."""
    fleet.settings["broker_url"] = own.broker_url
    (worker,) = fleet.start()
    names = [f"j{i}" for i in range(20)]
    with redis.Redis.from_url(own.broker_url) as broker:
        push = broker.register_script(script("push"))
        for name in names:
            push(*push_arguments("celery", message(f"{APP}.work", [name, 0.3])[1]))
        broker.config_set("maxmemory", 1)

        with pytest.raises(redis.OutOfMemoryError):
            push(*push_arguments("celery", "refused"))
        eventually(lambda: fleet.n_done() == len(names) and not broker.hlen("unacked"), within_s=15)
        broker.config_set("maxmemory", 0)
        push(*push_arguments("celery", message(f"{APP}.work", ["next"])[1]))
        eventually(lambda: fleet.runs()["next"])

    assert set(fleet.runs().values()) == {1}
    assert worker.process.poll() is None


def test_sigterm_requeues_at_once(fleet: Fleet) -> None:
    """What a worker has not begun is at the front of the queue again while what it runs goes on."""
    (worker,) = fleet.start(1, "-c", "1", "--prefetch-multiplier", "3")
    ids = [fleet.push(name, 4) for name in ("running", "second", "third", "waiting")]
    eventually(lambda: fleet.n_held() == 3)

    worker.signal(signal.SIGTERM)
    eventually(lambda: fleet.n_held() == 1, within_s=2)
    waiting = [json.loads(entry)["headers"]["id"] for entry in fleet.redis.lrange("celery", 0, -1)[::-1]]

    assert sorted(waiting[:2]) == sorted(ids[1:3])
    assert waiting[2:] == ids[3:]
    assert worker.process.wait(10) == 0
    assert fleet.n_held() == 0
    assert fleet.runs() == {"running": 1}
    assert fleet.redis.hgetall("penstock:lost") == {ids[1].encode(): b"0", ids[2].encode(): b"0"}


def test_a_job_that_kills_workers_is_given_up(fleet: Fleet) -> None:
    """After four deliveries it is a dead letter, and its sender is told, once."""
    fleet.start(5, "-c", "1")

    job_id = fleet.push("bad", task="die")
    (letter,) = eventually(fleet.dead, within_s=30)
    told = eventually(lambda: fleet.book.lrange("told", 0, -1))

    assert fleet.runs()["bad"] == 4
    assert (letter["id"], letter["queue"], letter["n_deliveries"]) == (job_id, "celery", 4)
    assert letter["reason"] == "delivered 4 times, no worker finished it"
    assert json.loads(letter["message"])["headers"]["id"] == job_id
    assert told == [f"{job_id} 4".encode()]
    eventually(lambda: not fleet.redis.exists(UNTOLD_KEY))
    fleet.push("good")
    fleet.wait_for(["good"])


def test_garbage_stops_no_worker(fleet: Fleet) -> None:
    """What is not a message becomes a dead letter; what comes behind it runs."""
    _, good = message(f"{APP}.work", ["good"])
    envelope = json.loads(good)
    garbage = [
        b"",
        b"\xff\xfe\x00garbage",
        b"{",
        b"[]",
        b"3",
        b'{"properties": {}}',
        b"[" * 100_000,
        json.dumps({**envelope, "properties": "text"}).encode(),
        json.dumps({**envelope, "body": "not base64"}).encode(),
        json.dumps({**envelope, "headers": ["a", "list"]}).encode(),
    ]
    (worker,) = fleet.start()

    fleet.redis.lpush("celery", *garbage, *garbage, good)
    fleet.wait_for(["good"])

    letters = fleet.dead()
    assert worker.process.poll() is None
    found = [
        letter["message"].encode() if "message" in letter else base64.b64decode(letter["message_base64"])
        for letter in letters
    ]
    assert sorted(found) == sorted(garbage * 2)
    assert sum(letter["reason"] == "not a message" for letter in letters) >= 18


def test_delayed_jobs_wait_in_redis(fleet: Fleet, sender: Celery) -> None:
    """200 delayed jobs: none is held by a worker, and although one dies all run once and on time."""
    first, _ = fleet.start(2)
    due = time.time() + 4
    due_at = {f"j{i}": due + i / 200 for i in range(200)}
    for name, at in due_at.items():
        sender.send_task(f"{APP}.work", (name,), eta=datetime.fromtimestamp(at, UTC))

    n_delayed, n_held = fleet.redis.zcard("penstock:due"), fleet.n_held()
    first.kill()
    fleet.wait_for(due_at)

    late = [at - due_at[name] for name, at in fleet.began_at().items()]
    assert (n_delayed, n_held) == (200, 0)
    assert set(fleet.runs().values()) == {1}
    assert min(late) >= 0
    assert max(late) <= 30  # a second on an idle machine; the lease of the one that died has to run out


def test_delayed_jobs_of_foreign_senders_wait_in_redis(fleet: Fleet) -> None:
    """A message that a stock producer put in the list before it is due is not held either."""
    fleet.start()
    due = datetime.now(UTC) + timedelta(seconds=3)
    _, raw = message(f"{APP}.work", ["job"], eta=due.isoformat())

    fleet.redis.lpush("celery", raw)
    eventually(lambda: fleet.redis.zcard("penstock:due") == 1 and not fleet.n_held())
    fleet.wait_for(["job"])

    assert 0 <= fleet.began_at()["job"] - due.timestamp() <= 30


def test_a_slow_queue_takes_no_place_of_another(fleet: Fleet) -> None:
    """Jobs of one queue fill their own places only; those of another run meanwhile in the same process."""
    fleet.start(1, "-c", "2", "-Q", "slow,fast")
    for i in range(10):
        fleet.push(f"slow{i}", 6, queue="slow")
    eventually(lambda: fleet.runs().total() == 2)

    for i in range(20):
        fleet.push(f"fast{i}", queue="fast")
    began = time.monotonic()
    eventually(lambda: sum(name.startswith("fast") for name in fleet.runs()) == 20)

    assert time.monotonic() - began < 4
    eventually(lambda: fleet.n_held() == 2, within_s=1)
    assert fleet.redis.llen("slow") == 8


@pytest.mark.parametrize("offset_s", [3600, -3600])
def test_the_workers_clock_does_not_matter(fleet: Fleet, tmp_path: Path, offset_s: int) -> None:
    """A worker whose clock is an hour off keeps its jobs, takes none from others, runs delayed ones."""
    shift = f"import time\nreal = time.time\ntime.time = lambda: real() + {offset_s}\n"
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(shift)
    _, wrong = (
        fleet.start(2, wait=False)[0],
        fleet.start(1, PYTHONPATH=f"{tmp_path / 'site'}:{os.environ.get('PYTHONPATH', '')}")[0],
    )
    eventually(lambda: all(worker.is_ready for worker in fleet.workers), within_s=40)
    due = datetime.now(UTC) + timedelta(seconds=2)
    _, delayed = message(f"{APP}.work", ["delayed"], eta=due.isoformat())

    names = [f"j{i}" for i in range(12)]  # all places of all three
    for name in names:
        fleet.push(name, 2.5 * LEASE_S)
    fleet.redis.lpush("celery", delayed)
    fleet.wait_for([*names, "delayed"])

    assert set(fleet.runs().values()) == {1}
    assert wrong.pid in {pid for name in names for pid in fleet.ran_in(name)}


def test_foreign_messages_are_found_by_an_idle_worker(fleet: Fleet) -> None:
    """A plain LPUSH wakes nobody, and is found all the same: workers look every second."""
    fleet.start()
    for i in range(3):
        began = time.monotonic()
        fleet.redis.lpush("celery", message(f"{APP}.work", [f"j{i}"])[1])
        eventually(partial(fleet.ran_in, f"j{i}"))
        assert time.monotonic() - began <= 3


def test_a_delayed_task_sees_when_it_was_due(fleet: Fleet, sender: Celery) -> None:
    """`request.eta` is what the sender wrote, though Celery does not wait for it."""
    fleet.start()
    due = datetime.now(UTC) + timedelta(seconds=1)

    delayed, at_once = sender.send_task(f"{APP}.when", eta=due), sender.send_task(f"{APP}.when")

    assert datetime.fromisoformat(delayed.get(timeout=60)) == due
    assert at_once.get(timeout=60) is None


def test_celery_features_work(fleet: Fleet, sender: Celery) -> None:
    """Chains, groups, chords, retries, delays, revokes and remote control do what Celery documents."""
    fleet.start(2)

    def add(*numbers: int) -> object:
        return sender.signature(f"{APP}.add", numbers)

    total = sender.signature(f"{APP}.total")
    chained = (add(1, 2) | add(3) | add(4)).apply_async()  # type: ignore[operator]
    grouped = group([add(i, i) for i in range(5)], app=sender).apply_async()
    summed = chord([add(i, i) for i in range(5)], app=sender)(total)
    retried = sender.send_task(f"{APP}.third_time", ("third",))
    revoked = sender.send_task(f"{APP}.work", ("revoked",), countdown=2)
    delayed = sender.send_task(f"{APP}.add", (1, 1), countdown=2.5)
    sender.control.revoke(revoked.id)

    assert chained.get(timeout=10) == 10
    assert grouped.get(timeout=10) == [0, 2, 4, 6, 8]
    assert summed.get(timeout=10) == 20
    assert retried.get(timeout=10) == 2
    assert delayed.get(timeout=10) == 2
    assert fleet.runs()["third"] == 3
    assert fleet.runs()["revoked"] == 0
    assert len(sender.control.ping(timeout=20, limit=2)) == 2
    assert len(sender.control.inspect(timeout=20, limit=2).stats()) == 2
