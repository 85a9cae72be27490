"""What the transport keeps for a process: the app's callables, and the leases on each broker."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from penstock.clock import Clock
from penstock.identity import process_token
from penstock_workers.delivery.dead_letters import OnDead
from penstock_workers.delivery.leases import IsAlive, Leases
from penstock_workers.delivery.purge import OnPurged

TokenBudget = Callable[[str], float | None]


@dataclass(slots=True)
class Hooks:
    """Callables of the app; see `transport.install`."""

    is_alive: IsAlive | None = None
    on_dead: OnDead | None = None
    token_budget: TokenBudget | None = None
    clock: Clock | None = None
    on_purged: OnPurged | None = None


# No transport options: those are sent to whoever runs `celery inspect stats`.
HOOKS: Final = Hooks()
_leases_of_process: dict[tuple[object, ...], Leases] = {}
_lock = threading.Lock()


def leases_for(channel: Any) -> Leases:
    """Return this process' leases on the channel's broker; they stay when the channel closes."""
    # The process: a fork takes over neither leases nor their thread.
    key = (process_token(), channel.connection.client.virtual_host, *channel.broker)
    with _lock:
        if key not in _leases_of_process:
            leases = Leases(
                _client_like(channel),
                lease_s=channel.lease_s,
                max_deliveries=channel.max_deliveries,
                is_alive=HOOKS.is_alive,
                on_dead=HOOKS.on_dead,
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
