"""How much of each queue a worker may hold, and what becomes of what it holds."""

import sys
from typing import Any

from kombu.transport import virtual
from kombu.utils.json import dumps

from penstock_workers.delivery.polling import FEWEST_JOBS, POP_MOST, PolledChannel, Pop
from penstock_workers.delivery.process import HOOKS


class QoS(virtual.QoS):  # type: ignore[misc]  # kombu has no types
    """How much of each queue may be held, and what becomes of it.

    `prefetch_count` counts for each queue by itself, so jobs of one model leave the places of another alone.
    Where the process tells its `token_budget`, tokens count too: what it cannot compute soon is left to
    others. Less urgent jobs that are held take none of the budget of urgent ones, which would wait for them
    otherwise.
    Counted are the leases of the process, not those of a channel: jobs outlive connections.
    """

    channel: PolledChannel

    def can_consume(self) -> bool:
        """Say whether some queue has a free place."""
        channel = self.channel
        if not channel.is_leasing or isinstance(channel.in_flight, Pop):
            return True  # what was popped must be read: nobody renews it before
        if not channel.leases.is_healthy:
            return False
        return any(self.prefetch_left(queue) > 0 for queue in channel.active_queues)

    def can_consume_max_estimate(self) -> int:
        """Count the free places of all queues."""
        return sum(self.prefetch_left(queue) for queue in self.channel.active_queues)

    def prefetch_left(self, queue: str) -> int:
        """Count the free places of a queue."""
        if not self.prefetch_count:
            return POP_MOST
        return max(0, int(self.prefetch_count) - self.channel.leases.held.n_of(queue))

    def token_budget(self, queue: str) -> float | None:
        """Return how many tokens of a queue may be held; None for any number."""
        return None if HOOKS.token_budget is None else HOOKS.token_budget(queue)

    def open_lists(self, queues: list[str]) -> list[str]:
        """Return the lists that more may be taken from, the most urgent first; as the script `pop` does."""
        channel, found = self.channel, []
        open_queues = {queue: self.token_budget(queue) for queue in queues if self.prefetch_left(queue)}
        held = dict.fromkeys(open_queues, (0, 0))
        for level in channel.priority_steps:
            for queue, budget in open_queues.items():
                n, tokens = map(sum, zip(held[queue], channel.leases.held.counts(queue, level), strict=True))
                held[queue] = n, tokens
                if budget is None or n < FEWEST_JOBS or tokens < budget:
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
        """Delay a message until it is worth another try; from any thread."""
        if self._delivered.pop(delivery_tag, None) is not None:
            self.channel.freed(self.channel.leases.retry(delivery_tag, pause_s))

    def fail(self, delivery_tag: str) -> None:
        """Requeue a message that this process failed on, as often as is allowed; from any thread."""
        if self._delivered.pop(delivery_tag, None) is not None:
            self.channel.freed(self.channel.leases.fail(delivery_tag))

    def dead_letter(self, message: Any, reason: str) -> None:
        """Dead-letter a message whose sender has been notified; from any thread."""
        if self._delivered.pop(message.delivery_tag, None) is not None:
            envelope = message.serializable()
            envelope["headers"]["retries"] = 0  # whoever requeues it wants all of them
            if isinstance(envelope["body"], bytes):  # JSON, as it came; kombu would write an object
                envelope["body"] = envelope["body"].decode()
            envelope["properties"] |= {"delivery_tag": message.delivery_tag.rpartition("@")[0]}
            raw = dumps(envelope).encode()
            self.channel.freed(
                self.channel.leases.dead_letter(message.delivery_tag, raw, reason, must_notify=False)
            )

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        """Drop a message, or requeue it: last in its queue, or first if this process stops."""
        if not requeue:
            self.ack(delivery_tag)
        elif self._delivered.pop(delivery_tag, None) is not None:
            for lease in self.channel.leases.requeue([delivery_tag], as_next=is_stopping()):
                self.channel.freed(lease)

    def restore_unacked(self) -> None:
        """Requeue all that this channel took, at the front of its queues."""
        delivered = list(self._delivered)
        self._delivered.clear()
        self.channel.leases.requeue(delivered, as_next=True)

    def restore_unacked_once(self, stderr: object = None) -> None:
        """Requeue what is held, unless it is a worker's connection that is lost.

        Those come and go: what runs goes on running, and is acknowledged through the next one.
        """
        del stderr
        self._on_collect.cancel()
        if not self.channel.has_leased:
            return
        if is_stopping():
            self.channel.leases.requeue_all()
        elif "celery.worker.state" not in sys.modules:
            self.restore_unacked()
            self.channel.leases.settle()

    def restore_visible(self, *args: object, **options: object) -> None:
        """Do nothing: leases that ran out are taken over by `Leases`."""


def is_stopping() -> bool:
    """Say whether this process is a Celery worker that was told to stop."""
    state = sys.modules.get("celery.worker.state")
    flags = (state.should_stop, state.should_terminate) if state is not None else ()
    # 0 is an exit code, and a reason to stop; it equals False, but it is not.
    return any(flag is not None and flag is not False for flag in flags)
