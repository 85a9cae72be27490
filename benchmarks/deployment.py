"""A stack of its own for a benchmark: Redis and worker processes, as `penstock up` starts them."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from penstock import Client
from penstock.errors import PenstockError
from penstock.request import PoolName
from penstock_workers.command.capacity import choose_layouts
from penstock_workers.command.local_redis import free_port, local_redis_command, wait_until_ready
from penstock_workers.configuration import load_settings
from penstock_workers.hardware.machine import read_machine

AUTO = '"auto"'
START_LIMIT_S = 300
N_LINES = 8
"""Lines of its log that tell why a stack did not start."""


class StackFailedError(RuntimeError):
    """A benchmark's own stack did not start; the words hold the end of its log."""


@contextmanager
def deployed(
    models: str,
    *,
    pool: PoolName = "cpu",
    processes: int | None = 2,
    threads: int | None = 1,
    port: int | None = None,
) -> Iterator[Client]:
    """Run a stack and yield a client of it.

    Args:
        models: the `[models.*]` tables of the configuration.
        pool: the one that serves them.
        processes: its worker processes; None: as many as `auto` is here.
        threads: in each; likewise.
        port: of its Redis on 127.0.0.1, queues in database 0, results in 1; None takes a free one.

    Raises:
        StackFailedError: Redis or the workers did not start; nothing runs.
    """
    port = port or free_port()
    url = f"redis://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as folder:
        config, log = Path(folder) / "benchmark.toml", Path(folder) / "log"
        config.write_text(
            f'[redis]\nbroker_url = "{url}/0"\nresults_url = "{url}/1"\n'
            f"[pools.{pool}]\nprocesses = {processes or AUTO}\nthreads = {threads or AUTO}\n"
            f'[worker]\nlog_level = "warning"\n[flower]\nport = 0\n{models}'
        )
        layout = choose_layouts(load_settings(config).settings, read_machine())[pool]
        redis = subprocess.Popen(local_redis_command(port=port, folder=None), stdout=subprocess.DEVNULL)
        try:
            with _told_as("Redis"):
                wait_until_ready(f"{url}/0", within_s=10)
            command = [str(Path(sys.executable).with_name("penstock")), "up", "--config", str(config)]
            with log.open("wb") as output:
                stack = subprocess.Popen(
                    command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, "NO_COLOR": "1"}
                )
            try:
                with Client(f"{url}/0") as client:
                    with _told_as("workers"):
                        _wait(client, stack, layout.processes, log)
                    yield client
            finally:
                stack.terminate()
                stack.wait(60)
        finally:
            redis.terminate()
            redis.wait(10)


def _wait(client: Client, stack: subprocess.Popen[bytes], processes: int, log: Path) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while (n_ready := sum(worker.state == "ready" for worker, _ in client.registry().workers)) < processes:
        if (code := stack.poll()) is not None:
            what = f"`penstock up` ended with exit code {code}"
        elif time.monotonic() > deadline:
            what = f"{n_ready} of {processes} workers were ready after {START_LIMIT_S} s"
        else:
            time.sleep(0.2)
            continue
        lines = log.read_text(errors="replace").splitlines()[-N_LINES:]
        raise StackFailedError("\n".join([f"the benchmark's own stack did not start: {what}", *lines]))


@contextmanager
def _told_as(part: str) -> Iterator[None]:
    """Say of an error that it is one of our own stack's start: no Redis of the user's is out of reach."""
    try:
        yield
    except PenstockError as error:
        raise StackFailedError(f"the benchmark's own stack did not start, its {part}: {error}") from error
