"""A process that was forked is what one would be that was started from nothing."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import warm
from tests.deployment import ROOT
from tests.eventually import eventually

PROGRAM = [sys.executable, "-m", "tests.integration.program"]
TELL = """
import atexit, os, sys, threading
atexit.register(print, "left in order")
print(os.getcwd(), sys.argv[0], len(sys.argv), __name__, sys.path[0])
print(sorted(os.environ.items()), threading.active_count(), file=sys.stderr)
sys.exit(7)
"""


def started(folder: Path, source: str, **environment: str) -> tuple[warm.Process, Path]:
    """Start a program; return it, and what it writes to."""
    log = folder / "log"
    with log.open("wb") as output:
        return warm.start([*PROGRAM, source], {**os.environ, **environment}, output, imports="celery"), log


def test_it_is_as_if_it_had_been_started(tmp_path: Path) -> None:
    """Arguments, environment, folder, output, exit code, and what it does as it leaves."""
    forked, log = started(tmp_path, TELL, PENSTOCK_TOLD="yes")
    code = forked.wait(30)
    alone = subprocess.run(
        [*PROGRAM, TELL],
        env={**os.environ, "PENSTOCK_TOLD": "yes"},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )

    assert isinstance(forked, warm.Forked)
    assert code == alone.returncode == 7
    assert sorted(log.read_bytes().splitlines()) == sorted(alone.stdout.splitlines())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_signals_reach_it(tmp_path: Path, number: signal.Signals) -> None:
    """It ends as it would, and who asks is told by which."""
    forked, log = started(tmp_path, "import signal; print('here', flush=True); signal.pause()")
    eventually(lambda: "here" in log.read_text(), within_s=30)
    before = forked.poll()
    with pytest.raises(subprocess.TimeoutExpired):
        forked.wait(0.05)

    forked.send_signal(number)

    assert before is None
    assert forked.wait(30) == -number == forked.returncode == forked.poll()
    forked.kill()  # nobody


def test_a_variable_that_libraries_read_means_a_start_from_nothing(tmp_path: Path) -> None:
    """What was imported before it was set would not know of it."""
    process, log = started(tmp_path, "import os; print(os.environ['HF_HOME'])", HF_HOME="elsewhere")

    assert isinstance(process, subprocess.Popen)
    assert process.wait(30) == 0
    assert log.read_text() == "elsewhere\n"
