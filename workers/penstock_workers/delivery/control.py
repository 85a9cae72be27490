"""Celery's remote commands that do something else here, or are refused with a reason.

All other commands do what Celery documents.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from importlib.util import find_spec
from typing import Any, Final

from celery.worker import control
from celery.worker.control import Panel

SECRETS: Final = ("password", "sentinel_kwargs")
"""Transport options that Celery's `stats` would show to whoever asks, and Flower on a worker's page."""

REFUSED: Final[Mapping[str, str]] = {
    "rate_limit": (
        "rate limits of tasks have no effect here: a tenant has tokens_per_minute, a model max_waiting_jobs, "
        "a remote model rate_limit, all in the deployment's file"
    ),
    "time_limit": "time limits have no effect here, since a thread cannot be ended: give jobs a deadline",
    "pool_restart": "the pool is not restarted alone: stop the process, and start it again",
}
"""Commands that no worker carries out, and what to do instead."""


NEEDED: Final[Mapping[str, str]] = {"memsample": "psutil", "objgraph": "objgraph"}
"""The package that Celery needs for each command; without it Celery answers nothing, or a traceback."""


def replace_commands() -> None:
    """Replace Celery's commands by these, in this process."""
    refused = dict(REFUSED) | {
        name: f"{name} needs the package {package}, which is not installed beside this worker"
        for name, package in NEEDED.items()
        if find_spec(package) is None
    }
    Panel.data.update({name: _refusal(reason) for name, reason in refused.items()})
    ours = (add_consumer, cancel_consumer, stats, revoke_by_stamped_headers)
    Panel.data.update({command.__name__: command for command in ours})
    for name, command in Panel.data.items():
        if not hasattr(command, "__wrapped__"):
            Panel.data[name] = _in_words(command)


def add_consumer(state: Any, queue: object = None, **options: object) -> dict[str, str]:
    """Take jobs of a queue again; only of a model that this process has loaded."""
    queues: Mapping[str, str] = state.app.penstock_queues
    if not isinstance(queue, str) or queue not in queues:
        told = f"queue {queue!r:.80} is of no model that this process has loaded"
        return {"error": f"{told}; it has {_listed(queues)}: start another worker with -Q for it"}
    if any(options.get(name) not in (None, queue) for name in ("exchange", "routing_key")):
        return {"error": f"queue {queue} has no exchange or routing key but its own name"}
    state.app.penstock_serving.paused.discard(queues[queue])
    reply: dict[str, str] = control.add_consumer(state, queue)
    state.consumer.call_soon(state.app.penstock_announce)
    return reply


def cancel_consumer(state: Any, queue: object = None, **_: object) -> dict[str, str]:
    """Take no more jobs of a queue; the registry, and so `penstock status`, says so at once."""
    consumed = list(state.app.amqp.queues.consume_from)
    if not isinstance(queue, str) or queue not in consumed:
        return {"error": f"this process does not consume from {queue!r:.80}, only from {_listed(consumed)}"}
    reply: dict[str, str] = control.cancel_consumer(state, queue)
    state.app.penstock_serving.paused.add(state.app.penstock_queues.get(queue))
    state.consumer.call_soon(state.app.penstock_announce)
    return reply


def revoke_by_stamped_headers(state: Any, headers: Any = None, **options: Any) -> Any:
    """Revoke jobs by their stamps; answers with how to write stamps if `headers` has none."""
    if isinstance(headers, list):
        if not headers or not all(isinstance(each, str) and "=" in each for each in headers):
            return {"error": "stamps are written NAME=VALUE"}
        headers = dict(each.split("=", 1) for each in headers)
    if not isinstance(headers, dict):
        return {"error": f"stamps are a mapping, not {type(headers).__name__}"}
    return control.revoke_by_stamped_headers(state, headers, **options)


def stats(state: Any, **_: object) -> dict[str, Any]:
    """Return Celery's statistics, without passwords."""
    found: dict[str, Any] = control.stats(state)
    broker = dict(found.get("broker") or {})
    options = broker.get("transport_options") or {}
    broker["transport_options"] = {name: value for name, value in options.items() if name not in SECRETS}
    return found | {"broker": broker}


def _in_words(command: Callable[..., Any]) -> Callable[..., Any]:
    """Answer wrong arguments with a sentence; Celery would log a traceback and answer with its type."""

    @wraps(command)
    def answer(state: Any, *args: object, **arguments: object) -> Any:
        try:
            return command(state, *args, **arguments)
        except (TypeError, ValueError, LookupError, AttributeError) as error:
            return {"error": f"{command.__name__} does not take these arguments: {error}"}

    return answer


def _refusal(reason: str) -> Callable[..., dict[str, str]]:
    def refuse(state: Any, **_: object) -> dict[str, str]:
        del state
        return {"error": reason}

    return refuse


def _listed(queues: Iterable[str]) -> str:
    return ", ".join(sorted(queues)) or "none"
