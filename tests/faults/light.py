"""A worker process of `tests.faults.light_app`, and what it ran."""

import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import redis

from tests.deployment import Server
from tests.eventually import eventually
from tests.faults.fleet import Broker, Worker

MODEL = "light"
LEASE_S = 2.0


class LightWorker:
    """A worker that may reach its servers through proxies; the book of its runs does not go through them.

    Attributes:
        book: the server's first database, for the test's own questions.
    """

    def __init__(
        self, folder: Path, server: Server | Broker, *, broker_url: str = "", results_url: str = ""
    ) -> None:
        self._folder, self._server = folder, server
        self._urls = broker_url or server.broker_url, results_url or server.results_url
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
            "NO_COLOR": "1",
        }
        command = [sys.executable, "-m", "celery", "-A", "tests.faults.light_app", "worker", "-l", "info"]
        command += ["-Q", f"cpu.{MODEL}", "--without-gossip", "--without-mingle"]
        worker = Worker(self._folder / "light.log", command, environment)
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
        return Counter(run.decode().split()[0] for run in self.book.smembers("runs"))

    def n_held(self) -> int:
        """Count the jobs that it holds."""
        return int(self.book.hlen("unacked"))
