"""A Celery app with our transport, pool, consumer and result backend but no model.

Its tasks wait for what tests put into a Redis, its book, and write into it what they ran. With it come its
worker process and a way to send to that.
"""

import json
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import redis
from celery import Celery
from celery.exceptions import Ignore
from kombu.connection import failover_strategies
from kombu.serialization import register
from redis.backoff import ConstantBackoff
from redis.retry import Retry

from penstock.codec import CONTENT_TYPE, SERIALIZER, decode_meta, encode_meta
from penstock.keys import record_key, result_key
from penstock_workers.delivery.celery_urls import celery_url, first_url, result_backend, transport_options
from penstock_workers.delivery.consumer import Consumer
from penstock_workers.delivery.pool import TaskPool
from penstock_workers.delivery.transport import install
from tests import warm
from tests.deployment import Server
from tests.eventually import eventually

QUEUE = "noop"
TASKS = "tests.integration.noop_app"
REPLIES = "penstock:reply:noop"


def build_noop_app(
    broker_url: str,
    results_url: str,
    *,
    book_url: str = "",
    options: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Celery:
    """Return the app.

    Args:
        broker_url: as workers take it, `sentinel://` too.
        results_url: as well.
        book_url: the Redis of its tasks; the broker's if empty.
        options: of the transport.
        settings: of Celery.
    """
    register(SERIALIZER, encode_meta, decode_meta, content_type=CONTENT_TYPE, content_encoding="binary")
    # By name: a function in the settings would leave `celery inspect stats` without an answer.
    failover_strategies["first"] = first_url
    app = Celery("noop", broker=celery_url(broker_url))
    app.conf.update(
        broker_transport_options={**transport_options(broker_url), **(options or {})},
        broker_failover_strategy="first",
        result_backend=result_backend(results_url),
        result_backend_transport_options=transport_options(results_url),
        result_expires=600,
        result_serializer=SERIALIZER,
        result_accept_content=[SERIALIZER],
        result_backend_thread_safe=True,
        result_backend_always_retry=True,
        task_default_queue=QUEUE,
        task_acks_late=True,
        task_create_missing_queues=True,
        broker_connection_retry_on_startup=True,
        worker_pool=f"{TaskPool.__module__}:{TaskPool.__name__}",
        worker_consumer=f"{Consumer.__module__}:{Consumer.__name__}",
        worker_prefetch_multiplier=1,
        worker_enable_prefetch_count_reduction=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_hijack_root_logger=False,
    )
    app.conf.update(settings)
    # What a task writes must not be lost either, also while the broker is away.
    patience = Retry(ConstantBackoff(0.1), 600)
    book = redis.Redis.from_url(book_url or broker_url, socket_timeout=None, retry=patience)

    def begin(name: str) -> None:
        """Write down that a job began, when and in which process; twice is once, if Redis went away."""
        book.zadd("runs", {f"{name} {os.getpid()} {uuid.uuid4()}": time.time()})

    task = partial(app.task, shared=False)  # a process may build several

    @task
    def add(left: Any, right: Any = 0) -> Any:
        return left + right

    @task
    def total(values: list[int]) -> int:
        return sum(values)

    @task
    def look(job_id: str) -> bool:
        return bool(app.backend.is_ended(job_id))

    @task
    def hold(name: str, n_bytes: int = 0) -> str:
        """Tell that it runs, and end when it is released; a string of `n_bytes` is its result."""
        book.rpush(f"started:{name}", "1")
        book.blpop([f"release:{name}"])
        return name + "x" * n_bytes

    @task
    def hang() -> None:
        """Never end, and look at nothing that could make it."""
        book.rpush("started:hang", "1")
        threading.Event().wait()

    @task
    def nap(seconds: float) -> str:
        """Need no broker while it runs."""
        book.rpush("started:nap", "1")
        time.sleep(seconds)
        return "rested"

    @task
    def work(name: str, seconds: float = 0.0) -> None:
        """Take some time."""
        begin(name)
        time.sleep(seconds)
        book.sadd("done", f"{name} {os.getpid()}")

    @task
    def die(name: str) -> None:
        """Kill the worker, as a model that runs out of memory does."""
        begin(name)
        os.kill(os.getpid(), signal.SIGKILL)

    @task(bind=True, max_retries=2)
    def third_time(self: Any, name: str) -> int:
        """Succeed at the third try."""
        begin(name)
        if self.request.retries < 2:
            raise self.retry(countdown=0.5)
        return int(self.request.retries)

    @task(bind=True)
    def when(self: Any) -> str | None:
        """Tell when it was due."""
        return None if self.request.eta is None else str(self.request.eta)

    @task(bind=True)
    def fail_in_the_pool(self: Any) -> None:
        """Celery stores a MemoryError as any other, and then raises it again outside of the job."""
        if app.backend.is_ended(self.request.id):
            raise Ignore
        raise MemoryError

    return app


def _is_alive() -> bool:
    """Say no while a test wants this process to look hung."""
    return not Path(os.environ.get("NOOP_FOLDER", "/"), f"hung-{os.getpid()}").exists()


def _build_for_worker() -> Celery:
    asked = json.loads(os.environ["NOOP_APP"])

    def tell(message: Mapping[str, Any], n_deliveries: int) -> None:
        with redis.Redis.from_url(asked.get("book_url") or asked["broker_url"]) as book:
            book.rpush("told", f"{message['headers']['id']} {n_deliveries}")

    install(is_alive=_is_alive, on_dead=tell)
    return build_noop_app(**asked)


if "NOOP_APP" in os.environ:
    app = _build_for_worker()


class NoopWorker:
    """A worker process of the app, with what a test asks its two servers."""

    def __init__(
        self,
        folder: Path,
        server: Server,
        *,
        results: Server | None = None,
        threads: int = 4,
        **settings: Any,
    ) -> None:
        self.urls = {"broker_url": server.broker_url, "results_url": (results or server).results_url}
        self.broker = redis.Redis.from_url(self.urls["broker_url"], decode_responses=True)
        self.results = redis.Redis.from_url(self.urls["results_url"])
        self._folder, self._threads, self._settings = folder, threads, settings

    def __enter__(self) -> "NoopWorker":
        self.broker.flushall()
        self._log = self._folder / f"{uuid.uuid4()}.log"
        command = [sys.executable, "-m", "celery", "-A", TASKS, "worker"]
        with self._log.open("wb") as log:
            self.process = warm.start(
                [*command, "-c", str(self._threads), "-l", "info", "--without-mingle"],
                {**os.environ, "NOOP_APP": json.dumps(self.urls | self._settings), "NO_COLOR": "1"},
                log,
                imports="celery",
            )
        eventually(lambda: "ready." in self.log, within_s=30)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self.broker.close()
        self.results.close()

    @property
    def log(self) -> str:
        """What it wrote so far."""
        return self._log.read_text(errors="replace")

    def send(self, task: str, *args: Any) -> str:
        """Send a job, as any Celery producer does; return its id."""
        job_id = str(uuid.uuid4())
        envelope = {
            "body": json.dumps(
                [args, {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}]
            ),
            "content-encoding": "utf-8",
            "content-type": "application/json",
            "headers": {"lang": "py", "task": f"{TASKS}.{task}", "id": job_id},
            "properties": {
                "correlation_id": job_id,
                "reply_to": REPLIES,
                "delivery_info": {"exchange": "", "routing_key": QUEUE},
                "body_encoding": "utf-8",
                "delivery_tag": job_id,
            },
        }
        self.broker.lpush(QUEUE, json.dumps(envelope))
        return job_id

    def hold(self, name: str, n_bytes: int = 0) -> str:
        """Send a job that runs until it is released; return its id when it runs."""
        job_id = self.send("hold", name, n_bytes)
        self.wait_until_started(name)
        return job_id

    def wait_until_started(self, name: str) -> None:
        """Return when the job runs; each start counts once."""
        eventually(lambda: self.broker.lpop(f"started:{name}"), within_s=20)

    def release(self, *names: str) -> None:
        """Let held jobs end."""
        for name in names:
            self.broker.rpush(f"release:{name}", "1")

    def n_held(self) -> int:
        """Count the messages that the worker has taken and not acknowledged."""
        return int(self.broker.hlen("unacked"))

    def n_queued(self) -> int:
        """Count the messages that wait for a worker."""
        return int(self.broker.llen(QUEUE))

    def result(self, job_id: str) -> Any:
        """Return what is stored for a job; None if it has not ended."""
        payload, record = self.results.mget(result_key(job_id), record_key(job_id))
        return (decode_meta(payload)["result"], record.decode()) if payload and record else None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        self.process.send_signal(number)

    def wait(self, within_s: float = 20) -> int:
        """Return the exit code."""
        return self.process.wait(within_s)
