"""What `penstock queues` counts, and what becomes of dead letters that people requeue or drop."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from click.testing import CliRunner

from penstock import BrokerUnavailableError, InvalidMessageError
from penstock.keys import DEAD_KEY, UNTOLD_KEY, record_key, result_key
from penstock.scripts import NO_LIMITS, script
from penstock_workers.cli import cli
from penstock_workers.command.local_redis import free_port
from penstock_workers.command.queues import DeadJob, Queues
from penstock_workers.configuration import load_settings
from penstock_workers.delivery.polling import pop_arguments
from penstock_workers.settings import Settings
from tests.deployment import BUNDLED, Server
from tests.eventually import eventually
from tests.faults.fleet import message

QUEUE = "cpu.minilm"


@pytest.fixture
def broker(own: Server) -> Iterator[redis.Redis]:
    """The queues themselves."""
    with redis.Redis.from_url(own.broker_url) as connected:
        yield connected


@pytest.fixture
def results(own: Server) -> Iterator[redis.Redis]:
    """The results themselves."""
    with redis.Redis.from_url(own.results_url) as connected:
        yield connected


@pytest.fixture
def settings(own: Server, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A deployment on that server."""
    config = tmp_path_factory.mktemp("queues") / "deployment.toml"
    config.write_text(
        f'[redis]\nbroker_url = "{own.broker_url}"\nresults_url = "{own.results_url}"\n{BUNDLED}'
    )
    return load_settings(config, environ={}).settings


def give_up(broker: redis.Redis, results: redis.Redis) -> str:
    """Give a job up as a worker does, its sender still to be told; return its id."""
    job_id, raw = message("penstock.embed", [], queue=QUEUE)
    run(broker, "push", *NO_LIMITS.arguments(), raw, "", keys=(QUEUE,))
    arguments = pop_arguments(
        "worker/1", lease_s=20, most=1, prefetch=[1], token_budgets=[None], held=[(0, 0)]
    )
    _, tag, *_ = run(broker, "pop", *arguments, keys=(QUEUE,))
    letter = {"id": job_id, "queue": QUEUE, "n_deliveries": 4, "message": raw.decode()}
    assert run(broker, "dead_letter", tag, "worker/1", json.dumps(letter), 1, 40)
    results.mset({result_key(job_id): b"lost", record_key(job_id): b"FAILURE"})
    return job_id


def run(client: redis.Redis, name: str, *arguments: str | bytes | float, keys: tuple[str, ...] = ()) -> Any:
    """Run one of the scripts."""
    return client.register_script(script(name))(keys=keys, args=arguments)


def the_job(queues: Queues) -> DeadJob:
    """Return the one that was given up."""
    (job,) = queues.dead()
    return job


def test_every_priority_is_counted(broker: redis.Redis, settings: Settings) -> None:
    """Those too that only foreign senders use."""
    for key in (QUEUE, *(f"{QUEUE}\x06\x16{priority}" for priority in (3, 6, 9))):
        broker.lpush(key, message("penstock.embed", [], queue=QUEUE)[1])

    state = next(state for state in Queues(settings).states() if state.queue == QUEUE)

    assert state.waiting == 4


def test_a_job_that_is_put_back_may_end_again(
    broker: redis.Redis, results: redis.Redis, settings: Settings
) -> None:
    """It waits with all deliveries before it, its record says sent, and nobody is told that it is lost."""
    job_id, queues = give_up(broker, results), Queues(settings)

    assert queues.requeue(the_job(queues))

    assert json.loads(broker.lindex(QUEUE, 0))["headers"]["id"] == job_id
    assert results.get(record_key(job_id)) == b"sent"
    assert not results.exists(result_key(job_id))
    assert not broker.exists("unacked", UNTOLD_KEY)
    assert broker.hget("penstock:lost", job_id) == b"0"


def test_a_job_that_was_dropped_is_not_put_back(
    broker: redis.Redis, results: redis.Redis, settings: Settings
) -> None:
    """Who comes second changes nothing, neither queue nor record."""
    job_id, queues = give_up(broker, results), Queues(settings)
    job = the_job(queues)
    assert queues.drop(job)

    assert not queues.requeue(job)

    assert results.get(record_key(job_id)) == b"FAILURE"
    assert not broker.exists(QUEUE, "unacked")


def test_putting_back_may_break_off(broker: redis.Redis, results: redis.Redis, settings: Settings) -> None:
    """Where the result store is away the job is not lost: a worker takes it over."""
    job_id = give_up(broker, results)
    nowhere = {"results_url": f"redis://127.0.0.1:{free_port()}/1"}
    queues = Queues(settings.model_copy(update={"redis": settings.redis.model_copy(update=nowhere)}))

    with pytest.raises(BrokerUnavailableError):
        queues.requeue(the_job(queues))

    assert queues.dead() == []
    broker.zadd("unacked_index", {job_id: 1})  # the lease runs out
    broker.hset("penstock:sweep", mapping={"last": broker.time()[0], "from": 0})
    eventually(lambda: run(broker, "take_over", 20, 4, 10, "worker/2") == [1])
    assert broker.llen(QUEUE) == 1


@pytest.mark.parametrize("queue", ["any-list-at-all", "penstock:models", "cpu.nobody", "cpu.minilm\n", ""])
def test_a_forged_letter_is_not_put_back(broker: redis.Redis, settings: Settings, queue: str) -> None:
    """A dead letter goes back into the queue of a known model, and into no other list."""
    _, raw = message("penstock.embed", [], queue=QUEUE)
    letter = {"id": "forged", "queue": queue, "n_deliveries": 4, "at": 1.0, "message": raw.decode()}
    broker.rpush("penstock:dead", json.dumps(letter))
    queues = Queues(settings)

    with pytest.raises(InvalidMessageError, match="no model that is known"):
        queues.requeue(the_job(queues))

    assert broker.keys("*") == [b"penstock:dead"]


@pytest.mark.parametrize(
    "entry",
    [
        b"\xff",
        b"[]",
        b'{"id": 5, "n_deliveries": "x", "at": 1e300, "queue": {}}',
        json.dumps({"id": "\ud800\x1b]0;title\x07", "reason": "a\nb", "queue": "\u202e", "at": 1}).encode(),
        b'{"message": 7}',
    ],
    ids=ascii,
)
def test_any_letter_is_listed(broker: redis.Redis, settings: Settings, tmp_path: Path, entry: bytes) -> None:
    """`penstock dead list` prints whatever lies there in one clean line each, and all can be dropped."""
    broker.rpush("penstock:dead", entry)
    config = tmp_path / "deployment.toml"
    config.write_text(
        f'[redis]\nbroker_url = "{settings.broker_url}"\nresults_url = "{settings.results_url}"\n'
    )

    for arguments in (["list"], ["list", "--json"], ["requeue", "--all"]):
        done = CliRunner().invoke(cli, ["dead", *arguments, "--config", str(config)])
        assert done.exit_code == 0, done.output
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\ud800-\udfff]", done.output)
    assert Queues(settings).drop(the_job(Queues(settings)))
    assert not broker.exists("penstock:dead")


def test_dead_letters_are_listed_in_words(own: Server, broker: redis.Redis) -> None:
    """One line for each, or one that there is none."""
    command = ["dead", "list", "--set", f"redis.broker_url={own.broker_url}"]

    none = CliRunner().invoke(cli, command).output
    for n_deliveries in (1, 4):
        letter = {"id": f"job-{n_deliveries}", "queue": QUEUE, "n_deliveries": n_deliveries, "reason": "lost"}
        broker.rpush(DEAD_KEY, json.dumps(letter))
    one, four = CliRunner().invoke(cli, command).output.splitlines()

    assert none == "no dead letters\n"
    assert one.endswith(f"{QUEUE}  1 delivery  lost")
    assert four.endswith(f"{QUEUE}  4 deliveries  lost")
