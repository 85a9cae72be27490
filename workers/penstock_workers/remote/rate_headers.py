"""What servers say of their limits in the headers of answers: how long to wait, and what is used up."""

import re
import time
from collections.abc import Mapping
from contextlib import suppress
from email.utils import parsedate_to_datetime
from typing import Final


def read_delay(headers: Mapping[str, str], now: float | None = None) -> float | None:
    """Return the seconds that a server asks to be left alone after a refusal; None if it does not say.

    Args:
        headers: Headers of its answer; upper or lower case is alike.
        now: Unix seconds, for dates; None takes the server's own, where it tells it.

    Source: RFC 9110, section 10.2.3 (Retry-After, seconds or date); draft-ietf-httpapi-ratelimit-headers-09
    (RateLimit); platform.openai.com, Rate limits in headers (x-ratelimit, retry-after-ms).
    """
    found = {name.lower(): value for name, value in headers.items()}
    if (milliseconds := _number(found.get("retry-after-ms"))) is not None:
        return milliseconds / 1000
    if "retry-after" in found:
        if (seconds := _number(found["retry-after"])) is not None:
            return seconds
        try:
            date = parsedate_to_datetime(found["retry-after"])
        except ValueError:
            pass  # neither of the two: as if the header were not there
        else:
            return max(0.0, date.timestamp() - (_now(found) if now is None else now))
    return read_spent(found)


def read_spent(headers: Mapping[str, str]) -> float | None:
    """Return the seconds until a used-up allowance is refilled; None if some of it is left.

    Args:
        headers: Headers of any answer; upper or lower case is alike.

    Source: see `read_delay`.
    """
    found = {name.lower(): value for name, value in headers.items()}
    waits = []
    for item in re.split(r",(?=\s*\"|\s*[a-z])", found.get("ratelimit", "")):  # "api";r=0;t=55
        fields = dict(re.findall(r"\b(\w+)\s*=\s*(\d+)", item))
        if fields.get("r", fields.get("remaining")) == "0":  # a later and an earlier draft
            waits.append(_number(fields.get("t", fields.get("reset"))))
    for name, value in found.items():
        if (match := re.fullmatch(r"x-ratelimit-remaining((?:-\w+)*)", name)) and _number(value) == 0:
            waits.append(_duration(found.get(f"x-ratelimit-reset{match[1]}", ""), _now(found)))
    return max((wait for wait in waits if wait is not None), default=None)


_UNITS: Final = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def _now(headers: Mapping[str, str]) -> float:
    """Return the time by the server's clock, which its dates follow."""
    with suppress(KeyError, ValueError):
        return parsedate_to_datetime(headers["date"]).timestamp()
    return time.time()


def _duration(text: str, now: float) -> float | None:
    """Read `12ms`, `6m0s`, seconds, or a moment in Unix seconds."""
    if (seconds := _number(text)) is not None:
        return max(0.0, seconds - now) if seconds > 1e9 else seconds
    parts = re.findall(r"([\d.]+)(ms|[smhd])", text)
    if not parts or "".join(map("".join, parts)) != text:
        return None
    numbers = [(_number(number), unit) for number, unit in parts]
    return sum(number * _UNITS[unit] for number, unit in numbers if number is not None)


def _number(text: str | None) -> float | None:
    return float(text) if text and re.fullmatch(r"\s*\d{1,12}(\.\d*)?\s*", text, re.ASCII) else None
