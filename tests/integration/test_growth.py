"""What failed requests leave behind in a worker: nothing."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from penstock import Client
from penstock.errors import PenstockError
from tests.deployment import BUNDLED, Server, WorkerProcess
from tests.eventually import eventually

COMPLEX = {"type": "regex", "pattern": "a{1000}{1000}"}
"""Compiling it takes some 60 MB, and its first token shows that it is too complex."""


@pytest.fixture(scope="module")
def process(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    """Return a worker whose memory is looked at."""
    started = WorkerProcess(
        tmp_path_factory.mktemp("growth"),
        server,
        toml=BUNDLED.replace("models.chat", "models.grow"),
        queues="cpu.grow",
    )
    try:
        started.wait_until_ready()
        yield started
    finally:
        started.stop()


def resident_mb(process: WorkerProcess) -> float:
    """Return what a process holds in memory."""
    status = Path(f"/proc/{process.process.pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS:")).split()[1]) / 1024


def fail(client: Client, **fields: Any) -> str:
    """Return the name of the error that a request ends with."""
    try:
        client.generate("Hello", model="grow", **fields)
    except PenstockError as error:
        return type(error).__name__
    return "none"


def cancel(client: Client) -> str:
    """Send a job, and take it back."""
    job = client.submit_generate("Hello", model="grow", max_new_tokens=64)
    job.cancel()
    return "JobCancelledError"


@pytest.mark.timeout(240)
def test_formats_that_prove_too_complex_are_let_go(client: Client, process: WorkerProcess) -> None:
    """However much each of them took, the next one finds it free."""
    for _ in range(4):
        assert fail(client, response_format=COMPLEX) == "InvalidFormatError"
    before = resident_mb(process)

    for _ in range(16):
        assert fail(client, response_format=COMPLEX) == "InvalidFormatError"

    # 1,000 MB where each is kept; allocators keep some of what was freed.
    eventually(lambda: resident_mb(process) - before < 450, within_s=30)


FAILURES: dict[str, tuple[Callable[[Client], str], str]] = {
    "unreadable": (
        lambda client: fail(client, response_format={"type": "regex", "pattern": "("}),
        "InvalidFormatError",
    ),
    "incomplete": (
        lambda client: fail(
            client, response_format={"type": "regex", "pattern": "[a-z]{99}"}, max_new_tokens=2
        ),
        "IncompleteOutputError",
    ),
    "too long": (lambda client: fail(client, system_prompt="word " * 3000), "InputTooLongError"),
    "no such switch": (lambda client: fail(client, enable_thinking=True), "InvalidOptionError"),
    "late": (lambda client: fail(client, deadline_s=0.001), "DeadlineExceededError or QueueDelayError"),
    "cancelled": (cancel, "JobCancelledError"),
    "none": (lambda client: fail(client, max_new_tokens=2), "none"),
}


@pytest.mark.timeout(240)
@pytest.mark.parametrize("kind", FAILURES)
def test_failed_requests_leave_nothing_behind(client: Client, process: WorkerProcess, kind: str) -> None:
    """A worker that fails sixty more of a kind holds no more than before: each error's frames took 0.2 MB."""
    ask, error = FAILURES[kind]
    for _ in range(20):
        assert ask(client) in error
    before = resident_mb(process)

    for _ in range(60):
        ask(client)

    eventually(lambda: resident_mb(process) - before < 6, within_s=30)
