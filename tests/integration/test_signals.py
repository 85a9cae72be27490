"""Signals do what an operator expects, from the first second on, also for process 1."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from penstock_workers.command.local_redis import free_port
from tests.deployment import BUNDLED, ROOT
from tests.eventually import eventually

UNSHARE = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
MAIN = [sys.executable, "-X", "importtime", "-c", "from penstock_workers.cli import main; main()"]


def can_unshare() -> bool:
    """Whether this machine lets us start a process 1."""
    return (
        shutil.which("unshare") is not None and not subprocess.run([*UNSHARE, "true"], check=False).returncode
    )


@contextmanager
def process_1(folder: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """Run `penstock` as process 1; its broker is away. Gives what started it, and its log."""
    config, log = folder / "deployment.toml", folder / "log"
    url = f"redis://127.0.0.1:{free_port()}/0"
    config.write_text(f'[redis]\nbroker_url = "{url}"\nresults_url = "{url}"\n{BUNDLED}')
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*UNSHARE, *MAIN, *arguments],
            env={**os.environ, "PENSTOCK_CONFIG": str(config)},
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        yield process, log
    finally:
        process.kill()
        process.wait()


def child_of(process: subprocess.Popen[bytes]) -> int:
    """Return the process that has the number 1 in there."""
    return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])


@pytest.mark.skipif(not can_unshare(), reason="no process 1 to be had")
@pytest.mark.parametrize(
    ("arguments", "phase"),
    [
        (("worker", "--pool", "cpu"), "pydantic"),  # as the command line is read
        (("worker", "--pool", "cpu"), "celery.app.base"),  # as Celery is imported
        (("worker", "--pool", "cpu"), "torch.nn"),  # as a model is loaded
        (("up",), "pydantic"),
        (("up",), "cpu-1"),  # as children start
    ],
    ids=["reading", "importing", "loading", "up: reading", "up: starting"],
)
def test_process_1_hears_sigterm_while_it_starts(
    tmp_path: Path, arguments: tuple[str, ...], phase: str
) -> None:
    """SIGTERM in any phase of the start ends process 1, in seconds."""
    with process_1(tmp_path, *arguments) as (process, log):
        eventually(lambda: phase in log.read_text(errors="replace"), within_s=120)
        os.kill(child_of(process), signal.SIGTERM)

        began = time.monotonic()
        assert process.wait(60) in (0, 128 + signal.SIGTERM), log.read_text(errors="replace")[-2000:]
        assert time.monotonic() - began < 60
