"""What lies in a queue's list, checked before anything is built from it: see docs/reference/messages.md.

Whoever may send can push any bytes. Nothing of a message is decompressed, decoded by a name that it gives,
used as a part of a key, or logged, before `open_entry` has found it to be what it should. Knows neither
Celery nor kombu.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from penstock.keys import is_reply_channel
from penstock.request import MAX_REQUEST_BYTES, TENANT
from penstock.validation import describe

MAX_ENTRY_BYTES: Final = 4 * MAX_REQUEST_BYTES + (1 << 20)
"""A list's entry as it lies in Redis: 65 MiB. Four bytes for each of text, which is what Celery makes of
Cyrillic (six of JSON for two, then base64), and room for the rest."""
MAX_POP_BYTES: Final = 16 << 20
"""A pop takes no further entry once it has this many bytes: it never holds 32 of the largest at once."""
MAX_NAME_CHARACTERS: Final = 256
"""Most characters of an id, and of any other text in the headers that we or Celery use."""
MAX_DEPTH: Final = 8
"""Most objects and lists inside each other in a header that is unknown here."""
CONTENT_TYPE: Final = "application/json"
CONTENT_ENCODINGS: Final = ("utf-8", "binary")
BODY_ENCODINGS: Final = ("base64", "utf-8")
TRUNCATED: Final = b"\0"
"""Begins what a script returns for an entry above `MAX_ENTRY_BYTES`: size, line end, last bytes."""

# No control characters, no line breaks of any kind, no marks that turn the direction of writing, no
# surrogates: what is printed stays on its line, and what is sent to Redis can be encoded.
_UNCLEAN: Final = "\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff"
_CLEAN: Final = re.compile(f"[^{_UNCLEAN}]{{1,{MAX_NAME_CHARACTERS}}}")
_DIRT: Final = re.compile(f"[{_UNCLEAN}]")
_SURROGATE: Final = re.compile(rb"\\u[dD][89a-fA-F]")
_TOLD_SIZE: Final = re.compile(rb"\0(\d{1,15})\n")

_CONTAINERS: Final = (dict, list)
_NAMES: Final = ("task", "id", "root_id", "parent_id", "group", "lang", "origin", "shadow", "eta", "expires")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReturnAddress:
    """Address that hears what became of a message.

    Attributes:
        job_id: Id of the job.
        reply_to: Channel that hears of it, if the message names one.
    """

    job_id: str
    reply_to: str | None = None


class EntryError(Exception):
    """An entry was refused.

    Attributes:
        problem: Reason of the refusal.
        sender: Address of the sender to tell; None where the entry names no id that can be used.
        is_message: False for what has not even the shape of a message.
    """

    def __init__(self, problem: str, sender: ReturnAddress | None = None, *, is_message: bool = True) -> None:
        super().__init__(problem)
        self.problem, self.sender, self.is_message = problem, sender, is_message


def is_clean(value: object) -> bool:
    """Whether a value is a text that may stand in a key, in a log line and on a terminal."""
    if not isinstance(value, str):
        return False
    # Most are printable, and asking that is several times as fast.
    if value.isprintable() and 0 < len(value) <= MAX_NAME_CHARACTERS:
        return True
    return _CLEAN.fullmatch(value) is not None


def printable(text: object, most: int = MAX_NAME_CHARACTERS) -> str:
    """Return a text for a line of a log or a terminal; what could act there is escaped."""
    found = str(text)
    if len(found) > most:
        found = f"{found[:most]}..."
    return _DIRT.sub(lambda match: match[0].encode("unicode_escape").decode(), found)


def open_entry(raw: bytes) -> dict[str, Any]:
    """Return the envelope of a list's entry, with headers and properties that can be used as they are.

    The body is still text: what it holds is checked where it is read.

    Raises:
        EntryError: it is no message, or one that is refused.
    """
    if raw.startswith(TRUNCATED) and (told := _TOLD_SIZE.match(raw)):
        problem = f"it has {int(told[1]):,} bytes, the limit is {MAX_ENTRY_BYTES:,}"
        raise EntryError(problem, _sender_in_text(raw))
    if len(raw) > MAX_ENTRY_BYTES:
        problem = f"it has {len(raw):,} bytes, the limit is {MAX_ENTRY_BYTES:,}"
        raise EntryError(problem, _sender_in_text(raw[-(1 << 14) :]))
    envelope = decode_envelope(raw)
    headers, properties = envelope.get("headers"), envelope.get("properties")
    if not isinstance(headers, dict) or not isinstance(properties, dict):
        raise EntryError("headers and properties are not objects", is_message=False)
    refused = (
        _problem_of_content(envelope, headers, properties)
        or problem_of_headers(headers)
        or _problem_of_properties(properties)
        or _problem_of_surrogates(envelope, raw)
    )
    if refused:
        raise EntryError(refused, sender_of(envelope))
    return envelope


def decode_envelope(raw: bytes) -> dict[str, Any]:
    """Return the JSON object in `raw`, unchecked.

    Raises:
        EntryError: there is none.
    """
    try:
        envelope = _DECODER.decode(raw.decode())
    except (ValueError, RecursionError) as error:
        raise EntryError(f"not JSON ({type(error).__name__})", is_message=False) from None
    if not isinstance(envelope, dict):
        raise EntryError("not a JSON object", is_message=False)
    return envelope


def sender_of(envelope: Mapping[str, Any]) -> ReturnAddress | None:
    """Return the sender of a message, however malformed the rest of it is; None if it names none."""
    headers, properties = envelope.get("headers"), envelope.get("properties")
    job_id = headers.get("id") if isinstance(headers, dict) else None
    reply_to = properties.get("reply_to") if isinstance(properties, dict) else None
    return _sender(job_id, reply_to)


def problem_of_headers(headers: Mapping[str, Any]) -> str | None:
    """Say what is wrong with the headers of a message; those of Celery's protocol 1 are its body's fields."""
    for name, value in headers.items():
        rule = _RULES.get(name)
        if rule is not None:
            if value is not None and not rule[0](value):
                return f"header {name} is {describe(value)}; {rule[1]}"
        elif not is_clean(name):
            return "the name of a header is not clean text"
        elif not _is_shallow(value):
            return f"header {name} is deeper than {MAX_DEPTH} levels"
    if "task" in headers and (headers["task"] is None or headers.get("id") is None):
        return "it names a task and no id" if headers["task"] else "it names no task"
    return None


def _problem_of_content(
    envelope: Mapping[str, Any], headers: Mapping[str, Any], properties: Mapping[str, Any]
) -> str | None:
    kind, encoding = envelope.get("content-type"), envelope.get("content-encoding")
    if kind != CONTENT_TYPE:
        told = kind if is_clean(kind) else describe(kind)
        return f"content type {told} is not read here, only JSON ({CONTENT_TYPE})"
    if encoding is not None and not (isinstance(encoding, str) and encoding.lower() in CONTENT_ENCODINGS):
        told = encoding if is_clean(encoding) else describe(encoding)
        return f"content encoding {told} is not read here, only {' and '.join(CONTENT_ENCODINGS)}"
    if headers.get("compression"):
        return "it is compressed, which is not read here"
    encoding = properties.get("body_encoding")
    if encoding not in (None, "", *BODY_ENCODINGS):
        return f"body_encoding is {describe(encoding)}; {' and '.join(BODY_ENCODINGS)} are read here"
    if not isinstance(envelope.get("body"), str):
        return f"body is {describe(envelope.get('body'))}, not a string"
    return None


def _problem_of_properties(properties: Mapping[str, Any]) -> str | None:
    for name in ("correlation_id", "reply_to", "delivery_tag"):
        value = properties.get(name)
        if value not in (None, "") and not is_clean(value):
            return f"property {name} is {describe(value)}; {_CLEAN_IS_ALLOWED}"
    priority, info = properties.get("priority"), properties.get("delivery_info")
    if priority is not None and not _is_whole(priority, 255):
        return f"property priority is {describe(priority)}; 0 to 255 are allowed"
    if info is not None and not isinstance(info, dict):
        return f"property delivery_info is {describe(info)}, not an object"
    for name in ("exchange", "routing_key"):
        value = (info or {}).get(name)
        if value is not None and not isinstance(value, str):
            return f"property delivery_info.{name} is {describe(value)}, not a string"
    if not all(map(_is_shallow, properties.values())):
        return f"its properties are deeper than {MAX_DEPTH} levels"
    return None


def _problem_of_surrogates(envelope: Mapping[str, Any], raw: bytes) -> str | None:
    """Look for halves of surrogate pairs, which no UTF-8 can carry; only where one may be."""
    if b"\\u" in raw and _SURROGATE.search(raw):
        try:
            for value in envelope.values():
                json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return "it holds a lone surrogate, which UTF-8 cannot carry"
    return None


def _sender(job_id: object, reply_to: object) -> ReturnAddress | None:
    if not isinstance(job_id, str) or not is_clean(job_id):
        return None
    is_channel = isinstance(reply_to, str) and is_clean(reply_to) and is_reply_channel(reply_to)
    return ReturnAddress(job_id=job_id, reply_to=str(reply_to) if is_channel else None)


def _sender_in_text(tail: bytes) -> ReturnAddress | None:
    """Look for the id where kombu and our client write it: behind the body, in which no quote is bare."""
    found = {
        name: match[-1].decode(errors="replace") if (match := re.findall(pattern, tail)) else None
        for name, pattern in (
            ("id", rb'(?<!\\)"id"\s*:\s*"([^"\\]*)"'),
            ("reply_to", rb'(?<!\\)"reply_to"\s*:\s*"([^"\\]*)"'),
        )
    }
    return _sender(found["id"], found["reply_to"])


def _is_tenant(value: object) -> bool:
    return value == "" or (isinstance(value, str) and TENANT.fullmatch(value) is not None)


def _is_whole(value: object, most: int) -> bool:
    return type(value) is int and 0 <= value <= most


def _is_seconds(value: object) -> bool:
    return value is None or (type(value) in (int, float) and 0 <= value <= 1e9)  # type: ignore[operator]  # a number


def _are_limits(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_seconds, value))


def _is_shallow(value: Any) -> bool:
    if type(value) not in _CONTAINERS or not value:
        return True
    level = [value]
    for _ in range(MAX_DEPTH):
        nested = [node for node in level if type(node) in _CONTAINERS]
        if not nested:
            return True
        level = [item for node in nested for item in (node.values() if type(node) is dict else node)]
    return not any(type(node) in _CONTAINERS for node in level)


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


_DECODER: Final = json.JSONDecoder(parse_constant=_refuse_constant)

_CLEAN_IS_ALLOWED: Final = (
    f"up to {MAX_NAME_CHARACTERS} characters without control characters and lone surrogates are allowed"
)
_RULES: Final[Mapping[str, tuple[Callable[[Any], bool], str]]] = {
    **dict.fromkeys(_NAMES, (is_clean, _CLEAN_IS_ALLOWED)),
    "tenant": (_is_tenant, "up to 64 of a-z A-Z 0-9 . _ @ - are allowed"),
    "retries": (lambda value: _is_whole(value, 1000), "0 to 1000 are allowed"),
    "timelimit": (_are_limits, "two numbers of seconds, each of which may be null, are allowed"),
    "ignore_result": (lambda value: isinstance(value, bool), "true and false are allowed"),
    "group_index": (lambda value: _is_whole(value, 1 << 31), "a number from 0 on is allowed"),
    "replaced_task_nesting": (lambda value: _is_whole(value, 1000), "0 to 1000 are allowed"),
    "stamps": (
        lambda value: isinstance(value, dict) and _is_shallow(value),
        f"an object of up to {MAX_DEPTH} levels is allowed",
    ),
    "stamped_headers": (
        lambda value: isinstance(value, list) and _is_shallow(value),
        f"a list of up to {MAX_DEPTH} levels is allowed",
    ),
    # Never shown: whatever stands there is replaced.
    **dict.fromkeys(("argsrepr", "kwargsrepr"), (_is_shallow, f"up to {MAX_DEPTH} levels are allowed")),
}
"""What each header may be, and how that is said; of others the names are looked at."""
