"""Faults met by real workers with real models, as their callers see them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import redis

from penstock import Client, JobState, WorkerLostError
from penstock.keys import result_key
from tests.deployment import BUNDLED, Server, WorkerProcess
from tests.eventually import eventually
from tests.faults.light import LightWorker

LEASE_S = 2.0
TOML = BUNDLED.split("[models.chat]")[0]
LEASES = {"PENSTOCK_WORKER__LEASE_S": str(LEASE_S)}
HANGS = {"PENSTOCK_WORKER__STALL_S": "0.01"}
AT_MOST_TWO = {"PENSTOCK_WORKER__MAX_DELIVERIES": "2"}
LONG_TEXTS = ["slow " * 250] * 160  # seconds of work


def start(folder: Path, server: Server, **environment: str) -> WorkerProcess:
    """Start a worker with short leases and wait until it takes jobs."""
    worker = WorkerProcess(
        folder, server, toml=TOML, queues="cpu.minilm", environment={**LEASES, **environment}
    )
    worker.wait_until_ready()
    return worker


def test_a_killed_worker_s_jobs_are_answered_by_another(own: Server, tmp_path: Path) -> None:
    """Kill -9 in mid-job: whoever waits gets every result, and the job was taken over, not lost."""
    first = start(tmp_path, own)
    with Client(own.broker_url) as client:
        jobs = [client.submit_embed(LONG_TEXTS, model="minilm") for _ in range(3)]
        eventually(lambda: jobs[0].state() is JobState.RUNNING, within_s=10)
        first.process.send_signal(signal.SIGKILL)
        second = start(tmp_path, own)
        try:
            assert [job.result(timeout_s=90).shape for job in jobs] == [(len(LONG_TEXTS), 384)] * 3
        finally:
            first.stop()
            second.stop()


def test_a_hung_model_ends_its_process_and_another_answers(own: Server, tmp_path: Path) -> None:
    """A forward pass that shows no sign of life ends the worker; its job goes to the next one."""
    hung = start(tmp_path, own, **HANGS)
    with Client(own.broker_url) as client:
        job = client.submit_embed(LONG_TEXTS, model="minilm")
        code = hung.wait(60)
        healthy = start(tmp_path, own)
        try:
            assert job.result(timeout_s=90).shape == (len(LONG_TEXTS), 384)
        finally:
            healthy.stop()

    assert code == os.EX_SOFTWARE
    assert "hangs or has died" in hung.log


def test_a_hang_that_was_seen_ends_the_process(own: Server, tmp_path: Path) -> None:
    """A model that goes on just before its process would end does not keep it: its leases may be lost."""
    stall = {"PENSTOCK_WORKER__STALL_S": "0.2"}
    with LightWorker(tmp_path, own, environment=stall).running() as worker, Client(own.broker_url) as client:
        client.submit_embed(["hang 1.6"], model="light")
        assert worker.process.wait(10) == os.EX_SOFTWARE
        job = client.submit_embed(["next 0"], model="light")
        with LightWorker(tmp_path, own).running():
            assert job.result(timeout_s=30).shape == (1, 3)


def test_a_job_that_ends_every_worker_is_given_up(own: Server, tmp_path: Path) -> None:
    """After `max_deliveries` the caller gets `WorkerLostError`, and `penstock dead` holds the job."""
    with redis.Redis.from_url(own.results_url) as store:
        client = Client(own.broker_url)
        worker = start(tmp_path, own, **HANGS, **AT_MOST_TWO)
        job = client.submit_embed(LONG_TEXTS, model="minilm")
        worker.wait(60)
        for _ in range(2):
            worker = WorkerProcess(
                tmp_path,
                own,
                toml=TOML,
                queues="cpu.minilm",
                environment={**LEASES, **HANGS, **AT_MOST_TWO},
            )
            deadline = time.monotonic() + 40
            while worker.process.poll() is None and time.monotonic() < deadline:
                if store.exists(result_key(job.id)):
                    break
                time.sleep(0.05)
            if store.exists(result_key(job.id)):
                break
        try:
            with pytest.raises(WorkerLostError) as caught:
                job.result(timeout_s=30)
            dead = penstock(worker, "dead", "list", "--json")
            shown = penstock(worker, "dead", "show", job.id)
            queues = penstock(worker, "queues", "--json")
            revived = subprocess.run(
                [PENSTOCK, "dead", "requeue", job.id],
                env=worker.environment,
                capture_output=True,
                text=True,
                check=True,
            )
        finally:
            worker.stop()
        state = job.state()
        client.close()

    assert caught.value.n_deliveries == 2
    assert [entry["id"] for entry in dead] == [job.id]
    assert "slow" not in json.dumps([dead, shown])
    assert queues[0]["dead"] == 1
    assert revived.stdout == "1 put back\n"
    assert state in (JobState.WAITING, JobState.RUNNING, JobState.SUCCEEDED)


PENSTOCK = str(Path(sys.executable).with_name("penstock"))


def penstock(worker: WorkerProcess, *arguments: str) -> list[dict[str, object]]:
    """Return the JSON that a command prints."""
    done = subprocess.run(
        [PENSTOCK, *arguments], env=worker.environment, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)
