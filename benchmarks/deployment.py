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
from penstock.errors import BrokerUnavailableError
from penstock.request import PoolName
from penstock_workers.command.capacity import choose_layouts
from penstock_workers.command.local_redis import free_port, local_redis_command, wait_until_ready
from penstock_workers.configuration import load_settings
from penstock_workers.hardware.machine import read_machine

AUTO = '"auto"'
START_LIMIT_S = 300


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
    """
    port = port or free_port()
    url = f"redis://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "benchmark.toml"
        config.write_text(
            f'[redis]\nbroker_url = "{url}/0"\nresults_url = "{url}/1"\n'
            f"[pools.{pool}]\nprocesses = {processes or AUTO}\nthreads = {threads or AUTO}\n"
            f'[worker]\nlog_level = "warning"\n[flower]\nport = 0\n{models}'
        )
        layout = choose_layouts(load_settings(config).settings, read_machine())[pool]
        redis = subprocess.Popen(local_redis_command(port=port, folder=None), stdout=subprocess.DEVNULL)
        try:
            wait_until_ready(f"{url}/0", within_s=10)
            command = [str(Path(sys.executable).with_name("penstock")), "up", "--config", str(config)]
            stack = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "NO_COLOR": "1"})
            try:
                with Client(f"{url}/0") as client:
                    _wait(client, stack, layout.processes)
                    yield client
            finally:
                stack.terminate()
                stack.wait(60)
        finally:
            redis.terminate()
            redis.wait(10)


def _wait(client: Client, stack: subprocess.Popen[bytes], processes: int) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while sum(worker.state == "ready" for worker, _ in client.registry().workers) < processes:
        if stack.poll() is not None or time.monotonic() > deadline:
            raise BrokerUnavailableError("the benchmark's own stack", "its workers did not start")
        time.sleep(0.2)
