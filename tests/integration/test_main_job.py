"""The main job through a real worker: texts in, arrays and answers out."""

import asyncio
import json
import re
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from penstock import (
    AsyncClient,
    Client,
    DeadlineExceededError,
    GenerateResult,
    IncompleteOutputError,
    InvalidFormatError,
    Job,
    JobState,
    Message,
    ResponseFormat,
)
from penstock.many import JOBS_PER_WORKER, UNREAD
from tests.deployment import Server, WorkerProcess

TEXTS = ["A penstock feeds a turbine.", "你好，世界", "", "x" * 5000, "A penstock feeds a turbine."]


def test_vectors_come_back_as_one_array(client: Client) -> None:
    """`embed` returns float32 of shape (n_texts, dim), rows in the texts' order."""
    vectors = client.embed(TEXTS, model="minilm")

    assert vectors.shape == (len(TEXTS), 384)
    assert vectors.dtype == np.float32
    assert vectors.flags.c_contiguous
    assert np.allclose(vectors[0], vectors[4], atol=1e-6)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-3)


def test_half_precision_is_the_same_direction(client: Client) -> None:
    """`precision="float16"` halves the bytes and keeps the vectors."""
    half = client.embed(TEXTS, model="minilm", precision="float16")

    whole = client.embed(TEXTS, model="minilm")
    assert half.dtype == np.float16
    assert np.allclose(half.astype(np.float32), whole, atol=1e-3)


@pytest.mark.parametrize(
    ("precision", "dtype", "columns"),
    [("int8", np.int8, 64), ("binary", np.int8, 8), ("ubinary", np.uint8, 8)],
)
def test_quantized_vectors_come_back(client: Client, precision: str, dtype: type, columns: int) -> None:
    """Each precision has its dtype and width, and keeps what it can of the vectors."""
    options = {"model": "minilm", "truncate_dim": 64, "normalize_embeddings": True}
    found = client.embed(TEXTS, precision=precision, **options)  # type: ignore[arg-type]  # Literals

    plain = client.embed(TEXTS, **options)  # type: ignore[arg-type]  # the same
    assert (found.dtype, found.shape) == (dtype, (len(TEXTS), columns))
    if precision == "int8":
        ranges = client.models()["minilm"].int8_ranges
        assert ranges is not None
        low, high = np.array(ranges) * np.sqrt(384 / 64)
        back = low + (found + 128.5) * (high - low) / 255
        assert ((back * plain).sum(axis=1) / np.linalg.norm(back, axis=1)).min() > 0.999
    else:
        signs = np.unpackbits(found.view(np.uint8) ^ (0x80 if precision == "binary" else 0), axis=1)
        assert (signs == (plain > 0)).mean() > 0.97  # a batch of another shape rounds otherwise


def test_truncated_vectors_are_the_first_dimensions(client: Client) -> None:
    """`truncate_dim` keeps the first dimensions; `normalize_embeddings` gives them unit length again."""
    short = client.embed(["a text"], model="minilm", truncate_dim=64, normalize_embeddings=True)

    whole = client.embed(["a text"], model="minilm")[:, :64]
    assert short.shape == (1, 64)
    assert np.allclose(short, whole / np.linalg.norm(whole), atol=1e-5)


def test_a_job_tells_where_it_is(client: Client) -> None:
    """A job that ended has a state, usage and timings, and its result can be read again."""
    job = client.submit_embed(["one", "two"], model="minilm", priority="interactive", deadline_s=600)

    first, second = job.result(), job.result()

    assert np.array_equal(first, second)
    assert job.state() is JobState.SUCCEEDED
    assert job.usage is not None
    assert job.usage.prompt_tokens == 6  # two words, each between [CLS] and [SEP]
    assert job.timings is not None
    assert job.timings.computed_s > 0


@pytest.mark.parametrize("priority", ["interactive", "default", "batch"])
def test_every_priority_is_served(client: Client, priority: str) -> None:
    """The worker takes jobs of each priority."""
    vectors = client.embed(["a"], model="minilm", priority=priority)  # type: ignore[arg-type]  # a Literal

    assert vectors.shape == (1, 384)


def test_answers_follow_their_formats(client: Client) -> None:
    """Requests with and without formats share the model; each gets what it gets alone."""
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 10}, "known": {"type": "boolean"}},
        "required": ["name", "known"],
        "additionalProperties": False,
    }
    wanted: list[ResponseFormat | None] = [
        {"type": "json_schema", "json_schema": {"name": "who", "schema": schema}},
        {"type": "choice", "choices": ["Ada", "Grace"]},
        {"type": "regex", "pattern": "[0-9]{4}"},
        None,
    ]

    def ask(response_format: ResponseFormat | None) -> Job[GenerateResult]:
        return client.submit_generate(
            "Who are you?", model="chat", temperature=1.0, seed=5, response_format=response_format
        )

    alone = [ask(each).result().text for each in wanted]
    together = [job.result().text for job in [ask(each) for each in wanted * 3]]

    assert together == alone * 3
    assert list(json.loads(alone[0])) == ["name", "known"]
    assert alone[1] in ("Ada", "Grace")
    assert re.fullmatch("[0-9]{4}", alone[2])


def test_a_format_that_fails_is_a_typed_error(client: Client) -> None:
    """An impossible format and one that the limit cuts are told apart, and fail nobody else."""
    impossible: ResponseFormat = {"type": "json_schema", "json_schema": {"schema": {"enum": []}}}
    long: ResponseFormat = {"type": "regex", "pattern": "a{99}"}
    free = client.submit_generate("Who are you?", model="chat")

    with pytest.raises(InvalidFormatError, match="Unsatisfiable"):
        client.generate("?", model="chat", response_format=impossible)
    with pytest.raises(IncompleteOutputError) as caught:
        client.generate("?", model="chat", max_new_tokens=3, response_format=long)

    assert caught.value.text.startswith("a")
    assert free.result().finish_reason == "stop"


def test_one_request_gives_several_answers(client: Client) -> None:
    """Each of `n` answers has its text, and the first is the one that is given alone."""
    word: ResponseFormat = {"type": "regex", "pattern": "[a-z]{12}"}  # else it is sure of what it says

    def ask(n: int) -> GenerateResult:
        return client.generate("Hello!", model="chat", temperature=2.0, seed=3, n=n, response_format=word)

    alone, first, second = ask(1), ask(3), ask(3)

    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in second.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert (texts[0], first.text, len(set(texts))) == (alone.text, alone.text, 3)
    assert first.usage.prompt_tokens == alone.usage.prompt_tokens
    assert first.usage.completion_tokens > alone.usage.completion_tokens
    same = client.generate("Tell me a story.", model="chat", temperature=0, n=2)
    assert same.choices[0].text == same.choices[1].text


def test_several_answers_are_cancelled_together(client: Client) -> None:
    """A deadline ends all answers of a request; who comes next has their places."""
    job = client.submit_generate(
        "Tell me a story.",
        model="chat",
        n=16,
        deadline_s=0.2,
        response_format={"type": "regex", "pattern": "a*b"},
    )

    with pytest.raises((DeadlineExceededError, IncompleteOutputError)):
        job.result()
    assert client.generate("Who are you?", model="chat", timeout_s=20).finish_reason == "stop"


def test_log_probabilities_come_with_the_answer(client: Client) -> None:
    """Each token that is counted has its probability and the likeliest others; greedy takes the likeliest."""
    options = {"model": "chat", "temperature": 0, "logprobs": True, "top_logprobs": 2}
    answer = client.generate("Who are you?", **options)  # type: ignore[arg-type]  # of one type here
    *_, last = client.stream("Who are you?", **options)  # type: ignore[arg-type]  # the same

    assert answer.logprobs is not None
    assert len(answer.logprobs) == answer.usage.completion_tokens
    assert b"".join(token.bytes for token in answer.logprobs).decode().strip() == answer.text.strip()
    assert all(token.logprob == token.top[0].logprob <= 0 for token in answer.logprobs)
    assert all(token.top[0].logprob >= token.top[1].logprob for token in answer.logprobs)
    assert last.logprobs is not None
    assert [t.token for t in last.logprobs] == [t.token for t in answer.logprobs]


def test_generation_uses_system_prompt_and_history(client: Client) -> None:
    """What the system prompt asks and what earlier turns told shows in the answer."""
    history = [
        Message(role="user", content="My name is Ada."),
        {"role": "assistant", "content": "Nice to meet you, Ada."},
    ]

    plain = client.generate("What is my name?", model="chat", history=history)
    loud = client.generate(
        "What is my name?", model="chat", history=history, system_prompt="Answer in upper case."
    )

    assert "Ada" in plain.text
    assert "ADA" in loud.text
    assert loud.text == loud.text.upper()
    assert plain.finish_reason == "stop"
    assert plain.usage.total_tokens > plain.usage.completion_tokens > 0


def test_a_call_wins_over_the_file(client: Client) -> None:
    """`max_new_tokens` of a call replaces the one in the configuration."""
    answer = client.generate("What is 17 + 26?", model="chat", max_new_tokens=2)

    assert answer.finish_reason == "length"
    assert answer.usage.completion_tokens == 2


def test_any_number_of_texts_comes_back_in_order(client: Client) -> None:
    """`embed_many` gives the rows that `embed` gives, in order, from an iterator that is never held whole."""
    texts = [f"text number {i} of many" for i in range(700)]

    streamed = np.concatenate(list(client.embed_many(iter(texts), model="minilm")))

    assert streamed.shape == (700, 384)
    assert np.allclose(streamed[::97], client.embed(texts[::97], model="minilm"), atol=2e-2)


def test_texts_are_not_read_far_ahead(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """`embed_many` holds a few jobs of texts and vectors, however many come."""
    monkeypatch.setattr("penstock.many.MOST_TEXTS", 300)  # else the machine's speed decides
    n_read = n_answered = furthest = 0

    def texts() -> Iterator[str]:
        nonlocal n_read, furthest
        for n_read in range(1, 4001):
            furthest = max(furthest, n_read - n_answered)
            yield f"text {n_read}"

    for vectors in client.embed_many(texts(), model="minilm"):
        n_answered += len(vectors)

    assert n_answered == n_read == 4000
    assert furthest <= UNREAD * JOBS_PER_WORKER * 300 + 1


def test_async_client_waits_for_many_jobs_at_once(server: Server, worker: WorkerProcess) -> None:
    """A hundred awaits share one client, and the loop goes on meanwhile."""

    async def ask() -> tuple[list[np.ndarray], int]:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.005)
                ticks += 1

        async with AsyncClient(server.broker_url) as client:
            ticking = asyncio.create_task(tick())
            jobs = [client.embed([f"text {i}"], model="minilm") for i in range(100)]
            answers = await asyncio.gather(*jobs)
            streamed = [v async for v in client.embed_many(["a"] * 130, model="minilm")]
            ticking.cancel()
        return [*answers, *streamed], ticks

    answers, ticks = asyncio.run(ask())

    assert [len(a) for a in answers[:100]] == [1] * 100
    assert sum(len(a) for a in answers[100:]) == 130
    assert ticks > 3


def test_threads_share_one_client(client: Client) -> None:
    """Sixteen threads that use one client each get their own answer."""
    expected = client.embed([f"thread {i}" for i in range(16)], model="minilm")
    found: dict[int, np.ndarray] = {}

    def ask(i: int) -> None:
        found[i] = client.embed([f"thread {i}"], model="minilm")[0]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert all(np.dot(found[i], expected[i]) > 0.999 for i in range(16))


def test_another_client_reads_a_job_by_its_id(client: Client, server: Server) -> None:
    """A job can be fetched by whoever knows its id."""
    job = client.submit_embed(["shared"], model="minilm")

    with Client(server.broker_url) as other:
        fetched = other.job(job.id).result(timeout_s=30)

    assert isinstance(fetched, np.ndarray)
    assert np.array_equal(fetched, job.result())


def test_models_are_discovered(client: Client) -> None:
    """A client needs a URL and nothing else: models, tasks and sizes come from the registry."""
    models = client.models()

    assert models["minilm"].task == "embed"
    assert models["minilm"].dim == 384
    assert models["chat"].task == "generate"


def test_no_text_is_logged(client: Client, worker: WorkerProcess) -> None:
    """Texts, prompts and answers stay out of the worker's log."""
    client.embed(["my-xylophone-text"], model="minilm")
    client.generate("my-xylophone-prompt", model="chat", max_new_tokens=4)

    assert "xylophone" not in worker.log
