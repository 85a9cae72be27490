"""What a message may ask to be sent after its job: callbacks, the rest of a chain, a chord's body.

A worker sends them with its own rights, so it sends what is harmless only, and checks before it computes.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from penstock.messages import TASK_NAMES

MAX_SIGNATURES: Final = 32
"""Of one message, nested ones counted: each becomes a message at most."""

EMBEDDED: Final = ("callbacks", "errbacks", "chain", "chord")
"""What the third part of a message's body holds, by Celery's names."""

OPTIONS: Final = (
    "queue",
    "countdown",
    "eta",
    "expires",
    "priority",
    "ignore_result",
    "task_id",
    "link",
    "link_error",
)
"""What a signature may say about how it is sent, besides what Celery's canvas adds."""

_CANVAS_OPTIONS: Final = ("root_id", "parent_id", "group_id", "group_index", "reply_to", "chord", "chain")
_NESTED: Final = ("link", "link_error", "chord", "chain")
_FIELDS: Final = ("task", "args", "kwargs", "options", "subtask_type", "immutable", "chord_size")
_NAME: Final = re.compile(r"[A-Za-z0-9_.:@-]{1,255}")
_TASKS: Final = frozenset(TASK_NAMES.values())


class CallbackError(ValueError):
    """A callback that is not sent; says which and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Callbacks:
    """What the workers of a deployment send.

    Attributes:
        ours: Queues of models; they take our tasks alone.
        allowed: Other queues that callbacks may go to.
        default: Queue of a signature that names none.
    """

    ours: frozenset[str]
    allowed: frozenset[str]
    default: str

    def check(self, embedded: Mapping[str, Any]) -> None:
        """Refuse what is not safe to send.

        Args:
            embedded: Signatures, by the names in `EMBEDDED`.

        Raises:
            CallbackError: a callback that takes the result, goes elsewhere, says more than `OPTIONS`, or is
                one too many.
        """
        found = _Signatures(rules=self)
        for name in ("callbacks", "chain"):
            found.check_all(embedded.get(name), what=name)
        found.check_all(embedded.get("errbacks"), what="errbacks", is_errback=True)
        if embedded.get("chord") is not None:
            found.check(embedded["chord"], what="chord")


def awaited_ids(embedded: object) -> list[str]:
    """Return the ids of what was to follow: who sent a chain or a chord waits for its last step."""
    if not isinstance(embedded, dict):
        return []
    chain = embedded.get("chain")
    steps = [*(chain if isinstance(chain, list) else [])[:MAX_SIGNATURES], embedded.get("chord")]
    options = [step.get("options") for step in steps if isinstance(step, dict)]
    ids = [each.get("task_id") for each in options if isinstance(each, dict)]
    return [each for each in ids if isinstance(each, str) and _is_name(each)]


@dataclass(slots=True, kw_only=True)
class _Signatures:
    """The signatures of one message."""

    rules: Callbacks
    n: int = field(default=0)

    def check_all(self, signatures: object, *, what: str, is_errback: bool = False) -> None:
        if signatures is None:
            return
        if not isinstance(signatures, list):
            raise CallbackError(f"{what} is {_kind(signatures)}, not a list of signatures")
        for signature in signatures:
            self.check(signature, what=what, is_errback=is_errback)

    def check(self, signature: object, *, what: str, is_errback: bool = False) -> None:
        self.n += 1
        if self.n > MAX_SIGNATURES:
            raise CallbackError(f"more than {MAX_SIGNATURES} callbacks, nested ones counted")
        if not isinstance(signature, dict) or not signature.keys() <= set(_FIELDS):
            raise CallbackError(f"{what} holds {_kind(signature)} that is no signature")
        options = signature.get("options") or {}
        if not isinstance(options, dict):
            raise CallbackError(f"options of a signature in {what} are {_kind(options)}, not a mapping")
        self._options(options, what=what)
        kind, kwargs = signature.get("subtask_type"), signature.get("kwargs") or {}
        if not isinstance(kwargs, dict):
            raise CallbackError(f"kwargs of a signature in {what} are {_kind(kwargs)}, not a mapping")
        if kind in ("group", "chain"):
            self.check_all(kwargs.get("tasks"), what=f"a {kind} in {what}", is_errback=is_errback)
        elif kind == "chord":
            raise CallbackError(
                f"{what} holds a chord; a group that is followed by something is one: send it yourself"
            )
        elif kind is not None:
            raise CallbackError(
                f"{what} holds a signature of another type; plain ones, groups and chains are sent"
            )
        else:
            self._task(signature, options, what=what, is_errback=is_errback)

    def _task(
        self, signature: dict[str, Any], options: dict[str, Any], *, what: str, is_errback: bool
    ) -> None:
        task, queue = signature.get("task"), options.get("queue") or self.rules.default
        if not isinstance(task, str) or not _is_name(task) or task.startswith("celery."):
            raise CallbackError(f"{what} names no task, or one of Celery's own")
        if not isinstance(signature.get("args") or [], list | tuple):
            raise CallbackError(f"args of {task} in {what} are no list")
        if not is_errback and signature.get("immutable") is not True:
            raise CallbackError(
                f"{what} would give the result to {task}, and it does not fit into a message: make the "
                f"signature immutable, {task.rpartition('.')[2]}.si(...), and fetch it by the job's id"
            )
        if queue in self.rules.ours:
            if task not in _TASKS or is_errback:
                raise CallbackError(f"{what} sends {task} to the queue {queue}, which it is not for")
        elif queue not in self.rules.allowed:
            named = f"queue {queue}" if options.get("queue") else f"no queue, so it goes to {queue}"
            raise CallbackError(
                f"{what} sends {task}: {named}, which worker.callback_queues of the workers does not name"
            )

    def _options(self, options: dict[str, Any], *, what: str) -> None:
        for name, value in options.items():
            if name not in OPTIONS and name not in _CANVAS_OPTIONS:
                told = name if _is_name(name) else "with a strange name"
                raise CallbackError(f"{what} has the option {told}; sent are {', '.join(OPTIONS)}")
            if value is None:
                continue
            if name == "chord":
                self.check(value, what="chord")
            elif name in _NESTED:
                signatures = value if isinstance(value, list) else [value]
                self.check_all(signatures, what=name, is_errback=name == "link_error")
            elif not _is_plain(name, value):
                raise CallbackError(f"{what} has an option {name} that is {_kind(value)}, or too long")


def _is_plain(name: str, value: object) -> bool:
    if name in ("countdown", "priority", "group_index"):
        return type(value) in (int, float)
    if name == "ignore_result":
        return isinstance(value, bool)
    if name == "expires" and type(value) in (int, float):
        return True
    return _is_name(value) or (name in ("eta", "expires") and isinstance(value, str) and len(value) <= 64)


def _is_name(value: object) -> bool:
    return isinstance(value, str) and _NAME.fullmatch(value) is not None


def _kind(value: object) -> str:
    return f"{type(value).__name__} of {len(value)}" if isinstance(value, Sequence) else type(value).__name__
