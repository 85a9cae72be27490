"""Leases: a process' right to the messages it took, renewed while it works and taken over when it dies.

Knows Redis and the scripts of `penstock.scripts`; must not know Celery or kombu.
"""

import atexit
import base64
import json
import logging
import secrets
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from queue import SimpleQueue
from typing import Any, Final

import redis
from redis.commands.core import Script

from penstock.bucket import RETRIES
from penstock.clock import Clock
from penstock.envelope import is_clean, printable
from penstock.identity import process_name
from penstock.keys import DEAD_KEY, UNTOLD_KEY
from penstock.refusals import in_words
from penstock.scripts import Value, script
from penstock_workers.background import Background

logger = logging.getLogger(__name__)

LEASE_S: Final = 20.0
LEASE_RANGE_S: Final = (1.0, 300.0)
MAX_DELIVERIES: Final = 4

SHARE: Final = 2
"""One pop takes half of a list at most: of a few large jobs sent together, others have their part."""

FEWEST_JOBS: Final = 2
"""A process may hold so many of a queue, whatever they cost: one is computed, and the next is at hand."""

RECOUNT_S: Final = 30.0
"""How often what a queue's jobs cost is counted anew: senders may write there too."""

SETTLE_S: Final = 5.0
"""How long a process that ends waits for Redis; after that its leases run out."""

_SCRIPTS: Final = (
    *(
        "ack",
        "bury",
        "claim_untold",
        "fail",
        "hand_back",
        "move_due",
        "nudge",
        "postpone",
        "reclaim",
        "recount",
    ),
    *("renew", "retry", "take_over"),
)
_BATCH: Final = 200
_MOVE_S: Final = 0.5  # how late a delayed message is at most, when a sender adds one that is due first
_BACKOFF_S: Final = (0.05, 1.0)

IsAlive = Callable[[], bool]
Room = Callable[[str], float | None]
OnDead = Callable[[Mapping[str, Any], int], None]
OnPurged = Callable[[Sequence[tuple[str, str]]], None]


def purge(client: redis.Redis, lists: Sequence[str], on_purged: OnPurged | None = None) -> int:
    """Drop what waits in the lists of a queue; returns how many messages.

    Args:
        client: of the broker.
        lists: of all levels; those of tenants belong to them.
        on_purged: called with id and `reply_to`, or nothing, of the jobs that were dropped, some at a time.
    """
    drop, n_dropped, is_left = client.register_script(script("purge")), 0, 1
    while is_left:
        n, is_left, *fields = drop(keys=lists, args=[_BATCH])
        n_dropped += n
        texts = [field.decode(errors="replace") for field in fields]
        jobs = list(zip(texts[::2], texts[1::2], strict=True))
        if on_purged is not None and jobs:
            on_purged([job for job in jobs if is_clean(job[0])])
    return n_dropped


def pop_arguments(
    token: str,
    *,
    lease_s: float,
    most: int,
    credits_: Sequence[int],
    rooms: Sequence[float | None],
    held: Sequence[tuple[int, int]],
    n_suspects: int = 1,
    suspect_at: int = MAX_DELIVERIES - 2,
    share: int = SHARE,
) -> list[Value]:
    """Return arguments of the script `pop`; its keys are the lists, level by level.

    Args:
        token: names this pop.
        lease_s: how long the leases last.
        most: messages.
        credits_: how many more messages of each queue.
        rooms: how many tokens of each queue the process may hold; None for any.
        held: messages of each list, and their tokens, that it holds already.
        n_suspects: how many more of these.
        suspect_at: lost leases that make one.
        share: 2 to leave half of a list to others, else 1.
    """
    return [
        *(token, lease_s, most, n_suspects, suspect_at, share, FEWEST_JOBS),
        *credits_,
        *("" if room is None else room for room in rooms),
        *(count for counts in held for count in counts),
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """The right to one message.

    Attributes:
        tag: its name in Redis; bytes that are no UTF-8 are surrogates.
        token: of the pop that took it.
        queue: where it waited, without the priority.
        level: its priority there, as kombu numbers them; lower goes first.
        tokens: what it costs.
        n_lost: leases on it that ran out before; None on its first delivery.
        n_tries: how often a worker put it off, to be tried again.
    """

    tag: str
    token: str
    queue: str
    level: int
    tokens: int
    n_lost: int | None
    n_tries: int = 0

    @property
    def key(self) -> bytes:
        """The tag as Redis has it: whatever bytes a sender chose."""
        return self.tag.encode(errors="surrogateescape")

    @property
    def id(self) -> str:
        """What tells this delivery from all others, also of the same message to the same process."""
        return f"{self.tag}@{self.token}"


class Leases:
    """All leases of this process on one broker, and the thread that looks after them.

    The thread acknowledges in batches, renews, moves delayed messages that are due, and takes over from
    processes that died. It outlives connections: what could not be done while Redis was away is done later.
    All methods may be called from any thread; none of them waits for Redis unless it says so.

    Attributes:
        process: token of this process.
        lease_s: how long a lease lasts without being renewed, seconds.
        clock: of the broker.
        is_healthy: whether `is_alive` said yes when it was last asked.
        queues: that this process takes messages from, or did.
        suspect_at: a message with so many lost leases is a suspect: two more, and it is given up.
    """

    def __init__(
        self,
        client: redis.Redis,
        *,
        lease_s: float = LEASE_S,
        max_deliveries: int = MAX_DELIVERIES,
        is_alive: IsAlive | None = None,
        on_dead: OnDead | None = None,
        clock: Clock | None = None,
        queue_of: Callable[[str], str] = str,
    ) -> None:
        self.process = f"{process_name()}:{secrets.token_hex(4)}"  # of one process and one broker
        self.lease_s = lease_s
        self.clock = clock or Clock()
        self.is_healthy = True
        self.queues: set[str] = set()
        self._client, self._max_deliveries = client, max_deliveries
        self._is_alive, self._on_dead, self._queue_of = is_alive, on_dead, queue_of
        self._scripts: dict[str, Script] = {name: client.register_script(script(name)) for name in _SCRIPTS}
        self._lock = threading.Lock()
        self._settled = threading.Condition(self._lock)
        self._n_tokens = 0
        self._held: dict[str, Lease] = {}
        self._n_held: Counter[str] = Counter()
        self._n_of: Counter[tuple[str, int]] = Counter()
        self._tokens_of: Counter[tuple[str, int]] = Counter()
        self.suspect_at = max(1, max_deliveries - 2)
        self._n_suspects = 0
        self._is_away, self._patience_s = False, SETTLE_S
        self._acks: dict[str, Lease] = {}
        self._chores: deque[tuple[str, Sequence[str], Sequence[Value]]] = deque()
        self._to_tell: SimpleQueue[bytes | None] = SimpleQueue()
        self._wake, self._closing = threading.Event(), threading.Event()
        self._backoff_s = 0.0
        # What is done now and then: when it is due, on this process' monotonic clock.
        self._duties: dict[Callable[[], float], float] = dict.fromkeys(
            (self._renew, self._take_over, self._move_due, self._claim_untold, self._recount), 0.0
        )
        self._thread = Background("leases", self._look_after)
        self._teller = Background("dead-letters", self._tell)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()
        if self._on_dead is not None:
            self._teller.start()
        atexit.register(self.close)

    def close(self) -> None:
        """Hand back what is held and stop; waits for Redis, `SETTLE_S` at most."""
        # A fork has a copy of this, of leases that are its parent's.
        if self._thread.is_alive() and not self._closing.is_set():
            self.hand_back_all()
            self._closing.set()
            self._thread.end()
            self._teller.end()
            self._wake.set()
            self._to_tell.put(None)
            self._thread.join(1.0)
            atexit.unregister(self.close)
            self._client.close()

    def new_token(self) -> str:
        """Return the token of the next pop."""
        with self._lock:
            self._n_tokens += 1
            return f"{self.process}/{self._n_tokens}"

    def n_held(self, queue: str) -> int:
        """Count the messages of a queue that are held and not acknowledged."""
        return self._n_held[queue]

    def held(self, queue: str, level: int) -> tuple[int, int]:
        """Count the messages of one level of a queue that are held, and their tokens."""
        return self._n_of[queue, level], self._tokens_of[queue, level]

    def n_suspects(self) -> int:
        """Count the suspects that are held; a process takes one at a time."""
        return self._n_suspects

    def is_suspect(self, lease: Lease) -> bool:
        """Whether so many holders of a message have died that it may be why."""
        return (lease.n_lost or 0) >= self.suspect_at

    def holds(self, lease_id: str) -> bool:
        """Say whether the lease is held, as far as this process knows."""
        return lease_id in self._held

    def hold(self, lease: Lease) -> None:
        """Renew the lease from now on."""
        with self._lock:
            self._held[lease.id] = lease
            self._count(lease, 1)

    def ack(self, lease_id: str) -> Lease | None:
        """Acknowledge; the lease is renewed until Redis knows. Returns None if it is not held."""
        with self._lock:
            if (lease := self._release(lease_id)) is not None:
                self._acks[lease_id] = lease
        self._wake.set()
        return lease

    def hand_back(self, lease_ids: Iterable[str], *, as_next: bool) -> list[Lease]:
        """Put messages back into their queues, without counting a delivery.

        Args:
            lease_ids: in the order they were taken.
            as_next: they are the next that are taken from their queues, else the last.
        """
        with self._lock:
            leases = [lease for lease_id in lease_ids if (lease := self._release(lease_id)) is not None]
        # The first that was taken goes back last, and so is the next one again.
        ordered = leases[::-1] if as_next else leases
        for start in range(0, len(ordered), _BATCH):
            self._do("hand_back", int(as_next), *_pairs(ordered[start : start + _BATCH]))
        return leases

    def fail(self, lease_id: str) -> Lease | None:
        """Put a message back that its worker failed on: it counts as lost, and is given up as those are."""
        with self._lock:
            lease = self._release(lease_id)
        if lease is not None:
            self._do("fail", lease.key, lease.token, self._max_deliveries)
        return lease

    def hand_back_all(self) -> None:
        """Put back all that is held, for a process that stops; waits once for Redis, `SETTLE_S` at most."""
        self.hand_back(list(self._held), as_next=True)
        if not self.settle(self._patience_s) and self._patience_s:
            self._patience_s = 0.0
            logger.warning(
                "broker out of reach: what is held is delivered again when its leases have run out"
            )

    def bury(self, lease_id: str, message: bytes, reason: str, *, must_tell: bool) -> Lease | None:
        """Move a message to the dead-letter list.

        Args:
            lease_id: the lease on it.
            message: the message itself.
            reason: why, in a few words without its content.
            must_tell: `on_dead` is called for it, here or in another process.
        """
        with self._lock:
            lease = self._release(lease_id)
        if lease is not None:
            n_deliveries = (lease.n_lost or 0) + lease.n_tries + 1
            entry = dead_letter(message, queue=lease.queue, reason=reason, n_deliveries=n_deliveries)
            self._do("bury", lease.key, lease.token, entry, int(must_tell), 2 * self.lease_s)
        return lease

    def postpone(self, lease_id: str, due_at: float) -> Lease | None:
        """Put a message that was taken too early among the delayed ones."""
        with self._lock:
            lease = self._release(lease_id)
        if lease is not None:
            self._do("postpone", lease.key, lease.token, due_at)
        return lease

    def retry(self, lease_id: str, pause_s: float) -> Lease | None:
        """Put a message off until it is worth another try, at the rate that all of a broker share."""
        with self._lock:
            lease = self._release(lease_id)
        if lease is not None:
            bucket = (RETRIES.rate, RETRIES.burst)
            self._do("retry", lease.key, lease.token, pause_s, *bucket, keys=(RETRIES.key,))
        return lease

    def reclaim(self, token: str) -> None:
        """Put back what a pop took whose reply never arrived."""
        self._do("reclaim", token)

    def nudge(self) -> None:
        """Wake this process' wait for messages."""
        self._do("nudge", self.process)

    def confirm(self) -> None:
        """Ask Redis which leases are still ours, and forget the others; waits for Redis.

        For a process that may have been stopped for longer than a lease.

        Raises:
            redis.RedisError: it could not be asked.
        """
        with self._lock:
            leases = [*self._held.values(), *self._acks.values()]
        for start in range(0, len(leases), _BATCH):
            batch = leases[start : start + _BATCH]
            theirs = set(self._call("renew", self.lease_s, *_pairs(batch)))
            self._forget(lease for lease in batch if lease.key in theirs)

    def settle(self, within_s: float = SETTLE_S) -> bool:
        """Wait until Redis knows of everything that was asked for; False if it does not in time."""
        self._wake.set()
        with self._settled:
            return self._settled.wait_for(lambda: not self._acks and not self._chores, within_s)

    def _release(self, lease_id: str) -> Lease | None:
        lease = self._held.pop(lease_id, None)
        if lease is not None:
            self._count(lease, -1)
        return lease

    def _count(self, lease: Lease, n: int) -> None:
        self._n_held[lease.queue] += n
        self._n_of[lease.queue, lease.level] += n
        self._tokens_of[lease.queue, lease.level] += n * lease.tokens
        self._n_suspects += n * self.is_suspect(lease)

    def _forget(self, leases: Iterable[Lease]) -> None:
        for lease in leases:
            with self._lock:
                # Acknowledged meanwhile, by the other thread: then it was ours.
                was_ours = self._release(lease.id) or self._acks.pop(lease.id, None)
            if was_ours:
                logger.warning("lease was taken over by another process", extra={"tag": printable(lease.tag)})

    def _do(self, script: str, *arguments: Value, keys: Sequence[str] = ()) -> None:
        self._chores.append((script, keys, arguments))
        self._wake.set()

    def _call(self, script: str, *arguments: Value, keys: Sequence[str] = ()) -> Any:
        return self._scripts[script](keys=keys, args=arguments)

    def _look_after(self) -> None:
        self._wake.wait(max(0.0, min(self._duties.values()) - time.monotonic()))
        self._wake.clear()
        if self._round():
            self._backoff_s, self._is_away = 0.0, False
        else:
            backoff_s = max(2 * self._backoff_s, _BACKOFF_S[0])
            self._backoff_s = min(backoff_s, _BACKOFF_S[1], self.lease_s / 6)
            self._closing.wait(self._backoff_s)
            self._wake.set()

    def _round(self) -> bool:
        """Do what there is to do; False if some of it failed."""
        is_fine = self._attempt(self._flush) is not None
        for duty, due in list(self._duties.items()):
            if due <= time.monotonic():
                wait_s = self._attempt(duty)
                if wait_s is None:
                    is_fine = False
                else:
                    self._duties[duty] = time.monotonic() + wait_s
        return is_fine

    def _attempt(self, duty: Callable[[], float]) -> float | None:
        try:
            return duty()
        except (redis.RedisError, OSError) as error:
            if not self._is_away:
                self._is_away = True
                logger.warning("broker out of reach: %s", in_words(error))
        except Exception as error:  # noqa: BLE001  the other duties must not wait for this one
            self._thread.failed(error)
        return None

    def _flush(self) -> float:
        while batch := self._some_acks():
            theirs = set(self._call("ack", *_pairs(batch)))
            self._forget(lease for lease in batch if lease.key in theirs)
            with self._settled:
                for lease in batch:
                    self._acks.pop(lease.id, None)
                self._settled.notify_all()
        for _ in range(len(self._chores)):
            script, keys, arguments = self._chores[0]
            try:
                entry = self._call(
                    script, *arguments, keys=keys
                )  # the token is checked there: twice does no harm
            except redis.ResponseError:
                self._chores.rotate(-1)  # refused, perhaps for ever: the others must not wait for it
                raise
            except (redis.DataError, ValueError, TypeError):
                self._chores.popleft()  # it cannot even be sent; the lease runs out
                raise
            if script == "bury" and entry:
                self._buried(entry)
            if script == "fail" and entry:
                source, n_deliveries, message = entry
                reason = f"delivered {n_deliveries} times, each worker failed on it"
                self._give_up(arguments[0], arguments[1], source, message, n_deliveries, reason)
            with self._settled:
                self._chores.popleft()
                self._settled.notify_all()
        return 0.0

    def _some_acks(self) -> list[Lease]:
        with self._lock:
            return list(islice(self._acks.values(), _BATCH))

    def _renew(self) -> float:
        self.is_healthy = self._ask_alive()
        if self.is_healthy:
            self.confirm()
        return self.lease_s / 3

    def _ask_alive(self) -> bool:
        try:
            return self._is_alive is None or self._is_alive()
        except Exception:
            logger.exception("is_alive failed; leases are not renewed")
            return False

    def _take_over(self) -> float:
        token = self.new_token()
        n_lapsed, *found = self._call("take_over", self.lease_s, self._max_deliveries, _BATCH, token)
        for source, tag, n_deliveries, message in _rows(found):
            reason = (
                f"delivered {n_deliveries} times, no worker finished it"
                if source
                else "left behind by another transport"
            )
            self._give_up(tag, token, source, message, n_deliveries, reason)
        return 0.0 if n_lapsed == _BATCH else self.lease_s / 4

    def _give_up(
        self, tag: Value, token: Value, source: bytes, message: bytes, n_deliveries: int, reason: str
    ) -> None:
        queue = self._queue_of(source.decode(errors="replace"))
        entry = dead_letter(message, queue=queue, reason=reason, n_deliveries=n_deliveries)
        self._do("bury", tag, token, entry, int(bool(source)), 2 * self.lease_s)

    def _move_due(self) -> float:
        n_moved, wait_ms = self._call("move_due", _BATCH)
        if n_moved == _BATCH:
            return 0.0
        return min(_MOVE_S, wait_ms / 1000) if wait_ms >= 0 else _MOVE_S

    def _recount(self) -> float:
        if queues := sorted(self.queues):
            self._call("recount", keys=queues)
        return RECOUNT_S

    def _claim_untold(self) -> float:
        if self._on_dead is not None:
            for entry in self._call("claim_untold", 2 * self.lease_s, _BATCH):
                self._to_tell.put(entry)
        return self.lease_s / 2

    def _buried(self, entry: bytes) -> None:
        letter = json.loads(entry)
        fields = {key: letter[key] for key in ("id", "task", "queue", "n_deliveries")}
        logger.error("message moved to %s: %s", DEAD_KEY, letter["reason"], extra={"dead": fields})
        if self._on_dead is not None:
            self._to_tell.put(entry)

    def _tell(self) -> None:
        """Call `on_dead` for one of them, in a thread of its own: renewing must not wait for it."""
        if (entry := self._to_tell.get()) is None:
            return
        try:
            self._tell_of(entry)
        except Exception:
            # The mark stays, so whoever comes by after it lapses tries again.
            logger.exception("telling of a dead letter failed")

    def _tell_of(self, entry: bytes) -> None:
        assert self._on_dead is not None
        # Marked only if its sender must hear, and as long as nobody has told him.
        if self._client.zscore(UNTOLD_KEY, entry) is not None:
            letter = json.loads(entry)
            self._on_dead(_decoded(letter.get("message", "")), letter["n_deliveries"])
            self._client.zrem(UNTOLD_KEY, entry)


def dead_letter(message: bytes, *, queue: str, reason: str, n_deliveries: int) -> str:
    """Return an entry of the dead-letter list, without the time, which Redis adds.

    The message is text under `message`, or under `message_base64` if it is not UTF-8.
    """
    headers = _decoded(message).get("headers")
    headers = headers if isinstance(headers, dict) else {}
    letter = {
        "id": headers.get("id"),
        "task": headers.get("task"),
        "queue": queue,
        "reason": reason,
        "n_deliveries": n_deliveries,
    }
    try:
        letter["message"] = message.decode()
    except UnicodeDecodeError:
        letter["message_base64"] = base64.b64encode(message).decode()
    return json.dumps(letter)


def _decoded(message: bytes | str) -> Mapping[str, Any]:
    try:
        value = json.loads(message)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _pairs(leases: Iterable[Lease]) -> list[Value]:
    return [value for lease in leases for value in (lease.key, lease.token)]


def _rows(flat: Sequence[Any]) -> Iterable[tuple[Any, ...]]:
    """Split what `take_over` returns into its rows of four."""
    return zip(*[iter(flat)] * 4, strict=True)
