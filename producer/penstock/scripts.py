"""The scripts of `lua/`: each file is one, and runs on the Redis server as a whole.

A script's first lines say what it does, what its KEYS and ARGV are, and which parts it uses: those are the
files whose names begin with an underscore. With `allow-oom` in its first line it runs on a full server too,
where it makes room. Redis 7 or Valkey is needed.
"""

import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Final

from penstock.envelope import MAX_ENTRY_BYTES, MAX_POP_BYTES

Value = str | bytes | int | float
"""One argument of a script."""

_FLAGS = re.compile(r"#!lua .*\n")
_USES = re.compile(r"^-- Uses (.*)\.$", re.MULTILINE)
_COMMENT = re.compile(r"^--.*\n", re.MULTILINE)
_DEFINITION = re.compile(r"local (?:function )?([\w, ]+)")
_WORD = re.compile(r"\w+")


@cache
def script(name: str, **constants: float) -> str:
    """Return a script as it is sent, with what it uses of its parts.

    Args:
        name: Name of its file, without `.lua`.
        constants: Numbers that stand in Python too.
    """
    text = _read(name)
    flags = match[0] if (match := _FLAGS.match(text)) else ""
    used = match[1].split(", ") if (match := _USES.search(text)) else []
    limits = {"MAX_ENTRY_BYTES": MAX_ENTRY_BYTES, "MAX_POP_BYTES": MAX_POP_BYTES, **constants}
    parts = [f"local {constant} = {value}\n" for constant, value in limits.items()]
    parts += [_COMMENT.sub("", _read(part.removesuffix(".lua"))) for part in used]
    return flags + _with_used("".join(parts), _COMMENT.sub("", text.removeprefix(flags)))


@cache
def _read(name: str) -> str:
    return files("penstock").joinpath("lua", f"{name}.lua").read_text(encoding="utf-8")


def _with_used(shared: str, body: str) -> str:
    """Return a script after those of the shared definitions that it uses, themselves or through others.

    A server makes each function anew whenever a script runs, 0.2 us each: all of them took a quarter of
    the time of `ack`.
    """
    words = set(_WORD.findall(body))
    for definition in reversed(re.split(r"^(?=local )", shared, flags=re.MULTILINE)[1:]):
        defined = _DEFINITION.match(definition)
        assert defined is not None
        if not words.isdisjoint(_WORD.findall(defined[1])):  # each stands before its users
            body = definition + body
            words.update(_WORD.findall(definition))
    return body


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much a queue takes; None is no limit.

    Attributes:
        jobs: Most jobs that wait or are held, those that are pushed included.
        tokens: Most tokens of these jobs.
        bytes: Most bytes of their messages.
        tokens_per_s: Speed of all the queue's workers together.
        wait_s: Longest wait of a message, predicted by that speed.
    """

    jobs: int | None = None
    tokens: int | None = None
    bytes: int | None = None
    tokens_per_s: float | None = None
    wait_s: float | None = None

    def arguments(self) -> list[Value]:
        """Return them as the script `push` takes them."""
        values = (self.jobs, self.tokens, self.bytes, self.tokens_per_s, self.wait_s)
        return ["" if value is None else value for value in values]


NO_LIMITS: Final = Limits()


def push_arguments(
    key: str, *messages: bytes | str, due_at: float | None = None, limits: Limits = NO_LIMITS
) -> tuple[list[str], list[Value]]:
    """Return keys and arguments of the script `push`, which queues messages and wakes idle workers.

    Args:
        key: The queue's list; see `keys.queue_key`.
        messages: Envelopes that workers get, counted by their property `cost`; see docs/reference.
        due_at: Earliest delivery, Unix seconds; None for at once.
        limits: How much the queue takes.
    """
    due = "" if due_at is None else due_at
    return [key], [*limits.arguments(), *(value for message in messages for value in (message, due))]
