"""What tests ask for by name: a server, a worker that serves both bundled models, a client."""

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock import Client
from penstock_workers.command.local_redis import free_port
from tests import warm
from tests.deployment import BUNDLED, Server, WorkerProcess
from tests.upstream import Upstream

# A shell has what it starts in the background ignore it, and so would all that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Read where OpenMP is loaded: threads that wait for work leave the CPU to the processes beside theirs.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if not Path("/dev/nvidia0").exists():
    # Read where Triton is imported: kernels for GPUs then run in Python.
    os.environ.setdefault("TRITON_INTERPRET", "1")

COMPUTING = {"models", "unit"}
"""Folders whose tests keep a CPU busy; the others wait for processes that they have started."""


def pytest_unconfigure() -> None:
    """Let the summary be the last word: threads of workers under test outlive their servers, and complain."""
    logging.lastResort = logging.NullHandler()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mix files that mostly wait with files that mostly compute: together they keep the CPUs busy.

    Each file stays whole, and its tests keep their order.
    """
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    kinds: dict[bool, list[Path]] = {True: [], False: []}
    for path in files:
        kinds[path.parent.name in COMPUTING].append(path)
    # Where a file stands among its own kind, as a share: both kinds last until the end.
    place = {path: n / len(kind) for kind in kinds.values() for n, path in enumerate(kind)}
    items[:] = [item for path in sorted(files, key=place.__getitem__) for item in files[path]]


@pytest.fixture(scope="session", autouse=True)
def _measured_here(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep what workers find out about this machine apart from what others have found.

    Processes that test together share it: what one has measured, another need not measure again.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    warm.begin()


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """A Valkey for the whole session."""
    with Server(free_port()).running() as running:
        yield running


@pytest.fixture
def own() -> Iterator[Server]:
    """A server for one test, which may do with it what it likes."""
    with Server(free_port()).running() as running:
        yield running


@pytest.fixture(scope="session")
def worker(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    """One worker process that serves `minilm` and `chat`."""
    folder: Path = tmp_path_factory.mktemp("worker")
    process = WorkerProcess(folder, server, toml=BUNDLED, queues="cpu.minilm,cpu.chat")
    try:
        process.wait_until_ready()
        yield process
    finally:
        process.stop()


@pytest.fixture
def client(server: Server, worker: WorkerProcess) -> Iterator[Client]:
    """A client of that worker."""
    with Client(server.broker_url) as connected:
        yield connected


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    """A server of hosted models."""
    with Upstream().running() as running:
        yield running
