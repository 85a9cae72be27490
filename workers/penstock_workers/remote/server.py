"""A server of a remote model: how it is reached, and what may be sent to it.

One of two well-kept clients speaks: `openai` with servers of OpenAI's kind, `huggingface_hub` with TEI, with
endpoints that take `inputs`, and with Inference Providers. Both without retries and secrets of their own: the
connections are ours, and send the token to one server alone.
"""

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final, Self

import httpx2
import openai
import redis

from penstock.connections import connect
from penstock.errors import ModelLoadError
from penstock_workers.remote.backlog import Limits
from penstock_workers.remote.client_errors import ClientErrors
from penstock_workers.remote.endpoint import Endpoint
from penstock_workers.remote.faults import Fault
from penstock_workers.remote.rate_headers import read_spent
from penstock_workers.remote.token_estimates import TokenEstimate
from penstock_workers.remote.upstream import Upstream
from penstock_workers.settings import ModelSettings, RemoteSettings, is_loopback

logger = logging.getLogger(__name__)
for chatty in ("httpx2", "httpcore2", "openai"):  # a line for each request, and texts in those for debugging
    logging.getLogger(chatty).setLevel(logging.WARNING)

CONNECT_S: Final = 10.0
MAX_ANSWER_BYTES: Final = 64 << 20
"""Largest answer, unpacked; vectors may take `ITEM_BYTES` more for each text of a request."""
ITEM_BYTES: Final = 256 << 10
"""Room for a vector of 8,192 numbers as JSON."""
MAX_ERROR_BYTES: Final = 1 << 20
_SENT_HEADERS: Final = frozenset(
    {"accept", "accept-encoding", "connection", "content-length", "content-type", "host", "user-agent"}
    | {"x-stainless-raw-response"}  # a note of `openai` to itself
)
"""Headers that are sent, and no others: clients would add accounts and projects of the environment."""


class Server(ABC):
    """A server of one model.

    Attributes:
        name: Name that the model is served under.
        model: Settings of the model.
        model_id: Id that the server knows it by.
        endpoint: Address of the server.
        limits: Size of a request that it accepts.
        errors: Turns what goes wrong into faults.
        tokens: Estimates its tokens.
        http: Connections, while it is open.
        api: OpenAI's client over them.
    """

    limits: Limits

    def __init__(self, name: str, model: ModelSettings, broker_url: str) -> None:
        self.name, self.model, self._broker_url = name, model, broker_url
        self.model_id = model.remote.model or ""
        self.endpoint = Endpoint.read(name, model)
        self.errors = ClientErrors(name, self.endpoint, model.remote)
        self.tokens = TokenEstimate()

    @property
    def server(self) -> str:
        """Host of the server, for errors."""
        return self.endpoint.host

    @property
    def settings(self) -> RemoteSettings:
        """How patiently, and how often at once, it is asked."""
        return self.model.remote

    @classmethod
    def load(cls, name: str, model: ModelSettings, broker_url: str) -> Self:
        """Find out what has to be known before the first job.

        Raises:
            ModelLoadError: one line that says why.
        """
        engine = cls(name, model, broker_url)

        async def meet() -> None:
            async with engine.open() as upstream:
                await engine.find_out(upstream)

        asyncio.run(meet())
        return engine

    @abstractmethod
    async def find_out(self, upstream: Upstream) -> None:
        """Ask the server, once connected; called by `load`.

        Raises:
            ModelLoadError: one line that says why.
        """

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Upstream]:
        """See `dispatcher.Remote.open`."""
        store = connect(self._broker_url)
        limit = self.model.rate_limit
        self._upstream = Upstream(store, self.endpoint.root, self.model_id, self.endpoint.token, limit)
        try:
            async with self._connect() as self.http:
                self.api = openai.AsyncOpenAI(
                    api_key="-",
                    base_url=self.endpoint.url,
                    max_retries=0,
                    timeout=None,
                    http_client=self.http,
                )
                yield self._upstream
        finally:
            await store.aclose()

    def _connect(self) -> httpx2.AsyncClient:
        own = httpx2.URL(self.endpoint.url)
        n_kept = self.settings.max_concurrency

        async def guard(request: httpx2.Request) -> None:
            url = request.url
            if (url.scheme, url.host, url.port) != (own.scheme, own.host, own.port):
                raise self.errors.refused(0, f"a request to {url.host} was about to be sent")
            for name in set(request.headers) - _SENT_HEADERS:
                del request.headers[name]
            if self.endpoint.token:
                request.headers["Authorization"] = f"Bearer {self.endpoint.token}"

        async def note(response: httpx2.Response) -> None:
            answer_bytes = MAX_ANSWER_BYTES + ITEM_BYTES * self.limits.items
            limit = MAX_ERROR_BYTES if response.is_error else answer_bytes
            too_long = self.errors.bad_answer(f"it has more than {limit:,} bytes")
            _bound(response, limit, Fault("refused", too_long))
            if response.is_success and (spent_s := read_spent(response.headers)):
                try:
                    await self._upstream.hold("its allowance is used up", spent_s)
                except (redis.RedisError, OSError):
                    logger.warning("%s: other workers do not hear that its allowance is used up", self.name)
            elif response.is_redirect:
                raise self.errors.refused(response.status_code, "it redirects, which is not followed")
            elif response.is_error:
                try:
                    await response.aread()
                except Fault:  # its status says enough
                    raise self.errors.explain_status(response) from None

        return httpx2.AsyncClient(
            event_hooks={"request": [guard], "response": [note]},
            # A proxy of the environment would see what is sent in plain text to this machine itself.
            trust_env=not (own.scheme == "http" and is_loopback(own.host)),
            follow_redirects=False,  # neither texts nor tokens go where nobody sent them
            timeout=httpx2.Timeout(None, connect=CONNECT_S),  # the total is the caller's
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=n_kept),
        )

    async def find_model(self) -> int | None:
        """Ask which models there are; return the context window where the server tells, tokens.

        Raises:
            ModelLoadError: the token is refused, or no model is named and there is not just one.
        """
        found: list[dict[str, Any]] = []
        problem = "it does not say"
        try:
            async with asyncio.timeout(CONNECT_S):
                reply = await self.http.get(f"{self.endpoint.url}/models")
            if reply.status_code in (401, 403):
                refusal = self.errors.refused(reply.status_code, self.errors.hint(401))
                raise ModelLoadError(self.name, str(refusal))
            data = reply.json()["data"] if reply.is_success else []
            found = [one for one in data if isinstance(one, dict) and isinstance(one.get("id"), str)]
        except (TimeoutError, httpx2.HTTPError, ValueError, KeyError, TypeError) as error:
            problem = type(error).__name__
        if not self.model_id:
            if len(found) != 1:
                known = ", ".join(one["id"] for one in found[:10]) or problem
                raise ModelLoadError(self.name, f"name one of the server's models with remote.model: {known}")
            self.model_id = found[0]["id"]
        window = next((one.get("max_model_len") for one in found if one["id"] == self.model_id), None)
        return window if isinstance(window, int) else None


def _bound(response: httpx2.Response, limit: int, too_long: Exception) -> None:
    """Have a response raise `too_long` once more than `limit` bytes of it are unpacked, in any reading."""
    whole = response.aiter_bytes

    async def read(chunk_size: int | None = None) -> AsyncGenerator[bytes, None]:
        n_bytes = 0
        async for part in whole(chunk_size):
            n_bytes += len(part)
            if n_bytes > limit:
                await response.aclose()
                raise too_long
            yield part

    response.aiter_bytes = read  # type: ignore[method-assign]  # all ways to read go through it
