"""From a request to its message in a queue: check, choose a pool, price, push."""

import asyncio
import contextlib
import math
import os
import socket
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from penstock.broker import Broker
from penstock.calls import Call, Calls
from penstock.discovery import Discovery, StoreFinder
from penstock.errors import (
    BrokerUnavailableError,
    QueueDelayError,
    RateLimitError,
    TooManyTextsError,
    TransportError,
)
from penstock.job import RESULT_TIMEOUT_S, AsyncJob, T
from penstock.keys import queue_name
from penstock.messages import encode_message
from penstock.options import OF_SENDING, EmbedOptions, embed_fields, read_deadline_s, read_lane
from penstock.request import (
    EmbedRequest,
    GenerateRequest,
    Lane,
    PriorityName,
    Request,
    RerankRequest,
    new_job_id,
)
from penstock.result import GenerateResult, RerankResult, Vectors
from penstock.result_store import ResultStore
from penstock.retry import WaitPolicy, try_again
from penstock.routing import Estimate, Router, count_tokens, queue_limits

R = TypeVar("R", EmbedRequest, GenerateRequest, RerankRequest)
S = TypeVar("S")


class Sender:
    """Sends the requests of one client. Belongs to one event loop of one process.

    Args:
        url: Redis that holds the queues.
        results_url: Redis that holds the results; None takes what the workers announced.
        calls: calls of the client that are in flight.
        connect_timeout_s: time limit of a connection, seconds.

    Attributes:
        calls: see above.
        broker: Redis that holds the queues.
        discovery: models that are served.
    """

    def __init__(self, url: str, results_url: str | None, calls: Calls, *, connect_timeout_s: float) -> None:
        self.calls = calls
        self.broker = Broker(url, connect_timeout_s=connect_timeout_s)
        self.discovery = Discovery(self.broker)
        self._results = StoreFinder(
            self.discovery, url, results_url, calls, connect_timeout_s=connect_timeout_s
        )
        self._router = Router(self.broker, self.discovery)
        self._origin = f"penstock-{os.getpid()}@{socket.gethostname()}"

    async def check(self, kind: type[R], fields: Mapping[str, object]) -> tuple[R, Lane]:
        """Return a request with its deadline, and where in the queue it goes.

        Everything that can be known before sending is checked here.

        Args:
            kind: kind of the request.
            fields: fields of the request, and options of sending.

        Raises:
            RequestError: the request cannot be served as it is.
            TransportError: the broker cannot be reached, or refuses.
        """
        lane = read_lane(fields.get("priority", "default"), fields.get("tenant"))
        within_s = read_deadline_s(fields.get("deadline_s"))
        request = kind.parse({name: value for name, value in fields.items() if name not in OF_SENDING})
        model = await self.discovery.find(request.model, kind.task)
        if request.n_texts > model.max_texts:
            raise TooManyTextsError(request.n_texts, model.max_texts)
        # By the broker's clock, which workers go by too: this machine's may be minutes off.
        now, within_s = self.broker.clock.now(), model.deadline_s if within_s is None else within_s
        deadline = None if within_s is None else now + within_s
        return request.model_copy(update={"sent_at": now, "deadline": deadline}), lane

    async def send(
        self, requests: Sequence[Request], lane: Lane, *, is_recorded: bool = True
    ) -> list[AsyncJob[T]]:
        """Queue requests of one model, all together or none.

        Args:
            requests: checked requests.
            lane: their place in the queue.
            is_recorded: note that they are sent, before they are queued: an error then means that nothing
                runs. Needed where a caller is told the id; else this round trip is saved.

        Raises:
            QueueDelayError: too much waits, or longer than the deadline; nothing was sent.
            RateLimitError: the tenant sends more than it may; nothing was sent.
            TransportError: Redis is out of reach, or refuses.
        """
        model = await self.discovery.find(requests[0].model)
        store, registry = await self._results.open(), await self.discovery.registry()
        pool = await self._router.choose(model, registry, lane)
        queue = queue_name(pool, model.name)
        n_tokens = [count_tokens(request, registry, model) for request in requests]
        jobs: list[AsyncJob[T]] = [
            AsyncJob(new_job_id(), self.broker, store, is_ours=True, is_recorded=is_recorded)
            for _ in requests
        ]
        job_ids = [job.id for job in jobs]
        messages = [
            self._encode(request, job_id, queue, lane, store, n_tokens=cost)
            for request, job_id, cost in zip(requests, job_ids, n_tokens, strict=True)
        ]
        limits = queue_limits(model, registry, pool, requests, n_tokens, now_s=self.broker.clock.now())
        if is_recorded:
            await store.record_sent(job_ids)
        try:
            await self.broker.push(queue, lane, *messages, limits=limits)
            self._router.sent(model, registry, lane, pool, sum(n_tokens))
            if pool != registry.choose_pool(model):
                # They are sent, and must not look as if they were not.
                with contextlib.suppress(TransportError):
                    await self.broker.count_overflow(queue, len(jobs))
        except (QueueDelayError, RateLimitError):
            if is_recorded:
                await store.forget_sent(job_ids)
            raise
        except BrokerUnavailableError:
            self.calls.later(_cancel(jobs))  # they may have arrived, and nobody will hear their ids
            raise
        except asyncio.CancelledError:
            await self.calls.settle(_cancel(jobs))
            raise
        return jobs

    async def submit(
        self, requests: Sequence[Request], lane: Lane, wait: WaitPolicy | None, *, is_recorded: bool = True
    ) -> list[AsyncJob[T]]:
        """Send, and send again as `wait` says; see `send`."""

        async def attempt() -> list[AsyncJob[T]]:
            return await self.send(requests, lane, is_recorded=is_recorded)

        first = min(requests, key=lambda request: request.deadline or math.inf)
        return await self.retry(wait, attempt, first)

    async def submit_texts(
        self,
        lists_of_texts: Iterable[Sequence[str]],
        model: str,
        options: EmbedOptions,
        *,
        is_recorded: bool = True,
    ) -> list[AsyncJob[Vectors]]:
        """Send an embedding job for each list of texts, all together or none."""
        fields = [embed_fields(texts, model, options) for texts in lists_of_texts]
        checked = [await self.check(EmbedRequest, each) for each in fields]
        if not checked:
            return []
        requests, (lane, *_) = zip(*checked, strict=True)
        return await self.submit(requests, lane, options.get("wait"), is_recorded=is_recorded)

    async def retry(
        self,
        wait: WaitPolicy | None,
        attempt: Callable[[], Awaitable[S]],
        request: Request,
        call: Call | None = None,
    ) -> S:
        """Make an attempt, and another one as `wait` says.

        Args:
            wait: None makes one attempt.
            attempt: sends, and may wait for the result.
            request: its deadline is the end of all attempts.
            call: the end of its time is one too.

        Raises:
            PenstockError: the last attempt failed.
        """
        limits = [] if request.deadline is None else [request.deadline - self.broker.clock.now()]
        if call is not None and (left_s := call.left_s()) is not None:
            limits.append(left_s)
        return await try_again(wait, attempt, left_s=min(limits, default=None), broker=self.broker)

    async def estimate(self, model: str, priority: PriorityName, tenant: str | None) -> Estimate:
        """Say how long a job would wait if it was sent now.

        Raises:
            UnknownModelError: no worker ever announced the model.
        """
        info = await self.discovery.find(model)
        registry, lane = await self.discovery.registry(), read_lane(priority, tenant)
        pool = await self._router.choose(info, registry, lane)
        return await self._router.estimate(queue_name(pool, model), lane)

    async def job(self, job_id: str) -> AsyncJob[Vectors | GenerateResult | RerankResult]:
        """Return a job that any client sent, by its id."""
        return AsyncJob(job_id, self.broker, await self._results.open(), is_ours=False)

    async def close(self) -> None:
        """Close all connections."""
        await self._results.close()
        await self.broker.close()

    def _encode(
        self, request: Request, job_id: str, queue: str, lane: Lane, store: ResultStore, *, n_tokens: int
    ) -> bytes:
        return encode_message(
            request,
            job_id=job_id,
            queue=queue,
            priority=lane.priority,
            tenant=lane.tenant,
            reply_to=store.inbox.reply_to,
            origin=self._origin,
            n_tokens=n_tokens,
        )


def submit_limit_s(wait: WaitPolicy | None) -> float:
    """Return the most that sending may take, with the time that its caller gave it, seconds."""
    return RESULT_TIMEOUT_S + (wait.max_wait_s if wait else 0.0)


async def _cancel(jobs: Sequence[AsyncJob[T]]) -> None:
    """Cancel jobs whose ids nobody was told."""
    await asyncio.gather(*(job.end() for job in jobs), return_exceptions=True)
