"""Who gets the workers, when more is sent than they can do: tenants, priorities, pools, processes.

Real workers, one text a batch: a process ends texts in the order in which it begins them, so that order is
what is looked at, and no clock.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from penstock import Client, Job, JobState, RateLimitError, WaitPolicy
from penstock.request import PoolName, PriorityName
from penstock_workers.delivery.polling import FEWEST_JOBS
from tests.deployment import Server
from tests.eventually import eventually
from tests.faults.fleet import Worker
from tests.faults.light import MODEL, LightWorker

LETTERS = 400
"""Of a costly text: it is said to have 100 tokens."""


@pytest.fixture
def light(own: Server, tmp_path: Path) -> LightWorker:
    """A worker, not started."""
    return LightWorker(tmp_path, own)


@contextmanager
def held_up(light: LightWorker, sender: Client) -> Iterator[None]:
    """Keep the worker from its other jobs while the block sends them.

    It has so many tokens that the worker does not learn from it to be slow: by that it says what is due when.
    """
    gate = "gate".ljust(60 * LETTERS, "-")
    sender.submit_embed([f"{gate} inf"], model=MODEL, priority="interactive")
    eventually(lambda: light.runs()[gate])
    yield
    light.book.set(gate, "open")


def send(sender: Client, name: str, n: int, nap_s: float = 0.005, **options: Any) -> list[Job[Any]]:
    """Send jobs of one costly text each, all in one step."""
    texts = [[f"{name}{number:03}".ljust(LETTERS, "-") + f" {nap_s}"] for number in range(n)]
    return sender.submit_many(texts, model=MODEL, **options)


def answered(*groups: list[Job[Any]]) -> None:
    """Return when all are."""
    for job in (job for jobs in groups for job in jobs):
        job.result(timeout_s=20)


def order(light: LightWorker) -> list[str]:
    """Return the groups of the texts in the order in which they ran."""
    return [name.rstrip("-").rstrip("0123456789") for name, _ in light.in_order()]


def test_a_small_tenant_does_not_wait_for_a_large_one(light: LightWorker, own: Server) -> None:
    """Who sends five jobs behind another's 200 waits for about five of these; so does who comes later."""
    with light.running(), Client(own.broker_url) as sender:
        with held_up(light, sender):
            bulk = send(sender, "bulk", 200, tenant="bulk")
            small = send(sender, "small", 5, tenant="small")
        eventually(lambda: light.runs().total() > 50)
        late = send(sender, "late", 5, tenant="late")
        n_before = light.runs().total()
        answered(bulk, small, late)

    ran = order(light)
    small_at, late_at = ([at for at, name in enumerate(ran) if name == group] for group in ("small", "late"))
    # What the process holds goes before: up to 0.1 s of work.
    assert small_at[-1] <= 2 * 5 + 2 * FEWEST_JOBS + 20
    assert late_at[-1] <= n_before + 2 * 5 + 40
    assert len(ran) == 1 + 200 + 5 + 5


def test_shares_decide_who_gets_more(own: Server, tmp_path: Path) -> None:
    """A tenant with a share of 3 gets three times as much as one with 1, while both have jobs waiting."""
    shares = {"PENSTOCK_TENANTS__BIG__SHARE": "3", "PENSTOCK_TENANTS__PLAIN__SHARE": "1"}
    light = LightWorker(tmp_path, own, environment=shares)
    with light.running(), Client(own.broker_url) as sender:
        with held_up(light, sender):
            plain = send(sender, "plain", 150, tenant="plain")
            big = send(sender, "big", 150, tenant="big")
        answered(plain, big)

    both = order(light)[60:160]
    assert both.count("big") == pytest.approx(3 * both.count("plain"), rel=0.2)


def test_a_tenant_may_send_so_much_a_minute(own: Server, tmp_path: Path) -> None:
    """Above it a call is refused, at once or until there is an allowance again; others are not concerned."""
    light = LightWorker(tmp_path, own, environment={"PENSTOCK_TENANTS__NOISY__TOKENS_PER_MINUTE": "6000"})
    with light.running(), Client(own.broker_url) as sender:
        spent = send(sender, "spent", 60, nap_s=0, tenant="noisy")
        with pytest.raises(RateLimitError) as caught:
            send(sender, "refused", 1, nap_s=0, tenant="noisy")
        other = send(sender, "other", 1, nap_s=0, tenant="quiet")
        later = send(sender, "later", 1, nap_s=0, tenant="noisy", wait=WaitPolicy(attempts=None))
        answered(spent, other, later)

    assert caught.value.tenant == "noisy"
    assert 0 < caught.value.retry_after_s <= 2
    counts = {name: order(light).count(name) for name in ("spent", "refused", "other", "later")}
    assert counts == {"spent": 60, "refused": 0, "other": 1, "later": 1}


def test_urgent_jobs_go_first(light: LightWorker, own: Server) -> None:
    """What was sent last goes first if it is more urgent; but what the worker has at hand keeps it busy."""
    levels: tuple[PriorityName, ...] = ("batch", "default", "interactive")
    with light.running(), Client(own.broker_url) as sender:
        with held_up(light, sender):
            jobs = [send(sender, level, 10, priority=level) for level in levels]
        answered(*jobs)

    ran = order(light)
    ends = [len(ran) - ran[::-1].index(level) for level in levels]
    assert ends == sorted(ends, reverse=True)
    assert ran[: ends[2]].count("default") <= FEWEST_JOBS
    assert ran[: ends[1]].count("batch") <= FEWEST_JOBS


def test_a_flow_of_urgent_jobs_starves_nothing(light: LightWorker, own: Server) -> None:
    """Of eight tokens that pass it, one is for the level behind: its jobs end long before the flow does."""
    with light.running(), Client(own.broker_url) as sender:
        with held_up(light, sender):
            batch = send(sender, "batch", 10, priority="batch")
            urgent = send(sender, "urgent", 300, priority="interactive")
        answered(batch, urgent)

    ran = order(light)
    batch_at = [at for at, name in enumerate(ran) if name == "batch"]
    assert 40 < batch_at[FEWEST_JOBS] < 150  # those before were at hand
    assert batch_at[-1] < 250


def test_jobs_go_where_the_wait_is_shorter(own: Server, tmp_path: Path) -> None:
    """While the first pool's worker is stopped the second answers, and is counted; then the first again."""
    pools: tuple[PoolName, ...] = ("gpu", "cpu")
    gpu, cpu = (LightWorker(tmp_path, own, pool=pool, pools=pools) for pool in pools)
    with gpu.running() as first, Client(own.broker_url) as sender:
        answered(send(sender, "warm", 10, nap_s=0.02))
        with cpu.running() as second:
            eventually(lambda: is_known(sender, "cpu") and sender.registry().tokens_per_s(MODEL, "gpu"))
            stop(first)
            jobs = [job for n in range(150) for job in send(sender, f"job{n}x", 1, nap_s=0.02)]
            eventually(lambda: cpu.in_order()[10:] and not cpu.book.llen("cpu.light\x06\x163"))
            there = [job for job in jobs if job.state() == JobState.SUCCEEDED]
            first.signal(signal.SIGCONT)
            answered(jobs)
            table = run_cli(own, "queues", "--json")
            eventually(lambda: sender.estimate(MODEL).queue == "gpu.light")
            answered(send(sender, "back", 1))
    *ran, (last, last_pid) = gpu.in_order()
    n_there = sum(pid == second.pid for _, pid in ran)
    spilled = {queue["queue"]: queue["spilled"] for queue in json.loads(table)}
    assert (last.startswith("back"), last_pid) == (True, first.pid)
    assert len(ran) == 10 + 150
    assert spilled == {"gpu.light": 0, "cpu.light": n_there}
    assert n_there >= len(there) > 20


def is_known(sender: Client, pool: PoolName) -> bool:
    """Say whether clients know of a worker there."""
    return sender.registry().ready_workers(MODEL, pool) == 1


def stop(worker: Worker) -> None:
    """Stop a process, and return when it stands still."""
    worker.signal(signal.SIGSTOP)
    state = Path(f"/proc/{worker.pid}/stat")
    eventually(lambda: state.read_text().rpartition(")")[2].split()[0] == "T")


def run_cli(own: Server, *arguments: str) -> str:
    """Return what a command of `penstock` prints."""
    environment = {**os.environ, "PENSTOCK_REDIS__BROKER_URL": own.broker_url}
    environment["PENSTOCK_REDIS__RESULTS_URL"] = own.results_url
    command = [sys.executable, "-c", "from penstock_workers.cli import main; main()", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def test_a_stopped_worker_keeps_two_large_jobs(own: Server, tmp_path: Path) -> None:
    """A process holds no more than two large jobs: all others are answered by those that live."""
    workers = [LightWorker(tmp_path, own) for _ in range(2)]
    with workers[0].running() as stopped, workers[1].running() as other, Client(own.broker_url) as sender:
        eventually(lambda: sender.registry().ready_workers(MODEL, "cpu") == 2)
        texts = [[f"job{n}.{part} 0.05" for part in range(4)] for n in range(24)]
        jobs = {job.id: job for job in sender.submit_many(texts, model=MODEL)}
        eventually(lambda: {pid for _, pid in workers[0].in_order()} == {stopped.pid, other.pid})
        eventually(lambda: workers[0].runs().total() > 16)
        stop(stopped)
        leases: Any = workers[0].book.hgetall("penstock:leases")
        kept = [tag.decode() for tag, lease in leases.items() if f":{stopped.pid}:".encode() in lease]
        kept = [job_id for job_id in kept if jobs[job_id].state() != JobState.SUCCEEDED]
        for job_id in jobs.keys() - set(kept):
            jobs[job_id].result(timeout_s=20)
        answered([jobs[job_id] for job_id in kept])

    assert 0 < len(kept) <= FEWEST_JOBS
    again = {name.partition(".")[0] for name, n in workers[0].runs().items() if n > 1}
    assert len(again) <= len(kept)
