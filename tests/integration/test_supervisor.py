"""The supervisor over real processes: what they print, how they end, and who ends them."""

import asyncio
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from penstock_workers.command.child import Child
from penstock_workers.command.forkserver import Preload
from penstock_workers.command.supervisor import StackEndedError, Supervisor
from tests.eventually import eventually

WAIT = "import signal; signal.pause()"
SAY_UP_THEN_WAIT = "import signal; print('up'); signal.pause()"
SAY_DOWN_ON_SIGTERM = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (print("down"), sys.exit()))
signal.signal(signal.SIGINT, lambda *_: print("interrupted"))
print("up")
while True: signal.pause()
"""
IGNORE_SIGTERM = """
import signal, subprocess
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("pid", subprocess.Popen(["sleep", "60"]).pid)
signal.pause()
"""
# Starts the programs it is given as `name=source`, all in one stage, until a signal comes.
PARENT = """
import asyncio, sys
from penstock_workers.command.supervisor import Supervisor
from tests.integration.test_supervisor import child, fork
fork(sys.argv[1] == "forked")
children = []
for stage, argument in enumerate(sys.argv[2:]):
    name, _, source = argument.partition("=")
    children.append(child(name, "import os; print('pid', os.getpid())\\n" + source, stage=stage))
sys.exit(asyncio.run(Supervisor(children, drain_s=60).run()))
"""


def says_up_and_down(name: str, lines: list[str], *, stage: int = 1) -> Child:
    """Describe a child that is ready when it has said so in `lines`."""
    return child(name, SAY_DOWN_ON_SIGTERM, stage=stage, is_ready=lambda: f"{name} | up" in lines)


def child(name: str, source: str, *, stage: int = 1, is_ready: Callable[[], bool] | None = None) -> Child:
    """Describe a small Python program as a child."""
    command = [sys.executable, "-m", "tests.integration.program", source]
    return Child(name=name, command=command, environment={}, stage=stage, is_ready=is_ready, preload=_preload)


_preload: Preload | None = None


def fork(is_forked: bool) -> None:
    """Let children be forked from now on, or started by themselves."""
    global _preload
    _preload = Preload(modules=("decimal", "no.such.module")) if is_forked else None


@pytest.fixture(autouse=True, params=["spawned", "forked"])
def _way(request: pytest.FixtureRequest) -> str:
    """Run each test with programs that are started by themselves, and with forks."""
    fork(request.param == "forked")
    return str(request.param)


async def until(check: Callable[[], object]) -> None:
    """Wait like `eventually`, and let the loop run."""
    async with asyncio.timeout(10):
        while not check():
            await asyncio.sleep(0.01)


def run_until(
    check: Callable[[list[str]], object], *children: Child, drain_s: float = 5
) -> tuple[int, list[str]]:
    """Run `children` until `check` says yes to their lines, or the stack ends; return exit code and lines."""
    lines: list[str] = []

    async def main() -> int:
        stop = asyncio.Event()
        stack = asyncio.create_task(Supervisor(children, drain_s=drain_s, write=lines.append).run(stop))
        await until(lambda: stack.done() or check(lines))
        stop.set()
        return await stack

    return asyncio.run(main()), lines


def never(lines: list[str]) -> bool:
    """Leave the end to the stack itself."""
    return False


@contextmanager
def parent_process(output: Path, *programs: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process with a supervisor in it, as the leader of a group, its output in a file."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with output.open("wb") as sink:
        command = [sys.executable, "-c", PARENT, "forked" if _preload else "spawned", *programs]
        process = subprocess.Popen(command, stdout=sink, env=environment, start_new_session=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def printed_pids(output: Path) -> list[int]:
    """Return the process ids that children printed."""
    return [int(pid) for pid in re.findall(r"\| pid (\d+)", output.read_text())]


def is_alive(pid: int) -> bool:
    """Say whether process `pid` runs; on Linux, a zombie that nobody has waited for does not."""
    try:
        os.kill(pid, 0)
        return sys.platform != "linux" or ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_every_line_carries_the_name() -> None:
    """Both streams, a long line, bytes that are no UTF-8 and a last line without its end arrive whole."""
    talker = """
import os, signal
signal.signal(signal.SIGTERM, lambda *_: (os.write(1, b"no "), os.write(2, b"end"), os._exit(0)))
for piece in (b"out\\n", b"x" * 300_000 + b"\\n", b"\\xff \\xc3\\xa4\\n", b"two\\nlines\\n"):
    os.write(1, piece)
signal.pause()
"""

    code, lines = run_until(lambda lines: len(lines) == 5, child("talker", talker))

    assert code == 0
    wanted = ["out", "x" * 300_000, "\\xff ä", "two", "lines", "no end"]
    assert lines == [f"talker | {text}" for text in wanted]


def test_the_environment_is_added_to_ours() -> None:
    """A child sees its own variables and the parent's."""
    source = "import os, signal; print(os.environ['POOL'], 'PATH' in os.environ); signal.pause()"

    _, lines = run_until(len, replace(child("cpu-1", source), environment={"POOL": "cpu"}))

    assert lines == ["cpu-1 | cpu True"]


@pytest.mark.parametrize(
    ("end", "told"),
    [("os._exit(3)", "exit code 3"), ("os.kill(os.getpid(), 9)", "signal 9 (Killed)")],
)
def test_a_crashed_child_is_started_again(tmp_path: Path, end: str, told: str) -> None:
    """One line says how it ended and when it starts again; then it does."""
    mark = tmp_path / "first-life"
    source = f"""
import os, pathlib, signal
mark = pathlib.Path({str(mark)!r})
if not mark.exists():
    mark.touch()
    {end}
print("second life")
signal.pause()
"""

    code, lines = run_until(lambda lines: "crasher | second life" in lines, child("crasher", source))

    assert code == 0
    assert len(lines) == 2
    assert re.fullmatch(
        rf"penstock \| crasher ended with {re.escape(told)} after [\d.]+ s; starting it again in 1 s",
        lines[0],
    )


def test_a_child_that_cannot_use_its_configuration_ends_the_stack() -> None:
    """Exit code 78 stops the others in order and becomes ours; the reason is said again at the end."""
    lines: list[str] = []
    children = [
        says_up_and_down("neighbour", lines, stage=0),
        child("hopeless", "import os; os._exit(78)"),
    ]

    code = asyncio.run(Supervisor(children, drain_s=5, write=lines.append).run())

    assert code == 78
    assert lines[0] == "neighbour | up"
    assert re.fullmatch(
        r"penstock \| hopeless ended with exit code 78 after .* s: its configuration or model cannot be used",
        lines[1],
    )
    assert lines[2:] == ["neighbour | down", lines[1].replace("| ", "| ended: ")]


def test_a_child_that_never_lives_long_ends_the_stack() -> None:
    """Three ends in a row within 10 s of life are enough; the pauses between them double."""
    code, lines = run_until(never, child("mayfly", "raise SystemExit(1)"))

    assert code == 1
    assert [line.rpartition("; ")[2] for line in lines[:2]] == [
        "starting it again in 1 s",
        "starting it again in 2 s",
    ]
    assert lines[2].endswith("3 times in a row: giving it up")
    assert lines[3:] == [lines[2].replace("| ", "| ended: ")]


@pytest.mark.parametrize("end", ["os._exit(1)", "os._exit(78)"])
def test_a_child_that_is_not_needed_is_given_up(end: str) -> None:
    """The others work on, and are not started anew."""
    lines: list[str] = []
    page = replace(child("page", f"import os; {end}", stage=2), is_needed=False)

    async def main() -> None:
        stack = Supervisor([says_up_and_down("cpu", lines), page], drain_s=5, write=lines.append)
        async with stack.running():
            await until(lambda: lines[-1:] and lines[-1].endswith("; the others go on without it"))
            lines.append("working")

    asyncio.run(main())

    assert lines[0] == "cpu | up"
    assert "page ended with exit code" in lines[-3]
    assert lines[-2:] == ["working", "cpu | down"]


def test_a_command_that_does_not_exist_ends_the_stack() -> None:
    """What cannot be started at all is told with its path, once."""
    code, lines = run_until(
        never, Child(name="absent", command=["/no/such/program"], environment={}, stage=0)
    )

    assert code == 1
    reason = "absent cannot be started: [Errno 2] No such file or directory: '/no/such/program'"
    assert lines == [f"penstock | {reason}", f"penstock | ended: {reason}"]


def test_stages_start_upwards_and_stop_downwards() -> None:
    """A stage starts when the one below it is ready, and is gone before the one below it is stopped."""
    lines: list[str] = []

    children = [
        says_up_and_down(name, lines, stage=stage)
        for name, stage in (("flower", 2), ("redis", 0), ("cpu", 1))
    ]

    async def main() -> None:
        stack = Supervisor(children, drain_s=5, write=lines.append)
        async with stack.running():
            lines.append("all up")

    asyncio.run(main())

    ups = ["redis | up", "cpu | up", "flower | up"]
    assert lines == [*ups, "all up", "flower | down", "cpu | down", "redis | down"]


def test_a_block_is_cancelled_with_its_stack() -> None:
    """Whoever works while the children run learns why they ended; none is left then."""
    lines: list[str] = []

    async def main() -> None:
        stack = Supervisor([child("hopeless", "import os; os._exit(78)")], drain_s=5, write=lines.append)
        async with stack.running():
            await asyncio.Event().wait()

    with pytest.raises(StackEndedError, match="hopeless ended with exit code 78") as caught:
        asyncio.run(main())

    assert caught.value.exit_code == 78


def test_a_foreign_cancellation_drains_and_goes_on() -> None:
    """`asyncio.timeout` around the stack works as around anything else."""
    lines: list[str] = []

    async def main() -> None:
        stack = Supervisor([child("cpu", SAY_DOWN_ON_SIGTERM)], drain_s=5, write=lines.append)
        async with asyncio.timeout(None) as limit:
            async with stack.running():
                await until(lambda: lines)
                limit.reschedule(0)
                await asyncio.Event().wait()

    with pytest.raises(TimeoutError):
        asyncio.run(main())

    assert lines == ["cpu | up", "cpu | down"]


def test_what_does_not_drain_in_time_is_killed() -> None:
    """After the limit the child dies, and with it what it had started."""
    code, lines = run_until(len, child("deaf", IGNORE_SIGTERM), drain_s=0.1)

    assert code == 0
    assert lines[1:] == ["penstock | deaf did not end within 2.1 s: killing it"]
    grandchild = int(lines[0].rpartition(" ")[2])
    eventually(lambda: not is_alive(grandchild))


def test_a_crash_leaves_nothing_behind() -> None:
    """What a child had started in its group does not survive it, nor hold up the next life."""
    source = "import subprocess, os; print(subprocess.Popen(['sleep', '60']).pid); os._exit(78)"

    code, lines = run_until(never, child("littering", source))

    assert code == 78
    grandchild = int(lines[0].rpartition(" ")[2])
    eventually(lambda: not is_alive(grandchild))


def test_ctrl_c_reaches_only_the_parent(tmp_path: Path) -> None:
    """The terminal's signal to the whole group becomes one SIGTERM for each child, and exit code 0."""
    output = tmp_path / "output"
    with parent_process(output, f"cpu={SAY_DOWN_ON_SIGTERM}") as parent:
        eventually(lambda: "cpu | up\n" in output.read_text(), within_s=10)

        os.killpg(parent.pid, signal.SIGINT)
        code = parent.wait(timeout=10)

    assert code == 0
    assert "interrupted" not in output.read_text()
    assert output.read_text().endswith("stops without draining\ncpu | down\n")


def test_a_second_ctrl_c_kills_at_once(tmp_path: Path) -> None:
    """Nobody has to wait for a drain: children of all stages are gone, whatever they ignore."""
    output = tmp_path / "output"
    with parent_process(output, f"low={IGNORE_SIGTERM}", f"high={IGNORE_SIGTERM}") as parent:
        eventually(lambda: len(printed_pids(output)) == 4, within_s=10)

        parent.send_signal(signal.SIGINT)
        eventually(lambda: "stopping" in output.read_text())
        parent.send_signal(signal.SIGINT)
        code = parent.wait(timeout=10)

    assert code == 0
    eventually(lambda: not any(map(is_alive, printed_pids(output))))


def test_a_second_sigterm_changes_nothing(tmp_path: Path) -> None:
    """`timeout` sends two within a moment; the children are given their time all the same."""
    slow = SAY_DOWN_ON_SIGTERM.replace("(print(", "(time.sleep(0.5), print(")
    output = tmp_path / "output"
    with parent_process(output, f"cpu={slow}") as parent:
        eventually(lambda: "cpu | up\n" in output.read_text(), within_s=10)

        parent.send_signal(signal.SIGTERM)
        eventually(lambda: "stopping" in output.read_text())
        parent.send_signal(signal.SIGTERM)
        code = parent.wait(timeout=10)

    assert code == 0
    assert output.read_text().endswith("penstock | stopping\ncpu | down\n")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent died")
def test_no_child_outlives_a_killed_parent(tmp_path: Path) -> None:
    """After kill -9 of the parent, which can do nothing any more, its children end."""
    output = tmp_path / "output"
    with parent_process(output, f"low={WAIT}", f"high={WAIT}") as parent:
        eventually(lambda: len(printed_pids(output)) == 2, within_s=10)

        parent.kill()
        parent.wait(timeout=10)

    eventually(lambda: not any(map(is_alive, printed_pids(output))))


@pytest.mark.parametrize(("no_color", "prefix"), [("", "\x1b[36mcpu |\x1b[0m up"), ("1", "cpu | up")])
def test_colour_is_for_terminals(no_color: str, prefix: str) -> None:
    """On a terminal a name has its colour, unless NO_COLOR is set."""
    terminal, its_end = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "NO_COLOR": no_color}
    command = [sys.executable, "-c", PARENT, "forked" if _preload else "spawned", f"cpu={SAY_UP_THEN_WAIT}"]
    shown = b""

    with subprocess.Popen(command, stdout=its_end, env=environment, start_new_session=True) as parent:
        os.close(its_end)
        while b"up\r\n" not in shown:
            shown += os.read(terminal, 1024)
        parent.terminate()
    os.close(terminal)

    assert shown.decode().splitlines()[1] == prefix
