"""How many threads a process computes with, and the variables that tell its libraries."""

from collections.abc import Iterable
from typing import Final

from penstock.request import PoolName
from penstock_workers.hardware.machine import Machine
from penstock_workers.settings import AUTO, ModelSettings, Settings

MAX_THREADS: Final = 4
"""Threads of a process that generates: a decode step waits for memory, which few cores saturate.

A process on a GPU has no more either: it tokenizes with them.
"""
GENERATING_PROCESSES: Final = 2
"""Fewest processes that share the cores where text is generated: docs/how-to/tune.md has the measurement."""


def choose_threads(
    settings: Settings, pool: PoolName, models: Iterable[ModelSettings], machine: Machine
) -> int:
    """Return the number of threads of a process that serves these models."""
    wanted = getattr(settings.pools, pool)
    if wanted.threads != AUTO:
        return int(wanted.threads)
    if on_gpus(settings, pool):
        return share_of_cores(machine, 1)
    if all(model.task != "generate" or model.engine == "remote" for model in models):
        return 1
    return share_of_cores(machine, GENERATING_PROCESSES if wanted.processes == AUTO else wanted.processes)


def share_of_cores(machine: Machine, processes: int) -> int:
    """Return the threads of each of `processes`, which share the cores; never more than a process can use."""
    return max(1, min(machine.cores // max(processes, 1), MAX_THREADS))


def on_gpus(settings: Settings, pool: PoolName) -> bool:
    """Say whether a pool computes on GPUs."""
    return pool == "gpu" and settings.pools.gpu.device != "cpu"


def thread_variables(n_threads: int) -> dict[str, str]:
    """Return the variables that OpenMP and the tokenizers read as they load, else they take all cores."""
    return {
        "OMP_NUM_THREADS": str(n_threads),
        "RAYON_NUM_THREADS": str(n_threads),
        "TOKENIZERS_PARALLELISM": "true" if n_threads > 1 else "false",
    }
