"""Fakes of what stands between tasks, batching and engines.

See `penstock_workers.batching.feed` and `penstock_workers.serving.models`. None needs a model, a thread or
Redis. A fake feed answers at once what its function says, and keeps the jobs it was given; a fake engine
makes an item of each text.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np

from penstock.request import EmbedRequest, GenerateRequest, RerankRequest
from penstock_workers.batching.feed import Answer, Job, Listen
from penstock_workers.serving.models import Vector

A = TypeVar("A")

DIM = 4


@dataclass(frozen=True)
class Text:
    """An item; it has a token for each word."""

    text: str

    @property
    def n_tokens(self) -> int:
        """Number of its words."""
        return len(self.text.split())


@dataclass
class FakePending(Generic[A]):
    """Answers that are there, or the error that is there instead."""

    answers: list[A]
    error: BaseException | None = None
    batched_s: float = 0.25
    computed_s: float = 0.5

    def wait(self) -> list[A]:
        """See `Pending.wait`."""
        if self.error is not None:
            raise self.error
        return self.answers


@dataclass
class FakeFeed(Generic[A]):
    """Answers each item with `answer` of it; says `pieces` to whoever listens to the first.

    Attributes:
        jobs: Jobs that were submitted.
    """

    answer: Callable[[Text], A]
    error: BaseException | None = None
    pieces: Sequence[str] = ()
    tokens_per_s: float | None = None
    has_room: float | None = None
    says: str = ""
    stalled: bool = False
    jobs: list[Job] = field(default_factory=list)

    def submit(self, job: Job, items: Sequence[Text], listen: Listen | None = None) -> FakePending[A]:
        """See `StreamingFeed.submit`."""
        self.jobs.append(job)
        for piece in self.pieces if listen else ():
            listen(0, piece)
        return FakePending([self.answer(item) for item in items], self.error)

    def token_budget(self) -> float | None:
        """See `Feed.token_budget`."""
        return self.has_room

    def trouble(self) -> str:
        """See `Feed.trouble`."""
        return self.says

    def is_stalled(self, stall_s: float) -> bool:
        """See `Feed.is_stalled`."""
        del stall_s
        return self.stalled


class FakeEmbedder:
    """Texts to items; see `EmbedEngine`."""

    dim = DIM
    int8_ranges = None

    def check(self, request: EmbedRequest) -> str | None:
        """See `EmbedEngine.check`."""
        return request.prompt

    def prepare(self, request: EmbedRequest) -> list[Text]:
        """See `EmbedEngine.prepare`."""
        return [Text(text) for text in request.texts]


class FakeReranker:
    """Documents to items; see `RerankEngine`."""

    def prepare(self, request: RerankRequest) -> list[Text]:
        """See `RerankEngine.prepare`."""
        return [Text(document) for document in request.documents]


@dataclass(frozen=True)
class FakePrompt:
    """A prompt whose answers are wanted one by one; see `Prompt`."""

    text: Text
    n_choices: int
    n_top_logprobs: int | None = None
    max_new_tokens: int = 8
    cut_tokens: int | None = None

    @property
    def n_tokens(self) -> int:
        """See `Prompt.n_tokens`."""
        return self.text.n_tokens

    def choices(self) -> list[Text]:
        """See `Prompt.choices`."""
        return [self.text] * self.n_choices

    def answers(self, found: Sequence[Answer]) -> Sequence[Answer]:
        """See `Prompt.answers`."""
        return found


@dataclass(frozen=True)
class FakeGenerator:
    """Requests to prompts; see `GenerateEngine`."""

    max_new_tokens: int = 8

    def prepare(self, request: GenerateRequest) -> FakePrompt:
        """See `GenerateEngine.prepare`."""
        n_top_logprobs = (request.top_logprobs or 0) if request.logprobs else None
        return FakePrompt(Text(request.prompt or ""), request.n, n_top_logprobs, self.max_new_tokens)


def vector_of(item: Text) -> Vector:
    """Return the length of a text in each dimension; float32, shape (DIM,)."""
    return np.full(DIM, len(item.text), dtype=np.float32)
