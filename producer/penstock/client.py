"""How services send jobs: `AsyncClient`. `penstock.blocking` has its twin for code that does not await."""

import asyncio
import contextlib
import math
import os
import secrets
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence, Sized
from functools import partial
from types import TracebackType
from typing import Any, Final, NoReturn, Self, TypeVar, Unpack

from tqdm import tqdm

from penstock.broker import Broker
from penstock.calls import CALL_S, CLOSE_S, CLOSING, TAKEN_BACK, Call, Calls
from penstock.clock import ticks
from penstock.coalescer import Coalescer
from penstock.connections import CONNECT_TIMEOUT_S, checked_connect_timeout, connect
from penstock.conversation import Message
from penstock.envelope import is_clean
from penstock.errors import (
    BrokerUnavailableError,
    InvalidOptionError,
    PenstockError,
    QueueDelayError,
    RateLimitError,
    TooManyTextsError,
    TransportError,
    UnknownModelError,
    WrongTaskError,
)
from penstock.inbox import Inbox
from penstock.job import RESULT_TIMEOUT_S, AsyncJob, T
from penstock.keys import queue_key, queue_name
from penstock.many import EmbedMany
from penstock.messages import encode_message
from penstock.options import (
    OF_SENDING,
    EmbedOptions,
    GenerateOptions,
    RerankOptions,
    read_deadline_s,
    read_lane,
)
from penstock.registry import HEARTBEAT_S, ModelInfo, Registry
from penstock.request import (
    EmbedRequest,
    GenerateRequest,
    Lane,
    PriorityName,
    Request,
    RerankRequest,
    Task,
    new_job_id,
)
from penstock.result import GenerateResult, RerankResult, Vectors
from penstock.result_store import ResultStore
from penstock.retry import WaitPolicy, try_again
from penstock.routing import Estimate, Router, count_tokens, predict, queue_limits
from penstock.stacks import tell_elsewhere, with_password
from penstock.stream import OnRestart, Piece
from penstock.urls import checked_url, locate_results, mask_url

DEFAULT_URL: Final = "redis://127.0.0.1:6379/0"
REGISTRY_TTL_S: Final = 5.0

# A forked child keeps what it inherits here.
_INHERITED: Final[list[object]] = []
_LOOK_AGAIN_S: Final = 0.25

R = TypeVar("R", EmbedRequest, GenerateRequest, RerankRequest)
S = TypeVar("S")


class AsyncClient:
    """Sends jobs to Penstock's workers and waits for their results, without blocking the event loop.

    All waiting jobs share one connection. Use it as `async with AsyncClient(url) as client`, within one
    event loop.

    Args:
        url: Redis that holds the queues.
        results_url: Redis that holds the results; None takes what the workers announced.
        connect_timeout_s: after this, seconds, an unreachable Redis is `BrokerUnavailableError`.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        results_url: str | None = None,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
    ) -> None:
        self._url = with_password(checked_url("url", url))
        self._results_url = None if results_url is None else checked_url("results_url", results_url)
        self._connect_timeout_s = checked_connect_timeout(connect_timeout_s)
        self._begin()

    def _begin(self) -> None:
        """Have no connections yet, in whatever loop the first call comes from."""
        self._calls = Calls()
        self._broker = Broker(self._url, connect_timeout_s=self._connect_timeout_s)
        self._id = new_job_id()
        self._origin = f"penstock-{os.getpid()}@{socket.gethostname()}"
        self._store: ResultStore | None = None
        self._is_guessed = True  # where results are
        self._opening = asyncio.Lock()
        self._registry: Registry | None = None
        self._registry_read_at = 0.0
        self._known: set[str] = set()  # models that were ever served here
        self._reading: asyncio.Task[Registry] | None = None
        self._router = Router(self._estimate)
        self._coalescer = Coalescer(self._send_unrecorded, self._n_workers, self._max_texts)

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle what it was made with, its password too; it connects anew where it is unpickled."""
        made = partial(type(self), results_url=self._results_url, connect_timeout_s=self._connect_timeout_s)
        return made, (self._url,)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all connections; jobs that were sent go on, calls that wait end with `ClientUseError`."""
        await self._calls.close()
        if self._calls.is_over:  # with the loop, or the parent process, that the connections belong to
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_S):
                await self._coalescer.close()
                if self._store is not None:
                    await self._store.close()
                await self._broker.close()

    def _call(self, timeout_s: float | None = CALL_S, *, closing: PenstockError = CLOSING) -> Call:
        """Return the block that a public call is made in."""
        if self._calls.is_over and not self._calls.is_closed:
            if self._calls.is_inherited:
                # Collecting the parent's connections would change what both processes wait on.
                _INHERITED.append((self._broker, self._store, self._coalescer, self._reading))
            self._begin()
        return self._calls.limited(timeout_s, closing=closing)

    async def models(self) -> Mapping[str, ModelInfo]:
        """Return the models that workers announced, by name."""
        async with self._call():
            return (await self._read_registry(max_age_s=0)).models

    async def registry(self) -> Registry:
        """Return models and workers as they are now."""
        async with self._call():
            return await self._read_registry(max_age_s=0)

    async def estimate(
        self, model: str, *, priority: PriorityName = "default", tenant: str | None = None
    ) -> Estimate:
        """Say how long a job for `model` would wait if it was sent now.

        Raises:
            UnknownModelError: no worker ever announced it.
        """
        async with self._call():
            info = await self._find_model(model)
            registry, lane = await self._read_registry(), read_lane(priority, tenant)
            pool = await self._router.choose(info, registry, lane)
            return await self._estimate(queue_name(pool, model), lane)

    async def _estimate(self, queue: str, lane: Lane) -> Estimate:
        load = await self._broker.load(queue_key(queue, *lane))
        return predict(queue, load, await self._read_registry())

    async def embed(
        self,
        texts: Sequence[str],
        *,
        model: str,
        timeout_s: float | None = RESULT_TIMEOUT_S,
        **options: Unpack[EmbedOptions],
    ) -> Vectors:
        """Embed `texts`, keeping their order.

        Calls of a few texts each that are made at the same time go as common jobs; see `penstock.coalescer`.

        Args:
            texts: up to the model's `max_texts`; `embed_many` takes any number.
            model: name it is served under.
            timeout_s: how long the call may take, seconds; None waits for as long as it takes. Texts
                that nobody waits for any more are not computed, if no worker has begun.
            **options: see `EmbedOptions`.

        Returns:
            float32 (or see `precision`), shape (n_texts, dim), C-contiguous, maybe read-only.

        Raises:
            RequestError: the request cannot be served as it is; nothing was sent.
            QueueDelayError: too much waits, or longer than `deadline_s`; nothing was sent.
            RateLimitError: the tenant sends more than it may; nothing was sent.
            TransportError: Redis is out of reach, or the result did not come in time.
            WorkerError: the model failed on these texts.
        """
        async with self._call(timeout_s, closing=TAKEN_BACK) as call:
            request, lane = await self._prepare(EmbedRequest, "embed", _embed_fields(texts, model, options))
            return await self._again(
                options.get("wait"), lambda: self._coalescer.embed(request, lane, call), request, call
            )

    async def submit_embed(
        self, texts: Sequence[str], *, model: str, **options: Unpack[EmbedOptions]
    ) -> AsyncJob[Vectors]:
        """Send an embedding job and return at once; see `embed`."""
        (job,) = await self.submit_many([texts], model=model, **options)
        return job

    async def submit_many(
        self, lists_of_texts: Iterable[Sequence[str]], *, model: str, **options: Unpack[EmbedOptions]
    ) -> list[AsyncJob[Vectors]]:
        """Send an embedding job for each list of texts: all together or none, at the price of one."""
        async with self._call(_submit_s(options.get("wait"))):
            return await self._submit_embed(lists_of_texts, model, options, is_recorded=True)

    async def generate(
        self,
        prompt: str | None,
        *,
        model: str,
        timeout_s: float | None = RESULT_TIMEOUT_S,
        **options: Unpack[GenerateOptions],
    ) -> GenerateResult:
        """Answer `prompt`.

        Args:
            prompt: the user's turn; None answers the last turn of `history`, such as a tool's. With
                `mode="complete"` the text to go on with.
            model: name it is served under.
            timeout_s: how long the call may take, seconds; None waits for as long as it takes. A call
                that is cancelled takes its job back.
            **options: see `GenerateOptions`.

        Raises:
            RequestError: the request cannot be served as it is.
            QueueDelayError: too much waits, or longer than `deadline_s`; nothing was sent.
            RateLimitError: the tenant sends more than it may; nothing was sent.
            TransportError: Redis is out of reach, or the result did not come in time.
            WorkerError: the model failed on this prompt.
        """
        async with self._call(timeout_s, closing=TAKEN_BACK) as call:
            request, lane = await self._prepare_generate(prompt, model, options, is_stream=False)
            result: GenerateResult = await self._answer(request, lane, options.get("wait"), call)
            return result

    async def submit_generate(
        self, prompt: str | None, *, model: str, **options: Unpack[GenerateOptions]
    ) -> AsyncJob[GenerateResult]:
        """Send a generation job and return at once; see `generate`."""
        async with self._call(_submit_s(options.get("wait"))):
            return await self._submit_generate(prompt, model, options, is_stream=False)

    async def stream(
        self,
        prompt: str | None,
        *,
        model: str,
        on_restart: OnRestart = "hide",
        timeout_s: float | None = RESULT_TIMEOUT_S,
        **options: Unpack[GenerateOptions],
    ) -> AsyncIterator[Piece]:
        """Answer `prompt`, piece by piece as it is generated.

        A reader that loses its connection goes on where it was. A job whose worker is lost begins again with
        another one, and with the same seed, so that it says the same. Leaving the loop cancels the job.

        Args:
            prompt: the user's turn; None answers the last turn of `history`, such as a tool's. With
                `mode="complete"` the text to go on with.
            model: name it is served under.
            on_restart: when a job begins again, `hide` leaves out what it repeats, and `show` yields a piece
                with `is_restart` and the text from its beginning.
            timeout_s: how long to wait for the next piece, seconds; None waits for as long as it takes.
            **options: see `GenerateOptions`.

        Yields:
            Pieces in the order of the text; the last one has finish reason and usage.

        Raises:
            StreamRestartedError: a restart was to be hidden, and the text is another.
            PenstockError: see `generate`.
        """
        async with self._call(timeout_s):
            job = await self._submit_generate(prompt, model, options, is_stream=True)
        is_over = False
        try:
            async for piece in job.pieces(on_restart=on_restart, timeout_s=timeout_s):
                is_over = piece.finish_reason is not None
                yield piece
        finally:
            if not is_over:
                await job.take_back()

    async def _submit_generate(
        self, prompt: str | None, model: str, options: GenerateOptions, *, is_stream: bool
    ) -> AsyncJob[GenerateResult]:
        request, lane = await self._prepare_generate(prompt, model, options, is_stream=is_stream)
        jobs: list[AsyncJob[GenerateResult]] = await self._again(
            options.get("wait"), lambda: self._send([request], lane, is_recorded=True), request
        )
        return jobs[0]

    async def _prepare_generate(
        self, prompt: str | None, model: str, options: GenerateOptions, *, is_stream: bool
    ) -> tuple[GenerateRequest, Lane]:
        fields: dict[str, Any] = {**options, "model": model, "prompt": prompt, "stream": is_stream}
        turns = fields.pop("history", None)
        if isinstance(turns, Iterable) and not isinstance(turns, str | bytes | Mapping):
            turns = [t.model_dump(exclude_none=True) if isinstance(t, Message) else t for t in turns]
        if turns is not None:
            fields["history"] = turns
        if isinstance(fields.get("tools"), tuple):
            fields["tools"] = list(fields["tools"])
        if is_stream and fields.get("seed") is None:
            fields["seed"] = secrets.randbits(63)
        return await self._prepare(GenerateRequest, "generate", fields)

    async def rerank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        model: str,
        timeout_s: float | None = RESULT_TIMEOUT_S,
        **options: Unpack[RerankOptions],
    ) -> RerankResult:
        """Score how well each document answers `query`, with a cross-encoder.

        Args:
            query: what is asked.
            documents: up to the model's `max_texts`.
            model: name it is served under.
            timeout_s: how long the call may take, seconds; None waits for as long as it takes. A call
                that is cancelled takes its job back.
            **options: see `RerankOptions`.

        Returns:
            Scores in the documents' order, float32, shape (n_documents,), and the order of the best.

        Raises:
            PenstockError: see `embed`.
        """
        async with self._call(timeout_s, closing=TAKEN_BACK) as call:
            request, lane = await self._prepare_rerank(query, documents, model, options)
            result: RerankResult = await self._answer(request, lane, options.get("wait"), call)
            return result

    async def submit_rerank(
        self, query: str, documents: Sequence[str], *, model: str, **options: Unpack[RerankOptions]
    ) -> AsyncJob[RerankResult]:
        """Send a reranking job and return at once; see `rerank`."""
        async with self._call(_submit_s(options.get("wait"))):
            request, lane = await self._prepare_rerank(query, documents, model, options)
            jobs: list[AsyncJob[RerankResult]] = await self._again(
                options.get("wait"), lambda: self._send([request], lane, is_recorded=True), request
            )
            return jobs[0]

    async def _prepare_rerank(
        self, query: str, documents: Sequence[str], model: str, options: RerankOptions
    ) -> tuple[RerankRequest, Lane]:
        listed = list(documents) if isinstance(documents, tuple) else documents
        fields = {**options, "model": model, "query": query, "documents": listed}
        return await self._prepare(RerankRequest, "rerank", fields)

    async def _answer(self, request: Request, lane: Lane, wait: WaitPolicy | None, call: Call) -> Any:
        """Send a job whose id nobody is told, and wait for its result."""

        async def answer() -> Any:
            job: AsyncJob[Any]
            (job,) = await self._send([request], lane, is_recorded=True)
            call.job_id = job.id
            try:
                return await job.wait()
            except asyncio.CancelledError:
                if not call.is_late:  # else its id is told, and it can be asked for
                    await job.take_back()
                raise

        return await self._again(wait, answer, request, call)

    async def job(self, job_id: str) -> AsyncJob[Vectors | GenerateResult | RerankResult]:
        """Return a job that any client sent, by its id; whether it exists shows when it is asked."""
        if not is_clean(job_id):
            raise InvalidOptionError("job_id", repr(job_id)[:80], "up to 256 printable characters")
        async with self._call():
            return AsyncJob(job_id, self._broker, await self._open_store(), is_ours=False)

    async def embed_many(
        self,
        texts: Iterable[str],
        *,
        model: str,
        progress: bool = False,
        timeout_s: float | None = RESULT_TIMEOUT_S,
        **options: Unpack[EmbedOptions],
    ) -> AsyncIterator[Vectors]:
        """Embed any number of texts with bounded memory: several jobs in flight, results in order.

        Jobs are cut by the workers' measured speed, see `penstock.many`, and go behind other callers'
        unless `priority` says otherwise.

        Args:
            texts: read as needed, never all at once.
            model: name it is served under.
            progress: show a bar on standard error, where that is a terminal.
            timeout_s: how long to wait until the next of the jobs under way ends, seconds.
            **options: see `EmbedOptions`.

        Yields:
            float32 (or `precision`), shape (n, dim), for the next n texts.

        Raises:
            PenstockError: see `embed`; jobs behind the one that failed are cancelled.
        """
        many = self._many(texts, model, timeout_s, options)
        with progress_bar(texts, progress) as bar:
            try:
                await many.look()
                while True:
                    while job_texts := many.cut():
                        await many.send(job_texts)
                    if not await many.wait():
                        return
                    for vectors in many.read():
                        yield vectors
                        bar.update(len(vectors))
            finally:
                await many.close()

    async def _submit_embed(
        self,
        lists_of_texts: Iterable[Sequence[str]],
        model: str,
        options: EmbedOptions,
        *,
        is_recorded: bool,
    ) -> list[AsyncJob[Vectors]]:
        fields = [_embed_fields(texts, model, options) for texts in lists_of_texts]
        prepared = [await self._prepare(EmbedRequest, "embed", each) for each in fields]
        if not prepared:
            return []
        requests, (lane, *_) = zip(*prepared, strict=True)
        return await self._again(
            options.get("wait"),
            lambda: self._send(requests, lane, is_recorded=is_recorded),
            min(requests, key=lambda request: request.deadline or math.inf),
        )

    async def _again(
        self,
        wait: WaitPolicy | None,
        attempt: Callable[[], Awaitable[S]],
        request: Request,
        call: Call | None = None,
    ) -> S:
        """Try, and again as `wait` says until the request's deadline, or the end of the call's time."""
        limits = [] if request.deadline is None else [request.deadline - self._broker.clock.now()]
        if call is not None and (left_s := call.left_s()) is not None:
            limits.append(left_s)
        return await try_again(wait, attempt, left_s=min(limits, default=None), broker=self._broker)

    def _many(
        self, texts: Iterable[str], model: str, timeout_s: float | None, options: EmbedOptions
    ) -> EmbedMany:
        return EmbedMany(texts, _Sender(self, model, options), timeout_s)

    async def _prepare(self, kind: type[R], task: Task, fields: Mapping[str, Any]) -> tuple[R, Lane]:
        """Check what can be known before anything is sent."""
        plain = {name: value for name, value in fields.items() if name not in OF_SENDING}
        lane = read_lane(fields.get("priority", "default"), fields.get("tenant"))
        within_s = read_deadline_s(fields.get("deadline_s"))
        request = kind.parse(plain)
        model = await self._find_model(request.model, task)
        n_texts = _n_texts(request)
        if n_texts > model.max_texts:
            raise TooManyTextsError(n_texts, model.max_texts)
        # By the broker's clock, which workers go by too: this machine's may be minutes off.
        now, within_s = self._broker.clock.now(), model.deadline_s if within_s is None else within_s
        deadline = None if within_s is None else now + within_s
        return request.model_copy(update={"sent_at": now, "deadline": deadline}), lane

    async def _send(self, requests: Sequence[Request], lane: Lane, *, is_recorded: bool) -> list[AsyncJob[T]]:
        """Queue requests of one model, all together or none.

        A job whose id the caller is told is recorded, and before it is queued: an error then means that
        nothing runs. Where nobody can ask, that round trip is saved.
        """
        model = await self._find_model(requests[0].model)
        store, registry = await self._open_store(), await self._read_registry()
        pool = await self._router.choose(model, registry, lane)
        queue = queue_name(pool, model.name)
        n_tokens = [count_tokens(request, registry, model) for request in requests]
        jobs: list[AsyncJob[T]] = [
            AsyncJob(new_job_id(), self._broker, store, is_ours=True, is_recorded=is_recorded)
            for _ in requests
        ]
        messages = [
            encode_message(
                request,
                job_id=job.id,
                queue=queue,
                priority=lane.priority,
                tenant=lane.tenant,
                reply_to=store.inbox.reply_to,
                origin=self._origin,
                n_tokens=cost,
            )
            for request, job, cost in zip(requests, jobs, n_tokens, strict=True)
        ]
        limits = queue_limits(model, registry, pool, requests, n_tokens, now_s=self._broker.clock.now())
        job_ids = [job.id for job in jobs]
        if is_recorded:
            await store.record_sent(job_ids)
        try:
            await self._broker.push(queue, lane, *messages, limits=limits)
            self._router.sent(model, registry, lane, pool, sum(n_tokens))
            if pool != registry.choose_pool(model):
                with contextlib.suppress(
                    TransportError
                ):  # they are sent, and must not look as if they were not
                    await self._broker.count_overflow(queue, len(jobs))
        except (QueueDelayError, RateLimitError):
            if is_recorded:
                await store.forget_sent(job_ids)
            raise
        except BrokerUnavailableError:
            store.calls.later(_end(jobs))  # they may have arrived, and nobody will hear their ids
            raise
        except asyncio.CancelledError:
            await store.calls.settle(_end(jobs))
            raise
        return jobs

    async def _send_unrecorded(self, request: EmbedRequest, lane: Lane) -> AsyncJob[Vectors]:
        jobs: list[AsyncJob[Vectors]] = await self._send([request], lane, is_recorded=False)
        return jobs[0]

    def _n_workers(self, name: str) -> int:
        registry = self._registry
        model = registry.models.get(name) if registry else None
        return registry.ready_workers(name, registry.choose_pool(model)) if registry and model else 0

    def _max_texts(self, name: str) -> int:
        model = self._registry.models.get(name) if self._registry else None
        return model.max_texts if model else 1

    async def _find_model(self, name: str, task: Task | None = None) -> ModelInfo:
        registry = await self._read_registry()
        if name not in registry.models:
            registry = await self._read_registry(max_age_s=0)
        ends_at = ticks() + 2 * HEARTBEAT_S
        while name not in registry.models and name in self._known and ticks() < ends_at:
            # The server has lost it, and the next heartbeat of its workers tells it again.
            await asyncio.sleep(_LOOK_AGAIN_S)
            registry = await self._read_registry(max_age_s=0)
        model = registry.models.get(name)
        if model is None:
            elsewhere = "" if registry.models else tell_elsewhere(self._url)
            raise UnknownModelError(name, sorted(registry.models), mask_url(self._url), elsewhere)
        if task is not None and model.task != task:
            raise WrongTaskError(name, model.task, task)
        return model

    async def _read_registry(self, *, max_age_s: float = REGISTRY_TTL_S) -> Registry:
        if self._registry is None or ticks() - self._registry_read_at > max_age_s:
            # One reading for all who want one now: they also go on together, and may share a job.
            if self._reading is None or self._reading.done():
                self._reading = asyncio.create_task(self._broker.registry(), name="penstock-registry")
            self._registry = await asyncio.shield(self._reading)
            self._registry_read_at = ticks()
            self._known |= self._registry.models.keys()
        return self._registry

    async def _open_store(self) -> ResultStore:
        async with self._opening:
            if self._is_guessed or self._store is None:
                # Before the first worker, or after a loss, nobody says where: then it is looked up again.
                announced = (await self._read_registry()).results
                url = self._results_url or locate_results(self._url, announced or "/1")
                self._is_guessed = announced is None and self._results_url is None
                if self._store is not None and self._store.url != url:
                    await self._store.close()
                    self._store = None
            if self._store is None:
                results = connect(url, connect_timeout_s=self._connect_timeout_s)
                store = ResultStore(results, url, Inbox(results, url, self._id), self._calls)
                try:
                    await store.inbox.open()
                except BaseException:
                    self._calls.later(store.close())
                    raise
                self._store = store
            return self._store


class _Sender:
    """Sends the jobs of one `embed_many`; see `many.Sender`."""

    def __init__(self, client: AsyncClient, model: str, options: EmbedOptions) -> None:
        self._client, self._model = client, model
        # A full queue is what so many texts lead to, and no reason to stop.
        self._options = EmbedOptions(wait=WaitPolicy(attempts=None), priority="batch")
        self._options.update(options)

    async def look(self) -> tuple[Registry, ModelInfo]:
        async with self._client._call():
            model = await self._client._find_model(self._model, "embed")
            return await self._client._read_registry(), model

    async def send(self, part: list[str]) -> AsyncJob[Vectors]:
        async with self._client._call(_submit_s(self._options.get("wait"))):
            (job,) = await self._client._submit_embed([part], self._model, self._options, is_recorded=False)
            return job


def progress_bar(texts: Iterable[str], progress: bool) -> "tqdm[NoReturn]":
    """Return a bar that counts texts; it shows if `progress` is wanted and standard error is a terminal."""
    total = len(texts) if isinstance(texts, Sized) else None
    return tqdm(total=total, unit=" texts", disable=None if progress else True)


async def _end(jobs: Sequence[AsyncJob[Any]]) -> None:
    """Take jobs back whose ids nobody was told."""
    await asyncio.gather(*(job.end() for job in jobs), return_exceptions=True)


def _submit_s(wait: WaitPolicy | None) -> float:
    """Return the most that sending may take, with the time that its caller gave it."""
    return RESULT_TIMEOUT_S + (wait.max_wait_s if wait else 0.0)


def _embed_fields(texts: Sequence[str], model: str, options: EmbedOptions) -> dict[str, Any]:
    return {**options, "model": model, "texts": list(texts) if isinstance(texts, tuple) else texts}


def _n_texts(request: Request) -> int:
    if isinstance(request, EmbedRequest):
        return len(request.texts)
    return len(request.documents) if isinstance(request, RerankRequest) else 0
