"""States, cancelling, deadlines and errors of jobs, with queues that no worker empties yet."""

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import get_type_hints

import pytest
import redis

from penstock import (
    BrokerRefusedError,
    BrokerUnavailableError,
    Client,
    DeadlineExceededError,
    JobCancelledError,
    JobState,
    PenstockError,
)
from penstock.errors import error_classes
from penstock_workers.command.local_redis import free_port
from penstock_workers.configuration import load_settings
from penstock_workers.serving.app import build_app
from tests.deployment import BUNDLED, Server, WorkerProcess

TOML = BUNDLED.replace("[models.minilm]", "[models.patient]").split("[models.chat]")[0]


@pytest.fixture(scope="module")
def own_server() -> Iterator[Server]:
    """A server whose only worker these tests start and stop."""
    with Server(free_port(), password="s3cret/@:").running() as running:
        yield running


@pytest.fixture(scope="module")
def gone(own_server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a worker that announced its model and has stopped."""
    folder = tmp_path_factory.mktemp("gone")
    worker = WorkerProcess(folder, own_server, toml=TOML, queues="cpu.patient")
    try:
        worker.wait_until_ready()
    finally:
        worker.stop()
    return folder


def test_jobs_wait_for_a_worker_that_is_gone(own_server: Server, gone: Path) -> None:
    """A known model whose workers are gone is accepted; what was cancelled or is late is never computed."""
    with Client(own_server.broker_url) as client:
        kept = client.submit_embed(["kept"], model="patient")
        cancelled = client.submit_embed(["cancelled"], model="patient")
        late = client.submit_embed(["late"], model="patient", deadline_s=0.001)
        assert [job.state() for job in (kept, cancelled, late)] == [JobState.WAITING] * 3

        assert cancelled.cancel() is True
        assert cancelled.cancel() is False
        assert cancelled.state() is JobState.CANCELLED
        with pytest.raises(JobCancelledError):
            cancelled.result(timeout_s=5)

        worker = WorkerProcess(gone, own_server, toml=TOML, queues="cpu.patient")
        try:
            assert kept.result(timeout_s=60).shape == (1, 384)
            with pytest.raises(DeadlineExceededError):
                late.result(timeout_s=10)
            assert kept.cancel() is False
            assert [job.state() for job in (kept, cancelled, late)] == [
                JobState.SUCCEEDED,
                JobState.CANCELLED,
                JobState.FAILED,
            ]
            assert worker.log.count("succeeded in") == 1
        finally:
            worker.stop()


def test_results_expire(own_server: Server, gone: Path) -> None:
    """`result_ttl_s` bounds how long a result is kept; the job is then expired, not unknown."""
    toml = TOML
    worker = WorkerProcess(
        gone, own_server, toml=toml, queues="cpu.patient", environment={"PENSTOCK_REDIS__RESULT_TTL_S": "1"}
    )
    try:
        worker.wait_until_ready()
        with Client(own_server.broker_url) as client:
            job = client.submit_embed(["short"], model="patient")
            job.result(timeout_s=30)
            deadline = time.monotonic() + 10
            while (state := job.state()) is not JobState.EXPIRED and time.monotonic() < deadline:
                pass

        assert state is JobState.EXPIRED
    finally:
        worker.stop()


@pytest.mark.parametrize("cls", sorted(error_classes(), key=lambda cls: cls.__name__))
def test_every_error_survives_the_result_store(
    own_server: Server, gone: Path, cls: type[PenstockError]
) -> None:
    """A caller gets the error the worker raised, fields included, through Celery's own result backend."""
    error = cls(*_example_arguments(cls))
    config = gone / "errors.toml"
    config.write_text(
        f'[redis]\nbroker_url = "{own_server.broker_url}"\nresults_url = "{own_server.results_url}"\n{TOML}'
    )
    app = build_app(load_settings(config, environ={}).settings)
    with Client(own_server.broker_url) as client:
        job = client.submit_embed(["never computed"], model="patient", deadline_s=1)
        if cls is JobCancelledError:
            error = cls(job.id)  # always of the job itself

        app.backend.mark_as_failure(job.id, error)

        with pytest.raises(PenstockError) as caught:
            client.job(job.id).result(timeout_s=10)
    assert type(caught.value) is cls
    assert caught.value.args == error.args
    assert str(caught.value) == str(error)
    assert {**vars(caught.value)} == {**vars(error)}
    app.backend.client.close()


def test_redis_that_is_not_there_is_an_error_within_the_limit() -> None:
    """A closed port is `BrokerUnavailableError` at once, not after retries."""
    with Client(f"redis://127.0.0.1:{free_port()}/0") as client:
        began = time.monotonic()

        with pytest.raises(BrokerUnavailableError, match="out of reach"):
            client.embed(["a"], model="minilm")
        assert time.monotonic() - began < 5


def test_an_address_that_swallows_packets_is_an_error_within_the_limit() -> None:
    """A server that accepts and never answers is given up after the limit."""
    import socket

    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"redis://127.0.0.1:{silent.getsockname()[1]}/0"
        with Client(url, connect_timeout_s=0.5) as client, pytest.raises(BrokerUnavailableError):
            client.models()


@pytest.mark.parametrize("user", ["", ":wrong@", "nobody:wrong@"])
def test_a_wrong_password_is_refused_without_showing_it(own_server: Server, user: str) -> None:
    """No password, a wrong one, and an unknown user are `BrokerRefusedError`."""
    with Client(f"redis://{user}127.0.0.1:{own_server.port}/0") as client:
        with pytest.raises(BrokerRefusedError) as caught:
            client.embed(["a"], model="patient")

        assert "wrong" not in str(caught.value)
        assert "s3cret" not in str(caught.value)


def test_a_full_redis_refuses_at_submit(own_server: Server, gone: Path) -> None:
    """When Redis has no memory left, the sender hears it and nothing was enqueued."""
    with redis.Redis.from_url(own_server.broker_url) as admin, Client(own_server.broker_url) as client:
        client.models()
        client.submit_embed(["warm"], model="patient").cancel()
        admin.config_set("maxmemory", "1mb")
        try:
            waiting = admin.llen("cpu.patient\x06\x163")

            with pytest.raises(BrokerRefusedError, match="maxmemory"):
                client.submit_embed(["refused"] * 100, model="patient")

            assert admin.llen("cpu.patient\x06\x163") == waiting
        finally:
            admin.config_set("maxmemory", "0")


def _example_arguments(cls: type[PenstockError]) -> list[object]:
    examples = {str: "a «word»", int: 7, float: 0.25, Sequence[str]: ["one", "two"]}
    examples |= {float | None: 0.5, Mapping[str, float] | None: {"queued_s": 0.125}}
    if cls.__init__ is Exception.__init__:
        return []
    return [examples[hint] for name, hint in get_type_hints(cls.__init__).items() if name != "return"]
