"""`Client`: an `AsyncClient` for code that does not await."""

import os
import threading
import weakref
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from functools import partial
from types import TracebackType
from typing import Any, Final, Generic, Self, TypeVar, Unpack, cast

from penstock.calls import CLOSED
from penstock.client import DEFAULT_URL, AsyncClient
from penstock.connections import CONNECT_TIMEOUT_S, checked_connect_timeout
from penstock.errors import ClientUseError
from penstock.job import RESULT_TIMEOUT_S, AsyncJob, JobState, T
from penstock.many import EmbedMany, progress_bar
from penstock.options import EmbedOptions, GenerateOptions, RerankOptions
from penstock.registry import ModelInfo, Registry
from penstock.request import PriorityName
from penstock.result import GenerateResult, RerankResult, Timings, Usage, Vectors
from penstock.routing import Estimate
from penstock.running import Running
from penstock.stream import OnRestart, Piece
from penstock.urls import checked_url

S = TypeVar("S")


class Job(Generic[T]):
    """A job that was sent, for code that does not await; see `AsyncJob`.

    In a forked child, and where it was unpickled, it is asked through the client that is there.
    """

    def __init__(
        self, client: "Client", job_id: str, job: AsyncJob[T] | None = None, running: Running | None = None
    ) -> None:
        self._client, self._id, self._job, self._running = client, job_id, job, running

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle the client's settings, its password too, and the id."""
        return Job, (self._client, self._id)

    @property
    def id(self) -> str:
        """Whoever knows it can read the result."""
        return self._id

    def result(self, timeout_s: float | None = RESULT_TIMEOUT_S) -> T:
        """See `AsyncJob.result`."""
        return self._ask(lambda job: job.result(timeout_s))

    def state(self) -> JobState:
        """See `AsyncJob.state`."""
        return self._ask(lambda job: job.state())

    def cancel(self) -> bool:
        """See `AsyncJob.cancel`."""
        return self._ask(lambda job: job.cancel())

    def forget(self) -> None:
        """See `AsyncJob.forget`."""
        self._ask(lambda job: job.forget())

    @property
    def usage(self) -> Usage | None:
        """See `AsyncJob.usage`."""
        return self._job.usage if self._job else None

    @property
    def timings(self) -> Timings | None:
        """See `AsyncJob.timings`."""
        return self._job.timings if self._job else None

    def _ask(self, question: Callable[[AsyncJob[T]], Coroutine[Any, Any, S]]) -> S:
        running = self._client._running_here()
        if self._job is None or self._running is not running:
            found = cast("AsyncJob[T]", running.run(running.client.job(self._id)))
            if self._job is not None:
                found.know(self._job)
            self._job, self._running = found, running
        return running.run(question(self._job))


class Client:
    """Sends jobs to Penstock's workers and waits for their results; may be shared by threads.

    An `AsyncClient` on an event loop in a thread of its own: all threads' jobs share its connections.
    After a fork the child starts anew, and so does a copy or what was unpickled: it has the same settings.
    Use it as `with Client(url) as client`, or call `close`.

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
        self._url = checked_url("url", url)
        self._results_url = None if results_url is None else checked_url("results_url", results_url)
        self._connect_timeout_s = checked_connect_timeout(connect_timeout_s)
        self._lock = threading.RLock()  # a signal's handler may use the client that it interrupts
        self._running: Running | None = None
        self._is_closed = False
        _CLIENTS.add(self)

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle its arguments, the password too; the copy connects anew where it is unpickled."""
        made = partial(type(self), results_url=self._results_url, connect_timeout_s=self._connect_timeout_s)
        return made, (self._url,)

    def __enter__(self) -> Self:
        if self._is_closed:
            raise ClientUseError(CLOSED)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections; jobs that were sent go on, calls that wait end with `ClientUseError`."""
        with self._lock:
            running, self._running, self._is_closed = self._running, None, True
        if running is not None:
            running.close()

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
        return self._submit(lambda client: client.submit_embed(texts, model=model, **options))

    def submit_many(
        self, lists_of_texts: Iterable[Sequence[str]], *, model: str, **options: Unpack[EmbedOptions]
    ) -> list[Job[Vectors]]:
        """See `AsyncClient.submit_many`; `lists_of_texts` is read in the calling thread."""
        lists, running = list(lists_of_texts), self._running_here()
        sent = running.run(running.client.submit_many(lists, model=model, **options))
        return [Job(self, job.id, job, running) for job in sent]

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
        return self._submit(lambda client: client.submit_generate(prompt, model=model, **options))

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
        return self._submit(lambda client: client.submit_rerank(query, documents, model=model, **options))

    def job(self, job_id: str) -> Job[Vectors | GenerateResult | RerankResult]:
        """See `AsyncClient.job`."""
        return self._submit(lambda client: client.job(job_id))

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
        running = self._running_here()
        many = EmbedMany(texts, running.client._sender, model, options, timeout_s)
        with progress_bar(texts, progress) as bar:
            try:
                running.run(many.look())
                while True:
                    while job_texts := many.cut():
                        running.run(many.send(job_texts))
                    if not running.run(many.wait()):
                        return
                    for vectors in many.read():
                        yield vectors
                        bar.update(len(vectors))
            finally:
                running.leave(many.close)

    def _running_here(self) -> Running:
        with self._lock:
            if self._is_closed:
                raise ClientUseError(CLOSED)
            if self._running is None or self._running.is_inherited:  # a fork leaves the thread behind
                self._running = Running(self._make)
                # A client that is dropped without `close` leaves neither a thread nor connections.
                weakref.finalize(self, self._running.abandon).atexit = False
            return self._running

    def _started(self) -> AsyncClient:
        return self._running_here().client

    @property
    def _make(self) -> Callable[[], AsyncClient]:
        return partial(
            AsyncClient,
            self._url,
            results_url=self._results_url,
            connect_timeout_s=self._connect_timeout_s,
        )

    def _submit(self, send: Callable[[AsyncClient], Coroutine[Any, Any, AsyncJob[S]]]) -> Job[S]:
        running = self._running_here()
        job = running.run(send(running.client))
        return Job(self, job.id, job, running)

    def _iterate(self, items: AsyncIterator[S]) -> Iterator[S]:
        running = self._running_here()

        async def next_item() -> tuple[S, ...]:
            return (item,) if (item := await anext(items, None)) is not None else ()

        try:
            while found := running.run(next_item()):
                yield found[0]
        finally:
            running.leave(cast("AsyncGenerator[S]", items).aclose)

    def _run(self, work: Coroutine[Any, Any, S]) -> S:
        return self._running_here().run(work)


def _after_fork() -> None:
    """Let a child begin anew: another thread may have held the lock of a client, and is not here."""
    for client in list(_CLIENTS):
        client._lock = threading.RLock()
        client._running = None


_CLIENTS: Final[weakref.WeakSet[Client]] = weakref.WeakSet()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
