"""What tasks make of requests, and of the answers of whatever feeds an engine."""

import itertools

import numpy as np
import pytest

from penstock.errors import (
    DeadlineExceededError,
    EngineError,
    ResultTooLargeError,
    TooManyTextsError,
    UnknownModelError,
    WrongTaskError,
)
from penstock.registry import ModelInfo
from penstock.request import EmbedRequest, GenerateRequest, RerankRequest, Task
from penstock.stream import Part
from penstock_workers.batching.feed import Answer, Job, Thought
from penstock_workers.serving import tasks
from penstock_workers.serving.models import AnyServed, Served, Serving
from penstock_workers.serving.streams import Stream, Streams
from penstock_workers.serving.tasks import Delivery
from tests.announced import model
from tests.fakes import DIM, FakeEmbedder, FakeFeed, FakeGenerator, FakeReranker, Text, vector_of

MAX_TEXTS = 3


def info(task: Task) -> ModelInfo:
    return model("fake", task=task, dim=DIM if task == "embed" else None, max_texts=MAX_TEXTS)


def serving(served: AnyServed) -> Serving:
    """Serve one model."""
    found = Serving()
    found.models["fake"] = served
    return found


class HeardStreams(Streams):
    """Keeps what is written, and asks no Redis."""

    def __init__(self) -> None:
        super().__init__("redis://127.0.0.1:1", reader_timeout_s=1.0)
        self.heard: list[tuple[Part, str]] = []

    def add(self, stream: Stream, part: Part, piece: str) -> None:
        """Keep a piece."""
        del stream
        self.heard.append((part, piece))


def delivery(**options: object) -> Delivery:
    """Return a job as its message came."""
    job = Job(id="job", **options)  # type: ignore[arg-type]  # passed on
    return Delivery(job=job, sent_at=None, reply_to=None, streams=HeardStreams())


def upper(item: Text) -> Answer:
    return Answer(text=item.text.upper(), finish_reason="stop", n_tokens=item.n_tokens)


def test_vectors_come_in_the_form_that_is_asked_for() -> None:
    """Engines give float32; the job gets as many bits as it wants, its usage and its times."""
    feed = FakeFeed(vector_of)
    fakes = serving(Served(info=info("embed"), engine=FakeEmbedder(), feed=feed))
    request = EmbedRequest(model="fake", texts=["a b", "abcd"], precision="float16")

    result = tasks.embed(delivery(tenant="acme"), request, fakes)

    assert result.vectors.dtype == np.float16
    assert result.vectors.tolist() == [[3] * DIM, [4] * DIM]
    assert result.usage.prompt_tokens == 3
    assert (result.timings.batched_s, result.timings.computed_s) == (0.25, 0.5)
    assert [job.tenant for job in feed.jobs] == ["acme"]


def test_no_texts_are_no_vectors_of_the_right_width() -> None:
    """An empty job has an array too."""
    fakes = serving(Served(info=info("embed"), engine=FakeEmbedder(), feed=FakeFeed(vector_of)))

    result = tasks.embed(delivery(), EmbedRequest(model="fake", texts=[]), fakes)

    assert result.vectors.shape == (0, DIM)


@pytest.mark.parametrize("stream", [False, True])
def test_pieces_of_text_and_thought_go_where_they_belong(stream: bool) -> None:
    """Only a job that asks is streamed; readers are told what is reasoning."""
    feed = FakeFeed(upper, pieces=(Thought("hm"), "HI"))
    fakes = serving(Served(info=info("generate"), engine=FakeGenerator(), feed=feed))
    job = delivery()

    result = tasks.generate(job, GenerateRequest(model="fake", prompt="hi you", stream=stream), fakes)

    assert (result.text, result.usage.prompt_tokens, result.usage.completion_tokens) == ("HI YOU", 2, 2)
    assert isinstance(job.streams, HeardStreams)
    assert job.streams.heard == ([("reasoning", "hm"), ("text", "HI")] if stream else [])


def test_other_answers_keep_their_places() -> None:
    """The first answer is the result's own; the others follow, numbered."""
    numbers = itertools.count()
    feed = FakeFeed(lambda _: Answer(text=f"{next(numbers)}", finish_reason="stop", n_tokens=1))
    fakes = serving(Served(info=info("generate"), engine=FakeGenerator(), feed=feed))

    result = tasks.generate(delivery(), GenerateRequest(model="fake", prompt="hi", n=3), fakes)

    assert result.text == "0"
    assert [(one.index, one.text) for one in result.others or ()] == [(1, "1"), (2, "2")]
    assert result.usage.completion_tokens == 3


def test_documents_are_ordered_by_score() -> None:
    """The best first, equal ones as they came."""
    fakes = serving(
        Served(info=info("rerank"), engine=FakeReranker(), feed=FakeFeed(lambda item: float(item.n_tokens)))
    )
    request = RerankRequest(model="fake", query="q", documents=["a", "b b", "c c"])

    result = tasks.rerank(delivery(), request, fakes)

    assert result.order == [1, 2, 0]
    assert result.scores.tolist() == [1, 2, 2]


def test_errors_of_the_feed_are_the_job_s() -> None:
    """What an engine raises reaches the task as it is."""
    feed = FakeFeed(vector_of, error=EngineError("fake", "broken"))
    fakes = serving(Served(info=info("embed"), engine=FakeEmbedder(), feed=feed))

    with pytest.raises(EngineError, match="broken"):
        tasks.embed(delivery(), EmbedRequest(model="fake", texts=["a"]), fakes)


def test_what_no_result_could_hold_is_refused_before_it_is_computed() -> None:
    """Too many texts, or log-probabilities of too many tokens, reach no engine."""
    feed = FakeFeed(vector_of)
    fakes = serving(Served(info=info("embed"), engine=FakeEmbedder(), feed=feed))
    with pytest.raises(TooManyTextsError):
        tasks.embed(delivery(), EmbedRequest(model="fake", texts=["a"] * (MAX_TEXTS + 1)), fakes)

    fakes = serving(Served(info=info("generate"), engine=FakeGenerator(1 << 40), feed=FakeFeed(upper)))
    with pytest.raises(ResultTooLargeError):
        tasks.generate(delivery(), GenerateRequest(model="fake", prompt="a", logprobs=True), fakes)

    assert feed.jobs == []


def test_a_model_is_found_for_its_own_task_alone() -> None:
    """Another task, or a model that is elsewhere, is named in the error."""
    fakes = serving(Served(info=info("embed"), engine=FakeEmbedder(), feed=FakeFeed(vector_of)))

    with pytest.raises(WrongTaskError):
        fakes.generator("fake")
    with pytest.raises(UnknownModelError):
        fakes.embedder("elsewhere")


def test_a_job_that_comes_too_late_says_how_late() -> None:
    """It is refused before its model is asked."""
    with pytest.raises(DeadlineExceededError):
        delivery(deadline=1.0).check_wanted()

    delivery(deadline=None).check_wanted()


def test_a_process_tells_what_its_feeds_tell() -> None:
    """Speed, budget, trouble and life are asked of the feeds; what has a cache may be held in any number."""
    feed = FakeFeed(vector_of, tokens_per_s=123.44, has_room=12.3, says="on hold")
    fakes = serving(Served(info=info("embed"), engine=FakeEmbedder(), feed=feed))

    assert (fakes.speeds(), fakes.token_budget("fake"), fakes.token_budget("other")) == (
        {"fake": 123.4},
        12.3,
        None,
    )
    assert fakes.troubles() == {"fake": "on hold"}
    assert not fakes.is_stalled(1)
    feed.stalled = True
    assert fakes.is_stalled(1)
    feed.stalled = False
    assert fakes.is_stalled(1), "a process that hung once ends"
