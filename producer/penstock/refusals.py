"""What a server's refusal means: an outage that is waited for, or an answer that stands.

Every connection of Penstock, those of kombu and of Celery's result backend too, is of a class that
`attentive` made. So each part sees one kind of error while the server cannot serve, and none stays on a
server that was replaced.
"""

import re
import threading
import time
from collections.abc import Hashable, Mapping
from typing import Any, Final, cast

import redis
import redis.asyncio.connection as async_connection
from redis.exceptions import AuthenticationError, ReadOnlyError, ResponseError

MIN_VERSION: Final = 7
"""Of Redis: scripts say there what they do. Valkey began above."""

OUTAGES: Final = frozenset(
    (
        *("BUSY", "CLUSTERDOWN", "LOADING", "MASTERDOWN", "MISCONF", "NOREPLICAS", "READONLY", "TRYAGAIN"),
        *("UNBLOCKED", "UNKILLABLE"),
    )
)
"""The server cannot serve now: it starts, runs a long script, cannot save, or is not the primary."""

REFUSALS: Final = frozenset(["NOAUTH", "NOPERM", "OOM", "WRONGPASS"])
"""Somebody has to change something; a worker waits for that, a caller is told."""

_SENTENCES: Final[Mapping[str, str]] = {
    "NOAUTH": "this Redis wants a password: redis://USER:PASSWORD@HOST, without user redis://:PASSWORD@HOST; "
    "a Redis of `penstock up` is for the user who started it",
    "WRONGPASS": "this Redis knows no such user with this password, or the user is switched off",
    "NOPERM": "the user lacks a right, configs/users.acl has all that are needed: {}",
}
"""What to do about those that servers tell in words of their own; {} stands for these."""

_DEMOTED: Final = frozenset(["MASTERDOWN", "READONLY", "UNBLOCKED"])
# How servers before version 7 pass on what a command in a script was refused with.
_IN_SCRIPT: Final = re.compile(r"-([A-Z]+) ")


class OutageError(redis.ConnectionError):
    """The server answered that it cannot serve now; the connection was closed.

    Attributes:
        code: First word of its answer.
    """

    def __init__(self, text: str, code: str) -> None:
        super().__init__(text)
        self.code = code

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"  # Celery's log shows it


class UnsuitableServerError(ResponseError):
    """The server is of a kind that cannot hold queues; waiting changes nothing."""


def _in_our_words(error: redis.RedisError, code: str) -> str:
    text = str(error).removeprefix(code).strip()
    sentence = _SENTENCES.get(code, "{}")
    is_told = text.startswith(sentence.partition("{")[0])
    return text if is_told else sentence.replace("{}", text)


def code_of(error: BaseException) -> str:
    """Return the word that a server's refusal begins with; "" if it is none that is known here."""
    code = getattr(error, "status_code", None) or getattr(error, "code", None)  # redis-py takes it off
    if code and code != "ERR":
        return str(code)
    first = str(error).partition(" ")[0]
    if first in OUTAGES | REFUSALS:
        return first
    found = _IN_SCRIPT.search(str(error))
    return found.group(1) if found and found.group(1) in OUTAGES | REFUSALS else ""


def is_outage(error: BaseException) -> bool:
    """Say whether the server cannot serve now, and will again without a change of ours."""
    return code_of(error) in OUTAGES


def is_for_now(error: BaseException) -> bool:
    """Say whether a worker waits for the end of this: an outage, full memory, or missing rights."""
    return isinstance(error, AuthenticationError) or code_of(error) in OUTAGES | REFUSALS


def in_words(error: BaseException) -> str:
    """Return an error in a word or a line, for a log."""
    return " ".join(str(error).split()) or type(error).__name__


class _Replaced:
    """Which connections are older than the news that their server is no primary any more."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._until: dict[Hashable, float] = {}

    def tell(self, address: Hashable, connected_at: float) -> None:
        """Give up what was connected to this address until then."""
        with self._lock:
            self._until[address] = max(connected_at, self._until.get(address, connected_at))

    def includes(self, address: Hashable, connected_at: float) -> bool:
        return bool(self._until) and connected_at <= self._until.get(address, -1.0)


_replaced: Final = _Replaced()


class _Attentive:
    """What both kinds of connections have in common.

    Attributes:
        waits_for: Words of answers that are outages, and close the connection.
        server: The server's own words when we connected; empty before version 6 and with protocol 2.
    """

    waits_for: frozenset[str] = OUTAGES
    server: Mapping[Any, Any] = {}
    connected_at = 0.0

    @property
    def is_replaced(self) -> bool:
        """Whether this address was found to lead to another server, or to a replica, since we connected."""
        return _replaced.includes(self._address, self.connected_at)

    @property
    def age_s(self) -> float:
        """How long ago we connected."""
        return time.monotonic() - self.connected_at

    @property
    def _address(self) -> Hashable:
        pool = getattr(self, "connection_pool", None)  # Sentinel's: it names the server
        if (name := getattr(pool, "service_name", None)) is not None:
            return str(name)
        return getattr(self, "path", None) or (getattr(self, "host", None), getattr(self, "port", None))

    def _give_up(self) -> None:
        """Give up all connections to this server that are as old as this one, or older."""
        _replaced.tell(self._address, self.connected_at)

    def _judge(self, error: redis.RedisError) -> redis.RedisError:
        """Return what a refusal means here; the caller closes the connection of an outage."""
        code = code_of(error)
        if code in _DEMOTED or isinstance(error.__context__, ReadOnlyError):  # redis-py's for Sentinel
            self._give_up()
        if code in self.waits_for and not isinstance(error, OutageError):
            return OutageError(f"{code} {_in_our_words(error, code)}", code)
        if code in _SENTENCES:
            error.args = (_in_our_words(error, code),)
        if "unknown command" in str(error).lower() and "HELLO" in str(error):
            return UnsuitableServerError(f"it knows no HELLO, so it is too old: {_NEEDED}")
        return error

    def _greet(self, server: Mapping[Any, Any]) -> None:
        """Take in what a server says of itself.

        Raises:
            OutageError: it is a replica.
            UnsuitableServerError: it cannot hold queues at all.
        """
        self.server = server
        if (problem := _unsuitable(server)) is not None:
            raise UnsuitableServerError(problem)
        if _field(server, "role") in ("replica", "slave"):
            self._give_up()
            raise OutageError("READONLY this server is a replica", "READONLY")


_NEEDED: Final = f"Redis {MIN_VERSION} or Valkey is needed"


def _field(server: Mapping[Any, Any], name: str) -> str:
    value = server.get(name.encode(), server.get(name, ""))
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _unsuitable(server: Mapping[Any, Any]) -> str | None:
    if _field(server, "mode") == "cluster":
        return "it runs in cluster mode, where no step moves a job; use one server, or Sentinel"
    if _field(server, "mode") == "sentinel":
        return "it is a sentinel, which names servers and holds nothing; write the URL as sentinel://..."
    version = _field(server, "version")
    major = version.partition(".")[0]
    if major.isdigit() and int(major) < MIN_VERSION:
        return f"it is of version {version}; {_NEEDED}"
    return None


def _is_greeting(reply: object) -> bool:
    # Only HELLO answers with a mapping from this to a number: what a hash holds is bytes.
    return type(reply) is dict and type(reply.get(b"proto", reply.get("proto"))) is int


class _AttentiveSync(_Attentive):
    """A connection of `redis`."""

    def connect(self) -> None:
        """Connect, if need be; again where the server was replaced since."""
        if self.is_replaced:
            self.disconnect()  # type: ignore[attr-defined]  # of the class that this is mixed with
        super().connect()  # type: ignore[misc]  # the same

    def _connect(self) -> Any:
        self.connected_at = time.monotonic()
        return super()._connect()  # type: ignore[misc]  # the same

    def _send_ping(self) -> None:
        """Ask for a sign of life, and whether it is still the primary; needs no right, as PING does."""
        self.send_command("HELLO", check_health=False)  # type: ignore[attr-defined]  # the same
        self.read_response()

    def read_response(self, *args: Any, **options: Any) -> Any:
        """Read a reply, in redis-py's way.

        Raises:
            OutageError: the server cannot serve now.
        """
        try:
            reply = super().read_response(*args, **options)  # type: ignore[misc]  # the same
            if _is_greeting(reply):
                self._greet(reply)
        except (ResponseError, redis.ConnectionError) as error:
            meant = self._judge(error)
            if isinstance(meant, OutageError | UnsuitableServerError):
                self.disconnect()  # type: ignore[attr-defined]  # the same
            if meant is error:
                raise
            raise meant from error
        return reply


class _AttentiveAsync(_Attentive):
    """A connection of `redis.asyncio`."""

    async def connect(self) -> None:
        """Connect, if need be; again where the server was replaced since."""
        if self.is_replaced:
            await self.disconnect()  # type: ignore[attr-defined]  # of the class that this is mixed with
        await super().connect()  # type: ignore[misc]  # the same

    async def _connect(self) -> None:
        self.connected_at = time.monotonic()
        await super()._connect()  # type: ignore[misc]  # the same

    async def _send_ping(self) -> None:
        """See the other one."""
        await self.send_command("HELLO", check_health=False)  # type: ignore[attr-defined]  # the same
        await self.read_response()

    async def read_response(self, *args: Any, **options: Any) -> Any:
        """Read a reply, in redis-py's way.

        Raises:
            OutageError: the server cannot serve now.
        """
        try:
            reply = await super().read_response(*args, **options)  # type: ignore[misc]  # the same
            if _is_greeting(reply):
                self._greet(reply)
        except (ResponseError, redis.ConnectionError) as error:
            meant = self._judge(error)
            if isinstance(meant, OutageError | UnsuitableServerError):
                await self.disconnect()  # type: ignore[attr-defined]  # the same
            if meant is error:
                raise
            raise meant from error
        return reply


def attentive(kind: type, *, waits_for: frozenset[str] = OUTAGES) -> Any:
    """Return a class of connections like `kind`, redis-py's or one made from it.

    Args:
        kind: Class of connections, blocking or not.
        waits_for: Words of answers that are outages; see `OUTAGES` and `REFUSALS`.
    """
    is_async = issubclass(kind, async_connection.AbstractConnection)
    mixin = _AttentiveAsync if is_async else _AttentiveSync
    return cast("Any", type(kind.__name__, (mixin, kind), {"waits_for": waits_for}))
