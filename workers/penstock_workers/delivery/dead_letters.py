"""Dead letters: messages that were given up, and how their senders are notified."""

import base64
import json
import logging
from collections.abc import Callable, Mapping
from queue import SimpleQueue
from typing import Any

import redis

from penstock.keys import DEAD_KEY, UNTOLD_KEY, split_key
from penstock_workers.background import Background
from penstock_workers.delivery.upkeep import BATCH, Upkeep

logger = logging.getLogger(__name__)

OnDead = Callable[[Mapping[str, Any], int], None]


class DeadLetters:
    """Dead-letters messages and notifies their senders, also where another process died before it did.

    Args:
        client: Connects to the broker.
        upkeep: Runs the scripts.
        on_dead: Notifies one sender; None where this process notifies nobody.
        lease_s: How long a lease lasts, seconds.
    """

    def __init__(self, client: redis.Redis, upkeep: Upkeep, on_dead: OnDead | None, lease_s: float) -> None:
        self._client, self._upkeep = client, upkeep
        self._on_dead, self._lease_s = on_dead, lease_s
        self._pending: SimpleQueue[bytes | None] = SimpleQueue()
        # A thread of its own: renewing must not wait for it.
        self._thread = Background("dead-letters", self._notify)

    def start(self) -> None:
        """Start the thread, if this process notifies senders."""
        if self._on_dead is not None:
            self._thread.start()

    def close(self) -> None:
        """Let the thread end."""
        self._thread.end()
        self._pending.put(None)

    def give_up(
        self, tag: bytes, token: str, source: bytes, message: bytes, n_deliveries: int, reason: str
    ) -> None:
        """Dead-letter a message that this process holds; its sender is notified if it came from a list.

        Args:
            tag: Name of the message in Redis.
            token: Token that holds it.
            source: List that it came from; empty if another transport left it.
            message: The message itself.
            n_deliveries: Number of processes that had it.
            reason: Why, in a few words without its content.
        """
        queue, _ = split_key(source.decode(errors="replace"))
        entry = letter_of(message, queue=queue, reason=reason, n_deliveries=n_deliveries)
        self.add(tag, token, entry, must_notify=bool(source))

    def add(self, tag: bytes, token: str, entry: str, *, must_notify: bool) -> None:
        """Move a message that this process holds to the dead letters; see `letter_of` for `entry`."""
        arguments = (tag, token, entry, int(must_notify), 2 * self._lease_s)
        self._upkeep.do("dead_letter", *arguments, then=self._added)

    def _added(self, entry: bytes | None) -> None:
        """Log an entry that was added, and have its sender notified; None if another process had it."""
        if not entry:
            return
        letter = json.loads(entry)
        fields = {key: letter[key] for key in ("id", "task", "queue", "n_deliveries")}
        logger.error("message moved to %s: %s", DEAD_KEY, letter["reason"], extra={"dead": fields})
        if self._on_dead is not None:
            self._pending.put(entry)

    def claim_notices(self) -> float:
        """Take on notices that are still pending, for their process may have died; a duty."""
        if self._on_dead is not None:
            for entry in self._upkeep.call("claim_notices", 2 * self._lease_s, BATCH):
                self._pending.put(entry)
        return self._lease_s / 2

    def _notify(self) -> None:
        if (entry := self._pending.get()) is None:
            return
        try:
            self._notify_sender(entry)
        except Exception:
            # The mark stays, so whoever comes by after it lapses tries again.
            logger.exception("telling of a dead letter failed")

    def _notify_sender(self, entry: bytes) -> None:
        assert self._on_dead is not None
        # Marked only if its sender must be notified, and as long as nobody has notified them.
        if self._client.zscore(UNTOLD_KEY, entry) is not None:
            letter = json.loads(entry)
            self._on_dead(_decoded(letter.get("message", "")), letter["n_deliveries"])
            self._client.zrem(UNTOLD_KEY, entry)


def letter_of(message: bytes, *, queue: str, reason: str, n_deliveries: int) -> str:
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
