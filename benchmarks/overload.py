"""What do callers get when more comes in than the model can do?

Jobs of 8 docstrings come at random moments (Poisson), whether earlier ones are answered or not, by one
asynchronous client. Worker processes leave one core to it and to Redis. Capacity is what 16 callers for
each worker get who wait for their answers; each section measures it first, on a stack of its own. Sections:

load       0.5 to 5 x capacity with a deadline of 1 s; beside it without admission: jobs have no deadline,
           and the caller counts which answers are late
estimate   `client.estimate` just before each job, against the job's real wait
tenants    one tenant sends 100 x what another does: latency of the small one, over its latency alone
upstream   eight workers of a hosted model that allows 60 requests a minute: how much of it is used, and what
           the server refused
recovery   one of two workers stands still (SIGSTOP) under 0.8 x capacity; callers try again by `WaitPolicy`

Latencies count from when a job was due, so that a client that is late with sending hides nothing. Sections
during which other programs took over 5 % of the CPUs are named, and the run ends with an error. It
does so too where a section failed, after the report of the others. `upstream` needs the extra `remote`, or
is left out.

Run: python -m benchmarks.overload [--quick] [--only SECTION ...] [--json FILE] [--plot FILE]
`--quick` takes about four minutes, the whole run 20.
"""

import asyncio
import contextlib
import os
import signal
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import Final

import numpy as np

from benchmarks.corpus import Corpus
from benchmarks.deployment import deployed
from benchmarks.hosted import DIM, hosting
from benchmarks.neighbours import Neighbours
from benchmarks.report import Figure, Row, arguments
from benchmarks.sections import Results, runnable
from penstock import AsyncClient
from penstock.errors import DeadlineExceededError, JobCancelledError, PenstockError, QueueDelayError
from penstock.job import AsyncJob
from penstock.options import EmbedOptions
from penstock.result import Vectors
from penstock.retry import WaitPolicy
from penstock_workers.bundled import bundled_folder
from penstock_workers.command.local_redis import free_port

MODEL: Final = "minilm"
MODELS: Final = f'[models.{MODEL}]\ntask = "embed"\nsource = "bundled:minilm"\nengine = "torch"\n'
PROCESSES: Final = max(1, (os.cpu_count() or 1) - 1)
TEXTS_IN_JOB: Final = 8
CALLERS: Final = 16
LOADS: Final = (0.5, 0.9, 1.1, 2.0, 5.0)
DEADLINE_S: Final = 1.0
ESTIMATED_LOADS: Final = (0.5, 0.9, 1.5)
SHORTEST_WAIT_S: Final = 0.02
"""Shorter ones are left out: one batch takes longer, and a relative error says nothing."""
SMALL_LOAD: Final = 0.05
TIMES_MORE: Final = 100
REQUESTS_PER_MINUTE: Final = 60
HOSTED_PROCESSES: Final = 8
NEEDS: Final = {"upstream": "remote"}
"""Extras of sections that need one besides `workers` and `bundled`."""
RECOVERY_DEADLINE_S: Final = 10.0

Found = tuple[list[Row], dict[str, Figure]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Seconds:
    """How long each part takes: `stopped` is how long a worker stands still, the rest is under load."""

    capacity: float
    load: float
    estimate: float
    tenants: float
    stopped: float
    upstream: float


QUICK: Final = Seconds(capacity=4, load=6, estimate=6, tenants=12, stopped=4, upstream=20)
FULL: Final = Seconds(capacity=20, load=60, estimate=30, tenants=60, stopped=20, upstream=125)


@dataclass(slots=True)
class Sent:
    """What became of one job; moments are seconds since the first job's turn to come.

    Attributes:
        due: when it was to be sent.
        ended: when its caller heard the end of it.
        error: why there is no answer.
        refused_s: from the call to its refusal.
        predicted_s: its wait as estimated just before; None where nobody asked, or no worker could tell.
        waited_s: until the model got to it.
    """

    due: float
    ended: float = 0.0
    error: PenstockError | None = None
    refused_s: float | None = None
    predicted_s: float | None = None
    waited_s: float | None = None

    @property
    def latency_s(self) -> float:
        """From when it was due until its end."""
        return self.ended - self.due


@dataclass(frozen=True, kw_only=True)
class CountingPolicy(WaitPolicy):
    """Notes each attempt that failed for now."""

    failures: list[int] = field(default_factory=list)

    def pause_s(self, n_failures: int, error: BaseException | None) -> float:
        """Return what `WaitPolicy` says, and take note."""
        self.failures.append(n_failures)
        return super().pause_s(n_failures, error)


class Bench:
    """Sends jobs to one stack.

    Args:
        client: of the stack.
        seconds: for each part.
        random: when jobs come.
    """

    def __init__(self, client: AsyncClient, seconds: Seconds, random: np.random.Generator) -> None:
        self.client, self.seconds, self._random = client, seconds, random
        texts = Corpus(bundled_folder(MODEL)).mixed(1024)
        self._jobs = cycle([texts[i : i + TEXTS_IN_JOB] for i in range(0, len(texts), TEXTS_IN_JOB)])
        self.capacity = 0.0

    async def measure_capacity(self, processes: int) -> Row:
        """Find how many jobs per second are answered while callers wait for each; after a warm-up."""
        ended: list[float] = []
        began = time.perf_counter()
        until = began + 1.25 * self.seconds.capacity

        async def call() -> None:
            while time.perf_counter() < until:
                await (await self._send(EmbedOptions())).result()
                ended.append(time.perf_counter())

        await asyncio.gather(*(call() for _ in range(CALLERS * processes)))
        per_second = rates([end - began for end in ended], 1.25 * self.seconds.capacity)
        per_second = per_second[len(per_second) // 5 :]
        self.capacity = float(np.mean(per_second))
        return Row(way="capacity", unit="jobs/s", values=per_second)

    async def offer(
        self,
        load: float,
        seconds: float,
        options: EmbedOptions,
        *,
        is_estimated: bool = False,
        drop: bool = False,
    ) -> list[Sent]:
        """Send jobs at random moments.

        Args:
            load: times capacity.
            seconds: to send for.
            options: of each job.
            is_estimated: ask for the wait just before.
            drop: cancel what is not answered at the end; else wait for it.
        """
        began, due = time.perf_counter(), 0.0
        under_way: dict[AsyncJob[Vectors], Sent] = {}

        async def follow(sent: Sent) -> Sent:
            if is_estimated:
                sent.predicted_s = (await self.client.estimate(MODEL)).predicted_wait_s
            called = time.perf_counter()
            try:
                job = await self._send(options)
                under_way[job] = sent
                await job.result()
                del under_way[job]
                if job.timings:
                    sent.waited_s = job.timings.queued_s + job.timings.prepared_s + job.timings.batched_s
            except QueueDelayError as error:
                sent.error, sent.refused_s = error, time.perf_counter() - called
            except (DeadlineExceededError, JobCancelledError) as error:
                sent.error = error
            sent.ended = time.perf_counter() - began
            return sent

        tasks: list[asyncio.Task[Sent]] = []
        while (due := due + self._random.exponential(1 / load / self.capacity)) < seconds:
            await asyncio.sleep(max(0.0, began + due - time.perf_counter()))
            tasks.append(asyncio.create_task(follow(Sent(due))))
        await asyncio.sleep(max(0.0, began + seconds - time.perf_counter()))
        if drop:
            for job in list(reversed(under_way)):
                await job.cancel()
        sent = await asyncio.gather(*tasks)
        while (await self.client.estimate(MODEL)).jobs:
            await asyncio.sleep(0.1)
        return sent

    async def _send(self, options: EmbedOptions) -> AsyncJob[Vectors]:
        return await self.client.submit_embed(next(self._jobs), model=MODEL, **options)


def main() -> None:
    sections: dict[str, tuple[Callable[[Bench], Awaitable[Found]], int]] = {
        "load": (load, PROCESSES),
        "estimate": (estimate, PROCESSES),
        "tenants": (tenants, PROCESSES),
        "recovery": (recovery, 2),
    }
    options = arguments(__doc__, [*sections, "upstream"])
    seconds = QUICK if options.quick else FULL
    results = Results()
    for name in runnable(options.only, NEEDS):
        with results.section(name):
            neighbours = Neighbours()
            found = upstream(seconds) if name == "upstream" else run(*sections[name], seconds)
            results.add(name, *found, others=neighbours.share())
    results.finish("overload", options)


def run(section: Callable[[Bench], Awaitable[Found]], processes: int, seconds: Seconds) -> Found:
    """Run a section on a stack of its own."""

    async def on_stack(url: str) -> Found:
        async with AsyncClient(url) as client:
            bench = Bench(client, seconds, np.random.default_rng(0))
            capacity = await bench.measure_capacity(processes)
            rows, figures = await section(bench)
        return [capacity, *rows], figures

    port = free_port()
    with deployed(MODELS, processes=processes, port=port):
        return asyncio.run(on_stack(f"redis://127.0.0.1:{port}/0"))


async def load(bench: Bench) -> Found:
    """Offer jobs with a deadline, and as many that nobody refuses, at each load in turn."""
    seconds = bench.seconds.load
    goodput: dict[str, list[float]] = {"": [], ", without admission": []}
    accepted: dict[float, float] = {}
    refusals: list[float] = []
    rows: list[Row] = []
    for times in LOADS:
        sent = await bench.offer(times, seconds, EmbedOptions(deadline_s=DEADLINE_S))
        blind = await bench.offer(times, seconds, EmbedOptions(), drop=True)
        for way, jobs in zip(goodput, (sent, blind), strict=True):
            per_second = rates([job.ended for job in jobs if is_in_time(job)], seconds)
            goodput[way].append(float(np.mean(per_second)))
            rows.append(over_time(f"{times:g} x{way}, in time", "jobs/s", per_second))
        taken = [job for job in sent if job.refused_s is None]
        refused = [job.refused_s for job in sent if job.refused_s is not None]
        late = [not is_in_time(job) for job in taken]
        accepted[times] = percentile([1e3 * job.latency_s for job in taken], 99)
        rows += [
            Row(way=f"{times:g} x, p99 of accepted", unit="ms", values=[accepted[times]]),
            Row(way=f"{times:g} x, accepted and late", unit="", values=[float(np.mean(late))]),
            Row(way=f"{times:g} x, refused", unit="", values=[len(refused) / len(sent)]),
        ]
        if refused:
            rows += [
                Row(way=f"{times:g} x, refusal told, p{q}", unit="ms", values=[1e3 * percentile(refused, q)])
                for q in (50, 99)
            ]
        refusals += refused
    ours, without = goodput.values()
    figures = {
        "goodput_at_5x": Figure(value=ours[-1] / max(ours), unit="x", goal=0.9),
        "goodput_at_5x_without_admission": Figure(value=without[-1] / max(without), unit="x"),
        "peak_goodput_vs_capacity": Figure(value=max(ours) / bench.capacity, unit="x"),
        "accepted_ms_p99": Figure(
            value=max(accepted.values()), unit="ms", goal=1e3 * DEADLINE_S, at_most=True
        ),
    }
    if refusals:
        figures |= {
            "refusal_ms_p50": Figure(value=1e3 * percentile(refusals, 50), unit="ms"),
            "refusal_ms_p99": Figure(
                value=1e3 * percentile(refusals, 99), unit="ms", goal=10.0, at_most=True
            ),
        }
    return rows, figures


async def estimate(bench: Bench) -> Found:
    """Ask for the wait before each job, without deadlines, and compare it with the real one."""
    rows: list[Row] = []
    errors: list[float] = []
    for times in ESTIMATED_LOADS:
        sent = await bench.offer(times, bench.seconds.estimate, EmbedOptions(), is_estimated=True)
        pairs = [(job.predicted_s, job.waited_s) for job in sent]
        known = [(p, w) for p, w in pairs if p is not None and w is not None and w > SHORTEST_WAIT_S]
        found = [abs(predicted - waited) / waited for predicted, waited in known]
        errors += found
        way = f"{times:g} x, {len(found)} of {len(sent)} jobs"
        for what, each in zip(("predicted", "real"), zip(*known, strict=True), strict=True):
            rows.append(Row(way=f"{way}, {what} wait", unit="ms", values=[1e3 * wait for wait in each]))
        rows.append(Row(way=f"{way}, error", unit="", values=found))
    return rows, {
        "wait_error_median": Figure(value=percentile(errors, 50), unit="", goal=0.2, at_most=True),
        "wait_error_p90": Figure(value=percentile(errors, 90), unit=""),
    }


async def tenants(bench: Bench) -> Found:
    """Let a small tenant send alone, then beside one whose jobs pile up."""
    seconds = bench.seconds.tenants
    small = EmbedOptions(tenant="small")
    alone = await bench.offer(SMALL_LOAD, seconds, small)
    beside, _ = await asyncio.gather(
        bench.offer(SMALL_LOAD, seconds, small),
        bench.offer(TIMES_MORE * SMALL_LOAD, seconds, EmbedOptions(tenant="large"), drop=True),
    )
    ways = {"small tenant, alone": alone, f"small tenant, beside {TIMES_MORE} x more": beside}
    rows = [
        Row(
            way=way,
            unit="ms",
            values=[1e3 * job.latency_s for job in jobs],
            at=[job.due for job in jobs],
        )
        for way, jobs in ways.items()
    ]
    p95 = [percentile(row.values, 95) for row in rows]
    return rows, {
        "small_tenant_p95": Figure(value=p95[1] / p95[0], unit="x", goal=2.0, at_most=True),
        "small_tenant_p95_ms": Figure(value=p95[1], unit="ms"),
    }


async def recovery(bench: Bench) -> Found:
    """Stop one of two workers for a while; say when latencies are what they were, and what was sent again."""
    stopped_s = bench.seconds.stopped
    go_on_at, seconds = 2 * stopped_s, 4 * stopped_s
    pid = (await bench.client.registry()).workers[0][0].pid
    policy = CountingPolicy(attempts=None)

    async def disturb() -> None:
        await asyncio.sleep(stopped_s)
        os.kill(pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(stopped_s)
        finally:
            with contextlib.suppress(ProcessLookupError):  # its supervisor gave it up
                os.kill(pid, signal.SIGCONT)

    options = EmbedOptions(deadline_s=RECOVERY_DEADLINE_S, wait=policy)
    sent, _ = await asyncio.gather(bench.offer(0.8, seconds, options), disturb())
    by_second: dict[int, list[float]] = defaultdict(list)
    for job in sent:
        by_second[int(job.due)].append(job.latency_s)
    medians = {second: percentile(found, 50) for second, found in by_second.items()}
    normal_s = percentile([job.latency_s for job in sent if job.due < stopped_s], 95)
    back_at = (second for second, median in medians.items() if second >= go_on_at and median <= normal_s)
    n_retries = len(policy.failures) - sum(isinstance(job.error, QueueDelayError) for job in sent)
    rows = [
        Row(way="latency, p95 before", unit="ms", values=[1e3 * normal_s]),
        over_time("recovery, median latency", "ms", [1e3 * medians[second] for second in sorted(medians)]),
        Row(way="latency, longest", unit="ms", values=[1e3 * max(job.latency_s for job in sent)]),
        Row(
            way="jobs without an answer",
            unit="",
            values=[float(np.mean([job.error is not None for job in sent]))],
        ),
    ]
    return rows, {
        # As long as was looked where no second was like before.
        "recovery_s": Figure(value=next(back_at, seconds) - go_on_at, unit="s"),
        "retries_per_job": Figure(value=n_retries / len(sent), unit=""),
    }


def over_time(way: str, unit: str, per_second: Sequence[float]) -> Row:
    """Return a row of a value for each second."""
    return Row(way=way, unit=unit, values=per_second, at=[float(second) for second in range(len(per_second))])


def is_in_time(job: Sent) -> bool:
    """Whether its caller had an answer before the deadline, or would have had if it had set one."""
    return job.error is None and job.latency_s <= DEADLINE_S


def rates(moments: Sequence[float], seconds: float) -> list[float]:
    """Count moments, in seconds, by second; what comes after the last whole one is left out."""
    counts, _ = np.histogram(moments, bins=np.arange(int(seconds) + 1))
    return [float(count) for count in counts]


def upstream(seconds: Seconds) -> Found:
    """Send 1,000 texts, or as many as take the time, through workers that share the server's allowance."""
    with hosting(REQUESTS_PER_MINUTE) as hosted:
        models = (
            f'[models.{MODEL}]\ntask = "embed"\nengine = "remote"\nsource = "{hosted.url}"\n'
            f"rate_limit = {{ requests_per_minute = {REQUESTS_PER_MINUTE} }}\n"
            f'remote = {{ model = "hosted", dim = {DIM}, max_request_texts = {TEXTS_IN_JOB} }}\n'
        )
        with deployed(models, processes=HOSTED_PROCESSES) as client:
            texts = [f"text {n}" for n in range(round(seconds.upstream * TEXTS_IN_JOB))]
            jobs = client.submit_many([[text] for text in texts], model=MODEL)
            for job in jobs:
                job.result(timeout_s=10 * seconds.upstream)
    first, last = hosted.accepted[0], hosted.accepted[-1]
    late = [at for at in hosted.refused if at > first + 1]
    used = (len(hosted.accepted) - 1) / (last - first) * 60 / REQUESTS_PER_MINUTE
    rows = [
        Row(way="upstream, requests", unit="", values=[float(len(hosted.accepted))]),
        Row(way="upstream, texts in a request", unit="", values=[len(texts) / len(hosted.accepted)]),
        Row(way="upstream, refused", unit="", values=[float(len(hosted.refused))]),
    ]
    return rows, {
        "upstream_rate_used": Figure(value=used, unit="", goal=0.95),
        "upstream_refused_after_1s": Figure(value=float(len(late)), unit="", goal=0, at_most=True),
    }


def percentile(values: Sequence[float], q: float) -> float:
    """Return a percentile of at least one value."""
    return float(np.percentile(values, q))


if __name__ == "__main__":
    main()
