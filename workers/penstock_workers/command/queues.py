"""What waits, runs, is delayed or was given up: `penstock queues` and `penstock dead`."""

import json
import secrets
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import click

from penstock.codec import encode_failure
from penstock.connections import connect_sync, redis_errors
from penstock.envelope import EntryError, open_entry, printable
from penstock.errors import ConfigError, InvalidMessageError, JobCancelledError, UnknownJobError
from penstock.keys import (
    DEAD_KEY,
    DELAYED_KEY,
    LEASES_KEY,
    MODELS_KEY,
    RECORD_TTL_S,
    SWEEP_KEY,
    WORKERS_KEY,
    load_key,
    queue_key,
    queue_name,
    record_key,
    result_key,
)
from penstock.registry import Registry
from penstock.request import Priority
from penstock.result_store import END_JOB, SENT, end_job_arguments
from penstock.routing import predict
from penstock.scripts import script
from penstock_workers.command.deployment import Deployment, deployment_options
from penstock_workers.delivery.leases import LEASE_S
from penstock_workers.delivery.purge import purge
from penstock_workers.settings import Settings

PRIORITIES: Final = (0, 3, 6, 9)
"""The levels of kombu. Our clients send no 9; others may."""


@click.command()
@deployment_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def queues(config: Path | None, assignments: tuple[str, ...], as_json: bool) -> None:
    """Count what waits, runs, is delayed or was given up, per queue."""
    states = Queues(Deployment(config, assignments).joined().loaded.settings).states()
    if as_json:
        click.echo(json.dumps([asdict(state) for state in states], indent=2))
    else:
        click.echo("\n".join(table(states)))


@click.command("purge")
@deployment_options
@click.argument("names", nargs=-1, metavar="[QUEUE]...")
@click.option("--all", "everything", is_flag=True, help="All queues of the configured models.")
def purge_queues(
    config: Path | None, assignments: tuple[str, ...], names: tuple[str, ...], everything: bool
) -> None:
    """Drop the jobs of queues that wait; their callers get JobCancelledError."""
    found = Queues(Deployment(config, assignments).joined().loaded.settings)
    known = [state.queue for state in found.states()]
    if problems := [
        f"queue {name!r} is of no model; queues: {', '.join(known)}" for name in set(names) - set(known)
    ]:
        raise ConfigError(problems)
    if not everything and not names:
        raise ConfigError(["name the queues, or say --all"])
    click.echo(f"{sum(found.purge(name) for name in (known if everything else names))} dropped")


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueState:
    """One queue at one moment.

    Attributes:
        queue: Name of the queue, `<pool>.<model>`.
        waiting: Jobs of all priorities that no worker has taken.
        in_flight: Jobs that workers hold.
        delayed: Jobs that are not due yet.
        dead: Jobs that were given up.
        tokens: Tokens of waiting and held jobs, as their senders estimated them.
        predicted_wait_s: Predicted wait of a job of the default priority that is sent now, seconds; None if
            no worker of the queue has told its speed.
        spilled: Jobs sent here so far because the wait in the model's preferred pool was longer.
        oldest_s: Age of the oldest waiting job, seconds, by the broker's clock; None if its sender does not
            say when it was sent.
    """

    queue: str
    waiting: int
    in_flight: int
    delayed: int
    dead: int
    tokens: int
    predicted_wait_s: float | None
    spilled: int
    oldest_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadJob:
    """A job that was given up.

    Attributes:
        id: Id of the job; empty where the message names none.
        task: Name of the Celery task; empty where the message names none.
        queue: Queue that the job was taken from.
        reason: One sentence that says why the job was given up.
        n_deliveries: Number of times a worker took it.
        at: Time it was given up, Unix seconds on Redis' clock.
        message: The message, as it was in the queue.
        entry: Element of the dead-letter list.
    """

    id: str
    task: str
    queue: str
    reason: str
    n_deliveries: int
    at: float
    message: str
    entry: bytes

    def to_dict(self, *, with_text: bool = False) -> dict[str, object]:
        """Return it for JSON, without the message unless asked: it holds what the caller wrote."""
        fields = asdict(self)
        del fields["entry"]
        if not with_text:
            del fields["message"]
        return fields


class Queues:
    """The broker's queues, as operators see and change them."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._broker = connect_sync(settings.broker_url)
        self._results = connect_sync(settings.results_url)

    def states(self) -> list[QueueState]:
        """Look at every queue of a model that was announced or is configured.

        Raises:
            TransportError: Redis is out of reach, or refuses.
        """
        with redis_errors(self._settings.redis.broker_url):
            second, microsecond = self._broker.time()
            hashes = self._hash(MODELS_KEY), self._hash(WORKERS_KEY)
            now_s = second + microsecond / 1e6
            registry = Registry.read(*hashes, None, now_s)
            names = self._names(registry)
            held = Counter(_queue_of(lease.split(b"\n")[1]) for lease in self._hash(LEASES_KEY).values())
            delayed = Counter(_queue_of(_list_of(entry)) for entry in self._hash(DELAYED_KEY).values())
            dead = Counter(job.queue for job in self.dead())
            return [self._state(name, registry, held, delayed, dead, now_s) for name in sorted(names)]

    def dead(self) -> list[DeadJob]:
        """Return the jobs that were given up, oldest first."""
        with redis_errors(self._settings.redis.broker_url):
            entries: Sequence[bytes] = self._broker.lrange(DEAD_KEY, 0, -1)  # type: ignore[assignment]
        return [_dead_job(entry) for entry in entries]

    def n_dropped(self) -> int:
        """Count the dead letters that were dropped, oldest first, because the list was full."""
        with redis_errors(self._settings.redis.broker_url):
            return int(self._broker.hget(SWEEP_KEY, "dropped") or 0)

    def find_dead(self, job_id: str) -> DeadJob:
        """Return the dead letter of a job.

        Raises:
            UnknownJobError: No dead letter has this id.
        """
        found = next((job for job in self.dead() if job.id == job_id), None)
        if found is None:
            raise UnknownJobError(job_id)
        return found

    def requeue(self, job: DeadJob) -> bool:
        """Put a job back into its queue, with all its deliveries before it; False if it was gone.

        It is leased in between: another program that drops or requeues it meanwhile finds it gone, and if
        this process dies here, a worker takes the job over.

        Raises:
            InvalidMessageError: A worker would refuse the message, or its queue belongs to no known model.
        """
        try:
            message = open_entry(job.message.encode(errors="replace"))
        except EntryError as error:
            raise InvalidMessageError(f"a worker would refuse it again: {error.problem}") from None
        job_id, number = message["headers"].get("id"), message["properties"].get("priority")
        with redis_errors(self._settings.redis.broker_url):
            if not job_id or job.queue not in self._names():
                raise InvalidMessageError(f"{printable(job.queue)!r} is the queue of no model that is known")
        tenant = message["headers"].get("tenant") or ""
        key = queue_key(job.queue, number if number in PRIORITIES else 0, tenant)
        token = secrets.token_hex(8)
        with redis_errors(self._settings.redis.broker_url):
            tag = self._run("revive", job.entry, job.message, key, token, LEASE_S)
        if tag is None:
            return False
        with redis_errors(self._settings.redis.results_url):
            # Its caller was told that it is lost; from here on the job may end once more.
            self._results.delete(result_key(job_id))
            self._results.set(record_key(job_id), SENT, ex=RECORD_TTL_S)
        with redis_errors(self._settings.redis.broker_url):
            self._run("requeue", 0, tag, token)
        return True

    def drop(self, job: DeadJob) -> bool:
        """Forget a job for good; False if it was gone."""
        with redis_errors(self._settings.redis.broker_url):
            return bool(self._broker.lrem(DEAD_KEY, 1, job.entry))  # type: ignore[arg-type]  # bytes are fine

    def purge(self, queue: str) -> int:
        """Drop all waiting jobs of a queue, tell their callers, and return how many they were."""
        lists = [queue_key(queue, priority) for priority in PRIORITIES]
        with redis_errors(self._settings.redis.broker_url):
            return purge(self._broker, lists, self._revoke)

    def _revoke(self, jobs: Sequence[tuple[str, str]]) -> None:
        with (
            redis_errors(self._settings.redis.results_url),
            self._results.pipeline(transaction=False) as pipe,
        ):
            for job_id, reply_to in jobs:
                keys, arguments = end_job_arguments(
                    job_id=job_id,
                    payload=encode_failure(job_id, JobCancelledError(job_id)),
                    status="REVOKED",
                    is_final=True,
                    result_ttl_s=self._settings.redis.result_ttl_s,
                    reply_to=reply_to,
                )
                pipe.eval(END_JOB, len(keys), *keys, *arguments)
            pipe.execute()

    def _state(
        self,
        queue: str,
        registry: Registry,
        held: Mapping[str, int],
        delayed: Mapping[str, int],
        dead: Mapping[str, int],
        now_s: float,
    ) -> QueueState:
        load = self._run("load", keys=(queue_key(queue, Priority.DEFAULT),))
        keys = [queue_key(queue, priority) for priority in PRIORITIES]
        fields = ["spilled", *(f"{priority}+" for priority in PRIORITIES)]
        spilled, *sums = self._broker.hmget(load_key(queue), fields)
        with self._broker.pipeline(transaction=False) as pipe:
            for key in keys:
                pipe.llen(key)
                pipe.lindex(key, -1)
            replies: list[Any] = pipe.execute(raise_on_error=False)
            found: list[Any] = [0 if isinstance(one, Exception) else one for one in replies]
        ages = [age for message in found[1::2] if message and (age := _age_s(message, now_s)) is not None]
        return QueueState(
            queue=queue,
            waiting=sum(found[::2]) + sum(int(text.split()[0]) for text in sums if text),
            in_flight=held.get(queue, 0),
            delayed=delayed.get(queue, 0),
            dead=dead.get(queue, 0),
            tokens=load[1],
            predicted_wait_s=predict(queue, load, registry).predicted_wait_s,
            spilled=int(spilled or 0),
            oldest_s=max(ages, default=None),
        )

    def _names(self, registry: Registry | None = None) -> set[str]:
        """Return the queues of all models that were announced or are configured."""
        if registry is None:
            registry = Registry.read(self._hash(MODELS_KEY), {}, None, 0.0)
        announced = registry.models.values()
        names = {queue_name(pool, model.name) for model in announced for pool in model.pools}
        for name, configured in self._settings.models.items():
            names |= {queue_name(pool, name) for pool in configured.pools}
        return names

    def _run(self, name: str, *arguments: bytes | str | float, keys: tuple[str, ...] = ()) -> Any:
        return self._broker.eval(script(name), len(keys), *keys, *arguments)

    def _hash(self, key: str) -> dict[bytes, bytes]:
        return self._broker.hgetall(key)  # type: ignore[return-value]  # bytes: no decode_responses


def _dead_job(entry: bytes) -> DeadJob:
    try:
        found = json.loads(entry)
    except (ValueError, RecursionError):
        found = None
    # Whatever an entry holds, operators must be able to list and to drop it.
    fields: dict[str, Any] = found if isinstance(found, dict) else {"reason": "its entry cannot be read"}
    return DeadJob(
        id=str(fields.get("id") or ""),
        task=str(fields.get("task") or ""),
        queue=str(fields.get("queue") or ""),
        reason=str(fields.get("reason") or ""),
        n_deliveries=int(_number(fields.get("n_deliveries"))),
        at=_number(fields.get("at")),
        message=str(fields.get("message") or ""),
        entry=entry,
    )


def _number(value: object) -> float:
    # No later than the year 9999, which is the last that can be shown.
    is_number = type(value) in (int, float) and 0 <= value < 253_402_300_800  # type: ignore[operator]  # one
    return float(value) if is_number else 0.0  # type: ignore[arg-type]  # a number


def _queue_of(key: bytes) -> str:
    return key.partition(b"\x06")[0].decode(errors="replace")


def _list_of(entry: bytes) -> bytes:
    digits, _, rest = entry.partition(b":")
    return rest[: int(digits)] if digits.isdigit() else b""


def _age_s(message: bytes, now_s: float) -> float | None:
    try:
        body = json.loads(json.loads(message)["body"])
        return max(0.0, now_s - float(body[1]["sent_at"]))
    except (ValueError, ArithmeticError, LookupError, TypeError, RecursionError):
        return None  # another program's message, which need not say


def table(states: Sequence[QueueState]) -> Iterator[str]:
    """Yield lines for people."""
    width = max((len(state.queue) for state in states), default=5)
    yield (
        f"{'queue':{width}}  {'waiting':>8} {'in flight':>9} {'delayed':>8} {'dead':>6} {'tokens':>10} "
        f"{'new waits':>10} {'spilled':>8} {'oldest':>10}"
    )
    for state in states:
        counts = f"{state.waiting:>8,} {state.in_flight:>9,} {state.delayed:>8,} {state.dead:>6,}"
        waits = f"{_seconds(state.predicted_wait_s):>10} {state.spilled:>8,} {_seconds(state.oldest_s):>10}"
        yield f"{state.queue:{width}}  {counts} {state.tokens:>10,} {waits}"


def _seconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:,.1f} s"
