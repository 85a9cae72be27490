"""Waits with a deadline, where a test would otherwise sleep."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def eventually(
    check: Callable[[], T], within_s: float = 5.0, *, what: Callable[[], object] | None = None
) -> T:
    """Return the first truthy value of `check`, asked every 10 ms.

    Raises:
        AssertionError: none came within `within_s`; says what came last, and `what()` is then.
    """
    deadline = time.monotonic() + within_s
    while not (value := check()):
        if time.monotonic() > deadline:
            raise AssertionError(f"still {value!r} after {within_s:g} s: {what() if what else check}")
        time.sleep(0.01)
    return value
