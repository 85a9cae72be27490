"""How many worker processes fit this machine, with how many threads each, where the settings say `auto`."""

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from penstock.errors import ConfigError, ModelLoadError
from penstock.request import PoolName
from penstock_workers.checkpoint.source import resolve_source
from penstock_workers.hardware.machine import Machine
from penstock_workers.hardware.threads import choose_threads, on_gpus, share_of_cores
from penstock_workers.settings import AUTO, ModelSettings, Settings

POOLS: Final[tuple[PoolName, ...]] = ("gpu", "cpu")
PER_GPU: Final = 4
"""Processes that share a GPU where the models are small: the CPU work for one would leave it idle."""
CORES_PER_REPLICA: Final = 2
"""Fewest cores for each process that shares a GPU."""
SMALL_BYTES: Final = 512 << 20
"""Size of all models' files up to which they are small; larger models are on a GPU once."""
SHARED_BYTES: Final = 512 << 20
"""Memory that all processes of a pool share, imports above all: on Linux they are forked."""
PROCESS_BYTES: Final = 192 << 20
"""Memory of one more process, without its weights: 110 MiB were measured for all-MiniLM-L6-v2."""
WEIGHTS_FACTOR: Final = 2
"""Memory by size of the files: float32 of 16-bit files, or float32 and a bfloat16 copy."""
UNSEEN_WEIGHTS_BYTES: Final = 1 << 30
"""Assumed size of a model that is not downloaded yet."""

_ASK_TORCH: Final = """
import os, torch
n = torch.cuda.device_count()
names = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(n)))).split(",")[:n]
print(*names or ["mps"] * torch.backends.mps.is_available())
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The worker processes of a pool.

    Attributes:
        processes: Number of processes; 0 for a pool of GPUs on a machine without one.
        threads: Number of torch threads in each process.
        gpus: CUDA's names of the GPUs, which the processes divide among them; empty where there is nothing to
            divide.
    """

    processes: int
    threads: int
    gpus: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{_count(self.processes, 'process', 'es')} of {_count(self.threads, 'thread', 's')}"


def _count(n: int, noun: str, plural: str) -> str:
    return f"{n} {noun}{'' if n == 1 else plural}"


def choose_layouts(settings: Settings, machine: Machine) -> Mapping[PoolName, Layout]:
    """Return the layout of each pool that serves a model.

    Raises:
        ConfigError: torch cannot be asked for GPUs.
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
    if on_gpus(settings, pool):
        if wanted.processes in (0, 1):
            return Layout(processes=wanted.processes, threads=threads)
        gpus = find_gpus()
        # One process at least for a device that is configured by name: the worker says that it is not there.
        at_least = 0 if wanted.device == AUTO else 1
        processes = max(len(gpus), at_least) if wanted.processes == AUTO else wanted.processes
        if wanted.processes == AUTO and any(model.device_map for model in models.values()):
            return Layout(processes=min(1, processes), threads=threads)  # one process that sees all GPUs
        cuda = () if gpus == ("mps",) else gpus
        if wanted.processes == AUTO and cuda and _are_small(models):
            processes *= max(1, min(PER_GPU, machine.cores // (CORES_PER_REPLICA * len(cuda))))
        if wanted.threads == AUTO:
            threads = share_of_cores(machine, processes)
        return Layout(processes=processes, threads=threads, gpus=cuda)
    if wanted.processes != AUTO:
        return Layout(processes=wanted.processes, threads=threads)
    if pool == "gpu":  # a trial of the routing, which should leave the machine to the other pool
        return Layout(processes=1, threads=threads)
    fit = (machine.memory_bytes - SHARED_BYTES) // process_bytes(models)
    return Layout(processes=max(1, min(machine.cores // threads, fit)), threads=threads)


def _are_small(models: Mapping[str, ModelSettings]) -> bool:
    """Say whether a GPU that serves these models mostly waits for the CPU."""
    if any(model.task == "generate" and model.engine != "remote" for model in models.values()):
        return False  # each process would need memory for a cache of its own
    return sum(_weights_bytes(name, model) for name, model in models.items()) <= SMALL_BYTES


def find_gpus() -> tuple[str, ...]:
    """Return CUDA's names of the GPUs that it may use, or ("mps",), or nothing.

    Raises:
        ConfigError: torch cannot be asked.
    """
    # In a process of its own: torch is large, and a process that has touched CUDA cannot fork.
    done = subprocess.run([sys.executable, "-c", _ASK_TORCH], capture_output=True, text=True, check=False)  # noqa: S603  # our own interpreter
    if done.returncode:
        reason = (done.stderr.splitlines() or ["no reason"])[-1]
        raise ConfigError([f"pools.gpu.processes: torch cannot be asked for GPUs: {reason}"])
    return tuple(done.stdout.split())


def process_bytes(models: Mapping[str, ModelSettings]) -> int:
    """Estimate the memory of a process that serves these models on the CPU."""
    return PROCESS_BYTES + WEIGHTS_FACTOR * sum(_weights_bytes(name, model) for name, model in models.items())


def _weights_bytes(name: str, model: ModelSettings) -> int:
    if model.engine == "remote":
        return 0
    # Imports no torch, but takes a quarter of a second.
    from huggingface_hub import snapshot_download

    try:
        source = resolve_source(name, model)
        folder = Path(source)
        if not folder.is_dir():
            folder = Path(snapshot_download(source, revision=model.revision, local_files_only=True))
    except (ModelLoadError, OSError, ValueError):  # not on this disk; the worker says what is wrong
        return UNSEEN_WEIGHTS_BYTES
    for pattern in ("*.safetensors", "*.bin"):
        if found := sum(file.stat().st_size for file in folder.rglob(pattern)):
            return found
    return UNSEEN_WEIGHTS_BYTES
