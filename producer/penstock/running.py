"""The thread that a `Client` lives in: an event loop of its own, and the way in for other threads."""

import asyncio
import contextlib
import os
import sys
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, Final, Generic, TypeVar

from penstock.calls import CLOSE_S, CLOSED, TAKE_BACK_S
from penstock.client import AsyncClient
from penstock.connections import redis_errors
from penstock.errors import BrokerUnavailableError, ClientUseError
from penstock.job import AsyncJob
from penstock.threads import Threads
from penstock.urls import mask_url

S = TypeVar("S")

_LOOK_S: Final = 1.0
_IN_CHILD: Final = "it was begun in the parent process; begin it anew in this one"
_IN_ITS_THREAD: Final = "it cannot be waited for in the thread that works for it"
_HALF_PATCHED: Final = "gevent has patched sockets and not threads; let it patch both, or neither"
_ENDING: Final = "the interpreter is ending"

# A forked child keeps what it inherits here: collecting the parent's loop or its connections would change
# the epoll set that both processes share.
_RUNNING: Final[set["Running"]] = set()


class _Work(Generic[S]):
    """A coroutine that another thread waits for, until it has really ended."""

    def __init__(self, loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, S]) -> None:
        self.future: Future[S] = Future()
        self._loop, self._work = loop, work
        self._task: asyncio.Task[S] | None = None
        self._is_left = False
        loop.call_soon_threadsafe(self._begin)

    def leave(self) -> None:
        """Cancel it; from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended, and all in it
            self._loop.call_soon_threadsafe(self._cancel)

    def _begin(self) -> None:
        if self._is_left:
            self._work.close()
            self.future.set_exception(asyncio.CancelledError())
            return
        self._task = self._loop.create_task(self._work)
        self._task.add_done_callback(self._end)

    def _cancel(self) -> None:
        self._is_left = True
        if self._task is not None:
            self._task.cancel()

    def _end(self, task: asyncio.Task[S]) -> None:
        if task.cancelled():
            self.future.set_exception(asyncio.CancelledError())
        elif (error := task.exception()) is not None:
            self.future.set_exception(error)
        else:
            self.future.set_result(task.result())


class Running:
    """An `AsyncClient` in a loop and a thread of its own, in one process.

    Args:
        make: makes the client.

    Attributes:
        client: the client whose methods `run` runs.
    """

    def __init__(self, make: Callable[[], AsyncClient]) -> None:
        self.client, self._pid = make(), os.getpid()
        self._is_closed = False
        with redis_errors(self.client._url):
            try:
                self._home = _home()
            except RuntimeError as error:  # no more threads
                raise BrokerUnavailableError(mask_url(self.client._url), str(error)) from error
        _RUNNING.add(self)

    @property
    def is_inherited(self) -> bool:
        """True in a forked child: its thread stayed with the parent."""
        return self._pid != os.getpid()

    def run(self, work: Coroutine[Any, Any, S]) -> S:
        """Return what `work` returns; whoever leaves before, by any exception, cancels it.

        Raises:
            ClientUseError: it cannot run here; the error tells why.
        """
        carried = self._carry(work)
        try:
            return self._wait_for(carried.future)
        except BaseException as error:
            if not carried.future.done():
                carried.leave()
            if not (carried.future.done() and carried.future.exception() is error):  # else it is the call's
                self._settle(carried.future)
            raise

    async def wait(self, work: Coroutine[Any, Any, S]) -> S:
        """Return what `work` returns; it runs in this loop, the caller waits in their own."""
        carried = self._carry(work)
        answer = asyncio.wrap_future(carried.future)
        answer.add_done_callback(lambda done: done.cancelled() or done.exception())  # its caller may be gone
        try:
            return await asyncio.shield(answer)
        except asyncio.CancelledError:
            if not carried.future.done():
                carried.leave()
            raise

    def leave(self, ending: Callable[[], Coroutine[Any, Any, object]]) -> None:
        """Run the end of something that is left; errors of it, and a client that is gone, are nobody's."""
        if self.is_inherited or self._is_closed or sys.is_finalizing():
            return
        if threading.current_thread() is self._home.thread:  # collected there: nobody could wait
            self.client._calls.later(ending())
            return
        with contextlib.suppress(ClientUseError):
            self.run(ending())

    def close(self) -> None:
        """Close the client, and end its thread."""
        if self.is_inherited or self._is_closed:
            return
        with contextlib.suppress(Exception):
            closing = self._carry(self.client.close())
            self._is_closed = True
            closing.future.result(2 * CLOSE_S)
        self._is_closed = True
        self._home.leave()
        _RUNNING.discard(self)

    def abandon(self) -> None:
        """Close it without waiting: its owner was collected, in whatever thread."""
        if self.is_inherited or self._is_closed or sys.is_finalizing():
            return
        self._is_closed = True
        closing = _Work(self._home.loop, self.client.close())
        closing.future.add_done_callback(lambda _: self._home.leave())
        _RUNNING.discard(self)

    def _carry(self, work: Coroutine[Any, Any, S]) -> _Work[S]:
        problem = ""
        if self.is_inherited:
            problem = _IN_CHILD
        elif self._is_closed:
            problem = CLOSED
        elif sys.is_finalizing():
            problem = _ENDING
        elif threading.current_thread() is self._home.thread:
            problem = _IN_ITS_THREAD
        if not problem:
            try:
                return _Work(self._home.loop, work)
            except RuntimeError:
                problem = CLOSED
        work.close()
        raise ClientUseError(problem)

    def _wait_for(self, future: Future[S]) -> S:
        while True:
            try:
                return future.result(_LOOK_S)
            except TimeoutError:
                if future.done():
                    return future.result()
                if not self._home.thread.is_alive():
                    raise ClientUseError(CLOSED) from None
            except asyncio.CancelledError:
                if self._is_closed:
                    raise ClientUseError(CLOSED) from None
                raise

    def _settle(self, future: Future[Any]) -> None:
        """Wait a moment for what was left: the process may end next. A job nobody heard of is taken back."""
        with contextlib.suppress(Exception, asyncio.CancelledError):
            found = future.result(2 * TAKE_BACK_S)
            for job in found if isinstance(found, list) else [found]:
                if isinstance(job, AsyncJob):
                    _Work(self._home.loop, job.take_back()).future.result(TAKE_BACK_S)
        with contextlib.suppress(Exception):
            _Work(self._home.loop, self.client._calls.settled()).future.result(2 * TAKE_BACK_S)


class _Home:
    """An event loop in a thread."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        # Names of hosts are looked up there, also when the main thread has ended.
        self._threads = Threads()
        self.loop.set_default_executor(self._threads)
        self.thread = threading.Thread(target=self._serve, name="penstock-client", daemon=True)
        try:
            self.thread.start()
        except BaseException:
            self.loop.close()
            raise

    def leave(self) -> None:
        """End it; from any thread."""
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self.loop.stop)
        if threading.current_thread() is not self.thread:
            self.thread.join(CLOSE_S)

    def _serve(self) -> None:
        try:
            self.loop.run_forever()
            tasks = asyncio.all_tasks(self.loop)
            for task in tasks:
                task.cancel()
            if tasks:
                self.loop.run_until_complete(asyncio.wait(tasks, timeout=TAKE_BACK_S))
        finally:
            self._threads.shutdown()
            self.loop.close()


class _SharedHome(_Home):
    """The one loop of a process in which threads are greenlets: two loops cannot run in one real thread."""

    def leave(self) -> None:
        """Stay: other clients live here too."""


_shared: dict[int, _SharedHome] = {}


def _home() -> _Home:
    """Return a home for one client.

    Raises:
        OSError: the process can open no more files.
        RuntimeError: the process can start no more threads.
        ClientUseError: no event loop can run in this process.
    """
    gevent = sys.modules.get("gevent.monkey")
    if not _has_green_threads():
        if gevent is not None and gevent.is_module_patched("select"):
            raise ClientUseError(_HALF_PATCHED)
        return _Home()
    pid = os.getpid()
    if pid not in _shared:
        _shared[pid] = _SharedHome()
    return _shared[pid]


def _has_green_threads() -> bool:
    """Tell whether gevent or eventlet have put greenlets in the place of threads."""
    gevent, eventlet = sys.modules.get("gevent.monkey"), sys.modules.get("eventlet.patcher")
    return bool(
        (gevent is not None and gevent.is_module_patched("threading"))
        or (eventlet is not None and eventlet.is_monkey_patched("thread"))
    )
