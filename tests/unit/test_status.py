import json
from dataclasses import replace

import pytest

from penstock.registry import ALIVE_S, Registry, WorkerInfo
from penstock_workers.command.status import judge
from tests import announced

EMBEDDER = announced.model(pools=("gpu", "cpu"))
CHAT = replace(EMBEDDER, name="chat", task="generate", pools=("cpu",), dim=None, max_tokens=2048)
WORKER = announced.worker(models=("minilm", "chat"), memory_bytes=1536 << 20)


def registry(*workers: tuple[WorkerInfo, float]) -> Registry:
    """Return a registry of both models and these workers, each with its age in seconds."""
    return Registry(models={"minilm": EMBEDDER, "chat": CHAT}, workers=workers, results=None)


def test_deployment_with_a_ready_worker_is_ready() -> None:
    """Every model has a worker, and the lines say what it is."""
    status = judge(registry((WORKER, 1.0)), ("minilm", "chat"))

    assert status.is_ready
    assert status.lines() == [
        "worker  cpu@host:1  ready      minilm, chat on cpu, 1,536 MiB",
        "model   minilm      ready      embed, float32, 384 dimensions; workers: 0 in gpu, 1 in cpu",
        "model   chat        ready      generate, float32, context of 2048 tokens; workers: 1 in cpu",
        "ready",
    ]


@pytest.mark.parametrize(
    ("worker", "age_s", "detail"),
    [
        (WORKER, ALIVE_S + 5, "silent for 20 s: it died or lost Redis"),
        (replace(WORKER, state="loading"), 0.0, "loading minilm, chat"),
        (replace(WORKER, state="stopping"), 0.0, "stopping minilm, chat"),
        (replace(WORKER, state="stalled", note="a pass does not end"), 0.0, "a pass does not end"),
    ],
)
def test_worker_that_is_not_ready_says_why(worker: WorkerInfo, age_s: float, detail: str) -> None:
    """Each reason not to be ready is told on the worker's line, and its models are not ready."""
    status = judge(registry((worker, age_s)), ("chat",))

    assert not status.is_ready
    assert status.lines() == [
        f"worker  cpu@host:1  NOT READY  {detail}",
        "model   chat        NOT READY  no ready worker (0 in cpu); its jobs wait",
        "not ready",
    ]


def test_configured_model_that_nobody_announced_is_not_ready() -> None:
    """One missing model makes the deployment not ready."""
    status = judge(registry((WORKER, 1.0)), ("minilm", "other"))

    assert not status.is_ready
    assert status.models[0].is_ready
    assert status.models[1].detail == "no worker has announced it"


def test_announced_models_count_where_none_is_configured() -> None:
    """Without a configuration the registry alone is judged."""
    status = judge(registry((WORKER, 1.0)), ())

    assert [line.name for line in status.models] == ["minilm", "chat"]
    assert status.is_ready


def test_empty_deployment_is_not_ready_and_says_so() -> None:
    """Nothing at all is not "everything is ready"."""
    status = judge(Registry(models={}, workers=(), results=None), ())

    assert not status.is_ready
    assert status.lines() == ["not ready: no worker has announced itself and no model is configured"]


def test_one_dead_worker_of_two_does_not_matter_to_the_models() -> None:
    """The dead one is shown, and jobs are taken by the other."""
    dead = replace(WORKER, id="cpu@host:2", pid=2)

    status = judge(registry((WORKER, 1.0), (dead, 100.0)), ("minilm", "chat"))

    assert [line.is_ready for line in status.workers] == [True, False]
    assert status.is_ready


def test_status_is_json() -> None:
    """Health checks read the same facts as people do."""
    status = judge(registry((WORKER, 1.0)), ("chat",))

    read = json.loads(json.dumps(status.to_dict()))

    assert read["is_ready"] is True
    assert [line["name"] for line in read["workers"]] == ["cpu@host:1"]
    assert read["models"] == [{"name": "chat", "is_ready": True, "detail": status.models[0].detail}]
