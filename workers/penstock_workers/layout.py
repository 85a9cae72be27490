"""How many worker processes fit this machine, and how many threads each has, where `auto` leaves it to us."""

import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from penstock.errors import ConfigError, ModelLoadError
from penstock.request import PoolName
from penstock.settings import AUTO, ModelSettings, Settings
from penstock_workers.checkpoint.source import resolve_source
from penstock_workers.hardware.machine import Machine

POOLS: Final[tuple[PoolName, ...]] = ("gpu", "cpu")
MAX_THREADS: Final = 4
"""Threads of a process that generates: a decode step waits for memory, which few cores saturate.

Of one on a card, too: there they tokenize.
"""
PER_CARD: Final = 4
"""Processes that share a card where the models are small: it would wait for what processors do for one."""
CORES_PER_REPLICA: Final = 2
"""So many for each at least."""
SMALL_BYTES: Final = 512 << 20
"""Files of all models together that are small; larger ones are on a card once."""
GENERATING_PROCESSES: Final = 2
"""That share the cores at least, where text is generated: docs/how-to/tune.md has what was measured."""
SHARED_BYTES: Final = 512 << 20
"""What all processes of a pool have in common, imports above all: they are forked, on Linux."""
PROCESS_BYTES: Final = 192 << 20
"""A process beside others of its kind, without its weights: 110 MiB were measured for all-MiniLM-L6-v2."""
WEIGHTS_FACTOR: Final = 2
"""Memory over files: float32 of 16-bit files, or float32 and a bfloat16 copy."""
UNSEEN_WEIGHTS_BYTES: Final = 1 << 30
"""Taken for a model that is not downloaded yet."""

_CARDS: Final = """
import os, torch
n = torch.cuda.device_count()
names = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(n)))).split(",")[:n]
print(*names or ["mps"] * torch.backends.mps.is_available())
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The worker processes of a pool.

    Attributes:
        processes: how many; 0 for a pool without a card.
        threads: torch threads in each.
        cards: what CUDA calls those that the processes share out among them; empty: nothing to share out.
    """

    processes: int
    threads: int
    cards: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{_count(self.processes, 'process', 'es')} of {_count(self.threads, 'thread', 's')}"


def _count(n: int, noun: str, plural: str) -> str:
    return f"{n} {noun}{'' if n == 1 else plural}"


def thread_variables(n_threads: int) -> dict[str, str]:
    """Return what OpenMP and the tokenizers read as they load; untold, they take all cores."""
    return {
        "OMP_NUM_THREADS": str(n_threads),
        "RAYON_NUM_THREADS": str(n_threads),
        "TOKENIZERS_PARALLELISM": "true" if n_threads > 1 else "false",
    }


def pss_bytes(pid: int | None = None) -> int | None:
    """Return the memory of a process (None: this one), shared pages divided among those that share them.

    Linux alone tells; None elsewhere. Source: proc_pid_smaps(5), Pss.
    """
    rollup = Path(f"/proc/{pid or 'self'}/smaps_rollup")
    if not rollup.exists():
        return None
    (line,) = (line for line in rollup.read_text().splitlines() if line.startswith("Pss:"))
    return int(line.split()[1]) << 10


def choose_threads(
    settings: Settings, pool: PoolName, models: Iterable[ModelSettings], machine: Machine
) -> int:
    """Return how many threads a process has that serves these models."""
    wanted = getattr(settings.pools, pool)
    if wanted.threads != AUTO:
        return int(wanted.threads)
    if on_cards(settings, pool):
        return share_of_cores(machine, 1)
    if all(model.task != "generate" or model.engine == "remote" for model in models):
        return 1
    return share_of_cores(machine, GENERATING_PROCESSES if wanted.processes == AUTO else wanted.processes)


def share_of_cores(machine: Machine, processes: int) -> int:
    """Return how many threads each of so many processes has, if none takes more than it can use."""
    return max(1, min(machine.cores // max(processes, 1), MAX_THREADS))


def choose_layouts(settings: Settings, machine: Machine) -> Mapping[PoolName, Layout]:
    """Return the layout of each pool that serves a model.

    Raises:
        ConfigError: torch cannot be asked for cards.
    """
    return {
        pool: _choose_layout(settings, pool, models, machine)
        for pool in POOLS
        if (models := {name: model for name, model in settings.models.items() if pool in model.pools})
    }


def _choose_layout(
    settings: Settings, pool: PoolName, models: Mapping[str, ModelSettings], machine: Machine
) -> Layout:
    wanted = getattr(settings.pools, pool)
    threads = choose_threads(settings, pool, models.values(), machine)
    if on_cards(settings, pool):
        if wanted.processes in (0, 1):
            return Layout(processes=wanted.processes, threads=threads)
        cards = find_cards()
        # A device that was asked for by name and is not there: the worker that is started says so.
        at_least = 0 if wanted.device == AUTO else 1
        processes = max(len(cards), at_least) if wanted.processes == AUTO else wanted.processes
        if wanted.processes == AUTO and any(model.device_map for model in models.values()):
            return Layout(processes=min(1, processes), threads=threads)  # one that sees all cards
        cuda = () if cards == ("mps",) else cards
        if wanted.processes == AUTO and cuda and _are_small(models):
            processes *= max(1, min(PER_CARD, machine.cores // (CORES_PER_REPLICA * len(cuda))))
        if wanted.threads == AUTO:
            threads = share_of_cores(machine, processes)
        return Layout(processes=processes, threads=threads, cards=cuda)
    if wanted.processes != AUTO:
        return Layout(processes=wanted.processes, threads=threads)
    if pool == "gpu":  # a trial of the routing, which should leave the machine to the other pool
        return Layout(processes=1, threads=threads)
    fit = (machine.memory_bytes - SHARED_BYTES) // process_bytes(models)
    return Layout(processes=max(1, min(machine.cores // threads, fit)), threads=threads)


def _are_small(models: Mapping[str, ModelSettings]) -> bool:
    """Say whether a card that serves these models mostly waits for what comes before and after them."""
    if any(model.task == "generate" and model.engine != "remote" for model in models.values()):
        return False  # each process would take memory for its cache
    return sum(_weights_bytes(name, model) for name, model in models.items()) <= SMALL_BYTES


def on_cards(settings: Settings, pool: PoolName) -> bool:
    """Say whether a pool computes on cards."""
    return pool == "gpu" and settings.pools.gpu.device != "cpu"


def find_cards() -> tuple[str, ...]:
    """Return what CUDA calls the cards it may use, or ("mps",), or nothing.

    Raises:
        ConfigError: torch cannot be asked.
    """
    # In a process of its own: torch is large, and a process that has touched CUDA cannot fork.
    done = subprocess.run([sys.executable, "-c", _CARDS], capture_output=True, text=True, check=False)  # noqa: S603  # our own interpreter
    if done.returncode:
        reason = (done.stderr.splitlines() or ["no reason"])[-1]
        raise ConfigError([f"pools.gpu.processes: torch cannot be asked for cards: {reason}"])
    return tuple(done.stdout.split())


def process_bytes(models: Mapping[str, ModelSettings]) -> int:
    """Estimate the memory of a process on processors that serves these models."""
    return PROCESS_BYTES + WEIGHTS_FACTOR * sum(_weights_bytes(name, model) for name, model in models.items())


def _weights_bytes(name: str, model: ModelSettings) -> int:
    if model.engine == "remote":
        return 0
    # No torch in it, but a quarter of a second.
    from huggingface_hub import snapshot_download

    try:
        source = resolve_source(name, model)
        folder = Path(source)
        if not folder.is_dir():
            folder = Path(snapshot_download(source, revision=model.revision, local_files_only=True))
    except (ModelLoadError, OSError, ValueError):  # nothing on this disk; the worker tells what is wrong
        return UNSEEN_WEIGHTS_BYTES
    for pattern in ("*.safetensors", "*.bin"):
        if found := sum(file.stat().st_size for file in folder.rglob(pattern)):
            return found
    return UNSEEN_WEIGHTS_BYTES
