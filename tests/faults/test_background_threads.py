"""A worker without one of its background threads is no worker."""

import os
from pathlib import Path

import pytest

from penstock import Client
from tests.deployment import Server
from tests.faults.light import LightWorker


@pytest.mark.parametrize("name", ["leases", "heartbeat"])
def test_a_worker_that_lost_a_thread_ends(own: Server, tmp_path: Path, name: str) -> None:
    """Nothing is acknowledged, or nobody told, without it: the process ends, and another answers its jobs."""
    with LightWorker(tmp_path, own).running() as worker, Client(own.broker_url) as client:
        client.submit_embed([f"end-{name} 0"], model="light")

        assert worker.process.wait(60) == os.EX_SOFTWARE
        assert f"{name} has ended" in worker.log or f"fail for ever: {name}" in worker.log
        job = client.submit_embed(["next 0"], model="light")
        with LightWorker(tmp_path, own).running():
            assert job.result(timeout_s=60).shape == (1, 3)
