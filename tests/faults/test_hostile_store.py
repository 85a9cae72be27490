"""A result store that is broken, or not ours: its callers meet typed errors, and nothing grows or stops."""

import asyncio
import socket
import threading
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis

from penstock import AsyncClient, Client, PenstockError, ResultDecodeError
from penstock.codec import MAGIC, PREAMBLE, decode_meta
from penstock.connections import connect_sync, get_large
from penstock.keys import record_key, reply_channel, result_key, stream_key
from tests.deployment import Server
from tests.faults.light import MODEL, LightWorker

USAGE = '{"__record__":"Usage","prompt_tokens":1}'
TIMINGS = '{"__record__":"Timings","queued_s":1,"prepared_s":1,"batched_s":1,"computed_s":1}'


def answer(**fields: str) -> str:
    """Return an answer as it is stored, with some fields replaced by other JSON."""
    whole = {
        "__record__": '"GenerateResult"',
        "model": '"m"',
        "text": '"t"',
        "finish_reason": '"stop"',
        "usage": USAGE,
        "timings": TIMINGS,
        **fields,
    }
    return "{" + ",".join(f'"{name}":{value}' for name, value in whole.items()) + "}"


def failed(name: str, arguments: str) -> str:
    """Return what is stored of a job that failed so."""
    return f'{{"status":"FAILURE","result":{{"exc_type":"{name}","exc_message":{arguments}}}}}'


SUCCESSES = [
    answer(usage='"x"'),
    answer(usage=TIMINGS),
    answer(timings='{"queued_s":1}'),
    answer(text="5"),
    answer(finish_reason='"never"'),
    answer(finish_reason="[]"),
    answer(reasoning="{}"),
    answer(tool_calls='[{"function":"x"}]'),
    answer(tool_calls='"x"'),
    answer(logprobs='"x"'),
    answer(others='[{"index":0}]'),
    answer(usage='{"__record__":"Usage","prompt_tokens":"x"}'),
    answer(usage='{"__record__":"Usage","prompt_tokens":-1}'),
    answer(timings=TIMINGS.replace("1}", '"x"}')),
    answer(timings=TIMINGS.replace("1}", "1" + "0" * 400 + "}")),
    answer(__record__='"Choice"'),
    answer(__record__='"RerankResult"'),
    answer(__record__='"EmbedResult"'),
    f'{{"__record__":"RerankResult","model":"m","scores":5,"order":[],"usage":{USAGE},"timings":{TIMINGS}}}',
    f'{{"__record__":"EmbedResult","model":"m","vectors":[],"usage":{USAGE},"timings":{TIMINGS}}}',
    '"text"',
    "[[[]]]",
]
ENDINGS = [
    *(f'{{"status":"SUCCESS","result":{result}}}' for result in SUCCESSES),
    '{"status":"REVOKED","result":{"exc_message":["j",{"a_s":"x"}]}}',
    '{"status":"REVOKED","result":{"exc_message":["j",[1]]}}',
    '{"status":"REVOKED","result":5}',
    failed("DeadlineExceededError", '["j",1.0,[1]]'),
    failed("DeadlineExceededError", '["j",1.0,{"a_s":"x"}]'),
    failed("DeadlineExceededError", '["j","late",{}]'),
    failed("JobCancelledError", '["j",5]'),
    failed("UnknownModelError", '["m",5]'),
    failed("QueueDelayError", '["q","jobs",{},[]]'),
    failed("IncompleteOutputError", "[1,2]"),
    failed("Whatever", "[" + "[" * 900 + "]" * 900 + "]"),
    failed("Whatever", "[1" + "0" * 4200 + "]"),
    failed("ConfigError", "[5]"),
    '{"status":"FAILURE","result":{"exc_type":{},"exc_message":{}}}',
    '{"status":{},"result":{"exc_type":"x"}}',
    '{"status":"SUCCESS"}',
    "[]",
    "5",
]


def payload_of(header: str | bytes) -> bytes:
    """Return a payload with this header and no buffers."""
    text = header.encode() if isinstance(header, str) else header
    text += b" " * (-(PREAMBLE.size + len(text)) % 64)
    return PREAMBLE.pack(MAGIC, len(text)) + text


@pytest.fixture(scope="module")
def store(server: Server) -> Iterator[redis.Redis]:
    """The result store, as who may write to it."""
    with redis.Redis.from_url(server.results_url) as connected:
        yield connected


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    """A client of that store; no worker is needed for what is stored already."""
    with Client(server.broker_url, results_url=server.results_url) as connected:
        yield connected


def test_whatever_is_stored_comes_as_a_typed_error(client: Client, store: redis.Redis) -> None:
    """No type of a field, no argument of an error, and no shape of a result reaches the caller's code."""
    for number, ending in enumerate(ENDINGS):
        for status in ("SUCCESS", "FAILURE", "REVOKED"):
            store.set(record_key(f"odd{number}"), status)
            store.set(result_key(f"odd{number}"), payload_of(ending))
            job = client.job(f"odd{number}")

            with pytest.raises(PenstockError) as caught:
                job.result(timeout_s=30)

            assert str(caught.value), ending
            assert repr(caught.value), ending


@pytest.mark.parametrize("record", [b"\xff\xfe", b"", b"RETRY", b"x" * 100_000])
def test_an_odd_state_is_no_end(client: Client, store: redis.Redis, record: bytes) -> None:
    """A record that says no state of ours is told by a typed error, or a state."""
    store.set(record_key("odd"), record)
    store.delete(result_key("odd"))

    assert client.job("odd").state().value in ("expired", "unknown", "waiting")
    with pytest.raises(PenstockError):
        client.job("odd").result(timeout_s=0.5)


def test_keys_of_other_types_are_refused(client: Client, store: redis.Redis) -> None:
    """A list where a string should be is an error of the store."""
    store.set(record_key("list"), "SUCCESS")
    store.rpush(result_key("list"), "x")

    with pytest.raises(PenstockError, match="WRONGTYPE"):
        client.job("list").result(timeout_s=30)


def test_a_header_is_bounded_by_what_it_becomes() -> None:
    """Megabytes of empty objects or lists are refused before they are objects; a long text is not."""
    for filling in (b"{},", b"[],", b"0,", b'{"a":0},', b'"",'):
        payload = payload_of(b"[" + filling * (6_000_000 // len(filling)) + b"0]")
        tracemalloc.start()
        try:
            with pytest.raises(ResultDecodeError, match="limit"):
                decode_meta(payload)
            assert tracemalloc.get_traced_memory()[1] < 24 << 20
        finally:
            tracemalloc.stop()

    assert len(decode_meta(payload_of(b'"' + b'{},\\"' * 1_000_000 + b'"'))) == 4_000_000


@contextmanager
def saying(reply: bytes) -> Iterator[redis.Redis]:
    """Connect to a server that answers each command so, and then waits."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            while True:
                try:
                    connected, _ = listening.accept()
                except OSError:
                    return
                threading.Thread(target=speak, args=(connected,), daemon=True).start()

        def speak(connected: socket.socket) -> None:
            with connected:
                while command := connected.recv(1 << 16):
                    connected.sendall(reply if b"GET" in command else b"+OK\r\n" * command.count(b"*"))

        threading.Thread(target=serve, daemon=True).start()
        url = f"redis://127.0.0.1:{listening.getsockname()[1]}/0?protocol=2"
        with connect_sync(url, answer_timeout_s=1.0) as store:
            yield store
        listening.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("size", ["99999999999999", "9" * 40, str(1 << 30), "0" * 50])
def test_a_claimed_size_takes_no_memory(size: str) -> None:
    """A store that announces more than a result can be is not believed."""
    with saying(f"${size}\r\n".encode()) as store, pytest.raises(ResultDecodeError, match="larger"):
        get_large(store, "key")


@pytest.mark.parametrize("reply", [b"$-5\r\n", b"*1\r\n:x\r\n", b"$\xd9\xa3\r\n"])
def test_what_is_no_reply_is_an_error_of_redis(reply: bytes) -> None:
    """What follows no protocol is told, within the limit of silence."""
    with saying(reply) as store, pytest.raises((redis.RedisError, ValueError)):
        get_large(store, "key")


def test_notes_and_pieces_of_anybody_are_survived(own: Server, tmp_path: Path) -> None:
    """Bytes on a client's channel end no listener; only what is stored is an answer."""
    with (
        LightWorker(tmp_path, own).running(),
        Client(own.broker_url) as client,
        redis.Redis.from_url(own.results_url) as store,
    ):
        assert client.embed(["a 0"], model=MODEL, timeout_s=30).shape == (1, 3)
        channels: Any = store.pubsub_channels(reply_channel("") + "*")
        (channel,) = channels
        job = client.submit_embed(["b 1"], model=MODEL)
        for note in (b"\xff\xfe", b"", b"\n\n", job.id.encode() + b"\nPNS\x01garbage", b"\x00" * 1000):
            assert store.publish(channel, note) == 1

        assert job.result(timeout_s=30).shape == (1, 3)
        assert client.embed(["c 0"], model=MODEL, timeout_s=30).shape == (1, 3)
        assert store.pubsub_numsub(channel) == [(channel, 1)]


def test_pieces_that_cannot_be_read_are_told(server: Server, store: redis.Redis) -> None:
    """A stream's entries are checked as results are."""

    async def read(number: int) -> None:
        async with AsyncClient(server.broker_url, results_url=server.results_url) as client:
            job = await client.job(f"pieces{number}")
            async for _ in job.pieces(timeout_s=30):
                pass

    entries: list[dict[bytes, bytes]] = [
        {b"run": b"1"},
        {b"run": b"\xff", b"at": b"0", b"text": b"t"},
        {b"run": b"1", b"at": b"x", b"text": b"t"},
        {b"run": b"1", b"at": b"0", b"text": b"t", b"part": b"other"},
    ]
    for number, entry in enumerate(entries):
        store.xadd(stream_key(f"pieces{number}"), entry)  # type: ignore[arg-type]  # bytes are fields too
        with pytest.raises(ResultDecodeError, match="piece"):
            asyncio.run(read(number))
