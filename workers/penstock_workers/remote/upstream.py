"""What all workers together know of the server of a remote model: on hold, broken, how much it allows.

Lives in the broker's Redis, on its clock, so that one worker's 429 holds all of them back, and a rate is kept
by all together. Must not know HTTP clients, engines and jobs.

| key | type | holds |
| --- | --- | --- |
| `penstock:upstream:<id>` | hash | until when it is on hold or broken, and why; gone when all is well |
| `penstock:bucket:<id>:requests`, `:tokens` | string | see `_bucket.lua` |

The id is one of server, model and token: limits belong to all three.
"""

import hashlib
import math
from typing import Final, Literal, NamedTuple

import redis.asyncio as aioredis

from penstock.bucket import Bucket, take, take_arguments
from penstock.keys import BUCKET_PREFIX, UPSTREAM_PREFIX
from penstock.scripts import script
from penstock_workers.remote.faults import Fault
from penstock_workers.settings import RateLimit

RATE_SHARE: Final = 0.97
BURST_SHARE: Final = 0.02
"""Of a minute's allowance. A server that counts any 60 s then never counts more, by 1 % for late arrivals."""
MAX_HOLD_S: Final = 3600.0
"""A server's own word is taken up to here."""
MAX_LOADING_S: Final = 60.0
"""`estimated_time` is a guess: users saw 2,500 s. After this the server is asked again."""
FIRST_HOLD_S: Final = 1.0
"""After an overload of which the server says no more; doubled each time."""
FAILURES_TO_OPEN: Final = 5
FAILURES_WITHIN_S: Final = 60.0
COOLDOWN_S: Final = (1.0, 60.0)
"""How long a broken server is left alone at first, and at most."""
_ASK_PROBE_S: Final = 1.0

State = Literal["go", "doubt", "full", "hold", "open"]

ASK: Final = script("ask_upstream", ASK_PROBE_S=_ASK_PROBE_S)
LOOK: Final = script("look_upstream")
TELL: Final = script(
    "tell_upstream",
    MAX_HOLD_S=MAX_HOLD_S,
    FIRST_HOLD_S=FIRST_HOLD_S,
    FAILURES_TO_OPEN=FAILURES_TO_OPEN,
    FAILURES_WITHIN_S=FAILURES_WITHIN_S,
    FIRST_COOLDOWN_S=COOLDOWN_S[0],
    MOST_COOLDOWN_S=COOLDOWN_S[1],
)


class Permit(NamedTuple):
    """Whether a request may be sent, and the server's state.

    Attributes:
        state: `go` and `doubt`: the request may be sent in `wait_s`; with `doubt`, its answer is news.
            `full`: the rate allows none now; `hold`: the server asked for a pause; `open`: it is broken.
        wait_s: Seconds before it may be sent, or before it is worth asking again.
        why: Reason of the server's pause, or its last failure.
    """

    state: State
    wait_s: float
    why: str

    @property
    def is_granted(self) -> bool:
        """Whether the request may be sent, after `wait_s`."""
        return self.state in ("go", "doubt")

    @property
    def trouble(self) -> str:
        """What is wrong with the server, as a sentence; empty if nothing is."""
        if self.state == "open":
            return f"circuit open after {FAILURES_TO_OPEN} failures in a row, the last: {self.why}"
        return f"on hold: {self.why}" if self.state == "hold" else ""


class Upstream:
    """One server, as one worker process sees it. For one event loop.

    Args:
        store: The broker's Redis.
        server: Scheme, host and port.
        model: Id of the model there.
        token: Token that requests carry; None for none.
        limit: Rate that it allows.
    """

    def __init__(
        self, store: aioredis.Redis, server: str, model: str, token: str | None, limit: RateLimit
    ) -> None:
        self._store = store
        digest = hashlib.sha256("\0".join((server, model, token or "")).encode()).hexdigest()[:16]
        self._key = f"{UPSTREAM_PREFIX}{digest}"
        self._requests = _bucket(f"{digest}:requests", limit.requests_per_minute)
        self._tokens = _bucket(f"{digest}:tokens", limit.tokens_per_minute)
        self._ask, self._look, self._tell = map(store.register_script, (ASK, LOOK, TELL))

    async def ask(self, n_tokens: int, *, within_s: float, timeout_s: float) -> Permit:
        """Ask for a request's permit; reserves its place in the rate if it may be sent.

        Args:
            n_tokens: Estimated cost of the request.
            within_s: Longest wait for a place in the rate that is reserved.
            timeout_s: Longest time the request may take.
        """
        shares = [self._requests.of(1)] if self._requests else []
        shares += [self._tokens.of(n_tokens)] if self._tokens else []
        keys, arguments = take_arguments(*shares, within_s=within_s)
        return _permit(await self._ask(keys=[self._key, *keys], args=[timeout_s, *arguments]))

    async def look(self) -> Permit:
        """Look at its state; reserves nothing."""
        return _permit(await self._look(keys=[self._key]))

    async def correct(self, n_tokens: int, n_requests: int = 0) -> None:
        """Take or give back what the estimate missed: positive is more than was reserved."""
        shares = [self._requests.of(n_requests)] if self._requests and n_requests else []
        shares += [self._tokens.of(n_tokens)] if self._tokens and n_tokens else []
        if shares:
            await take(self._store, *shares, within_s=math.inf)

    async def answered(self) -> None:
        """Tell that it answered."""
        await self._tell(keys=[self._key], args=["answered", "", "", ""])

    async def abandoned(self) -> None:
        """Tell that nobody waits for its answer any more."""
        await self._tell(keys=[self._key], args=["abandoned", "", "", ""])

    async def hold(self, why: str, seconds: float | None) -> None:
        """Put it on hold for all workers; None: nobody said for how long."""
        told = "" if seconds is None else min(seconds, MAX_HOLD_S)
        await self._tell(keys=[self._key], args=["hold", why, told, COOLDOWN_S[1]])

    async def failed(self, why: str) -> None:
        """Tell that it failed."""
        await self._tell(keys=[self._key], args=["failed", why, "", ""])

    async def report(self, fault: Fault) -> None:
        """Tell what a request without a usable answer says of the server."""
        why = str(getattr(fault.error, "problem", fault.error))
        if fault.kind == "busy":
            await self.hold(why, fault.retry_after_s)
        elif fault.kind in ("failed", "broken"):
            await self.failed(why)
        else:
            await self.answered()


def _bucket(name: str, per_minute: float | None) -> Bucket | None:
    if per_minute is None:
        return None
    return Bucket(f"{BUCKET_PREFIX}{name}", RATE_SHARE * per_minute / 60, max(1.0, BURST_SHARE * per_minute))


def _permit(reply: list[bytes]) -> Permit:
    state, wait_s, why = (part.decode() if isinstance(part, bytes) else str(part) for part in reply)
    return Permit(state, float(wait_s), why)  # type: ignore[arg-type]  # the scripts say nothing else
