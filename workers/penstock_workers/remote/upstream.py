"""What all workers together know of the server of a remote model: on hold, broken, how much it allows.

Lives in the broker's Redis, on its clock, so that one worker's 429 holds all of them back, and a rate is kept
by all together. Must not know HTTP clients, engines and jobs.

| key | type | holds |
| --- | --- | --- |
| `penstock:upstream:<id>` | hash | until when it is on hold or broken, and why; gone when all is well |
| `penstock:bucket:<id>:requests`, `:tokens` | string | see `bucket.lua` |

The id is one of server, model and token: limits belong to all three.
"""

import hashlib
import math
from typing import Final, Literal, NamedTuple

import redis.asyncio as aioredis

from penstock.bucket import Bucket, bucket_functions, take, take_arguments
from penstock.keys import BUCKET_PREFIX, UPSTREAM_PREFIX
from penstock.settings import RateLimit
from penstock_workers.remote.faults import Fault

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

_READ: Final = """
local at = now_s()
local state = redis.call('HMGET', KEYS[1], 'hold', 'open', 'probe', 'failures', 'strikes', 'why')
local hold, open, probe = tonumber(state[1] or 0), tonumber(state[2] or 0), tonumber(state[3] or 0)
local failures, strikes = tonumber(state[4] or 0), tonumber(state[5] or 0)
local function reply(word, seconds) return {word, string.format('%.6f', seconds), state[6] or ''} end
"""

# A broken server gets one request when its time is up; others ask again soon, for the answer may be there.
#
# KEYS: state, buckets.  ARGV: how long a request may take, then as `take`.
ASK: Final = f"""{_READ}
if open > at then return reply('open', open - at) end
if probe > at then return reply('open', math.min(probe - at, {_ASK_PROBE_S})) end
if hold > at then return reply('hold', hold - at) end
local taken = {{1, '0'}}
if #KEYS > 1 then taken = take({{unpack(KEYS, 2)}}, ARGV, 2) end
if taken[1] == 0 then return reply('full', taken[2]) end
if open > 0 then redis.call('HSET', KEYS[1], 'probe', at + taken[2] + ARGV[1]) end
return reply((open > 0 or failures > 0 or strikes > 0) and 'doubt' or 'go', taken[2])
"""

# KEYS: state.
LOOK: Final = f"""{_READ}
if open > at then return reply('open', open - at) end
if hold > at then return reply('hold', hold - at) end
return reply(failures + strikes > 0 and 'doubt' or 'go', 0)
"""

# Answers that were under way together count as one overload.
#
# KEYS: state.  ARGV: what happened, why, seconds of the hold or '', most seconds of one that is guessed.
TELL: Final = f"""{_READ}
if ARGV[1] == 'answered' then
  redis.call('HDEL', KEYS[1], 'open', 'probe', 'failures', 'failed', 'cooldown', 'strikes')
  if hold <= at then redis.call('DEL', KEYS[1]) end
  return
end
if ARGV[1] == 'abandoned' then return redis.call('HDEL', KEYS[1], 'probe') end
redis.call('HSET', KEYS[1], 'why', ARGV[2])
redis.call('EXPIRE', KEYS[1], {int(2 * MAX_HOLD_S)})
if ARGV[1] == 'hold' then
  redis.call('HDEL', KEYS[1], 'open', 'probe', 'failures', 'failed', 'cooldown')
  local seconds = tonumber(ARGV[3])
  if hold <= at then
    seconds = seconds or math.min({FIRST_HOLD_S} * 2 ^ strikes, ARGV[4])
    redis.call('HSET', KEYS[1], 'strikes', strikes + 1)
  end
  if seconds then redis.call('HSET', KEYS[1], 'hold', math.max(hold, at + seconds)) end
  return
end
local seen = redis.call('HMGET', KEYS[1], 'failed', 'cooldown')
if tonumber(seen[1] or 0) < at - {FAILURES_WITHIN_S} and open == 0 then failures = 0 end
redis.call('HSET', KEYS[1], 'failures', failures + 1, 'failed', at)
if open > at or failures + 1 < {FAILURES_TO_OPEN} and open == 0 then return end
local cooldown = open > 0 and math.min(2 * tonumber(seen[2]), {COOLDOWN_S[1]}) or {COOLDOWN_S[0]}
redis.call('HSET', KEYS[1], 'open', at + cooldown, 'cooldown', cooldown, 'probe', 0)
"""


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
        """What is wrong with the server, in words; empty where nothing is."""
        if self.state == "open":
            return f"circuit open after {FAILURES_TO_OPEN} failures in a row, the last: {self.why}"
        return f"on hold: {self.why}" if self.state == "hold" else ""


class Upstream:
    """One server, as one worker process sees it. For one event loop.

    Args:
        store: the broker's Redis.
        server: scheme, host and port.
        model: its id there.
        token: what it is asked with.
        limit: what it allows.
    """

    def __init__(
        self, store: aioredis.Redis, server: str, model: str, token: str | None, limit: RateLimit
    ) -> None:
        self._store = store
        digest = hashlib.sha256("\0".join((server, model, token or "")).encode()).hexdigest()[:16]
        self._key = f"{UPSTREAM_PREFIX}{digest}"
        self._requests = _bucket(f"{digest}:requests", limit.requests_per_minute)
        self._tokens = _bucket(f"{digest}:tokens", limit.tokens_per_minute)
        functions = bucket_functions()
        self._ask, self._look, self._tell = (
            store.register_script(functions + script) for script in (ASK, LOOK, TELL)
        )

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
