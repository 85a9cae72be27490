import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penstock.codec import decode_outcome
from penstock.messages import decode_request
from penstock.result import EmbedResult, RerankResult
from tests.golden import make

RECORDED = ["embed", "generate"]


def recorded(name: str) -> bytes:
    """Return a recording."""
    return (make.FOLDER / name).read_bytes()


@pytest.mark.parametrize("name", sorted(make.recordings()))
def test_encoder_still_writes_the_recorded_bytes(name: str) -> None:
    """A format does not change without a new version."""
    assert make.recordings()[name] == recorded(name)


@pytest.mark.parametrize(
    ("name", "request_"),
    [
        ("message-embed-v1.json", make.EMBED_REQUEST),
        ("message-generate-v1.json", make.GENERATE_REQUEST),
        ("message-rerank-v1.json", make.RERANK_REQUEST),
    ],
)
def test_recorded_message_gives_the_recorded_request(name: str, request_: object) -> None:
    """A message that was sent before an upgrade is served after it."""
    envelope: dict[str, Any] = json.loads(recorded(name))
    args, kwargs, _ = json.loads(envelope["body"])

    assert decode_request(envelope["headers"]["task"], tuple(args), kwargs) == request_


def test_recorded_vectors_are_read() -> None:
    """Vectors that were stored before an upgrade are fetched after it."""
    result = decode_outcome(make.JOB_ID, recorded("result-embed-v1.bin")).result

    assert isinstance(result, EmbedResult)
    assert result.vectors.dtype == np.float32
    assert np.array_equal(result.vectors, make.EMBED_RESULT.vectors)
    assert (result.model, result.usage, result.timings) == (
        make.EMBED_RESULT.model,
        make.EMBED_RESULT.usage,
        make.EMBED_RESULT.timings,
    )


@pytest.mark.parametrize("precision", sorted(make.COMPACT_RESULTS))
def test_recorded_compact_vectors_are_read(precision: str) -> None:
    """The same holds for each other precision."""
    result = decode_outcome(make.JOB_ID, recorded(f"result-embed-{precision}-v1.bin")).result

    expected = make.COMPACT_RESULTS[precision].vectors
    assert isinstance(result, EmbedResult)
    assert result.vectors.dtype == expected.dtype
    assert np.array_equal(result.vectors, expected)


def test_recorded_answer_is_read() -> None:
    """An answer that was stored before an upgrade is fetched after it."""
    assert decode_outcome(make.JOB_ID, recorded("result-generate-v1.bin")).result == make.GENERATE_RESULT


def test_recorded_ranking_is_read() -> None:
    """A ranking that was stored before an upgrade is fetched after it."""
    result = decode_outcome(make.JOB_ID, recorded("result-rerank-v1.bin")).result

    assert isinstance(result, RerankResult)
    assert result.scores.dtype == np.float32
    assert np.array_equal(result.scores, make.RERANK_RESULT.scores)
    assert (result.order, result.usage) == (make.RERANK_RESULT.order, make.RERANK_RESULT.usage)


def test_recorded_failure_is_raised_again() -> None:
    """An error that was stored before an upgrade is told after it."""
    error = decode_outcome(make.JOB_ID, recorded("failure-v1.bin")).error

    assert type(error) is type(make.FAILURE)
    assert vars(error) == vars(make.FAILURE)


def test_recordings_are_not_written_twice(tmp_path: Path) -> None:
    """An existing version is never overwritten."""
    make.write(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    with pytest.raises(FileExistsError, match="needs a new version"):
        make.write(tmp_path)

    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before == make.recordings()
