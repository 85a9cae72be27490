"""Dropping what waits in a queue, and who hears of it."""

from collections.abc import Callable, Sequence

import redis

from penstock.envelope import is_clean
from penstock.scripts import script
from penstock_workers.delivery.upkeep import BATCH

OnPurged = Callable[[Sequence[tuple[str, str]]], None]


def purge(client: redis.Redis, lists: Sequence[str], on_purged: OnPurged | None = None) -> int:
    """Drop what waits in the lists of a queue; returns how many messages.

    Args:
        client: Connects to the broker.
        lists: The queue's lists of all levels; those of tenants belong to them.
        on_purged: Is called with id and `reply_to`, or nothing, of the jobs that were dropped; some at once.
    """
    drop, n_dropped, is_left = client.register_script(script("purge")), 0, 1
    while is_left:
        n, is_left, *fields = drop(keys=lists, args=[BATCH])
        n_dropped += n
        texts = [field.decode(errors="replace") for field in fields]
        jobs = list(zip(texts[::2], texts[1::2], strict=True))
        if on_purged is not None and jobs:
            on_purged([job for job in jobs if is_clean(job[0])])
    return n_dropped
