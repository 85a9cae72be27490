"""A worker process from start to end: what it refuses, and its models, loaded before the first job."""

import logging
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

from celery import bootsteps
from celery.app.trace import setup_worker_optimizations
from celery.concurrency.thread import TaskPool as ThreadPool
from celery.signals import celeryd_init

from penstock.errors import ConfigError, ModelLoadError
from penstock.extras import how_to_install
from penstock.identity import process_token
from penstock.keys import queue_name
from penstock.request import PoolName
from penstock_workers.hardware.machine import read_machine
from penstock_workers.hardware.threads import choose_threads, thread_variables
from penstock_workers.preflight import check_servers
from penstock_workers.serving.celery_loader import refuse_options_from_variables
from penstock_workers.serving.heartbeat import Heartbeat
from penstock_workers.serving.loading import load_model
from penstock_workers.serving.models import Serving
from penstock_workers.serving.writable_folders import settle_folders
from penstock_workers.settings import Settings

logger = logging.getLogger(__name__)

EXIT_CONFIG: Final = os.EX_CONFIG
"""78: starting again changes nothing, and `penstock up` does not."""


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
        pool_class: Pool that Celery chose. If prefork was asked for, it is the configured one all the same.
        arguments: Command line, which says what was asked for.

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
        worker: Celery's worker.
        options: Other options that it was made with.

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
"""Names of nodes that nobody chose: Celery's own, and those of `penstock worker` and `penstock up`."""


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
                from penstock_workers.hardware.device import choose_device, share_cores

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
                # cores, and a GPU runs what came first.
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


@contextmanager
def _or_exit() -> Iterator[None]:
    """End the process with one clear line; Celery would log a traceback."""
    try:
        yield
    except (ConfigError, ModelLoadError) as error:
        for line in str(error).splitlines():
            logger.critical("%s", line)
        raise SystemExit(EXIT_CONFIG) from None
    except ModuleNotFoundError as error:  # no engine here for models of our own
        logger.critical("%s is missing: %s", error.name, how_to_install("workers"))
        raise SystemExit(EXIT_CONFIG) from None
