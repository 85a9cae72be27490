"""The two Celery tasks: message to request, request to result."""

import time
from collections.abc import Callable, Container, Sequence
from typing import Any, Final

from celery import Celery
from celery.exceptions import Ignore

from penstock.codec import MAX_RESULT_BYTES, TASK_NAMES, decode_request
from penstock.errors import DeadlineExceededError, PenstockError, ResultTooLargeError
from penstock.request import EmbedRequest, GenerateRequest, Request
from penstock.result import EmbedResult, GenerateResult, Result, Timings, Usage
from penstock_workers.batching import HasTokens, Work
from penstock_workers.serving import ServedEmbedder, ServedGenerator, Serving

HEADER_BYTES: Final = 1 << 16  # room for all of a result that is not its array


def register_tasks(app: Celery, serving: Serving, cancelled: Container[str]) -> None:
    """Give the app its tasks; they find their models in `serving`, and pass by jobs that were cancelled."""

    def add(kind: type[Request], answer: Callable[[str, Any, Serving], Result]) -> None:
        @app.task(  # type: ignore[untyped-decorator]  # Celery has no types
            name=TASK_NAMES[kind],
            bind=True,
            shared=False,  # else Celery adds it to every other app of the process
            typing=False,
            throws=(PenstockError,),
            Request="penstock_workers.consumer:Request",
        )
        def task(self: Any, *args: object, **kwargs: object) -> Result:
            # Celery acknowledges it, and stores nothing.
            if self.request.id in cancelled or _is_answered(self):
                raise Ignore
            request = decode_request(self.name, args, kwargs)
            late_s = time.time() - request.deadline if request.deadline else 0.0
            if late_s > 0:
                raise DeadlineExceededError(self.request.id, late_s)
            return answer(self.request.id, request, serving)

    add(EmbedRequest, embed)
    add(GenerateRequest, generate)


def _is_answered(task: Any) -> bool:
    """Whether an earlier delivery has ended the job; a first one asks nobody."""
    is_redelivered = (task.request.delivery_info or {}).get("redelivered")
    return bool(is_redelivered) and task.backend.is_ended(task.request.id)


def embed(job_id: str, request: EmbedRequest, serving: Serving) -> EmbedResult:
    """Embed a request's texts, in batches with those of other jobs."""
    arrived, clock = time.time(), time.perf_counter()
    served = serving.find(request.model, ServedEmbedder)
    n_bytes = len(request.texts) * (request.truncate_dim or served.engine.dim) * 4
    if n_bytes > MAX_RESULT_BYTES - HEADER_BYTES:
        raise ResultTooLargeError(n_bytes, MAX_RESULT_BYTES - HEADER_BYTES)
    texts = served.engine.prepare(request)
    prepared_s = time.perf_counter() - clock
    work = served.batcher.submit(job_id, texts, request.deadline)
    vectors = served.engine.finish(request, work.wait())
    return EmbedResult(
        model=request.model,
        vectors=vectors,
        usage=Usage(prompt_tokens=_count(texts)),
        timings=_timings(request, arrived, prepared_s, work),
    )


def generate(job_id: str, request: GenerateRequest, serving: Serving) -> GenerateResult:
    """Answer a request, in a batch with those of other jobs."""
    arrived, clock = time.time(), time.perf_counter()
    served = serving.find(request.model, ServedGenerator)
    prompt = served.engine.prepare(request)
    prepared_s = time.perf_counter() - clock
    work = served.batcher.submit(job_id, [prompt], request.deadline)
    (answer,) = work.wait()
    return GenerateResult(
        model=request.model,
        text=answer.text,
        finish_reason=answer.finish_reason,
        usage=Usage(prompt_tokens=prompt.n_tokens, completion_tokens=answer.n_tokens),
        timings=_timings(request, arrived, prepared_s, work),
    )


def _count(items: Sequence[HasTokens]) -> int:
    return sum(item.n_tokens for item in items)


def _timings(request: Request, arrived: float, prepared_s: float, work: Work[Any, Any]) -> Timings:
    return Timings(
        queued_s=max(0.0, arrived - request.sent_at) if request.sent_at else 0.0,
        prepared_s=prepared_s,
        batched_s=work.batched_s,
        computed_s=work.computed_s,
    )
