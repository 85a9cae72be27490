"""A process to keep running: how it is started, told to end, and how its output becomes lines."""

import asyncio
import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO, Final

from penstock_workers.command.forkserver import Forked, ForkServer, Preload, tie_to_parent

_MAX_LINE_BYTES: Final = 1 << 20
_PIPE_BYTES: Final = 1 << 20  # Source: pipe(7), the largest pipe without privileges


@dataclass(frozen=True, slots=True, kw_only=True)
class Child:
    """A process to keep running.

    Attributes:
        name: Prefix of its log lines, such as `cpu-1`.
        command: Program and arguments.
        environment: Variables, added to the parent's.
        stage: Place in the order of starts: lower stages start first and stop last.
        is_ready: Asked every 50 ms until it says yes; then the next stage starts. Must answer fast.
        preload: Modules of a process that forks this child and others like it, where the kernel ties a child
            to its parent. The command is `python -m MODULE ARGUMENT...` of this interpreter then.
        told: Standard input, 4 KiB at most; not for a child with `preload`.
        umask: Umask of the process; None keeps the parent's.
        is_needed: True if the stack ends with this child; the others go on without one that is not needed.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    stage: int
    is_ready: Callable[[], bool] | None = None
    preload: Preload | None = None
    told: bytes = field(default=b"", repr=False)
    umask: int | None = None
    is_needed: bool = True


class Process:
    """A child's process group, one life after the other.

    Attributes:
        child: The program and how it is run.
        keeper: The task that starts it, again and again; None before its stage is started.
    """

    def __init__(self, child: Child, server: ForkServer | None, write: Callable[[bytes], None]) -> None:
        self.child, self._server, self._write = child, server, write
        self.keeper: asyncio.Task[None] | None = None
        self._life: _Spawned | Forked | None = None
        self._output: _Output
        self._ended: asyncio.Future[int]

    @property
    def pid(self) -> int | None:
        """The process number; None before the first start."""
        return self._life.pid if self._life else None

    async def live(self) -> tuple[int, float]:
        """Run once; return the exit code, or minus the signal, and how long it lived, seconds."""
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        self._ended = loop.create_future()
        pipe, output = os.pipe()
        try:
            if self._server is not None:
                self._life = self._server.fork(self.child.command, self.child.environment, output)
            else:
                self._life = _spawn(self.child, output)
        except OSError:
            os.close(pipe)
            raise
        finally:
            os.close(output)
        self._output = _Output(open(pipe, "rb", buffering=0), self._write)  # noqa: PTH123, SIM115  a pipe, closed with it
        return await self._ended, loop.time() - started_s

    def reap(self) -> None:
        """Notice that it has ended: kill what is left of its group, and write the rest of its output."""
        if self._life is None or self._ended.done() or (returncode := self._life.poll()) is None:
            return
        self.kill()
        self._output.close()
        self._ended.set_result(returncode)

    def terminate(self) -> None:
        """Ask it to end, if it runs."""
        if self._life:
            self._life.terminate()

    def kill(self) -> None:
        """Kill its process group, if it runs."""
        if self._life and not self._ended.done():
            self._life.kill_group()


class _Spawned(subprocess.Popen[bytes]):
    """A program that leads a session of its own."""

    def kill_group(self) -> None:
        # The group may be empty; macOS calls one of zombies a lack of permission.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)


def _spawn(child: Child, output: int) -> _Spawned:
    # Not asyncio's own subprocesses: Python 3.11 gives each a thread, and a thread's lock, held at the
    # fork, is what makes `preexec_fn` unsafe. Here only the main thread runs, but for a look-up of a broker's
    # name while workers start.
    with _input(child.told) as told:
        return _Spawned(
            child.command,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **child.environment},
            stdin=told,
            stdout=output,
            stderr=output,  # one pipe keeps their order
            start_new_session=True,
            umask=-1 if child.umask is None else child.umask,
            preexec_fn=tie_to_parent(),
        )


def _input(told: bytes) -> IO[bytes]:
    """Return a file that holds what a child is told, and then ends."""
    if not told:
        return open(os.devnull, "rb")  # noqa: PTH123  closed by the caller
    theirs, ours = os.pipe()
    os.write(ours, told)  # a pipe takes that much without a reader
    os.close(ours)
    return open(theirs, "rb")  # noqa: PTH123  closed by the caller


class _Output:
    """Cuts the output of a process into lines."""

    def __init__(self, pipe: IO[bytes], write: Callable[[bytes], None]) -> None:
        self._pipe, self._write, self._partial = pipe, write, b""
        os.set_blocking(pipe.fileno(), False)
        asyncio.get_running_loop().add_reader(pipe, self._read)

    def close(self) -> None:
        """Write what is left, a line without an end too."""
        if self._pipe.closed:
            return
        asyncio.get_running_loop().remove_reader(self._pipe)
        # One read, not until the end: a daemon that left the group may hold the pipe for ever.
        self._take(self._pipe.read(_PIPE_BYTES) or b"")
        self._pipe.close()
        if self._partial:
            self._write(self._partial)

    def _read(self) -> None:
        chunk = self._pipe.read(_PIPE_BYTES)
        if chunk == b"":
            self.close()
        elif chunk:  # None: nothing there after all
            self._take(chunk)

    def _take(self, chunk: bytes) -> None:
        *lines, self._partial = (self._partial + chunk).split(b"\n")
        if len(self._partial) > _MAX_LINE_BYTES:
            lines, self._partial = [*lines, self._partial], b""
        for line in lines:
            self._write(line)
