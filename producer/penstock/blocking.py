"""`Client`: an `AsyncClient` for code that does not await."""

import asyncio
import os
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Final, Generic, Self, TypeVar, Unpack, cast

from penstock.broker import CONNECT_TIMEOUT_S
from penstock.client import (
    DEFAULT_URL,
    AsyncClient,
    EmbedOptions,
    GenerateOptions,
    RerankOptions,
    progress_bar,
)
from penstock.delay import Estimate
from penstock.job import RESULT_TIMEOUT_S, AsyncJob, JobState, T
from penstock.registry import ModelInfo, Registry
from penstock.request import PriorityName
from penstock.result import GenerateResult, RerankResult, Timings, Usage, Vectors
from penstock.stream import OnRestart, Piece
from penstock.urls import checked_url

S = TypeVar("S")

# A forked child keeps what it inherits here: collecting the parent's loop or its connections would change
# the epoll set that both processes share.
_RUNNING: Final[list[object]] = []


class Job(Generic[T]):
    """A job that was sent, for code that does not await; see `AsyncJob`."""

    def __init__(self, job: AsyncJob[T], client: "Client") -> None:
        self._job, self._client = job, client

    @property
    def id(self) -> str:
        """Whoever knows it can read the result."""
        return self._job.id

    def result(self, timeout_s: float | None = RESULT_TIMEOUT_S) -> T:
        """See `AsyncJob.result`."""
        return self._client._run(self._job.result(timeout_s))

    def state(self) -> JobState:
        """See `AsyncJob.state`."""
        return self._client._run(self._job.state())

    def cancel(self) -> bool:
        """See `AsyncJob.cancel`."""
        return self._client._run(self._job.cancel())

    def forget(self) -> None:
        """See `AsyncJob.forget`."""
        self._client._run(self._job.forget())

    @property
    def usage(self) -> Usage | None:
        """See `AsyncJob.usage`."""
        return self._job.usage

    @property
    def timings(self) -> Timings | None:
        """See `AsyncJob.timings`."""
        return self._job.timings


class Client:
    """Sends jobs to Penstock's workers and waits for their results; may be shared by threads.

    An `AsyncClient` on an event loop in a thread of its own: all threads' jobs share its connections.
    After a fork the child starts anew. Use it as `with Client(url) as client`, or call `close`.

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
        self._url = checked_url("url", url)
        self._results_url = None if results_url is None else checked_url("results_url", results_url)
        self._connect_timeout_s = connect_timeout_s
        self._lock = threading.Lock()
        self._pid = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections; jobs that were sent go on."""
        with self._lock:
            loop, thread, self._loop, self._thread = self._loop, self._thread, None, None
        if loop is not None and thread is not None and self._pid == os.getpid():
            asyncio.run_coroutine_threadsafe(self._async.close(), loop).result()
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()
            _RUNNING.remove(self._running)

    def models(self) -> Mapping[str, ModelInfo]:
        """See `AsyncClient.models`."""
        return self._run(self._started().models())

    def registry(self) -> Registry:
        """See `AsyncClient.registry`."""
        return self._run(self._started().registry())

    def estimate(
        self, model: str, *, priority: PriorityName = "default", tenant: str | None = None
    ) -> Estimate:
        """See `AsyncClient.estimate`."""
        return self._run(self._started().estimate(model, priority=priority, tenant=tenant))

    def embed(
        self,
        texts: Sequence[str],
        *,
        model: str,
        timeout_s: float | None = RESULT_TIMEOUT_S,
        **options: Unpack[EmbedOptions],
    ) -> Vectors:
        """See `AsyncClient.embed`; returns shape (n_texts, dim)."""
        return self._run(self._started().embed(texts, model=model, timeout_s=timeout_s, **options))

    def submit_embed(
        self, texts: Sequence[str], *, model: str, **options: Unpack[EmbedOptions]
    ) -> Job[Vectors]:
        """See `AsyncClient.submit_embed`."""
        return Job(self._run(self._started().submit_embed(texts, model=model, **options)), self)

    def submit_many(
        self, lists_of_texts: Iterable[Sequence[str]], *, model: str, **options: Unpack[EmbedOptions]
    ) -> list[Job[Vectors]]:
        """See `AsyncClient.submit_many`; `lists_of_texts` is read in the calling thread."""
        sent = self._started().submit_many(list(lists_of_texts), model=model, **options)
        return [Job(job, self) for job in self._run(sent)]

    def generate(
        self,
        prompt: str | None,
        *,
        model: str,
        timeout_s: float | None = RESULT_TIMEOUT_S,
        **options: Unpack[GenerateOptions],
    ) -> GenerateResult:
        """See `AsyncClient.generate`."""
        return self._run(self._started().generate(prompt, model=model, timeout_s=timeout_s, **options))

    def submit_generate(
        self, prompt: str | None, *, model: str, **options: Unpack[GenerateOptions]
    ) -> Job[GenerateResult]:
        """See `AsyncClient.submit_generate`."""
        return Job(self._run(self._started().submit_generate(prompt, model=model, **options)), self)

    def stream(
        self,
        prompt: str | None,
        *,
        model: str,
        on_restart: OnRestart = "hide",
        timeout_s: float | None = RESULT_TIMEOUT_S,
        **options: Unpack[GenerateOptions],
    ) -> Iterator[Piece]:
        """See `AsyncClient.stream`."""
        pieces = self._started().stream(
            prompt, model=model, on_restart=on_restart, timeout_s=timeout_s, **options
        )
        return self._iterate(pieces)

    def rerank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        model: str,
        timeout_s: float | None = RESULT_TIMEOUT_S,
        **options: Unpack[RerankOptions],
    ) -> RerankResult:
        """See `AsyncClient.rerank`."""
        asked = self._started().rerank(query, documents, model=model, timeout_s=timeout_s, **options)
        return self._run(asked)

    def submit_rerank(
        self, query: str, documents: Sequence[str], *, model: str, **options: Unpack[RerankOptions]
    ) -> Job[RerankResult]:
        """See `AsyncClient.submit_rerank`."""
        return Job(self._run(self._started().submit_rerank(query, documents, model=model, **options)), self)

    def job(self, job_id: str) -> Job[Vectors | GenerateResult | RerankResult]:
        """See `AsyncClient.job`."""
        return Job(self._run(self._started().job(job_id)), self)

    def embed_many(
        self,
        texts: Iterable[str],
        *,
        model: str,
        progress: bool = False,
        timeout_s: float | None = RESULT_TIMEOUT_S,
        **options: Unpack[EmbedOptions],
    ) -> Iterator[Vectors]:
        """See `AsyncClient.embed_many`; `texts` is read in the calling thread, shape (n, dim) at a time."""
        pacer = self._started()._pace(texts, model, timeout_s, options)
        with progress_bar(texts, progress) as bar:
            try:
                self._run(pacer.open())
                while True:
                    while part := pacer.take():
                        self._run(pacer.send(part))
                    if not self._run(pacer.wait()):
                        return
                    for vectors in pacer.read():
                        yield vectors
                        bar.update(len(vectors))
            finally:
                self._run(pacer.close())

    def _started(self) -> AsyncClient:
        with self._lock:
            if self._loop is None or self._pid != os.getpid():  # a fork leaves the thread behind
                self._pid = os.getpid()
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(
                    target=self._loop.run_forever, name="penstock-client", daemon=True
                )
                self._thread.start()
                self._async = asyncio.run_coroutine_threadsafe(self._make(), self._loop).result()
                self._running = (self._loop, self._async)
                _RUNNING.append(self._running)
            return self._async

    async def _make(self) -> AsyncClient:
        return AsyncClient(
            self._url, results_url=self._results_url, connect_timeout_s=self._connect_timeout_s
        )

    def _iterate(self, items: AsyncIterator[S]) -> Iterator[S]:
        async def next_item() -> tuple[S, ...]:
            return (item,) if (item := await anext(items, None)) is not None else ()

        async def leave() -> None:
            await cast("AsyncGenerator[S]", items).aclose()

        try:
            while found := self._run(next_item()):
                yield found[0]
        finally:
            self._run(leave())

    def _run(self, work: Coroutine[Any, Any, S]) -> S:
        assert self._loop is not None
        future: Future[S] = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except KeyboardInterrupt:
            future.cancel()
            raise
