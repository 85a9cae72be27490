"""The Celery app: its settings, its tasks, and the parts of Celery that are replaced."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from celery import Celery
from celery.app.task import Context
from celery.concurrency import ALIASES
from kombu import Exchange, Queue
from kombu.connection import failover_strategies
from kombu.serialization import register

from penstock.codec import CONTENT_TYPE, SERIALIZER, decode_meta, encode_meta
from penstock.errors import WorkerLostError
from penstock.keys import queue_name, split_queue
from penstock_workers.background import lost
from penstock_workers.clock import BROKER_CLOCK
from penstock_workers.delivery.callbacks import Callbacks
from penstock_workers.delivery.cancelled import Cancelled
from penstock_workers.delivery.celery_urls import celery_url, first_url, result_backend, transport_options
from penstock_workers.delivery.consumer import Consumer
from penstock_workers.delivery.pool import TaskPool
from penstock_workers.delivery.transport import install
from penstock_workers.serving.celery_loader import new_app
from penstock_workers.serving.heartbeat import end_process
from penstock_workers.serving.lifecycle import Lifecycle
from penstock_workers.serving.models import Serving
from penstock_workers.serving.streams import Streams
from penstock_workers.serving.tasks import register_tasks
from penstock_workers.settings import Settings

POOL: Final = f"{TaskPool.__module__}:{TaskPool.__name__}"


def build_app(settings: Settings) -> Celery:
    """Return the app that a worker process runs, and that Flower reads."""
    register(SERIALIZER, encode_meta, decode_meta, content_type=CONTENT_TYPE, content_encoding="binary")
    ALIASES["threads"] = POOL  # `-P threads` means ours too
    # By name: a function in the settings would leave `celery inspect stats` without an answer.
    failover_strategies["first"] = first_url
    app = new_app("penstock", broker_url=celery_url(_checked(settings.broker_url)))
    serving = Serving()
    app.penstock_settings, app.penstock_serving = settings, serving
    app.penstock_queues = {}  # of this process, with their models; known as it starts
    app.penstock_announce = _nothing
    app.penstock_cancelled = Cancelled(_checked(settings.results_url))
    app.penstock_streams = Streams(_checked(settings.results_url), settings.worker.reader_timeout_s)
    app.conf.update(_configuration(settings))
    ours = frozenset(
        queue_name(pool, name) for name, model in settings.models.items() for pool in model.pools
    )
    # Commands without -Q, as `celery purge`, then mean these.
    app.conf.task_queues = [Queue(name, Exchange(name), routing_key=name) for name in sorted(ours)]
    app.penstock_callbacks = Callbacks(
        ours=ours,
        allowed=frozenset(settings.worker.callback_queues),
        default=app.conf.task_default_queue,
    )
    app.steps["worker"].add(Lifecycle)
    register_tasks(app, serving, app.penstock_cancelled, app.penstock_streams)
    app.finalize()
    for name in [name for name in app.tasks if name.startswith("celery.")]:
        del app.tasks[name]  # Celery's own send, unlock and try again whatever a message says

    def is_alive() -> bool:
        ended = lost()
        if "heartbeat" in ended:  # which would end this process for all others
            end_process("the heartbeat has ended; this process ends, others take its jobs over")
        return not ended and not serving.is_stalled(settings.worker.stall_s)

    def budget(queue: str) -> float | None:
        _, model = split_queue(queue)
        return serving.token_budget(model)

    def notify(message: Mapping[str, Any], n_deliveries: int) -> None:
        headers, properties = message.get("headers") or {}, message.get("properties") or {}
        if isinstance(job_id := headers.get("id"), str):
            sender = Context(id=job_id, reply_to=properties.get("reply_to"))
            error = WorkerLostError(job_id, n_deliveries)
            app.backend.mark_as_failure(job_id, error, request=sender, call_errbacks=False)

    def tell_purged(jobs: Sequence[tuple[str, str]]) -> None:
        app.backend.revoke(jobs)

    install(is_alive=is_alive, on_dead=notify, token_budget=budget, clock=BROKER_CLOCK, on_purged=tell_purged)
    return app


def _nothing() -> None:
    pass


def _configuration(settings: Settings) -> dict[str, Any]:
    return {
        "result_backend": result_backend(_checked(settings.results_url)),
        "result_backend_transport_options": transport_options(settings.results_url),
        "result_expires": settings.redis.result_ttl_s,
        "result_serializer": SERIALIZER,
        "result_accept_content": [SERIALIZER],
        # One result connection pool for all threads, and results that wait for Redis to come back.
        "result_backend_thread_safe": True,
        "result_backend_always_retry": True,
        "redis_socket_timeout": 30,
        "redis_socket_connect_timeout": 5,
        "redis_socket_keepalive": True,
        "accept_content": ["json"],
        "task_acks_late": True,
        "task_acks_on_failure": True,
        "task_create_missing_queues": True,
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,
        "broker_failover_strategy": "first",
        "broker_transport_options": {
            **transport_options(settings.broker_url),
            "lease_s": settings.worker.lease_s,
            "max_deliveries": settings.worker.max_deliveries,
            # Without these, a link that falls silent holds the worker's main thread for ever.
            "socket_timeout": 30,
            "socket_connect_timeout": 5,
            "socket_keepalive": True,
            "health_check_interval": 5,
        },
        "worker_pool": POOL,
        "worker_drain_s": settings.worker.drain_s,
        "worker_concurrency": settings.worker.jobs_in_flight,
        "worker_prefetch_multiplier": 1,
        # Leases outlive connections and are counted per process; Celery would count them twice.
        "worker_enable_prefetch_count_reduction": False,
        "worker_consumer": f"{Consumer.__module__}:{Consumer.__name__}",
        "worker_disable_rate_limits": True,
        "worker_cancel_long_running_tasks_on_connection_loss": False,
        "worker_send_task_events": True,  # Flower shows nothing without
        "worker_hijack_root_logger": False,
    }


def _checked(url: str) -> str:
    """Return a URL that asks for the server's certificate to be checked, unless it says otherwise.

    Where a `rediss://` URL does not say, kombu checks nothing, and Celery's result backend refuses to start.
    """
    if not url.startswith("rediss:") or "ssl_cert_reqs=" in url:
        return url
    return f"{url}{'&' if '?' in url else '?'}ssl_cert_reqs=required"
