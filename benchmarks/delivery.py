"""Are jobs delivered faster than by stock Celery on Redis, and is none lost when workers are killed?

Tasks do nothing, sleep, or record that they ran; no model is loaded. The sides have the same app
(`benchmarks.delivery_app`) and a Valkey of their own each, and differ in transport, pool and result backend.
They take turns; medians are compared. Sections:

rate     jobs per second with result through one worker process, and what a job costs
single   round trip of one job on an idle system
submit   how fast one process sends
kills    `kill -9` of busy and of idle workers while jobs keep coming: what is lost, unanswered, run twice
backlog  rate and memory per job with many waiting jobs
scaling  one to eight worker processes on a simulated device

Run: python -m benchmarks.delivery [--quick] [--only NAME ...] [--json FILE] [--plot FILE]
`--quick` takes about a minute; all of it about 20.
"""

import argparse
import asyncio
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from itertools import pairwise
from operator import truediv
from pathlib import Path
from typing import Any, Final, Literal, Self

import redis
from celery import Celery

from benchmarks.delivery_app import (
    DEVICE_PLACES,
    MODEL,
    QUEUE,
    READY_KEY,
    RUNNING_KEY,
    RUNS_KEY,
    Setup,
    build_app,
)
from benchmarks.report import Figure, Row, parsed
from benchmarks.sections import Results
from penstock import AsyncClient, Client
from penstock.keys import MODELS_KEY, RESULTS_KEY, result_key
from penstock.registry import ModelInfo
from penstock_workers.command.local_redis import free_port, local_redis_command, wait_until_ready

START_LIMIT_S: Final = 60.0
STOP_LIMIT_S: Final = 20.0
NOTE_LIMIT_S: Final = 60.0
"""Longer without a single result, and a measurement is given up."""
CONCURRENCY: Final = 32
IN_FLIGHT: Final = 128
CHUNK: Final = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """How much is measured.

    Attributes:
        rounds: repetitions of each way.
        jobs: of one repetition of `rate`.
        singles: round trips.
        submits: jobs sent in one repetition of `submit`.
        kills: of busy and of idle workers, our side.
        stock_kills: the same of stock Celery, where each costs far more time.
        backlogs: waiting jobs.
        processes: worker processes in `scaling`, one first.
        device_s: seconds that the simulated device is kept busy in one repetition.
    """

    rounds: int
    jobs: int
    singles: int
    submits: int
    kills: tuple[int, int]
    stock_kills: tuple[int, int]
    backlogs: tuple[int, ...]
    processes: tuple[int, ...]
    device_s: float


QUICK: Final = Counts(
    rounds=2,
    jobs=1000,
    singles=50,
    submits=500,
    kills=(2, 1),
    stock_kills=(1, 1),
    backlogs=(10**3, 10**4),
    processes=(1, 8),
    device_s=1.0,
)
FULL: Final = Counts(
    rounds=7,
    jobs=4000,
    singles=400,
    submits=3000,
    kills=(100, 50),
    stock_kills=(20, 10),
    backlogs=(10**3, 10**4, 10**5, 10**6),
    processes=(1, 2, 4, 8),
    device_s=4.0,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """What jobs go through."""

    name: str
    parts: Literal["stock", "penstock"]
    pool: str


OURS: Final = Side(name="penstock", parts="penstock", pool="penstock_workers.delivery.pool:TaskPool")
THREADS: Final = Side(name="stock threads", parts="stock", pool="threads")
PREFORK: Final = Side(name="stock prefork", parts="stock", pool="prefork")


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a section measured."""

    rows: Sequence[Row]
    figures: Mapping[str, Figure]


class Notes:
    """Counts the notes of results without reading them, so that the caller does not set the pace."""

    _WORD: Final = b"pmessage\r\n"

    def __init__(self, port: int, pattern: str) -> None:
        self.n_heard = 0
        self._tail = b""
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=NOTE_LIMIT_S)
        self._socket.sendall(f"PSUBSCRIBE {pattern}\r\n".encode())

    def wait(self, n_heard: int) -> None:
        """Return when that many were heard, at least."""
        while self.n_heard < n_heard:
            try:
                data = self._tail + self._socket.recv(1 << 20)
            except TimeoutError:
                missing = n_heard - self.n_heard
                raise TimeoutError(f"no result for {NOTE_LIMIT_S:.0f} s, {missing} are missing") from None
            self.n_heard += data.count(self._WORD)
            self._tail = data[1 - len(self._WORD) :]

    def close(self) -> None:
        """End the connection."""
        self._socket.close()


class Worker:
    """A worker process; what it writes is shown if it does not start."""

    def __init__(self, setup: Setup, folder: Path, concurrency: int) -> None:
        name = uuid.uuid4().hex[:8]
        self._log = folder / f"{name}.log"
        command = [sys.executable, "-m", "celery", "-A", "benchmarks.delivery_app", "worker"]
        options = [
            "-c",
            str(concurrency),
            "-n",
            name,
            "-l",
            "warning",
            "--without-gossip",
            "--without-mingle",
        ]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*command, *options],
                env=setup.environment(),
                cwd=Path(__file__).parent.parent,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.pid = self._process.pid

    def must_live(self) -> None:
        """Raise if it has ended."""
        if self._process.poll() is not None:
            raise RuntimeError(f"a worker ended by itself:\n{self._log.read_text(errors='replace')[-2000:]}")

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    def kill(self) -> float:
        """End it as a power cut would; return when, Unix seconds."""
        killed_at = time.time()
        self._process.kill()
        self._process.wait()
        return killed_at

    def stop(self) -> None:
        """End it, the hard way if it must be."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


class Site:
    """One side's Valkey and worker processes, and a caller of them."""

    def __init__(
        self, side: Side, *, concurrency: int = CONCURRENCY, lease_s: float = 20.0, max_deliveries: int = 4
    ) -> None:
        self.side, self._concurrency = side, concurrency
        self.setup = Setup(
            parts=side.parts,
            pool=side.pool,
            port=free_port(),
            lease_s=lease_s,
            max_deliveries=max_deliveries,
        )
        self.workers: list[Worker] = []

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            stack.enter_context(valkey(self.setup))
            self.broker, self.results, self.records = (
                stack.enter_context(redis.Redis.from_url(self.setup.url(database))) for database in range(3)
            )
            pattern = "penstock:reply:*" if self.side.parts == "penstock" else "celery-task-meta-*"
            self.notes = Notes(self.setup.port, pattern)
            stack.callback(self.notes.close)
            stack.callback(self._stop)
            self._push = _push_script(self.broker) if self.side.parts == "penstock" else None
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def start(self, n_workers: int = 1) -> None:
        """Start worker processes; `wait` waits for them."""
        for _ in range(n_workers):
            self.workers.append(Worker(self.setup, self._folder, self._concurrency))

    def kill(self, place: int) -> tuple[int, float]:
        """Kill a worker and start another in its place; return its process id, and when in Unix seconds."""
        worker = self.workers[place]
        killed_at = worker.kill()
        self.workers[place] = Worker(self.setup, self._folder, self._concurrency)
        return worker.pid, killed_at

    def wait(self) -> None:
        """Return when all workers take jobs."""
        deadline = time.monotonic() + START_LIMIT_S
        while not all(self.is_ready(worker) for worker in self.workers):
            for worker in self.workers:
                worker.must_live()
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.side.name}: workers did not start within {START_LIMIT_S:.0f} s")
            time.sleep(0.02)

    def is_ready(self, worker: Worker) -> bool:
        """Whether a worker takes jobs."""
        return bool(self.records.sismember(READY_KEY, str(worker.pid)))

    def template(self, task: str, *args: object) -> "Template":
        """Return a message as Celery itself sends it; only while no worker runs."""
        with Celery(broker=self.setup.url(0)) as app:
            app.conf.broker_transport_options = {"body_encoding": "utf-8"}
            reply_to = "penstock:reply:delivery" if self.side.parts == "penstock" else None
            job_id = app.send_task(task, args, queue=QUEUE, reply_to=reply_to).id
        raw = self.broker.rpop(QUEUE)
        assert isinstance(raw, bytes)
        return Template(raw, job_id)

    def push(self, messages: Sequence[bytes]) -> None:
        """Send jobs in one round trip, as this side's clients do."""
        if self._push is None:
            self.broker.lpush(QUEUE, *messages)
            return
        with self.broker.pipeline(transaction=False) as pipe:
            for message in messages:
                self._push(message, pipe)
            pipe.execute()

    def pile_up(self, template: "Template", n_jobs: int) -> None:
        """Put jobs into the queue without waking anybody."""
        for start in range(0, n_jobs, CHUNK):
            ids = _ids(min(CHUNK, n_jobs - start))
            self.broker.lpush(QUEUE, *template.fill(ids))

    def run(self, template: "Template", n_jobs: int, in_flight: int) -> float:
        """Send jobs, so many at a time, and fetch all results; return how long it took, seconds."""
        ids = _ids(n_jobs)
        messages = template.fill(ids)
        began, heard, n_sent = time.perf_counter(), self.notes.n_heard, 0
        while (n_done := self.notes.n_heard - heard) < n_jobs:
            room = min(n_done + in_flight, n_jobs) - n_sent
            if room > 0:
                self.push(messages[n_sent : n_sent + room])
                n_sent += room
            self.notes.wait(heard + min(n_done + in_flight // 4, n_jobs))
        missing = self.unanswered(ids)
        seconds = time.perf_counter() - began
        if missing:
            raise RuntimeError(f"{self.side.name}: {len(missing)} of {n_jobs} jobs have no result")
        return seconds

    def steady_rate(self, n_jobs: int) -> float:
        """Return jobs per second while the jobs that wait are done, without the first and last tenth."""
        heard = self.notes.n_heard
        self.notes.wait(heard + n_jobs // 10)
        first, began = self.notes.n_heard, time.perf_counter()
        self.notes.wait(heard + n_jobs * 9 // 10)
        return (self.notes.n_heard - first) / (time.perf_counter() - began)

    def unanswered(self, ids: Sequence[str]) -> list[str]:
        """Return the jobs whose caller finds no success in the result store."""
        found: list[Any] = []
        for start in range(0, len(ids), CHUNK):
            found += self.results.mget([result_key(job_id) for job_id in ids[start : start + CHUNK]])
        return [
            job_id for job_id, value in zip(ids, found, strict=True) if b'"SUCCESS"' not in (value or b"")
        ]

    def costs(self) -> dict[tuple[str, str], float]:
        """Return what was spent so far, by name and unit."""
        stats, clock = self.broker.info("stats"), self.broker.info("cpu")
        commands = self.broker.info("commandstats").values()
        return {
            ("Redis commands, also inside scripts", "/job"): sum(command["calls"] for command in commands),
            ("Redis reads of a socket", "/job"): stats["total_reads_processed"],
            ("Redis bytes in and out", "/job"): (
                stats["total_net_input_bytes"] + stats["total_net_output_bytes"]
            ),
            ("Redis CPU", "us/job"): 1e6 * (clock["used_cpu_user"] + clock["used_cpu_sys"]),
            ("worker CPU", "us/job"): 1e6 * sum(cpu_seconds(worker.pid) for worker in self.workers),
        }

    def _stop(self) -> None:
        for worker in self.workers:
            worker.signal(signal.SIGCONT)
            worker.signal(signal.SIGTERM)
        for worker in self.workers:
            worker.stop()


class Template:
    """A message with a place for the job's id."""

    def __init__(self, message: bytes, job_id: str) -> None:
        _, _, rest = message.partition(b'"delivery_tag": "')
        tag = rest[: rest.index(b'"')]
        self._parts = message.replace(tag, job_id.encode()).split(job_id.encode())

    def fill(self, ids: Iterable[str]) -> list[bytes]:
        """Return a message for each job."""
        return [job_id.encode().join(self._parts) for job_id in ids]


def main() -> None:
    sections = {
        "rate": rate,
        "single": single,
        "submit": submit,
        "kills": kills,
        "backlog": backlog,
        "scaling": scaling,
    }
    options = arguments(list(sections))
    counts = QUICK if options.quick else FULL
    results = Results()
    measured = sides()
    for name in options.only or sections:
        with results.section(name):
            found = sections[name](counts, measured)
            results.add(name, found.rows, found.figures)
    results.finish("delivery", options)


def arguments(sections: Sequence[str]) -> argparse.Namespace:
    """Read the options: those of all benchmarks, and which sections to run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the same code, fewer repetitions")
    parser.add_argument("--only", choices=sections, nargs="+", metavar="NAME", help=", ".join(sections))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows and figures")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them, as .png or .svg")
    return parsed(parser)


def sides() -> list[Side]:
    """Return the sides that can be measured, ours first."""
    try:
        for module in ("transport", "pool", "backend"):
            import_module(f"penstock_workers.delivery.{module}")
    except ImportError as error:
        print(f"left out: {OURS.name}: {error}", file=sys.stderr)
        return [THREADS, PREFORK]
    return [OURS, THREADS, PREFORK]


def rate(counts: Counts, sides: Sequence[Side]) -> Found:
    """Measure jobs per second with result through one worker process, and what a job costs."""
    seconds: dict[str, list[float]] = defaultdict(list)
    costs: dict[tuple[str, str], list[float]] = defaultdict(list)
    with ExitStack() as stack:
        sites = [stack.enter_context(Site(side)) for side in sides]
        noops = [site.template("delivery.noop") for site in sites]
        for site in sites:
            site.start()
        for site, noop in zip(sites, noops, strict=True):
            site.wait()
            site.run(noop, counts.jobs, IN_FLIGHT)
        for _ in range(counts.rounds):
            for site, noop in zip(sites, noops, strict=True):
                before = site.costs()
                seconds[site.side.name].append(site.run(noop, counts.jobs, IN_FLIGHT))
                for (cost, unit), value in site.costs().items():
                    spent = (value - before[cost, unit]) / counts.jobs
                    costs[f"{site.side.name}, {cost}", unit].append(spent)
    rows = [
        Row(way=f"{name}, no-op with result", unit="jobs/s", values=[counts.jobs / s for s in values])
        for name, values in seconds.items()
    ]
    rows += [Row(way=way, unit=unit, values=values) for (way, unit), values in costs.items()]
    return Found(rows=rows, figures=_against_stock("rate_vs_stock", rows, goal=2.5))


def single(counts: Counts, sides: Sequence[Side]) -> Found:
    """Time one job on an idle system, from the call to the result."""
    found: dict[str, list[float]] = defaultdict(list)
    with ExitStack() as stack:
        ways: dict[str, Callable[[], object]] = {}
        for side in sides:
            if side is not PREFORK:
                site = stack.enter_context(Site(side))
                ways |= _callers(site, stack)
                site.start()
                site.wait()
        for round_ in range(counts.singles + 5):  # the first are a warm-up
            for name, way in ways.items():
                began = time.perf_counter()
                way()
                if round_ >= 5:
                    found[name].append(1e3 * (time.perf_counter() - began))
    rows = [Row(way=f"one job, {name}", unit="ms", values=values) for name, values in found.items()]
    figures = {}
    for name, values in found.items():
        key = name.replace(" ", "_").replace(".", "_")
        figures[f"single_{key}_ms_p50"] = Figure(value=statistics.median(values), unit="ms")
        figures[f"single_{key}_ms_p99"] = Figure(
            value=statistics.quantiles(values, n=100, method="inclusive")[-1], unit="ms"
        )
    return Found(rows=rows, figures=figures)


def _callers(site: Site, stack: ExitStack) -> dict[str, Callable[[], object]]:
    """Return the ways to call one job and wait for its result."""
    if site.side.parts == "stock":
        noop = _stock_sender(site).tasks["delivery.noop"]
        return {"stock delay.get": lambda: noop.delay().get(timeout=NOTE_LIMIT_S)}
    client, async_client, runner = _our_clients(site, stack)
    return {
        "penstock Client": lambda: client.embed(["a text"], model=MODEL, timeout_s=NOTE_LIMIT_S),
        "penstock AsyncClient": lambda: runner.run(
            _returns(async_client.embed(["a text"], model=MODEL, timeout_s=NOTE_LIMIT_S))
        ),
    }


def submit(counts: Counts, sides: Sequence[Side]) -> Found:
    """Measure how fast one process sends jobs; nobody takes them."""
    found: dict[str, list[float]] = defaultdict(list)
    with ExitStack() as stack:
        ways: list[tuple[str, Site, Callable[[int], object]]] = []
        for side in sides:
            if side is not PREFORK:
                site = stack.enter_context(Site(side))
                ways += [(name, site, way) for name, way in _senders(site, stack).items()]
        for round_ in range(counts.rounds + 1):  # the first is a warm-up
            for name, site, way in ways:
                began = time.perf_counter()
                kept = way(counts.submits)
                seconds = time.perf_counter() - began
                if site.broker.llen(QUEUE) + site.broker.llen(f"{QUEUE}\x06\x163") != counts.submits:
                    raise RuntimeError(f"{name}: not all jobs are in the queue")
                del kept  # stock's handles unsubscribe, one by one
                site.broker.delete(QUEUE, f"{QUEUE}\x06\x163")
                if round_:
                    found[name].append(counts.submits / seconds)
    rows = [Row(way=f"sent by {name}", unit="jobs/s", values=values) for name, values in found.items()]
    return Found(rows=rows, figures={})


def _senders(site: Site, stack: ExitStack) -> dict[str, Callable[[int], object]]:
    """Return the ways to send many jobs; each returns what a caller would keep of them."""
    if site.side.parts == "stock":
        app = _stock_sender(site)
        noop = app.tasks["delivery.noop"]

        def batch(n_jobs: int) -> object:
            with app.producer_pool.acquire(block=True) as producer, producer.batch(max_size=500):
                return [noop.apply_async(producer=producer) for _ in range(n_jobs)]

        return {
            "stock delay": lambda n_jobs: [noop.delay() for _ in range(n_jobs)],
            "stock producer.batch": batch,
        }
    client, async_client, runner = _our_clients(site, stack)

    async def together(n_jobs: int) -> object:
        gate = asyncio.Semaphore(IN_FLIGHT)

        async def send() -> object:
            async with gate:
                return await async_client.submit_embed(["a text"], model=MODEL)

        return await asyncio.gather(*(send() for _ in range(n_jobs)))

    async def in_turn(n_jobs: int) -> object:
        return [await async_client.submit_embed(["a text"], model=MODEL) for _ in range(n_jobs)]

    return {
        "penstock Client": lambda n: [client.submit_embed(["a text"], model=MODEL) for _ in range(n)],
        "penstock Client.submit_many": lambda n: client.submit_many([["a text"]] * n, model=MODEL),
        "penstock AsyncClient": lambda n_jobs: runner.run(in_turn(n_jobs)),
        f"penstock AsyncClient, {IN_FLIGHT} at once": lambda n_jobs: runner.run(together(n_jobs)),
    }


BUSY_MIX: Final = ((0.97, 0.005), (0.02, 0.2), (0.01, 3.0))
"""Shares and seconds: most jobs are short, some take longer than our lease and less than stock's limit."""
KILLED_WORKERS: Final = 4
"""Killed in turn. Of two none lives long enough for the long jobs: they pile up, and what is measured then is
how long their queue is."""
BUSY_GAP_S: Final = 0.08
BUSY_JOBS: Final = 16
IDLE_GAP_S: Final = 0.03
UNDER_WAY_S: Final = 0.005
"""After a job was sent it is for so long on its way to a worker: then workers are killed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One time that a job ran; `ended` is None if it never came to its end."""

    pid: int
    began: float
    ended: float | None


@dataclass(slots=True, kw_only=True)
class Toll:
    """What killing workers did.

    Attributes:
        sent: job id to when it was sent, Unix seconds.
        killed: process id to when it was killed.
        runs: job id to its runs, the earliest first.
        unanswered: jobs without a result at the end.
    """

    sent: dict[str, float] = field(default_factory=dict)
    killed: dict[int, float] = field(default_factory=dict)
    runs: dict[str, list[Run]] = field(default_factory=dict)
    unanswered: list[str] = field(default_factory=list)

    @property
    def n_lost(self) -> int:
        """Jobs that never ran."""
        return sum(job_id not in self.runs for job_id in self.sent)

    def again(self) -> Counter[str]:
        """Count runs after a job's first, by why they happened."""
        causes: Counter[str] = Counter()
        for runs in self.runs.values():
            for before, _ in pairwise(runs):
                if before.pid not in self.killed:
                    causes["without any kill"] += 1
                elif before.ended is None:
                    causes["killed while it ran"] += 1
                elif self.killed[before.pid] - before.ended < 1.0:
                    causes["killed within 1 s after it ended"] += 1
                else:
                    causes["long after it ended"] += 1
        return causes

    def waits_s(self) -> list[float]:
        """Return how long jobs waited from the kill that they were caught in to their next start."""
        waits = []
        for job_id, runs in self.runs.items():
            # Taken and not begun: the first kill after it was sent counts, so that none looks shorter.
            caught = [k for k in self.killed.values() if self.sent[job_id] < k < runs[0].began]
            waits += [runs[0].began - min(caught)] if caught else []
            for before, after in pairwise(runs):
                if before.ended is None and before.pid in self.killed:
                    waits.append(after.began - self.killed[before.pid])
        return waits


def kills(counts: Counts, sides: Sequence[Side]) -> Found:
    """Kill workers while jobs keep coming."""
    rows: list[Row] = []
    figures: dict[str, Figure] = {}
    for side in sides:
        if side is PREFORK:
            continue
        is_ours = side is OURS
        lease_s = 2.0 if is_ours else 5.0
        n_busy, n_idle = counts.kills if is_ours else counts.stock_kills
        try:
            toll = kill_workers(side, n_busy=n_busy, n_idle=n_idle, lease_s=lease_s)
        except RuntimeError as error:
            if is_ours:
                raise
            print(f"kills, left out: {side.name}: {error}", file=sys.stderr)
            continue
        again = toll.again()
        n_jobs, takeover_s = len(toll.sent), max(toll.waits_s(), default=0.0)
        numbers = {
            "kills of busy and of idle workers": n_busy + n_idle,
            "jobs sent": n_jobs,
            "lost": toll.n_lost,
            "unanswered": len(toll.unanswered),
            **{f"run again, {cause}": n for cause, n in again.items()},
        }
        rows += [Row(way=f"{side.name}: {way}", unit="", values=[n]) for way, n in numbers.items()]
        rows.append(Row(way=f"{side.name}: from kill to next start, longest", unit="s", values=[takeover_s]))
        prefix = "" if is_ours else "stock_"
        per_10k = 1e4 / n_jobs
        figures |= {
            f"{prefix}lost": _none(toll.n_lost, is_ours),
            f"{prefix}unanswered": _none(len(toll.unanswered), is_ours),
            f"{prefix}takeover_leases_max": Figure(
                value=takeover_s / lease_s, unit="leases", goal=2.0 if is_ours else None, at_most=True
            ),
            f"{prefix}run_twice_per_10k": Figure(value=per_10k * again.total(), unit="jobs"),
            f"{prefix}run_twice_not_killed_while_running_per_10k": Figure(
                value=per_10k * (again.total() - again["killed while it ran"]), unit="jobs"
            ),
        }
    return Found(rows=rows, figures=figures)


def _none(n_jobs: int, is_ours: bool) -> Figure:
    return Figure(value=n_jobs, unit="jobs", goal=0.0 if is_ours else None, at_most=True)


def kill_workers(side: Side, *, n_busy: int, n_idle: int, lease_s: float) -> Toll:
    """Run some workers, kill one after the other, and wait until all is answered."""
    toll, chance = Toll(), random.Random(0)
    # A job that was on several killed workers is no job that kills workers: it must not be given up.
    with Site(side, concurrency=CONCURRENCY, lease_s=lease_s, max_deliveries=50) as site:
        templates = [site.template("delivery.record", seconds) for _, seconds in (*BUSY_MIX, (1.0, 0.0))]
        site.start(KILLED_WORKERS)
        site.wait()
        feed = Feed(site, toll, templates)
        with feed.running():
            for i in range(n_busy + n_idle):
                feed.is_busy = i < n_busy
                site.wait()
                _wait_for_moment(site, site.workers[i % KILLED_WORKERS], feed, chance)
                pid, killed_at = site.kill(i % KILLED_WORKERS)
                toll.killed[pid] = killed_at
        site.wait()
        toll.unanswered = _wait_for_answers(site, list(toll.sent), within_s=3 * lease_s + 10)
        toll.runs = _read_runs(site)
    return toll


class Feed:
    """Sends jobs in a thread of its own while workers are killed."""

    def __init__(self, site: Site, toll: Toll, templates: Sequence[Template]) -> None:
        self._site, self._toll = site, toll
        *self._busy, self._idle = templates
        self._chance = random.Random(1)
        self.is_busy = True
        self._stop, self.has_sent = threading.Event(), threading.Event()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Send while the block runs."""
        thread = threading.Thread(target=self._run, name="feed")
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()

    def _run(self) -> None:
        while not self._stop.wait(BUSY_GAP_S if self.is_busy else IDLE_GAP_S):
            templates = (
                self._chance.choices(self._busy, weights=[share for share, _ in BUSY_MIX], k=BUSY_JOBS)
                if self.is_busy
                else [self._idle]
            )
            messages = []
            for template, job_id in zip(templates, _ids(len(templates)), strict=True):
                messages += template.fill([job_id])
                self._toll.sent[job_id] = time.time()
            self._site.push(messages)
            self.has_sent.set()


def _wait_for_moment(site: Site, worker: Worker, feed: Feed, chance: random.Random) -> None:
    """Return when the worker is busy, or idle, and jobs are on their way."""
    time.sleep(chance.uniform(0.0, 0.3))
    deadline = time.monotonic() + START_LIMIT_S
    while (_n_running(site, worker) > 0) != feed.is_busy:
        worker.must_live()
        if time.monotonic() > deadline:
            raise TimeoutError(f"{site.side.name}: the worker is never {'busy' if feed.is_busy else 'idle'}")
        time.sleep(0.001)
    feed.has_sent.clear()
    feed.has_sent.wait(1.0)
    time.sleep(chance.uniform(0.0, UNDER_WAY_S))


def _n_running(site: Site, worker: Worker) -> int:
    return int(site.records.hget(RUNNING_KEY, str(worker.pid)) or 0)


def _wait_for_answers(site: Site, ids: list[str], *, within_s: float) -> list[str]:
    deadline = time.monotonic() + within_s
    while (ids := site.unanswered(ids)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return ids


def _read_runs(site: Site) -> dict[str, list[Run]]:
    lines = [line.decode().split() for line in site.records.lrange(RUNS_KEY, 0, -1)]
    ends = {tuple(line[:3]): float(line[3]) for line in lines if len(line) == 4}
    runs: dict[str, list[Run]] = defaultdict(list)
    for line in lines:
        if len(line) == 3:
            job_id, pid, began = line
            runs[job_id].append(Run(pid=int(pid), began=float(began), ended=ends.get((job_id, pid, began))))
    return {job_id: sorted(found, key=lambda run: run.began) for job_id, found in runs.items()}


DRAINED: Final = 1000


def backlog(counts: Counts, sides: Sequence[Side]) -> Found:
    """Measure how fast a worker works with many jobs waiting, and what each costs in memory."""
    rates: dict[tuple[str, int], list[float]] = defaultdict(list)
    memory: dict[tuple[str, int], list[float]] = defaultdict(list)
    with ExitStack() as stack:
        sites = [stack.enter_context(Site(side)) for side in sides if side is not PREFORK]
        noops = [site.template("delivery.noop") for site in sites]
        for site in sites:
            site.start()
        for site, noop in zip(sites, noops, strict=True):
            site.wait()
            site.run(noop, DRAINED, IN_FLIGHT)
        for _ in range(counts.rounds):
            for size in counts.backlogs:
                for site, noop in zip(sites, noops, strict=True):
                    if site.side is OURS or size < 10**6:  # the largest takes its time to pile up
                        found, n_bytes = _drain(site, noop, size)
                        rates[site.side.name, size].append(found)
                        memory[site.side.name, size].append(n_bytes)
    rows = [
        Row(way=f"{name}, {size:,} waiting", unit=unit, values=values)
        for unit, table in (("jobs/s", rates), ("bytes/job", memory))
        for (name, size), values in sorted(table.items())
    ]
    figures = {
        "backlog_flatness": Figure(value=_flatness(rates, counts), unit="", goal=0.9),
        # What grows with a backlog is the worse: here more is worse, there less.
        "backlog_memory_flatness": Figure(value=1 / _flatness(memory, counts, max), unit="", goal=0.9),
    }
    return Found(rows=rows, figures=figures)


def _flatness(
    table: Mapping[tuple[str, int], Sequence[float]],
    counts: Counts,
    worst: Callable[[Iterable[float]], float] = min,
) -> float:
    """Compare the larger backlogs with the smallest, round by round: machines change their speed."""
    smallest, *larger = (table[OURS.name, size] for size in counts.backlogs)
    return worst(statistics.median(map(truediv, values, smallest)) for values in larger)


def _drain(site: Site, noop: Template, size: int) -> tuple[float, float]:
    """Let jobs pile up before a worker that stands still; return its rate then, and the bytes of each."""
    (worker,) = site.workers
    worker.signal(signal.SIGSTOP)
    site.pile_up(noop, size)
    n_bytes = int(site.broker.memory_usage(QUEUE, samples=0) or 0) / size
    worker.signal(signal.SIGCONT)
    found = site.steady_rate(DRAINED)
    site.broker.unlink(QUEUE)
    deadline = time.monotonic() + STOP_LIMIT_S
    while site.broker.hlen("unacked"):  # both keep there what a worker holds
        if time.monotonic() > deadline:
            raise TimeoutError(f"{site.side.name}: jobs are held though none is left")
        time.sleep(0.01)
    site.results.flushdb()
    return found, n_bytes


DEVICES_S: Final = (0.1, 0.02)
"""Seconds of a job. The figure is at 0.1: eight processes then finish 640 jobs per second. At 0.02 they could
finish 3,200, which takes more CPU time than two cores have, with the program that sends and counts."""
HELD_JOBS: Final = 2 * DEVICE_PLACES  # as our workers do, so that the next is there when one ends


def scaling(counts: Counts, sides: Sequence[Side]) -> Found:
    """Measure jobs per second of one to eight worker processes whose device sleeps."""
    found: dict[tuple[str, float, int], list[float]] = defaultdict(list)
    with ExitStack() as stack:
        sites = [
            stack.enter_context(Site(side, concurrency=HELD_JOBS)) for side in sides if side is not PREFORK
        ]
        devices = [
            (site, device_s, site.template("delivery.device", device_s))
            for device_s in DEVICES_S
            for site in sites
        ]
        for n_workers in counts.processes:
            for site in sites:
                site.start(n_workers - len(site.workers))
            for site in sites:
                site.wait()
            for _ in range(counts.rounds):
                for site, device_s, device in devices:
                    n_jobs = int(counts.device_s * n_workers * DEVICE_PLACES / device_s)
                    found[site.side.name, device_s, n_workers].append(_work_off(site, device, n_jobs))
    rows = [
        Row(way=f"{name}, {n} processes, device {1e3 * s:.0f} ms", unit="jobs/s", values=values)
        for (name, s, n), values in sorted(found.items())
    ]
    figures = {}
    for site, device_s, _ in devices:
        one, many = (
            statistics.median(found[site.side.name, device_s, n])
            for n in (counts.processes[0], counts.processes[-1])
        )
        is_figure = site.side is OURS and device_s == DEVICES_S[0]
        key = "scaling_8" if site.side is OURS else "stock_scaling_8"
        figures[key + ("" if device_s == DEVICES_S[0] else f"_device_{1e3 * device_s:.0f}_ms")] = Figure(
            value=many * counts.processes[0] / (counts.processes[-1] * one),
            unit="",
            goal=0.95 if is_figure else None,
        )
    return Found(rows=rows, figures=figures)


def _work_off(site: Site, device: Template, n_jobs: int) -> float:
    """Return jobs per second while all places are taken."""
    heard = site.notes.n_heard
    site.push(device.fill(_ids(n_jobs)))
    found = site.steady_rate(n_jobs)
    site.notes.wait(heard + n_jobs)
    site.results.flushdb()
    return found


@contextmanager
def valkey(setup: Setup) -> Iterator[None]:
    """Run a server on the setup's port that keeps nothing."""
    process = subprocess.Popen(
        local_redis_command(port=setup.port, folder=None),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until_ready(setup.url(0), within_s=10)
        yield
    finally:
        process.kill()
        process.wait()


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process and its children so far; 0 where there is no /proc."""
    stat = Path(f"/proc/{pid}/stat")
    if not stat.exists():
        return 0.0
    ticks = sum(map(int, stat.read_text().rpartition(")")[2].split()[11:13]))
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return ticks / os.sysconf("SC_CLK_TCK") + sum(cpu_seconds(int(child)) for child in children)


def _ids(n_jobs: int) -> list[str]:
    return [str(uuid.uuid4()) for _ in range(n_jobs)]


def _push_script(client: redis.Redis) -> Callable[[bytes, Any], None]:
    """Return what adds our client's way of sending a message to a pipeline."""
    from penstock.scripts import push_arguments, script

    push = client.register_script(script("push"))
    push(*push_arguments("delivery:warm", b"{}"))
    client.delete("delivery:warm")

    def add(message: bytes, pipe: Any) -> None:
        keys, arguments = push_arguments(QUEUE, message)
        pipe.evalsha(push.sha, len(keys), *keys, *arguments)

    return add


def _our_clients(site: Site, stack: ExitStack) -> tuple[Client, AsyncClient, asyncio.Runner]:
    """Announce a model that is none, and return clients that find it."""
    model = ModelInfo(
        name=MODEL,
        task="embed",
        pools=("cpu",),
        dim=1,
        max_tokens=None,
        max_texts=256,
        deadline_s=None,
        dtype="float32",
    )
    site.broker.hset(MODELS_KEY, MODEL, model.to_json())
    site.broker.set(RESULTS_KEY, "/1")
    client = stack.enter_context(Client(site.setup.url(0)))
    runner = stack.enter_context(asyncio.Runner())
    async_client = AsyncClient(site.setup.url(0))
    stack.callback(lambda: runner.run(async_client.close()))
    return client, async_client, runner


def _stock_sender(site: Site) -> Celery:
    """Return an app that sends as stock Celery does."""
    return build_app(Setup(parts="stock", pool="threads", port=site.setup.port))


async def _returns(work: Awaitable[object]) -> object:
    return await work


def _against_stock(key: str, rows: Sequence[Row], *, goal: float) -> dict[str, Figure]:
    """Compare our rate with each of the peers'."""
    speed = {row.way.partition(",")[0]: row.median for row in rows if row.unit == "jobs/s"}
    ours = speed.get(OURS.name)
    if ours is None:
        return {}
    return {
        key: Figure(value=ours / speed[THREADS.name], unit="x", goal=goal),
        f"{key}_prefork": Figure(value=ours / speed[PREFORK.name], unit="x"),
    }


if __name__ == "__main__":
    main()
