"""The connection that kombu polls: what was sent on it, and what came back."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from queue import Empty
from typing import Any, Final

import redis
from kombu.transport import redis as kombu_redis
from kombu.utils.encoding import bytes_to_str
from redis.exceptions import NoScriptError, ResponseError

from penstock.clock import ticks
from penstock.keys import WAKE_PREFIX, split_key
from penstock.scripts import Value, script
from penstock_workers.delivery.held import Lease
from penstock_workers.delivery.leases import MAX_DELIVERIES, Leases
from penstock_workers.delivery.process import HOOKS, leases_for

POP_MOST: Final = 32
"""Messages in one reply: a big batch would keep the event loop from its other work."""

SHARE: Final = 2
"""A pop takes at most half of a list, so a few large jobs spread over several workers."""

FEWEST_JOBS: Final = 2
"""A process may always hold this many jobs of a queue: one running, one ready."""


@dataclass(frozen=True, slots=True)
class Pop:
    """A pop that was sent; its reply is at most `POP_MOST` messages."""

    token: str
    sent_at: float


@dataclass(frozen=True, slots=True)
class Wait:
    """A wait for a token that was sent, and the lists that it waits for: this process may take from them."""

    lists: frozenset[str]


class PolledChannel(kombu_redis.Channel):  # type: ignore[misc]  # kombu has no types
    """A channel whose messages are leased in the step that pops them.

    The connection that kombu polls carries one command at a time: a pop, which answers at once, or, when a
    pop found nothing, a wait for a token. No command that blocks takes a message.

    Attributes:
        in_flight: The command on that connection that is not yet answered.
        must_look: True if the next command is a pop, else it is a wait.
        takers: The function that takes each queue's messages, and True if it acknowledges none.
        has_leased: True once a queue was consumed here with acknowledgements.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        self.in_flight: Pop | Wait | None = None
        self.must_look = True
        self.takers: dict[str, tuple[Callable[[Any], object], bool]] = {}
        self.has_leased = False
        self._pop_sha = ""
        super().__init__(*args, **options)

    @property
    def is_leasing(self) -> bool:
        """Whether a queue is consumed with acknowledgements; replies to `celery inspect` are not."""
        return any(not no_ack for _, no_ack in self.takers.values())

    @property
    def broker(self) -> tuple[object, ...]:
        """What tells the broker from others."""
        client = self.connection.client
        return client.hostname, client.port, *client.alt

    @cached_property
    def leases(self) -> Leases:
        """The leases of this process."""
        self.has_leased = True
        return leases_for(self)

    def freed(self, lease: Lease | None) -> None:
        """Look again if a list may be taken from that the wait in flight does not cover."""
        sent = self.in_flight
        if not lease or not isinstance(sent, Wait):
            return
        if self.leases.held.is_suspect(lease) or not sent.lists.issuperset(
            self.qos.open_lists([lease.queue])
        ):
            self.leases.nudge()

    def take(self, pop: Pop, found: list[tuple[Lease, bytes]]) -> None:
        """Deliver what was popped; see `transport.Channel.take`."""
        raise NotImplementedError

    def _brpop_start(self, timeout: float | None = None) -> None:
        if not self.is_leasing:
            super()._brpop_start(timeout)
            return
        queues = self._queue_cycle.consume(len(self.active_queues))
        if not queues:
            return
        connection = self.client.connection
        if self.must_look:
            self._load_pop()
            self.in_flight = Pop(self.leases.new_token(), time.monotonic())
            keys, arguments = self.arguments_of_pop(self.in_flight.token, queues)
            command = ["EVALSHA", self._pop_sha, len(keys), *keys, *arguments]
        else:
            open_lists = self.qos.open_lists(queues)
            self.in_flight = Wait(frozenset(open_lists))
            wakes = [self.leases.process, *open_lists]
            command = ["BRPOP", *(WAKE_PREFIX + name for name in wakes), timeout or self.brpop_timeout]
        self._in_poll, self._brpop_sent_at = connection, time.monotonic()
        connection.send_command(*command)
        # What became free since then would be missed for as long as the wait lasts.
        if isinstance(self.in_flight, Wait) and not self.in_flight.lists.issuperset(
            self.qos.open_lists(queues)
        ):
            self.leases.nudge()

    def _brpop_read(self, **options: Any) -> bool:
        sent, self.in_flight = self.in_flight, None
        if sent is None:
            return bool(super()._brpop_read(**options))
        self.must_look = True
        reply = self._read_reply(sent, **options)
        if isinstance(sent, Wait):
            raise Empty
        if not reply:
            self.must_look = False
            raise Empty
        self.take(sent, leases_in(reply, sent.token))
        return True

    def _read_reply(self, sent: Pop | Wait, **options: Any) -> Any:
        connection = self.client.connection
        command = "EVALSHA" if isinstance(sent, Pop) else "BRPOP"
        try:
            return self.client.parse_response(connection, command, **options)
        except NoScriptError:  # the server was restarted, or told to forget its scripts
            self._pop_sha = ""
            raise Empty from None
        except ResponseError as error:
            self._lose(connection, sent)
            # A replica, a full disk, a missing right: an answer like this must not end the worker.
            raise redis.ConnectionError(str(error)) from error
        except self.connection_errors:
            self._lose(connection, sent)
            raise
        finally:
            self._in_poll = None
            self._flush_brpop_reauth()

    def _lose(self, connection: Any, sent: Pop | Wait | None) -> None:
        if isinstance(sent, Pop):
            self.leases.undo_pop(sent.token)
        connection.disconnect()

    def _on_connection_disconnect(self, connection: Any) -> None:
        sent = self.in_flight
        if self._in_poll is connection and isinstance(sent, Pop):
            self.leases.undo_pop(sent.token)
        if self._in_poll is connection:
            self.in_flight = None
        super()._on_connection_disconnect(connection)

    def abandon(self) -> None:
        """End the command in flight: requeue what a pop took, forget a wait."""
        sent, self.in_flight = self.in_flight, None
        if sent is None:
            return
        if isinstance(sent, Wait):
            self._in_poll = None
            self.client.connection.disconnect()
            return
        try:
            found = leases_in(self._read_reply(sent), sent.token)
        except (Empty, *self.connection_errors):
            return
        for lease, _ in found:
            self.leases.held.add(lease)
        self.leases.requeue([lease.id for lease, _ in found], as_next=True)

    def _load_pop(self) -> None:
        if not self._pop_sha:
            # The time, before the first job and where another server has taken over: whoever computes the job
            # asks that clock whether it comes too late.
            with self.conn_or_acquire() as client, client.pipeline(transaction=False) as pipe:
                pipe.script_load(script("pop"))
                pipe.time()
                asked_at = ticks()
                self._pop_sha, (second, microsecond) = pipe.execute()
            if HOOKS.clock is not None:
                HOOKS.clock.learn(second + microsecond / 1e6, asked_at)

    def lists(self, queues: list[str]) -> list[str]:
        """Return the lists of queues, level by level."""
        return [self._q_for_pri(queue, level) for level in self.priority_steps for queue in queues]

    def arguments_of_pop(
        self, token: str, queues: list[str], *, is_asked_for_one: bool = False
    ) -> tuple[list[str], list[Any]]:
        """Return what `pop` is given; who asks for one message by name gets it, whatever is held."""
        leases = self.leases
        return self.lists(queues), pop_arguments(
            token,
            lease_s=leases.lease_s,
            most=1 if is_asked_for_one else POP_MOST,
            prefetch=[1 if is_asked_for_one else self.qos.prefetch_left(queue) for queue in queues],
            token_budgets=[None if is_asked_for_one else self.qos.token_budget(queue) for queue in queues],
            held=[leases.held.counts(queue, level) for level in self.priority_steps for queue in queues],
            n_suspects=max(0, 1 - leases.held.n_suspects),
            suspect_at=leases.held.suspect_at,
        )


def pop_arguments(
    token: str,
    *,
    lease_s: float,
    most: int,
    prefetch: Sequence[int],
    token_budgets: Sequence[float | None],
    held: Sequence[tuple[int, int]],
    n_suspects: int = 1,
    suspect_at: int = MAX_DELIVERIES - 2,
    share: int = SHARE,
) -> list[Value]:
    """Return arguments of the script `pop`; its keys are the lists, level by level.

    Args:
        token: Names this pop.
        lease_s: How long the leases last, seconds.
        most: Most messages that are taken.
        prefetch: How many more messages of each queue the process may hold.
        token_budgets: How many tokens of each queue it may hold; None for any.
        held: How many messages of each list it holds already, and their tokens.
        n_suspects: How many suspected poison messages it may take.
        suspect_at: How many lost leases make a message one.
        share: 2 to leave half of a list to others, else 1.
    """
    return [
        *(token, lease_s, most, n_suspects, suspect_at, share, FEWEST_JOBS),
        *prefetch,
        *("" if budget is None else budget for budget in token_budgets),
        *(count for counts in held for count in counts),
    ]


def leases_in(reply: list[Any], token: str) -> list[tuple[Lease, bytes]]:
    """Return what the script `pop` has taken: each message, and the lease on it."""
    entries = zip(*[iter(reply)] * 6, strict=True)
    return [
        (_lease(source, tag, token, n_lost, n_tries, n_tokens), raw)
        for source, tag, n_lost, n_tries, n_tokens, raw in entries
    ]


def _lease(source: bytes, tag: bytes, token: str, n_lost: int, n_tries: int, n_tokens: int) -> Lease:
    queue, level = split_key(bytes_to_str(source))
    return Lease(
        tag=tag.decode(errors="surrogateescape"),
        token=token,
        queue=queue,
        level=level,
        tokens=n_tokens,
        n_lost=n_lost if n_lost >= 0 else None,
        n_tries=n_tries,
    )
