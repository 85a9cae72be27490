"""Remote models against a server that misbehaves: what is sent, what comes back, who waits for what."""

import json
import resource
import threading
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import constants

from penstock.errors import (
    DeadlineExceededError,
    InvalidOptionError,
    JobCancelledError,
    ModelLoadError,
    PenstockError,
    UpstreamAnswerError,
    UpstreamRefusedError,
    UpstreamUnavailableError,
)
from penstock.request import EmbedRequest, new_job_id
from penstock_workers.batching.feed import Job
from penstock_workers.batching.work import Work
from penstock_workers.remote.dispatcher import Dispatcher
from penstock_workers.remote.embedding import RemoteEmbedder
from penstock_workers.settings import ModelSettings
from tests.deployment import Server
from tests.eventually import eventually
from tests.upstream import (
    DIM,
    TOKEN,
    Act,
    Handler,
    Upstream,
    changed,
    cut_off,
    remote_settings,
    says,
    vector_of,
    waits_for,
    with_first_vector,
)

TEXTS = [f"text number {i}" for i in range(10)]


@pytest.fixture
def secret(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a variable that holds a token; another token is where libraries look for one."""
    monkeypatch.setenv("UPSTREAM_KEY", TOKEN)
    monkeypatch.setenv("HF_TOKEN", "hf_somebody_elses")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-somebody-elses")
    monkeypatch.setenv("OPENAI_ORG_ID", "org-somebody-elses")
    return "UPSTREAM_KEY"


class Embedding:
    """A remote embedding model as a worker has it."""

    def __init__(self, server: Server, model: ModelSettings) -> None:
        self.engine = RemoteEmbedder.load("hosted", model, server.broker_url)
        self.dispatcher: Dispatcher = Dispatcher(self.engine)

    def submit(
        self,
        texts: list[str],
        *,
        deadline_s: float | None = 20.0,
        is_unwanted: Callable[[], bool] = lambda: False,
    ) -> Work:
        """Queue a job."""
        items = self.engine.prepare(EmbedRequest(model="hosted", texts=texts))
        deadline = None if deadline_s is None else time.time() + deadline_s
        return self.dispatcher.submit(Job(id=new_job_id(), deadline=deadline, is_unwanted=is_unwanted), items)

    def embed(self, texts: list[str], **options: object) -> np.ndarray:
        """Return float32, shape (n_texts, DIM)."""
        vectors = self.submit(texts, **options).wait()  # type: ignore[arg-type]  # passed on
        return np.stack(vectors)

    def failure(self, texts: list[str], **options: object) -> PenstockError:
        """Return why texts have no vectors."""
        with pytest.raises(PenstockError) as caught:
            self.embed(texts, **options)
        return caught.value


Make = Callable[..., Embedding]


@pytest.fixture
def embedding(server: Server, upstream: Upstream) -> Make:
    """Connect to the server."""
    return lambda **remote: Embedding(server, remote_settings(f"{upstream.url}/v1", **remote))


def expected(texts: list[str]) -> np.ndarray:
    """Return the vectors that the server has."""
    return np.array([vector_of(text) for text in texts], dtype=np.float32)


def test_jobs_share_requests(embedding: Make, upstream: Upstream) -> None:
    """Texts that wait go together, as many as a request holds, and come back to their jobs in order."""
    hosted = embedding(max_request_texts=8, max_concurrency=1)
    gate = threading.Event()
    upstream.plan.append(waits_for(gate))

    first = hosted.submit(["first"])
    eventually(lambda: upstream.seen)
    jobs = [hosted.submit([f"{i} {text}" for text in TEXTS]) for i in range(4)]
    gate.set()
    found = [np.stack(job.wait()) for job in (first, *jobs)]

    assert np.allclose(found[0], expected(["first"]), atol=1e-6)
    for i, vectors in enumerate(found[1:]):
        assert np.allclose(vectors, expected([f"{i} {text}" for text in TEXTS]), atol=1e-6)
    assert [len(seen.texts) for seen in upstream.seen] == [1, 8, 8, 8, 8, 8]


def test_usage_is_what_the_server_counted(embedding: Make) -> None:
    """Texts of one request share its count; the sum is exact."""
    hosted = embedding()
    work = hosted.submit(["one two", "three", "four five six seven"])
    work.wait()

    assert sum(item.n_tokens for item in work.items) == 7


@pytest.mark.parametrize(
    "act",
    [
        cut_off,
        says(200, "<html>"),
        says(200, {"error": {"message": "overloaded", "type": "server_error"}}),
        says(200, []),
        says(200, {"data": [{"embedding": "***", "index": 0}]}),
        says(500),
        says(502, "<html>"),
        changed(lambda answer: answer | {"data": answer["data"][1:]}),
        changed(lambda answer: answer | {"data": [*answer["data"], *answer["data"]]}),
        with_first_vector([1.0] * (DIM + 1)),
        with_first_vector([float("nan")] * DIM),
        with_first_vector([0.0] * DIM),
        with_first_vector("no vector"),
        with_first_vector(None),
        says(429, Retry_After="0.2"),
        says(429),
        says(503, {"error": "Model is loading", "estimated_time": 0.1}),
    ],
)
def test_what_goes_by_is_tried_again(embedding: Make, upstream: Upstream, act: Act) -> None:
    """A server that fails once answers the same job on the next request."""
    hosted = embedding()
    upstream.plan.append(act)

    assert np.allclose(hosted.embed(TEXTS[:3]), expected(TEXTS[:3]), atol=1e-6)
    assert len(upstream.seen) == 2


@pytest.mark.parametrize(
    ("act", "kind", "words"),
    [
        (says(401, {"error": {"code": "invalid_api_key", "message": TOKEN}}), UpstreamRefusedError, "401"),
        (says(402), UpstreamRefusedError, "credits"),
        (says(403), UpstreamRefusedError, "no right"),
        (says(404), UpstreamRefusedError, "no such model or path"),
        (
            says(422, {"error": "text swordfish is bad", "error_type": "Validation"}),
            UpstreamRefusedError,
            "422",
        ),
        (says(413), UpstreamRefusedError, "too large"),
        (says(429, {"error": {"code": "insufficient_quota"}}), UpstreamRefusedError, "insufficient_quota"),
        (says(307, Location="http://127.0.0.1:9/v1/embeddings"), UpstreamRefusedError, "redirects"),
        (with_first_vector([float("inf")] * DIM), UpstreamAnswerError, "not finite"),
        (says(200, "<html>"), UpstreamAnswerError, "Error"),
    ],
)
def test_what_stays_is_a_typed_error(
    embedding: Make, upstream: Upstream, secret: str, act: Act, kind: type[PenstockError], words: str
) -> None:
    """Refusals cost one request, useless answers a few; the error names the server and no secret, no text."""
    hosted = embedding(token_env=secret)
    upstream.always = lambda _: act

    error = hosted.failure(["a swordfish text"])

    assert type(error) is kind
    assert words in str(error)
    assert "127.0.0.1" in str(error)
    assert "swordfish" not in str(error)
    assert len(upstream.seen) == (1 if kind is UpstreamRefusedError else 4)


def _endless(status: int, **headers: str) -> Act:
    """Answer with a body that does not end before the client hangs up."""

    def act(handler: Handler, _: dict[str, Any]) -> None:
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Connection", "close")
        handler.end_headers()
        handler.close_connection = True
        packer = zlib.compressobj(wbits=31) if "Content_Encoding" in headers else None
        part = b" " * (1 << 20)
        with suppress(OSError):
            for _ in range(4096):
                handler.wfile.write(packer.compress(part) if packer else part)

    return act


@pytest.mark.parametrize(
    ("act", "kind", "words"),
    [
        (_endless(200), UpstreamAnswerError, "more than"),
        (_endless(200, Content_Encoding="gzip"), UpstreamAnswerError, "more than"),
        (_endless(401), UpstreamRefusedError, "401"),
        (_endless(422, Content_Encoding="gzip"), UpstreamRefusedError, "422"),
        (_endless(401, Content_Length="many"), UpstreamUnavailableError, "Protocol"),
    ],
    ids=["answer", "packed", "error", "packed error", "length"],
)
def test_an_answer_has_a_bound(
    embedding: Make, upstream: Upstream, act: Act, kind: type[PenstockError], words: str
) -> None:
    """What does not end is not read on, unpacked or not; the status of an error is told all the same."""
    hosted = embedding(patience_s=1)
    upstream.always = lambda _: act
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    error = hosted.failure(["a text"])

    assert type(error) is kind
    assert words in str(error)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 << 10  # KiB


def test_a_proxy_does_not_see_what_is_for_this_machine(
    embedding: Make, secret: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`HTTP_PROXY` is not used for a server here, which is spoken to in plain text."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)

    assert embedding(token_env=secret).embed(["a text"]).shape == (1, DIM)


def test_a_bad_text_fails_alone(embedding: Make, upstream: Upstream) -> None:
    """A request that is refused for one text is halved until that text is alone."""
    hosted = embedding(max_concurrency=1)
    gate = threading.Event()
    upstream.plan.append(waits_for(gate))
    upstream.always = lambda seen: says(400) if "bad" in seen.texts else None

    first = hosted.submit(["first"])
    eventually(lambda: upstream.seen)
    good, bad = hosted.submit(TEXTS), hosted.submit(["bad"])
    gate.set()
    first.wait()

    assert np.allclose(np.array(good.wait()), expected(TEXTS), atol=1e-6)
    with pytest.raises(UpstreamRefusedError, match="400"):
        bad.wait()


def test_what_is_too_large_is_split_and_learned(embedding: Make, upstream: Upstream) -> None:
    """After 413 requests are smaller, also those to come; the job's vectors are whole and in order."""
    hosted = embedding(max_request_texts=64)
    upstream.max_texts = 10
    texts = [f"{i} {text}" for text in TEXTS for i in range(10)]

    assert np.allclose(hosted.embed(texts), expected(texts), atol=1e-6)
    n_before = len(upstream.seen)
    assert np.allclose(hosted.embed(texts[::-1]), expected(texts[::-1]), atol=1e-6)

    assert all(len(seen.texts) <= 10 for seen in upstream.seen[n_before:])


def test_tei_s_own_limits_are_kept(server: Server, upstream: Upstream, secret: str) -> None:
    """`/info` says what TEI takes; it is asked in its own protocol, and told to cut what is too long."""
    upstream.info = {"max_client_batch_size": 4, "max_batch_tokens": 4096, "max_input_length": 512}
    hosted = Embedding(server, remote_settings(upstream.url, protocol="auto", dim=None, token_env=secret))

    assert np.allclose(hosted.embed(TEXTS), expected(TEXTS), atol=1e-6)

    assert {seen.path for seen in upstream.seen} == {"/embed"}
    assert max(len(seen.texts) for seen in upstream.seen) == 4
    assert all(seen.body["truncate"] is True for seen in upstream.seen)
    assert (hosted.engine.protocol, hosted.engine.max_tokens, hosted.engine.dim) == ("tei", 512, DIM)


@pytest.mark.parametrize("protocol", ["openai", "tei", "hf"])
def test_a_token_goes_to_its_server_alone(
    embedding: Make, upstream: Upstream, secret: str, protocol: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The configured token and nothing of the environment is sent; without one, none at all."""
    path = {"hf": "/embed"}.get(protocol, "")
    for token_env in (secret, None):
        hosted = embedding(protocol=protocol, token_env=token_env)
        hosted.engine._embed_url = f"{upstream.url}/embed" if path else hosted.engine._embed_url
        hosted.embed(["a"])

    with_token, without = upstream.seen
    assert with_token.headers["authorization"] == f"Bearer {TOKEN}"
    assert "authorization" not in without.headers
    assert "somebody" not in json.dumps([dict(seen.headers) for seen in upstream.seen])
    assert TOKEN not in caplog.text


@pytest.mark.parametrize("protocol", ["openai", "tei"])
def test_redirects_are_not_followed(server: Server, upstream: Upstream, secret: str, protocol: str) -> None:
    """Neither texts nor tokens go where a server points to."""
    with Upstream().running() as elsewhere:
        hosted = Embedding(server, remote_settings(f"{upstream.url}/v1", protocol=protocol, token_env=secret))
        for status in (301, 302, 307, 308):
            upstream.always = lambda _, status=status: says(status, Location=f"{elsewhere.url}/v1/embeddings")
            with pytest.raises(UpstreamRefusedError, match="redirects"):
                hosted.embed(["a"])

        assert elsewhere.seen == []
        assert elsewhere.gets == []


def test_a_provider_is_asked_through_the_router(
    server: Server, upstream: Upstream, secret: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`provider:NAME` finds the model's name there at the hub, and sends texts to the router."""
    monkeypatch.setattr(constants, "ENDPOINT", upstream.url)
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", upstream.url)
    monkeypatch.setattr(constants, "INFERENCE_PROXY_TEMPLATE", upstream.url + "/{provider}")
    model = remote_settings("provider:together", model="org/name", token_env=secret)
    hosted = Embedding(server, model)
    upstream.always = lambda _: None

    assert np.allclose(hosted.embed(["a"]), expected(["a"]), atol=1e-6)

    assert upstream.seen[0].path == "/together/v1/embeddings"
    assert upstream.seen[0].body["model"] == "their-name"
    assert upstream.seen[0].headers["authorization"] == f"Bearer {TOKEN}"


def test_a_pause_holds_all_workers(server: Server, upstream: Upstream) -> None:
    """A 429 to one worker keeps the others from asking, until its time is over."""
    model = remote_settings(f"{upstream.url}/v1")
    one, other = Embedding(server, model), Embedding(server, model)
    upstream.plan.append(says(429, Retry_After="2"))

    refused = one.submit(["one"])
    eventually(lambda: one.dispatcher.trouble())
    waiting = other.submit(["other"])
    refused.wait()
    waiting.wait()

    first, *later = upstream.seen
    assert len(later) == 2
    assert all(seen.at - first.at >= 1.9 for seen in later)


@pytest.mark.parametrize(
    "headers",
    [
        {"RateLimit": '"api";r=0;t=2', "RateLimit-Policy": '"fixed window";"api";q=500;w=300'},
        {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "2s"},
    ],
)
def test_a_spent_allowance_is_a_pause(embedding: Make, upstream: Upstream, headers: dict[str, str]) -> None:
    """An answer that says that it was the last one is followed by no request that is bound to be refused."""
    hosted = embedding()

    def answer_and_say(handler: object, body: dict) -> None:
        handler.reply(200, {"data": [{"index": 0, "embedding": vector_of(body["input"][0])}]}, headers)

    upstream.plan.append(answer_and_say)
    hosted.embed(["one"])
    hosted.embed(["two"])

    first, second = upstream.seen
    assert second.at - first.at >= 1.9


def test_a_job_that_cannot_wait_hears_it_at_once(embedding: Make, upstream: Upstream) -> None:
    """Where the pause is longer than the deadline, the error says so, and when to try again."""
    hosted = embedding()
    upstream.plan.append(says(503, {"error": "loading", "estimated_time": 50.0}))

    error = hosted.failure(["a"], deadline_s=20.0)

    assert isinstance(error, UpstreamUnavailableError)
    assert 40 < error.retry_after_s <= 50
    assert "on hold: 503" in str(error)
    assert "on hold: 503" in str(hosted.failure(["b"], deadline_s=20.0))
    assert len(upstream.seen) == 1


def test_the_circuit_opens_and_one_probe_closes_it(server: Server, upstream: Upstream) -> None:
    """Failures in a row stop all workers; then one request goes, and if it is answered, all do."""
    model = remote_settings(f"{upstream.url}/v1")
    workers = [Embedding(server, model) for _ in range(2)]
    upstream.always = lambda _: says(500)
    jobs = [worker.submit([f"{i}"]) for i, worker in enumerate(workers) for _ in range(4)]

    eventually(lambda: all("circuit open" in worker.dispatcher.trouble() for worker in workers), within_s=10)
    n_failed = len(upstream.seen)
    error = workers[0].failure(["hasty"], deadline_s=0.3)
    upstream.always = None
    vectors = [job.wait() for job in jobs]
    eventually(lambda: not any(worker.dispatcher.trouble() for worker in workers))

    assert isinstance(error, UpstreamUnavailableError | DeadlineExceededError)
    assert n_failed <= 8
    assert len(vectors) == 8
    assert upstream.most_in_flight <= 8


def test_a_slow_server_is_given_up_in_total(embedding: Make, upstream: Upstream) -> None:
    """Time limits count the whole request: a byte now and then does not extend them."""
    hosted = embedding(timeout_s=0.3)
    dripping = threading.Event()

    def drip(handler: object, body: dict) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "100000")
        handler.end_headers()
        while not dripping.wait(0.05):
            handler.wfile.write(b" ")
            handler.wfile.flush()

    upstream.plan.append(drip)

    assert np.allclose(hosted.embed(["a"]), expected(["a"]), atol=1e-6)
    eventually(lambda: upstream.n_abandoned == 1)
    dripping.set()


def test_nobody_waits_and_the_request_is_given_up(embedding: Make, upstream: Upstream) -> None:
    """Cancelled and late jobs close their connection to the server."""
    hosted = embedding(max_request_texts=1)
    never = threading.Event()
    upstream.always = lambda _: waits_for(never)
    cancelled = threading.Event()

    job = hosted.submit(["cancelled"], is_unwanted=cancelled.is_set)
    late = hosted.submit(["late"], deadline_s=0.5)
    eventually(lambda: upstream.in_flight == 2)
    cancelled.set()

    with pytest.raises(JobCancelledError):
        job.wait()
    with pytest.raises(DeadlineExceededError):
        late.wait()
    eventually(lambda: upstream.n_abandoned == 2)


def test_a_rate_is_kept_by_all_workers_together(server: Server, upstream: Upstream) -> None:
    """Eight workers at a server that counts refuse nothing and use the rate; nothing is asked twice."""
    model = remote_settings(
        f"{upstream.url}/v1", rate_limit={"requests_per_minute": 600}, max_request_texts=1
    )
    workers = [Embedding(server, model) for _ in range(8)]
    upstream.per_minute = 600
    began = time.monotonic()
    jobs = [worker.submit([f"{i} {n}" for n in range(8)]) for i, worker in enumerate(workers)]
    for job in jobs:
        job.wait()

    times = [at - began for at in sorted(seen.at for seen in upstream.seen)]
    assert upstream.refused_at == []
    assert len(times) == 64
    due = [(n - 12) / (0.97 * 10) for n in range(1, 65)]  # 12 at once, then at the rate
    assert all(at >= due_at for at, due_at in zip(times, due, strict=True))
    assert times[-1] < 2 * due[-1]  # a slow machine may be late


def test_tokens_are_paced_too(embedding: Make, upstream: Upstream) -> None:
    """Texts wait for the tokens that they cost; what the estimate missed is made good."""
    hosted = embedding(rate_limit={"tokens_per_minute": 6000}, max_request_texts=1)
    text = "word " * 100  # by estimate 125 tokens, counted 100
    began = time.monotonic()
    hosted.embed([f"{i} {text}" for i in range(5)])

    # The last waits for what the four before it have cost more than the 120 that go at once, but for its own.
    last_s = max(seen.at for seen in upstream.seen) - began
    assert (4 * 100 - 120) / 97 <= last_s < 3 * 5 * 125 / 97


def test_concurrency_is_halved_by_overload_and_grows_again(embedding: Make, upstream: Upstream) -> None:
    """Answers add requests under way, an overload halves them once."""
    hosted = embedding(max_request_texts=1, max_concurrency=16)
    hosted.embed([f"{i}" for i in range(200)])
    grown = hosted.dispatcher.in_flight.concurrency
    upstream.plan += [says(429, Retry_After="0.1")] * 3
    hosted.embed([f"{i}" for i in range(5)])

    assert grown > 8
    assert hosted.dispatcher.in_flight.concurrency < 0.75 * grown
    assert upstream.most_in_flight <= 16


def test_a_server_that_is_away_at_the_start(server: Server, upstream: Upstream, secret: str) -> None:
    """With `dim` a worker starts without it; with a refused token it does not start."""
    upstream.always = lambda _: says(401)

    with pytest.raises(ModelLoadError, match=r"401 Unauthorized.*UPSTREAM_KEY"):
        Embedding(server, remote_settings(f"{upstream.url}/v1", dim=None, token_env=secret))
    with pytest.raises(ModelLoadError, match=r"remote\.token_env: MISSING is not set"):
        Embedding(server, remote_settings(f"{upstream.url}/v1", token_env="MISSING"))
    assert Embedding(server, remote_settings("http://127.0.0.1:9/v1")).engine.dim == DIM


def test_what_a_remote_model_cannot_do_is_said(embedding: Make) -> None:
    """Options that need the model itself are refused by name."""
    engine = embedding().engine
    for name, value in (("prompt_name", "query"), ("truncate_dim", DIM + 1), ("precision", "int8")):
        with pytest.raises(InvalidOptionError, match=name):
            engine.prepare(EmbedRequest.parse({"model": "m", "texts": ["a"], name: value}))
    (text,) = engine.prepare(EmbedRequest(model="m", texts=["a"], prompt="query: "))
    assert text.text == "query: a"


def test_a_token_file_is_read(server: Server, upstream: Upstream, tmp_path: Path) -> None:
    """Secrets may be mounted; their last line break is none of them."""
    secret = tmp_path / "token"
    secret.write_text(f"{TOKEN}\n")
    Embedding(server, remote_settings(f"{upstream.url}/v1", token_file=secret)).embed(["a"])

    assert upstream.seen[0].headers["authorization"] == f"Bearer {TOKEN}"
