"""`penstock tune`: which processes, threads and batches embed generated texts fastest on this machine.

Measures the engine and the batcher of a worker. A worker's work for Redis and Celery comes on top.
"""

import math
import os
import random
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection
from statistics import mean
from typing import TYPE_CHECKING, Final

from tqdm import tqdm

from penstock.errors import ConfigError, PenstockError, WorkerError
from penstock.request import EmbedRequest, PoolName
from penstock_workers.batching.batcher import Batcher
from penstock_workers.batching.feed import Job
from penstock_workers.command.capacity import Layout, find_gpus, process_bytes
from penstock_workers.hardware.machine import pss_bytes, read_machine
from penstock_workers.hardware.threads import on_gpus, share_of_cores, thread_variables
from penstock_workers.serving.loading import batches_at_once, cut_texts
from penstock_workers.settings import ModelSettings, Settings

if TYPE_CHECKING:  # torch loads in the processes that compute
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from penstock_workers.embedding.embedder import Embedder
    from penstock_workers.embedding.tokenizing import Encoded

THREADS: Final = (1, 2, 4, 8)
REPLICAS: Final = (1, 2, 4)
"""Processes on one GPU."""
BATCH_TOKENS: Final = {"cpu": (512, 1024, 2048, 4096), "gpu": (8192, 16_384, 32_768, 65_536)}
ROUNDS: Final = 2
"""Each batch size is measured this often, in turn: machines are noisy, and their clocks change."""
LEAST_S: Final = 0.5
LEAST_BATCHES: Final = 3
"""Fewest batches of a measurement, the first included, which is not counted: it warms up."""
NOISE: Final = 0.03
"""Candidates within this share of the fastest are as good; memory decides then, then small batches."""
JOBS_UNDER_WAY: Final = 3
JOB_S: Final = 0.5
"""Work in a job, seconds, as `embed_many` cuts its jobs."""
_WORDS: Final = """
the of and to in is it that was for on are with as his they be at one have this from or had by hot but some
what there we can out other were all your when up use word how said an each she which do their time turbine
pressure reservoir engineer maintenance efficiency 1924 café measurement distribution
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """The measurement of one candidate.

    Attributes:
        layout: Processes and threads.
        model: Name of the model that embedded.
        max_batch_tokens: Upper bound of a batch, tokens.
        texts_per_s: Texts per second of all processes together, mean of the rounds.
        memory_bytes: Memory of all processes together, shared pages counted once; 0 where the system does not
            tell.
    """

    layout: Layout
    model: str
    max_batch_tokens: int
    texts_per_s: float
    memory_bytes: int


def texts(n: int = 1024) -> list[str]:
    """Return texts of 1 to 400 words, 25 in the median, the same each time."""
    words = _WORDS.split()
    seeded = random.Random(0)  # noqa: S311  # texts, not secrets
    lengths = [min(400, max(1, round(seeded.lognormvariate(math.log(25), 1)))) for _ in range(n)]
    return [" ".join(seeded.choices(words, k=length)) for length in lengths]


def candidates(settings: Settings, pool: PoolName, names: Sequence[str]) -> list[Layout]:
    """Return the layouts that fit this machine, those of fewer threads first.

    Raises:
        ConfigError: The pool works on GPUs, and there is none.
    """
    machine = read_machine()
    if on_gpus(settings, pool):
        gpus = find_gpus()
        if not gpus:
            raise ConfigError([f'pool {pool} finds no GPU; set pools.{pool}.device = "cpu" to try without'])
        cuda = () if gpus == ("mps",) else gpus
        numbers = [len(gpus) * n for n in REPLICAS if n == 1 or (cuda and len(gpus) * n <= machine.cores)]
        return [Layout(processes=n, threads=share_of_cores(machine, n), gpus=cuda) for n in numbers]
    fit = machine.memory_bytes // process_bytes({name: settings.models[name] for name in names})
    return [
        Layout(processes=max(1, min(machine.cores // n, fit)), threads=n)
        for n in THREADS
        if n <= machine.cores
    ]


def choose_names(settings: Settings, pool: PoolName, models: Sequence[str]) -> list[str]:
    """Return the embedding models to measure.

    Args:
        settings: The deployment's settings.
        pool: Pool to measure.
        models: Names of models; empty for all of the pool.

    Raises:
        ConfigError: The pool embeds with no model, or not with one of these.
    """
    known = [
        name
        for name, model in settings.models.items()
        if pool in model.pools and model.task == "embed" and model.engine != "remote"
    ]
    if wrong := [name for name in models if name not in known]:
        names = ", ".join(known) or "none"
        raise ConfigError([f"pool {pool} embeds with no {name!r}; its models: {names}" for name in wrong])
    if not known:
        raise ConfigError([f"pool {pool} has no embedding model, and only these can be measured"])
    return list(models) or known


def measure(
    settings: Settings, pool: PoolName, names: Sequence[str], layouts: Sequence[Layout], seconds: float
) -> list[Measured]:
    """Measure layouts one after the other, as many as the time allows.

    Args:
        settings: The deployment's settings.
        pool: Pool to measure.
        names: Embedding models. Each process loads all of them, and they are measured in turn.
        layouts: Candidates; at least the first is measured.
        seconds: Time for all of it, loading included. The first layout is measured to its end.

    Raises:
        PenstockError: A model cannot be loaded, or a process ended.
    """
    sizes = BATCH_TOKENS["gpu" if on_gpus(settings, pool) else "cpu"]
    runs = [(name, size) for _ in range(ROUNDS) for name in names for size in sizes]
    ends_at = time.monotonic() + seconds
    found: list[Measured] = []
    load_s = 0.0
    with tqdm(total=len(layouts) * len(runs), unit="run", leave=False, disable=None) as bar:
        for number, layout in enumerate(layouts):
            left = len(layouts) - number
            if found and time.monotonic() + load_s + len(runs) * LEAST_S > ends_at:
                break
            bar.set_description(f"{layout}, loading")
            began = time.monotonic()
            with _processes(settings, pool, names, layout) as connections:
                load_s = time.monotonic() - began
                rates: dict[tuple[str, int], list[float]] = {}
                memory: dict[tuple[str, int], int] = {}
                for i, run in enumerate(runs):
                    bar.set_description(f"{layout}, {run[0]} by {run[1]} tokens")
                    n_runs = left * len(runs) - i
                    spare_s = ends_at - time.monotonic() - (left - 1) * load_s
                    for connection in connections:
                        connection.send((*run, max(LEAST_S, spare_s / n_runs)))
                    answers = [_receive(connection) for connection in connections]
                    rates.setdefault(run, []).append(sum(rate for rate, _ in answers))
                    memory[run] = sum(n_bytes for _, n_bytes in answers)
                    bar.update()
            found += [
                Measured(
                    layout=layout,
                    model=name,
                    max_batch_tokens=size,
                    texts_per_s=mean(rates[name, size]),
                    memory_bytes=memory[name, size],
                )
                for name, size in rates
            ]
    return found


def choose_best(found: Sequence[Measured]) -> list[Measured]:
    """Return one measurement per model, all for the one layout that suits the models best together."""

    def best(measured: Sequence[Measured]) -> Measured:
        fastest = max(one.texts_per_s for one in measured)
        near = [one for one in measured if one.texts_per_s >= (1 - NOISE) * fastest]
        return min(near, key=lambda one: one.max_batch_tokens)

    layouts = list(dict.fromkeys(one.layout for one in found))
    models = list(dict.fromkeys(one.model for one in found))
    chosen = [
        [best([one for one in found if one.layout == layout and one.model == model]) for model in models]
        for layout in layouts
    ]

    def speed(row: Sequence[Measured]) -> float:
        return math.prod(one.texts_per_s for one in row) ** (1 / len(row))

    fastest = max(map(speed, chosen))
    near = [row for row in chosen if speed(row) >= (1 - NOISE) * fastest]
    return min(near, key=lambda row: max(one.memory_bytes for one in row))


def table(found: Sequence[Measured], best: Sequence[Measured]) -> Iterator[str]:
    """Yield lines for people."""
    width = max(len(one.model) for one in found)
    shape = f"{{:28}}  {{:{width}}}  {{:>16}}  {{:>9}}  {{:>7}}  {{}}"
    yield shape.format("layout", "model", "max_batch_tokens", "texts/s", "MiB", "").rstrip()
    for one in found:
        counts = f"{one.max_batch_tokens:,}", f"{one.texts_per_s:,.1f}", f"{one.memory_bytes / 2**20:,.0f}"
        yield shape.format(str(one.layout), one.model, *counts, "best" if one in best else "").rstrip()


def snippet(pool: PoolName, best: Sequence[Measured]) -> str:
    """Return TOML for the configuration."""
    layout = best[0].layout
    tables = [f"[pools.{pool}]\nprocesses = {layout.processes}\nthreads = {layout.threads}\n"]
    tables += [f"[models.{one.model}]\nmax_batch_tokens = {one.max_batch_tokens}\n" for one in best]
    return "\n".join(tables)


@contextmanager
def _processes(
    settings: Settings, pool: PoolName, names: Sequence[str], layout: Layout
) -> Iterator[list[Connection]]:
    """Start processes, wait until all have loaded, and end them with the block, however it ends."""
    spawn = get_context("spawn")
    pairs = [spawn.Pipe() for _ in range(layout.processes)]
    processes = [
        spawn.Process(target=_serve, args=(theirs, settings, pool, names, layout, number), daemon=True)
        for number, (_, theirs) in enumerate(pairs)
    ]
    try:
        # A terminal's Ctrl-C reaches the whole group. The children inherit the mask and never see the signal.
        # In this process another thread may, and a start that is cut short leaves a child half set up: so it
        # takes effect when all are started. The resource tracker lifts the mask as it starts, so it starts
        # first.
        resource_tracker.ensure_running()
        interrupts: list[int] = []
        before = signal.signal(signal.SIGINT, lambda number, _: interrupts.append(number))
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            for process, (_, theirs) in zip(processes, pairs, strict=True):
                process.start()
                theirs.close()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            signal.signal(signal.SIGINT, before)
        if interrupts:
            raise KeyboardInterrupt
        ours = [connection for connection, _ in pairs]
        for connection in ours:
            _receive(connection)
        yield ours
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()


def _receive(connection: Connection) -> tuple[float, int]:
    try:
        answer = connection.recv()
    except EOFError:
        raise WorkerError("a process ended while it was measured; was there too little memory?") from None
    if isinstance(answer, PenstockError):
        raise answer
    rate, n_bytes = answer
    return rate, n_bytes


def _serve(
    connection: Connection,
    settings: Settings,
    pool: PoolName,
    names: Sequence[str],
    layout: Layout,
    number: int,
) -> None:
    """Load the models, then measure for each order of the parent, until it closes the pipe."""
    if layout.gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = layout.gpus[number % len(layout.gpus)]
    os.environ.update(thread_variables(layout.threads))
    # A worker's imports count as its memory, and torch must not be imported before.
    from transformers.utils.logging import disable_progress_bar

    import penstock_workers.serving.app  # noqa: F401
    from penstock_workers.embedding.embedder import Embedder
    from penstock_workers.hardware.device import choose_device, share_cores

    # The parent shows the progress.
    disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers has no types here
    try:
        device = choose_device(pool, getattr(settings.pools, pool).device)
        share_cores(layout.threads, device)
        subjects = {
            name: _Subject(settings.models[name], Embedder.load(name, settings.models[name], device), device)
            for name in names
        }
        connection.send((0.0, 0))
        while True:
            name, max_batch_tokens, seconds = connection.recv()
            connection.send(subjects[name].steady_rate(max_batch_tokens, seconds))
    except (EOFError, BrokenPipeError):
        return
    except PenstockError as error:
        connection.send(error)


class _Subject:
    """A model and one batcher, as in a worker: a second model thread would hold buffers of its own."""

    def __init__(self, model: ModelSettings, engine: "Embedder", device: "torch.device") -> None:
        self._model, self._engine, self._device = model, engine, device
        self._texts = texts()
        n_tokens = (text.n_tokens for text in engine.prepare(self._request(self._texts)))
        self._tokens_per_text = mean(n_tokens)
        self._cut = cut_texts(model, engine, device)
        self._batcher = Batcher(
            engine.name,
            self._run,
            lambda lengths, limit: self._cut(lengths, limit),
            n_threads=batches_at_once(device),
        )
        self._ends: list[tuple[float, int]] = []  # of batches: seconds, tokens

    def steady_rate(self, max_batch_tokens: int, seconds: float) -> tuple[float, int]:
        """Return texts per second, from the first batch's end to the last's, and the memory in bytes.

        Raises:
            PenstockError: A text cannot be embedded.
        """
        model = self._model.model_copy(update={"max_batch_tokens": max_batch_tokens})
        self._cut = cut_texts(model, self._engine, self._device)
        self._ends = []
        self._enough, self._ends_at = threading.Event(), time.perf_counter() + seconds
        errors: list[PenstockError] = []
        feeders = [threading.Thread(target=self._feed, args=(errors,)) for _ in range(JOBS_UNDER_WAY)]
        for feeder in feeders:
            feeder.start()
        self._enough.wait()
        n_bytes = pss_bytes() or 0
        for feeder in feeders:
            feeder.join()
        if errors:
            raise errors[0]
        (first, _), *_, (last, _) = self._ends
        n_tokens = sum(n for _, n in self._ends[1:])
        return n_tokens / (last - first) / self._tokens_per_text, n_bytes

    def _run(
        self, batch: "Sequence[Encoded]"
    ) -> "Iterator[tuple[int, NDArray[np.float32] | PenstockError] | None]":
        yield from self._engine.run(batch)
        self._ends.append((time.perf_counter(), sum(text.n_tokens for text in batch)))
        if self._ends[-1][0] >= self._ends_at and len(self._ends) >= LEAST_BATCHES:
            self._enough.set()

    def _feed(self, errors: list[PenstockError]) -> None:
        start, enough = 0, self._enough
        try:
            while not enough.is_set():
                n_texts = int(JOB_S * (self._batcher.tokens_per_s or 0) / self._tokens_per_text)
                n_texts = min(max(n_texts, 16), len(self._texts))
                chosen = [self._texts[(start + i) % len(self._texts)] for i in range(n_texts)]
                start += n_texts
                prepared = self._engine.prepare(self._request(chosen))
                self._batcher.submit(Job(id="tune", is_unwanted=enough.is_set), prepared).wait()
        except PenstockError as error:
            if not enough.is_set():  # otherwise the jobs in flight were cancelled
                errors.append(error)
                enough.set()

    def _request(self, texts: list[str]) -> EmbedRequest:
        return EmbedRequest(model=self._engine.name, texts=texts)
