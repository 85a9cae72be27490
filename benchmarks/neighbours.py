"""Noisy neighbours: how much CPU time other programs take while something is measured. Linux only."""

import os
import time
from collections import defaultdict
from pathlib import Path
from typing import Final

TOLERABLE: Final = 0.05
"""Above this share figures are worth nothing: libraries whose threads wait for each other lose most."""

_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")


class Neighbours:
    """Watches all processes but this one and its descendants, from when it is made."""

    def __init__(self) -> None:
        self._began, self._others = time.monotonic(), _others_s()

    def share(self) -> float:
        """Return what they took of all cores since then, 0 to 1, time stolen by other machines included."""
        spent_s = time.monotonic() - self._began
        return max(0.0, (_others_s() - self._others) / spent_s / (os.cpu_count() or 1))


def _others_s() -> float:
    """Source: proc(5): the first line of /proc/stat, and fields 4 and 14 to 17 of /proc/PID/stat."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    ticks: dict[int, int] = {}
    children: dict[int, list[int]] = defaultdict(list)
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended; its time is in its parent's
        pid = int(path.parent.name)
        children[int(fields[1])].append(pid)
        ticks[pid] = sum(map(int, fields[11:15]))
    ours, family = 0, [os.getpid()]
    while family:
        pid = family.pop()
        ours += ticks.get(pid, 0)
        family += children[pid]
    return (user + nice + system + irq + softirq + steal - ours) / _TICKS_PER_S
