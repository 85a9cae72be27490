"""Requests as messages of a queue: version 1 is described in docs/reference/messages.md.

Messages follow Celery's protocol 2 in kombu's Redis envelope, so any Celery producer can send them.
"""

import json
from collections.abc import Mapping
from typing import Any, Final, get_args

from penstock.envelope import MAX_ENTRY_BYTES
from penstock.errors import InvalidMessageError, RequestTooLargeError
from penstock.request import Priority, Request

TASK_NAMES: Final[Mapping[type, str]] = {kind: f"penstock.{kind.task}" for kind in get_args(Request)}
"""Celery's name of the task that serves each kind of request."""


def encode_message(
    request: Request,
    *,
    job_id: str,
    queue: str,
    priority: Priority,
    tenant: str = "",
    reply_to: str,
    origin: str,
    n_tokens: int | None = None,
) -> bytes:
    """Return a message as it is pushed onto the queue's list.

    A message with `n_tokens`, its estimated cost, must be pushed by the script `push`, which counts it.

    Raises:
        RequestTooLargeError: escaped as JSON it has more bytes than a worker would take.

    Source: Celery's message protocol 2 (docs.celeryq.dev, Message Protocol) and the envelope of kombu's
    virtual transports; `body_encoding` utf-8 leaves out base64.
    """
    embed = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
    envelope = {
        "body": _dumps([[], request.fields(), embed]),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {
            "lang": "py",
            "task": TASK_NAMES[type(request)],
            "id": job_id,
            "root_id": job_id,
            "parent_id": None,
            "group": None,
            "shadow": None,
            "eta": None,
            "expires": None,
            "retries": 0,
            "timelimit": [None, None],
            # Shown by logs and Flower in place of the arguments.
            "argsrepr": "()",
            "kwargsrepr": request.summary(),
            "origin": origin,
            "ignore_result": False,
            **({"tenant": tenant} if tenant else {}),
        },
        "properties": {
            "correlation_id": job_id,
            "reply_to": reply_to,
            "delivery_mode": 2,
            # The default exchange: kombu then needs no binding to find the queue again.
            "delivery_info": {"exchange": "", "routing_key": queue},
            "priority": int(priority),
            "body_encoding": "utf-8",
            # The last two, where scripts look for them; kombu has the same order.
            **({} if n_tokens is None else {"cost": n_tokens}),
            "delivery_tag": job_id,
        },
    }
    raw = _dumps(envelope).encode()
    if len(raw) > MAX_ENTRY_BYTES:  # texts of control characters: seven bytes for each of theirs
        raise RequestTooLargeError("the message", len(raw), MAX_ENTRY_BYTES)
    return raw


def decode_request(task: str, args: tuple[object, ...], kwargs: Mapping[str, Any]) -> Request:
    """Read a message's arguments.

    Raises:
        RequestError: a field is wrong; the error tells which, its value, and what is allowed.
    """
    if args:
        raise InvalidMessageError(f"{len(args)} positional arguments; all fields are keyword arguments")
    cls: type[Request] = {name: cls for cls, name in TASK_NAMES.items()}[task]
    return cls.parse(kwargs)


def _dumps(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
