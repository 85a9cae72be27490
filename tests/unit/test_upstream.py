"""What servers say of their limits, in all the ways they say it."""

import pytest

from penstock_workers.remote.backlog import Limits
from penstock_workers.remote.rate_headers import read_delay, read_spent

NOW = 1_800_000_000.0


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "7"}, 7),
        ({"retry-after": "1.5"}, 1.5),
        ({"Retry-After-Ms": "250", "Retry-After": "1"}, 0.25),
        ({"Retry-After": "Fri, 15 Jan 2027 08:00:30 GMT"}, 30),
        ({"Retry-After": "Fri, 15 Jan 2027 07:00:00 GMT"}, 0),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": "-5"}, None),
        ({"Retry-After": "nan"}, None),
        ({"RateLimit": '"api";r=0;t=55', "RateLimit-Policy": '"fixed window";"api";q=500;w=300'}, 55),
        ({"RateLimit": '"api";r=3;t=55'}, None),
        ({"RateLimit": '"burst";r=0;t=5, "day";r=0;t=60, "api";r=9;t=600'}, 60),
        ({"RateLimit": "limit=10, remaining=0, reset=50"}, None),
        ({"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": "12"}, 12),
        ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "6m0s"}, 360),
        ({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "12ms"}, 0.012),
        ({"x-ratelimit-remaining-requests": "5", "x-ratelimit-reset-requests": "6m0s"}, None),
        ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "later"}, None),
        ({}, None),
    ],
)
def test_delays_are_read(headers: dict[str, str], seconds: float | None) -> None:
    """Seconds, dates, and the remaining allowance where it is used up; what makes no sense was not said."""
    assert read_delay(headers, now=NOW) == (None if seconds is None else pytest.approx(seconds))


def test_an_allowance_that_is_left_is_no_pause() -> None:
    """A successful answer's headers count only where nothing is left."""
    assert read_spent({"RateLimit": '"api";r=1;t=55', "Retry-After": "9"}) is None
    assert read_spent({"RateLimit": '"api";r=0;t=55'}) == 55


def test_limits_are_learned_by_what_is_to_blame() -> None:
    """More items than were ever taken: fewer items; as many as were taken: fewer tokens."""
    limits = Limits(64, 1000)
    limits.refused(64, 800)
    assert (limits.items, limits.tokens) == (32, 1000)
    limits.accepted(20)
    limits.refused(32, 800)
    assert (limits.items, limits.tokens) == (20, 1000)
    limits.refused(15, 800)
    assert (limits.items, limits.tokens) == (20, 400)
