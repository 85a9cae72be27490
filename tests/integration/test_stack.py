"""`penstock up`, `status` and `demo` as people type them, and Flower beside them."""

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from penstock import Client
from penstock_workers.command.local_redis import free_port
from tests.deployment import BUNDLED, ROOT, Server
from tests.eventually import eventually

PENSTOCK = str(Path(sys.executable).with_name("penstock"))


class Stack:
    """A running `penstock up`."""

    def __init__(self, folder: Path, server: Server) -> None:
        self.flower_port = free_port()
        self.config = folder / "stack.toml"
        self.config.write_text(
            f'[redis]\nbroker_url = "{server.broker_url}"\nresults_url = "{server.results_url}"\n'
            f"[pools.cpu]\nprocesses = 2\n[flower]\nport = {self.flower_port}\n{BUNDLED}"
        )
        self.environment = {
            **os.environ,
            "PENSTOCK_CONFIG": str(self.config),
            "FLOWER_UNAUTHENTICATED_API": "true",
        }
        self.log = folder / "stack.log"
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [PENSTOCK, "up"], cwd=folder, env=self.environment, stdout=output, stderr=subprocess.STDOUT
            )

    def status(self) -> dict[str, object]:
        """What `penstock status --json` prints."""
        found = subprocess.run(
            [PENSTOCK, "status", "--json"], env=self.environment, capture_output=True, text=True, check=False
        )
        return json.loads(found.stdout) if found.stdout else {"is_ready": False, "error": found.stderr}

    def flower(self, path: str) -> object:
        """What Flower's API answers."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.flower_port}{path}", timeout=10) as answer:
            return json.load(answer)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Two worker processes and Flower, with a server of their own."""
    with Server(free_port()).running() as server:
        running = Stack(tmp_path_factory.mktemp("stack"), server)
        try:
            eventually(lambda: "penstock | ready" in running.log.read_text(), within_s=90)
            yield running
        finally:
            running.process.send_signal(signal.SIGINT)
            running.process.wait(60)
            assert running.process.returncode == 0, running.log.read_text()


def client_of(stack: Stack) -> Client:
    """Return a client of a stack."""
    text = stack.config.read_text()
    return Client(text.split('broker_url = "')[1].split('"')[0])


def test_status_tells_workers_and_models(stack: Stack) -> None:
    """`penstock status` names each worker and model, and what it serves."""

    def complete() -> dict[str, object] | None:
        status = stack.status()
        return status if status["is_ready"] and len(status["workers"]) == 2 else None

    status = eventually(complete, within_s=60)
    plain = subprocess.run(
        [PENSTOCK, "status"], env=stack.environment, capture_output=True, text=True, check=False
    )

    assert {line["name"] for line in status["models"]} == {"minilm", "chat"}
    assert "384 dimensions" in json.dumps(status)
    assert plain.returncode == 0
    assert plain.stdout.splitlines()[-1] == "ready"


def test_two_processes_share_the_work(stack: Stack) -> None:
    """Jobs of one queue are computed by both worker processes, whose log lines have their names."""
    with client_of(stack) as client:
        jobs = [client.submit_embed([f"text {i}"] * 50, model="minilm") for i in range(12)]
        for job in jobs:
            job.result(timeout_s=60)

    log = stack.log.read_text()
    assert "cpu-1 | " in log
    assert all(
        any(line.startswith(f"cpu-{n}") and "succeeded" in line for line in log.splitlines()) for n in (1, 2)
    )


def test_a_killed_process_is_back_at_once(stack: Stack) -> None:
    """Workers are forked from one that has imported what they need, and have their nodes' names."""

    def ready(*, but: int = 0) -> list[int] | None:
        found = [w.pid for w, _ in client.registry().workers if w.state == "ready" and w.pid != but]
        return found if len(found) == 2 else None

    with client_of(stack) as client:
        before = eventually(ready, within_s=60)
        titles = [Path(f"/proc/{pid}/cmdline").read_text() for pid in before]
        os.kill(before[0], signal.SIGKILL)
        after = eventually(lambda: ready(but=before[0]), within_s=60)

    assert sorted("cpu-1@" in title for title in titles) == [False, True]
    assert _parent(after[1]) == _parent(after[0])
    server = _parent(after[0])
    assert server != stack.process.pid
    assert len(list(Path(f"/proc/{server}/task").iterdir())) == 1  # more could not be forked safely
    assert "ended with signal 9" in stack.log.read_text()


def _both(workers: object) -> dict[str, Any] | None:
    return workers if isinstance(workers, dict) and len(workers) == 2 else None


def test_flower_shows_workers_queues_and_tasks_without_texts(stack: Stack) -> None:
    """Flower lists the workers with their queues, and a task with a summary for arguments."""
    with client_of(stack) as client:
        workers = eventually(lambda: _both(stack.flower("/api/workers?refresh=1")), within_s=60)
        texts = ["flowers-xylophone"] * 12
        job = client.submit_embed(texts, model="minilm")
        job.result(timeout_s=30)
        task = eventually(lambda: _task(stack, job.id), within_s=30)
        lengths = stack.flower("/api/queues/length")

    assert len(workers) == 2
    assert all("TaskPool" in worker["stats"]["pool"]["implementation"] for worker in workers.values())
    assert all(
        {"cpu.minilm", "cpu.chat"} == {q["name"] for q in w["active_queues"]} for w in workers.values()
    )
    assert task["kwargs"] == "12 texts, 204 characters"
    assert "EmbedResult(minilm, float32[12, 384])" in task["result"]
    assert "xylophone" not in json.dumps(stack.flower("/api/tasks"))
    assert "xylophone" not in stack.log.read_text()
    assert {"cpu.minilm", "cpu.chat"} <= {queue["name"] for queue in lengths["active_queues"]}


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:{port}", 200),
        ("localhost:{port}", 200),
        ("LOCALHOST", 200),
        ("[::1]:{port}", 200),
        ("evil.example", 403),
        ("evil.example:{port}", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example:{port}", 403),
    ],
)
@pytest.mark.parametrize("path", ["/tasks", "/api/workers", "/static/js/flower.js", "/nowhere"])
def test_flower_answers_to_this_machine_alone(stack: Stack, host: str, status: int, path: str) -> None:
    """A page whose own name was made to point to this machine reads nothing of it."""
    eventually(lambda: stack.flower("/api/workers") is not None, within_s=60)
    request = urllib.request.Request(f"http://127.0.0.1:{stack.flower_port}{path}")
    request.add_header("Host", host.format(port=stack.flower_port))

    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            found = answer.status
    except urllib.error.HTTPError as error:
        with error:
            found = error.code

    assert found == (404 if path == "/nowhere" and status == 200 else status)


def test_status_says_why_not(tmp_path: Path) -> None:
    """Without Redis, and without workers, `penstock status` says so and exits 1."""
    config = tmp_path / "none.toml"
    with Server(free_port()).running() as server:
        config.write_text(f'[redis]\nbroker_url = "{server.broker_url}"\n{BUNDLED}')
        command = [PENSTOCK, "status", "--config", str(config)]
        idle = subprocess.run(command, capture_output=True, text=True, check=False)
    down = subprocess.run(command, capture_output=True, text=True, check=False)

    assert (idle.returncode, down.returncode) == (1, 1)
    assert "minilm  NOT READY  no worker has announced it" in idle.stdout
    assert "out of reach" in down.stderr
    assert len(down.stderr.splitlines()) == 1


def test_the_demo_runs_the_main_job() -> None:
    """`penstock demo --json` embeds at least 150 passages of the documentation, searches and answers."""
    command = [PENSTOCK, "demo", "--config", "configs/demo.toml", "--json"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=110)

    assert found.returncode == 0, found.stderr
    report = json.loads(found.stdout)
    assert report["n_workers"] == 2
    assert report["n_passages"] >= 150
    assert report["texts_per_s"] > 0
    assert [len(question["passages"]) for question in report["questions"]] == [2, 2, 2]
    assert len(report["answers"]) == 3
    assert any(answer["system_prompt"] and answer["history"] for answer in report["answers"])
    assert all(answer["answer"]["text"] for answer in report["answers"])


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def _task(stack: Stack, job_id: str) -> dict[str, str] | None:
    try:
        task = stack.flower(f"/api/task/info/{job_id}")
    except urllib.error.HTTPError:  # not heard of yet
        return None
    return task if isinstance(task, dict) and task["state"] == "SUCCESS" else None
