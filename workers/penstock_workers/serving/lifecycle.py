"""A worker process from start to end: its models, loaded before the first job, and its signs of life."""

import logging
import os
import re
import resource
import socket
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

import redis
from celery import bootsteps
from celery.app.trace import setup_worker_optimizations
from celery.concurrency.thread import TaskPool as ThreadPool
from celery.signals import celeryd_init, worker_ready, worker_shutting_down

from penstock.background import Background, lost
from penstock.broker import connect_sync
from penstock.clock import ticks
from penstock.codec import queue_name
from penstock.errors import ConfigError, ModelLoadError
from penstock.identity import process_name, process_token
from penstock.refusals import in_words
from penstock.registry import (
    BEAT,
    HEARTBEAT_S,
    WORKERS_KEY,
    Announcement,
    WorkerInfo,
    WorkerState,
)
from penstock.request import PoolName
from penstock.settings import Settings
from penstock.urls import announce_results
from penstock_workers.clock import BROKER_CLOCK
from penstock_workers.folders import settle_folders
from penstock_workers.layout import choose_threads, read_machine, thread_variables
from penstock_workers.preflight import check_servers
from penstock_workers.serving.loading import load_model
from penstock_workers.serving.models import Serving
from penstock_workers.surroundings import refuse_options_from_variables

logger = logging.getLogger(__name__)

EXIT_CONFIG: Final = os.EX_CONFIG
"""78: starting again changes nothing, and `penstock up` does not."""

HAND_BACK_S: Final = 1.0
"""How long the jobs that a dead model thread did not touch have for their way back to the queue."""


def choose_models(queues: Iterable[str], settings: Settings) -> tuple[PoolName, list[str]]:
    """Return the pool and the models of the queues that a worker was started for.

    Raises:
        ConfigError: a queue is of no configured model, or they are of two pools.
    """
    served = {
        queue_name(pool, name): (pool, name)
        for name, model in settings.models.items()
        for pool in model.pools
    }
    wanted = sorted(queues)
    known = ", ".join(sorted(served)) or "none: the configuration has no models"
    if problems := [
        f"queue {queue!r} is of no model; queues: {known}" for queue in wanted if queue not in served
    ]:
        raise ConfigError(problems)
    pools = {served[queue][0] for queue in wanted}
    if len(pools) != 1:
        raise ConfigError([f"-Q names queues of two pools, a process works for one: {', '.join(wanted)}"])
    return pools.pop(), [served[queue][1] for queue in wanted]


def refuse_forks(pool_class: type, arguments: Sequence[str]) -> None:
    """Allow the threads pool only.

    Args:
        pool_class: what Celery chose; it takes the configured pool for an asked-for prefork, so
        arguments: the command line, is looked at too.

    Raises:
        ConfigError: another pool was asked for.
    """
    asked = re.search(r"(^| )(-P|--pool)[ =]?(prefork|processes)( |$)", " ".join(arguments))
    if asked or not issubclass(pool_class, ThreadPool):
        name = asked.group(3) if asked else pool_class.__module__.rpartition(".")[2]
        raise ConfigError([f"pool {name} is refused: {_WHY_THREADS}"])


def refuse_options(worker: Any, options: Mapping[str, Any]) -> None:
    """Refuse what would be taken and change nothing, or do harm.

    Args:
        worker: Celery's own.
        options: what it was made with besides.

    Raises:
        ConfigError: one line for each option, and what to do instead.
    """
    found = {name: getattr(worker, name, None) or options.get(name) for name in _WITHOUT_EFFECT}
    found["disable_prefetch"] = worker.app.conf.worker_disable_prefetch
    problems = [_WITHOUT_EFFECT[name] for name, value in found.items() if value and value != "fork"]
    if (multiplier := worker.prefetch_multiplier) != 1:
        problems.append(
            f"--prefetch-multiplier {multiplier} is refused: a process holds no more jobs of a queue than it "
            "has threads for; -c sets both"
        )
    if problems:
        raise ConfigError(problems)


_CHILDREN: Final = "is about forked children, and the pool has threads: it is refused"
_THREADS: Final = "is refused: a thread cannot be ended; give jobs a deadline, or models deadline_s"
_WITHOUT_EFFECT: Final = {
    "autoscale": "--autoscale changes nothing here: start more worker processes instead",
    "time_limit": f"--time-limit {_THREADS}",
    "soft_time_limit": f"--soft-time-limit {_THREADS}",
    "max_tasks_per_child": f"--max-tasks-per-child {_CHILDREN}",
    "max_memory_per_child": f"--max-memory-per-child {_CHILDREN}",
    "pool_start_method": f"--pool-start-method {_CHILDREN}",
    "beat": "-B is refused: nothing here is sent by the clock; run `celery beat` with an app of your own",
    "disable_prefetch": "--disable-prefetch is refused: jobs are taken only where a thread is free for them",
}
"""By the names that Celery's worker gives them."""

_WHY_THREADS: Final = (
    "a forked child cannot use CUDA or OpenMP that its parent has touched, and each would load the models "
    "again; use -P threads, and start more worker processes"
)


_OUR_NODE: Final = re.compile(r"celery|(cpu|gpu)-\d+")
"""Names that nobody chose: Celery's own, and those of `penstock worker` and `penstock up`."""


def name_node(instance: Any, **_arguments: object) -> None:
    """Make a node name that nobody chose one that no other worker has; handles `celeryd_init`."""
    name, _, host = instance.hostname.partition("@")
    if _OUR_NODE.fullmatch(name):
        instance.hostname = f"{name}-{process_token()}@{host}"
        setup_worker_optimizations(instance.app, instance.hostname)  # tasks have heard the other one


celeryd_init.connect(name_node)


class Lifecycle(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery has no types
    """Loads the models before the consumer starts, and keeps telling that the process lives.

    A step of Celery's worker and not a signal handler: Celery swallows errors of signal handlers, and a
    worker without its model would take jobs and fail every one of them.
    """

    requires = ("celery.worker.components:Pool",)

    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        self._options = options
        self._settings: Settings = worker.app.penstock_settings
        self._serving: Serving = worker.app.penstock_serving
        self._heartbeat: Heartbeat | None = None

    def create(self, worker: Any) -> "Lifecycle":
        """Refuse what cannot work before anything is started."""
        with _or_exit():
            refuse_options_from_variables()
            refuse_forks(worker.pool_cls, sys.argv[1:])
            refuse_options(worker, self._options)
            queues = worker.app.amqp.queues
            # Without -Q and -X Celery would take all: a process serves the models that it was started for.
            asked = queues.consume_from if queues._consume_from is not None else ["celery"]
            self._pool, self._names = choose_models(asked, self._settings)
            worker.app.penstock_queues.update({queue_name(self._pool, name): name for name in self._names})
        return self

    def start(self, worker: Any) -> None:
        """Load the models; the process ends if one cannot be loaded."""
        with _or_exit():
            for warning in check_servers(self._settings):
                logger.warning("%s", warning)
        worker.app.penstock_cancelled.start()
        worker.app.penstock_streams.start()
        pool = getattr(self._settings.pools, self._pool)
        models = [self._settings.models[name] for name in self._names]
        n_threads = choose_threads(self._settings, self._pool, models, read_machine())
        os.environ.update(thread_variables(n_threads))
        with _or_exit():
            device = None
            if any(model.engine != "remote" for model in models):
                settle_folders()
                # torch, and the file that knows it, load here: the app itself imports without.
                from penstock_workers.engines.device import choose_device, share_cores

                device = choose_device(self._pool, pool.device)
                share_cores(n_threads, device)
            told = str(device or "no device")
            self._heartbeat = Heartbeat(self._settings, self._serving, self._pool, told, self._names)
            worker.app.penstock_announce = self._heartbeat.beat_now
            self._heartbeat.start()
            n_local = sum(model.engine != "remote" for model in models)
            takes_turns = n_local > 1 and (n_threads > 1 or (device is not None and device.type != "cpu"))
            for name in self._names:
                began = time.perf_counter()
                # One thread each is shared by the kernel; teams of threads keep each other from their
                # cores, and a card runs what came first.
                turn = self._serving.turn(name, self._settings) if takes_turns else None
                self._serving.models[name] = load_model(name, self._settings, device, turn)
                seconds = time.perf_counter() - began
                self._heartbeat.loaded(name, seconds)
                logger.info("model %s loaded in %.1f s on %s, threads: %d", name, seconds, told, n_threads)

    def stop(self, worker: Any) -> None:
        """Take the process out of the registry."""
        del worker
        if self._heartbeat is not None:
            self._heartbeat.stop()


class Heartbeat(Background):
    """Announces this process and its models in the registry, and touches the readiness file.

    Redis out of reach does not make a worker unhealthy: restarting it would help nobody.
    """

    def __init__(
        self, settings: Settings, serving: Serving, pool: PoolName, device: str, names: Sequence[str]
    ) -> None:
        super().__init__("heartbeat", self._show_life)
        self._settings, self._serving = settings, serving
        self._redis = connect_sync(settings.broker_url, answer_timeout_s=5)
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
        self._script = self._redis.register_script(BEAT)
        self._announcing = threading.Lock()
        self._outage: set[str] = set()  # why the registry was out of reach, since it last was not
        self._version, self._told = "0", self._announcement()
        worker_ready.connect(self._on_ready, weak=False)
        worker_shutting_down.connect(self._on_stopping, weak=False)

    def loaded(self, name: str, seconds: float) -> None:
        """Note that a model was loaded."""
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
            self._announce(state)
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
        self.join(HEARTBEAT_S + 10)  # a beat that is under way would put the file and the entry back
        if self._settings.worker.heartbeat_file is not None:
            self._settings.worker.heartbeat_file.unlink(missing_ok=True)
        try:
            self._redis.hdel(WORKERS_KEY, str(self._fields["id"]))
        except (redis.RedisError, OSError):
            logger.warning("registry out of reach; the entry of this process expires by itself")

    def _give_up(self) -> None:
        """End a process that cannot work: its leases, which it no longer renews, go to others."""
        try:
            self._announce("stalled")
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

    def _announce(self, state: WorkerState) -> None:
        is_new = self._version == "new"
        is_asked = self._beat(self._info(state), with_values=is_new)
        if is_asked:
            logger.warning("the broker had lost what is served: it is told again")
            self._beat(self._info(state), with_values=True)

    def _beat(self, info: WorkerInfo, *, with_values: bool) -> bool:
        """Show life; returns whether the broker lacks what this process has announced."""
        with self._announcing:
            told, asked_at = self._told, ticks()
            arguments = told.arguments(info, self._version, with_values=with_values)
            second, microsecond, version, is_asked = self._script(keys=told.keys(), args=arguments)
            self._version = version.decode()
        BROKER_CLOCK.learn(int(second) + int(microsecond) / 1e6, asked_at)
        return bool(is_asked)

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
        """Return what this process has to tell of its models and settings; before they are loaded, names."""
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
        with self._announcing:
            self._told, self._version = self._announcement(), "new"
        try:
            self._announce("ready")  # before the file says so
        except (redis.RedisError, OSError) as error:
            self._note_outage(error)
        self._is_ready = True
        self._wake.set()

    def _on_stopping(self, **_: object) -> None:
        self._is_ready = False
        self._wake.set()


def end_process(why: str) -> NoReturn:
    """End a process that a supervisor should start anew, after a moment for jobs on their way back."""
    logger.critical("%s", why)
    time.sleep(HAND_BACK_S)
    logging.shutdown()
    os._exit(os.EX_SOFTWARE)


class _or_exit:  # noqa: N801  reads as part of its `with` statement
    """End the process with one clear line; Celery would log a traceback."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, ConfigError | ModelLoadError):
            for line in str(error).splitlines():
                logger.critical("%s", line)
            raise SystemExit(EXIT_CONFIG) from None


def _memory_bytes() -> int:
    """Return the resident memory of this process; its peak where /proc is missing."""
    status = Path("/proc/self/statm")
    if status.exists():
        return int(status.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
