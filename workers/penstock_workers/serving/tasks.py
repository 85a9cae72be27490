"""The Celery tasks: message to request, request to result."""

import time
from collections.abc import Callable, Container, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final, TypeVar

import numpy as np
from celery import Celery
from celery.exceptions import Ignore, Reject, Retry

from penstock.codec import MAX_RESULT_BYTES
from penstock.errors import (
    DeadlineExceededError,
    JobCancelledError,
    PenstockError,
    ResultTooLargeError,
    TooManyTextsError,
)
from penstock.messages import TASK_NAMES, decode_request
from penstock.request import EmbedRequest, GenerateRequest, Priority, Request, RerankRequest
from penstock.result import Choice, EmbedResult, GenerateResult, RerankResult, Result, Timings, Usage
from penstock.retry import WaitPolicy
from penstock.stream import Part
from penstock_workers.batching.feed import A, Feed, I, Job, Pending, RequeueError, Thought, TryLaterError
from penstock_workers.batching.work import PATIENCE_S
from penstock_workers.clock import BROKER_CLOCK
from penstock_workers.delivery.consumer import Request as JobRequest
from penstock_workers.serving.formats import form, row_bytes
from penstock_workers.serving.models import Serving, Vector
from penstock_workers.serving.streams import Streams
from penstock_workers.serving.vector_cache import Embedded

MAX_RETRIES: Final = 10  # of a job that its worker delays; a deadline may end them before
HEADER_BYTES: Final = 1 << 16  # for all of a result but its array
LOGPROB_BYTES: Final = 8  # a token's id and log-probability; its text is there once

R = TypeVar("R", bound=Request)


@dataclass(slots=True, kw_only=True)  # made for each job, and three times as fast as a frozen one
class Delivery:
    """A job as its message came.

    Attributes:
        job: The job, as engines know it.
        sent_at: Moment it was sent, Unix seconds, on the broker's clock; None if its sender does not say.
        reply_to: Channel of its sender, which hears of its text while it is generated.
        streams: Takes that text.
        pending: Answers that its model was asked for.
        arrived: Moment it arrived, Unix seconds, on the broker's clock.
        clock: The same moment, monotonic seconds.
    """

    job: Job
    sent_at: float | None
    reply_to: str | None
    streams: Streams
    pending: list[Pending[object]] = field(default_factory=list)
    arrived: float = field(default_factory=BROKER_CLOCK.now)
    clock: float = field(default_factory=time.perf_counter)

    def check_wanted(self) -> None:
        """Raise if nobody waits for the job any more."""
        if error := self.job.why_unwanted():
            raise error

    def timings(self) -> Timings:
        """Return where the time of the job went until now."""
        batched_s = sum(pending.batched_s for pending in self.pending)
        computed_s = sum(pending.computed_s for pending in self.pending)
        return Timings(
            queued_s=max(0.0, self.arrived - self.sent_at) if self.sent_at else 0.0,
            prepared_s=max(0.0, time.perf_counter() - self.clock - batched_s - computed_s),
            batched_s=batched_s,
            computed_s=computed_s,
        )


def register_tasks(app: Celery, serving: Serving, cancelled: Container[str], streams: Streams) -> None:
    """Give the app its tasks; they find their models in `serving`, and pass by jobs that were cancelled."""

    def add(kind: type[R], answer: Callable[[Delivery, R, Serving], Result]) -> None:
        @app.task(  # type: ignore[untyped-decorator]  # Celery has no types
            name=TASK_NAMES[kind],
            bind=True,
            shared=False,  # else Celery adds it to every other app of the process
            typing=False,
            throws=(PenstockError,),
            Request=f"{JobRequest.__module__}:{JobRequest.__name__}",
        )
        def task(self: Any, *args: object, **kwargs: object) -> Result:
            job_id = self.request.id
            # Celery acknowledges it, and stores nothing.
            if job_id in cancelled or _is_answered(self):
                if kind is GenerateRequest and job_id in cancelled:
                    streams.discard(job_id)  # a worker that was lost may have begun it
                raise Ignore
            request = decode_request(self.name, args, kwargs)
            assert isinstance(request, kind)
            job = Job(
                id=job_id,
                deadline=request.deadline,
                priority=_priority(self),
                tenant=str(self.request.get("tenant") or ""),
                is_unwanted=lambda: job_id in cancelled,
            )
            delivery = Delivery(
                job=job, sent_at=request.sent_at, reply_to=self.request.reply_to, streams=streams
            )
            try:
                delivery.check_wanted()
                result = answer(delivery, request, serving)
            except (DeadlineExceededError, JobCancelledError) as error:
                error.args = (*error.args[:-1], _rounded(delivery.timings()))  # what is stored
                raise
            except RequeueError as error:
                raise Reject(str(error), requeue=True) from None
            except TryLaterError as later:
                if self.request.retries >= MAX_RETRIES:
                    raise later.error from None
                pause_s = WaitPolicy().pause_s(self.request.retries + 1, later.error)
                raise Retry(exc=later.error, when=pause_s) from None
            serving.count(request, result.usage)
            return result

    add(EmbedRequest, embed)
    add(GenerateRequest, generate)
    add(RerankRequest, rerank)


def _is_answered(task: Any) -> bool:
    """Whether an earlier delivery has ended the job; a first one asks nobody."""
    is_redelivered = (task.request.delivery_info or {}).get("redelivered")
    return bool(is_redelivered) and task.backend.is_ended(task.request.id)


def _priority(task: Any) -> Priority:
    number = (task.request.delivery_info or {}).get("priority")
    return next((known for known in Priority if known == number), Priority.DEFAULT)


def embed(delivery: Delivery, request: EmbedRequest, serving: Serving) -> EmbedResult:
    """Embed a request's texts, in batches with those of other jobs.

    Raises:
        RequeueError: the model will not answer any more.
    """
    served = serving.embedder(request.model)
    _check_number(len(request.texts), served.info.max_texts)
    _check_size(len(request.texts) * row_bytes(served.engine.dim, request))

    def compute(texts: list[str]) -> list[Embedded]:
        items = served.engine.prepare(request.model_copy(update={"texts": texts}))
        vectors = _wait_for(delivery, served.feed, items)
        return [
            Embedded(vector=vector, n_tokens=item.n_tokens)
            for vector, item in zip(vectors, items, strict=True)
        ]

    if served.cache is None:
        answers = compute(request.texts)
    else:
        answers = served.cache.embed(
            request.texts,
            served.engine.check(request),
            compute,
            patience_s=PATIENCE_S[delivery.job.priority],
            check=delivery.check_wanted,
        )
    timings = delivery.timings()
    return EmbedResult(
        model=request.model,
        vectors=form(_rows(answers, served.engine.dim), request, served.engine.int8_ranges),
        usage=Usage(prompt_tokens=sum(answer.n_tokens for answer in answers)),
        timings=timings,
    )


def generate(delivery: Delivery, request: GenerateRequest, serving: Serving) -> GenerateResult:
    """Answer a request, in a batch with those of other jobs.

    Raises:
        RequeueError: the model will not answer any more.
    """
    served = serving.generator(request.model)
    prompt = served.engine.prepare(request)
    if prompt.n_top_logprobs is not None:
        _check_size(prompt.n_choices * prompt.max_new_tokens * (1 + prompt.n_top_logprobs) * LOGPROB_BYTES)
    job = delivery.job
    with delivery.streams.open(job.id, delivery.reply_to, job.is_unwanted) as stream:
        pending = served.feed.submit(
            replace(job, is_unwanted=lambda: job.is_unwanted() or stream.is_unread()),
            prompt.choices(),
            (lambda _, piece: stream.write(piece, _part(piece))) if request.stream else None,
        )
        delivery.pending.append(pending)
        answers = prompt.answers(pending.wait())
    first, *others = (
        Choice(
            index=index,
            text=answer.text,
            finish_reason=answer.finish_reason,
            reasoning=answer.reasoning,
            tool_calls=answer.tool_calls,
            logprobs=answer.logprobs,
        )
        for index, answer in enumerate(answers)
    )
    return GenerateResult(
        model=request.model,
        text=first.text,
        finish_reason=first.finish_reason,
        reasoning=first.reasoning,
        tool_calls=first.tool_calls,
        logprobs=first.logprobs,
        others=tuple(others) or None,
        usage=Usage(
            prompt_tokens=prompt.n_tokens,
            completion_tokens=sum(answer.n_tokens for answer in answers),
            cut_tokens=prompt.cut_tokens,
        ),
        timings=delivery.timings(),
    )


def rerank(delivery: Delivery, request: RerankRequest, serving: Serving) -> RerankResult:
    """Score a request's documents, in batches with those of other jobs.

    Raises:
        RequeueError: the model will not answer any more.
    """
    served = serving.reranker(request.model)
    _check_number(len(request.documents), served.info.max_texts)
    pairs = served.engine.prepare(request)
    scores = np.array(_wait_for(delivery, served.feed, pairs), dtype=np.float32)
    best = np.argsort(-scores, kind="stable")[: request.top_n]  # equal ones in the order of the request
    return RerankResult(
        model=request.model,
        scores=scores,
        order=best.tolist(),
        usage=Usage(prompt_tokens=sum(pair.n_tokens for pair in pairs)),
        timings=delivery.timings(),
    )


def _wait_for(delivery: Delivery, feed: Feed[I, A], items: Sequence[I]) -> Sequence[A]:
    """Return the model's answers to the items of a job that is answered as a whole."""
    pending = feed.submit(delivery.job, items)
    delivery.pending.append(pending)
    return pending.wait()


def _rows(answers: Sequence[Embedded], dim: int) -> Vector:
    """Return vectors as they were computed; float32, shape (n_texts, dim)."""
    if not answers:
        return np.zeros((0, dim), dtype=np.float32)
    return np.stack([answer.vector for answer in answers])


def _part(piece: str) -> Part:
    return "reasoning" if isinstance(piece, Thought) else "text"


def _check_number(n_texts: int, limit: int) -> None:
    """Refuse more texts than a job may hold; our clients do so before they send."""
    if n_texts > limit:
        raise TooManyTextsError(n_texts, limit)


def _check_size(n_bytes: int) -> None:
    """Refuse what no result could hold, before it is computed."""
    if n_bytes > MAX_RESULT_BYTES - HEADER_BYTES:
        raise ResultTooLargeError(n_bytes, MAX_RESULT_BYTES - HEADER_BYTES)


def _rounded(timings: Timings) -> dict[str, float]:
    return {name: round(seconds, 6) for name, seconds in asdict(timings).items()}
