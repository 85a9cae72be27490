"""Remote models through real workers, as their callers see them."""

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import redis

from penstock import (
    Client,
    InvalidOptionError,
    ResultTooLargeError,
    UpstreamRefusedError,
    UpstreamUnavailableError,
)
from penstock_workers.serving.tasks import MAX_RETRIES
from tests.deployment import Server, WorkerProcess
from tests.eventually import eventually
from tests.upstream import ANSWER, ARGUMENTS, DIM, TOKEN, TOOLS, Upstream, says, vector_of, waits_for

TOML = """
[models.hosted]
task = "embed"
engine = "remote"
source = "{url}/v1"
rate_limit = {{ requests_per_minute = 6000 }}
remote = {{ token_env = "UPSTREAM_KEY", dim = {dim} }}

[models.chat]
task = "generate"
engine = "remote"
source = "{url}/v1"
remote = {{ token_env = "UPSTREAM_KEY" }}
"""
PENSTOCK = str(Path(sys.executable).with_name("penstock"))


@contextmanager
def workers(folder: Path, server: Server, upstream: Upstream, n: int) -> Iterator[list[WorkerProcess]]:
    """Run worker processes that ask the server."""
    toml = TOML.format(url=upstream.url, dim=DIM)
    running = [
        WorkerProcess(
            folder,
            server,
            toml=toml,
            queues="cpu.hosted,cpu.chat",
            environment={"UPSTREAM_KEY": TOKEN, "HF_TOKEN": "hf_somebody_elses"},
        )
        for _ in range(n)
    ]
    try:
        for worker in running:
            worker.wait_until_ready()
        yield running
    finally:
        for worker in running:
            worker.stop()


def test_remote_models_are_served_like_others(own: Server, upstream: Upstream, tmp_path: Path) -> None:
    """Vectors, answers and streams come back; the token is in no log, registry or status."""
    with workers(tmp_path, own, upstream, 1) as (worker,), Client(own.broker_url) as client:
        vectors = client.embed(["a", "b"], model="hosted")
        answer = client.generate("Who?", model="chat")
        pieces = [piece.text for piece in client.stream("Who?", model="chat")]
        registry = client.registry()
        status = told(worker)
        log = worker.log

    assert np.allclose(vectors, [vector_of("a"), vector_of("b")], atol=1e-6)
    assert (answer.text, answer.usage.prompt_tokens) == ("".join(ANSWER), 11)
    assert "".join(pieces) == answer.text
    assert (registry.models["hosted"].dim, registry.models["hosted"].dtype) == (DIM, "remote")
    assert {seen.headers["authorization"] for seen in upstream.seen} == {f"Bearer {TOKEN}"}
    assert TOKEN not in f"{registry} {status} {log}"
    assert "somebody" not in json.dumps([dict(seen.headers) for seen in upstream.seen])


def test_all_of_a_request_reaches_the_server(own: Server, upstream: Upstream, tmp_path: Path) -> None:
    """Tools, several answers, log-probabilities and texts to complete, as callers have them of any model."""
    with workers(tmp_path, own, upstream, 1), Client(own.broker_url) as client:
        asked = client.generate("Rain?", model="chat", tools=TOOLS)
        calls = asked.tool_calls or ()
        history: list = [
            {"role": "user", "content": "Rain?"},
            {"role": "assistant", "tool_calls": calls},
            *({"role": "tool", "content": "Rain.", "tool_call_id": call["id"]} for call in calls),
        ]
        answered = client.generate(None, model="chat", history=history, tools=TOOLS)
        several = client.generate("Who?", model="chat", n=2, logprobs=True, top_logprobs=2)
        *_, last = client.stream("Ada", model="chat", mode="complete", logprobs=True)
        with pytest.raises(InvalidOptionError, match="response_format"):
            client.generate("a", model="chat", mode="complete", response_format={"type": "json_object"})
        with pytest.raises(ResultTooLargeError):
            client.generate("a", model="chat", n=16, logprobs=True, top_logprobs=20, max_new_tokens=1 << 20)

    assert [call["function"] for call in calls] == [
        {"name": name, "arguments": ARGUMENTS} for name in ("weather", "time")
    ]
    assert answered.text == "".join(ANSWER)
    assert [choice.text for choice in several.choices] == ["".join(ANSWER), "".join(ANSWER) + "!"]
    assert several.usage.completion_tokens == 4
    assert several.logprobs is not None
    assert [token.top[0].token for token in several.logprobs] == ANSWER
    assert last.logprobs is not None
    assert [token.token for token in last.logprobs] == ANSWER
    assert [seen.path for seen in upstream.seen] == ["/v1/chat/completions"] * 3 + ["/v1/completions"]


def test_a_pause_holds_every_worker_and_is_told(own: Server, upstream: Upstream, tmp_path: Path) -> None:
    """One worker's 429 stops the others; status and the callers who cannot wait hear why and how long."""
    upstream.plan.append(says(429, Retry_After="30"))
    with workers(tmp_path, own, upstream, 2) as (worker, _), Client(own.broker_url) as client:
        with pytest.raises(UpstreamUnavailableError) as caught:
            client.submit_embed(["a"], model="hosted", deadline_s=10).result(timeout_s=15)
        eventually(lambda: len(client.registry().workers) == 2)
        others = [client.submit_embed([f"{i}"], model="hosted", deadline_s=10) for i in range(6)]
        errors = [failure(job) for job in others]
        eventually(lambda: "429" in client.registry().trouble("hosted"))
        status = told(worker)

    assert 20 < caught.value.retry_after_s <= 30
    assert all(isinstance(error, UpstreamUnavailableError) for error in errors)
    assert len([seen for seen in upstream.seen if seen.texts]) == 1
    (line,) = (line for line in status["models"] if line["name"] == "hosted")
    assert "on hold: 429" in line["detail"]
    assert not line["is_ready"]


def test_a_long_pause_is_waited_for_in_the_queue(own: Server, upstream: Upstream, tmp_path: Path) -> None:
    """The job takes no place of a worker meanwhile, counts as tried once, and is answered afterwards."""
    upstream.plan.append(says(503, Retry_After="6"))
    with (
        redis.Redis.from_url(own.broker_url) as broker,
        workers(tmp_path, own, upstream, 1) as (worker,),
        Client(own.broker_url) as client,
    ):
        job = client.submit_embed(["a"], model="hosted")
        eventually(lambda: broker.zcard("penstock:due"))
        held, tries, state = broker.hlen("penstock:leases"), broker.hgetall("penstock:tries"), job.state()
        vectors = job.result(timeout_s=60)
        eventually(lambda: not broker.exists("penstock:tries", "penstock:lost", "unacked"))
        log = worker.log

    assert (held, tries, state) == (0, {job.id.encode(): b"1"}, "waiting")
    assert np.allclose(vectors, [vector_of("a")], atol=1e-6)
    assert f"[{job.id}] retry:" in log
    assert broker.llen("penstock:dead") == 0


def test_a_job_that_was_tried_too_often_is_a_dead_letter(
    own: Server, upstream: Upstream, tmp_path: Path
) -> None:
    """Its caller is told; put back once the server is well, it has all its tries again and is answered."""
    upstream.plan.append(says(503, Retry_After="6"))
    with (
        redis.Redis.from_url(own.broker_url) as broker,
        workers(tmp_path, own, upstream, 1) as (worker,),
        Client(own.broker_url) as client,
    ):
        worker.process.send_signal(signal.SIGSTOP)
        job = client.submit_embed(["a"], model="hosted")
        broker.hset("penstock:tries", job.id, MAX_RETRIES)
        worker.process.send_signal(signal.SIGCONT)
        with pytest.raises(UpstreamUnavailableError, match="on hold: 503"):
            job.result(timeout_s=60)
        eventually(lambda: broker.llen("penstock:dead"))
        (letter,) = map(json.loads, broker.lrange("penstock:dead", 0, -1))
        traces = broker.exists("penstock:tries", "unacked")
        environment = worker.environment
        subprocess.run([PENSTOCK, "dead", "requeue", job.id], env=environment, check=True)
        vectors = client.job(job.id).result(timeout_s=60)

    assert (letter["id"], letter["n_deliveries"], traces) == (job.id, MAX_RETRIES + 1, 0)
    assert letter["reason"] == f"tried {MAX_RETRIES + 1} times: UpstreamUnavailableError"
    assert np.allclose(vectors, [vector_of("a")], atol=1e-6)


def test_a_refusal_names_the_variable(own: Server, upstream: Upstream, tmp_path: Path) -> None:
    """A token that is not accepted fails each job at once, by the name of its variable."""
    upstream.always = lambda _: says(401, {"error": {"message": f"bad key {TOKEN}"}})
    with workers(tmp_path, own, upstream, 1) as (worker,), Client(own.broker_url) as client:
        with pytest.raises(UpstreamRefusedError, match="UPSTREAM_KEY") as caught:
            client.embed(["a"], model="hosted")
        log = worker.log

    assert caught.value.status == 401
    assert TOKEN not in f"{caught.value} {log}"


def test_a_cancelled_job_gives_its_request_up(own: Server, upstream: Upstream, tmp_path: Path) -> None:
    """The connection to the server is closed when nobody waits any more."""
    upstream.always = lambda _: waits_for(threading.Event())
    with workers(tmp_path, own, upstream, 1), Client(own.broker_url) as client:
        job = client.submit_generate("Who?", model="chat")
        eventually(lambda: upstream.in_flight == 1)
        assert job.cancel()
        eventually(lambda: upstream.n_abandoned == 1)


def failure(job: object) -> BaseException:
    """Return why a job failed."""
    with pytest.raises(Exception) as caught:  # noqa: PT011  the kind is asserted by the caller
        job.result(timeout_s=15)  # type: ignore[attr-defined]  # a job of either kind
    return caught.value


def told(worker: WorkerProcess) -> dict:
    """Return what `penstock status` says."""
    done = subprocess.run(
        [PENSTOCK, "status", "--json"], env=worker.environment, capture_output=True, text=True, check=False
    )
    return json.loads(done.stdout)
