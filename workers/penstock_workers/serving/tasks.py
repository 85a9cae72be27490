"""The Celery tasks: message to request, request to result."""

import time
from collections.abc import Callable, Container, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import numpy as np
from celery import Celery
from celery.exceptions import Ignore, Reject, Retry

from penstock.codec import MAX_RESULT_BYTES, TASK_NAMES, decode_request
from penstock.errors import (
    DeadlineExceededError,
    JobCancelledError,
    PenstockError,
    ResultTooLargeError,
    TooManyTextsError,
)
from penstock.request import EmbedRequest, GenerateRequest, Priority, Request, RerankRequest
from penstock.result import Choice, EmbedResult, GenerateResult, RerankResult, Result, Timings, Usage
from penstock.stream import Part
from penstock.waiting import WaitPolicy
from penstock_workers.batching.batcher import Batcher
from penstock_workers.batching.work import (
    PATIENCE_S,
    HasTokens,
    RequeueError,
    TryLaterError,
    Work,
    why_unwanted,
)
from penstock_workers.clock import BROKER_CLOCK
from penstock_workers.consumer import Request as JobRequest
from penstock_workers.engines.formats import row_bytes
from penstock_workers.generation.thinking import Thought
from penstock_workers.remote.dispatcher import Dispatcher
from penstock_workers.serving.models import ServedEmbedder, ServedGenerator, ServedReranker, Serving
from penstock_workers.serving.streams import Streams
from penstock_workers.serving.vector_cache import Embedded

MAX_RETRIES: Final = 10  # of a job that its worker puts off; a deadline may end them before
HEADER_BYTES: Final = 1 << 16  # room for all of a result that is not its array
LOGPROB_BYTES: Final = 8  # a token's id and log-probability; what it is called is there once


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """A job as its message came.

    Attributes:
        job_id: the job.
        priority: of its message; senders that are not ours may give any, or none.
        tenant: of its message; empty where it names none.
        is_unwanted: says whether nobody waits for its answer any more.
        reply_to: whom to tell of its text while it is generated.
        streams: where that text goes.
        works: what the model was given of it.
        arrived: Unix seconds, on the broker's clock.
        clock: the same moment, monotonic.
    """

    job_id: str
    priority: Priority
    tenant: str
    is_unwanted: Callable[[], bool]
    reply_to: str | None
    streams: Streams
    works: list[Work[Any, Any]] = field(default_factory=list)
    arrived: float = field(default_factory=BROKER_CLOCK.now)
    clock: float = field(default_factory=time.perf_counter)


def register_tasks(app: Celery, serving: Serving, cancelled: Container[str], streams: Streams) -> None:
    """Give the app its tasks; they find their models in `serving`, and pass by jobs that were cancelled."""

    def add(kind: type[Request], answer: Callable[[Delivery, Any, Serving], Result]) -> None:
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
            delivery = Delivery(
                job_id=job_id,
                priority=_priority(self),
                tenant=str(self.request.get("tenant") or ""),
                is_unwanted=lambda: job_id in cancelled,
                reply_to=self.request.reply_to,
                streams=streams,
            )
            try:
                _check_wanted(delivery, request)
                result = answer(delivery, request, serving)
            except (DeadlineExceededError, JobCancelledError) as error:
                error.args = (*error.args[:-1], _rounded(_timings(delivery, request)))  # what is stored
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
    served = serving.find(request.model, ServedEmbedder)
    _check_number(len(request.texts), served.info.max_texts)
    _check_size(len(request.texts) * row_bytes(served.engine.dim, request))

    def compute(texts: list[str]) -> list[Embedded]:
        items: Sequence[HasTokens] = served.engine.prepare(request.model_copy(update={"texts": texts}))
        vectors = _wait_for(delivery, request, served.batcher, items)
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
            patience_s=PATIENCE_S[delivery.priority],
            check=lambda: _check_wanted(delivery, request),
        )
    timings = _timings(delivery, request)
    return EmbedResult(
        model=request.model,
        vectors=served.engine.finish(request, [answer.vector for answer in answers]),
        usage=Usage(prompt_tokens=sum(answer.n_tokens for answer in answers)),
        timings=timings,
    )


def generate(delivery: Delivery, request: GenerateRequest, serving: Serving) -> GenerateResult:
    """Answer a request, in a batch with those of other jobs.

    Raises:
        RequeueError: the model will not answer any more.
    """
    served = serving.find(request.model, ServedGenerator)
    prompt: Any = served.engine.prepare(request)
    if prompt.n_likeliest is not None:
        _check_size(prompt.n_choices * prompt.max_new_tokens * (1 + prompt.n_likeliest) * LOGPROB_BYTES)
    with delivery.streams.open(delivery.job_id, delivery.reply_to, delivery.is_unwanted) as stream:
        work = served.batcher.submit(
            delivery.job_id,
            prompt.choices(),
            request.deadline,
            is_unwanted=lambda: delivery.is_unwanted() or stream.is_unread(),
            listen=(lambda _, piece: stream.write(piece, _part(piece))) if request.stream else None,
        )
        delivery.works.append(work)
        answers = prompt.answers(work.wait())
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
        timings=_timings(delivery, request),
    )


def rerank(delivery: Delivery, request: RerankRequest, serving: Serving) -> RerankResult:
    """Score a request's documents, in batches with those of other jobs.

    Raises:
        RequeueError: the model will not answer any more.
    """
    served = serving.find(request.model, ServedReranker)
    _check_number(len(request.documents), served.info.max_texts)
    pairs = served.engine.prepare(request)
    scores = np.array(_wait_for(delivery, request, served.batcher, pairs), dtype=np.float32)
    best = np.argsort(-scores, kind="stable")[: request.top_n]  # equal ones in the order of the request
    return RerankResult(
        model=request.model,
        scores=scores,
        order=best.tolist(),
        usage=Usage(prompt_tokens=sum(pair.n_tokens for pair in pairs)),
        timings=_timings(delivery, request),
    )


def _wait_for(
    delivery: Delivery,
    request: Request,
    batcher: Batcher[Any, Any] | Dispatcher[Any, Any],
    items: Sequence[Any],
) -> list[Any]:
    """Return the model's answers to the items of a job that is answered as a whole."""
    work = batcher.submit(
        delivery.job_id,
        items,
        request.deadline,
        priority=delivery.priority,
        is_unwanted=delivery.is_unwanted,
        tenant=delivery.tenant,
    )
    delivery.works.append(work)
    return work.wait()


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


def _check_wanted(delivery: Delivery, request: Request) -> None:
    """Raise when nobody waits for a job any more."""
    if error := why_unwanted(delivery.job_id, request.deadline, delivery.is_unwanted):
        raise error


def _timings(delivery: Delivery, request: Request) -> Timings:
    """Return where the time of a job went until now."""
    works = delivery.works
    waited_s = sum(work.batched_s + work.computed_s for work in works)
    return Timings(
        queued_s=max(0.0, delivery.arrived - request.sent_at) if request.sent_at else 0.0,
        prepared_s=max(0.0, time.perf_counter() - delivery.clock - waited_s),
        batched_s=sum(work.batched_s for work in works),
        computed_s=sum(work.computed_s for work in works),
    )


def _rounded(timings: Timings) -> dict[str, float]:
    return {name: round(seconds, 6) for name, seconds in asdict(timings).items()}
