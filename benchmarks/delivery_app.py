"""The Celery app of `benchmarks.delivery`: the same tasks on Celery's stock parts or on ours.

A worker process reads its setup from the variable `DELIVERY_SETUP`; nothing happens on import without it.
"""

import json
import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

import numpy as np
import redis
from celery import Celery
from celery.exceptions import Ignore
from celery.signals import worker_ready
from kombu.serialization import register

from penstock.codec import CONTENT_TYPE, SERIALIZER, decode_meta, encode_meta
from penstock.result import EmbedResult, Timings, Usage
from penstock_workers.delivery.cancelled import Cancelled

QUEUE: Final = "cpu.noop"
MODEL: Final = "noop"
READY_KEY: Final = "delivery:ready"
RUNS_KEY: Final = "delivery:runs"
RUNNING_KEY: Final = "delivery:running"
VARIABLE: Final = "DELIVERY_SETUP"
DEVICE_PLACES: Final = 8
"""Jobs that a simulated device works on at a time."""

_RESULT_TTL_S: Final = 3600


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """How a worker process is built.

    Attributes:
        parts: Celery's own transport and result backend, or ours.
        pool: `threads`, `prefork`, or the path of a class.
        port: of the Valkey on 127.0.0.1: queues in database 0, results in 1, what tasks record in 2.
        lease_s: seconds after which a dead worker's jobs are taken over; stock's visibility timeout.
        max_deliveries: ours gives a job up after so many.
    """

    parts: Literal["stock", "penstock"]
    pool: str
    port: int
    lease_s: float = 20.0
    max_deliveries: int = 4

    def url(self, database: int) -> str:
        """Return the URL of one of the three databases."""
        return f"redis://127.0.0.1:{self.port}/{database}"

    def environment(self) -> dict[str, str]:
        """Return the variables of a process that is set up like this."""
        return {**os.environ, VARIABLE: json.dumps(asdict(self))}


def build_app(setup: Setup) -> Celery:
    """Return the app, with the best settings that its parts have."""
    app = Celery("delivery", broker=setup.url(0))
    app.conf.update(
        task_default_queue=QUEUE,
        task_acks_late=True,
        accept_content=["json"],
        result_expires=_RESULT_TTL_S,
        result_backend_thread_safe=True,
        result_backend_always_retry=True,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        worker_pool=setup.pool,
        worker_prefetch_multiplier=1,
        worker_disable_rate_limits=True,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_hijack_root_logger=False,
        **(_our_parts(setup) if setup.parts == "penstock" else _stock_parts(setup)),
    )
    _add_tasks(app, setup)
    return app


def _stock_parts(setup: Setup) -> dict[str, Any]:
    options = {
        "visibility_timeout": setup.lease_s,
        # Looked for every second: by default it would be every 100.
        "unacked_restore_interval": 1,
        "unacked_restore_throttle": 1,
        "unacked_mutex_expire": 5,
        "body_encoding": "utf-8",
        "socket_connect_timeout": 5,
        "socket_keepalive": True,
        "health_check_interval": 25,
    }
    return {
        "result_backend": setup.url(1),
        "worker_deduplicate_successful_tasks": True,
        "broker_transport_options": options,
    }


def _our_parts(setup: Setup) -> dict[str, Any]:
    from penstock_workers.delivery.backend import ResultBackend
    from penstock_workers.delivery.consumer import Consumer
    from penstock_workers.delivery.transport import install  # replaces `redis://` in the whole process

    install()
    register(SERIALIZER, encode_meta, decode_meta, content_type=CONTENT_TYPE, content_encoding="binary")
    return {
        "result_backend": f"{ResultBackend.__module__}:{ResultBackend.__name__}+{setup.url(1)}",
        "result_serializer": SERIALIZER,
        "result_accept_content": [SERIALIZER],
        "worker_consumer": f"{Consumer.__module__}:{Consumer.__name__}",
        "broker_transport_options": {
            "lease_s": setup.lease_s,
            "max_deliveries": setup.max_deliveries,
            "socket_connect_timeout": 5,
            "socket_keepalive": True,
            "health_check_interval": 25,
        },
    }


def _add_tasks(app: Celery, setup: Setup) -> None:
    recorder = redis.Redis.from_url(setup.url(2))
    cancelled = Cancelled(setup.url(1))
    if setup.parts == "penstock":
        cancelled.start()

    def add(name: str, answer: Callable[..., Any]) -> None:
        @app.task(name=name, bind=True, typing=False, shared=False)  # type: ignore[untyped-decorator]  # Celery has no types
        def task(self: Any, *args: Any, **kwargs: Any) -> Any:
            # As our tasks do; Celery's own looks by itself at what was delivered before.
            if setup.parts == "penstock" and (
                self.request.id in cancelled
                or (self.request.delivery_info["redelivered"] and self.backend.is_ended(self.request.id))
            ):
                raise Ignore
            return answer(self.request.id, *args, **kwargs)

    def noop(job_id: str) -> None:
        del job_id

    places = threading.Semaphore(DEVICE_PLACES)

    def device(job_id: str, seconds: float) -> None:
        """Wait for a place of the process' device, and take its time: a fifth more or less, no CPU."""
        del job_id
        with places:
            time.sleep(seconds * random.uniform(0.8, 1.2))

    def record(job_id: str, seconds: float) -> None:
        """Note when it began and ended, and that it runs meanwhile."""
        run = f"{job_id} {os.getpid()} {time.time():.6f}"
        _note(recorder, run, +1)
        time.sleep(seconds)
        _note(recorder, f"{run} {time.time():.6f}", -1)

    def embed(job_id: str, *, model: str, texts: list[str], **_: object) -> EmbedResult:
        """Answer our client without a model."""
        del job_id
        return EmbedResult(
            model=model,
            vectors=np.zeros((len(texts), 1), np.float32),
            usage=Usage(prompt_tokens=0),
            timings=Timings(queued_s=0.0, prepared_s=0.0, batched_s=0.0, computed_s=0.0),
        )

    add("delivery.noop", noop)
    add("delivery.device", device)
    add("delivery.record", record)
    if setup.parts == "penstock":
        add("penstock.embed", embed)


def _note(recorder: redis.Redis, run: str, change: int) -> None:
    with recorder.pipeline() as pipe:
        pipe.rpush(RUNS_KEY, run)
        pipe.hincrby(RUNNING_KEY, str(os.getpid()), change)
        pipe.execute()


def _tell_ready(setup: Setup) -> None:
    @worker_ready.connect(weak=False)  # type: ignore[untyped-decorator]  # Celery has no types
    def tell(**_: object) -> None:
        with redis.Redis.from_url(setup.url(2)) as client:
            client.sadd(READY_KEY, os.getpid())


if VARIABLE in os.environ:
    _setup = Setup(**json.loads(os.environ[VARIABLE]))
    app = build_app(_setup)
    _tell_ready(_setup)
