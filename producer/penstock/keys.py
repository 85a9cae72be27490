"""The name of every key and channel in Redis, and how long those last that expire.

docs/reference/keys.md says what each holds, who touches it and what bounds it. The scripts in Lua write the
same names out. kombu's and Celery's own names stand here too, where Penstock touches them.
"""

from typing import Final

# The broker: messages, from their sender to their acknowledgement

PRIORITY_SEPARATOR: Final = "\x06\x16"
"""Stands between a list's name and a priority above 0.

Source: kombu 5.7, `kombu.transport.redis.Channel.sep`.
"""
TENANT_SEPARATOR: Final = "\x06\x17"
"""Stands between a list's name and the tenant whose messages are in it."""

UNACKED_KEY: Final = "unacked"
"""Hash: the messages that workers hold, by delivery tag."""
LEASES_KEY: Final = "penstock:leases"
"""Hash: who holds each of these messages, and where it came from."""
DELAYED_KEY: Final = "penstock:delayed"
"""Hash: the messages that are not due yet, by tag."""
DEAD_KEY: Final = "penstock:dead"
"""List: the dead letters, oldest first."""
UNTOLD_KEY: Final = "penstock:untold"
"""Sorted set: the dead letters whose senders are not notified yet."""
SWEEP_KEY: Final = "penstock:sweep"
"""Hash: when expired leases were last looked for; how many dead letters were dropped."""

WAKE_PREFIX: Final = "penstock:wake:"
"""Begins the list that wakes an idle worker; a queue's list, or the token of a process, follows."""
BUCKET_PREFIX: Final = "penstock:bucket:"
"""Begins every token bucket."""
UPSTREAM_PREFIX: Final = "penstock:upstream:"
"""Begins the state of a server of remote models."""

# The broker: what workers announce

MODELS_KEY: Final = "penstock:models"
"""Hash: `ModelInfo` of each model."""
WORKERS_KEY: Final = "penstock:workers"
"""Hash: last heartbeat and `WorkerInfo` of each worker process."""
RESULTS_KEY: Final = "penstock:results"
"""String: where results are kept, without credentials."""
TENANTS_KEY: Final = "penstock:tenants"
"""Hash: share and rate of each tenant."""
ANNOUNCED_KEY: Final = "penstock:announced"
"""Hash: version of each of these entries, and when it was last seen."""

# The result store

CANCELLED_KEY: Final = "penstock:cancelled"
"""Sorted set, and channel: ids of cancelled jobs."""
VECTORS_KEY: Final = "penstock:vec"
"""Begins every key of the vector cache."""
_REPLY_PREFIX: Final = "penstock:reply:"

RECORD_TTL_S: Final = 86_400
"""How long a job's record outlives its result: lets a late caller hear "expired" and not "unknown"."""
STREAM_TTL_S: Final = 3600
"""How long the last piece of a stream can be read."""
PIDBOX_REPLIES_TTL_S: Final = 60
"""How long answers to `celery inspect` that nobody has fetched are kept."""


def queue_name(pool: str, model: str) -> str:
    """Return the queue of one model in one pool."""
    return f"{pool}.{model}"


def split_queue(queue: str) -> tuple[str, str]:
    """Return pool and model of a queue."""
    pool, _, model = queue.partition(".")
    return pool, model


def queue_key(queue: str, priority: int, tenant: str = "") -> str:
    """Return the list that holds a queue's messages of one priority, and of one tenant if it is named.

    Source: kombu 5.7, `kombu.transport.redis.Channel._q_for_pri`: priority 0 has the queue's own name,
    others a suffix behind the separator.
    """
    key = f"{queue}{PRIORITY_SEPARATOR}{int(priority)}" if priority else queue
    return f"{key}{TENANT_SEPARATOR}{tenant}" if tenant else key


def split_key(key: str) -> tuple[str, int]:
    """Return queue and priority of a list; 0 if its name has none."""
    base = key.partition(TENANT_SEPARATOR)[0]
    queue, separator, priority = base.rpartition(PRIORITY_SEPARATOR)
    if not separator:
        return base, 0
    return queue, int(priority) if priority.isdecimal() else 0


def load_key(queue: str) -> str:
    """Return the hash that counts what waits and what is held of a queue."""
    return f"penstock:load:{queue}"


def binding_keys(queue: str) -> list[str]:
    """Return the sets in which kombu keeps the exchange of a queue's name."""
    return [f"{prefix}.{queue}" for prefix in ("_kombu.binding", "_kombu.binding_permanent")]


def result_key(job_id: str) -> str:
    """Return the key, and the channel, of a job's result; the name is Celery's own."""
    return f"celery-task-meta-{job_id}"


def record_key(job_id: str) -> str:
    """Return the key that says whether a job was sent, and how it ended."""
    return f"penstock:job:{job_id}"


def stream_key(job_id: str) -> str:
    """Return the stream of a job's pieces; also the channel of their notes, if the job names no other."""
    return f"penstock:stream:{job_id}"


def reply_channel(client_id: str) -> str:
    """Return the channel on which one client hears that its jobs ended."""
    return f"{_REPLY_PREFIX}{client_id}"


def is_reply_channel(reply_to: str | None) -> bool:
    """Tell our clients' reply channels from the ids that Celery puts in their place."""
    return bool(reply_to) and str(reply_to).startswith(_REPLY_PREFIX)
