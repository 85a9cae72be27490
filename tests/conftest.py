"""What tests ask for by name: a server, a worker that serves both bundled models, a client."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock import Client
from penstock_workers.command.local_redis import free_port
from tests import warm
from tests.deployment import BUNDLED, Server, WorkerProcess
from tests.upstream import Upstream

if not Path("/dev/nvidia0").exists():
    # Read where Triton is imported: kernels for GPUs then run in Python.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_unconfigure() -> None:
    """Let the summary be the last word: threads of workers under test outlive their servers, and complain."""
    logging.lastResort = logging.NullHandler()


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
