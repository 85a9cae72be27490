import json
import pickle
import random
import string
import tracemalloc
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from penstock.codec import (
    ALIGNMENT,
    MAGIC,
    PREAMBLE,
    decode_meta,
    decode_outcome,
    encode_failure,
    encode_meta,
)
from penstock.errors import EngineError, JobCancelledError, ResultDecodeError, ResultTooLargeError
from penstock.result import Choice, EmbedResult, GenerateResult, Logprobs, Timings, Usage

TIMINGS = Timings(queued_s=0.5, prepared_s=0.25, batched_s=0.125, computed_s=1.0)
NO_ARRAY = {"__record__": "EmbedResult", "model": "m", "vectors": [[1.0]], "usage": None, "timings": None}


def stored(vectors: NDArray[Any]) -> bytes:
    """Return the result of an embedding job as it is stored."""
    result = EmbedResult(model="minilm", vectors=vectors, usage=Usage(prompt_tokens=3), timings=TIMINGS)
    return encode_meta({"status": "SUCCESS", "result": result, "task_id": "job"})


def fetched(payload: bytes) -> NDArray[Any]:
    """Return the vectors of a stored result."""
    result = decode_outcome("job", payload).result
    assert isinstance(result, EmbedResult)
    return result.vectors


def payload_of(header: object, buffers: bytes = b"") -> bytes:
    """Return a payload with any header, as somebody else might write it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-(PREAMBLE.size + len(text)) % ALIGNMENT)
    return PREAMBLE.pack(MAGIC, len(text)) + text + buffers


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int8, np.uint8])
@pytest.mark.parametrize("shape", [(0, 384), (1, 384), (3, 5), (4096, 384)])
def test_vectors_come_back(dtype: type, shape: tuple[int, int]) -> None:
    """What a worker stores is what a caller gets: dtype, shape and every number."""
    vectors = (100 * np.random.default_rng(0).random(shape)).astype(dtype)

    back = fetched(stored(vectors))

    assert back.dtype == dtype
    assert back.shape == shape
    assert np.array_equal(back, vectors)


def test_special_numbers_come_back() -> None:
    """No number is changed on the way, not even those that JSON cannot write."""
    vectors = np.array([[np.nan, np.inf, -np.inf, -0.0, np.finfo(np.float32).tiny / 2]], dtype=np.float32)

    assert fetched(stored(vectors)).tobytes() == vectors.tobytes()


@pytest.mark.parametrize(
    "vectors",
    [
        pytest.param(np.arange(24, dtype=np.float32).reshape(6, 4).T, id="transposed"),
        pytest.param(np.arange(48, dtype=np.float16).reshape(8, 6)[::2, ::-1], id="strided"),
        pytest.param(np.asfortranarray(np.arange(12, dtype=np.float32).reshape(3, 4)), id="fortran"),
        pytest.param(np.arange(12, dtype=">f4").reshape(3, 4), id="big-endian"),
        pytest.param(np.broadcast_to(np.float32(1.5), (3, 4)), id="broadcast"),
    ],
)
def test_any_memory_layout_comes_back_equal(vectors: NDArray[Any]) -> None:
    """Callers never see how a worker's array lay in its memory."""
    back = fetched(stored(vectors))

    assert np.array_equal(back, vectors)
    assert back.dtype == vectors.dtype.newbyteorder("=")


@pytest.mark.parametrize("n_texts", [0, 1, 2, 7, 100])
def test_vectors_are_contiguous_aligned_and_read_only(n_texts: int) -> None:
    """SIMD code can read the buffer in place, and nobody can change what others may share."""
    payload = stored(np.ones((n_texts, 5), dtype=np.float16))

    back = fetched(payload)

    begin = np.frombuffer(payload, dtype=np.uint8).__array_interface__["data"][0]
    assert back.flags.c_contiguous
    assert not back.flags.writeable
    assert (back.__array_interface__["data"][0] - begin) % ALIGNMENT == 0
    assert len(payload) % ALIGNMENT == 0


@pytest.mark.parametrize(
    "array",
    [
        np.ones((2, 2), dtype=np.float64),
        np.ones((2, 2), dtype=np.int64),
        np.ones((2, 2), dtype=np.uint16),
        np.ones((2, 2), dtype=bool),
        np.array([["a"]], dtype=object),
        np.array([["a"]]),
        np.ones(2, dtype=[("x", "<f4")]),
    ],
    ids=lambda array: str(array.dtype),
)
def test_other_dtypes_are_refused(array: NDArray[Any]) -> None:
    """Only the precisions' dtypes travel; objects never do."""
    with pytest.raises(TypeError, match="only float32, float16, int32, int8, uint8"):
        encode_meta({"result": array})


@pytest.mark.parametrize("value", [{1, 2}, b"bytes", np.float32(1), object()], ids=lambda v: type(v).__name__)
def test_foreign_objects_are_refused(value: object) -> None:
    """What is neither JSON nor ours does not travel."""
    with pytest.raises(TypeError, match="objects are not sent"):
        encode_meta({"result": value})


def test_result_over_the_limit_of_redis_is_refused() -> None:
    """A result that Redis would not take is told as such, before it is copied."""
    vectors: NDArray[Any] = np.zeros(
        (1 << 10, 1 << 18), dtype=np.float16
    )  # never written: takes addresses, no memory

    with pytest.raises(ResultTooLargeError, match="the limit is 536870912; send fewer texts"):
        encode_meta({"result": vectors})


def test_arrays_of_a_list_keep_their_order() -> None:
    """A chord's results come back in the order of its jobs."""
    arrays = [np.full((n, 3), n, dtype=np.float32) for n in (3, 0, 2)] + [np.ones((1, 2), dtype=np.float16)]

    back = decode_meta(
        encode_meta({"status": "SUCCESS", "result": arrays, "children": [{"deep": arrays[2]}]})
    )

    assert [array.tolist() for array in back["result"]] == [array.tolist() for array in arrays]
    assert back["children"][0]["deep"].tolist() == arrays[2].tolist()


def test_answer_comes_back() -> None:
    """An answer comes back equal, whatever characters it holds."""
    answer = GenerateResult(
        model="chat",
        text='Grüße 🌊 \0 \u2028 "quoted" \\ {"__array__": 0}',
        finish_reason="length",
        usage=Usage(prompt_tokens=7, completion_tokens=64),
        timings=TIMINGS,
    )

    outcome = decode_outcome("job", encode_meta({"status": "SUCCESS", "result": answer}))

    assert outcome.result == answer
    assert outcome.error is None


def test_choices_and_log_probabilities_come_back() -> None:
    """Arrays of several answers keep their places; each token has text, bytes and alternatives."""
    ids = np.array([[5, 5, 7], [7, 5, 9]], dtype=np.int32)
    values = np.array([[-0.5, -0.5, -1.5], [-2.0, -0.25, -np.inf]], dtype=np.float32)
    tokens = {"5": "Hi", "7": "\xc3", "9": "\xbc"}  # two halves of a character
    first = Logprobs(ids=ids, values=values, tokens=tokens)
    second = Logprobs(ids=ids[1:], values=values[1:], tokens=tokens)
    answer = GenerateResult(
        model="chat",
        text="Hi",
        finish_reason="length",
        usage=Usage(prompt_tokens=3, completion_tokens=3),
        timings=TIMINGS,
        logprobs=first,
        others=(Choice(index=1, text="?", finish_reason="stop", logprobs=second),),
    )

    found = decode_outcome("id", encode_meta({"status": "SUCCESS", "result": answer})).result

    assert isinstance(found, GenerateResult)
    assert [choice.text for choice in found.choices] == ["Hi", "?"]
    mine, other = (choice.logprobs for choice in found.choices)
    assert mine is not None
    assert other is not None
    assert [token.bytes for token in mine] == [b"Hi", b"\xc3"]
    assert (mine[1].token, mine[1].logprob) == ("\ufffd", -2.0)
    assert [(top.token, top.logprob) for top in mine[1].top] == [("Hi", -0.25), ("\ufffd", -np.inf)]
    assert [list(mine[-1:]), len(other)] == [list(other), 1]
    assert "Hi" not in repr(found) + repr(found.choices)


def test_lone_surrogates_are_replaced() -> None:
    """A character that UTF-8 cannot carry costs neither the answer nor the error that quotes it."""
    answer = GenerateResult(
        model="chat", text="a\ud800b", finish_reason="stop", usage=Usage(prompt_tokens=1), timings=TIMINGS
    )

    outcome = decode_outcome("job", encode_meta({"status": "SUCCESS", "result": answer}))
    error = decode_outcome("job", encode_failure("job", EngineError("m", "quotes \udfff"))).error

    assert isinstance(outcome.result, GenerateResult)
    assert outcome.result.text == "a?b"
    assert isinstance(error, EngineError)
    assert error.problem == "quotes ?"


def test_cancelled_job_comes_back_cancelled() -> None:
    """Whoever waits for a job that was taken back hears just that."""
    outcome = decode_outcome("job", encode_failure("job", JobCancelledError("job")))

    assert outcome.status == "REVOKED"
    assert outcome.result is None
    assert isinstance(outcome.error, JobCancelledError)


@pytest.mark.parametrize(
    ("meta", "problem"),
    [
        ([1, 2], "no result record"),
        ("text", "no result record"),
        ({"result": 1}, "no result record"),
        ({"status": "SUCCESS"}, "of another task"),
        ({"status": "SUCCESS", "result": [1.0, 2.0]}, "of another task"),
        ({"status": "SUCCESS", "result": NO_ARRAY}, "its vectors are no array"),
        ({"status": "FAILURE"}, "without an error"),
        ({"status": "RETRY", "result": {"exc_message": []}}, "without an error"),
        ({"status": ["SUCCESS"], "result": None}, "without an error"),
    ],
)
def test_other_results_are_refused(meta: object, problem: str) -> None:
    """What a foreign task stored does not pass for a result."""
    with pytest.raises(ResultDecodeError, match=problem):
        decode_outcome("job", payload_of(meta))


def test_every_truncation_is_refused() -> None:
    """A payload that was cut anywhere is told as such, whatever it still holds."""
    for n_columns in (8, 5):  # its buffer ends without padding, and with some
        payload = stored(np.ones((2, n_columns), dtype=np.float32))

        for n_bytes in range(len(payload)):
            with pytest.raises(ResultDecodeError):
                decode_outcome("job", payload[:n_bytes])


@pytest.mark.parametrize("n_texts", [0, 1])
def test_bytes_behind_the_last_buffer_are_refused(n_texts: int) -> None:
    """A payload is what its header describes, no more."""
    payload = stored(np.ones((n_texts, 16), dtype=np.float32))

    for more in (b"\0", b"more", bytes(ALIGNMENT)):
        with pytest.raises(ResultDecodeError, match=f"{len(payload) + len(more)} bytes, its header"):
            decode_meta(payload + more)


def test_damaged_header_is_read_or_refused() -> None:
    """Whatever happened to a header, nothing but `ResultDecodeError` is raised, and no memory is taken."""
    payload = stored(np.arange(16, dtype=np.float32).reshape(2, 8))
    header_ends = PREAMBLE.size + PREAMBLE.unpack_from(payload)[1]
    rng = random.Random(20)
    n_refused = 0
    tracemalloc.start()

    for _ in range(3000):
        damaged = bytearray(payload)
        for _ in range(rng.choice((1, 1, 2, 5))):
            damaged[rng.randrange(header_ends)] = rng.choice(
                (rng.randrange(256), ord(rng.choice(string.printable)))
            )
        try:
            outcome = decode_outcome("job", bytes(damaged))
        except ResultDecodeError:
            n_refused += 1
        else:
            assert outcome.status in ("SUCCESS", "FAILURE", "REVOKED")

    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n_refused > 1000
    assert peak_bytes < 1 << 20


@pytest.mark.parametrize(
    "shape",
    [
        [1 << 40, 1 << 20],
        [10**4000, 10**4000],
        [0, 10**30],
        [0, 1 << 62, 1 << 62],
        [2, 9],
        [17],
        [-1, 16],
        [-4, -4],
        [True, 16],
        [1.0, 16],
        ["2", 8],
        [[2, 8]],
        [[[[]]]],
        [1, 1, 1, 1, 16],
        [None],
        "16",
        16,
        None,
        {"2": 8},
    ],
    ids=lambda shape: str(shape)[:20],
)
def test_lying_shapes_are_refused_before_memory_is_taken(shape: object) -> None:
    """A header cannot make its reader allocate, or look outside of the payload."""
    payload = payload_of({"__array__": 0, "dtype": "<f4", "shape": shape}, bytes(64))
    tracemalloc.start()

    with pytest.raises(ResultDecodeError):
        decode_meta(payload)

    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 1 << 20


@pytest.mark.parametrize(
    "dtype", ["|O", "<f8", ">f4", "<i8", "f4", "<U1000", "V16", "", None, 1, ["<f4"], {}]
)
def test_other_stored_dtypes_are_refused(dtype: object) -> None:
    """Objects, and numbers that no version wrote, are not read."""
    with pytest.raises(ResultDecodeError):
        decode_meta(payload_of({"__array__": 0, "dtype": dtype, "shape": [1]}, bytes(64)))


@pytest.mark.parametrize("numbers", [[1], [0, 0], [1, 0], [0, 2], ["0"], [None], [[0]]])
def test_arrays_out_of_order_are_refused(numbers: list[object]) -> None:
    """Buffers are taken in the order of the header, each once."""
    arrays = [{"__array__": number, "dtype": "<f4", "shape": [1]} for number in numbers]

    with pytest.raises(ResultDecodeError, match="out of order"):
        decode_meta(payload_of(arrays, bytes(64 * len(arrays))))


@pytest.mark.parametrize("header_bytes", [65, 1 << 20, (1 << 32) - 1])
def test_header_longer_than_the_payload_is_refused(header_bytes: int) -> None:
    """The header's length is checked before it is read."""
    with pytest.raises(ResultDecodeError, match=f"header of {header_bytes} bytes in a payload of 72"):
        decode_meta(PREAMBLE.pack(MAGIC, header_bytes) + b" " * 64)


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{",
        b'{"a": 1} {',
        b"\xff\xfe\xfa",
        b"[" * 100_000,
        b"1" * 5000,
        b'{"__record__": "Unknown"}',
        b'{"__record__": ["EmbedResult"]}',
        b'{"__record__": "Usage"}',
        b'{"__record__": "Usage", "prompt_tokens": 1, "more": 2}',
        b'{"__record__": "__import__", "name": "os"}',
    ],
    ids=lambda header: str(header[:24]),
)
def test_unreadable_headers_are_refused(header: bytes) -> None:
    """A header that is no JSON, or builds no object of ours, is told as such."""
    with pytest.raises(ResultDecodeError, match="in its header"):
        decode_meta(payload_of(header))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_are_refused(protocol: int) -> None:
    """Nothing that can run code is read."""
    with pytest.raises(ResultDecodeError, match="does not begin with the mark"):
        decode_meta(pickle.dumps({"status": "SUCCESS", "result": [1.0]}, protocol))


@pytest.mark.parametrize(
    "payload", [b"", b"PNS", b'{"status": "SUCCESS"}', b"\x80\x05" + bytes(64), bytes(64)]
)
def test_foreign_bytes_are_refused(payload: bytes) -> None:
    """Celery's own JSON and anything else is told from our results."""
    with pytest.raises(ResultDecodeError, match="does not begin with the mark"):
        decode_meta(payload)


@pytest.mark.parametrize("version", [0, 2, 255])
def test_other_versions_are_refused_by_number(version: int) -> None:
    """A caller that must be upgraded is told so."""
    payload = b"PNS" + bytes([version]) + stored(np.ones((1, 1), dtype=np.float32))[4:]

    with pytest.raises(ResultDecodeError, match=f"version {version}; version 1 is read here"):
        decode_meta(payload)
