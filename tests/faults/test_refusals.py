"""A server that refuses for a while is waited for: running jobs are kept, and nobody exits."""

import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from penstock import Client
from tests.deployment import Server
from tests.eventually import eventually
from tests.faults.light import MODEL, LightWorker
from tests.faults.refusing import REFUSALS, RefusingServer

N_REFUSED = 12
"""So many answers and every part of a worker has met one."""


@pytest.fixture(scope="module")
def refusing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RefusingServer]:
    """A server for all these tests."""
    with RefusingServer().running_in(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture(scope="module")
def light(
    refusing: RefusingServer, server: Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LightWorker]:
    """A worker for all these tests; its book lies where nothing is refused."""
    urls = {"broker_url": refusing.broker_url, "results_url": refusing.results_url}
    worker = LightWorker(tmp_path_factory.mktemp("light"), server, **urls)
    with worker.starting():
        eventually(lambda: worker.process.is_ready, within_s=60)
        eventually(lambda: refusing.admin.hexists("penstock:models", MODEL), within_s=60)
        yield worker


def is_out_of_reach(log: str) -> bool:
    """Whether the worker's heartbeat last said that the server is out of reach."""
    return log.rfind("registry out of reach") > log.rfind("registry within reach")


@pytest.mark.parametrize("is_cut", [False, True], ids=["connected", "cut"])
@pytest.mark.parametrize("kind", REFUSALS)
def test_a_worker_outlives_it(refusing: RefusingServer, light: LightWorker, kind: str, is_cut: bool) -> None:
    """What runs when the server begins to refuse is answered once it serves again, and was run once."""
    name = f"{kind}-{is_cut}".replace(" ", "-")
    with Client(refusing.broker_url) as client:
        job = client.submit_embed([f"{name} inf"], model=MODEL)
        eventually(lambda: light.runs()[name], within_s=30)
        if kind == "BUSY":  # it logs an outage once, so the one before has to be over for it too
            eventually(lambda: not is_out_of_reach(light.process.log), within_s=60)
        try:
            with refusing.refusing(kind, is_cut=is_cut):
                if kind == "BUSY":  # then the server answers nobody
                    eventually(lambda: is_out_of_reach(light.process.log), within_s=60)
                else:
                    eventually(lambda: refusing.n_refused() > N_REFUSED, within_s=60)
        finally:
            light.book.set(name, 1)

        assert job.result(timeout_s=60).shape == (1, 3)
        assert client.embed([f"after-{name} 0"], model=MODEL, timeout_s=60).shape == (1, 3)
    assert light.process.process.poll() is None
    assert light.runs()[name] == 1


@pytest.mark.parametrize("kind", ["READONLY", "OOM", "NOAUTH"])
def test_a_worker_that_starts_waits_for_it(
    refusing: RefusingServer, server: Server, tmp_path: Path, kind: str
) -> None:
    """A worker that is started meanwhile does not end, says what it waits for, and takes jobs afterwards."""
    urls = {"broker_url": refusing.broker_url, "results_url": refusing.results_url}
    worker = LightWorker(tmp_path, server, **urls)
    with ExitStack() as stack:
        with refusing.refusing(kind):
            stack.enter_context(worker.starting())
            eventually(lambda: refusing.n_refused() > N_REFUSED, within_s=60)
            eventually(lambda: kind in worker.process.log, within_s=60)
            assert not worker.process.is_ready
        eventually(lambda: worker.process.is_ready, within_s=60)
        told = re.findall("registry (?:out of|within) reach.*", worker.process.log)
        assert len(told) == len(set(told)), told  # each reason once, not with every heartbeat
