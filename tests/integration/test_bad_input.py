"""What callers send wrong: each gets its typed error, other jobs go on, the worker lives."""

from collections.abc import Callable

import numpy as np
import pytest

from penstock import (
    Client,
    InputTooLongError,
    InvalidOptionError,
    InvalidTextError,
    PenstockError,
    RequestTooLargeError,
    ResultExpiredError,
    ResultTimeoutError,
    TooManyTextsError,
    UnknownJobError,
    UnknownModelError,
    WrongTaskError,
)
from penstock.keys import result_key
from tests.deployment import Server, WorkerProcess

MEGABYTE = 1 << 20


def test_no_texts_are_an_empty_array(client: Client) -> None:
    """No texts give an array of shape (0, dim)."""
    assert client.embed([], model="minilm").shape == (0, 384)
    assert client.embed([], model="minilm", truncate_dim=8).shape == (0, 8)


def test_no_history_may_be_none(client: Client) -> None:
    """A caller without earlier turns may pass None for them."""
    assert client.generate("Who are you?", model="chat", history=None).usage.completion_tokens


def test_nul_and_a_megabyte_are_texts_like_others(client: Client) -> None:
    """NUL bytes, control characters and 1 MiB of text are embedded; beside them others are unharmed."""
    vectors = client.embed(["\x00", "a\x00b", "word " * (MEGABYTE // 5), "plain"], model="minilm")

    assert np.isfinite(vectors).all()
    assert np.dot(vectors[3], client.embed(["plain"], model="minilm")[0]) > 0.999


@pytest.mark.parametrize(
    ("ask", "error", "message"),
    [
        (lambda c: c.embed([3], model="minilm"), InvalidTextError, "text 0 is a int"),
        (lambda c: c.embed(["a", None], model="minilm"), InvalidTextError, "text 1 is a NoneType"),
        (lambda c: c.embed("one string", model="minilm"), InvalidTextError, "pass a list"),
        (
            lambda c: c.embed(["ok", "\ud800"], model="minilm"),
            InvalidTextError,
            "text 1 holds a lone surrogate",
        ),
        (lambda c: c.embed(["a" * (MEGABYTE + 1)], model="minilm"), RequestTooLargeError, "1048577 bytes"),
        (lambda c: c.embed(["a"] * 100_000, model="minilm"), TooManyTextsError, "100000 texts"),
        (lambda c: c.embed(["a"], model="nope"), UnknownModelError, r"known models: .*chat, minilm"),
        (lambda c: c.embed(["a"], model="chat"), WrongTaskError, "serves 'generate'"),
        (lambda c: c.generate("a", model="minilm"), WrongTaskError, "serves 'embed'"),
        (
            lambda c: c.embed(["a"], model="minilm", pooling="max"),
            InvalidOptionError,
            "no option of that name",
        ),
        (
            lambda c: c.embed(["a"], model="minilm", precision="int4"),
            InvalidOptionError,
            "'binary' or 'ubinary'",
        ),
        (lambda c: c.embed(["a"], model="minilm", truncate_dim=999), InvalidOptionError, "at most 384"),
        (lambda c: c.embed(["a"], model="minilm", prompt_name="nope"), InvalidOptionError, "prompts here"),
        (
            lambda c: c.embed(["a"], model="minilm", priority="urgent"),
            InvalidOptionError,
            "interactive, default",
        ),
        (lambda c: c.embed(["a"], model="minilm", deadline_s=0), InvalidOptionError, "above 0"),
        (lambda c: c.generate("", model="chat"), InvalidTextError, "is empty"),
        (
            lambda c: c.generate("a", model="chat", temperature=3.0),
            InvalidOptionError,
            "less than or equal to 2",
        ),
        (lambda c: c.generate("a", model="chat", top_p=0), InvalidOptionError, "greater than 0"),
        (lambda c: c.generate("a", model="chat", best_of=3), InvalidOptionError, "no option of that name"),
        (lambda c: c.generate("a", model="chat", history=[{"role": "x"}]), InvalidTextError, "history"),
        (lambda c: c.generate("a", model="chat", history=5), InvalidTextError, "of history"),
        (lambda c: c.generate("a", model="chat", history="no turns"), InvalidTextError, "of history"),
        (lambda c: c.generate("word " * 200_000, model="chat"), InputTooLongError, "prompt tokens"),
    ],
)
def test_a_bad_request_is_one_typed_sentence(
    client: Client, ask: Callable[[Client], object], error: type[PenstockError], message: str
) -> None:
    """What, which value, and what is allowed."""
    with pytest.raises(error, match=message) as caught:
        ask(client)

    assert "\n" not in str(caught.value)


def test_a_bad_request_harms_no_other(client: Client, worker: WorkerProcess) -> None:
    """Jobs beside one that fails in the worker are answered, and the worker lives."""
    beside = [client.submit_embed([f"beside {i}"], model="minilm") for i in range(8)]
    bad = client.submit_embed(["a"], model="minilm", truncate_dim=999)
    beside += [client.submit_embed([f"behind {i}"], model="minilm") for i in range(8)]

    with pytest.raises(InvalidOptionError):
        bad.result()
    assert all(job.result().shape == (1, 384) for job in beside)
    assert worker.process.poll() is None


def test_an_expired_result_says_so(client: Client, server: Server) -> None:
    """A job whose result is gone is told from one that never was."""
    job = client.submit_embed(["short-lived"], model="minilm")
    job.result()
    job.forget()

    with pytest.raises(ResultExpiredError):
        client.job(job.id).result(timeout_s=5)
    with pytest.raises(UnknownJobError):
        client.job("no-such-job").result(timeout_s=5)


def test_a_result_that_is_garbage_is_an_error(client: Client, server: Server) -> None:
    """Bytes in the result store that are no result do not look like one."""
    import redis

    job = client.submit_embed(["a"], model="minilm")
    job.result()
    with redis.Redis.from_url(server.results_url) as store:
        store.set(result_key(job.id), b"\x80\x04garbage")

    with pytest.raises(PenstockError, match="cannot be read"):
        client.job(job.id).result(timeout_s=5)


def test_a_late_result_is_a_timeout_and_still_comes(client: Client) -> None:
    """`result` gives up after its timeout, and can be asked again."""
    job = client.submit_embed(["slow " * 200] * 400, model="minilm")

    with pytest.raises(ResultTimeoutError):
        job.result(timeout_s=0.001)
    assert job.result(timeout_s=60).shape == (400, 384)
