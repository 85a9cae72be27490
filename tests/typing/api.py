"""Every public name as a caller types it; `mypy --strict` reads this, nothing runs it.

A name is public when it is exported by `penstock` and has a line here.
"""

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Literal, assert_type

import numpy as np
from numpy.typing import NDArray

from penstock import (
    AsyncClient,
    AsyncJob,
    BrokerRefusedError,
    BrokerUnavailableError,
    Choice,
    Client,
    ClientUseError,
    ConfigError,
    DeadlineExceededError,
    EngineError,
    Estimate,
    GenerateResult,
    IncompleteOutputError,
    InputTooLongError,
    InvalidFormatError,
    InvalidMessageError,
    InvalidOptionError,
    InvalidTextError,
    Job,
    JobCancelledError,
    JobState,
    Logprobs,
    Message,
    ModelInfo,
    ModelLoadError,
    OutOfMemoryError,
    PenstockError,
    Piece,
    QueueDelayError,
    RateLimitError,
    RequestError,
    RequestTooLargeError,
    RerankResult,
    ResponseFormat,
    ResultDecodeError,
    ResultExpiredError,
    ResultTimeoutError,
    ResultTooLargeError,
    StreamRestartedError,
    Timings,
    TokenLogprob,
    Tool,
    ToolCall,
    TooManyTextsError,
    TransportError,
    UnknownJobError,
    UnknownModelError,
    UpstreamAnswerError,
    UpstreamError,
    UpstreamRefusedError,
    UpstreamUnavailableError,
    Usage,
    WaitPolicy,
    WorkerError,
    WorkerLostError,
    WrongTaskError,
)

Vectors = NDArray[np.float32] | NDArray[np.float16] | NDArray[np.int8] | NDArray[np.uint8]

FORMATS: list[ResponseFormat] = [
    {"type": "json_object"},
    {"type": "json_schema", "json_schema": {"name": "age", "schema": {"type": "integer"}}},
    {"type": "regex", "pattern": "[0-9]+"},
    {"type": "choice", "choices": ["yes", "no"]},
]
TOOLS: list[Tool] = [
    {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
]
CALL: ToolCall = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
HISTORY = [Message(role="user", content="My name is Ada."), Message(role="assistant", content="Hello, Ada.")]


def embed(client: Client) -> None:
    """Vectors come back at once, or through a job."""
    assert_type(client.embed(["a", "b"], model="minilm"), Vectors)
    assert_type(
        client.embed(
            ("a", "b"),
            model="minilm",
            timeout_s=None,
            prompt_name="query",
            prompt="query: ",
            normalize_embeddings=True,
            truncate_dim=128,
            precision="binary",
            priority="interactive",
            deadline_s=2.5,
            tenant="search",
            wait=WaitPolicy(max_wait_s=30.0, attempts=5, base_s=0.1, most_s=5.0),
        ),
        Vectors,
    )
    job = client.submit_embed(["a"], model="minilm", priority="batch", deadline_s=600)
    assert_type(job, Job[Vectors])
    assert_type(job.result(), Vectors)
    assert_type(client.submit_many([["a"], ["b", "c"]], model="minilm", truncate_dim=64), list[Job[Vectors]])
    assert_type(job.result(timeout_s=30), Vectors)
    assert_type(
        job.result().dtype,
        np.dtype[np.float32] | np.dtype[np.float16] | np.dtype[np.int8] | np.dtype[np.uint8],
    )


def embed_many(client: Client, lines: Iterator[str]) -> None:
    """Any iterable of texts goes in, arrays come out one after the other."""
    parts = client.embed_many(lines, model="minilm", progress=True, timeout_s=None, priority="batch")
    assert_type(parts, Iterator[Vectors])
    for vectors in parts:
        assert_type(vectors, Vectors)


def generate(client: Client) -> None:
    """An answer comes back with all that is known of it."""
    answer = client.generate("What is my name?", model="chat")
    assert_type(answer, GenerateResult)
    assert_type(answer.model, str)
    assert_type(answer.text, str)
    assert_type(answer.finish_reason, Literal["stop", "length"])
    _costs(answer.usage, answer.timings)
    client.generate(
        "What is my name?",
        model="chat",
        timeout_s=30,
        system_prompt="Be brief.",
        history=HISTORY,
        max_new_tokens=64,
        context_window=2048,
        temperature=0,
        top_k=40,
        top_p=0.9,
        min_p=0.05,
        repetition_penalty=1.1,
        seed=1,
        response_format={"type": "choice", "choices": ["Ada", "Bob"]},
        truncation="oldest_turns",
        n=2,
        logprobs=True,
        top_logprobs=3,
        priority="default",
        deadline_s=None,
    )
    assert_type(answer.choices, tuple[Choice, ...])
    if answer.logprobs is not None:
        assert_type(answer.logprobs, Logprobs)
        assert_type(answer.logprobs[0], TokenLogprob)
        assert_type(answer.logprobs[0].top, tuple[TokenLogprob, ...])
    client.generate("Yes?", model="chat", response_format=FORMATS[0])
    client.generate("Once", model="chat", mode="complete", truncation="middle")
    asked = Message(role="assistant", content="", reasoning="...", tool_calls=(CALL,))
    turns = [*HISTORY, asked, Message(role="tool", content="rain", tool_call_id="1")]
    called = client.generate(None, model="chat", history=turns, tools=TOOLS, enable_thinking=False)
    assert_type(called.reasoning, str | None)
    assert_type(called.tool_calls, Sequence[ToolCall] | None)
    assert_type(called.usage.cut_tokens, int | None)
    plain_turns = [{"role": "user", "content": "My name is Ada."}]
    job = client.submit_generate("What is my name?", model="chat", history=plain_turns, stop=["END", "\n"])
    assert_type(job, Job[GenerateResult])
    assert_type(job.result(), GenerateResult)
    for piece in client.stream("Who are you?", model="chat", on_restart="show", timeout_s=30, seed=1):
        assert_type(piece, Piece)
        assert_type(piece.text, str)
        assert_type(piece.reasoning, str)
        assert_type(piece.is_restart, bool)
        assert_type(piece.usage, Usage | None)


def rerank(client: Client) -> None:
    """Scores come back in the documents' order, and who is best."""
    ranking = client.rerank("Who?", ["Ada", "Bob"], model="cross", top_n=1, priority="interactive")
    assert_type(ranking, RerankResult)
    assert_type(ranking.scores, NDArray[np.float32])
    assert_type(ranking.order, Sequence[int])
    _costs(ranking.usage, ranking.timings)
    assert_type(client.submit_rerank("Who?", ("Ada",), model="cross", deadline_s=5), Job[RerankResult])


def jobs(client: Client) -> None:
    """A job is found again by its id; its result is then of either kind."""
    job = client.job("6f3c2f60-0b1e-4f7a-9a55-0d6f5e1c2b3a")
    assert_type(job, Job[Vectors | GenerateResult | RerankResult])
    assert_type(job.id, str)
    assert_type(job.state(), JobState)
    assert_type(job.state() is JobState.SUCCEEDED, bool)
    assert_type(job.cancel(), bool)
    assert_type(job.usage, Usage | None)
    assert_type(job.timings, Timings | None)
    job.forget()
    result = job.result()
    if isinstance(result, GenerateResult):
        assert_type(result, GenerateResult)
    elif isinstance(result, RerankResult):
        assert_type(result, RerankResult)
    else:
        assert_type(result, Vectors)


def models(client: Client) -> None:
    """A caller sees what is served."""
    found = client.models()
    assert_type(found, Mapping[str, ModelInfo])
    model = found["minilm"]
    assert_type(model.name, str)
    assert_type(model.task, Literal["embed", "generate", "rerank"])
    assert_type(model.pools, tuple[Literal["gpu", "cpu"], ...])
    assert_type(model.dim, int | None)
    assert_type(model.max_tokens, int | None)
    assert_type(model.max_texts, int)
    assert_type(model.deadline_s, float | None)
    assert_type(model.dtype, str)


def delays(client: Client) -> None:
    """A caller asks how long a job would wait, and why."""
    found = client.estimate("minilm", priority="batch")
    assert_type(found, Estimate)
    assert_type(found.queue, str)
    assert_type(found.predicted_wait_s, float | None)
    assert_type((found.jobs, found.tokens, found.bytes, found.tokens_ahead), tuple[int, int, int, int])
    assert_type(found.tokens_per_s, float | None)
    assert_type(found.workers, int)


def life() -> None:
    """A client is closed by its `with`, or by hand."""
    with Client("redis://127.0.0.1:6379/0") as client:
        assert_type(client, Client)
    Client(results_url="redis://127.0.0.1:6379/1", connect_timeout_s=1.5).close()


async def twins() -> None:
    """`AsyncClient` is the same with `await`."""
    async with AsyncClient("redis://127.0.0.1:6379/0") as client:
        assert_type(client, AsyncClient)
        assert_type(await client.models(), Mapping[str, ModelInfo])
        assert_type(await client.embed(["a"], model="minilm", precision="float32"), Vectors)
        assert_type(await client.generate("a", model="chat", history=HISTORY, top_p=0.5), GenerateResult)
        assert_type(await client.job("id"), AsyncJob[Vectors | GenerateResult | RerankResult])
        vectors = await client.submit_embed(["a"], model="minilm", priority="interactive")
        assert_type(vectors, AsyncJob[Vectors])
        assert_type(await vectors.result(timeout_s=1), Vectors)
        assert_type(await client.submit_many([["a"]], model="minilm"), list[AsyncJob[Vectors]])
        assert_type(await client.rerank("a", ["b"], model="cross", timeout_s=1), RerankResult)
        assert_type(await client.submit_rerank("a", ["b"], model="cross"), AsyncJob[RerankResult])
        answer = await client.submit_generate("a", model="chat", seed=1)
        assert_type(answer, AsyncJob[GenerateResult])
        assert_type(await answer.result(), GenerateResult)
        assert_type(await answer.state(), JobState)
        assert_type(await answer.cancel(), bool)
        assert_type(answer.usage, Usage | None)
        await answer.forget()
        async for piece in client.stream("a", model="chat"):
            assert_type(piece, Piece)
        assert_type(await client.estimate("minilm"), Estimate)
        parts = client.embed_many((str(n) for n in range(1000)), model="minilm", progress=False)
        assert_type(parts, AsyncIterator[Vectors])
        async for part in parts:
            assert_type(part, Vectors)
    await AsyncClient(results_url="redis://127.0.0.1:6379/1", connect_timeout_s=1.5).close()


def _costs(usage: Usage, timings: Timings) -> None:
    assert_type(usage.prompt_tokens, int)
    assert_type(usage.completion_tokens, int)
    assert_type(usage.total_tokens, int)
    assert_type(timings.queued_s, float)
    assert_type(timings.prepared_s, float)
    assert_type(timings.batched_s, float)
    assert_type(timings.computed_s, float)


def faults_of_upstreams(error: UpstreamError) -> None:
    """What a remote model's server did."""
    match error:
        case UpstreamUnavailableError():
            assert_type((error.problem, error.retry_after_s), tuple[str, float])
        case UpstreamRefusedError():
            assert_type((error.upstream, error.status), tuple[str, int])
        case UpstreamAnswerError():
            assert_type((error.model, error.problem), tuple[str, str])


def faults_of_the_request(error: RequestError) -> None:
    """What a caller has to change."""
    assert_type(error.retryable, bool)
    match error:
        case UnknownModelError():
            assert_type((error.model, error.known), tuple[str, tuple[str, ...]])
        case WrongTaskError():
            assert_type((error.model, error.task, error.wanted), tuple[str, str, str])
        case InvalidOptionError():
            assert_type((error.option, error.value, error.allowed), tuple[str, str, str])
        case InvalidTextError():
            assert_type((error.index, error.problem), tuple[int, str])
        case TooManyTextsError():
            assert_type((error.n_texts, error.limit), tuple[int, int])
        case RequestTooLargeError():
            assert_type((error.what, error.n_bytes, error.limit), tuple[str, int, int])
        case InputTooLongError():
            assert_type((error.model, error.n_tokens, error.limit), tuple[str, int, int])
        case InvalidMessageError() | InvalidFormatError():
            assert_type(error.problem, str)


def faults_of_the_worker(error: WorkerError) -> None:
    """What a caller may try again, if it is `retryable`."""
    match error:
        case ModelLoadError():
            assert_type((error.model, error.reason), tuple[str, str])
        case OutOfMemoryError():
            assert_type((error.model, error.n_tokens), tuple[str, int])
        case EngineError():
            assert_type((error.model, error.problem), tuple[str, str])
        case ResultTooLargeError():
            assert_type((error.n_bytes, error.limit), tuple[int, int])
        case WorkerLostError():
            assert_type((error.job_id, error.n_deliveries), tuple[str, int])


def faults_of_redis(error: TransportError) -> None:
    """What an operator looks at."""
    match error:
        case BrokerUnavailableError() | BrokerRefusedError():
            assert_type((error.url, error.reason), tuple[str, str])
        case ResultTimeoutError():
            assert_type((error.job_id, error.timeout_s), tuple[str, float])


def other_ends(error: PenstockError) -> None:
    """What else may end a call."""
    match error:
        case JobCancelledError() | ResultExpiredError() | StreamRestartedError() | UnknownJobError():
            assert_type(error.job_id, str)
        case IncompleteOutputError():
            assert_type((error.n_tokens, error.text), tuple[int, str])
        case RateLimitError():
            assert_type((error.tenant, error.retry_after_s), tuple[str, float])
        case QueueDelayError():
            assert_type((error.queue, error.exceeded), tuple[str, str])
            assert_type((error.retry_after_s, error.predicted_wait_s), tuple[float, float | None])
        case DeadlineExceededError():
            assert_type((error.job_id, error.late_s), tuple[str, float])
            assert_type(error.timings, Mapping[str, float])
        case ResultDecodeError():
            assert_type(error.problem, str)
        case ClientUseError():
            assert_type(error.problem, str)
        case ConfigError():
            assert_type(error.problems, tuple[str, ...])
