"""Answers that are read while they are generated, whatever becomes of connection, worker and reader."""

import asyncio
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis
import torch
from celery import Celery
from transformers import AutoModelForCausalLM, LlamaConfig

from penstock import AsyncClient, Client, JobCancelledError, JobState, Piece
from penstock.keys import record_key, stream_key
from tests.deployment import Server, WorkerProcess
from tests.eventually import eventually
from tests.faults.fleet import Broker, Fleet
from tests.models.test_generation import SIZES, make_folder

PROMPT = "Tell me all."
N_TOKENS = 200
QUEUE = "cpu.talker"
READER = """
import sys
from penstock import Client
with Client(sys.argv[1]) as client:
    for _ in client.stream("Tell me all.", model="talker", max_new_tokens=480):
        print("a piece", flush=True)
"""


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that takes some seconds for an answer, and never ends one by itself."""
    sizes = SIZES | {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4}
    folder = make_folder(tmp_path_factory.mktemp("talker"), LlamaConfig(**sizes))
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight[1] = 0.0  # its end token
    model.save_pretrained(folder)
    return folder


@contextmanager
def worker(
    folder: Path, server: Server | Broker, talker: Path, *, reader_timeout_s: float = 30
) -> Iterator[WorkerProcess]:
    """Run a worker with short leases that answers one request at a time."""
    toml = (
        f'[models.talker]\ntask = "generate"\nsource = "{talker}"\nmax_batch_size = 1\n'
        f"generation = {{ max_new_tokens = {N_TOKENS} }}\n[worker]\nlease_s = 2\n"
        f"reader_timeout_s = {reader_timeout_s}\n"
    )
    process = WorkerProcess(folder, server, toml=toml, queues=QUEUE)  # type: ignore[arg-type]  # both have URLs
    try:
        process.wait_until_ready()
        yield process
    finally:
        process.stop()


def text_of(pieces: list[Piece]) -> str:
    """Join what was read, and check its last piece."""
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].finish_reason == "length"
    assert pieces[-1].usage is not None
    assert pieces[-1].usage.completion_tokens == N_TOKENS
    return "".join(piece.text for piece in pieces)


def test_pieces_are_the_answer(own: Server, tmp_path: Path, talker: Path) -> None:
    """They come while it is generated, make the text of `generate`, and several callers have one each."""

    async def together(n: int) -> list[str]:
        async with AsyncClient(own.broker_url) as client:

            async def one(prompt: str) -> str:
                return text_of([piece async for piece in client.stream(prompt, model="talker", timeout_s=60)])

            return list(await asyncio.gather(*(one(f"{PROMPT} {i}") for i in range(n))))

    with worker(tmp_path, own, talker), Client(own.broker_url) as client:
        whole = client.generate(PROMPT, model="talker").text
        began = time.monotonic()
        pieces, times = [], []
        for piece in client.stream(PROMPT, model="talker", timeout_s=30):
            pieces.append(piece)
            times.append(time.monotonic() - began)

        assert text_of(pieces) == whole
        assert len(pieces) > 5
        assert times[0] < times[-1] / 2
        assert asyncio.run(together(3)) == [
            client.generate(f"{PROMPT} {i}", model="talker").text for i in range(3)
        ]


def test_cut_connections_lose_and_repeat_nothing(own: Server, tmp_path: Path, talker: Path) -> None:
    """Reader's and worker's connections are cut after each piece: the text is that of `generate`."""
    with (
        worker(tmp_path, own, talker),
        Client(own.broker_url) as client,
        redis.Redis.from_url(own.results_url) as cutter,
    ):
        whole = client.generate(PROMPT, model="talker").text
        pieces = []
        for piece in client.stream(PROMPT, model="talker", timeout_s=30):
            pieces.append(piece)
            for kind in ("pubsub", "normal"):
                cutter.client_kill_filter(_type=kind, skipme=True)

    assert text_of(pieces) == whole
    assert len(pieces) > 1


def test_a_restarted_redis_loses_and_repeats_nothing(fleet: Fleet, tmp_path: Path, talker: Path) -> None:
    """Killed in mid-stream and back with its file: the reader gets the rest."""
    with worker(tmp_path, fleet.broker, talker), Client(fleet.broker.broker_url) as client:
        whole = client.generate(PROMPT, model="talker").text
        pieces = []
        for piece in client.stream(PROMPT, model="talker", timeout_s=60):
            pieces.append(piece)
            if len(pieces) == 2:
                fleet.broker.kill()
                threading.Timer(1.0, fleet.broker.start).start()

    assert text_of(pieces) == whole


@pytest.mark.parametrize("on_restart", ["hide", "show"])
def test_another_worker_goes_on(own: Server, tmp_path: Path, talker: Path, on_restart: str) -> None:
    """Kill -9 in mid-stream: a sampled answer goes on as it began, or is seen to begin again."""
    with (
        worker(tmp_path, own, talker) as first,
        worker(tmp_path, own, talker) as second,
        Client(own.broker_url) as client,
        redis.Redis.from_url(own.broker_url) as broker,
    ):
        pieces = []
        for piece in client.stream(
            PROMPT, model="talker", temperature=1.0, on_restart=on_restart, timeout_s=60
        ):
            pieces.append(piece)
            if len(pieces) == 2:
                (lease,) = broker.hvals("penstock:leases")
                holder = int(lease.split(b"\n")[0].split(b":")[1])
                victim = next(each for each in (first, second) if each.process.pid == holder)
                victim.process.send_signal(signal.SIGKILL)

    restarts = [n for n, piece in enumerate(pieces) if piece.is_restart]
    assert len(restarts) == (on_restart == "show")
    text = text_of(pieces[restarts[0] + 1 :] if restarts else pieces)
    assert text.startswith("".join(piece.text for piece in pieces[:2]))


def test_leaving_the_loop_gives_the_place_away(own: Server, tmp_path: Path, talker: Path) -> None:
    """The job is cancelled within a step, and the next one has its place."""
    with worker(tmp_path, own, talker) as process, Client(own.broker_url) as client:
        for _ in client.stream(PROMPT, model="talker", max_new_tokens=480):
            break
        left_at = time.monotonic()
        client.generate(PROMPT, model="talker", max_new_tokens=1)
        waited_s = time.monotonic() - left_at
        began = time.monotonic()
        client.generate(PROMPT, model="talker", max_new_tokens=480)
        whole_s = time.monotonic() - began

        assert waited_s < whole_s / 2
        assert process.process.poll() is None


def test_a_killed_reader_gives_its_place_away(own: Server, tmp_path: Path, talker: Path) -> None:
    """Kill -9 in mid-stream: the answer that is read no more ends after the limit, the next has its place."""
    with (
        worker(tmp_path, own, talker, reader_timeout_s=1),
        Client(own.broker_url) as client,
        redis.Redis.from_url(own.results_url) as results,
        subprocess.Popen([sys.executable, "-c", READER, own.broker_url], stdout=subprocess.PIPE) as reader,
    ):
        assert reader.stdout is not None
        assert reader.stdout.readline() == b"a piece\n"
        (stream,) = results.keys(stream_key("*"))
        reader.kill()

        after = client.submit_generate(PROMPT, model="talker", max_new_tokens=1)

        record = record_key(stream.decode().removeprefix(stream_key("")))
        eventually(lambda: results.get(record) == b"REVOKED", within_s=20)
        assert after.result(timeout_s=20).usage.completion_tokens == 1


def test_an_answer_that_nobody_reads_ends(own: Server, tmp_path: Path, talker: Path) -> None:
    """A job that streams, and whose sender is gone, is given up after the limit."""
    with (
        worker(tmp_path, own, talker, reader_timeout_s=1),
        Client(own.broker_url) as client,
        Celery(broker=own.broker_url) as sender,
        redis.Redis.from_url(own.results_url) as results,
    ):
        fields = {"model": "talker", "prompt": PROMPT, "stream": True, "max_new_tokens": 480, "version": 1}
        job_id = sender.send_task("penstock.generate", kwargs=fields, queue=QUEUE).id

        eventually(lambda: results.xlen(stream_key(job_id)), within_s=10)
        eventually(lambda: results.get(record_key(job_id)) == b"REVOKED", within_s=20)
        with pytest.raises(JobCancelledError):
            client.job(job_id).result(timeout_s=20)
        assert client.job(job_id).state() is JobState.CANCELLED
        assert 0 < results.ttl(stream_key(job_id)) <= 3600
