"""What forks share, and how they end when their server does."""

import asyncio
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from penstock_workers.command.child import Child
from penstock_workers.command.forkserver import ForkServer, Preload
from penstock_workers.command.supervisor import Supervisor
from tests.integration.test_supervisor import is_alive, until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="children are forked on Linux alone")

SAY_WHO = """
import atexit, os, signal, sys, shared
signal.signal(signal.SIGTERM, lambda *_: sys.exit())
atexit.register(print, "left in order")
print(os.getpid(), os.getppid(), shared.PID, sys.argv[1:] == [sys.argv[1]], os.environ["OMP_NUM_THREADS"])
signal.pause()
"""


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module that writes down where it was imported."""
    path = tmp_path / "shared.py"
    path.write_text("import os\nPID = os.getpid()\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    return path


def forked(name: str, source: str) -> Child:
    """Describe a child that is forked from a process with the module."""
    return Child(
        name=name,
        command=[sys.executable, "-m", "tests.integration.program", source],
        environment={},
        stage=0,
        preload=Preload(modules=("shared",), environment=(("OMP_NUM_THREADS", "3"),)),
    )


def pids(line: str) -> tuple[int, int, int]:
    """Return process, parent, and where the module was imported, of a line that a child printed."""
    own, parent, importer, *rest = line.split(" | ")[1].split()
    assert rest == ["True", "3"]
    return int(own), int(parent), int(importer)


def test_what_was_imported_is_there_once(shared: Path) -> None:
    """Children have one parent, which imported for them; each leaves as a program does."""
    lines: list[str] = []

    async def main() -> None:
        stack = Supervisor([forked("a", SAY_WHO), forked("b", SAY_WHO)], drain_s=5, write=lines.append)
        async with stack.running():
            await until(lambda: len(lines) == 2)

    asyncio.run(main())

    (first, *server), (second, *same_server) = map(pids, lines[:2])
    assert server == same_server
    assert len({*server, first, second, os.getpid()}) == 4
    assert sorted(lines[2:]) == ["a | left in order", "b | left in order"]
    assert not any(map(is_alive, (first, second, *server)))


def test_a_crash_does_not_import_again(shared: Path) -> None:
    """The next life comes from the same server."""
    lines: list[str] = []

    async def main() -> None:
        async with Supervisor([forked("a", SAY_WHO)], drain_s=5, write=lines.append).running():
            await until(lambda: lines)
            os.kill(pids(lines[0])[0], signal.SIGKILL)
            await until(lambda: len(lines) == 3)

    asyncio.run(main())

    assert "a ended with signal 9 (Killed)" in lines[1]
    assert pids(lines[0])[1:] == pids(lines[2])[1:]


def test_children_do_not_outlive_their_server(shared: Path) -> None:
    """Killed, it takes them along, and another one starts them again."""
    lines: list[str] = []

    async def main() -> None:
        children = [forked("a", SAY_WHO), forked("b", SAY_WHO)]
        async with Supervisor(children, drain_s=5, write=lines.append).running():
            await until(lambda: len(lines) == 2)
            os.kill(pids(lines[0])[1], signal.SIGKILL)
            await until(lambda: len(lines) >= 6 and sum("True 3" in line for line in lines) == 4)

    asyncio.run(main())

    lives = [pids(line) for line in lines if "True 3" in line]
    assert len({server for _, server, _ in lives}) == 2
    assert not any(is_alive(pid) for life in lives for pid in life)


def test_nobody_waits_for_imports_to_stop(shared: Path) -> None:
    """A stack that is stopped while its server imports is gone at once."""
    shared.write_text("import os, time\nprint('importing', os.getpid(), flush=True)\ntime.sleep(60)\n")
    lines: list[str] = []

    async def main() -> None:
        stack = Supervisor([forked("a", SAY_WHO), forked("b", SAY_WHO)], drain_s=60, write=lines.append)
        async with stack.running():
            await asyncio.sleep(1)

    began = time.monotonic()
    asyncio.run(main())

    assert time.monotonic() - began < 5
    assert lines == []


def test_a_signal_right_after_birth_is_not_lost() -> None:
    """A child that is told to end before it has looked around ends."""
    command = [sys.executable, "-m", "tests.integration.program", "import time; time.sleep(60)"]

    async def main() -> None:
        server = ForkServer(Preload(modules=()), lambda: None)
        children = [server.fork(command, {}, 1)]
        await until(lambda: children[0].pid)
        for number in range(200):  # more than the link holds at once
            children.append(server.fork(command, {"PADDING": "x" * 2000}, 1))
            if number % 2:
                children[-1].terminate()
        for child in children:
            child.terminate()  # those that were told hear of it twice
        await until(lambda: all(child.poll() is not None for child in children))
        assert {child.returncode for child in children} == {-signal.SIGTERM}
        server.close()

    asyncio.run(main())


def test_arguments_that_are_too_long_are_told() -> None:
    """As `exec` tells them, and other children live."""
    command = [sys.executable, "-m", "tests.integration.program", "import time; time.sleep(60)"]

    async def main() -> None:
        server = ForkServer(Preload(modules=()), lambda: None)
        child = server.fork(command, {}, 1)
        with pytest.raises(OSError, match="Argument list too long"):
            server.fork(command, {"PADDING": "x" * 100_000}, 1)
        await until(lambda: child.pid)
        server.close()
        assert child.returncode == -signal.SIGKILL

    asyncio.run(main())
