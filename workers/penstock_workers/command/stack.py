"""The processes of `penstock up`: a Redis where none is given, the workers, and Flower."""

import errno
import importlib.util
import os
import secrets
import sys
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from socket import socket
from typing import Final

from penstock.errors import ConfigError
from penstock.extras import how_to_install
from penstock.keys import queue_name
from penstock.request import PoolName
from penstock.stacks import RunningStack, check_private, stack_at, with_login, without_login
from penstock_workers.celery_variables import refuse_variables
from penstock_workers.command.capacity import Layout, choose_layouts
from penstock_workers.command.child import Child
from penstock_workers.command.forkserver import Preload
from penstock_workers.command.local_redis import (
    free_port,
    is_ready,
    listening_error,
    local_redis_command,
    password_line,
)
from penstock_workers.configuration import CONFIG_VARIABLE, Loaded, variable_name
from penstock_workers.hardware.machine import read_machine
from penstock_workers.hardware.threads import on_gpus, thread_variables
from penstock_workers.settings import ModelSettings, Settings

DEFAULT_PORT: Final = 6379
WORKERS_STAGE: Final = 1
"""After Redis, before Flower."""
ENGINES: Final = {
    "embed": "penstock_workers.embedding.embedder",
    "generate": "penstock_workers.generation.generator",
    "rerank": "penstock_workers.embedding.reranker",
}
"""Modules that a process imports to serve models of a task, by task."""
_APP: Final = (
    "celery.bin.celery",
    "celery.bin.worker",
    "penstock_workers.running_stack",
    "penstock_workers.serving.app",
)
"""Modules that each process imports; none of them reads the configuration."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """What to start, and how to reach it.

    Attributes:
        children: The processes that the supervisor runs.
        broker_url: URL that clients connect to.
        results_url: URL of the result store.
        password: Password of the Redis that is started, which its URLs do not hold; None where none is
            started.
        flower_url: URL of the monitoring page; None if none is started.
        layouts: Worker processes by pool.
        notes: Lines that tell people what differs from the default, such as another port.
    """

    children: tuple[Child, ...]
    broker_url: str
    results_url: str
    password: str | None = field(repr=False)
    flower_url: str | None
    layouts: Mapping[PoolName, Layout]
    notes: tuple[str, ...] = ()

    @property
    def login_url(self) -> str:
        """The broker's URL with its password: for connections, never for a log."""
        return self.broker_url if self.password is None else with_login(self.broker_url, self.password)

    def told(self, models: tuple[str, ...]) -> RunningStack:
        """Return what this user's other programs are told, with the password only of our own Redis."""
        return RunningStack(
            pid=os.getpid(),
            folder=str(Path.cwd()),
            broker_url=without_login(self.broker_url),
            results_url=without_login(self.results_url),
            password=self.password,
            models=models,
        )


def plan_stack(
    loaded: Loaded,
    *,
    config: Path | None,
    environment: Mapping[str, str],
    redis_folder: Path | None,
    with_flower: bool = True,
) -> Stack:
    """Decide what to start for a configuration.

    Args:
        loaded: The configuration; a Redis is started if it names no broker.
        config: File of the configuration, for the children.
        environment: Variables for the children, added to ours.
        redis_folder: Folder for the data of the Redis that is started. None keeps nothing, and takes any free
            port.
        with_flower: True to start the monitoring page too.

    Raises:
        ConfigError: There is no model, no process or no Redis to start, a port is taken, or a variable would
            win over the settings.
    """
    settings = loaded.settings
    require_engines(settings.models.values())
    refuse_variables(os.environ)  # the children have them too
    variables = dict(environment) | ({CONFIG_VARIABLE: str(config.resolve())} if config else {})
    layouts = choose_layouts(settings, read_machine())
    for pool, layout in layouts.items():
        variables[variable_name(f"pools.{pool}.processes")] = str(layout.processes)
        variables[variable_name(f"pools.{pool}.threads")] = str(layout.threads)
    children: list[Child] = []
    notes: list[str] = []
    broker_url, results_url, password = settings.broker_url, settings.results_url, None
    if "redis.broker_url" not in loaded.origins:
        # A stack that starts at the same time announces its port at once, and listens on it later.
        is_free = redis_folder and _is_free(DEFAULT_PORT) and stack_at(DEFAULT_PORT) is None
        port = DEFAULT_PORT if is_free else free_port()
        if redis_folder and not is_free:
            notes.append(f"Redis:   on port {port}, for {DEFAULT_PORT} is taken")
        broker_url, results_url = f"redis://127.0.0.1:{port}/0", f"redis://127.0.0.1:{port}/1"
        password = _password(redis_folder)
        variables[variable_name("redis.broker_url")] = broker_url
        variables[variable_name("redis.results_url")] = results_url
        variables[variable_name("redis.password")] = password
        children.append(_redis(port, redis_folder, password))
    workers = _workers(settings, layouts, variables)
    if not workers:
        raise ConfigError(["nothing to start: no pool with processes serves a model"])
    flower_port = _flower_port(loaded) if with_flower and has_flower() else 0
    flower = _flower(settings.flower.address, flower_port, variables) if flower_port else []
    if flower_port not in (0, settings.flower.port):
        notes.append(f"Flower:  on port {flower_port}, for {settings.flower.port} is taken")
    return Stack(
        children=(*children, *workers, *flower),
        broker_url=broker_url,
        results_url=results_url,
        password=password,
        flower_url=f"http://{settings.flower.address}:{flower_port}" if flower else None,
        layouts=layouts,
        notes=tuple(notes),
    )


def worker_queues(settings: Settings, pool: PoolName, models: tuple[str, ...] = ()) -> list[str]:
    """Return the queues that a worker of `pool` takes from.

    Args:
        settings: The deployment's settings.
        pool: The worker's pool.
        models: Names of models; empty for all of the pool.

    Raises:
        ConfigError: The pool serves no model, or not one of these.
    """
    served = [name for name, model in settings.models.items() if pool in model.pools]
    known = ", ".join(served) or "none"
    if problems := [
        f"pool {pool} does not serve {name!r}; its models: {known}" for name in models if name not in served
    ]:
        raise ConfigError(problems)
    if not served:
        raise ConfigError(
            [f"pool {pool} serves no model; give one `pools = [{pool!r}]` in the configuration"]
        )
    return [queue_name(pool, name) for name in models or served]


def has_engines() -> bool:
    """Say whether this machine can run models."""
    return importlib.util.find_spec("sentence_transformers") is not None


def require_engines(models: Iterable[ModelSettings] = ()) -> None:
    """Refuse a machine that cannot serve these models; one that can serve none of its own, if there are none.

    Raises:
        ConfigError: what to install.
    """
    engines = {model.engine for model in models}
    extra, library = ("remote", "openai") if engines == {"remote"} else ("workers", "sentence_transformers")
    if importlib.util.find_spec("celery") is None or importlib.util.find_spec(library) is None:
        raise ConfigError([f"this machine cannot run models yet: {how_to_install(extra)}"])


def worker_command(settings: Settings, queues: list[str], node: str) -> list[str]:
    """Return Celery's command line for a worker process."""
    command = [sys.executable, "-m", "penstock_workers", "-A", "penstock_workers", "worker"]
    command += ["-Q", ",".join(queues)]
    # Gossip and mingle exchange what our workers do not use, at each start and for each worker.
    options = ["-P", "threads", "-n", f"{node}@%h", "-l", settings.worker.log_level]
    return [*command, *options, "--without-gossip", "--without-mingle"]


def _redis(port: int, folder: Path | None, password: str) -> Child:
    """Return a server for this user alone, with a password: every user of the machine can reach its port."""
    login_url = with_login(f"redis://127.0.0.1:{port}/0", password)
    return Child(
        name="redis",
        command=local_redis_command(port=port, folder=folder, reads_input=True),
        environment={},
        stage=0,
        is_ready=lambda: is_ready(login_url),
        told=password_line(password),
        umask=0o077,
    )


def _password(folder: Path | None) -> str:
    """Return the password of a folder's data, made once: clients outlive a stack that is started again.

    Raises:
        ConfigError: the folder is another user's.
    """
    password = secrets.token_hex(32)
    if folder is None:
        return password
    file = folder / "password"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)  # an earlier version left it open
        if file.exists():
            check_private(file)
            if kept := file.read_text().strip():
                return kept
            file.unlink()  # empty: an earlier start was killed before it wrote
        with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as new:  # noqa: PTH123  with its mode
            new.write(password)
    except OSError as error:
        raise ConfigError([f"{folder}: {error.strerror}: the data of Redis is for one user alone"]) from None
    return password


def _workers(
    settings: Settings, layouts: Mapping[PoolName, Layout], variables: Mapping[str, str]
) -> list[Child]:
    return [
        Child(
            name=f"{pool}-{number + 1}",
            command=worker_command(settings, worker_queues(settings, pool), f"{pool}-{number + 1}"),
            environment={**variables, **_gpu(layout, number)},
            stage=WORKERS_STAGE,
            preload=_preload(settings, pool, layout),
        )
        for pool, layout in layouts.items()
        for number in range(layout.processes)
    ]


def _preload(settings: Settings, pool: PoolName, layout: Layout) -> Preload | None:
    """Return what the processes of a pool have in common; None where they have to start by themselves."""
    # A server for one process shares nothing, and a fork cannot use the GPU that its parent has touched.
    if layout.processes < 2 or on_gpus(settings, pool):
        return None
    models = [model for model in settings.models.values() if pool in model.pools]
    engines = {ENGINES[model.task] for model in models if model.engine != "remote"}
    return Preload(
        modules=(*_APP, *sorted(engines)),
        environment=tuple(thread_variables(layout.threads).items()),
    )


def _gpu(layout: Layout, number: int) -> Mapping[str, str]:
    """Let a process see one GPU: torch takes the first that it sees."""
    if not layout.gpus:
        return {}
    return {"CUDA_VISIBLE_DEVICES": layout.gpus[number % len(layout.gpus)]}


def has_flower() -> bool:
    """Say whether this machine has Flower."""
    return importlib.util.find_spec("flower") is not None


def _flower_port(loaded: Loaded) -> int:
    """Return Flower's port, 0 for no Flower; a free one where the default is taken.

    Raises:
        ConfigError: Flower cannot listen on the port or address that is configured.
    """
    address, port = loaded.settings.flower.address, loaded.settings.flower.port
    if port == 0 or (error := listening_error(address, port)) is None:
        return port
    if error.errno == errno.EADDRINUSE and "flower.port" not in loaded.origins:
        return free_port()
    origin = loaded.origins.get("flower.port", loaded.origins.get("flower.address", "default"))
    raise ConfigError(
        [
            f"{origin}: flower.port = {port}: Flower cannot listen there on {address!r}: {error.strerror}; "
            "name another port, or 0 for no Flower"
        ]
    )


def _flower(address: str, number: int, variables: Mapping[str, str]) -> list[Child]:
    port = str(number)
    # Flower would run a `flowerconfig.py` of the current folder.
    file = os.environ.get("FLOWER_CONF") or os.devnull
    options = [f"--address={address}", f"--port={port}", f"--conf={file}"]
    # Kubernetes sets FLOWER_PORT=tcp://... beside a service of that name, and Flower ends with a traceback.
    own = {"FLOWER_ADDRESS": address, "FLOWER_PORT": port, "FLOWER_UNIX_SOCKET": ""}
    return [
        Child(
            name="flower",
            command=[sys.executable, "-m", "penstock_workers", "-A", "penstock_workers", "flower", *options],
            environment={**variables, **own},
            stage=2,
            is_needed=False,  # it shows work, and does none
        )
    ]


def _is_free(port: int) -> bool:
    with closing(socket()) as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0
