"""Forks Python programs from a process that has imported what all of them need, so that it is in memory once.

`ForkServer` is the supervisor's side of the link; the other side is this module, run as a program. The fork
server of multiprocessing makes its caller wait while it imports, and skips what a program does at its exit.
"""

import asyncio
import ctypes
import errno
import gc
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import count
from typing import Any, Final

_MOST_BYTES: Final = 1 << 16  # of a message between the two
_PR_SET_PDEATHSIG: Final = 1  # Source: linux/prctl.h


@dataclass(frozen=True, slots=True, kw_only=True)
class Preload:
    """What a fork server holds before it forks.

    Attributes:
        modules: Modules to import. A child imports again what could not be imported, and says why.
        environment: Variables that libraries read as they load.
    """

    modules: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class _Order:
    """A message to the server: to fork a child whose output goes to `output`, or to send it a signal."""

    number: int
    told: bytes
    output: int | None = None


class Forked:
    """A child of a fork server, with the methods of `subprocess.Popen` that a supervisor needs.

    It leads a process group of its own. When it has ended, the rest of the group is killed.

    Attributes:
        pid: Process number; None until the child is forked.
        returncode: Exit code, or minus the signal that ended the child; None until it has ended.
    """

    def __init__(self, signal_: Callable[[int], None]) -> None:
        self._signal = signal_
        self.pid: int | None = None
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return `returncode`."""
        return self.returncode

    def terminate(self) -> None:
        """Send it SIGTERM."""
        self._signal(signal.SIGTERM)

    def kill_group(self) -> None:
        """Kill it and what it has started."""
        self._signal(signal.SIGKILL)


class ForkServer:
    """Starts a fork server with the first child, and another one if it dies.

    Works in a running asyncio loop. A child that is asked for while the server imports is forked afterwards.

    Args:
        preload: Modules to import, and their variables.
        on_end: Called when children have ended.
    """

    def __init__(self, preload: Preload, on_end: Callable[[], None]) -> None:
        self._preload, self._on_end = preload, on_end
        self._numbers = count()
        self._children: dict[int, Forked] = {}  # that have not ended
        self._unsent: deque[_Order] = deque()  # first what was asked for first
        self._link: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._is_ready = False

    def fork(self, command: Sequence[str], environment: Mapping[str, str], output: int) -> Forked:
        """Start a child; does not wait for it.

        Args:
            command: Command line of this interpreter: `python -m MODULE ARGUMENT...`.
            environment: Variables, added to ours.
            output: File descriptor for standard output and standard error.

        Raises:
            OSError: The server cannot be started, or the arguments are too long.
        """
        executable, option, *arguments = command
        assert (executable, option) == (sys.executable, "-m"), command
        number = next(self._numbers)
        order = {"number": number, "arguments": arguments, "environment": dict(environment)}
        if len(told := json.dumps(order).encode()) > _MOST_BYTES:
            raise OSError(errno.E2BIG, os.strerror(errno.E2BIG))
        if self._link is None:
            self._start()
        self._children[number] = Forked(partial(self._signal, number))
        self._unsent.append(_Order(number, told, os.dup(output)))
        self._send()
        return self._children[number]

    def close(self) -> None:
        """End the server, and what is left of its children."""
        if self._link is not None:
            self._lose(self._link)

    def _signal(self, number: int, signal_number: int) -> None:
        for order in self._unsent:
            if order.number == number and order.output is not None:  # not born yet
                os.close(order.output)
                self._unsent.remove(order)
                self._end(number, -signal_number)
                return
        if number in self._children:
            told = {"number": number, "signal": signal_number}
            self._unsent.append(_Order(number, json.dumps(told).encode()))
            self._send()

    def _send(self) -> None:
        """Send as many orders as the server takes now, the rest later; nothing while it imports."""
        loop, link = asyncio.get_running_loop(), self._link
        if link is None or not self._is_ready:
            return
        loop.remove_writer(link)
        while self._unsent:
            order = self._unsent[0]
            try:
                socket.send_fds(link, [order.told], [] if order.output is None else [order.output])
            except BlockingIOError:
                loop.add_writer(link, self._send)
                return
            except OSError:  # the server has died: `_read` hears of it next
                return
            self._unsent.popleft()
            if order.output is not None:
                os.close(order.output)

    def _end(self, number: int, returncode: int) -> None:
        self._children.pop(number).returncode = returncode
        self._on_end()

    def _start(self) -> None:
        link, its_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with its_end:
            command = [sys.executable, "-m", __name__, str(its_end.fileno()), *self._preload.modules]
            self._process = subprocess.Popen(  # noqa: S603  # our own interpreter
                command,
                env=os.environ | dict(self._preload.environment),
                stdin=subprocess.DEVNULL,
                pass_fds=[its_end.fileno()],
                start_new_session=True,
                preexec_fn=tie_to_parent(),
            )
        self._link, self._is_ready = link, False
        link.setblocking(False)
        asyncio.get_running_loop().add_reader(link, self._read, link)

    def _read(self, link: socket.socket) -> None:
        while link is self._link:
            try:
                message = link.recv(_MOST_BYTES)
            except BlockingIOError:
                return
            except ConnectionError:
                message = b""
            if not message:
                self._lose(link)
                return
            told = json.loads(message)
            if "number" not in told:
                self._is_ready = True
                self._send()
            elif "pid" in told:
                self._children[told["number"]].pid = told["pid"]
            else:
                self._end(told["number"], told["returncode"])

    def _lose(self, link: socket.socket) -> None:
        """End a server, if it has not died, and all of its children."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(link)
        loop.remove_writer(link)
        link.close()
        self._link = None
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        while self._unsent:
            if (output := self._unsent.popleft().output) is not None:
                os.close(output)
        for number, child in list(self._children.items()):
            if child.pid is not None:
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(child.pid, signal.SIGKILL)
            self._end(number, -signal.SIGKILL)


def main() -> None:
    """Import, then fork a process for each order, which runs the program that the order names."""
    link = socket.socket(fileno=int(sys.argv[1]))
    for name in sys.argv[2:]:
        with suppress(Exception):  # a child imports it again, and says what is wrong
            import_module(name)
    gc.collect()
    gc.freeze()  # a child's garbage collection would write to these pages, and so copy them
    order = _serve(link)
    if order is not None:
        module, *arguments = order["arguments"]
        sys.argv[:] = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)


def _serve(link: socket.socket) -> dict[str, Any] | None:
    """Fork until the supervisor has gone. Return None then, and in each child its order."""
    server, children = os.getpid(), dict[int, int]()
    # Each child gets its own signal. Blocked, not ignored: a signal before the child is set up must be kept.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    signal.signal(signal.SIGCHLD, lambda *_: None)
    wakes, wake = socket.socketpair()
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno())
    _tell(link, {})
    with wakes, wake, link, selectors.DefaultSelector() as selector:
        selector.register(link, selectors.EVENT_READ)
        selector.register(wakes, selectors.EVENT_READ)
        while True:
            ready = [key.fileobj for key, _ in selector.select()]
            if wakes in ready:
                wakes.recv(4096)
                _reap(link, children)
            if link not in ready:
                continue
            message, files, *_ = socket.recv_fds(link, _MOST_BYTES, 1)
            if not message:
                return None
            order: dict[str, Any] = json.loads(message)
            if "signal" in order:
                _send_signal(children, order)
                continue
            if (pid := os.fork()) == 0:
                _settle_in(order, files[0], server)
                return order
            os.close(files[0])
            with suppress(PermissionError, ProcessLookupError):
                os.setpgid(pid, pid)
            children[pid] = order["number"]
            _tell(link, {"number": order["number"], "pid": pid})


def _settle_in(order: Mapping[str, Any], output: int, server: int) -> None:
    """Make a fork look like a program that was started by itself."""
    os.setpgid(0, 0)  # the server does it too: either may come first
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if (tie := tie_to_parent(server)) is not None:
        tie()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True, write_through=True)  # type: ignore[union-attr]  # both are of the kind that can
    os.environ.update(order["environment"])


def _reap(link: socket.socket, children: dict[int, int]) -> None:
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        returncode = os.waitstatus_to_exitcode(status)
        _tell(link, {"number": children.pop(pid), "returncode": returncode})


def _send_signal(children: Mapping[int, int], order: Mapping[str, Any]) -> None:
    for pid, number in children.items():
        if number == order["number"]:
            send = os.kill if order["signal"] == signal.SIGTERM else os.killpg
            send(pid, order["signal"])


def tie_to_parent(parent: int | None = None) -> Callable[[], None] | None:
    """Return what a child calls so that it gets SIGTERM when its parent dies; None where no kernel does that.

    Args:
        parent: Process number of the parent; None for the calling process.
    """
    if sys.platform != "linux":
        return None
    # Looked up before the fork, because a child should do as little as possible. The kernel watches the
    # thread that forked, not the whole parent.
    prctl, expected = ctypes.CDLL(None).prctl, parent or os.getpid()
    prctl.argtypes = (ctypes.c_int, ctypes.c_ulong)

    def tie() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != expected:  # it died before the kernel was asked
            os._exit(os.EX_UNAVAILABLE)

    return tie


def _tell(link: socket.socket, told: Mapping[str, Any]) -> None:
    with suppress(OSError):  # the supervisor has gone: the loop sees that next
        link.send(json.dumps(told).encode())


if __name__ == "__main__":
    main()
