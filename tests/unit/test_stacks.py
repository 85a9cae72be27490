"""Files of running stacks: real files and locks, of processes that are killed."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from penstock import Client
from penstock.errors import BrokerUnavailableError, ConfigError
from penstock.stacks import (
    RunningStack,
    announced,
    choose_stack,
    find_stacks,
    stack_at,
    stacks_folder,
    tell_elsewhere,
    with_password,
    without_login,
)
from penstock_workers.configuration import load_settings
from penstock_workers.running_stack import load_with_stack

STACK = RunningStack(
    pid=4711,
    folder="/somewhere",
    broker_url="redis://127.0.0.1:7001/0",
    results_url="redis://127.0.0.1:7001/1",
    password="hush",
    models=("minilm",),
)
ANOTHER = replace(
    STACK, pid=4712, folder="/elsewhere", broker_url="redis://127.0.0.1:7002/0", password="shush"
)
RUN = """
import sys, time
from penstock.stacks import RunningStack, announced
with announced(RunningStack(pid=1, folder="/killed", broker_url="redis://127.0.0.1:7003/0", results_url="")):
    print("there", flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def _own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep to a folder of this test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@contextmanager
def killed() -> Iterator[None]:
    """Leave what a stack leaves that was killed."""
    process = subprocess.Popen([sys.executable, "-c", RUN], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process, process.stdout:
        assert process.stdout.readline() == b"there\n"
        assert [stack.is_alive for stack in find_stacks()] == [True]
        process.kill()
    yield


def test_a_stack_is_found_while_it_runs() -> None:
    """Everything is told, to this user alone, and nothing is left."""
    os.umask(old := os.umask(0))
    with announced(STACK):
        found = find_stacks()
        (file,) = stacks_folder().iterdir()
        modes = [path.stat().st_mode & 0o777 for path in (stacks_folder(), file)]

    assert list(found) == [STACK]
    assert modes == [0o700, 0o600]
    assert "hush" not in repr(found) + str(found[0])
    assert find_stacks() == []
    assert os.umask(old) == old


def test_a_stack_that_was_killed_is_told_from_one_that_runs() -> None:
    """Its file is left, and says so whoever has its process number now; the next stack takes it away."""
    with killed():
        (left,) = find_stacks()
        with announced(STACK):
            found = find_stacks()

    assert not left.is_alive
    assert left.pid == 1  # which runs, as another program
    assert list(found) == [STACK]


def test_the_stack_of_this_folder_is_meant_else_the_only_one() -> None:
    """Of two, the one that was started here; elsewhere they are named, with no password."""
    assert choose_stack([], Path("/somewhere")) is None
    assert choose_stack([STACK, ANOTHER], Path("/somewhere")) == STACK
    assert choose_stack([ANOTHER], Path("/somewhere")) == ANOTHER
    with pytest.raises(ConfigError, match=r"go to the folder.*--set redis\.broker_url.*7001.*7002") as caught:
        choose_stack([STACK, ANOTHER], Path("/"))
    assert "hush" not in str(caught.value)


def test_a_stack_that_was_killed_in_this_folder_is_told() -> None:
    """Nobody is shown another server instead; one that runs again is meant."""
    left = replace(STACK, is_alive=False)

    with pytest.raises(BrokerUnavailableError, match="process 4711, started in this folder, has ended"):
        choose_stack([left], Path("/somewhere"))
    with pytest.raises(BrokerUnavailableError):
        choose_stack([left, ANOTHER], Path("/somewhere"))
    assert choose_stack([left], Path("/elsewhere")) is None
    assert choose_stack([left, replace(STACK, pid=5)], Path("/somewhere")) == replace(STACK, pid=5)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "LOCALHOST", "[::1]"])
def test_a_client_of_this_user_needs_no_password(host: str) -> None:
    """The URL that `penstock up` prints is enough, by each name of this machine, for each of two stacks."""
    with announced(STACK), announced(ANOTHER):
        assert with_password(f"redis://{host}:7001/0") == f"redis://:hush@{host}:7001/0"
        assert with_password(f"redis://{host}:7002/3") == f"redis://:shush@{host}:7002/3"
        assert Client(f"redis://{host.lower()}:7001/0")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_settings_of_this_user_need_no_password(host: str) -> None:
    """Workers and Celery's commands, told the URL that `penstock up` prints, are let in like clients."""
    named = {"redis.broker_url": f"redis://{host}:7001/0", "redis.results_url": f"redis://{host}:7001/1"}
    with announced(STACK):
        found = load_settings(arguments=named, environ={}).settings
        own = load_settings(arguments=named | {"redis.password": "mine"}, environ={}).settings

        assert found.broker_url == f"redis://:hush@{host}:7001/0"
        assert found.results_url == f"redis://:hush@{host}:7001/1"
        assert own.broker_url == f"redis://:mine@{host}:7001/0"
        assert "hush" not in repr(found)


def test_results_are_where_the_stack_that_is_named_has_them() -> None:
    """Whoever names the broker of a stack alone, has no other result store than its workers."""
    with announced(STACK), announced(ANOTHER):
        found = load_with_stack(None, {"redis.broker_url": "redis://127.0.0.1:7001/0"})
        other = load_with_stack(None, {"redis.broker_url": "redis://127.0.0.1:7009/0"})

    assert found.stack == STACK
    assert found.loaded.settings.redis.results_url == STACK.results_url
    assert (other.stack, dict(other.values)) == (None, {})


def test_other_stacks_are_told_where_none_is() -> None:
    """By folder and URL, without passwords; not the one that was asked."""
    with announced(STACK), announced(ANOTHER):
        told = tell_elsewhere("redis://localhost:7001/0")

        assert told == "process 4712 in /elsewhere, Redis at redis://127.0.0.1:7002/0"
        assert "7001" in tell_elsewhere("redis://other:7002/0")
    assert tell_elsewhere("redis://localhost:7001/0") == ""


@pytest.mark.parametrize(
    "url",
    [
        "redis://127.0.0.1:7009/0",
        "redis://127.0.0.1/0",
        "redis://:mine@127.0.0.1:7001/0",
        "redis://me@127.0.0.1:7001/0",
        "redis://redis.internal:7001/0",
        "rediss://127.0.0.1:7001/0",
        "unix:///run/redis.sock?db=0",
        "sentinel://127.0.0.1:7001/0?master_name=one",
    ],
)
def test_no_other_server_is_told_the_password(url: str) -> None:
    """Other ports, hosts and schemes are left alone, and who names a login has the say."""
    with announced(STACK):
        assert with_password(url) == url


def test_the_port_of_a_stack_that_starts_is_known() -> None:
    """Another one that starts at the same time takes another port, before anybody listens."""
    with announced(STACK):
        assert stack_at(7001) == STACK
        assert stack_at(7002) is None
    assert stack_at(7001) is None


def test_a_stack_that_was_killed_gives_no_password() -> None:
    """Who listens on its port now may be anybody."""
    with killed():
        assert with_password("redis://127.0.0.1:7003/0") == "redis://127.0.0.1:7003/0"


@pytest.mark.parametrize("spoil", ["readable", "folder", "garbage", "other", "link"])
def test_a_file_that_others_could_have_written_is_not_read(tmp_path: Path, spoil: str) -> None:
    """Files and folders open to others, of another shape, or elsewhere: as if there were none."""
    with ExitStack() as running:
        running.enter_context(announced(STACK))
        (file,) = stacks_folder().iterdir()
        if spoil == "readable":
            file.chmod(0o644)
        elif spoil == "folder":
            stacks_folder().chmod(0o777)
        elif spoil == "link":
            file.rename(tmp_path / "moved")
            file.symlink_to(tmp_path / "moved")
        else:
            file.write_text("{" if spoil == "garbage" else '{"models": [1], "pid": "x"}')

        assert list(find_stacks()) == []
        assert with_password(STACK.broker_url) == STACK.broker_url


def test_stacks_that_start_at_once_do_not_hide_each_other() -> None:
    """Whoever cleans up takes away what is left, and never the file of a stack that is about to run."""
    code = RUN.replace("time.sleep(600)", "sys.stdin.read()")
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(6)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == b"there\n"

    found = find_stacks()
    for process in processes:
        process.communicate(timeout=60)

    assert [stack.is_alive for stack in found] == [True] * 6
    assert find_stacks() == []
    assert list(stacks_folder().iterdir()) == []


def test_a_folder_that_is_not_ours_alone_is_refused() -> None:
    """A stack whose password others could read does not start."""
    stacks_folder().mkdir(parents=True)
    stacks_folder().chmod(0o755)

    with pytest.raises(ConfigError, match="its user's alone"), announced(STACK):
        pass


def test_a_url_is_told_without_its_passwords() -> None:
    """What goes into the file of a stack with a Redis of somebody else's."""
    assert without_login("redis://me:pw@r:1/0") == "redis://me@r:1/0"
    assert without_login("redis://r:1/0") == "redis://r:1/0"
    hidden = without_login("sentinel://me:pw@a:1,b:2/0?master_name=m&sentinel_password=pw2")
    assert "pw" not in hidden.replace("sentinel_password", "")
