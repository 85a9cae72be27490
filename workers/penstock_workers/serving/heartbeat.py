"""Signs of life of a worker process: in the registry, with what it serves, and in a file."""

import logging
import os
import resource
import socket
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

import redis
from celery.signals import worker_ready, worker_shutting_down

from penstock.clock import ticks
from penstock.connections import connect_sync
from penstock.identity import process_name
from penstock.keys import WORKERS_KEY, queue_name
from penstock.refusals import in_words
from penstock.registry import BEAT, HEARTBEAT_S, Announcement, WorkerInfo, WorkerState
from penstock.request import PoolName
from penstock.urls import announce_results
from penstock_workers.background import Background, lost
from penstock_workers.clock import BROKER_CLOCK
from penstock_workers.serving.models import Serving
from penstock_workers.settings import Settings

logger = logging.getLogger(__name__)

REQUEUE_S: Final = 1.0
"""Time to requeue the jobs that a dead model thread did not touch, before the process ends."""


class Entry:
    """The entry of this process in the registry, and what it has announced there.

    Args:
        url: URL of the broker.
        announcement: First announcement.
    """

    def __init__(self, url: str, announcement: Announcement) -> None:
        self._redis = connect_sync(url, answer_timeout_s=5)
        self._script = self._redis.register_script(BEAT)
        self._lock = threading.Lock()
        self._version, self._announcement = "0", announcement

    def announce(self, announcement: Announcement) -> None:
        """Announce something else with the next beat."""
        with self._lock:
            self._announcement, self._version = announcement, "new"

    def beat(self, info: WorkerInfo) -> None:
        """Show life; tell what was announced, where it is new or the broker has lost it."""
        is_new = self._version == "new"
        if self._beat(info, with_values=is_new):
            logger.warning("the broker had lost what is served: it is told again")
            self._beat(info, with_values=True)

    def remove(self, worker_id: str) -> None:
        """Take the process out of the registry."""
        self._redis.hdel(WORKERS_KEY, worker_id)

    def _beat(self, info: WorkerInfo, *, with_values: bool) -> bool:
        """Show life; returns whether the broker lacks what this process has announced."""
        with self._lock:
            told, asked_at = self._announcement, ticks()
            arguments = told.arguments(info, self._version, with_values=with_values)
            second, microsecond, version, is_asked = self._script(keys=told.keys(), args=arguments)
            self._version = version.decode()
        BROKER_CLOCK.learn(int(second) + int(microsecond) / 1e6, asked_at)
        return bool(is_asked)


class Heartbeat(Background):
    """Announces this process and its models in the registry, and touches the readiness file.

    Redis out of reach does not make a worker unhealthy: restarting it would help nobody.
    """

    def __init__(
        self, settings: Settings, serving: Serving, pool: PoolName, device: str, names: Sequence[str]
    ) -> None:
        super().__init__("heartbeat", self._show_life)
        self._settings, self._serving = settings, serving
        self._wake = threading.Event()
        self._is_ready = False
        self._load_s: dict[str, float] = {}
        self._started_ticks = ticks()
        host, pid = socket.gethostname(), os.getpid()
        self._fields: dict[str, Any] = {
            "id": f"{pool}@{process_name()}",
            "host": host,
            "pid": pid,
            "pool": pool,
            "device": device,
            "models": tuple(names),
        }
        self._outage: set[str] = set()  # reasons that the registry was out of reach, since it last was not
        self._entry = Entry(settings.broker_url, self._announcement())
        worker_ready.connect(self._on_ready, weak=False)
        worker_shutting_down.connect(self._on_stopping, weak=False)

    def loaded(self, name: str, seconds: float) -> None:
        """Note that a model is loaded."""
        self._load_s[name] = round(seconds, 3)

    def beat_now(self) -> None:
        """Announce at once what has changed."""
        self._wake.set()

    def _show_life(self) -> None:
        state = self._state()
        if state == "stalled":
            self._give_up()
        if state == "ready" and self._settings.worker.heartbeat_file is not None:
            self._settings.worker.heartbeat_file.touch()
        try:
            self._entry.beat(self._info(state))
        except (redis.RedisError, OSError) as error:
            self._note_outage(error)
        else:
            self._note_end_of_outage()
        self._wake.wait(HEARTBEAT_S)
        self._wake.clear()

    def _note_outage(self, error: Exception) -> None:
        """Log each reason once, not with every beat."""
        if (reason := in_words(error)) not in self._outage:
            self._outage.add(reason)
            logger.warning("registry out of reach: %s", reason)

    def _note_end_of_outage(self) -> None:
        if self._outage:
            self._outage.clear()
            logger.warning("registry within reach again")

    def stop(self) -> None:
        """Take the process out of the registry, and its file away."""
        self.end()
        self._wake.set()
        self.join(HEARTBEAT_S + 10)  # a beat in progress would put the file and the entry back
        if self._settings.worker.heartbeat_file is not None:
            self._settings.worker.heartbeat_file.unlink(missing_ok=True)
        try:
            self._entry.remove(str(self._fields["id"]))
        except (redis.RedisError, OSError):
            logger.warning("registry out of reach; the entry of this process expires by itself")

    def _give_up(self) -> None:
        """End a process that cannot work: its leases, which it no longer renews, go to others."""
        try:
            self._entry.beat(self._info("stalled"))
        except Exception as error:  # noqa: BLE001  whatever it is, the process has to end
            logger.warning("registry out of reach: %s", type(error).__name__)
        why = self._trouble_of_threads() or "a model thread hangs or has died"
        end_process(f"{why}; this process ends, others take its jobs over")

    def _trouble_of_threads(self) -> str:
        threads = lost()
        return f"background threads have ended or fail for ever: {', '.join(threads)}" if threads else ""

    def _state(self) -> WorkerState:
        if lost() or self._serving.is_stalled(self._settings.worker.stall_s):
            return "stalled"
        return "ready" if self._is_ready else "loading"

    def _info(self, state: WorkerState) -> WorkerInfo:
        costs = self._serving.costs()
        taken = tuple(name for name in self._fields["models"] if name not in self._serving.paused)
        return WorkerInfo(
            **(self._fields | {"models": taken}),
            state=state,
            started_at=round(BROKER_CLOCK.now() - (ticks() - self._started_ticks), 1),
            load_s=dict(self._load_s),
            memory_bytes=_memory_bytes(),
            units_per_s=self._serving.speeds(),
            tokens_per_character={name: cost.tokens_per_character for name, cost in costs.items()},
            answer_tokens={name: cost.answer_tokens for name, cost in costs.items() if cost.answer_tokens},
            cache_hits={name: cache.n_hits for name, cache in self._serving.caches().items()},
            cache_misses={name: cache.n_misses for name, cache in self._serving.caches().items()},
            upstreams=self._serving.troubles(),
            note=(self._trouble_of_threads() or "a forward pass does not end") if state == "stalled" else "",
        )

    def _announcement(self) -> Announcement:
        """Return what this process announces of its models and settings; names, before they are loaded."""
        settings, models = self._settings, self._serving.models
        results = announce_results(settings.redis.broker_url, settings.redis.results_url)
        told = {f"model:{name}": served.info.to_json() for name, served in models.items()}
        tenants = {f"tenant:{name}": tenant.terms() for name, tenant in settings.tenants.items()}
        return Announcement(
            values={"results": results, **told, **tenants},
            others=settings.models.keys() - models.keys(),
            queues=[queue_name(self._fields["pool"], name) for name in self._fields["models"]],
        )

    def _on_ready(self, **_: object) -> None:
        self._entry.announce(self._announcement())
        try:
            self._entry.beat(self._info("ready"))  # before the file says so
        except (redis.RedisError, OSError) as error:
            self._note_outage(error)
        self._is_ready = True
        self._wake.set()

    def _on_stopping(self, **_: object) -> None:
        self._is_ready = False
        self._wake.set()


def end_process(why: str) -> NoReturn:
    """End a process that a supervisor should start again, after a moment to requeue jobs."""
    logger.critical("%s", why)
    time.sleep(REQUEUE_S)
    logging.shutdown()
    os._exit(os.EX_SOFTWARE)


def _memory_bytes() -> int:
    """Return the resident memory of this process; its peak where /proc is missing."""
    status = Path("/proc/self/statm")
    if status.exists():
        return int(status.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
