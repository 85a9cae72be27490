"""The Celery app: its settings, its tasks, and the parts of Celery that are replaced."""

from typing import Any

from celery import Celery
from kombu.serialization import register
from kombu.transport import TRANSPORT_ALIASES

from penstock.codec import CONTENT_TYPE, SERIALIZER, decode_meta, encode_meta
from penstock.settings import Settings
from penstock_workers.lifecycle import Lifecycle
from penstock_workers.serving import Serving
from penstock_workers.tasks import register_tasks


def build_app(settings: Settings) -> Celery:
    """Return the app that a worker process runs, and that Flower reads."""
    register(SERIALIZER, encode_meta, decode_meta, content_type=CONTENT_TYPE, content_encoding="binary")
    # By alias, so that URLs, Flower's broker page and plain Celery commands go on working.
    for scheme in ("redis", "rediss"):
        TRANSPORT_ALIASES[scheme] = "penstock_workers.consumer:Transport"
    app = Celery("penstock", broker=settings.broker_url)
    app.conf.update(_configuration(settings))
    app.penstock_settings, app.penstock_serving = settings, Serving()
    app.steps["worker"].add(Lifecycle)
    register_tasks(app, app.penstock_serving)
    return app


def _configuration(settings: Settings) -> dict[str, Any]:
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
            "socket_connect_timeout": 5,
            "socket_keepalive": True,
            "health_check_interval": 25,
        },
        "worker_pool": "threads",
        "worker_concurrency": settings.worker.jobs_in_flight,
        "worker_prefetch_multiplier": 1,
        "worker_consumer": "penstock_workers.consumer:Consumer",
        "worker_disable_rate_limits": True,
        "worker_cancel_long_running_tasks_on_connection_loss": False,
        "worker_send_task_events": True,  # Flower shows nothing without
        "worker_hijack_root_logger": False,
    }
