"""A broker that can die, workers of `noop_app` that can too, and the book of what they ran."""

import base64
import json
import os
import signal
import subprocess
import sys
import uuid
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import redis

from penstock.keys import DEAD_KEY
from penstock.scripts import push_arguments, script
from penstock_workers.command.local_redis import wait_until_ready
from tests import warm
from tests.deployment import server_command
from tests.eventually import eventually
from tests.integration.noop_app import TASKS as APP

LEASE_S = 3.0


class Broker:
    """A Valkey that has on disk whatever it has answered, so that it can be killed."""

    def __init__(self, folder: Path, port: int) -> None:
        self.url = f"redis://127.0.0.1:{port}"
        self.broker_url, self.results_url = f"{self.url}/0", f"{self.url}/1"
        # With one fsync a second it answers before it writes while the disk is busy: the book loses lines.
        self._command = [*server_command(port=port, folder=folder), "--appendfsync", "always"]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, with what it had on disk."""
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_until_ready(f"{self.url}/0", within_s=10)

    def kill(self) -> None:
        """Kill it, as the kernel does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


class Worker:
    """One worker process, its log in a file."""

    def __init__(self, log: Path, command: list[str], environment: dict[str, str]) -> None:
        self._log = log
        with log.open("wb") as out:
            self.process = warm.start(command, environment, out, imports="celery")

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    @property
    def log(self) -> str:
        """What it wrote so far."""
        return self._log.read_text(errors="replace")

    @property
    def is_ready(self) -> bool:
        """Whether it takes jobs."""
        assert self.process.poll() is None, self.log
        return " ready." in self.log

    def signal(self, number: int) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    def kill(self) -> None:
        """Kill it, as the kernel does."""
        self.process.kill()
        self.process.wait()


class Fleet:
    """Workers on one broker; `settings` of their app may name another, then this one has their book alone."""

    def __init__(self, folder: Path, broker: Broker, **settings: Any) -> None:
        self.broker, self.folder = broker, folder
        self.settings = {
            "broker_url": broker.broker_url,
            "results_url": broker.results_url,
            "book_url": f"{broker.url}/2",
            "task_default_queue": "celery",
            "options": {"lease_s": LEASE_S},
            **settings,
        }
        self.redis = redis.Redis.from_url(broker.broker_url)
        self.book = redis.Redis.from_url(f"{broker.url}/2")
        self.workers: list[Worker] = []
        self._push = self.redis.register_script(script("push"))

    def start(self, n: int = 1, *options: str, wait: bool = True, **environment: str) -> list[Worker]:
        """Start workers; they have 4 places unless `options` say otherwise."""
        environ = {
            **os.environ,
            "NOOP_APP": json.dumps(self.settings),
            "NOOP_FOLDER": str(self.folder),
            **environment,
        }
        started = []
        for _ in range(n):
            name = f"w{len(self.workers)}"
            command = [sys.executable, "-m", "celery", "-A", APP, "worker", "-l", "info", "-n", f"{name}@%h"]
            command += ["--without-mingle", "--without-gossip", "-c", "4", *options]
            started.append(Worker(self.folder / f"{name}.log", command, environ))
            self.workers.append(started[-1])
        if wait:
            eventually(lambda: all(worker.is_ready for worker in started), within_s=40)
        return started

    def stop(self) -> None:
        """Kill all workers, also stopped ones."""
        for worker in self.workers:
            if worker.process.poll() is None:
                worker.signal(signal.SIGCONT)
                worker.kill()

    def push(self, name: str, seconds: float = 0.0, *, queue: str = "celery", task: str = "work") -> str:
        """Send a job as our client does; returns its id."""
        arguments = [name, seconds] if task == "work" else [name]
        job_id, raw = message(f"{APP}.{task}", arguments, queue=queue)
        keys, values = push_arguments(queue, raw)
        self._push(keys=keys, args=values)
        return job_id

    def runs(self) -> Counter[str]:
        """Count how often each job began."""
        return Counter(str(entry.split()[0].decode()) for entry in self._entries())

    def ran_in(self, name: str) -> list[int]:
        """Return the processes that began a job, in order."""
        words = [entry.split() for entry in self._entries()]
        return [int(pid) for job, pid, _ in words if job.decode() == name]

    def began_at(self) -> dict[str, float]:
        """Return when each job began, Unix seconds."""
        entries: Any = self.book.zrange("runs", 0, -1, withscores=True)
        return {entry.split()[0].decode(): at for entry, at in entries}

    def n_done(self) -> int:
        """Count the jobs that ran to their end."""
        return int(self.book.scard("done"))

    def dead(self) -> list[dict[str, Any]]:
        """Return the dead letters."""
        entries: Any = self.redis.lrange(DEAD_KEY, 0, -1)
        return [json.loads(entry) for entry in entries]

    def n_held(self) -> int:
        """Count the messages that workers hold."""
        return int(self.redis.hlen("unacked"))

    def wait_for(self, names: Iterable[str], within_s: float = 20) -> None:
        """Return when all these jobs have begun and nothing is held any more."""
        wanted = set(names)

        def left() -> tuple[set[str], int]:
            return wanted - self.runs().keys(), self.n_held()

        eventually(lambda: left() == (set(), 0), within_s=within_s, what=left)

    def _entries(self) -> list[bytes]:
        return self.book.zrange("runs", 0, -1)  # type: ignore[return-value]  # redis-py: sync or async


def message(
    task: str, arguments: list[Any], *, queue: str = "celery", eta: str | None = None
) -> tuple[str, bytes]:
    """Return the id and the bytes of a message as a plain Celery producer pushes it."""
    job_id = str(uuid.uuid4())
    body = json.dumps([arguments, {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}])
    envelope = {
        "body": base64.b64encode(body.encode()).decode(),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {"lang": "py", "task": task, "id": job_id, "root_id": job_id, "eta": eta, "retries": 0},
        "properties": {
            "correlation_id": job_id,
            "delivery_mode": 2,
            "delivery_info": {"exchange": "", "routing_key": queue},
            "priority": 0,
            "body_encoding": "base64",
            "delivery_tag": job_id,
        },
    }
    return job_id, json.dumps(envelope).encode()
