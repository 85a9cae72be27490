import json
from typing import Any

import pytest
from celery.concurrency.prefork import TaskPool as PreforkPool
from celery.concurrency.solo import TaskPool as SoloPool
from celery.concurrency.thread import TaskPool as ThreadPool

from penstock.errors import ConfigError
from penstock_workers.configuration import load_settings
from penstock_workers.serving.lifecycle import choose_models, refuse_forks

MODELS: dict[str, Any] = {
    "minilm": {"task": "embed", "source": "a", "pools": ["gpu", "cpu"]},
    "chat": {"task": "generate", "source": "b", "pools": ["cpu"]},
}
SETTINGS = load_settings(arguments={"models": json.dumps(MODELS)}, environ={}).settings
EMPTY = load_settings(environ={}).settings


@pytest.mark.parametrize(
    ("queues", "chosen"),
    [
        (["cpu.minilm"], ("cpu", ["minilm"])),
        (["gpu.minilm"], ("gpu", ["minilm"])),
        (["cpu.minilm", "cpu.chat"], ("cpu", ["chat", "minilm"])),
        (["cpu.chat", "cpu.minilm"], ("cpu", ["chat", "minilm"])),
    ],
)
def test_queues_say_what_is_loaded(queues: list[str], chosen: tuple[str, list[str]]) -> None:
    """A worker loads the models of its queues, in an order that does not depend on the command line."""
    assert choose_models(queues, SETTINGS) == chosen


@pytest.mark.parametrize("queue", ["celery", "gpu.chat", "cpu.other", "minilm", "cpu.", "CPU.minilm"])
def test_queue_of_no_model_stops_the_start(queue: str) -> None:
    """A worker that would take jobs of no model names the queues there are."""
    with pytest.raises(ConfigError) as caught:
        choose_models(["cpu.chat", queue], SETTINGS)

    assert caught.value.problems == (
        f"queue {queue!r} is of no model; queues: cpu.chat, cpu.minilm, gpu.minilm",
    )


def test_every_unknown_queue_is_told() -> None:
    """All that is wrong is told at once."""
    with pytest.raises(ConfigError) as caught:
        choose_models(["b", "a"], EMPTY)

    assert caught.value.problems == (
        "queue 'a' is of no model; queues: none: the configuration has no models",
        "queue 'b' is of no model; queues: none: the configuration has no models",
    )


def test_queues_of_two_pools_stop_the_start() -> None:
    """A process works on one kind of hardware."""
    with pytest.raises(ConfigError, match=r"two pools, a process works for one: cpu\.chat, gpu\.minilm"):
        choose_models(["gpu.minilm", "cpu.chat"], SETTINGS)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["-A", "penstock_workers", "worker", "-P", "threads"],
        ["worker", "--pool=threads", "-n", "prefork@host"],
        ["worker", "-Q", "cpu.prefork"],
    ],
)
def test_threads_are_allowed(arguments: list[str]) -> None:
    """The pool that shares one model among all jobs."""
    refuse_forks(ThreadPool, arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ["worker", "-P", "prefork"],
        ["worker", "-Pprefork", "-c", "2"],
        ["worker", "--pool", "prefork"],
        ["worker", "--pool=prefork"],
        ["worker", "-P", "processes"],
    ],
    ids=" ".join,
)
def test_asked_for_forks_are_refused(arguments: list[str]) -> None:
    """Celery takes its default, which is ours, for prefork; the command line tells what was asked."""
    with pytest.raises(ConfigError, match=r"pool (prefork|processes) is refused: .*use -P threads"):
        refuse_forks(ThreadPool, arguments)


@pytest.mark.parametrize(("pool", "name"), [(PreforkPool, "prefork"), (SoloPool, "solo")])
def test_other_pools_are_refused(pool: type, name: str) -> None:
    """However another pool was chosen, it is named."""
    with pytest.raises(ConfigError, match=f"pool {name} is refused"):
        refuse_forks(pool, ["worker"])
