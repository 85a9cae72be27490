import importlib.util
import json
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from penstock.errors import ConfigError
from penstock_workers.command.stack import Stack, plan_stack, worker_command, worker_queues
from penstock_workers.configuration import load_settings

MODELS: dict[str, Any] = {
    "minilm": {"task": "embed", "source": "a", "pools": ["gpu", "cpu"]},
    "chat": {"task": "generate", "source": "b", "pools": ["cpu"]},
}
BROKER = {"redis.broker_url": "redis://me:pw@r:6379/0", "pools.gpu.processes": "0"}


@pytest.fixture(autouse=True)
def _a_redis_to_start(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a server on the PATH, for machines that have none; it is never run."""
    folder = tmp_path_factory.mktemp("bin")
    (folder / "valkey-server").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def plan(
    arguments: Mapping[str, str] | None = None,
    *,
    models: Any = MODELS,
    config: Path | None = None,
    redis_folder: Path | None = None,
    with_flower: bool = False,
) -> Stack:
    """Plan the stack of a deployment given by the arguments of a command line."""
    loaded = load_settings(arguments={"models": json.dumps(models), **(arguments or {})}, environ={})
    return plan_stack(
        loaded,
        config=config,
        environment={"PENSTOCK_SET": "by the command line"},
        redis_folder=redis_folder,
        with_flower=with_flower,
    )


def option(command: Any, name: str) -> str:
    """Return the value behind an option of a command line."""
    return str(command[list(command).index(name) + 1])


def test_redis_is_started_where_no_broker_is_configured() -> None:
    """Without a broker URL the stack brings its own Redis, before the workers, and tells them where."""
    stack = plan({"pools.gpu.processes": "0"})

    redis, *workers = stack.children
    port = option(redis.command, "--port")
    assert (redis.name, redis.stage) == ("redis", 0)
    assert redis.is_ready is not None
    assert option(redis.command, "--bind") == "127.0.0.1"
    assert stack.broker_url == f"redis://127.0.0.1:{port}/0"
    assert all(worker.environment["PENSTOCK_REDIS__BROKER_URL"] == stack.broker_url for worker in workers)
    assert stack.password is not None
    assert all(worker.environment["PENSTOCK_REDIS__PASSWORD"] == stack.password for worker in workers)
    assert stack.password in redis.told.decode()
    assert stack.password not in " ".join(redis.command)
    assert stack.login_url == f"redis://:{stack.password}@127.0.0.1:{port}/0"
    assert all(
        worker.environment["PENSTOCK_REDIS__RESULTS_URL"] == f"redis://127.0.0.1:{port}/1"
        for worker in workers
    )


def test_own_redis_keeps_its_data_where_it_is_told(tmp_path: Path) -> None:
    """`penstock up` keeps its queue over a restart; the demo keeps nothing."""
    no_gpus = {"pools.gpu.processes": "0"}
    kept = plan(no_gpus, redis_folder=tmp_path / "redis").children[0].command
    forgotten = plan(no_gpus).children[0].command

    assert option(kept, "--dir") == str(tmp_path / "redis")
    assert option(kept, "--appendonly") == "yes"
    assert option(forgotten, "--appendonly") == "no"


def test_the_password_of_own_redis_outlives_it(tmp_path: Path) -> None:
    """Clients go on when a stack is started again; another folder, and each demo, has another password."""
    no_gpus = {"pools.gpu.processes": "0"}
    first, again, other = (plan(no_gpus, redis_folder=tmp_path / name).password for name in "aab")

    assert first == again
    assert len({first, other, plan(no_gpus).password, plan(no_gpus).password}) == 4
    assert (tmp_path / "a" / "password").stat().st_mode & 0o777 == 0o600
    (tmp_path / "a" / "password").chmod(0o644)
    with pytest.raises(ConfigError, match="for one user alone"):
        plan(no_gpus, redis_folder=tmp_path / "a")


def test_configured_broker_is_used() -> None:
    """With a broker URL no Redis is started, and the workers find it in the configuration."""
    stack = plan(BROKER)

    assert stack.broker_url == "redis://me:pw@r:6379/0"
    assert "redis" not in [child.name for child in stack.children]
    assert all("PENSTOCK_REDIS__BROKER_URL" not in child.environment for child in stack.children)


def test_pools_get_their_processes() -> None:
    """Each pool has its number of workers, each with its queues and node name."""
    processes = {"pools.cpu.processes": "2", "pools.gpu.processes": "1"}

    stack = plan(BROKER | processes)

    assert [(child.name, child.stage) for child in stack.children] == [
        ("gpu-1", 1),
        ("cpu-1", 1),
        ("cpu-2", 1),
    ]
    gpu, cpu, _ = stack.children
    assert option(gpu.command, "-Q") == "gpu.minilm"
    assert option(cpu.command, "-Q") == "cpu.minilm,cpu.chat"
    assert option(cpu.command, "-n") == "cpu-1@%h"


def test_processes_of_a_pool_are_forked_where_they_can_be() -> None:
    """Not one by itself, and none on a GPU: a fork cannot use a GPU that its parent has touched."""
    two = plan(BROKER | {"pools.cpu.processes": "2", "pools.cpu.threads": "3"})
    one = plan(BROKER | {"pools.cpu.processes": "1"})
    gpus = plan(BROKER | {"pools.cpu.processes": "0", "pools.gpu.processes": "2"})
    trial = plan(BROKER | {"pools.cpu.processes": "0", "pools.gpu.processes": "2", "pools.gpu.device": "cpu"})

    first, second = (child.preload for child in two.children)
    assert first is not None
    assert first == second
    assert {"penstock_workers.embedding.embedder", "penstock_workers.generation.generator"} < {*first.modules}
    assert ("OMP_NUM_THREADS", "3") in first.environment
    assert [child.preload for child in (*one.children, *gpus.children)] == [None] * 3
    assert trial.children[0].preload is not None
    assert "penstock_workers.generation.generator" not in trial.children[0].preload.modules


LATE = """
import sys
from importlib import import_module
for name in sys.argv[1:]:
    import_module(name)
before = set(sys.modules)
import_module("penstock_workers.celery")
print(*sorted(set(sys.modules) - before))
"""


def test_a_fork_has_all_that_the_app_imports(tmp_path: Path) -> None:
    """What each process imports by itself is in memory once for each: tens of MiB."""
    remote = {"far": {"task": "generate", "engine": "remote", "source": "http://h/v1"}}
    preload = plan(BROKER | {"pools.cpu.processes": "2"}, models=remote).children[0].preload
    assert preload is not None
    command = [sys.executable, "-c", LATE, *preload.modules]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=110, check=False)

    assert done.returncode == 0, done.stderr
    packages = {name.partition(".")[0] for name in done.stdout.split()} & {
        "celery",
        "kombu",
        "pydantic_settings",
    }
    assert packages == set()
    ours = [name for name in done.stdout.split() if name.startswith("penstock")]
    assert ours == ["penstock_workers.celery"]


def test_workers_get_the_numbers_that_auto_stands_for() -> None:
    """Children read counts, not `auto`, so that a restarted one has the layout of the others."""
    stack = plan(BROKER)

    layout = stack.layouts["cpu"]
    assert len(stack.children) == layout.processes >= 1
    for child in stack.children:
        assert child.environment["PENSTOCK_POOLS__CPU__PROCESSES"] == str(layout.processes)
        assert child.environment["PENSTOCK_POOLS__CPU__THREADS"] == str(layout.threads)
        assert child.environment["PENSTOCK_POOLS__GPU__PROCESSES"] == "0"


def test_workers_get_the_configuration_of_the_command_line(tmp_path: Path) -> None:
    """Children read the same file, and what `--set` changed."""
    config = tmp_path / "folder" / ".." / "penstock.toml"

    stack = plan(BROKER, config=config)

    for child in stack.children:
        assert child.environment["PENSTOCK_CONFIG"] == str(tmp_path / "penstock.toml")
        assert child.environment["PENSTOCK_SET"] == "by the command line"


def test_pool_without_models_gets_no_worker() -> None:
    """Processes of a pool that serves nothing are not started."""
    models = {"chat": MODELS["chat"]}
    processes = {"pools.cpu.processes": "1", "pools.gpu.processes": "4"}

    stack = plan(BROKER | processes, models=models)

    assert [child.name for child in stack.children] == ["cpu-1"]


@pytest.mark.parametrize(
    ("models", "arguments"),
    [
        ({}, {}),
        (MODELS, {"pools.cpu.processes": "0", "pools.gpu.processes": "0"}),
        (
            {"minilm": {"task": "embed", "source": "a", "pools": ["gpu"]}},
            {"pools.cpu.processes": "1", "pools.gpu.processes": "0"},
        ),
    ],
    ids=["no models", "no processes", "models of a pool without processes"],
)
def test_nothing_to_start_is_an_error(models: Any, arguments: dict[str, str]) -> None:
    """A stack without workers would take jobs for ever."""
    with pytest.raises(ConfigError, match="nothing to start: no pool with processes serves a model"):
        plan(BROKER | arguments, models=models)


@pytest.mark.skipif(importlib.util.find_spec("flower") is None, reason="Flower is an extra")
def test_flower_starts_last() -> None:
    """The monitoring page listens where it is told to."""
    stack = plan(BROKER | {"flower.port": "7777"}, with_flower=True)

    flower = stack.children[-1]
    assert (flower.name, flower.stage, flower.is_needed) == ("flower", 2, False)
    assert "--port=7777" in flower.command
    assert stack.flower_url == "http://127.0.0.1:7777"


@contextmanager
def taken(port: int) -> Iterator[None]:
    """Listen on a port of this machine, unless somebody does."""
    with ExitStack() as stack:
        with suppress(OSError):
            stack.enter_context(socket.create_server(("127.0.0.1", port)))
        yield


@pytest.mark.skipif(importlib.util.find_spec("flower") is None, reason="Flower is an extra")
def test_flower_takes_another_port_where_its_default_is_taken() -> None:
    """One line says so; a port that is named is meant, and refused before anything starts."""
    with taken(5555):
        stack = plan(BROKER, with_flower=True)
        with pytest.raises(ConfigError) as caught:
            plan(BROKER | {"flower.port": "5555"}, with_flower=True)

    port = str(stack.flower_url).removeprefix("http://127.0.0.1:")
    assert port != "5555"
    assert f"--port={port}" in stack.children[-1].command
    assert stack.notes == (f"Flower:  on port {port}, for 5555 is taken",)
    (line,) = caught.value.problems
    assert line.startswith("argument: flower.port = 5555: Flower cannot listen there on '127.0.0.1': ")
    assert "Address already in use" in line


@pytest.mark.skipif(importlib.util.find_spec("flower") is None, reason="Flower is an extra")
def test_an_address_that_is_not_of_this_machine_is_refused() -> None:
    """No other port would help."""
    with pytest.raises(ConfigError, match=r"argument: flower.port = 5555: Flower cannot listen there on"):
        plan(BROKER | {"flower.address": "192.0.2.1"}, with_flower=True)


def test_redis_takes_another_port_where_its_default_is_taken(tmp_path: Path) -> None:
    """One line says so."""
    with taken(6379):
        stack = plan({"pools.gpu.processes": "0"}, redis_folder=tmp_path / "redis")

    port = option(stack.children[0].command, "--port")
    assert stack.notes == (f"Redis:   on port {port}, for 6379 is taken",)


@pytest.mark.parametrize(("with_flower", "port"), [(False, 5555), (True, 0)])
def test_flower_can_be_left_out(with_flower: bool, port: int) -> None:
    """Port 0 starts none, and the demo needs none."""
    stack = plan(BROKER | {"flower.port": str(port)}, with_flower=with_flower)

    assert stack.flower_url is None
    assert "flower" not in [child.name for child in stack.children]


def test_worker_takes_the_queues_of_its_pool() -> None:
    """All models of the pool, or those that were asked for, in that order."""
    settings = load_settings(arguments={"models": json.dumps(MODELS)}, environ={}).settings

    assert worker_queues(settings, "cpu") == ["cpu.minilm", "cpu.chat"]
    assert worker_queues(settings, "gpu") == ["gpu.minilm"]
    assert worker_queues(settings, "cpu", ("chat",)) == ["cpu.chat"]


@pytest.mark.parametrize(
    ("models", "asked", "problems"),
    [
        ({}, (), ["pool gpu serves no model; give one `pools = ['gpu']` in the configuration"]),
        (MODELS, ("chat",), ["pool gpu does not serve 'chat'; its models: minilm"]),
        (
            MODELS,
            ("chat", "minilm", "x"),
            [
                "pool gpu does not serve 'chat'; its models: minilm",
                "pool gpu does not serve 'x'; its models: minilm",
            ],
        ),
        ({}, ("x",), ["pool gpu does not serve 'x'; its models: none"]),
    ],
)
def test_worker_without_a_model_is_an_error(models: Any, asked: tuple[str, ...], problems: list[str]) -> None:
    """A worker that would take nothing does not start, and says what there is."""
    settings = load_settings(arguments={"models": json.dumps(models)}, environ={}).settings

    with pytest.raises(ConfigError) as caught:
        worker_queues(settings, "gpu", asked)

    assert list(caught.value.problems) == problems


def test_worker_command_is_celerys_own() -> None:
    """Whoever knows Celery can read, and type, how a worker starts."""
    settings = load_settings(arguments={"worker.log_level": "debug"}, environ={}).settings

    command = worker_command(settings, ["cpu.a", "cpu.b"], "cpu-1")

    assert command[:6] == [sys.executable, "-m", "penstock_workers", "-A", "penstock_workers", "worker"]
    assert option(command, "-Q") == "cpu.a,cpu.b"
    assert option(command, "-P") == "threads"
    assert option(command, "-l") == "debug"
