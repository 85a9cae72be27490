"""How services send jobs: `AsyncClient`. `penstock.blocking` has its twin for code that does not await."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Final, Self, Unpack

from penstock.calls import CALL_S, CLOSE_S, CLOSING, TAKEN_BACK, Call, Calls
from penstock.coalescer import Coalescer
from penstock.connections import CONNECT_TIMEOUT_S, checked_connect_timeout
from penstock.envelope import is_clean
from penstock.errors import InvalidOptionError, PenstockError
from penstock.job import RESULT_TIMEOUT_S, AsyncJob
from penstock.many import EmbedMany, progress_bar
from penstock.options import (
    EmbedOptions,
    GenerateOptions,
    RerankOptions,
    embed_fields,
    generate_fields,
    rerank_fields,
)
from penstock.registry import ModelInfo, Registry
from penstock.request import EmbedRequest, GenerateRequest, PriorityName, RerankRequest
from penstock.result import GenerateResult, RerankResult, Vectors
from penstock.routing import Estimate
from penstock.sender import Sender, submit_limit_s
from penstock.stacks import with_password
from penstock.stream import OnRestart, Piece
from penstock.urls import checked_url

DEFAULT_URL: Final = "redis://127.0.0.1:6379/0"

# A forked child keeps what it inherits here.
_INHERITED: Final[list[object]] = []


class AsyncClient:
    """Sends jobs to Penstock's workers and waits for their results, without blocking the event loop.

    All waiting jobs share one connection. Use it as `async with AsyncClient(url) as client`, within one
    event loop.

    Args:
        url: Redis that holds the queues.
        results_url: Redis that holds the results; None takes what the workers announced.
        connect_timeout_s: seconds after which an unreachable Redis is a `BrokerUnavailableError`.
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
        """Begin without connections; the loop of the first call is the one that they will belong to."""
        self._calls = Calls()
        self._sender = Sender(
            self._url, self._results_url, self._calls, connect_timeout_s=self._connect_timeout_s
        )
        self._coalescer = Coalescer(self._sender)

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle its arguments, the password too; the copy connects anew where it is unpickled."""
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
                await self._sender.close()

    def _call(self, timeout_s: float | None = CALL_S, *, closing: PenstockError = CLOSING) -> Call:
        """Return the block in which a public call runs; begins anew where the earlier loop has ended."""
        if self._calls.is_over and not self._calls.is_closed:
            if self._calls.is_inherited:
                # Collecting the parent's connections would change what both processes wait on.
                _INHERITED.append((self._sender, self._coalescer))
            self._begin()
        return self._calls.limited(timeout_s, closing=closing)

    async def models(self) -> Mapping[str, ModelInfo]:
        """Return the models that workers announced, by name."""
        async with self._call():
            return (await self._sender.discovery.registry(max_age_s=0)).models

    async def registry(self) -> Registry:
        """Return models and workers as they are now."""
        async with self._call():
            return await self._sender.discovery.registry(max_age_s=0)

    async def estimate(
        self, model: str, *, priority: PriorityName = "default", tenant: str | None = None
    ) -> Estimate:
        """Say how long a job for `model` would wait if it was sent now.

        Raises:
            UnknownModelError: no worker ever announced it.
        """
        async with self._call():
            return await self._sender.estimate(model, priority, tenant)

    async def embed(
        self,
        texts: Sequence[str],
        *,
        model: str,
        timeout_s: float | None = RESULT_TIMEOUT_S,
        **options: Unpack[EmbedOptions],
    ) -> Vectors:
        """Embed `texts`, keeping their order.

        Calls of a few texts each that are made at the same time share jobs; see `penstock.coalescer`.

        Args:
            texts: up to the model's `max_texts`; `embed_many` takes any number.
            model: name it is served under.
            timeout_s: time limit of the call, seconds; None waits for as long as it takes. If the call ends
                early, its texts are not computed, unless others share their job.
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
            request, lane = await self._sender.check(EmbedRequest, embed_fields(texts, model, options))
            attempt = partial(self._coalescer.embed, request, lane, call)
            return await self._sender.retry(options.get("wait"), attempt, request, call)

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
        async with self._call(submit_limit_s(options.get("wait"))):
            return await self._sender.submit_texts(lists_of_texts, model, options)

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
            timeout_s: time limit of the call, seconds; None waits for as long as it takes. If the call ends
                early, its job is cancelled.
            **options: see `GenerateOptions`.

        Raises:
            RequestError: the request cannot be served as it is.
            QueueDelayError: too much waits, or longer than `deadline_s`; nothing was sent.
            RateLimitError: the tenant sends more than it may; nothing was sent.
            TransportError: Redis is out of reach, or the result did not come in time.
            WorkerError: the model failed on this prompt.
        """
        async with self._call(timeout_s, closing=TAKEN_BACK) as call:
            request, lane = await self._sender.check(GenerateRequest, generate_fields(prompt, model, options))

            async def attempt() -> GenerateResult:
                jobs: list[AsyncJob[GenerateResult]] = await self._sender.send([request], lane)
                return await jobs[0].answer(call)

            return await self._sender.retry(options.get("wait"), attempt, request, call)

    async def submit_generate(
        self, prompt: str | None, *, model: str, **options: Unpack[GenerateOptions]
    ) -> AsyncJob[GenerateResult]:
        """Send a generation job and return at once; see `generate`."""
        wait = options.get("wait")
        async with self._call(submit_limit_s(wait)):
            fields = generate_fields(prompt, model, options)
            request, lane = await self._sender.check(GenerateRequest, fields)
            jobs: list[AsyncJob[GenerateResult]] = await self._sender.submit([request], lane, wait)
            return jobs[0]

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
            on_restart: behaviour when a job begins again: `hide` leaves out what it repeats, `show`
                yields a piece with `is_restart` and the text from its beginning.
            timeout_s: longest wait for the next piece, seconds; None waits for as long as it takes. When it
                is over, the job is cancelled.
            **options: see `GenerateOptions`.

        Yields:
            Pieces in the order of the text; the last one has finish reason and usage.

        Raises:
            StreamRestartedError: a restart was to be hidden, and the text is another.
            PenstockError: see `generate`.
        """
        wait = options.get("wait")
        async with self._call(timeout_s):
            fields = generate_fields(prompt, model, options, is_stream=True)
            request, lane = await self._sender.check(GenerateRequest, fields)
            jobs: list[AsyncJob[GenerateResult]] = await self._sender.submit([request], lane, wait)
        is_over = False
        try:
            async for piece in jobs[0].pieces(on_restart=on_restart, timeout_s=timeout_s):
                is_over = piece.finish_reason is not None
                yield piece
        finally:
            if not is_over:
                await jobs[0].take_back()

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
            query: the question.
            documents: up to the model's `max_texts`.
            model: name it is served under.
            timeout_s: time limit of the call, seconds; None waits for as long as it takes. If the call ends
                early, its job is cancelled.
            **options: see `RerankOptions`.

        Returns:
            Scores in the documents' order, float32, shape (n_documents,), and the order of the best.

        Raises:
            PenstockError: see `embed`.
        """
        async with self._call(timeout_s, closing=TAKEN_BACK) as call:
            fields = rerank_fields(query, documents, model, options)
            request, lane = await self._sender.check(RerankRequest, fields)

            async def attempt() -> RerankResult:
                jobs: list[AsyncJob[RerankResult]] = await self._sender.send([request], lane)
                return await jobs[0].answer(call)

            return await self._sender.retry(options.get("wait"), attempt, request, call)

    async def submit_rerank(
        self, query: str, documents: Sequence[str], *, model: str, **options: Unpack[RerankOptions]
    ) -> AsyncJob[RerankResult]:
        """Send a reranking job and return at once; see `rerank`."""
        wait = options.get("wait")
        async with self._call(submit_limit_s(wait)):
            fields = rerank_fields(query, documents, model, options)
            request, lane = await self._sender.check(RerankRequest, fields)
            jobs: list[AsyncJob[RerankResult]] = await self._sender.submit([request], lane, wait)
            return jobs[0]

    async def job(self, job_id: str) -> AsyncJob[Vectors | GenerateResult | RerankResult]:
        """Return a job that any client sent, by its id; whether it exists shows when it is asked."""
        if not is_clean(job_id):
            raise InvalidOptionError("job_id", repr(job_id)[:80], "up to 256 printable characters")
        async with self._call():
            return await self._sender.job(job_id)

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
            timeout_s: longest wait for the next job to end, seconds. When it is over, all its jobs are
                cancelled.
            **options: see `EmbedOptions`.

        Yields:
            float32 (or `precision`), shape (n, dim), for the next n texts.

        Raises:
            PenstockError: see `embed`; jobs behind the one that failed are cancelled.
        """
        async with self._call():  # begins anew where the loop of earlier calls has ended
            many = EmbedMany(texts, self._sender, model, options, timeout_s)
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
