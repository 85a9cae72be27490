"""An ordinary Celery app, as a service has one: callbacks of jobs go to its worker.

`celery -A tests.integration.ordinary_app worker`; `ORDINARY_BROKER` names its Redis. What it was called with
is the list `ordinary:calls` there.
"""

import json
import os

import redis
from celery import Celery

BROKER = os.environ.get("ORDINARY_BROKER", "redis://")
CALLS = "ordinary:calls"

app = Celery("ordinary", broker=BROKER)
app.conf.task_default_queue = "ordinary"
# Its own keys for what its worker holds: Penstock looks after those of the stock names.
app.conf.broker_transport_options = {
    name: f"ordinary:{name}" for name in ("unacked_key", "unacked_index_key", "unacked_mutex_key")
}


@app.task(name="ordinary.note")
def note(*args: object) -> None:
    """Write down what it was called with."""
    with redis.Redis.from_url(BROKER) as book:
        book.rpush(CALLS, json.dumps(args))
