"""What a producer with no other right than to send can do to others: nothing."""

import base64
import bz2
import json
import random
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis

from penstock import Client, InvalidMessageError, Job, PenstockError
from penstock.codec import decode_outcome
from penstock.envelope import MAX_ENTRY_BYTES
from penstock.keys import record_key, result_key
from penstock.request import new_job_id
from penstock_workers.command.local_redis import free_port
from tests import messages
from tests.deployment import Server
from tests.eventually import eventually
from tests.faults.fleet import Worker
from tests.faults.light import MODEL, LightWorker

QUEUE = f"cpu.{MODEL}"
SEED = 20_261_130
N_HOSTILE = 3000
MEGABYTE = 1 << 20


class Scene:
    """A worker, an honest client, and somebody who pushes what they like."""

    def __init__(self, server: Server, worker: Worker, client: Client) -> None:
        self.worker, self.client = worker, client
        self.broker = redis.Redis.from_url(server.broker_url)
        self.results = redis.Redis.from_url(server.results_url)

    def push(self, *entries: bytes) -> None:
        """Push entries as any Redis client can."""
        for entry in entries:
            self.broker.lpush(QUEUE, entry)

    def honest(self, number: int) -> Job[Any]:
        """Send a job of an honest client."""
        return self.client.submit_embed([f"honest{number} {number / 1e6}"], model=MODEL)

    def are_answered(self, jobs: list[Job[Any]]) -> bool:
        """Say whether each got its own answer."""
        expected = [np.full((1, 3), number / 1e6, np.float32) for number in range(len(jobs))]
        return all(
            np.array_equal(job.result(timeout_s=120), rows) for job, rows in zip(jobs, expected, strict=True)
        )

    def error_of(self, job_id: str) -> PenstockError | None:
        """Return how a job ended, once it has."""
        eventually(lambda: self.results.exists(record_key(job_id)), within_s=60)
        payload: Any = self.results.get(result_key(job_id))
        return decode_outcome(job_id, payload).error

    def wait_until_idle(self) -> None:
        """Return when nothing waits and nothing is held."""
        held = ("unacked", "unacked_index", "penstock:leases", QUEUE, f"{QUEUE}\x06\x163")
        eventually(lambda: not self.broker.exists(*held), within_s=120, what=self.left)

    def left(self) -> dict[str, int]:
        """Count what is held and what waits."""
        return {"unacked": self.broker.hlen("unacked"), "waiting": self.broker.llen(QUEUE)}

    def memory_bytes(self) -> int:
        """Return the resident memory of the worker."""
        pages = int(Path(f"/proc/{self.worker.pid}/statm").read_text().split()[1])
        return pages * 4096

    def dead(self) -> list[dict[str, Any]]:
        """Return the dead letters."""
        entries: Any = self.broker.lrange("penstock:dead", 0, -1)
        return [json.loads(entry) for entry in entries]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """One worker for all that follows: it has to live through it."""
    folder: Path = tmp_path_factory.mktemp("hostile")
    with Server(free_port()).running() as server:
        light = LightWorker(folder, server)
        with light.running() as worker, Client(server.broker_url) as client:
            made = Scene(server, worker, client)
            yield made
            made.broker.close()
            made.results.close()


def message(job_id: str = "", **changes: Any) -> dict[str, Any]:
    """Return a good message as JSON, with changes at `section__name`."""
    told = {"model": MODEL, "text": "hostile 0", "reply_to": "penstock:reply:hostile"}
    return messages.message(job_id or new_job_id(), **told, **changes)


@cache
def packed_zeros(packer: str) -> bytes:
    """Return 256 MiB in a few kilobytes."""
    packers: dict[str, Callable[[bytes], bytes]] = {"bz2": bz2.compress, "gzip": zlib.compress}
    return packers[packer](bytes(256 * MEGABYTE))


def raw(made: object) -> bytes:
    return json.dumps(made).encode()


def test_a_tag_that_is_no_text_keeps_nobody_from_acknowledging(scene: Scene) -> None:
    """Honest jobs behind it are answered and acknowledged at once, and delivered once."""
    good = message(new_job_id())
    poison = raw(message("poison", properties__delivery_tag="poison-X")).replace(b"poison-X", b"poison-\xff")

    scene.push(poison, raw(good), poison)
    jobs = [scene.honest(number) for number in range(3)]

    assert scene.are_answered(jobs)
    scene.wait_until_idle()
    assert not scene.broker.exists("penstock:lost")
    assert [letter["reason"] for letter in scene.dead()] == ["not a message"] * 2
    assert "failed and goes on" not in scene.worker.log


@pytest.mark.parametrize(
    "changes",
    [
        {"headers__compression": "application/x-bz2", "body": "bz2"},
        {"headers__compression": "application/x-gzip", "body": "gzip"},
        {"content_type": "application/data", "content_encoding": "bz2", "body": "bz2"},
        {"content_type": "application/data", "content_encoding": "zlib_codec", "body": "gzip"},
        {"content_type": "application/json", "content_encoding": "zlib_codec", "body": "gzip"},
        {"content_type": "application/x-python-serialize"},
        {"properties__body_encoding": "bz2"},
    ],
    ids=str,
)
def test_nothing_is_unpacked(scene: Scene, changes: dict[str, Any]) -> None:
    """A kilobyte that would be a gigabyte is refused as it is, and its sender is told why."""
    if (packer := changes.get("body")) is not None:
        body = base64.b64encode(packed_zeros(packer)).decode()
        changes = {**changes, "body": body, "properties__body_encoding": "base64"}
    made = message(**changes)
    before = scene.memory_bytes()

    scene.push(raw(made))

    error = scene.error_of(made["headers"]["id"])
    assert isinstance(error, InvalidMessageError)
    assert scene.memory_bytes() - before < 128 * MEGABYTE


def test_giants_are_refused_and_told(scene: Scene) -> None:
    """Entries above the bound cost the worker next to nothing, and each sender hears the limit."""
    giants = [message() for _ in range(3)]
    before = scene.memory_bytes()

    for made in giants:
        scene.push(raw(made).replace(b'"body": "', b'"body": "' + b"x" * MAX_ENTRY_BYTES))

    for made in giants:
        assert "the limit is 68,157,440" in str(scene.error_of(made["headers"]["id"]))
    scene.wait_until_idle()
    assert scene.memory_bytes() - before < 100 * MEGABYTE


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("headers__id", value) for value in (True, 5, {}, [], None, "", "\ud800", "a\nb", "x" * 1000)),
        *(("properties__reply_to", value) for value in (True, {}, "\ud800", "penstock:reply:\ud800", "a\nb")),
        *(("properties__correlation_id", value) for value in ([1], "\udfff")),
        *(("headers__tenant", value) for value in (5, "a\nb", "a\x06\x17b")),
    ],
    ids=ascii,
)
def test_a_bad_name_fails_nobody_else(scene: Scene, name: str, value: object) -> None:
    """A message with it is a dead letter at its first delivery; jobs around it get their answers."""
    n_dead, made = len(scene.dead()), message(**{name: value})
    jobs = []
    for number in range(6):
        jobs.append(scene.honest(number))
        scene.push(raw(made))

    assert scene.are_answered(jobs)
    scene.wait_until_idle()
    assert len(scene.dead()) == n_dead + 6
    assert not scene.broker.exists("penstock:lost")


def test_no_line_of_the_log_is_forged(scene: Scene) -> None:
    """Whatever ids, names, types and tasks hold: the log has no line of theirs, and no escape sequence."""
    forged = "x\n[2026-01-01 00:00:00: CRITICAL/MainProcess] forged line\x1b[31m\x1b]0;title\x07\u202e"
    for path in (
        "headers__id",
        "headers__task",
        "headers__shadow",
        "headers__tenant",
        "content_type",
        "body",
    ):
        scene.push(raw(message(**{path: forged})))
    scene.push(raw(message(headers__task="no task \u00ab\u2026")), forged.encode())

    scene.wait_until_idle()
    assert not [line for line in scene.worker.log.splitlines() if line.startswith("[2026-01-01")]
    assert not set("\x1b\x07\u202e") & set(scene.worker.log)


def test_a_text_that_utf8_cannot_carry_is_told_to_its_one_sender(scene: Scene) -> None:
    """Half of a surrogate pair in a text, a prompt's name or an unknown field fails this one job."""
    changes: list[dict[str, Any]] = [
        {"texts": ["a \ud800"]},
        {"prompt": "\udfff"},
        {"prompt_name": "\ud800"},
        {"\ud800": 1},
        {"model": "\ud800"},
    ]
    made = []
    for change in changes:
        fields = {"model": MODEL, "texts": ["hostile 0"], **change}
        body = json.dumps([[], fields, None])
        made.append(
            message(body=base64.b64encode(body.encode()).decode(), properties__body_encoding="base64")
        )
    job = scene.honest(0)

    scene.push(*map(raw, made))

    assert all(isinstance(scene.error_of(each["headers"]["id"]), PenstockError) for each in made)
    assert scene.are_answered([job])


def test_more_texts_than_the_limit_are_refused_by_the_worker_too(scene: Scene) -> None:
    """Whoever pushes by himself has the limit of those who use our client."""
    fields = {"model": MODEL, "texts": ["hostile 0"] * 17}
    made = message(body=json.dumps([[], fields, None]))

    scene.push(raw(made))

    assert str(scene.error_of(made["headers"]["id"])).startswith("17 texts in one job, the limit is 16")


@pytest.mark.parametrize(
    "fields",
    [
        {"xylophone": 1},
        {"precision": "xylophone"},
        {"deadline": "xylophone"},
        {"version": "xylophone"},
        {"model": "xylophone xylophone"},
        {"truncate_dim": ["xylophone"]},
        {"stop": ["xylophone" * 40], "task": "generate"},
        {"tools": [{"type": "xylophone"}], "task": "generate"},
        {"tools": [{"type": "function", "function": {"name": "f", "xylophone": 1}}], "task": "generate"},
        {"response_format": {"type": "xylophone"}, "task": "generate"},
        {"response_format": {"type": "choice", "choices": "xylophone"}, "task": "generate"},
        {"response_format": {"type": "json_schema", "json_schema": "xylophone"}, "task": "generate"},
        {"history": [{"role": "xylophone", "content": "xylophone"}], "task": "generate"},
    ],
    ids=str,
)
def test_the_log_has_no_word_of_what_was_wrong(scene: Scene, fields: dict[str, Any]) -> None:
    """The caller hears what was wrong; the worker's log does not say what they wrote."""
    texts = {"prompt": "xylophone"} if "task" in fields else {"texts": ["hostile 0"]}
    task = f"penstock.{fields.get('task', 'embed')}"
    sent = {"model": MODEL, **texts, **{name: value for name, value in fields.items() if name != "task"}}
    made = message(headers__task=task, body=json.dumps([[], sent, None]))

    scene.push(raw(made))

    assert isinstance(scene.error_of(made["headers"]["id"]), PenstockError)
    scene.wait_until_idle()
    eventually(lambda: f"[{made['headers']['id']}] raised expected" in scene.worker.log, within_s=30)
    assert "xylophone" not in scene.worker.log


NASTY: list[Any] = [
    None,
    True,
    5,
    -1,
    0.5,
    10**400,
    -(10**30),
    1e308,
    float("nan"),
    float("inf"),
    "",
    "\x00",
    "\ud800",
    "a\nb\x1b[31m",
    "x" * 10_000,
    [],
    {},
    [None, None],
    [1, "x", {}],
    {"a": {"b": {"c": {"d": {}}}}},
    {"__type__": "bytes", "__value__": "x"},
    {"__type__": "base64", "__value__": "!"},
    {"__type__": "decimal", "__value__": "1e999999"},
    {"__type__": "datetime", "__value__": 5},
    {"__type__": "uuid", "__value__": {"hex": "x", "is_safe": 1}},
    {"__type__": [], "__value__": 1},
    "penstock:reply:other\n",
    "penstock:dead",
    "0001-01-01T00:00:00+14:00",
    "9999-12-31T23:59:59.999999-14:00",
    "not a date",
    "celery.chord_unlock",
    "\u202e\ufeff",
]
HEADERS = (
    *("id", "task", "root_id", "parent_id", "group", "lang", "origin", "shadow", "eta", "expires", "retries"),
    *(
        "timelimit",
        "tenant",
        "argsrepr",
        "kwargsrepr",
        "ignore_result",
        "stamps",
        "stamped_headers",
        "compression",
    ),
    *(
        "callbacks",
        "errbacks",
        "chain",
        "chord",
        "group_index",
        "replaced_task_nesting",
        "meth",
        "taskset",
        "utc",
    ),
    *("args", "kwargs", "hostname", "is_eager", "loglevel", "called_directly", "delivery_info", "any"),
)
PROPERTIES = (
    *("correlation_id", "reply_to", "delivery_mode", "delivery_info", "priority", "body_encoding", "cost"),
    *("delivery_tag", "expiration", "message_id", "timestamp", "type", "user_id", "app_id", "any"),
)
FIELDS = (
    "model",
    "prompt",
    "prompt_name",
    "truncate_dim",
    "precision",
    "deadline",
    "sent_at",
    "version",
    "any",
)
TOP = ("content-type", "content-encoding", "headers", "properties", "body", "any")


class Fuzzer:
    """Makes hostile entries; the same ones for the same seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._ways = (
            self._header,
            self._property,
            self._top,
            self._field,
            self._body,
            self._bytes,
            self._nested,
        )

    def entry(self) -> bytes:
        """Return the next one."""
        made = message(f"hostile-{self._random.getrandbits(64):x}")
        for _ in range(self._random.choice((1, 1, 2, 4))):
            made = self._random.choice(self._ways)(made)
            if isinstance(made, bytes):
                return made
        return raw(made)

    def _nasty(self) -> Any:
        return self._random.choice(NASTY)

    def _header(self, made: Any) -> Any:
        if isinstance(made.get("headers"), dict):
            made["headers"][self._random.choice(HEADERS)] = self._nasty()
        return made

    def _property(self, made: Any) -> Any:
        if isinstance(made.get("properties"), dict):
            made["properties"][self._random.choice(PROPERTIES)] = self._nasty()
        return made

    def _top(self, made: Any) -> Any:
        name = self._random.choice(TOP)
        if self._random.random() < 0.3:
            made.pop(name, None)
        else:
            made[name] = self._nasty()
        return made

    def _field(self, made: Any) -> Any:
        fields = {"model": MODEL, "texts": ["hostile 0"], self._random.choice(FIELDS): self._nasty()}
        if self._random.random() < 0.2:
            fields["texts"] = self._random.choice([text for text in NASTY if not isinstance(text, str)])
        return {**made, "body": json.dumps([[], fields, self._embedded()])}

    def _body(self, made: Any) -> Any:
        first = {"id": self._nasty(), "task": "penstock.embed", "args": [], "kwargs": self._nasty()}
        bodies = [
            self._nasty(),
            [],
            [[]],
            [[], {}],
            [self._nasty(), self._nasty(), self._nasty()],
            first,
            {**first, "reply_to": self._nasty(), "retries": self._nasty(), "taskset": self._nasty()},
        ]
        if self._random.random() < 0.2:
            made.get("headers", {}) and isinstance(made["headers"], dict) and made["headers"].clear()
        return {**made, "body": json.dumps(self._random.choice(bodies))}

    def _embedded(self) -> Any:
        names = ("callbacks", "errbacks", "chain", "chord", "id", "reply_to", "any")
        return self._random.choice([None, {}, {self._random.choice(names): self._nasty()}, self._nasty()])

    def _bytes(self, made: Any) -> bytes:
        found = bytearray(raw(made))
        way = self._random.randrange(4)
        if way == 0:
            return bytes(found[: self._random.randrange(len(found))])
        if way == 1:
            return self._random.randbytes(self._random.randrange(200))
        for _ in range(self._random.choice((1, 3, 30))):
            found[self._random.randrange(len(found))] = self._random.randrange(256)
        return bytes(found)

    def _nested(self, made: Any) -> Any:
        depth = self._random.choice((5, 50, 900, 5000))
        text = raw({**made, "any": "NESTED"})
        return text.replace(b'"NESTED"', b"[" * depth + b"]" * depth)


def test_thousands_of_hostile_messages_harm_nobody(scene: Scene) -> None:
    """All honest jobs among them are answered, nothing is held afterwards, memory and log are bounded."""
    fuzzer = Fuzzer(SEED)
    before, n_lines = scene.memory_bytes(), scene.worker.log.count("\n")
    jobs = []

    with scene.broker.pipeline(transaction=False) as pipe:
        for number in range(N_HOSTILE):
            pipe.lpush(QUEUE, fuzzer.entry())
            if number % 30 == 0:
                pipe.execute()
                jobs.append(scene.honest(len(jobs)))
        pipe.execute()

    assert scene.are_answered(jobs)
    scene.wait_until_idle()
    assert scene.worker.process.poll() is None
    assert scene.memory_bytes() - before < 400 * MEGABYTE
    assert scene.worker.log.count("\n") - n_lines < 10 * N_HOSTILE
    assert "failed and goes on" not in scene.worker.log
    at = scene.worker.log.find("Traceback")
    assert at < 0, scene.worker.log[at : at + 4000]
    eventually(lambda: not scene.broker.exists("penstock:lost"), within_s=60)
    assert scene.are_answered([scene.honest(0)])
