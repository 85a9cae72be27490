"""Messages that did not come from our client: plain Celery, bare Redis, and garbage."""

import base64
import json
import struct
import subprocess
import sys
import uuid

import numpy as np
import pytest
import redis

from penstock import Client, InvalidMessageError, InvalidOptionError, PenstockError
from penstock.keys import record_key
from tests.deployment import Server, WorkerProcess
from tests.eventually import eventually

PLAIN_CELERY = """
import sys
from celery import Celery
app = Celery(broker=sys.argv[1])
texts = {"model": "minilm", "texts": ["plain celery"]}
sent = app.send_task("penstock.embed", kwargs=texts, queue="cpu.minilm")
print(sent.id)
assert not [name for name in sys.modules if name.startswith("penstock")]
"""


def push(server: Server, *, body: object, **changes: object) -> str:
    """Push a message as docs/reference/messages.md describes it, without our code; return the job's id."""
    job_id = str(uuid.uuid4())
    text = body if isinstance(body, str) else json.dumps(body)
    envelope = {
        "body": base64.b64encode(text.encode()).decode(),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {"lang": "py", "task": "penstock.embed", "id": job_id},
        "properties": {
            "correlation_id": job_id,
            "delivery_mode": 2,
            "delivery_info": {"exchange": "", "routing_key": "cpu.minilm"},
            "priority": 0,
            "body_encoding": "base64",
            "delivery_tag": job_id,
        },
    }
    for name, value in changes.items():
        section = envelope if name.startswith("content") else envelope["headers"]
        section[name.replace("_", "-") if section is envelope else name] = value
    with redis.Redis.from_url(server.broker_url) as broker:
        broker.lpush("cpu.minilm", json.dumps(envelope))
    return job_id


def body(**kwargs: object) -> list[object]:
    """Return a body with these keyword arguments."""
    return [[], kwargs, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}]


def test_plain_celery_sends_and_anyone_reads(client: Client, server: Server) -> None:
    """A Celery app without our code sends a job; its result is read with struct, json and numpy alone."""
    sent = subprocess.run(
        [sys.executable, "-c", PLAIN_CELERY, server.broker_url], capture_output=True, text=True, check=True
    )
    job_id = sent.stdout.strip()

    with redis.Redis.from_url(server.results_url) as store:
        payload = eventually(lambda: store.get(f"celery-task-meta-{job_id}"), within_s=20)
    magic, header_bytes = struct.unpack_from("<4sI", payload)
    header = json.loads(payload[8 : 8 + header_bytes])
    vectors = np.frombuffer(payload, header["result"]["vectors"]["dtype"], offset=8 + header_bytes, count=384)

    assert magic == b"PNS\x01"
    assert header["status"] == "SUCCESS"
    assert np.dot(vectors, client.embed(["plain celery"], model="minilm")[0]) > 0.999


def test_bare_redis_commands_send(client: Client, server: Server) -> None:
    """One LPUSH of documented JSON is a job, and our client fetches it by its id."""
    job_id = push(server, body=body(model="minilm", texts=["bare"]))

    eventually(lambda: _ended(server, job_id), within_s=20)

    vectors = client.job(job_id).result(timeout_s=5)
    assert isinstance(vectors, np.ndarray)
    assert vectors.shape == (1, 384)


@pytest.mark.parametrize(
    ("changes", "content", "error", "message"),
    [
        ({}, body(texts=["a"]), InvalidMessageError, "'model' is missing"),
        ({}, body(model="minilm"), InvalidMessageError, "'texts' is missing"),
        ({}, body(model="minilm", texts=["a"], surprise=1), InvalidOptionError, "surprise"),
        ({}, body(model="minilm", texts=["a"], version=2), InvalidMessageError, "version 2"),
        ({}, body(model="minilm", texts=["\ud800"]), PenstockError, "surrogate"),
        ({}, body(model="nope", texts=["a"]), PenstockError, "not served here"),
        ({}, [["positional"], {}, {}], InvalidMessageError, "positional"),
        ({}, "this is not JSON", InvalidMessageError, "not application/json"),
        ({}, {"args": [], "kwargs": {}}, InvalidMessageError, "refused"),
        ({}, 7, InvalidMessageError, "another shape"),
        ({}, [1, 2], InvalidMessageError, "another shape"),
        ({}, [[], "kwargs", {}], InvalidMessageError, "not a list and a mapping"),
        ({"content_type": "application/x-python-serialize"}, "x", InvalidMessageError, "only JSON"),
        ({"task": "penstock.explode"}, body(), InvalidMessageError, "no task"),
        ({"eta": "never"}, body(model="minilm", texts=["a"]), InvalidMessageError, "eta|ETA"),
    ],
)
def test_a_bad_message_is_answered(
    client: Client,
    server: Server,
    worker: WorkerProcess,
    changes: dict[str, object],
    content: object,
    error: type[PenstockError],
    message: str,
) -> None:
    """Whoever asks for the job by its id gets the reason; the worker goes on."""
    job_id = push(server, body=content, **changes)

    eventually(lambda: _ended(server, job_id), within_s=20)

    with pytest.raises(error, match=message):
        client.job(job_id).result(timeout_s=5)
    assert client.embed(["still here"], model="minilm").shape == (1, 384)


@pytest.mark.parametrize(
    "entry", [b"not json", b"\xff\xfe", b"", b"7", b"[]", b"null", b"{}", b'{"body": "x", "properties": {}}']
)
def test_garbage_in_a_queue_ends_no_worker(
    client: Client, server: Server, worker: WorkerProcess, entry: bytes
) -> None:
    """A list entry that is no message at all is dropped."""
    with redis.Redis.from_url(server.broker_url) as broker:
        broker.lpush("cpu.minilm", entry)

    assert client.embed(["still here"], model="minilm").shape == (1, 384)
    assert worker.process.poll() is None
    assert "Unrecoverable" not in worker.log


def test_refused_content_is_kept_and_not_logged(
    client: Client, server: Server, worker: WorkerProcess
) -> None:
    """A refused message is a dead letter; what it holds stays out of the log."""
    job_id = push(server, body="my-xylophone-body")

    eventually(lambda: _ended(server, job_id), within_s=20)

    with redis.Redis.from_url(server.broker_url) as broker:
        letters = eventually(lambda: [json.loads(e) for e in broker.lrange("penstock:dead", 0, -1)])
    (letter,) = [letter for letter in letters if letter["id"] == job_id]
    assert letter["reason"] == "refused: body is not application/json (DecodeError)"
    assert json.loads(letter["message"])["headers"]["id"] == job_id

    encoded = base64.b64encode(b"my-xylophone-body").decode()
    assert "xylophone" not in worker.log
    assert encoded not in worker.log


def _ended(server: Server, job_id: str) -> bool:
    with redis.Redis.from_url(server.results_url) as store:
        return store.exists(record_key(job_id)) == 1
