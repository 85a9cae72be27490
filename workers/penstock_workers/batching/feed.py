"""What a feed is: it takes the items of jobs, has batches of them computed, and answers the jobs.

What makes items of requests has its protocols in `serving.models`. Fakes of both are in `tests/fakes.py`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from penstock.conversation import ToolCall
from penstock.errors import DeadlineExceededError, JobCancelledError, PenstockError
from penstock.request import Priority
from penstock.result import FinishReason, Logprobs
from penstock_workers.clock import BROKER_CLOCK


class HasTokens(Protocol):
    """An item of a batch."""

    @property
    def n_tokens(self) -> int:
        """Number of its tokens, without padding."""


I = TypeVar("I", bound=HasTokens)  # noqa: E741  an item, as in typing's own examples
A = TypeVar("A")
I_contra = TypeVar("I_contra", bound=HasTokens, contravariant=True)
A_co = TypeVar("A_co", covariant=True)

Run = Callable[[Sequence[I]], Iterator[tuple[int, A | PenstockError] | None]]
"""Compute a batch: yields (index, answer or its error) as each is ready, None as a sign of life."""

Listen = Callable[[int, str], None]
"""Takes the index of an item and the next piece of its text, in any thread; must be quick."""


def never() -> bool:
    """Say no; `Job.is_unwanted` of a job that nobody can cancel."""
    return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A job, as far as an engine needs to know it.

    Attributes:
        id: Id of the job.
        deadline: Unix seconds, on the broker's clock; what is in no batch by then is dropped.
        priority: Priority of the job; with its deadline, age and size it decides which job goes first.
        tenant: Sender of the job; empty if it names none. All waiting jobs of a tenant count for its size.
        is_unwanted: Says that the job was cancelled; called before each batch or step, in any thread.
    """

    id: str
    deadline: float | None = None
    priority: Priority = Priority.DEFAULT
    tenant: str = ""
    is_unwanted: Callable[[], bool] = never

    def why_unwanted(self) -> DeadlineExceededError | JobCancelledError | None:
        """Return why nobody waits for the job any more; None while somebody does."""
        if self.deadline is not None and (late_s := BROKER_CLOCK.now() - self.deadline) > 0:
            return DeadlineExceededError(self.id, late_s)
        return JobCancelledError(self.id) if self.is_unwanted() else None


class RequeueError(Exception):
    """The model thread ended before it saw the job, which has to be requeued."""


class TryLaterError(Exception):
    """The job cannot be answered now; requeue it, so that other jobs use its place.

    Attributes:
        error: Reason, and what callers get if nobody tries again. Its `retry_after_s` says when to try.
    """

    def __init__(self, error: PenstockError) -> None:
        super().__init__(error)
        self.error = error


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Text that a model answered with.

    Attributes:
        text: The new text alone, cut before a stop string, without special tokens.
        finish_reason: `stop` if the model, a stop string or a format ended it, `length` if the limit did.
        n_tokens: Number of new tokens; those of a stop string count, the end-of-sequence token does not.
        reasoning: See `GenerateResult`.
        tool_calls: See `GenerateResult`.
        logprobs: Log-probabilities of the new tokens; None if the request wants none.
    """

    text: str
    finish_reason: FinishReason
    n_tokens: int = 0
    reasoning: str | None = None
    tool_calls: Sequence[ToolCall] | None = None
    logprobs: Logprobs | None = None


class Thought(str):
    """A piece of reasoning, where a piece of text is a plain string."""

    __slots__ = ()


class Pending(Protocol[A_co]):
    """The answers to a job's items, which come together.

    Attributes:
        batched_s: Seconds that its first item waited for a batch; set with the answers or the error.
        computed_s: Seconds from the first batch that held one of its items to the end of the last.
    """

    batched_s: float
    computed_s: float

    def wait(self) -> Sequence[A_co]:
        """Return the answers in the items' order.

        Raises:
            PenstockError: an item has no answer; the first such error.
            RequeueError: they will not come from here.
            TryLaterError: they will not come soon.
        """


class Feed(Protocol[I_contra, A_co]):
    """Answers the items of jobs, in batches that it makes of them.

    See `Batcher`, `Scheduler` and `remote.dispatcher.Dispatcher`.
    """

    def submit(self, job: Job, items: Sequence[I_contra]) -> Pending[A_co]:
        """Queue a job's items; there may be none."""

    @property
    def tokens_per_s(self) -> float | None:
        """Measured speed, recent work weighing most; None before the first."""

    def token_budget(self) -> float | None:
        """Return how many tokens of jobs this process should hold; None if it may hold any number."""

    def trouble(self) -> str:
        """Return a sentence on what keeps it from answering; empty if nothing does."""

    def is_stalled(self, stall_s: float) -> bool:
        """Whether it has ended, or shown no sign of life for this long, seconds."""


class StreamingFeed(Feed[I_contra, A_co], Protocol[I_contra, A_co]):
    """A feed whose answers are text, which can be heard piece by piece."""

    def submit(self, job: Job, items: Sequence[I_contra], listen: Listen | None = None) -> Pending[A_co]:
        """Queue a job's items; `listen` hears their text."""
