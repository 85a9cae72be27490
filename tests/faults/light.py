"""A worker process of `tests.faults.light_app`, and what it ran."""

import itertools
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import redis

from penstock.request import PoolName
from tests.deployment import Server
from tests.eventually import eventually
from tests.faults.fleet import Broker, Worker

MODEL = "light"
LEASE_S = 2.0
_NUMBERS = itertools.count()


class LightWorker:
    """A worker that may reach its servers through proxies; the book of its runs does not go through them.

    Args:
        folder: for its log.
        server: broker, result store and book.
        broker_url: how the worker reaches the broker, if not directly.
        results_url: the same of the result store.
        pool: that it works for.
        pools: of its model, the preferred one first.
        environment: settings of its own.

    Attributes:
        book: the server's first database, for the test's own questions.
        process: the one that was started last.
    """

    process: Worker

    def __init__(
        self,
        folder: Path,
        server: Server | Broker,
        *,
        broker_url: str = "",
        results_url: str = "",
        pool: PoolName = "cpu",
        pools: Sequence[PoolName] = ("cpu",),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._folder, self._server = folder, server
        self._urls = broker_url or server.broker_url, results_url or server.results_url
        self._pool, self._pools, self._environment = pool, pools, environment or {}
        self.book = redis.Redis.from_url(server.broker_url)

    @contextmanager
    def starting(self) -> Iterator[Worker]:
        """Start it, and end it after the block."""
        broker_url, results_url = self._urls
        environment = {
            **os.environ,
            "PENSTOCK_REDIS__BROKER_URL": broker_url,
            "PENSTOCK_REDIS__RESULTS_URL": results_url,
            "PENSTOCK_WORKER__LEASE_S": str(LEASE_S),
            "LIGHT_BOOK": self._server.broker_url,
            "LIGHT_POOL": self._pool,
            "LIGHT_POOLS": ",".join(self._pools),
            "NO_COLOR": "1",
            **self._environment,
        }
        command = [sys.executable, "-m", "celery", "-A", "tests.faults.light_app", "worker", "-l", "info"]
        name = f"light{next(_NUMBERS)}"
        command += ["-Q", f"{self._pool}.{MODEL}", "-n", f"{name}@%h", "--without-gossip", "--without-mingle"]
        worker = self.process = Worker(self._folder / f"{name}.log", command, environment)
        try:
            yield worker
        finally:
            worker.kill()
            self.book.close()

    @contextmanager
    def running(self) -> Iterator[Worker]:
        """Run it while the block runs, which begins when clients can find its model."""
        with self.starting() as worker:
            eventually(lambda: worker.is_ready and self.book.hexists("penstock:models", MODEL), within_s=30)
            yield worker

    def runs(self) -> Counter[str]:
        """Count how often each text was computed."""
        return Counter(name for name, _ in self.in_order())

    def in_order(self) -> list[tuple[str, int]]:
        """Return texts and processes in the order in which they began; one process ends them in it too."""
        entries: Any = self.book.zrange("runs", 0, -1)
        return [(name, int(pid)) for name, pid, _ in (entry.decode().split() for entry in entries)]

    def n_held(self) -> int:
        """Count the jobs that it holds."""
        return int(self.book.hlen("unacked"))
