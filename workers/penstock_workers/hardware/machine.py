"""What this process may use of the machine: cores, memory, and what its CPU can do. Needs no torch."""

import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from penstock_workers.configuration import read_cpu_limit
from penstock_workers.settings import Cpu

_BEYOND: Final[Mapping[Cpu, tuple[str, ...]]] = {
    "avx2": ("avx512", "avx_vnni", "amx"),
    "avx512": ("avx512_bf16", "avx512_fp16", "amx"),
    "avx512_bf16": ("avx512_fp16", "amx"),
    "amx": (),
}
"""What instruction sets begin with that a CPU of each kind does not have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The cores and the memory that this process may use.

    Attributes:
        cores: Whole cores, at least one.
        memory_bytes: Memory that is available now and that the control groups allow.
    """

    cores: int
    memory_bytes: int


def read_machine(root: Path = Path("/")) -> Machine:
    """Read affinity, control groups (version 2) and free memory.

    Args:
        root: Folder that holds `proc` and `sys`.

    Source: kernel.org, Control Group v2, `cpu.max` and `memory.max`; proc(5), MemAvailable.
    """
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = [len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1]
    for text in _limits(root, "cpu.max"):
        quota, period = text.split()
        cores.append(max(1, int(quota) // int(period)))
    memory = [_available_bytes(root), *map(int, _limits(root, "memory.max"))]
    return Machine(cores=min(cores), memory_bytes=min(memory))


def free_bytes(root: Path = Path("/")) -> int:
    """Return how much memory this process can still take.

    Args:
        root: Folder that holds `proc` and `sys`.
    """
    return max(0, min(_available_bytes(root), left_to_groups_bytes(root)))


def left_to_groups_bytes(root: Path = Path("/")) -> int:
    """Return what our control group (version 2) and those above it still allow; huge where none has a limit.

    Args:
        root: Folder that holds `proc` and `sys`.
    """
    left = [1 << 62]
    for group in _control_groups(root):
        try:
            limit, used = ((group / name).read_text() for name in ("memory.max", "memory.current"))
            # Files that the system keeps in memory count as used, and give way.
            left.append(int(limit) - int(used) + _field(group / "memory.stat", "file"))
        except (OSError, ValueError):  # no limit here
            continue
    return min(left)


def pss_bytes(pid: int | None = None) -> int | None:
    """Return the memory of a process, shared pages divided among those that share them; None without Linux.

    Args:
        pid: Process number; None for this process.

    Source: proc_pid_smaps(5), Pss.
    """
    rollup = Path(f"/proc/{pid or 'self'}/smaps_rollup")
    if not rollup.exists():
        return None
    (line,) = (line for line in rollup.read_text().splitlines() if line.startswith("Pss:"))
    return int(line.split()[1]) << 10


def cpu_flags() -> set[str]:
    """Return the instruction sets of an x86-64 CPU, as far as `PENSTOCK_CPU` lets them be used.

    They are in Linux's words; empty where they are not known.
    """
    flags = Path("/proc/cpuinfo")
    is_known = platform.machine() in ("x86_64", "AMD64") and flags.exists()
    unused = _BEYOND[cpu_limit() or "amx"]
    return {flag for flag in flags.read_text().split() if not flag.startswith(unused)} if is_known else set()


def cpu_limit() -> Cpu | None:
    """Return what the CPU is to be used as, by `PENSTOCK_CPU`; None: as what it is."""
    return read_cpu_limit(os.environ)


def cpu_name() -> str:
    """Return what the CPU calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _limits(root: Path, name: str) -> Iterator[str]:
    """Yield what our control group and those above it say, where they limit at all."""
    for group in _control_groups(root):
        if (group / name).exists():
            text = (group / name).read_text()
            if not text.startswith("max"):
                yield text


def _control_groups(root: Path) -> Iterator[Path]:
    """Yield our control group (version 2) and those above it."""
    groups, mounted = root / "proc/self/cgroup", root / "sys/fs/cgroup"
    lines = groups.read_text().splitlines() if groups.exists() else []
    for path in (line.removeprefix("0::/") for line in lines if line.startswith("0::/")):
        for group in (mounted / path, *(mounted / path).parents):
            if group.is_relative_to(mounted):
                yield group


def _available_bytes(root: Path) -> int:
    try:
        return _field(root / "proc/meminfo", "MemAvailable:") << 10
    except (OSError, ValueError):  # no Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _field(file: Path, name: str) -> int:
    for line in file.read_text().splitlines():
        key, *values = line.split()
        if key == name:
            return int(values[0])
    raise ValueError(f"{file} has no {name}")
