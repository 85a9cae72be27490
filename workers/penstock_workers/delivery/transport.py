"""kombu's Redis transport, with deliveries that lose nothing: see docs/understand/delivery.md.

Installed under the names of kombu's own, so URLs, Flower and plain Celery producers go on working.
`leases` looks after a message once it is leased.
"""

import json
import logging
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Final

import kombu.transport
import redis
from celery.signals import task_received
from kombu.transport import redis as kombu_redis
from kombu.transport import virtual
from kombu.utils.json import dumps, object_hook
from redis.exceptions import ResponseError

from penstock.clock import Clock
from penstock.envelope import CONTENT_TYPE, EntryError, open_entry, printable
from penstock.errors import ConfigError, InvalidMessageError
from penstock.keys import PIDBOX_REPLIES_TTL_S, TENANT_SEPARATOR, load_key
from penstock.refusals import OUTAGES, REFUSALS, attentive, in_words, is_for_now
from penstock.request import TENANT
from penstock.scripts import push_arguments, script
from penstock_workers.delivery.dead_letters import OnDead
from penstock_workers.delivery.held import Lease
from penstock_workers.delivery.internals import check_versions
from penstock_workers.delivery.leases import LEASE_RANGE_S, LEASE_S, MAX_DELIVERIES, IsAlive
from penstock_workers.delivery.polling import PolledChannel, Pop, leases_in
from penstock_workers.delivery.process import HOOKS, TokenBudget
from penstock_workers.delivery.purge import OnPurged, purge
from penstock_workers.delivery.qos import QoS

logger = logging.getLogger(__name__)

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
"""Seconds that an idle worker waits to be woken; then it looks for messages that came without a token."""

BYTES_PER_TOKEN: Final = 4
"""Bytes that count as a token if a sender names no cost; the scripts have the same number."""

_MALFORMED = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)

_REPLIES: Final = ".reply.celery.pidbox"

_WAS_ETA = "penstock_eta"  # the header, within a process

_OPTIONS = ("lease_s", "max_deliveries")


class RefusedError(Exception):
    """Raised by a consumer's callback: the message becomes a dead letter, and its sender has been told."""


def install(
    *,
    is_alive: IsAlive | None = None,
    on_dead: OnDead | None = None,
    token_budget: TokenBudget | None = None,
    clock: Clock | None = None,
    on_purged: OnPurged | None = None,
) -> None:
    """Take the place of kombu's Redis transports, under their own names.

    Args:
        is_alive: Leases are renewed, and jobs taken, while it says yes; it must not wait.
        on_dead: Is called with each message that was given up, and how often it was delivered; again if
            the process died during the call.
        token_budget: Tells how many tokens of a queue's jobs this process may hold, apart from two jobs
            that it may hold in any case; None where only their number is bounded. It must not wait.
        clock: Is told the broker's time.
        on_purged: Is called with id and `reply_to` of jobs that were purged, some at a time.

    Raises:
        ConfigError: this version of kombu or Celery changed something that is relied on here.
    """
    check_versions()
    for scheme, name in (("redis", "Transport"), ("rediss", "Transport"), ("sentinel", "SentinelTransport")):
        kombu.transport.TRANSPORT_ALIASES[scheme] = f"{__name__}:{name}"
        kombu.transport._transport_cache.pop(scheme, None)  # whoever asked before us got kombu's own
    HOOKS.is_alive, HOOKS.on_dead, HOOKS.token_budget, HOOKS.clock = is_alive, on_dead, token_budget, clock
    HOOKS.on_purged = on_purged


def _show_eta(request: Any, **_arguments: object) -> None:
    """Let the task see when it was due; Celery itself, which would wait for it, has looked before."""
    if (eta := request.request_dict.pop(_WAS_ETA, None)) is not None:
        request.request_dict["eta"] = eta


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


class Message(virtual.Message):  # type: ignore[misc]  # kombu has no types
    """A message whose body is read by one decoder; kombu makes a decoder for each."""

    def _decode(self) -> Any:
        if self.content_type != CONTENT_TYPE or not isinstance(self.body, bytes):
            return super()._decode()
        try:
            return _BODY_DECODER.decode(self.body.decode())
        except (ValueError, RecursionError):
            return super()._decode()  # the same error, told as kombu tells it


class Channel(PolledChannel):
    """A channel of ours: how a message is sent, and how one that was leased is handed to its consumer.

    Attributes:
        lease_s: Life of a lease that is not renewed, seconds.
        max_deliveries: Number of processes that may die with a message.
    """

    QoS, Message = QoS, Message
    from_transport_options = (*kombu_redis.Channel.from_transport_options, *_OPTIONS)

    # Set from broker_transport_options.
    lease_s: float = LEASE_S
    max_deliveries: int = MAX_DELIVERIES

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        _check_options(self)

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
            return purge(client, self.lists([queue]), HOOKS.on_purged)

    def _queue_bind(self, exchange: str, routing_key: str, pattern: str, queue: str) -> None:
        """Bind a queue; a fanout exchange is a channel, so no table keeps the names of killed workers."""
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
            self.takers[queue] = (callback, no_ack)
            if not no_ack:
                self.leases.queues.add(queue)  # starts looking after them
            self.must_look = True

    def _basic_cancel(self, consumer_tag: str) -> None:
        queue = self._tag_to_queue.get(consumer_tag)
        super()._basic_cancel(consumer_tag)
        self.takers.pop(queue, None)
        if not self.takers:
            self.abandon()

    def basic_get(self, queue: str, no_ack: bool = False, **options: Any) -> Any:
        """Take one message now, or None."""
        if no_ack:
            return super().basic_get(queue, no_ack=True, **options)
        token = self.leases.new_token()
        with self.conn_or_acquire() as client:
            pop = client.register_script(script("pop"))
            while found := pop(*self.arguments_of_pop(token, [queue], is_asked_for_one=True)):
                ((lease, raw),) = leases_in(found, token)
                self.leases.held.add(lease)
                message = self._open(lease, raw)
                if message is not None and message.errors:
                    reason = f"refused: {message.errors[0][1].problem}"
                    self.leases.dead_letter(lease.id, raw, reason, must_notify=False)
                elif message is not None:
                    self.qos.append(message, lease.id)
                    return message
        return None

    def close(self) -> None:
        """Close the channel; see `QoS.restore_unacked_once` for what becomes of its messages."""
        if not self.closed:
            self.abandon()
        super().close()

    def take(self, pop: Pop, found: list[tuple[Lease, bytes]]) -> None:
        """Deliver what was popped; whatever stops in between requeues the rest."""
        for lease, _ in found:
            self.leases.held.add(lease)
        ids = [lease.id for lease, _ in found]
        n_done = 0
        try:
            if time.monotonic() - pop.sent_at > self.leases.lease_s / 2:
                self.leases.confirm()  # stopped in between: others may have taken over
            for lease, raw in found:
                n_done += 1
                self._queue_cycle.rotate(lease.queue)
                if lease.id in self.leases.held:
                    self._hand_out(lease, raw)
        finally:
            self.leases.requeue(ids[n_done:], as_next=True)

    def _hand_out(self, lease: Lease, raw: bytes) -> None:
        taker, no_ack = self.takers.get(lease.queue, (None, False))
        if taker is None:  # cancelled in between
            self.leases.requeue([lease.id], as_next=True)
            return
        message = self._open(lease, raw)
        if message is None:
            return
        self.qos.append(message, lease.id)
        if no_ack:
            self.qos.ack(lease.id)
        try:
            taker(message)  # kombu's, which calls `consumer.Consumer.create_task_handler`'s
        except (redis.RedisError, OSError):
            self.qos.reject(lease.id, requeue=True)
            raise
        except (RefusedError, InvalidMessageError) as error:
            problem = error.problem if isinstance(error, InvalidMessageError) else str(error)
            self._dead_letter(lease, raw, f"refused: {problem}", must_notify=False)
        except _MALFORMED as error:
            # Celery's own would end the worker, and the next one that gets it.
            logger.exception("message refused", extra={"tag": printable(lease.tag)})
            self._dead_letter(lease, raw, f"refused: {type(error).__name__}", must_notify=True)

    def _dead_letter(self, lease: Lease, raw: bytes, reason: str, *, must_notify: bool) -> None:
        self.qos.forget(lease.id)
        self.leases.dead_letter(lease.id, raw, reason, must_notify=must_notify)

    def _open(self, lease: Lease, raw: bytes) -> Any:
        """Return kombu's message; None if it is none, or not due yet.

        A message that is refused, and whose sender is known, holds nothing but its id, its reply channel and
        an error in kombu's own `errors`: with that the consumer's `on_decode_error` is called.
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
                self.leases.delay(lease.id, due_at)
                return None
            # Due by Redis's clock; a worker with a slow clock would hold it for longer.
            message.headers |= {"eta": None, _WAS_ETA: headers["eta"]}
            # Not before a message has one: a signal with a receiver costs every task 3 % of the event loop.
            task_received.connect(_show_eta, weak=False, dispatch_uid=_WAS_ETA)
        return message

    def _refused(self, lease: Lease, raw: bytes, refusal: EntryError) -> Any:
        """Dead-letter an entry that is no message or names no sender; return a stand-in for others."""
        if refusal.sender is None:
            logger.error(
                "queue entry refused: %s",
                refusal.problem,
                extra={"queue": printable(lease.queue), "n_bytes": len(raw)},
            )
            reason = f"refused: {refusal.problem}" if refusal.is_message else "not a message"
            self.leases.dead_letter(lease.id, raw, reason, must_notify=False)
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


def _check_options(channel: Channel) -> None:
    options = channel.connection.client.transport_options
    problems = [f"transport option {name}: {why}" for name, why in REPLACED.items() if name in options]
    low_s, high_s = LEASE_RANGE_S
    if not low_s <= channel.lease_s <= high_s:
        problems.append(f"lease_s is {channel.lease_s:g}; {low_s:g} to {high_s:g} s are allowed")
    if not 1 <= channel.max_deliveries <= 100:
        problems.append(f"max_deliveries is {channel.max_deliveries}; 1 to 100 are allowed")
    if problems:
        raise ConfigError(problems)
