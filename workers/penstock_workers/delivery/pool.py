"""The pool of job threads: how jobs start, how they are requeued, and how the process ends.

Celery's own threads pool acknowledges nothing while it stops until its last job has ended, waits for that
without a bound, cannot answer SIGQUIT, and forgets a job whose result could not be stored: its place is gone.
"""

import atexit
import gc
import logging
import math
import os
import signal
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from queue import SimpleQueue
from typing import Any, Final

from celery.concurrency.base import apply_target
from celery.concurrency.thread import ApplyResult
from celery.concurrency.thread import TaskPool as CeleryTaskPool
from celery.exceptions import Reject
from celery.platforms import EX_FAILURE, EX_OK
from celery.signals import worker_ready, worker_shutdown, worker_shutting_down
from celery.worker import state
from celery.worker.control import Panel
from kombu.asynchronous import get_event_loop

from penstock.envelope import printable

logger = logging.getLogger(__name__)

DRAIN_S: Final = 30.0
"""How long running jobs may take to end, seconds, where the setting `worker_drain_s` does not say."""
GRACE_S: Final = 15.0
"""How long the process may take to end after that; longer, and it hangs."""
_TICK_S: Final = 0.1


class TaskPool(CeleryTaskPool):  # type: ignore[misc]  # Celery has no types
    """Threads that run jobs, at most `limit` of each queue at a time.

    SIGTERM, SIGINT, SIGHUP: no new jobs; what runs may end within `worker_drain_s`, and each job is
    acknowledged as it ends. The same signal again, or SIGQUIT: no waiting. Whatever has not ended is left to
    the transport, which requeues it as its channel closes. The process ends with 0, whatever threads do.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # The transport gives each queue `limit` places, so that one cannot take another's: threads too.
        n_queues = max(1, len(self.app.amqp.queues.consume_from))
        self.executor = ThreadPoolExecutor(self.limit * n_queues, thread_name_prefix="job")
        self._drain_s = float(self.app.conf.get("worker_drain_s", DRAIN_S))
        self._running: dict[Future[None], Any] = {}
        # Only added to, and the earliest counts: a signal may come between any two instructions.
        self._deadlines = [math.inf]
        self._stops: SimpleQueue[str] = SimpleQueue()
        # In another thread, where tests run it, the process and its signals are somebody else's.
        self._was_ready = False
        self._is_guest = threading.current_thread() is not threading.main_thread()

    def on_start(self) -> None:
        """Take over signals and those remote commands that Celery would answer with a traceback."""
        Panel.data.update(dict.fromkeys(("pool_grow", "pool_shrink", "autoscale"), self._refuse_resize))
        if not self._is_guest:
            worker_ready.connect(self._on_ready)
            # SIGHUP too: Celery's restart would run our package as a script, whose `celery` is another.
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
                signal.signal(number, self._on_signal)
            threading.Thread(target=self._watch_the_end, name="watch-the-end", daemon=True).start()

    def on_apply(
        self,
        target: Any,
        args: Any = None,
        kwargs: Any = None,
        callback: Any = None,
        accept_callback: Any = None,
        **_: object,
    ) -> ApplyResult:
        """Run a job in a thread."""
        future = self.executor.submit(apply_target, target, args, kwargs, callback, accept_callback)
        self._running[future] = callback.__self__  # the request, a message with its acknowledgement
        future.add_done_callback(self._on_done)
        return ApplyResult(future)

    def on_stop(self) -> None:
        """Requeue the jobs that have not started, and let the others end within the limit."""
        # A transport requeues what it holds only if the worker stops; an error or a remote command says
        # so nowhere else.
        state.should_stop = state.should_stop or EX_OK
        self._deadlines.append(time.monotonic() + self._drain_s)
        self._stops.put("")
        self.executor.shutdown(wait=False, cancel_futures=True)
        if self._running:
            seconds = max(0.0, self._deadline - time.monotonic())
            logger.info("stopping: %d running jobs may end within %.1f s", len(self._running), seconds)
        self._drain()
        self._deadlines.append(time.monotonic())  # what is left to do has `GRACE_S`
        if self._running:
            logger.warning("stopping: %d jobs have not ended and are handed back", len(self._running))
        if not self._is_guest:
            # Connected now, so that whoever else listens has been called before.
            worker_shutdown.connect(_end_process, weak=False)

    def on_terminate(self) -> None:
        """Stop without waiting: Celery itself cannot go on."""
        self._deadlines.append(time.monotonic())
        self.on_stop()

    def terminate_job(self, pid: int, signal: object = None) -> None:
        """Let the thread of a revoked job run; Celery tells the job's caller that it is revoked."""
        del pid, signal
        logger.warning("a thread of a revoked job runs on, since it cannot be ended; its result is dropped")

    def grow(self, n: int = 1) -> None:
        """Do nothing; asked for by Celery's autoscaler only."""
        logger.warning("%s; %d more were asked for", self._fixed_size, n)

    def shrink(self, n: int = 1) -> None:
        """Do nothing; asked for by Celery's autoscaler only."""
        logger.warning("%s; %d fewer were asked for", self._fixed_size, n)

    @property
    def _fixed_size(self) -> str:
        return f"the pool keeps its {self.limit} threads: start another worker process, or one with -c N"

    @property
    def _deadline(self) -> float:
        return min(self._deadlines)

    def _refuse_resize(self, worker: Any, **_: object) -> dict[str, str]:
        """Answer `pool_grow`, `pool_shrink` and `autoscale`; Flower shows the sentence."""
        del worker
        return {"error": self._fixed_size}

    def _get_info(self) -> dict[str, Any]:
        return dict(super()._get_info(), running=len(self._running), drain_s=self._drain_s)

    def _on_done(self, future: Future[None]) -> None:
        request = self._running[future]
        if future.cancelled():
            _requeue(request)
        elif (error := future.exception()) is not None:
            reason = error.reason if isinstance(error, Reject) else type(error).__name__
            logger.error("job handed back: %s", printable(reason), extra={"job_id": request.id})
            if not isinstance(error, Reject):
                # Nobody knows why: it counts as a delivery, so that it cannot come back for ever.
                request.message.channel.qos.fail(request.message.delivery_tag)
            _requeue(request)
        # Last, so that whoever waits for the jobs finds what to do with their messages already arranged.
        del self._running[future]

    def _drain(self) -> None:
        hub = get_event_loop()
        while self._running and (seconds := self._deadline - time.monotonic()) > 0:
            if hub is None:
                wait(list(self._running), timeout=min(seconds, _TICK_S))
                continue
            try:
                hub.run_once()  # acknowledges what has ended
            except Exception as error:  # noqa: BLE001  whatever the transport raises, the jobs may end
                logger.warning("stopping: broker lost: %s", type(error).__name__)
                hub = None

    def _on_signal(self, number: int, frame: object) -> None:
        del frame
        # Models may still be loading where nothing runs: then there is nothing to wait for either.
        at_once = number == signal.SIGQUIT or self._deadline < math.inf or not self._running
        self._deadlines.append(time.monotonic() + (0 if at_once else self._drain_s))
        state.should_stop = EX_OK
        self._stops.put(signal.Signals(number).name)  # the one kind of queue that a signal handler may use

    def _on_ready(self, **_: object) -> None:
        self._was_ready = True
        # What is there now stays: the collector need not look through all of torch again and again.
        gc.collect()
        gc.freeze()

    def _watch_the_end(self) -> None:
        """Do what a signal handler cannot, and end the process if nothing else does."""
        if name := self._stops.get():
            hostname = self.options["initargs"][1]
            worker_shutting_down.send(sender=hostname, sig=name, how="Warm", exitcode=EX_OK)
            if not self._was_ready:
                # A model may load for minutes yet, and nothing there looks at `should_stop`. The handler
                # itself raises nothing: torch runs Python code from C++ as it is imported, and would crash.
                logger.info("stopping: not ready yet, nothing is held")
                logging.shutdown()
                os._exit(EX_OK)
        while time.monotonic() < self._deadline + GRACE_S:
            if (hub := get_event_loop()) is not None:
                hub.call_soon(_nothing)  # wakes it, so that it looks at the signal, the jobs and the time
            time.sleep(_TICK_S)
        logger.critical("stopping: still not ended after %.0f s more; ended by force", GRACE_S)
        os._exit(EX_FAILURE)


def _requeue(request: Any) -> None:
    """Return a job to its queue and free its place."""
    state.task_ready(request)
    request.reject(requeue=True)


def _end_process(sender: Any, **_: object) -> None:
    # An ordinary exit would wait for the threads of jobs that were requeued, maybe for ever.
    atexit._run_exitfuncs()  # flushes logs; Celery saves its state here
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(sender.exitcode or EX_OK)


def _nothing() -> None:
    pass
