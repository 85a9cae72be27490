"""The pool of job threads: how jobs are requeued, and how a worker process ends."""

import base64
import json
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from celery import Celery

from penstock.scripts import push_arguments, script
from penstock_workers.command.local_redis import free_port
from penstock_workers.delivery.consumer import EVENTS_S
from tests.deployment import Server
from tests.eventually import eventually
from tests.faults.fleet import message
from tests.integration.noop_app import QUEUE, TASKS, NoopWorker, build_noop_app

ONE_ANSWER = {"reply": True, "timeout": 20, "limit": 1}
"""Celery waits for its whole time unless it knows how many answer."""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server of this module's own: its tests send commands to all workers and empty databases."""
    with Server(free_port()).running() as running:
        yield running


@pytest.fixture
def app(server: Server) -> Iterator[Celery]:
    """An app that gives commands to a worker."""
    with build_noop_app(server.broker_url, server.results_url) as commanding:
        yield commanding


def test_jobs_are_acknowledged_as_they_end(server: Server, tmp_path: Path) -> None:
    """After SIGTERM no job is taken, each running one is acknowledged as it ends, and the code is 0."""
    with NoopWorker(tmp_path, server) as worker:
        jobs = {name: worker.hold(name) for name in ("short", "middle", "long")}
        worker.signal(signal.SIGTERM)
        eventually(lambda: "3 running jobs may end within" in worker.log)
        late = worker.send("add", 1)

        for name, n_held in (("short", 2), ("middle", 1)):
            worker.release(name)
            eventually(lambda n=n_held: worker.n_held() == n)
        still_running = worker.process.poll() is None
        worker.release("long")
        code = worker.wait(5)

        assert code == 0, worker.log
        assert still_running
        assert [worker.result(job) for job in jobs.values()] == [(name, "SUCCESS") for name in jobs]
        assert worker.n_held() == 0
        assert worker.n_queued() == 1
        assert worker.result(late) is None
        assert "handed back" not in worker.log
        assert "Traceback" not in worker.log


def test_events_of_a_moment_are_sent_together(server: Server, tmp_path: Path) -> None:
    """Each job has its three events, the last one before the end too; far fewer messages carry them."""
    n_jobs, messages = 40, []
    with (
        NoopWorker(tmp_path, server, worker_send_task_events=True) as worker,
        worker.broker.pubsub() as channel,
    ):
        channel.psubscribe("*celeryev/task.multi")
        push = worker.broker.register_script(script("push"))
        began = time.monotonic()
        for number in range(n_jobs):
            job, raw = message(f"{TASKS}.add", [number], queue=QUEUE)
            push(*push_arguments(QUEUE, raw))
            eventually(lambda job=job: worker.result(job))
        seconds = time.monotonic() - began
        worker.signal(signal.SIGTERM)
        worker.wait()
        while heard := channel.get_message(timeout=1):
            if heard["type"] == "pmessage":
                messages.append(json.loads(base64.b64decode(json.loads(heard["data"])["body"])))

    kinds = Counter(event["type"] for events in messages for event in events)
    assert kinds == dict.fromkeys(("task-received", "task-started", "task-succeeded"), n_jobs)
    assert len(messages) <= seconds / EVENTS_S + 3 * n_jobs / 24 + 3  # Celery sends 24 events at once


def test_jobs_past_the_limit_are_requeued(server: Server, tmp_path: Path) -> None:
    """A job that does not end within the limit goes back to its queue, and its thread keeps nothing alive."""
    with NoopWorker(tmp_path, server, worker_drain_s=1) as worker:
        ended, hanging = worker.hold("ended"), worker.send("hang")
        worker.wait_until_started("hang")
        worker.signal(signal.SIGTERM)
        worker.release("ended")
        began = time.monotonic()
        code = worker.wait(5)

        assert code == 0, worker.log
        assert 0.8 < time.monotonic() - began < 3
        assert worker.result(ended) == ("ended", "SUCCESS")
        assert worker.result(hanging) is None
        assert (worker.n_queued(), worker.n_held()) == (1, 0)
        assert "1 jobs have not ended and are handed back" in worker.log


@pytest.mark.parametrize(
    "signals",
    [(signal.SIGQUIT,), (signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGINT)],
    ids=lambda signals: "-".join(number.name for number in signals),
)
def test_an_impatient_stop_requeues_at_once(
    server: Server, tmp_path: Path, signals: tuple[signal.Signals, ...]
) -> None:
    """SIGQUIT, or a second signal, waits for no job; the code is 0."""
    with NoopWorker(tmp_path, server) as worker:
        worker.hold("one")
        worker.send("hang")
        worker.wait_until_started("hang")
        for number in signals[:-1]:
            worker.signal(number)
            eventually(lambda: "2 running jobs may end" in worker.log)
        worker.signal(signals[-1])
        began = time.monotonic()
        code = worker.wait(5)

        assert code == 0, worker.log
        assert time.monotonic() - began < 2
        assert (worker.n_queued(), worker.n_held()) == (2, 0)
        assert "Traceback" not in worker.log


def test_jobs_that_have_not_started_are_requeued_first(server: Server, tmp_path: Path) -> None:
    """What was taken but not begun is its peers' while the last job still runs."""
    with NoopWorker(tmp_path, server, threads=1, worker_prefetch_multiplier=4) as worker:
        running = worker.hold("running")
        for n in range(3):
            worker.send("add", n)
        eventually(lambda: worker.n_held() == 4)

        worker.signal(signal.SIGTERM)
        eventually(lambda: (worker.n_queued(), worker.n_held()) == (3, 1))
        worker.release("running")
        code = worker.wait(5)

        assert code == 0, worker.log
        assert worker.result(running) == ("running", "SUCCESS")
        assert (worker.n_queued(), worker.n_held()) == (3, 0)
        assert "Traceback" not in worker.log


def test_an_error_outside_of_the_job_frees_its_place(server: Server, tmp_path: Path) -> None:
    """A job whose handling fails is requeued and not forgotten; the only thread serves the next one."""
    with NoopWorker(tmp_path, server, threads=1) as worker:
        failing, next_ = worker.send("fail_in_the_pool"), worker.send("add", 1, 2)

        eventually(lambda: worker.result(next_) and worker.result(failing))

        eventually(lambda: (worker.n_queued(), worker.n_held()) == (0, 0))
        assert worker.result(next_) == (3, "SUCCESS")
        assert worker.result(failing)[0]["exc_type"] == "MemoryError"
        assert worker.log.count("job handed back: MemoryError") == 1


def test_remote_commands_are_answered(server: Server, tmp_path: Path, app: Celery) -> None:
    """What threads cannot do is refused in a sentence; a terminated job ends for its caller."""
    with NoopWorker(tmp_path, server, threads=1) as worker:
        job = worker.hold("revoked")
        control, sentence = app.control, "the pool keeps its 1 threads: start another worker process"
        for command in (control.pool_grow, control.pool_shrink, control.autoscale):
            numbers = (1, 1) if command == control.autoscale else (1,)
            (answer,) = command(*numbers, **ONE_ANSWER)
            assert sentence in next(iter(answer.values()))["error"]

        (stats,) = app.control.inspect(timeout=20, limit=1).stats().values()
        (revoked,) = control.revoke(job, terminate=True, **ONE_ANSWER)
        worker.release("revoked")
        next_ = worker.send("add", 1, 2)

        eventually(lambda: worker.result(next_))
        assert stats["pool"] == {
            "implementation": "penstock_workers.delivery.pool:TaskPool",
            "max-concurrency": 1,
            "threads": 1,
            "running": 1,
            "drain_s": 30,
        }
        assert next(iter(revoked.values())) == {"ok": f"terminate: {job}"}
        assert worker.result(job)[1] == "REVOKED"
        assert "its result is dropped" in worker.log
        assert "Traceback" not in worker.log


def test_a_remote_shutdown_is_a_stop_like_any_other(server: Server, tmp_path: Path, app: Celery) -> None:
    """Celery's command `shutdown` lets running jobs end, and a signal after it counts as the second."""
    with NoopWorker(tmp_path, server) as worker:
        ended = worker.hold("ended")
        worker.hold("not ended")

        app.control.shutdown()
        eventually(lambda: "2 running jobs may end" in worker.log)
        worker.release("ended")
        eventually(lambda: worker.n_held() == 1)
        worker.signal(signal.SIGTERM)
        code = worker.wait(3)

        assert code == 0, worker.log
        assert worker.result(ended) == ("ended", "SUCCESS")
        assert (worker.n_queued(), worker.n_held()) == (1, 0)


def test_a_broker_lost_while_stopping_does_not_cost_the_result(server: Server, tmp_path: Path) -> None:
    """A running job ends and is stored, though its message can no longer be acknowledged."""
    broker = Server(free_port())
    with ExitStack() as until_killed:
        until_killed.enter_context(broker.running())
        with NoopWorker(tmp_path, broker, results=server) as worker:
            job = worker.send("nap", 1.5)
            worker.wait_until_started("nap")
            worker.signal(signal.SIGTERM)
            eventually(lambda: "1 running jobs may end" in worker.log)

            until_killed.close()
            code = worker.wait(20)

            assert code == 0, worker.log
            assert worker.result(job) == ("rested", "SUCCESS")


def test_a_stop_that_hangs_is_ended_by_force(tmp_path: Path) -> None:
    """A broker that answers nothing, and says nothing either, does not keep the process alive."""
    broker = Server(free_port())
    with broker.running(), NoopWorker(tmp_path, broker) as worker:
        worker.hold("held")
        worker.broker.client_pause(60_000)

        worker.signal(signal.SIGQUIT)
        code = worker.wait(20)

        assert code == 1
        assert "stopping: still not ended after 15 s more; ended by force" in worker.log
