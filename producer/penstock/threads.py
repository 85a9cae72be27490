"""Threads for work that blocks, which go on when the main thread has ended.

`concurrent.futures` takes no more work from then on, while a program's other threads may go on for hours.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from queue import SimpleQueue
from typing import Any, Final, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

MOST_THREADS: Final = 8


class Threads(ThreadPoolExecutor):
    """Daemon threads, started as they are needed; asyncio takes nothing for its default but this class' own.

    Where no thread can be started any more, and none is there, the caller's does the work.
    """

    def __init__(self) -> None:
        super().__init__(max_workers=MOST_THREADS)  # starts none
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._counting = threading.Lock()
        self._n_threads = self._n_waiting = 0

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """See `concurrent.futures.Executor.submit`."""
        future: Future[T] = Future()
        order = partial(self._carry_out, future, partial(fn, *args, **kwargs))
        with self._counting:
            self._n_waiting += 1
            if self._n_waiting > self._n_threads and self._n_threads < MOST_THREADS:
                try:
                    threading.Thread(target=self._serve, name="penstock-blocking", daemon=True).start()
                    self._n_threads += 1
                except RuntimeError:  # the interpreter ends, or the system has no more
                    pass
            has_thread = self._n_threads > 0
        if has_thread:
            self._work.put(order)
        else:
            order()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Let the threads end once their work is done; waits for none of them."""
        del wait, cancel_futures
        with self._counting:
            for _ in range(self._n_threads):
                self._work.put(None)
            self._n_threads = 0

    def _serve(self) -> None:
        while (order := self._work.get()) is not None:
            order()
            del order  # or its result would be kept until the next one comes

    def _carry_out(self, future: Future[Any], call: Callable[[], Any]) -> None:
        try:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except BaseException as error:  # noqa: BLE001  it is the caller's
                    future.set_exception(error)
        finally:
            with self._counting:
                self._n_waiting -= 1
