"""kombu's Redis transport, with deliveries that lose nothing: see docs/understand/delivery.md.

Installed under the names of kombu's own, so URLs, Flower and plain Celery producers go on working. Knows
kombu; what becomes of a message once it is leased is the matter of `leases`.
"""

import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import version
from queue import Empty
from typing import Any, Final

import kombu.transport
import redis
from celery.signals import task_received
from kombu.transport import redis as kombu_redis
from kombu.transport import virtual
from kombu.utils.encoding import bytes_to_str
from kombu.utils.json import dumps, object_hook
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, ResponseError
from redis.retry import Retry

from penstock.clock import Clock, ticks
from penstock.envelope import CONTENT_TYPE, EntryError, open_entry, printable
from penstock.errors import ConfigError, InvalidMessageError
from penstock.identity import process_token
from penstock.keys import PIDBOX_REPLIES_TTL_S, TENANT_SEPARATOR, WAKE_PREFIX, load_key
from penstock.refusals import OUTAGES, REFUSALS, attentive, in_words, is_for_now
from penstock.request import TENANT
from penstock.scripts import push_arguments, script
from penstock_workers.delivery.leases import (
    FEWEST_JOBS,
    LEASE_RANGE_S,
    LEASE_S,
    MAX_DELIVERIES,
    IsAlive,
    Lease,
    Leases,
    OnDead,
    OnPurged,
    Room,
    pop_arguments,
    purge,
)

logger = logging.getLogger(__name__)

SUPPORTED: Final[Mapping[str, tuple[str, ...]]] = {"kombu": ("5.7.0",), "celery": ("5.7.0",)}
"""Versions whose insides were read and tested; see `test_transport.INTERNALS`."""

_BODY_DECODER: Final = json.JSONDecoder(object_hook=object_hook)

REPLACED: Final[Mapping[str, str]] = {
    "ack_emulation": "every message is leased",
    "global_keyprefix": "take another database of the Redis server",
    "queue_order_strategy": "queues take turns",
    "unacked_index_key": "the name is fixed",
    "unacked_key": "the name is fixed",
    "visibility_timeout": "lease_s takes its place, and is renewed while a job runs",
}
"""Transport options of kombu that have no effect here: naming one is an error, not a surprise."""

WAIT_S: Final = 0.9
"""How long an idle worker waits to be woken; then it looks for what came without a token, every second."""

POP_MOST: Final = 32
"""Messages in one reply: a big batch would keep the event loop from its other work."""

BYTES_PER_TOKEN: Final = 4
"""What a job costs whose sender does not say it; the scripts have the same for what others push."""

_MALFORMED = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)

_REPLIES: Final = ".reply.celery.pidbox"

_WAS_ETA = "penstock_eta"  # the header, within a process

_OPTIONS = ("lease_s", "max_deliveries")


class RefusedError(Exception):
    """Raised by a consumer's callback: the message becomes a dead letter, and its sender has been told."""


@dataclass(slots=True)
class _Hooks:
    is_alive: IsAlive | None = None
    on_dead: OnDead | None = None
    room: Room | None = None
    clock: Clock | None = None
    on_purged: OnPurged | None = None


_hooks = _Hooks()
_leases_of_process: dict[tuple[object, ...], Leases] = {}
_lock = threading.Lock()


def install(
    *,
    is_alive: IsAlive | None = None,
    on_dead: OnDead | None = None,
    room: Room | None = None,
    clock: Clock | None = None,
    on_purged: OnPurged | None = None,
) -> None:
    """Take the place of kombu's Redis transports, under their own names.

    Args:
        is_alive: leases are renewed, and jobs taken, while it says yes; it must not wait.
        on_dead: called with each message that was given up and how often it was delivered. A second call for
            one message is possible, after the process of the first died in it.
        room: given a queue, tells how many tokens of its jobs this process may hold, apart from two jobs
            that it may hold in any case; None where only their number is bounded. It must not wait.
        clock: is told the broker's time.
        on_purged: called with id and `reply_to` of jobs that were purged, some at a time.

    Raises:
        ConfigError: kombu or Celery is of a version that this was not tested with.
    """
    if problems := [
        f"{name} {found}; supported: {', '.join(versions)}"
        for name, versions in SUPPORTED.items()
        if (found := version(name)) not in versions
    ]:
        raise ConfigError(problems)
    for scheme, name in (("redis", "Transport"), ("rediss", "Transport"), ("sentinel", "SentinelTransport")):
        kombu.transport.TRANSPORT_ALIASES[scheme] = f"{__name__}:{name}"
        kombu.transport._transport_cache.pop(scheme, None)  # whoever asked before us got kombu's own
    # No transport options: those are sent to whoever runs `celery inspect stats`.
    _hooks.is_alive, _hooks.on_dead, _hooks.room, _hooks.clock = is_alive, on_dead, room, clock
    _hooks.on_purged = on_purged


def _show_eta(request: Any, **_arguments: object) -> None:
    """Let the task see when it was due; Celery itself, which would wait for it, has looked before."""
    if (eta := request.request_dict.pop(_WAS_ETA, None)) is not None:
        request.request_dict["eta"] = eta


def is_stopping() -> bool:
    """Say whether this process is a Celery worker that was told to stop."""
    state = sys.modules.get("celery.worker.state")
    flags = (state.should_stop, state.should_terminate) if state is not None else ()
    # 0 is an exit code, and a reason to stop; it equals False, but it is not.
    return any(flag is not None and flag is not False for flag in flags)


def due_time(headers: object) -> float | None:
    """Return when a message is due, Unix seconds; None for at once or if its `eta` cannot be read."""
    eta = headers.get("eta") if isinstance(headers, dict) else None
    if not isinstance(eta, str):
        return None
    try:
        moment = datetime.fromisoformat(eta)
    except ValueError:
        return None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


@dataclass(frozen=True, slots=True)
class _Pop:
    """A pop that was sent; its reply is at most `POP_MOST` messages."""

    token: str
    sent_at: float


@dataclass(frozen=True, slots=True)
class _Wait:
    """A wait for a token that was sent, and the lists with room in this process that it waits for."""

    lists: frozenset[str]


class QoS(virtual.QoS):  # type: ignore[misc]  # kombu has no types
    """How much of each queue may be held, and what becomes of it.

    `prefetch_count` counts for each queue by itself, so jobs of one model leave the places of another alone.
    Where the process tells its `room`, tokens count too: what it cannot compute soon is left to others. Less
    urgent jobs that are held take no room from urgent ones, which would wait for them otherwise.
    Counted are the leases of the process, not those of a channel: jobs outlive connections.
    """

    channel: "Channel"

    def can_consume(self) -> bool:
        """Say whether some queue has a free place."""
        channel = self.channel
        if not channel.is_leasing or isinstance(channel.flight, _Pop):
            return True  # what was popped must be read: nobody renews it before
        if not channel.leases.is_healthy:
            return False
        return any(self.credit(queue) > 0 for queue in channel.active_queues)

    def can_consume_max_estimate(self) -> int:
        """Count the free places of all queues."""
        return sum(self.credit(queue) for queue in self.channel.active_queues)

    def credit(self, queue: str) -> int:
        """Count the free places of a queue."""
        if not self.prefetch_count:
            return POP_MOST
        return max(0, int(self.prefetch_count) - self.channel.leases.n_held(queue))

    def most_tokens(self, queue: str) -> float | None:
        """Return how many tokens of a queue may be held."""
        return None if _hooks.room is None else _hooks.room(queue)

    def open_lists(self, queues: list[str]) -> list[str]:
        """Return the lists that more may be taken from, the most urgent first; as the script `pop` does."""
        channel, found = self.channel, []
        open_queues = {queue: self.most_tokens(queue) for queue in queues if self.credit(queue)}
        held = dict.fromkeys(open_queues, (0, 0))
        for level in channel.priority_steps:
            for queue, most in open_queues.items():
                n, tokens = map(sum, zip(held[queue], channel.leases.held(queue, level), strict=True))
                held[queue] = n, tokens
                if most is None or n < FEWEST_JOBS or tokens < most:
                    found.append(channel._q_for_pri(queue, level))
        return found

    def append(self, message: Any, delivery_tag: str) -> None:
        """Keep a message that was leased already."""
        self._delivered[delivery_tag] = message

    def forget(self, delivery_tag: str) -> None:
        """Keep it no longer; what becomes of its lease is the caller's matter."""
        self._delivered.pop(delivery_tag, None)

    def ack(self, delivery_tag: str) -> None:
        """Acknowledge, if the lease is still held; from any thread."""
        if self._delivered.pop(delivery_tag, None) is not None:
            self.channel.freed(self.channel.leases.ack(delivery_tag))

    def retry(self, delivery_tag: str, pause_s: float) -> None:
        """Put a message off until it is worth another try; from any thread."""
        if self._delivered.pop(delivery_tag, None) is not None:
            self.channel.freed(self.channel.leases.retry(delivery_tag, pause_s))

    def fail(self, delivery_tag: str) -> None:
        """Put a message back that this process failed on, as often as is allowed; from any thread."""
        if self._delivered.pop(delivery_tag, None) is not None:
            self.channel.freed(self.channel.leases.fail(delivery_tag))

    def bury(self, message: Any, reason: str) -> None:
        """Move a message, whose sender has been told, to the dead letters; from any thread."""
        if self._delivered.pop(message.delivery_tag, None) is not None:
            envelope = message.serializable()
            envelope["headers"]["retries"] = 0  # whoever puts it back wants all of them
            if isinstance(envelope["body"], bytes):  # JSON, as it came; kombu would write an object
                envelope["body"] = envelope["body"].decode()
            envelope["properties"] |= {"delivery_tag": message.delivery_tag.rpartition("@")[0]}
            raw = dumps(envelope).encode()
            self.channel.freed(self.channel.leases.bury(message.delivery_tag, raw, reason, must_tell=False))

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        """Drop a message, or put it at the end of its queue; at the front if this process stops."""
        if not requeue:
            self.ack(delivery_tag)
        elif self._delivered.pop(delivery_tag, None) is not None:
            for lease in self.channel.leases.hand_back([delivery_tag], as_next=is_stopping()):
                self.channel.freed(lease)

    def restore_unacked(self) -> None:
        """Put all that this channel took back to the front of its queues."""
        delivered = list(self._delivered)
        self._delivered.clear()
        self.channel.leases.hand_back(delivered, as_next=True)

    def restore_unacked_once(self, stderr: object = None) -> None:
        """Put back what is held, unless it is a worker's connection that is lost.

        Those come and go: what runs goes on running, and is acknowledged through the next one.
        """
        del stderr
        self._on_collect.cancel()
        if not self.channel.has_leased:
            return
        if is_stopping():
            self.channel.leases.hand_back_all()
        elif "celery.worker.state" not in sys.modules:
            self.restore_unacked()
            self.channel.leases.settle()

    def restore_visible(self, *args: object, **options: object) -> None:
        """Do nothing: leases that ran out are taken over by `Leases`."""


class Message(virtual.Message):  # type: ignore[misc]  # kombu has no types
    """A message whose body is read by one decoder; kombu makes a decoder for each."""

    def _decode(self) -> Any:
        if self.content_type != CONTENT_TYPE or not isinstance(self.body, bytes):
            return super()._decode()
        try:
            return _BODY_DECODER.decode(self.body.decode())
        except (ValueError, RecursionError):
            return super()._decode()  # the same error, told as kombu tells it


class Channel(kombu_redis.Channel):  # type: ignore[misc]  # kombu has no types
    """A channel whose messages are leased in the step that pops them.

    The connection that kombu polls carries one command at a time: a pop, which answers at once, or, when a
    pop found nothing, a wait for a token. No command that blocks takes a message.

    Attributes:
        flight: what was sent on that connection and not yet answered.
        has_leased: whether a queue was ever consumed here with acknowledgements.
    """

    QoS, Message = QoS, Message
    from_transport_options = (*kombu_redis.Channel.from_transport_options, *_OPTIONS)

    # Set from broker_transport_options.
    lease_s: float = LEASE_S
    max_deliveries: int = MAX_DELIVERIES

    def __init__(self, *args: Any, **options: Any) -> None:
        self.flight: _Pop | _Wait | None = None
        self.has_leased = False
        self._takers: dict[str, tuple[Callable[[Any], object], bool]] = {}
        self._must_look, self._pop_sha = True, ""
        super().__init__(*args, **options)
        self._check_options()

    @property
    def is_leasing(self) -> bool:
        """Whether a queue is consumed with acknowledgements; replies to `celery inspect` are not."""
        return any(not no_ack for _, no_ack in self._takers.values())

    @property
    def broker(self) -> tuple[object, ...]:
        """What tells the broker from others."""
        client = self.connection.client
        return client.hostname, client.port, *client.alt

    @cached_property
    def leases(self) -> Leases:
        """The leases of this process."""
        self.has_leased = True
        return _leases_for(self)

    def freed(self, lease: Lease | None) -> None:
        """Look again if there is room now that the wait under way is not for."""
        flight = self.flight
        if not lease or not isinstance(flight, _Wait):
            return
        if self.leases.is_suspect(lease) or not flight.lists.issuperset(self.qos.open_lists([lease.queue])):
            self.leases.nudge()

    def _connparams(self, asynchronous: bool = False) -> dict[str, Any]:
        """Return how to connect: a worker waits for a server that refuses, whatever it was asked."""
        params: dict[str, Any] = super()._connparams(asynchronous)
        kind = params["connection_class"]
        return params | {"connection_class": attentive(kind, waits_for=OUTAGES | REFUSALS)}

    def maybe_refresh_binding_expiry(self) -> None:
        """Keep tables of bindings alive, when that can be done: kombu logs a traceback each second."""
        try:
            super().maybe_refresh_binding_expiry()
        except ResponseError as error:  # of a transaction, whose answers are looked at one by one
            if not is_for_now(error):
                raise
            raise redis.ConnectionError(in_words(error)) from error

    # Sending

    def _put(self, queue: str, message: dict[str, Any], **options: Any) -> None:
        key = self._q_for_pri(queue, self._get_message_priority(message, reverse=False))
        tenant = message.get("headers", {}).get("tenant")
        if isinstance(tenant, str) and TENANT.fullmatch(tenant):
            key += TENANT_SEPARATOR + tenant
        if "task" in message.get("headers", {}):  # a job, not a reply to `celery inspect`
            message["properties"].setdefault("cost", max(1, len(message["body"]) // BYTES_PER_TOKEN))
        keys, arguments = push_arguments(key, dumps(message), due_at=due_time(message.get("headers")))
        batch = options.get("_publish_batch")
        if batch is not None:
            batch.add("eval", script("push"), len(keys), *keys, *arguments)
            return
        with self.conn_or_acquire() as client:
            client.register_script(script("push"))(keys=keys, args=arguments)
            self._maybe_update_queues_expire(client, queue)
            if queue.endswith(_REPLIES):
                client.pexpire(key, 1000 * PIDBOX_REPLIES_TTL_S)  # whoever asked may be gone

    def _size(self, queue: str) -> int:
        """Count what waits, tenants' messages too."""
        fields = [f"{level}+" for level in self.priority_steps]
        with self.conn_or_acquire() as client:
            sums = client.hmget(load_key(queue), fields)
        return int(super()._size(queue)) + sum(int(text.split()[0]) for text in sums if text)

    def _has_queue(self, queue: str, **options: Any) -> bool:
        """Say whether something waits, be it of tenants alone."""
        return bool(super()._has_queue(queue, **options)) or self._size(queue) > 0

    def _purge(self, queue: str) -> int:
        """Drop what waits, tenants' messages too, and tell their callers; returns how many."""
        with self.conn_or_acquire() as client:
            return purge(client, self._lists([queue]), _hooks.on_purged)

    def _queue_bind(self, exchange: str, routing_key: str, pattern: str, queue: str) -> None:
        """Bind a queue; a fanout exchange is a channel, and needs no table that keeps all who were killed."""
        if self.typeof(exchange).type == "fanout":
            self._fanout_queues[queue] = (exchange, routing_key.replace("#", "*"))
        else:
            super()._queue_bind(exchange, routing_key, pattern, queue)

    def _refresh_bindings(self, queues: list[str]) -> None:
        super()._refresh_bindings([queue for queue in queues if queue not in self._fanout_queues])

    # Taking

    def basic_consume(
        self, queue: str, no_ack: bool, callback: Callable[[Any], object], consumer_tag: str, **options: Any
    ) -> None:
        """Consume from a queue."""
        super().basic_consume(queue, no_ack, callback, consumer_tag, **options)
        if queue not in self.active_fanout_queues:
            self._takers[queue] = (callback, no_ack)
            if not no_ack:
                self.leases.queues.add(queue)  # starts looking after them
            self._must_look = True

    def _basic_cancel(self, consumer_tag: str) -> None:
        queue = self._tag_to_queue.get(consumer_tag)
        super()._basic_cancel(consumer_tag)
        self._takers.pop(queue, None)
        if not self._takers:
            self._land()

    def basic_get(self, queue: str, no_ack: bool = False, **options: Any) -> Any:
        """Take one message now, or None."""
        if no_ack:
            return super().basic_get(queue, no_ack=True, **options)
        token = self.leases.new_token()
        with self.conn_or_acquire() as client:
            pop = client.register_script(script("pop"))
            while found := pop(*self._pop_arguments(token, [queue], is_asked_for_one=True)):
                ((lease, raw),) = self._leases_in(found, token)
                self.leases.hold(lease)
                message = self._open(lease, raw)
                if message is not None and message.errors:
                    reason = f"refused: {message.errors[0][1].problem}"
                    self.leases.bury(lease.id, raw, reason, must_tell=False)
                elif message is not None:
                    self.qos.append(message, lease.id)
                    return message
        return None

    def _brpop_start(self, timeout: float | None = None) -> None:
        if not self.is_leasing:
            super()._brpop_start(timeout)
            return
        queues = self._queue_cycle.consume(len(self.active_queues))
        if not queues:
            return
        connection = self.client.connection
        if self._must_look:
            self._load_pop()
            self.flight = _Pop(self.leases.new_token(), time.monotonic())
            keys, arguments = self._pop_arguments(self.flight.token, queues)
            command = ["EVALSHA", self._pop_sha, len(keys), *keys, *arguments]
        else:
            open_lists = self.qos.open_lists(queues)
            self.flight = _Wait(frozenset(open_lists))
            wakes = [self.leases.process, *open_lists]
            command = ["BRPOP", *(WAKE_PREFIX + name for name in wakes), timeout or self.brpop_timeout]
        self._in_poll, self._brpop_sent_at = connection, time.monotonic()
        connection.send_command(*command)
        # What became free since then would be missed for as long as the wait lasts.
        if isinstance(self.flight, _Wait) and not self.flight.lists.issuperset(self.qos.open_lists(queues)):
            self.leases.nudge()

    def _brpop_read(self, **options: Any) -> bool:
        flight, self.flight = self.flight, None
        if flight is None:
            return bool(super()._brpop_read(**options))
        self._must_look = True
        reply = self._read_reply(flight, **options)
        if isinstance(flight, _Wait):
            raise Empty
        if not reply:
            self._must_look = False
            raise Empty
        self._take(flight, reply)
        return True

    def _read_reply(self, flight: _Pop | _Wait, **options: Any) -> Any:
        connection = self.client.connection
        command = "EVALSHA" if isinstance(flight, _Pop) else "BRPOP"
        try:
            return self.client.parse_response(connection, command, **options)
        except NoScriptError:  # the server was restarted, or told to forget its scripts
            self._pop_sha = ""
            raise Empty from None
        except ResponseError as error:
            self._lose(connection, flight)
            # A replica, a full disk, a missing right: an answer like this must not end the worker.
            raise redis.ConnectionError(str(error)) from error
        except self.connection_errors:
            self._lose(connection, flight)
            raise
        finally:
            self._in_poll = None
            self._flush_brpop_reauth()

    def _lose(self, connection: Any, flight: _Pop | _Wait | None) -> None:
        if isinstance(flight, _Pop):
            self.leases.reclaim(flight.token)
        connection.disconnect()

    def _on_connection_disconnect(self, connection: Any) -> None:
        flight = self.flight
        if self._in_poll is connection and isinstance(flight, _Pop):
            self.leases.reclaim(flight.token)
        if self._in_poll is connection:
            self.flight = None
        super()._on_connection_disconnect(connection)

    def _land(self) -> None:
        """Read what was popped and put it back; forget a wait."""
        flight, self.flight = self.flight, None
        if flight is None:
            return
        if isinstance(flight, _Wait):
            self._in_poll = None
            self.client.connection.disconnect()
            return
        try:
            found = self._leases_in(self._read_reply(flight), flight.token)
        except (Empty, *self.connection_errors):
            return
        for lease, _ in found:
            self.leases.hold(lease)
        self.leases.hand_back([lease.id for lease, _ in found], as_next=True)

    def close(self) -> None:
        """Close the channel; see `QoS.restore_unacked_once` for what becomes of its messages."""
        if not self.closed:
            self._land()
        super().close()

    def _take(self, flight: _Pop, reply: list[Any]) -> None:
        """Deliver what was popped; whatever stops in between puts the rest back."""
        found = self._leases_in(reply, flight.token)
        for lease, _ in found:
            self.leases.hold(lease)
        ids = [lease.id for lease, _ in found]
        n_done = 0
        try:
            if time.monotonic() - flight.sent_at > self.leases.lease_s / 2:
                self.leases.confirm()  # stopped in between: others may have taken over
            for lease, raw in found:
                n_done += 1
                self._queue_cycle.rotate(lease.queue)
                if self.leases.holds(lease.id):
                    self._hand_out(lease, raw)
        finally:
            self.leases.hand_back(ids[n_done:], as_next=True)

    def _hand_out(self, lease: Lease, raw: bytes) -> None:
        taker, no_ack = self._takers.get(lease.queue, (None, False))
        if taker is None:  # cancelled in between
            self.leases.hand_back([lease.id], as_next=True)
            return
        message = self._open(lease, raw)
        if message is None:
            return
        self.qos.append(message, lease.id)
        if no_ack:
            self.qos.ack(lease.id)
        try:
            taker(message)
        except (redis.RedisError, OSError):
            self.qos.reject(lease.id, requeue=True)
            raise
        except (RefusedError, InvalidMessageError) as error:
            problem = error.problem if isinstance(error, InvalidMessageError) else str(error)
            self._bury(lease, raw, f"refused: {problem}", must_tell=False)
        except _MALFORMED as error:
            # Celery's own would end the worker, and the next one that gets it.
            logger.exception("message refused", extra={"tag": printable(lease.tag)})
            self._bury(lease, raw, f"refused: {type(error).__name__}", must_tell=True)

    def _bury(self, lease: Lease, raw: bytes, reason: str, *, must_tell: bool) -> None:
        self.qos.forget(lease.id)
        self.leases.bury(lease.id, raw, reason, must_tell=must_tell)

    def _open(self, lease: Lease, raw: bytes) -> Any:
        """Return kombu's message; None if it is none, or not due yet.

        One that is refused, and whose sender can be told so, comes with its error in kombu's own `errors`:
        the consumer's `on_decode_error` hears of it, and it holds nothing but id and reply channel.
        """
        try:
            payload = open_entry(raw)
        except EntryError as error:
            return self._refused(lease, raw, error)
        headers, properties = payload["headers"], payload["properties"]
        # Unique to the delivery: an acknowledgement is then of this one, whoever has the message now.
        properties["delivery_tag"] = lease.id
        if lease.n_lost is not None:
            properties["delivery_info"] = {**(properties.get("delivery_info") or {}), "redelivered": True}
        if lease.n_tries:
            headers["retries"] = lease.n_tries  # Celery's own header
        due_at = due_time(headers)
        try:
            message = self.Message(payload, channel=self)
        except _MALFORMED:  # a body that is no base64
            return self._refused(lease, raw, EntryError("not a message", is_message=False))
        if due_at is not None:
            if due_at > self._now():
                self.leases.postpone(lease.id, due_at)
                return None
            # By Redis' clock; the worker's may be slow, and it would hold it.
            message.headers |= {"eta": None, _WAS_ETA: headers["eta"]}
            # Not before there is one: a signal with a receiver costs every task 3 % of the event loop.
            task_received.connect(_show_eta, weak=False, dispatch_uid=_WAS_ETA)
        return message

    def _refused(self, lease: Lease, raw: bytes, refusal: EntryError) -> Any:
        """Bury an entry that is no message, or that nobody can be told of; return a stand-in for others."""
        if refusal.sender is None:
            logger.error(
                "queue entry refused: %s",
                refusal.problem,
                extra={"queue": printable(lease.queue), "n_bytes": len(raw)},
            )
            reason = f"refused: {refusal.problem}" if refusal.is_message else "not a message"
            self.leases.bury(lease.id, raw, reason, must_tell=False)
            return None
        sender = refusal.sender
        payload = {
            "body": "",
            "headers": {"id": sender.job_id},
            "properties": {"delivery_tag": lease.id, "reply_to": sender.reply_to},
        }
        message = self.Message(payload, channel=self)
        error = InvalidMessageError(refusal.problem)
        message.errors.append((InvalidMessageError, error, None))
        return message

    def _now(self) -> float:
        with self.conn_or_acquire() as client:
            second, microsecond = client.time()
        return float(second + microsecond / 1e6)

    # What the scripts are given, and what they return

    def _lists(self, queues: list[str]) -> list[str]:
        return [self._q_for_pri(queue, level) for level in self.priority_steps for queue in queues]

    def _pop_arguments(
        self, token: str, queues: list[str], *, is_asked_for_one: bool = False
    ) -> tuple[list[str], list[Any]]:
        """Return what `pop` is given; who asks for one message by name gets it, whatever is held."""
        leases = self.leases
        return self._lists(queues), pop_arguments(
            token,
            lease_s=leases.lease_s,
            most=1 if is_asked_for_one else POP_MOST,
            credits_=[1 if is_asked_for_one else self.qos.credit(queue) for queue in queues],
            rooms=[None if is_asked_for_one else self.qos.most_tokens(queue) for queue in queues],
            held=[leases.held(queue, level) for level in self.priority_steps for queue in queues],
            n_suspects=max(0, 1 - leases.n_suspects()),
            suspect_at=leases.suspect_at,
        )

    def _leases_in(self, reply: list[Any], token: str) -> list[tuple[Lease, bytes]]:
        rows = zip(*[iter(reply)] * 6, strict=True)
        return [
            (
                Lease(
                    tag=tag.decode(errors="surrogateescape"),
                    token=token,
                    queue=self._queue_of(bytes_to_str(source)),
                    level=self._level_of(bytes_to_str(source)),
                    tokens=n_tokens,
                    n_lost=n_lost if n_lost >= 0 else None,
                    n_tries=n_tries,
                ),
                raw,
            )
            for source, tag, n_lost, n_tries, n_tokens, raw in rows
        ]

    def _queue_of(self, source: str) -> str:
        return source.partition(TENANT_SEPARATOR)[0].rsplit(self.sep, 1)[0]

    def _level_of(self, source: str) -> int:
        _, separator, level = source.partition(TENANT_SEPARATOR)[0].rpartition(self.sep)
        return int(level) if separator and level.isdecimal() else 0

    def _load_pop(self) -> None:
        if not self._pop_sha:
            # The time, before the first job and where another server has taken over: whoever computes the job
            # asks that clock whether it comes too late.
            with self.conn_or_acquire() as client, client.pipeline(transaction=False) as pipe:
                pipe.script_load(script("pop"))
                pipe.time()
                asked_at = ticks()
                self._pop_sha, (second, microsecond) = pipe.execute()
            self.leases.clock.learn(second + microsecond / 1e6, asked_at)

    def _check_options(self) -> None:
        options = self.connection.client.transport_options
        problems = [f"transport option {name}: {why}" for name, why in REPLACED.items() if name in options]
        low_s, high_s = LEASE_RANGE_S
        if not low_s <= self.lease_s <= high_s:
            problems.append(f"lease_s is {self.lease_s:g}; {low_s:g} to {high_s:g} s are allowed")
        if not 1 <= self.max_deliveries <= 100:
            problems.append(f"max_deliveries is {self.max_deliveries}; 1 to 100 are allowed")
        if problems:
            raise ConfigError(problems)


class SentinelChannel(Channel, kombu_redis.SentinelChannel):  # type: ignore[misc]  # kombu has no types
    """A channel to the master that Sentinel names."""

    from_transport_options = (*kombu_redis.SentinelChannel.from_transport_options, *_OPTIONS)

    @property
    def broker(self) -> tuple[object, ...]:
        """The master, whichever of its sentinels this connection names."""
        client = self.connection.client
        return self.master_name, *(sorted(client.alt) or (client.hostname, client.port))


class Transport(kombu_redis.Transport):  # type: ignore[misc]  # kombu has no types
    """What `redis://` and `rediss://` mean once installed."""

    Channel = Channel
    brpop_timeout = WAIT_S


class SentinelTransport(kombu_redis.SentinelTransport):  # type: ignore[misc]  # kombu has no types
    """What `sentinel://` means once installed."""

    Channel = SentinelChannel
    brpop_timeout = WAIT_S


def _leases_for(channel: Any) -> Leases:
    """Return this process' leases on the channel's broker; they stay when the channel closes."""
    # The process: a fork takes over neither leases nor their thread.
    key = (process_token(), channel.connection.client.virtual_host, *channel.broker)
    with _lock:
        if key not in _leases_of_process:
            leases = Leases(
                _client_like(channel),
                lease_s=channel.lease_s,
                max_deliveries=channel.max_deliveries,
                is_alive=_hooks.is_alive,
                on_dead=_hooks.on_dead,
                clock=_hooks.clock,
                queue_of=channel._queue_of,
            )
            leases.start()
            _leases_of_process[key] = leases
        return _leases_of_process[key]


def _client_like(channel: Any) -> redis.Redis:
    """Return a client of the channel's server that does not close with the channel."""
    sentinels = channel._sentinel_manager
    pool = channel._get_pool()
    # Sentinel's channel keeps the last one made, to close it with itself.
    channel._sentinel_manager = sentinels
    limits = dict.fromkeys(("socket_timeout", "socket_connect_timeout"), min(5.0, channel.lease_s / 2))
    known = {name: limit_s for name, limit_s in limits.items() if name in pool.connection_kwargs}
    pool.connection_kwargs.update(known, retry=Retry(NoBackoff(), 0))
    return redis.Redis(connection_pool=pool)
