"""Workers hear which jobs were cancelled, whatever becomes of their connection."""

from collections.abc import Iterator

import pytest
import redis

from penstock import Client
from penstock.keys import CANCELLED_KEY, record_key, stream_key
from penstock.result_store import MAX_CANCELLED, SENT
from penstock_workers.delivery.cancelled import Cancelled
from penstock_workers.serving.streams import Streams
from tests.deployment import Server, WorkerProcess
from tests.eventually import eventually


@pytest.fixture
def results(own: Server) -> Iterator[redis.Redis]:
    """A connection to the server's results."""
    with redis.Redis.from_url(own.results_url) as connection:
        yield connection


@pytest.fixture
def client(own: Server) -> Iterator[Client]:
    """A client whose jobs are in no queue."""
    with Client(own.broker_url, results_url=own.results_url) as client:
        yield client


def cancel(client: Client, results: redis.Redis, job_id: str) -> bool:
    """Cancel a job that was sent."""
    results.set(record_key(job_id), SENT)
    return client.job(job_id).cancel()


def test_cancelled_jobs_are_known_without_asking(own: Server, results: redis.Redis, client: Client) -> None:
    """A process knows what was cancelled before it listened, while it does, and while it could not."""
    assert cancel(client, results, "before")
    cancelled = Cancelled(own.results_url)
    cancelled.start()
    eventually(lambda: "before" in cancelled)

    assert cancel(client, results, "now")
    eventually(lambda: "now" in cancelled)
    results.client_kill_filter(_type="pubsub")
    assert cancel(client, results, "cut off")
    eventually(lambda: "cut off" in cancelled)
    assert "other" not in cancelled


def test_only_a_job_under_way_can_be_cancelled(results: redis.Redis, client: Client) -> None:
    """Nothing is remembered of a job that nobody sent, or that has ended."""
    results.set(record_key("ended"), "SUCCESS")

    assert not client.job("unknown").cancel()
    assert not client.job("ended").cancel()

    assert not results.exists(CANCELLED_KEY)


def test_few_cancelled_jobs_are_remembered(own: Server, results: redis.Redis, client: Client) -> None:
    """The oldest are forgotten, by Redis and by the worker, and all of them some day."""
    results.zadd(CANCELLED_KEY, {f"old {n:06d}": 1 for n in range(MAX_CANCELLED)})

    assert cancel(client, results, "new")

    assert results.zcard(CANCELLED_KEY) == MAX_CANCELLED
    assert results.ttl(CANCELLED_KEY) > 0
    cancelled = Cancelled(own.results_url)
    cancelled.start()
    eventually(lambda: "new" in cancelled)
    assert "old 000000" not in cancelled


def test_the_text_of_a_cancelled_stream_is_removed(server: Server, worker: WorkerProcess) -> None:
    """Whoever leaves a stream leaves nothing to read: pieces that were sent go with the job."""
    with Client(server.broker_url) as client, redis.Redis.from_url(server.results_url) as results:
        before = set(results.keys("penstock:stream:*"))
        for _ in client.stream("Tell me all you know.", model="chat", max_new_tokens=900):
            begun = set(results.keys("penstock:stream:*")) - before
            break

        eventually(lambda: set(results.keys("penstock:stream:*")) <= before, within_s=30)
        client.generate("Who are you?", model="chat", timeout_s=60)  # what was on its way has arrived

        assert len(begun) == 1
        assert set(results.keys("penstock:stream:*")) <= before


def test_nothing_that_is_no_id_ends_the_listening(own: Server, results: redis.Redis, client: Client) -> None:
    """Whatever lies in set and channel is passed by, and no more than the bound is read."""
    junk = [b"\xff", b"\xff\xfe", b"", b"a\nb", b"\xed\xa0\x80", b"x" * 100_000]
    results.zadd(CANCELLED_KEY, dict.fromkeys(junk, 9000000000000.0))
    results.zadd(CANCELLED_KEY, {f"old {n:06d}": 1 for n in range(MAX_CANCELLED)})
    cancelled = Cancelled(own.results_url)
    cancelled.start()
    eventually(lambda: results.pubsub_numsub(CANCELLED_KEY)[0][1] == 1, within_s=30)

    for entry in junk:
        results.publish(CANCELLED_KEY, entry)
    assert cancel(client, results, "now")

    eventually(lambda: "now" in cancelled, within_s=30)
    assert cancelled.is_alive()
    assert not cancelled.is_lost()
    assert "old 000000" not in cancelled
    assert results.pubsub_numsub(CANCELLED_KEY)[0][1] == 1
    cancelled.end()


def test_a_stream_that_cannot_be_written_keeps_no_other(own: Server, results: redis.Redis) -> None:
    """An id or a piece that is no UTF-8, or a key that holds something else, is the matter of one job."""
    streams = Streams(own.results_url, 30.0)
    streams.start()
    results.set(stream_key("taken"), "a string")

    with (
        streams.open("\ud800z", "penstock:reply:\udfff") as odd,
        streams.open("taken", None) as taken,
        streams.open("good", None) as good,
    ):
        for stream in (odd, taken, good):
            stream.write("half \ud83d")
        eventually(lambda: results.xlen(stream_key("good")), within_s=30)
        good.write("more")
        eventually(lambda: results.xlen(stream_key("good")) == 2, within_s=30)

    assert streams.is_alive()
    assert not streams.is_lost()
    streams.end()
