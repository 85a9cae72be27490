"""The Celery app: its settings, its tasks, and the parts of Celery that are replaced."""

from collections.abc import Mapping
from typing import Any, Final

from celery import Celery
from celery.app.task import Context
from celery.concurrency import ALIASES
from kombu.serialization import register

from penstock.codec import CONTENT_TYPE, SERIALIZER, decode_meta, encode_meta
from penstock.errors import WorkerLostError
from penstock.settings import Settings
from penstock.transport import install
from penstock_workers.lifecycle import Lifecycle
from penstock_workers.serving import Serving
from penstock_workers.tasks import register_tasks

POOL: Final = "penstock_workers.pool:TaskPool"


def build_app(settings: Settings) -> Celery:
    """Return the app that a worker process runs, and that Flower reads."""
    register(SERIALIZER, encode_meta, decode_meta, content_type=CONTENT_TYPE, content_encoding="binary")
    install()
    ALIASES["threads"] = POOL  # `-P threads` means ours too
    app = Celery("penstock", broker=settings.broker_url)
    app.penstock_settings, app.penstock_serving = settings, Serving()
    app.conf.update(_configuration(settings, app))
    app.steps["worker"].add(Lifecycle)
    register_tasks(app, app.penstock_serving)
    return app


def _configuration(settings: Settings, app: Any) -> dict[str, Any]:
    def is_alive() -> bool:
        return not app.penstock_serving.is_stalled(settings.worker.stall_s)

    def on_dead(message: Mapping[str, Any], n_deliveries: int) -> None:
        headers, properties = message.get("headers") or {}, message.get("properties") or {}
        if isinstance(job_id := headers.get("id"), str):
            sender = Context(id=job_id, reply_to=properties.get("reply_to"))
            error = WorkerLostError(job_id, n_deliveries)
            app.backend.mark_as_failure(job_id, error, request=sender, call_errbacks=False)

    return {
        "result_backend": f"penstock_workers.results:ResultBackend+{settings.results_url}",
        "result_expires": settings.redis.result_ttl_s,
        "result_serializer": SERIALIZER,
        "result_accept_content": [SERIALIZER],
        # One result connection pool for all threads, and results that wait for Redis to come back.
        "result_backend_thread_safe": True,
        "result_backend_always_retry": True,
        "accept_content": ["json"],
        "task_acks_late": True,
        "task_acks_on_failure": True,
        "task_create_missing_queues": True,
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,
        "broker_transport_options": {
            "lease_s": settings.worker.lease_s,
            "max_deliveries": settings.worker.max_deliveries,
            "is_alive": is_alive,
            "on_dead": on_dead,
            "socket_connect_timeout": 5,
            "socket_keepalive": True,
            "health_check_interval": 25,
        },
        "worker_pool": POOL,
        "worker_drain_s": settings.worker.drain_s,
        "worker_concurrency": settings.worker.jobs_in_flight,
        "worker_prefetch_multiplier": 1,
        "worker_consumer": "penstock_workers.consumer:Consumer",
        "worker_disable_rate_limits": True,
        "worker_cancel_long_running_tasks_on_connection_loss": False,
        "worker_send_task_events": True,  # Flower shows nothing without
        "worker_hijack_root_logger": False,
    }
