"""Vectors that are kept, and texts that are computed once, by real workers on a real Redis."""

import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import redis
import torch
from redis.exceptions import OutOfMemoryError

from penstock import Client, InvalidOptionError, JobState
from penstock.keys import VECTORS_KEY
from penstock_workers.bundled import bundled_folder
from penstock_workers.embedding.embedder import _load
from penstock_workers.embedding.fingerprint import hash_model
from penstock_workers.serving.vector_cache import Embedded, VectorCache
from penstock_workers.settings import CacheSettings, ModelSettings
from tests.deployment import BUNDLED, Server, WorkerProcess
from tests.eventually import eventually

PLAIN = BUNDLED.split("[models.chat]")[0]
CACHED = f"{PLAIN}cache = {{}}\n"
LEASES = {"PENSTOCK_WORKER__LEASE_S": "2"}
LONG_TEXTS = [f"slow {i} " * 125 for i in range(400)]


@contextmanager
def started(folder: Path, server: Server, *, toml: str = CACHED) -> Iterator[WorkerProcess]:
    """Run a worker while the block runs."""
    worker = WorkerProcess(folder, server, toml=toml, queues="cpu.minilm", environment=LEASES)
    try:
        worker.wait_until_ready()
        yield worker
    finally:
        worker.stop()


@pytest.fixture
def store(own: Server) -> Iterator[redis.Redis]:
    """The result store."""
    with redis.Redis.from_url(own.results_url) as connected:
        yield connected


def vectors_in(store: redis.Redis) -> list[bytes]:
    """Return the vectors that are kept."""
    names = [name for name in store.scan_iter(f"{VECTORS_KEY}:*") if store.type(name) == b"string"]
    return [value for name in names if (value := store.get(name)) and value.startswith(b"vec1")]


def counts(client: Client) -> tuple[int, int]:
    """Return hits and misses of all workers, from their last heartbeats."""
    workers = [worker for worker, _ in client.registry().workers]
    return (
        sum(worker.cache_hits.get("minilm", 0) for worker in workers),
        sum(worker.cache_misses.get("minilm", 0) for worker in workers),
    )


def test_a_text_is_computed_once_and_answered_in_every_form(
    own: Server, store: redis.Redis, tmp_path: Path
) -> None:
    """Equal texts, in a job and between jobs, cost one computation; prompts and forms are kept apart."""
    with started(tmp_path, own), Client(own.broker_url) as client:
        first = client.submit_embed(["a", "b", "a"], model="minilm")
        vectors = first.result(timeout_s=30)
        again = client.submit_embed(["b", "a"], model="minilm")

        assert np.array_equal(again.result(timeout_s=30), vectors[[1, 0]])
        assert np.array_equal(vectors[0], vectors[2])
        assert first.usage is not None
        assert again.usage is not None
        assert (first.usage.prompt_tokens, again.usage.prompt_tokens) == (9, 6)
        assert again.timings is not None
        assert again.timings.computed_s == 0

        cut = client.embed(["a"], model="minilm", truncate_dim=8, normalize_embeddings=True)
        assert np.allclose(cut, vectors[:1, :8] / np.linalg.norm(vectors[0, :8]), atol=1e-6)
        signs = client.embed(["a"], model="minilm", precision="ubinary")
        assert np.array_equal(signs, np.packbits(vectors[:1] > 0, axis=1))
        eventually(lambda: counts(client) == (5, 2))

        prompted = client.embed(["a"], model="minilm", prompt="query: ")
        assert np.dot(prompted[0], vectors[0]) < 0.99
        assert len(vectors_in(store)) == 3
        with pytest.raises(InvalidOptionError, match="prompts here"):
            client.embed(["a"], model="minilm", prompt_name="nope")


def test_without_a_table_nothing_is_kept(own: Server, store: redis.Redis, tmp_path: Path) -> None:
    """A cache is a choice: else no key of it is ever written, and no worker counts."""
    with started(tmp_path, own, toml=PLAIN), Client(own.broker_url) as client:
        client.embed(["a", "a"], model="minilm")
        client.embed(["a"], model="minilm")

        assert list(store.scan_iter(f"{VECTORS_KEY}*")) == []
        assert counts(client) == (0, 0)


def test_two_workers_compute_a_text_once(own: Server, tmp_path: Path) -> None:
    """Jobs with the same texts, at once in two processes and in other orders, share the work and both end."""
    with started(tmp_path, own), started(tmp_path, own), Client(own.broker_url) as client:
        texts = LONG_TEXTS[:100]
        jobs = client.submit_many([texts, texts[::-1], texts[50:] + texts[:50], texts], model="minilm")
        vectors = [job.result(timeout_s=90) for job in jobs]

        assert np.array_equal(vectors[0], vectors[1][::-1])
        assert np.array_equal(vectors[0], vectors[3])
        eventually(lambda: counts(client) == (300, 100))


def test_what_a_killed_worker_had_claimed_is_computed_by_another(own: Server, tmp_path: Path) -> None:
    """Kill -9 in the middle of a job: who waits for its texts computes them when the claim has lapsed."""
    with started(tmp_path, own) as first, Client(own.broker_url) as client:
        job = client.submit_embed(LONG_TEXTS, model="minilm")
        eventually(lambda: job.state() is JobState.RUNNING, within_s=10)
        with redis.Redis.from_url(own.results_url) as store:
            eventually(lambda: next(store.scan_iter(f"{VECTORS_KEY}:claim:*"), None), within_s=10)
        with started(tmp_path, own):
            assert job.state() is JobState.RUNNING
            waiting = client.submit_embed(LONG_TEXTS, model="minilm")
            eventually(lambda: waiting.state() is JobState.RUNNING, within_s=10)
            first.process.send_signal(signal.SIGKILL)

            assert np.array_equal(waiting.result(timeout_s=90), job.result(timeout_s=90))


def test_a_full_redis_costs_a_line(own: Server, store: redis.Redis, tmp_path: Path) -> None:
    """Where nothing can be written, jobs are computed; what is there already is still answered."""
    cache = open_cache(own)
    texts = [f"{i}" for i in range(5)]
    assert ask(cache, texts) == texts
    store.config_set("maxmemory-policy", "noeviction")
    store.config_set("maxmemory", "1mb")
    with pytest.raises(OutOfMemoryError):
        store.set("x", "y")

    assert ask(cache, [*texts, "new"]) == ["new"]
    assert ask(cache, ["new"]) == ["new"]
    store.config_set("maxmemory", "0")
    assert ask(cache, ["new"]) == ["new"]
    assert ask(cache, ["new", *texts]) == []


def test_a_redis_that_is_away_costs_a_line(caplog: pytest.LogCaptureFixture) -> None:
    """Jobs are computed, and a cache that did not answer is left alone for a while."""
    cache = open_cache(Server(1))

    assert ask(cache, ["a", "a"]) == ["a"]
    assert ask(cache, ["a"]) == ["a"]
    assert caplog.text.count("vectors of m are not cached") == 1


def test_models_and_formats_do_not_meet(own: Server, tmp_path: Path) -> None:
    """Another revision, other weights or another format have entries of their own."""
    folder = tmp_path / "model"
    shutil.copytree(bundled_folder("minilm"), folder)
    settings = ModelSettings(task="embed", source=str(folder))
    model, _ = _load("m", settings, torch.device("cpu"))
    prints = [hash_model(model, settings)]
    prints += [hash_model(model, settings.model_copy(update={"revision": "b"}))]
    model.max_seq_length = 100
    prints += [hash_model(model, settings)]
    with torch.no_grad():
        next(model.parameters()).view(-1)[-1] += 1
    prints += [hash_model(model, settings)]

    assert len(set(prints)) == 4
    assert hash_model(_load("m", settings, torch.device("cpu"))[0], settings) == prints[0]
    for fingerprint in prints:
        assert ask(open_cache(own, fingerprint), ["a"]) == ["a"]
    assert ask(open_cache(own, prints[0], dtype="float16"), ["a"]) == ["a"]
    assert ask(open_cache(own, prints[0]), ["a"]) == []


def test_the_bound_holds(own: Server, store: redis.Redis) -> None:
    """A cache takes what it may, in Redis' own count, and keeps what was asked for last."""
    cache = open_cache(own, dim=384, max_bytes=1 << 20)
    ask(cache, ["kept"], dim=384)
    for start in range(0, 3000, 100):
        ask(cache, [f"text {i}" for i in range(start, start + 100)], dim=384)
        assert ask(cache, ["kept"], dim=384) == []

    n_bytes = sum(store.memory_usage(name, samples=0) or 0 for name in store.scan_iter("*"))
    assert 0.8 * (1 << 20) < n_bytes <= 1 << 20
    assert len(vectors_in(store)) == store.zcard(next(store.scan_iter(_type="zset")))
    assert ask(cache, ["text 2999", "text 0"], dim=384) == ["text 0"]


def test_what_is_kept_ends(own: Server, store: redis.Redis) -> None:
    """Every key has a life."""
    ask(open_cache(own, ttl_s=100), ["a", "b"])

    names = list(store.scan_iter("*"))
    assert len(names) == 3
    assert all(0 < store.ttl(name) <= 100 for name in names)


def test_what_is_in_the_way_is_replaced(own: Server, store: redis.Redis) -> None:
    """A value of another version, or of another program, is no vector."""
    cache = open_cache(own)
    ask(cache, ["a"])
    (name,) = store.scan_iter(f"{VECTORS_KEY}:*:*")
    for value in (b"vec2" + bytes(20), b"c", b"", b"c x y z"):
        store.set(name, value)
        assert ask(cache, ["a"]) == ["a"]
        assert ask(cache, ["a"]) == []


def test_one_text_does_not_wait_for_a_bulk_load(own: Server) -> None:
    """A far lighter job computes what a heavier one has claimed; a job of its kind waits for it."""
    cache, other = open_cache(own), open_cache(own)
    light: list[list[str]] = []

    def compute(texts: list[str]) -> list[Embedded]:
        light.append(ask(other, texts[:1]))
        with pytest.raises(TimeoutError):
            ask(other, texts[1:])
        return answers(texts)

    texts = [f"{i}" for i in range(100)]
    cache.embed(texts, None, compute, patience_s=30, check=lambda: None)

    assert light == [["0"]]
    assert ask(other, texts) == []


def test_a_job_that_fails_gives_its_texts_free(own: Server) -> None:
    """Nobody waits for what failed elsewhere, and each gets their own error."""
    cache = open_cache(own)

    def fail(texts: list[str]) -> list[Embedded]:
        raise ValueError(texts[0])

    for _ in range(2):
        with pytest.raises(ValueError, match="a"):
            cache.embed(["a"], None, fail, patience_s=30, check=lambda: None)
    assert ask(cache, ["a"]) == ["a"]


def open_cache(server: Server, fingerprint: str = "f", *, dim: int = 4, **settings: object) -> VectorCache:
    return VectorCache(
        "m",
        fingerprint,
        dim,
        CacheSettings.model_validate(settings),
        url=server.results_url,
        lease_s=2,
    )


def answers(texts: list[str], dim: int = 4) -> list[Embedded]:
    """Return vectors that tell their texts apart."""
    return [
        Embedded(vector=np.full(dim, sum(map(ord, text)) % 1000, np.float32), n_tokens=len(text))
        for text in texts
    ]


def ask(cache: VectorCache, texts: list[str], dim: int = 4) -> list[str]:
    """Ask for texts, check the answers, and return what had to be computed."""
    computed: list[str] = []

    def compute(missing: list[str]) -> list[Embedded]:
        computed.extend(missing)
        return answers(missing, dim)

    def check() -> None:
        raise TimeoutError

    found = cache.embed(texts, None, compute, patience_s=30, check=check)
    expected = answers(texts, dim)
    assert [answer.n_tokens for answer in found] == [answer.n_tokens for answer in expected]
    assert all(np.array_equal(a.vector, b.vector) for a, b in zip(found, expected, strict=True))
    return computed
