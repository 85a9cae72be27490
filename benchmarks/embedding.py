"""Are texts embedded faster through the queue than by the libraries people call in process?

Texts go through client, Redis and one worker process of one thread for each core. The peers
(`benchmarks.peers`) have processes of their own, take all cores, and are stopped while it is not their
turn; the workers are idle then. All ways take turns in changing order after a warm-up of the same texts,
and medians are compared. Peers whose vectors differ from float32 `encode` (cosine below 0.9999) are shown
and not compared. Sections:

bulk       docstrings of mixed length: against the peers, and against the machine's matrix-product rate
short      the same with texts of at most 16 tokens
long       the same with texts of 256 tokens
single     one short text on an idle system, over `encode` in process
callers    64 callers of one text each, threads and tasks, over bulk
naive      against one stock Celery task for each text
fetch      a stored result of 6 MiB over a plain GET of its bytes
deadlines  queries with a deadline behind a load of long documents: how many are answered in time
memory     what client and workers grow by in 100,000 texts
gpu        docstrings by random models of two sizes on a CUDA GPU, by as many processes as `auto` is: against
           sentence-transformers in bfloat16 and the GPU's matrix-product rate; left out without one

Run: python -m benchmarks.embedding [--quick] [--only SECTION ...] [--against LIBRARY,...]
    [--peer-python [LIBRARY=]PYTHON ...] [--rounds N] [--as KIND] [--json FILE] [--plot FILE]
`--quick` takes about a minute: bulk with few texts, single, callers and fetch. `--as` has all sides use no
more of this CPU than an earlier kind has (`benchmarks.instructions`).
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import cycle
from pathlib import Path
from typing import Final, Self

import numpy as np
import redis
from numpy.typing import NDArray
from redis import asyncio as aioredis

from benchmarks.ceiling import Machine, flop_per_text
from benchmarks.corpus import Corpus
from benchmarks.deployment import deployed
from benchmarks.gpu import SIZES, Busy, build_model
from benchmarks.instructions import KINDS, NOT_LIMITED, limit_to
from benchmarks.neighbours import Neighbours
from benchmarks.peers import WAYS, Peer
from benchmarks.report import Figure, Row, parsed
from benchmarks.sections import Results
from penstock import AsyncClient, Client
from penstock.errors import PenstockError
from penstock.keys import result_key
from penstock_workers.bundled import bundled_folder
from penstock_workers.command.capacity import find_gpus
from penstock_workers.command.local_redis import free_port

Vectors = NDArray[np.float32]

CORES: Final = os.cpu_count() or 1
MODEL: Final = "minilm"
MODELS: Final = f'[models.{MODEL}]\ntask = "embed"\nsource = "bundled:minilm"\n'
REFERENCE: Final = "sentence-transformers float32"
REFERENCE_LIBRARY: Final = "sentence-transformers"
NAIVE: Final = "naive-celery"
MIN_COSINE: Final = 0.9999
N_CALLERS: Final = 64
SINGLES_AT_ONCE: Final = 20
DEADLINES_MS: Final = (20, 50, 100, 200)
FETCHED_TEXTS: Final = 4096
BUSY_ROUNDS: Final = 5
PEER_PART: Final = 8
"""Peers get this part of the texts of `gpu`: they take many times as long for each."""
EXACT_TEXTS: Final = 256
"""Of `gpu`, that are compared with float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """How much is measured.

    Attributes:
        rounds: repetitions of each way.
        mixed: texts in one repetition of `bulk`, `callers` and `naive`.
        short: texts in one repetition of `short`.
        long: texts in one repetition of `long`.
        singles: single texts.
        queries: for each deadline.
        patient: queries whose callers wait up to a minute; behind long documents each may take seconds.
        fetches: of the stored result.
        many: texts that pass through client and workers in `memory`.
        gpu: texts in one repetition of `gpu`, for us.
    """

    rounds: int
    mixed: int
    short: int
    long: int
    singles: int
    queries: int
    patient: int
    fetches: int
    many: int
    gpu: int


QUICK: Final = Counts(
    rounds=2,
    mixed=256,
    short=256,
    long=64,
    singles=60,
    queries=20,
    patient=4,
    fetches=20,
    many=5_000,
    gpu=4096,
)
FULL: Final = Counts(
    rounds=5,
    mixed=1024,
    short=1024,
    long=128,
    singles=400,
    queries=100,
    patient=20,
    fetches=100,
    many=100_000,
    gpu=32_768,
)
QUICK_SECTIONS: Final = ("bulk", "single", "callers", "fetch")


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a section measured."""

    rows: Sequence[Row]
    figures: Mapping[str, Figure]


class Bench:
    """What the sections share; each part is started when the first section needs it."""

    def __init__(self, counts: Counts, libraries: Sequence[str], pythons: Mapping[str, str]) -> None:
        self.counts, self._libraries, self._pythons = counts, libraries, pythons
        self.folder = bundled_folder(MODEL)
        self.config = json.loads((self.folder / "config.json").read_text())
        self._port = free_port()
        self._stack = ExitStack()
        self._peers: dict[str, Peer] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @cached_property
    def corpus(self) -> Corpus:
        """The texts."""
        return Corpus(self.folder)

    @cached_property
    def client(self) -> Client:
        """A client of workers of our own."""
        return self._stack.enter_context(deployed(MODELS, processes=CORES, port=self._port))

    @cached_property
    def machine(self) -> Machine:
        """What measures matrix products."""
        return self._stack.enter_context(Machine(self.config))

    def url(self, database: int) -> str:
        """Return the URL of the queues (0) or the results (1) of `client`'s workers."""
        return f"redis://127.0.0.1:{self._port}/{database}"

    def peers(self, libraries: Iterable[str]) -> dict[str, Peer]:
        """Return the ways that can be measured here, by name; standard error names those that cannot."""
        for library in (missing := [name for name in libraries if name not in self._peers]):
            peer = Peer(library, python=self._pythons[library], model=self.folder, threads=CORES)
            self._peers[library] = self._stack.enter_context(peer)
        for library in missing:
            self._peers[library].wait_until_loaded()
            for way, package in self._peers[library].ways.items():
                print(f"against {way}: {package}", file=sys.stderr)
            for way, reason in self._peers[library].left_out.items():
                print(f"left out: {way}: {reason}", file=sys.stderr)
        return {way: self._peers[library] for library in libraries for way in self._peers[library].ways}

    def in_process(self) -> dict[str, Peer]:
        """Return the peers that are asked for; the first library is the reference, and always there."""
        return self.peers(
            [REFERENCE_LIBRARY, *(n for n in self._libraries if n not in (REFERENCE_LIBRARY, NAIVE))]
        )

    def is_asked_for(self, library: str) -> bool:
        """Whether to measure against a library."""
        return library in self._libraries

    def embed_many(self, texts: Sequence[str]) -> tuple[Vectors, float]:
        """Embed through the queue; return vectors, shape (n_texts, dim), and seconds."""
        began = time.perf_counter()
        vectors = np.concatenate(list(self.client.embed_many(texts, model=MODEL)))
        return vectors.astype(np.float32, copy=False), time.perf_counter() - began


def main() -> None:
    sections: dict[str, Callable[[Bench], Found]] = {
        "bulk": bulk,
        "short": short,
        "long": long,
        "single": single,
        "callers": callers,
        "naive": naive,
        "fetch": fetch,
        "deadlines": deadlines,
        "memory": memory,
        "gpu": gpu,
    }
    options = arguments(list(sections))
    if options.as_kind:
        print(f"all sides as on {options.as_kind}; not limited: {NOT_LIMITED}", file=sys.stderr)
    counts = QUICK if options.quick else FULL
    if options.rounds:
        counts = replace(counts, rounds=options.rounds)
    names = options.only or (QUICK_SECTIONS if options.quick else sections)
    results = Results()
    with Bench(counts, options.against, options.peer_python) as bench:
        for name in names:
            with results.section(name):
                neighbours = Neighbours()
                found = sections[name](bench)
                results.add(name, found.rows, found.figures, others=neighbours.share())
    results.finish(f"embedding as on {options.as_kind}" if options.as_kind else "embedding", options)


def arguments(sections: Sequence[str]) -> argparse.Namespace:
    """Read the options: those of all benchmarks, which sections to run, and against whom."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the same code, fewer texts and repetitions")
    parser.add_argument("--only", choices=sections, nargs="+", metavar="SECTION", help=", ".join(sections))
    parser.add_argument("--against", type=_libraries, default=list(WAYS), help=f"some of {','.join(WAYS)}")
    parser.add_argument(
        "--peer-python",
        action="append",
        default=[],
        metavar="[LIBRARY=]PYTHON",
        help="interpreter that a library, or each without its own, is installed in",
    )
    parser.add_argument("--rounds", type=int, metavar="N", help="repetitions of each way")
    parser.add_argument(
        "--as", dest="as_kind", choices=KINDS, help="use no more of the CPU than this kind has"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows and figures")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them, as .png or .svg")
    options = parsed(parser)
    if options.as_kind:
        try:
            limit_to(options.as_kind)
        except ValueError as error:
            parser.error(f"--as {options.as_kind}: {error}")
    given = dict(item.split("=", 1) if "=" in item else ("", item) for item in options.peer_python)
    if unknown := set(given) - {"", *WAYS}:
        parser.error(f"--peer-python: {', '.join(sorted(unknown))}; known: {', '.join(WAYS)}")
    # What runs beside us needs nothing foreign; naive Celery needs this Python's own packages.
    ours = dict.fromkeys((REFERENCE_LIBRARY, NAIVE), sys.executable)
    options.peer_python = dict.fromkeys(WAYS, given.get("", sys.executable)) | ours | given
    return options


def bulk(bench: Bench) -> Found:
    """Docstrings of mixed length."""
    texts = bench.corpus.mixed(bench.counts.mixed)
    return _against_peers(bench, "mixed", texts, suffix="", goals=(1.3, 0.8))


def short(bench: Bench) -> Found:
    """Phrases of at most 16 tokens."""
    return _against_peers(bench, "short", bench.corpus.short(bench.counts.short), suffix="_short")


def long(bench: Bench) -> Found:
    """Passages of as many tokens as the model takes."""
    return _against_peers(bench, "long", bench.corpus.long(bench.counts.long), suffix="_long")


def single(bench: Bench) -> Found:
    """Time one short text on an idle system, ours and float32 `encode` in turn."""
    texts = bench.corpus.short(bench.counts.singles + SINGLES_AT_ONCE)
    encode = bench.peers([REFERENCE_LIBRARY])[REFERENCE]
    found: dict[str, list[float]] = {"penstock": [], REFERENCE: []}
    for start in range(0, len(texts), SINGLES_AT_ONCE):  # the first is a warm-up
        part = texts[start : start + SINGLES_AT_ONCE]
        for text in part:
            began = time.perf_counter()
            bench.client.embed([text], model=MODEL)
            found["penstock"].append(1e3 * (time.perf_counter() - began))
        found[REFERENCE] += [1e3 * s for s in encode.embed(REFERENCE, part, one_by_one=True)[1]]
    rows = [Row(way=f"one short text, {n}", unit="ms", values=v[SINGLES_AT_ONCE:]) for n, v in found.items()]
    p50, p99 = (float(np.percentile(rows[0].values, q) - np.percentile(rows[1].values, q)) for q in (50, 99))
    figures = {
        "single_text_overhead_ms_p50": Figure(value=p50, unit="ms", goal=4.0, at_most=True),
        "single_text_overhead_ms_p99": Figure(value=p99, unit="ms"),
    }
    return Found(rows=rows, figures=figures)


def callers(bench: Bench) -> Found:
    """Embed the texts of `bulk` one by one by 64 callers; the figure is the slower kind's."""
    texts = bench.corpus.mixed(bench.counts.mixed)
    client = bench.client  # starts the stack before somebody asks for its URL
    ways: dict[str, Callable[[], float]] = {
        "bulk": lambda: bench.embed_many(texts)[1],
        f"{N_CALLERS} threads": lambda: _by_threads(client, texts),
        f"{N_CALLERS} tasks": lambda: asyncio.run(_by_tasks(bench.url(0), texts)),
    }
    seconds = _in_turn(ways, bench.counts.rounds)
    rows = [
        Row(way=f"callers, {n}", unit="texts/s", values=[len(texts) / s for s in v])
        for n, v in seconds.items()
    ]
    together, *apart = (row.median for row in rows)
    return Found(
        rows=rows, figures={"callers_64_vs_bulk": Figure(value=min(apart) / together, unit="x", goal=0.85)}
    )


def naive(bench: Bench) -> Found:
    """Embed the texts of `bulk` as people do behind Celery: a task for each, JSON results."""
    if not bench.is_asked_for(NAIVE):
        return Found(rows=[], figures={})
    texts = bench.corpus.mixed(bench.counts.mixed)
    ways: dict[str, Callable[[], float]] = {"penstock": lambda: bench.embed_many(texts)[1]}
    for name, peer in bench.peers([NAIVE]).items():
        ways[name] = lambda name=name, peer=peer: sum(peer.embed(name, texts)[1])  # type: ignore[misc]  # bound at once
    seconds = _in_turn(ways, bench.counts.rounds)
    rows = [
        Row(way=f"beside naive, {n}", unit="texts/s", values=[len(texts) / s for s in v])
        for n, v in seconds.items()
    ]
    if len(rows) < 2:
        return Found(rows=rows, figures={})
    times = rows[0].median / rows[1].median
    return Found(rows=rows, figures={"vs_naive_celery": Figure(value=times, unit="x", goal=5.0)})


def fetch(bench: Bench) -> Found:
    """Fetch a stored float32 (4096, 384) result again and again, and the same bytes by plain GET.

    Each fetch is a new `Job` that knows nothing but the id. The blocking client is compared with redis-py's
    blocking one, the asynchronous with its asynchronous one: TCP on this machine, redis-py's defaults.
    """
    job_id = _store_result(bench)
    key, rounds = result_key(job_id), range(bench.counts.fetches + 3)  # three are a warm-up
    found: dict[str, list[float]] = defaultdict(list)

    async def by_tasks() -> None:
        async with AsyncClient(bench.url(0)) as client, aioredis.Redis.from_url(bench.url(1)) as plain:
            for _ in rounds:
                began = time.perf_counter()
                vectors = await (await client.job(job_id)).result()
                found["AsyncClient"].append(1e3 * (time.perf_counter() - began))
                began = time.perf_counter()
                payload = await plain.get(key)
                found["asynchronous GET"].append(1e3 * (time.perf_counter() - began))
                _must_be_fetched(vectors, payload)

    with redis.Redis.from_url(bench.url(1)) as plain:
        for _ in rounds:
            began = time.perf_counter()
            vectors = bench.client.job(job_id).result()
            found["Client"].append(1e3 * (time.perf_counter() - began))
            began = time.perf_counter()
            payload = plain.get(key)
            found["blocking GET"].append(1e3 * (time.perf_counter() - began))
            _must_be_fetched(vectors, payload)
    asyncio.run(by_tasks())
    rows = {name: Row(way=f"fetch, {name}", unit="ms", values=values[3:]) for name, values in found.items()}
    figures = {
        "fetch_vs_redis_get": Figure(
            value=rows["Client"].median / rows["blocking GET"].median, unit="x", goal=1.2, at_most=True
        ),
        "fetch_async_vs_redis_get": Figure(
            value=rows["AsyncClient"].median / rows["asynchronous GET"].median, unit="x"
        ),
    }
    return Found(rows=list(rows.values()), figures=figures)


def deadlines(bench: Bench) -> Found:
    """Ask short interactive queries, one at a time, while another client keeps long documents coming.

    A query's caller waits until the deadline and no longer; the row is of queries that may take a minute.
    """
    documents, queries = bench.corpus.long(256), bench.corpus.short(256)
    is_over = threading.Event()

    def load() -> None:
        with Client(bench.url(0)) as other:
            for _ in other.embed_many(cycle(documents), model=MODEL, priority="batch"):
                if is_over.is_set():
                    break

    def ask(number: int, deadline_s: float) -> float:
        """Return how long the answer took, seconds; infinity if there was none."""
        text, began = queries[number % len(queries)], time.perf_counter()
        try:
            bench.client.embed(
                [text], model=MODEL, priority="interactive", deadline_s=deadline_s, timeout_s=deadline_s
            )
        except PenstockError:  # late, or refused because it would be
            return float("inf")
        return time.perf_counter() - began

    bench.client.embed(queries, model=MODEL)
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(load)
        try:
            latencies = [ask(number, 60.0) for number in range(bench.counts.patient + 1)][1:]
            in_time: dict[int, list[bool]] = defaultdict(list)
            # In random order: workers may take turns, and a fixed order would give each its own deadline.
            limits = np.random.default_rng(2).permutation(np.repeat(DEADLINES_MS, bench.counts.queries))
            for number, limit_ms in enumerate(limits.tolist()):
                in_time[limit_ms].append(ask(number, limit_ms / 1e3) <= limit_ms / 1e3)
        finally:
            is_over.set()
        loading.result()
    figures = {
        f"in_time_share_{ms}ms": Figure(value=statistics.fmean(answers), unit="")
        for ms, answers in sorted(in_time.items())
    }
    rows = [Row(way="a query behind long documents", unit="ms", values=[1e3 * s for s in latencies])]
    return Found(rows=rows, figures=figures)


def memory(bench: Bench) -> Found:
    """Send many texts through `embed_many`, drop the vectors, and look how far memory rose.

    Growth is from what was resident after a warm-up to the peak since (Linux' VmHWM); of the workers the
    one that grew most. PSS counts a page that several processes share by its part.
    """
    rows: list[Row] = []
    growth: dict[str, float] = {}
    pids = _worker_pids(bench.client)
    _pass_through(bench.client, bench.corpus.many(2_000))
    before = {pid: _mebibytes(pid, "status", "VmRSS") for pid in [os.getpid(), *pids]}
    for pid in before:
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak starts anew
    _pass_through(bench.client, bench.corpus.many(bench.counts.many))
    grown = {pid: _mebibytes(pid, "status", "VmHWM") - resident for pid, resident in before.items()}
    growth["client"], growth["worker"] = grown[os.getpid()], max(grown[pid] for pid in pids)
    rows.append(Row(way="worker, resident before", unit="MiB", values=[before[pid] for pid in pids]))
    for processes in (1, 4):
        with deployed(MODELS, processes=processes) as client:
            _pass_through(client, bench.corpus.many(1_000))
            shares = [_mebibytes(pid, "smaps_rollup", "Pss") for pid in _worker_pids(client)]
        rows.append(Row(way=f"worker's PSS, {processes} at work", unit="MiB", values=shares))
        rows.append(Row(way=f"workers' PSS together, {processes}", unit="MiB", values=[sum(shares)]))
    figures = {f"{name}_growth_mib": Figure(value=value, unit="MiB") for name, value in growth.items()}
    return Found(rows=rows, figures=figures)


def gpu(bench: Bench) -> Found:
    """Embed docstrings on a GPU with models of two sizes, by one client."""
    if not [name for name in find_gpus() if name != "mps"]:
        print("left out: gpu: there is none", file=sys.stderr)
        return Found(rows=[], figures={})
    found = []
    for name in SIZES:
        found.append(_on_gpu(bench.counts, name))
        print(*found[-1].rows, *found[-1].figures.items(), sep="\n", file=sys.stderr)  # a lent GPU may go
    return Found(
        rows=[row for one in found for row in one.rows],
        figures={name: figure for one in found for name, figure in one.figures.items()},
    )


def _on_gpu(counts: Counts, name: str) -> Found:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        config = build_model(folder, SIZES[name])
        corpus = Corpus(folder)
        texts = corpus.mixed(counts.gpu)
        model = f'[models.{MODEL}]\ntask = "embed"\nsource = "{folder}"\npools = ["gpu"]\n'
        peer = stack.enter_context(
            Peer(REFERENCE_LIBRARY, python=sys.executable, model=folder, threads=CORES, on_gpu=True)
        )
        client = stack.enter_context(deployed(model, pool="gpu", processes=None, threads=None))
        peer.wait_until_loaded()
        machine = stack.enter_context(Machine(config, "cuda"))
        vectors: dict[str, Vectors] = {}
        rates: list[float] = []

        def ours() -> float:
            began = time.perf_counter()
            vectors["penstock"] = np.concatenate(list(client.embed_many(texts, model=MODEL)))
            return time.perf_counter() - began

        def theirs(way: str) -> Callable[[], float]:
            def measure() -> float:
                vectors[way], seconds = peer.embed(way, texts[: len(texts) // PEER_PART])
                return PEER_PART * sum(seconds)

            return measure

        def products() -> float:
            rates.append(machine.flop_per_s())
            return 0.0

        ways = {way: theirs(way) for way in peer.ways if way != REFERENCE}
        seconds = _in_turn({"penstock": ours, **ways, "machine": products}, counts.rounds)
        del seconds["machine"]
        with Busy() as busy:
            again = statistics.fmean(ours() for _ in range(BUSY_ROUNDS))
        exact, _ = peer.embed(REFERENCE, texts[:EXACT_TEXTS])
    lengths = corpus.lengths(texts)
    flop, rate = flop_per_text(config, lengths), statistics.median(rates[1:])
    speed = {way: len(texts) / statistics.median(values) for way, values in seconds.items()}
    worst = {way: float(_cosines(vectors[way][:EXACT_TEXTS], exact).min()) for way in speed}
    label = f"gpu, {name}"
    rows = [
        Row(way=f"{label}, {way}", unit="texts/s", values=[len(texts) / s for s in values])
        for way, values in seconds.items()
    ]
    rows += [Row(way=f"{label}, {way}, smallest cosine", unit="", values=[c]) for way, c in worst.items()]
    rows += [
        Row(way=f"{label}, penstock while watched", unit="texts/s", values=[len(texts) / again]),
        Row(
            way=f"{label}, penstock", unit="tokens/s", values=[statistics.fmean(lengths) * speed["penstock"]]
        ),
        Row(way=f"{label}, matrix products", unit="TFLOP/s", values=[rate / 1e12 for rate in rates[1:]]),
        Row(way=f"{label}, cost of a text", unit="GFLOP", values=[flop / 1e9]),
    ]
    suffix = name.partition("-")[0].lower()
    others = [value for way, value in speed.items() if way != "penstock"]
    figures = {
        f"gpu_vs_sentence_transformers_{suffix}": Figure(value=speed["penstock"] / max(others), unit="x"),
        f"gpu_share_of_products_{suffix}": Figure(value=speed["penstock"] * flop / rate, unit=""),
        f"gpu_busy_{suffix}": Figure(value=busy.share, unit=""),
        f"gpu_min_cosine_{suffix}": Figure(value=worst["penstock"], unit="", goal=MIN_COSINE),
    }
    return Found(rows=rows, figures=figures)


def _against_peers(
    bench: Bench,
    name: str,
    texts: list[str],
    *,
    suffix: str,
    goals: tuple[float | None, float | None] = (None, None),
) -> Found:
    """Compare speed with the peers and with the machine, and vectors with float32 `encode`."""
    vectors: dict[str, Vectors] = {}
    rates: list[float] = []

    def ours() -> float:
        vectors["penstock"], seconds = bench.embed_many(texts)
        return seconds

    def theirs(way: str, peer: Peer) -> Callable[[], float]:
        def measure() -> float:
            vectors[way], seconds = peer.embed(way, texts)
            return sum(seconds)

        return measure

    peers = {way: theirs(way, peer) for way, peer in bench.in_process().items()}

    def machine() -> float:
        rates.append(bench.machine.flop_per_s())
        return 0.0

    seconds = _in_turn({"penstock": ours, **peers, "machine": machine}, bench.counts.rounds)
    del seconds["machine"]
    speed = {way: len(texts) / statistics.median(found) for way, found in seconds.items()}
    worst = {way: float(_cosines(vectors[way], vectors[REFERENCE]).min()) for way in speed}
    eligible = {way: value for way, value in speed.items() if way in peers and worst[way] >= MIN_COSINE}
    flop = flop_per_text(bench.config, bench.corpus.lengths(texts))
    ceiling = statistics.median(rates[1:])
    rows = [
        Row(way=f"{name}, {way}", unit="texts/s", values=[len(texts) / s for s in found])
        for way, found in seconds.items()
    ]
    rows += [Row(way=f"{name}, {way}, smallest cosine", unit="", values=[c]) for way, c in worst.items()]
    rows += [
        Row(
            way=f"{name}, matrix products on all cores",
            unit="GFLOP/s",
            values=[rate / 1e9 for rate in rates[1:]],
        ),
        Row(way=f"{name}, cost of a text", unit="GFLOP", values=[flop / 1e9]),
    ]
    figures = {
        f"vs_fastest_peer{suffix}": Figure(
            value=speed["penstock"] / max(eligible.values()), unit="x", goal=goals[0]
        ),
        f"vs_sentence_transformers_fp32{suffix}": Figure(
            value=speed["penstock"] / speed[REFERENCE], unit="x"
        ),
        f"min_cosine{suffix}": Figure(value=worst["penstock"], unit="", goal=MIN_COSINE),
        f"share_of_ceiling{suffix}": Figure(value=speed["penstock"] * flop / ceiling, unit="", goal=goals[1]),
    }
    return Found(rows=rows, figures=figures)


def _in_turn(ways: Mapping[str, Callable[[], float]], n_rounds: int) -> dict[str, list[float]]:
    """Measure each way once a round; each begins a round, and every other round goes backwards.

    The first round is a warm-up and left out.
    """
    found: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for number in range(n_rounds + 1):
        place = number % len(names)
        order = names[place:] + names[:place]
        for name in order if number % 2 else reversed(order):
            found[name].append(ways[name]())
    return {name: values[1:] for name, values in found.items()}


def _by_threads(client: Client, texts: Sequence[str]) -> float:
    """Return how long 64 threads of one client take for all texts, one at a time each; seconds."""
    with ThreadPoolExecutor(N_CALLERS) as pool:
        list(pool.map(lambda _: client.registry(), range(N_CALLERS)))  # all threads have started
        began = time.perf_counter()
        list(pool.map(lambda text: client.embed([text], model=MODEL), texts))
        return time.perf_counter() - began


async def _by_tasks(url: str, texts: Sequence[str]) -> float:
    """Return how long 64 tasks of one client take for all texts, one at a time each; seconds."""
    async with AsyncClient(url) as client:
        await client.embed([texts[0]], model=MODEL)
        waiting = iter(texts)

        async def call() -> None:
            for text in waiting:
                await client.embed([text], model=MODEL)

        began = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for _ in range(N_CALLERS):
                group.create_task(call())
        return time.perf_counter() - began


def _store_result(bench: Bench) -> str:
    """Have 4,096 texts embedded in one job; return its id."""
    job = bench.client.submit_embed(bench.corpus.short(FETCHED_TEXTS), model=MODEL)
    job.result()
    return job.id


def _must_be_fetched(vectors: object, payload: object) -> None:
    assert isinstance(vectors, np.ndarray)
    assert isinstance(payload, bytes)
    assert len(vectors) == FETCHED_TEXTS
    assert vectors.dtype == np.float32
    assert len(payload) > vectors.nbytes


def _pass_through(client: Client, texts: Iterable[str]) -> None:
    for _ in client.embed_many(texts, model=MODEL):
        pass


def _worker_pids(client: Client) -> list[int]:
    return [worker.pid for worker, _ in client.registry().workers]


def _mebibytes(pid: int, file: str, name: str) -> float:
    """Return a line of a file of /proc, which is in KiB there."""
    lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) / 1024


def _cosines(a: Vectors, b: Vectors) -> Vectors:
    """Return the cosine of each row of `a` with the row of `b`, shape (n,)."""
    found: Vectors = (a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return found


def _libraries(text: str) -> list[str]:
    found = text.split(",")
    if unknown := [name for name in found if name not in WAYS]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}; known: {', '.join(WAYS)}")
    return found


if __name__ == "__main__":
    main()
