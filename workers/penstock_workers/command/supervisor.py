"""Starts the processes of one machine, restarts crashed ones, and stops all of them in order.

Knows commands and exit codes; must not know Redis, Celery or models.
"""

import asyncio
import itertools
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress

from penstock_workers.command.child import Child, Process
from penstock_workers.command.forkserver import ForkServer

_ANSI_COLOURS = (36, 33, 32, 35, 34)
_READY_POLL_S = 0.05
_GRACE_S = 2.0  # on top of the drain limit, for a child to say that it reached it, and to leave
_FIRST_PAUSE_S, _LONGEST_PAUSE_S, _STABLE_AFTER_S = 1.0, 30.0, 60.0
_EARLY_S, _MAX_EARLY_ENDS = 10.0, 3


class StackEndedError(Exception):
    """A signal, or a child that cannot be kept running, ended the stack; nothing runs any more."""

    def __init__(self, exit_code: int, reason: str) -> None:
        super().__init__(reason)
        self.exit_code = exit_code


def write_line(line: str) -> None:
    """Write `line` to stdout at once."""
    # The reader may be gone, as in `penstock up | head`; the children go on.
    with suppress(BrokenPipeError):
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


class Supervisor:
    """Runs children until SIGINT, SIGTERM or SIGHUP comes, or one of them cannot be kept running.

    A child that ends by itself is started again, after 1 s at first and 30 s at most. It ends the
    stack when it exits with `os.EX_CONFIG` (starting it again changes nothing), or three times in a
    row within 10 s; one that is not needed is given up then, and the others go on.

    SIGINT or SIGTERM drains: SIGTERM to the children, highest stage first, SIGKILL to what a stage has left
    after its limit. SIGINT while that goes on is SIGKILL to all at once; SIGTERM is not, for `timeout` and
    some process managers send it twice. SIGHUP, when a terminal is closed, drains too; SIGQUIT never does.

    Each child leads a group outside of our session, so a terminal's Ctrl-C reaches the parent alone; what
    is left of its group when it ends is killed. On Linux the kernel sends a child SIGTERM when the parent
    dies, also of SIGKILL; not to the child's own children. On other systems children outlive a
    parent that was killed, or whose terminal was closed.

    Works in the main thread only: signals and the kernel's promise are tied to it.
    """

    def __init__(
        self, children: Sequence[Child], *, drain_s: float, write: Callable[[str], None] = write_line
    ) -> None:
        """Start nothing yet.

        Args:
            children: The processes to run.
            drain_s: Time for each stage to end after SIGTERM, seconds; 2 s are added.
            write: Called with each line, its prefix included.
        """
        self._limit_s, self._write = drain_s + _GRACE_S, write
        colours = itertools.cycle(_ANSI_COLOURS if _paints() else (None,))
        preloads = {child.preload for child in children if child.preload} if sys.platform == "linux" else ()
        self._servers = {preload: ForkServer(preload, self._reap) for preload in preloads}
        self._processes = [
            Process(
                child,
                self._servers.get(child.preload) if child.preload else None,
                _prefixed(child.name, colour, write),
            )
            for child, colour in zip(children, colours, strict=False)
        ]
        self._stopping = asyncio.Event()
        self._end: StackEndedError | None = None
        self._block: asyncio.Task[object] | None = None

    async def run(self, stop: asyncio.Event | None = None) -> int:
        """Run the children until a signal comes or `stop` is set; return the exit code."""
        try:
            async with self.running():
                await (stop or asyncio.Event()).wait()
        except StackEndedError as end:
            if end.exit_code:  # its first line has scrolled far up by now
                self._say(f"ended: {end}")
            return end.exit_code
        return 0

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run the children while the block runs; none is left when the block is.

        Raises:
            StackEndedError: A signal, or a child that cannot be kept running, cancelled the block.
        """
        self._block = asyncio.current_task()
        try:
            with self._signals():
                try:
                    await self._start_all()
                    yield
                finally:
                    await self._stop_all()
        except asyncio.CancelledError:
            if self._end is None or (self._block and self._block.uncancel()):  # someone else did it
                raise
            raise self._end from None

    def pids(self, stage: int) -> Sequence[int | None]:
        """Return the process numbers of a stage's children; None for a child that has not started yet."""
        return [process.pid for process in self._processes if process.child.stage == stage]

    @contextmanager
    def _signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        numbers = (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
        before = {number: signal.getsignal(number) for number in numbers}
        loop.add_signal_handler(signal.SIGCHLD, self._reap)
        loop.add_signal_handler(signal.SIGINT, self._interrupted)
        for number in (signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._end_block, 0, "stopping")
        loop.add_signal_handler(signal.SIGQUIT, self._end_now)
        try:
            yield
        finally:
            for number, handler in before.items():
                loop.remove_signal_handler(number)
                signal.signal(number, handler or signal.SIG_DFL)

    def _reap(self) -> None:
        for process in self._processes:
            process.reap()

    def _interrupted(self) -> None:
        if self._stopping.is_set():
            self._kill_all()
        else:
            self._end_block(0, "stopping; Ctrl-C again stops without draining")

    def _end_now(self) -> None:
        self._end_block(0, "stopping without draining")
        self._kill_all()

    def _end_block(self, exit_code: int, reason: str) -> None:
        if self._stopping.is_set() or self._block is None:
            return
        self._stopping.set()
        self._say(reason)
        self._end = StackEndedError(exit_code, reason)
        self._block.cancel()

    async def _start_all(self) -> None:
        for stage in self._stages():
            for process in stage:
                process.keeper = asyncio.create_task(self._keep(process))
            for process in stage:
                while process.child.is_ready and not process.child.is_ready():
                    await asyncio.sleep(_READY_POLL_S)

    async def _keep(self, process: Process) -> None:
        name, pause_s, n_early_ends = process.child.name, 0.0, 0
        while not self._stopping.is_set():
            try:
                returncode, lived_s = await process.live()
            except OSError as error:
                return self._give_up(process, 1, f"{name} cannot be started: {error}")
            if self._stopping.is_set():
                return None
            ended = f"{name} ended with {_describe(returncode)} after {lived_s:.1f} s"
            n_early_ends = n_early_ends + 1 if lived_s < _EARLY_S else 0
            if returncode == os.EX_CONFIG:
                return self._give_up(
                    process, os.EX_CONFIG, f"{ended}: its configuration or model cannot be used"
                )
            if n_early_ends == _MAX_EARLY_ENDS:
                return self._give_up(process, 1, f"{ended}, {n_early_ends} times in a row: giving it up")
            pause_s = _next_pause_s(pause_s, lived_s)
            self._say(f"{ended}; starting it again in {pause_s:g} s")
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), pause_s)
        return None

    def _give_up(self, process: Process, exit_code: int, reason: str) -> None:
        if process.child.is_needed:
            self._end_block(exit_code, reason)
        else:
            self._say(f"{reason}; the others go on without it")

    async def _stop_all(self) -> None:
        self._stopping.set()
        try:
            for stage in reversed(self._stages()):
                await self._stop_stage(stage)
        except asyncio.CancelledError:
            self._kill_all()
            await asyncio.wait([process.keeper for process in self._processes if process.keeper])
            raise
        finally:
            for server in self._servers.values():
                server.close()

    async def _stop_stage(self, stage: Sequence[Process]) -> None:
        keepers = {process.keeper: process for process in stage if process.keeper}
        if not keepers:  # stopped before it was started
            return
        for process in stage:
            process.terminate()
        _, late = await asyncio.wait(keepers, timeout=self._limit_s)
        for keeper in late:
            self._say(f"{keepers[keeper].child.name} did not end within {self._limit_s:g} s: killing it")
            keepers[keeper].kill()
        if late:
            await asyncio.wait(late)

    def _kill_all(self) -> None:
        for process in self._processes:
            process.kill()

    def _stages(self) -> list[list[Process]]:
        numbers = sorted({process.child.stage for process in self._processes})
        return [[p for p in self._processes if p.child.stage == number] for number in numbers]

    def _say(self, text: str) -> None:
        self._write(f"penstock | {text}")


def _next_pause_s(pause_s: float, lived_s: float) -> float:
    if lived_s >= _STABLE_AFTER_S:
        return _FIRST_PAUSE_S
    return min(max(2 * pause_s, _FIRST_PAUSE_S), _LONGEST_PAUSE_S)


def _describe(returncode: int) -> str:
    if returncode >= 0:
        return f"exit code {returncode}"
    return f"signal {-returncode} ({signal.strsignal(-returncode)})"


def _paints() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def _prefixed(name: str, colour: int | None, write: Callable[[str], None]) -> Callable[[bytes], None]:
    prefix = f"{name} | " if colour is None else f"\x1b[{colour}m{name} |\x1b[0m "
    return lambda line: write(prefix + line.decode("utf-8", "backslashreplace"))
