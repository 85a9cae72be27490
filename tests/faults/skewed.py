"""Runs a module as `python -m` does, with a clock that is wrong: `skewed.py SECONDS MODULE ARGUMENTS`."""

import runpy
import sys
import time
from collections.abc import Callable


def set_clock(ahead_s: float, true_time: Callable[[], float] = time.time) -> None:
    """Let this process' clock be wrong from now on, as one is that somebody has set."""
    time.time = lambda: true_time() + ahead_s
    time.time_ns = lambda: round(time.time() * 1e9)


if __name__ == "__main__":
    set_clock(float(sys.argv[1]))
    module = sys.argv[2]
    sys.argv = sys.argv[2:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
