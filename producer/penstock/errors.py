"""Every error a caller can meet.

```
PenstockError
├── ConfigError                  a setting, a file or a `PENSTOCK_*` variable
├── ClientUseError               the client was closed, or belongs to another event loop
├── RequestError                 the caller's fault, never retried
│   ├── UnknownModelError
│   ├── WrongTaskError
│   ├── InvalidOptionError
│   ├── InvalidFormatError
│   ├── InvalidTextError
│   ├── TooManyTextsError
│   ├── RequestTooLargeError
│   ├── InputTooLongError
│   └── InvalidMessageError
├── WorkerError                  ours, retried when `retryable`
│   ├── ModelLoadError
│   ├── OutOfMemoryError
│   ├── EngineError
│   ├── UpstreamError            the server of a remote model
│   │   ├── UpstreamUnavailableError
│   │   ├── UpstreamRefusedError
│   │   └── UpstreamAnswerError
│   ├── ResultTooLargeError
│   └── WorkerLostError
├── TransportError               Redis out of reach, or too slow
│   ├── BrokerUnavailableError
│   ├── BrokerRefusedError
│   └── ResultTimeoutError
├── QueueDelayError              too much waits; nothing was sent
├── RateLimitError               a tenant sends more than it may; nothing was sent
├── IncompleteOutputError
├── StreamRestartedError
├── JobCancelledError
├── DeadlineExceededError
├── ResultExpiredError
├── UnknownJobError
└── ResultDecodeError
```

Every field is a positional argument and every argument is plain JSON: the result store keeps
`cls.__name__` and `args`, and the error is built again from them on the caller's side.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar


class PenstockError(Exception):
    """Whatever Penstock raises."""

    retryable: ClassVar[bool] = False


class ConfigError(PenstockError):
    """The configuration cannot be used; all that is wrong with it, one line each."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__(list(problems))
        self.problems = tuple(problems)

    def __str__(self) -> str:
        return "\n".join(self.problems)


class ClientUseError(PenstockError):
    """The client, or a job of it, cannot be used here: it was closed, or belongs to another event loop."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem

    def __str__(self) -> str:
        return f"the client cannot be used here: {self.problem}"


class RequestError(PenstockError):
    """The request cannot be served as it is; sending it again changes nothing."""


class UnknownModelError(RequestError):
    """No worker ever announced a model of that name.

    A client says which Redis it asked, and where else stacks of its user run if no model at all is known.
    """

    def __init__(self, model: str, known: Sequence[str] = (), where: str = "", elsewhere: str = "") -> None:
        told = [where, elsewhere] if where or elsewhere else []  # earlier versions take two arguments
        super().__init__(model, list(known), *told)
        self.model, self.known, self.where, self.elsewhere = model, tuple(known), where, elsewhere

    def __str__(self) -> str:
        known = ", ".join(self.known) or "none: no worker has announced a model yet"
        where = f"at {self.where}" if self.where else "here"
        elsewhere = f"; a stack of this user runs elsewhere: {self.elsewhere}" if self.elsewhere else ""
        return f"model {self.model!r} is not served {where}; known models: {known}{elsewhere}"


class WrongTaskError(RequestError):
    """The model does something else than what was asked."""

    def __init__(self, model: str, task: str, wanted: str) -> None:
        super().__init__(model, task, wanted)
        self.model, self.task, self.wanted = model, task, wanted

    def __str__(self) -> str:
        return f"model {self.model!r} serves {self.task!r}, the request asks for {self.wanted!r}"


class InvalidOptionError(RequestError):
    """An option is unknown, of the wrong type, or out of its range."""

    def __init__(self, option: str, value: str, allowed: str) -> None:
        super().__init__(option, value, allowed)
        self.option, self.value, self.allowed = option, value, allowed

    def __str__(self) -> str:
        return f"{self.option} is {self.value}; {self.allowed}"

    def __repr__(self) -> str:
        # Celery logs it and sends it to Flower: no word of what the caller wrote.
        is_quoted = str(self.value).startswith(("'", '"'))
        option = "..." if str(self.allowed).startswith("there is no option") else self.option
        return f"InvalidOptionError({option!r}, {'...' if is_quoted else self.value!r}, {self.allowed!r})"


class InvalidFormatError(RequestError):
    """No answer can follow the response format, the worker cannot read it, or it is too complex."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem

    def __str__(self) -> str:
        return f"response_format cannot be followed: {self.problem}"

    def __repr__(self) -> str:
        # As IncompleteOutputError: the problem may quote the schema, or the pattern.
        return f"InvalidFormatError({len(self.problem)} characters)"


class InvalidTextError(RequestError):
    """A text is not a string, or not one that UTF-8 can carry."""

    def __init__(self, index: int, problem: str) -> None:
        super().__init__(index, problem)
        self.index, self.problem = index, problem

    def __str__(self) -> str:
        return f"text {self.index} {self.problem}"


class TooManyTextsError(RequestError):
    """One job holds more texts than the model's limit."""

    def __init__(self, n_texts: int, limit: int) -> None:
        super().__init__(n_texts, limit)
        self.n_texts, self.limit = n_texts, limit

    def __str__(self) -> str:
        return f"{self.n_texts} texts in one job, the limit is {self.limit}; embed_many takes any number"


class RequestTooLargeError(RequestError):
    """A text or a whole request has more bytes than may go through the queue."""

    def __init__(self, what: str, n_bytes: int, limit: int) -> None:
        super().__init__(what, n_bytes, limit)
        self.what, self.n_bytes, self.limit = what, n_bytes, limit

    def __str__(self) -> str:
        return f"{self.what} has {self.n_bytes} bytes, the limit is {self.limit}"


class InputTooLongError(RequestError):
    """A prompt leaves no room for the answer in the model's context window."""

    def __init__(self, model: str, n_tokens: int, limit: int) -> None:
        super().__init__(model, n_tokens, limit)
        self.model, self.n_tokens, self.limit = model, n_tokens, limit

    def __str__(self) -> str:
        return f"{self.model} accepts {self.limit} prompt tokens here, the prompt has {self.n_tokens}"


class InvalidMessageError(RequestError):
    """A message on the queue does not follow docs/reference/messages.md."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem

    def __str__(self) -> str:
        return f"message refused: {self.problem}"


class WorkerError(PenstockError):
    """The worker could not do what it should; the request was fine."""

    retryable = True


class ModelLoadError(WorkerError):
    """A model cannot be loaded; the worker that needs it does not start."""

    retryable = False

    def __init__(self, model: str, reason: str) -> None:
        super().__init__(model, reason)
        self.model, self.reason = model, reason

    def __str__(self) -> str:
        return f"model {self.model!r} cannot be loaded: {self.reason}"


class OutOfMemoryError(WorkerError):
    """This one item does not fit into the device's memory, even alone."""

    retryable = False

    def __init__(self, model: str, n_tokens: int) -> None:
        super().__init__(model, n_tokens)
        self.model, self.n_tokens = model, n_tokens

    def __str__(self) -> str:
        return f"{self.model} ran out of memory on one item of {self.n_tokens} tokens"


class EngineError(WorkerError):
    """The model failed, or gave something that must not leave the worker."""

    def __init__(self, model: str, problem: str) -> None:
        super().__init__(model, problem)
        self.model, self.problem = model, problem

    def __str__(self) -> str:
        return f"{self.model} failed: {self.problem}"


class UpstreamError(WorkerError):
    """The server of a remote model did not do what it should."""


class UpstreamUnavailableError(UpstreamError):
    """It is away, overloaded or out of allowance, for longer than the job can wait.

    `retry_after_s` is when it is worth another try, in seconds from then; 0 where nobody knows.
    """

    def __init__(self, model: str, upstream: str, problem: str, retry_after_s: float = 0.0) -> None:
        super().__init__(model, upstream, problem, retry_after_s)
        self.model, self.upstream, self.problem = model, upstream, problem
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        when = f"; try again in {self.retry_after_s:.3g} s" if self.retry_after_s else ""
        return f"{self.model} at {self.upstream} is not available: {self.problem}{when}"


class UpstreamRefusedError(UpstreamError):
    """It refuses the request: token, credits, rights, model or input; asking again changes nothing."""

    retryable = False

    def __init__(self, model: str, upstream: str, status: int, problem: str) -> None:
        super().__init__(model, upstream, status, problem)
        self.model, self.upstream, self.status, self.problem = model, upstream, status, problem

    def __str__(self) -> str:
        return f"{self.model} at {self.upstream} refused with {self.status}: {self.problem}"


class UpstreamAnswerError(UpstreamError):
    """Its answer cannot be used: cut off, of another shape, or not finite."""

    def __init__(self, model: str, upstream: str, problem: str) -> None:
        super().__init__(model, upstream, problem)
        self.model, self.upstream, self.problem = model, upstream, problem

    def __str__(self) -> str:
        return f"{self.model} at {self.upstream} gave no usable answer: {self.problem}"


class ResultTooLargeError(WorkerError):
    """The result has more bytes than the result store takes."""

    retryable = False

    def __init__(self, n_bytes: int, limit: int) -> None:
        super().__init__(n_bytes, limit)
        self.n_bytes, self.limit = n_bytes, limit

    def __str__(self) -> str:
        return f"the result has {self.n_bytes} bytes, the limit is {self.limit}; send fewer texts"


class WorkerLostError(WorkerError):
    """The workers that took this job died or gave it up, as often as is allowed."""

    def __init__(self, job_id: str, n_deliveries: int) -> None:
        super().__init__(job_id, n_deliveries)
        self.job_id, self.n_deliveries = job_id, n_deliveries

    def __str__(self) -> str:
        return f"job {self.job_id} was delivered {self.n_deliveries} times and no worker finished it"


class TransportError(PenstockError):
    """Redis is out of reach, refuses, or is too slow."""

    retryable = True


class BrokerUnavailableError(TransportError):
    """Redis did not answer within the connect limit."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(url, reason)
        self.url, self.reason = url, reason

    def __str__(self) -> str:
        return f"Redis at {self.url} is out of reach: {self.reason}"


class BrokerRefusedError(TransportError):
    """Redis answered and refused: password, user, rights, or memory."""

    retryable = False

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(url, reason)
        self.url, self.reason = url, reason

    def __str__(self) -> str:
        return f"Redis at {self.url} refused: {self.reason}"


class ResultTimeoutError(TransportError):
    """The result did not come in time.

    A call that waits by itself, such as `generate`, has taken its job back. A job that was submitted goes on,
    and can be asked again.
    """

    def __init__(self, job_id: str, timeout_s: float) -> None:
        super().__init__(job_id, timeout_s)
        self.job_id, self.timeout_s = job_id, timeout_s

    def __str__(self) -> str:
        if not self.job_id:
            return f"no answer after {self.timeout_s:g} s; what was sent is taken back"
        return f"job {self.job_id} has no result after {self.timeout_s:g} s"


class QueueDelayError(PenstockError):
    """The queue is full, or the job would wait until after its deadline; nothing was enqueued.

    `exceeded` is `jobs`, `tokens`, `bytes` or `deadline`; the predicted wait is None if no worker has told
    its speed.
    """

    retryable = True

    def __init__(
        self, queue: str, exceeded: str, retry_after_s: float, predicted_wait_s: float | None = None
    ) -> None:
        super().__init__(queue, exceeded, retry_after_s, predicted_wait_s)
        self.queue, self.exceeded = queue, exceeded
        self.retry_after_s, self.predicted_wait_s = retry_after_s, predicted_wait_s

    def __str__(self) -> str:
        wait = "" if self.predicted_wait_s is None else f", a job would wait {self.predicted_wait_s:.1f} s"
        why = "takes longer than the deadline" if self.exceeded == "deadline" else f"is full: {self.exceeded}"
        return f"queue {self.queue} {why}{wait}; try again in {self.retry_after_s:.1f} s"


class RateLimitError(PenstockError):
    """A tenant sends more tokens than its settings allow; nothing was enqueued."""

    retryable = True

    def __init__(self, tenant: str, retry_after_s: float) -> None:
        super().__init__(tenant, retry_after_s)
        self.tenant, self.retry_after_s = tenant, retry_after_s

    def __str__(self) -> str:
        return f"tenant {self.tenant!r} sends too many tokens; try again in {self.retry_after_s:.1f} s"


class IncompleteOutputError(PenstockError):
    """An answer ended before its response format did, at its limit or in thought; `text` is what there is."""

    def __init__(self, n_tokens: int, text: str) -> None:
        super().__init__(n_tokens, text)
        self.n_tokens, self.text = n_tokens, text

    def __str__(self) -> str:
        return f"the answer is incomplete: {self.n_tokens} tokens do not yet follow response_format"

    def __repr__(self) -> str:
        # Celery logs it and sends it to Flower: no word of the answer.
        return f"IncompleteOutputError({self.n_tokens}, {len(self.text)} characters)"


class StreamRestartedError(PenstockError):
    """A worker was lost while it streamed, and the one that took over says something else."""

    def __init__(self, job_id: str) -> None:
        super().__init__(job_id)
        self.job_id = job_id

    def __str__(self) -> str:
        return f"job {self.job_id} began again with another text; on_restart='show' follows it"


class JobCancelledError(PenstockError):
    """The job was cancelled before its result was stored.

    `timings` say where its time went as far as a worker knows: see `DeadlineExceededError`.
    """

    def __init__(self, job_id: str, timings: Mapping[str, float] | None = None) -> None:
        super().__init__(job_id, timings)
        self.job_id, self.timings = job_id, timings or {}

    def __str__(self) -> str:
        return f"job {self.job_id} was cancelled{_tell(self.timings)}"


class DeadlineExceededError(PenstockError):
    """The job's answer comes after its deadline, or would have: what cannot be in time is not computed.

    `timings` say where its time went, seconds: `queued_s`, `prepared_s`, `batched_s` and `computed_s` of
    `penstock.result.Timings`, as far as it came.
    """

    def __init__(self, job_id: str, late_s: float, timings: Mapping[str, float] | None = None) -> None:
        super().__init__(job_id, late_s, timings)
        self.job_id, self.late_s, self.timings = job_id, late_s, timings or {}

    def __str__(self) -> str:
        spent = _tell(self.timings)
        return f"job {self.job_id} is late for its deadline by {self.late_s:.3f} s{spent}"


class ResultExpiredError(PenstockError):
    """The job ended, and its result is no longer stored."""

    def __init__(self, job_id: str) -> None:
        super().__init__(job_id)
        self.job_id = job_id

    def __str__(self) -> str:
        return f"job {self.job_id} ended and its result has expired or was forgotten"


class UnknownJobError(PenstockError):
    """No job of that id was sent, or all that was known of it has expired."""

    def __init__(self, job_id: str) -> None:
        super().__init__(job_id)
        self.job_id = job_id

    def __str__(self) -> str:
        return f"no job has the id {self.job_id!r}"


class ResultDecodeError(PenstockError):
    """The stored bytes are not a result of a version that is known here."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem

    def __str__(self) -> str:
        return f"stored result cannot be read: {self.problem}"


def _tell(timings: Mapping[str, float]) -> str:
    spent = ", ".join(f"{name.removesuffix('_s')} {seconds:.3f} s" for name, seconds in timings.items())
    return f" ({spent})" if spent else ""


def error_classes(root: type[PenstockError] = PenstockError) -> Iterator[type[PenstockError]]:
    """Yield `root` and all classes below it."""
    yield root
    for child in root.__subclasses__():
        yield from error_classes(child)


def rebuild_error(name: str, args: Sequence[object]) -> PenstockError:
    """Build an error from its class name and arguments; an unknown one becomes a `WorkerError`.

    Arguments are another version's, or whatever a broken store holds: one that cannot be told is none.
    """
    found = {cls.__name__: cls for cls in error_classes()}.get(name)
    try:
        if found is not None:
            error = found(*args)
            str(error), repr(error)
            return error
    except Exception:  # noqa: BLE001, S110  any argument may be of any type
        pass
    try:
        return WorkerError(f"{name}: {', '.join(map(str, args))}")
    except Exception:  # noqa: BLE001  numbers of a thousand digits, lists in lists
        return WorkerError(f"{name}, with arguments that cannot be told")
