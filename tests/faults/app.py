"""A Celery app without models: what it ran it writes into Redis, so that tests can count."""

import os
import signal
import time
import uuid
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import redis
from celery import Celery
from celery.concurrency.base import apply_target
from celery.concurrency.thread import ApplyResult
from celery.concurrency.thread import TaskPool as CeleryPool
from celery.worker.consumer import Consumer as CeleryConsumer
from redis.backoff import ConstantBackoff
from redis.retry import Retry

from penstock.transport import install

SERVER = os.environ["FAULTS_SERVER"]  # redis://host:port
FOLDER = Path(os.environ["FAULTS_FOLDER"])
# What is written here must not be lost either, also while the broker is away.
BOOK = redis.Redis.from_url(f"{SERVER}/2", retry=Retry(ConstantBackoff(0.1), 600))


def is_alive() -> bool:
    """Say no while a test wants this process to look hung."""
    return not (FOLDER / f"hung-{os.getpid()}").exists()


def on_dead(message: Mapping[str, Any], n_deliveries: int) -> None:
    """Write down who was told of what."""
    BOOK.rpush("told", f"{message['headers']['id']} {n_deliveries}")


install(is_alive=is_alive, on_dead=on_dead)
app = Celery("faults", broker=f"{SERVER}/0", backend=f"{SERVER}/1")
app.conf.update(
    task_acks_late=True,
    task_ignore_result=True,
    task_create_missing_queues=True,
    worker_prefetch_multiplier=1,
    worker_enable_prefetch_count_reduction=False,
    worker_cancel_long_running_tasks_on_connection_loss=False,
    worker_pool=f"{__name__}:TaskPool",
    worker_consumer=f"{__name__}:Consumer",
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,
    result_backend_always_retry=True,
    result_backend_thread_safe=True,
    broker_transport_options={"lease_s": 2},
)


class Consumer(CeleryConsumer):  # type: ignore[misc]  # Celery has no types
    """Acknowledges in the thread that ran the job: the event loop stands still while the pool drains."""

    def call_soon_ack(self, p: Any, *args: Any, **options: Any) -> Any:
        """Acknowledge now, and let the event loop see the free place."""
        p(*args, **options)
        self.hub.call_soon(int)
        return p


class TaskPool(CeleryPool):  # type: ignore[misc]  # Celery has no types
    """What the transport expects of a pool: a thread for every credit, no message that nobody answers for."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # Credits are per queue: with threads for one queue only, jobs of a slow one would take them all.
        n_threads = self.limit * len(self.app.amqp.queues.consume_from)
        self.executor = ThreadPoolExecutor(int(os.environ.get("FAULTS_THREADS", n_threads)))

    def on_apply(
        self,
        target: Any,
        args: Any = None,
        kwargs: Any = None,
        callback: Any = None,
        accept_callback: Any = None,
        **_: Any,
    ) -> Any:
        """Run a job; one that is cancelled before it began goes back to its queue."""
        future = self.executor.submit(apply_target, target, args, kwargs, callback, accept_callback)
        request = getattr(callback, "__self__", None)

        def answer(done: Future[None]) -> None:
            if done.cancelled() and request is not None:
                request.reject(requeue=True)

        future.add_done_callback(answer)
        return ApplyResult(future)


def begin(name: str) -> None:
    """Write down that a job began, when and in which process; twice is once, if Redis went away."""
    BOOK.zadd("runs", {f"{name} {os.getpid()} {uuid.uuid4()}": time.time()})


@app.task  # type: ignore[untyped-decorator]  # Celery has no types
def work(name: str, seconds: float = 0.0) -> None:
    """Take some time."""
    begin(name)
    time.sleep(seconds)
    BOOK.sadd("done", f"{name} {os.getpid()}")


@app.task  # type: ignore[untyped-decorator]  # Celery has no types
def die(name: str) -> None:
    """Kill the worker, as a model that runs out of memory does."""
    begin(name)
    os.kill(os.getpid(), signal.SIGKILL)


@app.task(bind=True, max_retries=2, ignore_result=False)  # type: ignore[untyped-decorator]  # Celery has no types
def third_time(self: Any, name: str) -> int:
    """Succeed at the third try."""
    begin(name)
    if self.request.retries < 2:
        raise self.retry(countdown=0.5)
    return int(self.request.retries)


@app.task(ignore_result=False)  # type: ignore[untyped-decorator]  # Celery has no types
def add(a: int, b: int) -> int:
    """Add."""
    return a + b


@app.task(ignore_result=False)  # type: ignore[untyped-decorator]  # Celery has no types
def total(numbers: list[int]) -> int:
    """Sum up."""
    return sum(numbers)
