"""A server of remote models: how it is reached, and what is wrong with what it answers.

One of two well-kept clients speaks: `openai` with servers of OpenAI's kind, `huggingface_hub` with TEI, with
endpoints that take `inputs`, and with Inference Providers. Both without retries and secrets of their own: the
connections are ours, and send the token to one server alone.
"""

import asyncio
import logging
import math
import re
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from itertools import accumulate, pairwise
from typing import Any, Final, Self
from urllib.parse import urlsplit

import httpx2
import openai
import redis
from huggingface_hub import constants

from penstock.broker import connect
from penstock.errors import (
    ModelLoadError,
    PenstockError,
    UpstreamAnswerError,
    UpstreamError,
    UpstreamRefusedError,
    UpstreamUnavailableError,
)
from penstock.settings import PROVIDER, ModelSettings, is_loopback
from penstock_workers.remote.backlog import Limits
from penstock_workers.remote.faults import Fault
from penstock_workers.remote.rate_headers import read_delay, read_spent
from penstock_workers.remote.upstream import MAX_LOADING_S, Upstream

logger = logging.getLogger(__name__)
for chatty in ("httpx2", "httpcore2", "openai"):  # a line for each request, and texts in those for debugging
    logging.getLogger(chatty).setLevel(logging.WARNING)

CONNECT_S: Final = 10.0
MAX_ANSWER_BYTES: Final = 64 << 20
"""Of one answer, read and unpacked; vectors have more room: see `ITEM_BYTES`."""
ITEM_BYTES: Final = 256 << 10
"""More for each text of a request: a vector of 8,192 numbers as JSON."""
MAX_ERROR_BYTES: Final = 1 << 20
BYTES_PER_TOKEN: Final = 4.0
"""Until the server has counted."""

_SENT_HEADERS: Final = frozenset(
    {"accept", "accept-encoding", "connection", "content-length", "content-type", "host", "user-agent"}
    | {"x-stainless-raw-response"}  # a note of `openai` to itself
)
"""All that goes along: the clients would add accounts and projects that they find in the environment."""
_HINTS: Final = {
    401: "the token is not accepted",
    402: "its credits are used up",
    403: "the token has no right to this model",
    404: "there is no such model or path",
    410: "this address is no longer served",
    413: "one input alone is too large",
    422: "the input is not accepted",
}
_PERMANENT: Final = frozenset(("insufficient_quota", "budget_exceeded"))  # a 429 that does not heal


class Server(ABC):
    """A server of one model: how it is reached and what its refusals mean.

    Attributes:
        name: the name the model is served under.
        model: its settings.
        model_id: the one that the server knows it by.
        provider: of Inference Providers; None for a server of its own.
        url: what paths are put behind.
        root: the same without `/v1`.
        server: its host, for errors.
        limits: what one request may hold.
        timeout_s: how long one may take.
        patience_s: how long a job without a deadline waits.
        max_concurrency: requests under way.
        http: connections, while it is open.
        api: OpenAI's client over them.
    """

    limits: Limits

    def __init__(self, name: str, model: ModelSettings, broker_url: str) -> None:
        self.name, self.model, self._broker_url = name, model, broker_url
        self.timeout_s, self.patience_s = model.remote.timeout_s, model.remote.patience_s
        self.max_concurrency = model.remote.max_concurrency
        self.model_id = model.remote.model or ""
        self._bytes_per_token = BYTES_PER_TOKEN
        try:
            token = model.remote.token()
        except ValueError as error:
            raise ModelLoadError(name, f"remote.{error}") from error
        self._token = token.get_secret_value() if token else None
        self.provider = model.source.removeprefix(PROVIDER) if model.source.startswith(PROVIDER) else None
        if self.provider and not self.model_id:
            raise ModelLoadError(name, "providers have many models: name one with remote.model")
        router = constants.INFERENCE_PROXY_TEMPLATE.format(provider="v1")
        self.url = router if self.provider else model.source.rstrip("/")
        parts = urlsplit(self.url)
        if parts.path in ("", "/"):
            self.url = f"{self.url}/v1"
        self.server = parts.netloc
        self.root = self.url.removesuffix("/v1")

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
        self._upstream = Upstream(store, self.root, self.model_id, self._token, limit)
        try:
            async with self._connect() as self.http:
                self.api = openai.AsyncOpenAI(
                    api_key="-", base_url=self.url, max_retries=0, timeout=None, http_client=self.http
                )
                yield self._upstream
        finally:
            await store.aclose()

    def _connect(self) -> httpx2.AsyncClient:
        own = httpx2.URL(self.url)

        async def guard(request: httpx2.Request) -> None:
            url = request.url
            if (url.scheme, url.host, url.port) != (own.scheme, own.host, own.port):
                raise self.refused(0, f"a request to {url.host} was about to be sent")
            for name in set(request.headers) - _SENT_HEADERS:
                del request.headers[name]
            if self._token:
                request.headers["Authorization"] = f"Bearer {self._token}"

        async def note(response: httpx2.Response) -> None:
            limit = (
                MAX_ERROR_BYTES if response.is_error else MAX_ANSWER_BYTES + ITEM_BYTES * self.limits.items
            )
            _bound(response, limit, Fault("refused", self.bad_answer(f"it has more than {limit:,} bytes")))
            if response.is_success and (spent_s := read_spent(response.headers)):
                try:
                    await self._upstream.hold("its allowance is used up", spent_s)
                except (redis.RedisError, OSError):
                    logger.warning("%s: other workers do not hear that its allowance is used up", self.name)
            elif response.is_redirect:
                raise self.refused(response.status_code, "it redirects, which is not followed")
            elif response.is_error:
                try:
                    await response.aread()
                except Fault:  # its status says enough
                    raise self._explain_status(response) from None

        return httpx2.AsyncClient(
            event_hooks={"request": [guard], "response": [note]},
            # A proxy of the environment would see what is sent in plain text to this machine itself.
            trust_env=not (own.scheme == "http" and is_loopback(own.host)),
            follow_redirects=False,  # neither texts nor tokens go where nobody sent them
            timeout=httpx2.Timeout(None, connect=CONNECT_S),  # the total is the caller's
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=self.max_concurrency),
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
                reply = await self.http.get(f"{self.url}/models")
            if reply.status_code in (401, 403):
                raise ModelLoadError(self.name, str(self.refused(reply.status_code, self._hint(401))))
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

    def estimate(self, text: str) -> int:
        """Return how many tokens a text may have; at least 1."""
        return max(1, math.ceil(len(text.encode()) / self._bytes_per_token))

    def counted(self, n_bytes: int, n_tokens: object) -> int | None:
        """Learn from what the server counted; None where it did not."""
        if not isinstance(n_tokens, int) or n_tokens < 1:
            return None
        self._bytes_per_token += 0.1 * (n_bytes / n_tokens - self._bytes_per_token)
        return n_tokens

    def refused(self, status: int, problem: str) -> UpstreamRefusedError:
        """Return the error of what no request would do better; status 0: there was no answer."""
        return UpstreamRefusedError(self.name, self.server, status, problem)

    def bad_answer(self, problem: str) -> UpstreamAnswerError:
        """Return the error of an answer that cannot be used."""
        return UpstreamAnswerError(self.name, self.server, problem)

    def _away(self, problem: str) -> UpstreamUnavailableError:
        return UpstreamUnavailableError(self.name, self.server, problem)

    def _hint(self, status: int) -> str:
        hint = _HINTS.get(status, "")
        where = self.model.remote.token_env or self.model.remote.token_file
        if status in (401, 403):
            hint += f" ({where or 'none is configured'})"
        return hint

    def code(self, body: object) -> str:
        """Return the server's own word for what is wrong, in brackets; no sentence, which may quote input."""
        fields = body if isinstance(body, dict) else {}
        inner = fields.get("error")
        for holder in (inner if isinstance(inner, dict) else {}, fields):
            for name in ("code", "error_type", "type"):
                word = plain_word(holder.get(name))
                if word and not (self._token and (word in self._token or self._token in word)):
                    return f" ({word})"
        return ""

    def explain(self, error: Exception) -> Fault:
        """Turn whatever a client raised into what is to be done about it. Quotes nothing that was sent."""
        if isinstance(error, Fault):
            return error
        if isinstance(error, UpstreamRefusedError):
            return Fault("refused", error)
        if isinstance(error, UpstreamError):
            return Fault("failed", error)
        if isinstance(error, PenstockError):
            return Fault("refused", error)
        if isinstance(error.__cause__, PenstockError | Fault):  # of ours, in a client's clothes
            return self.explain(error.__cause__)
        response = getattr(error, "response", None)
        if isinstance(response, httpx2.Response):
            return self._explain_status(response)
        if isinstance(error, openai.APIConnectionError | httpx2.HTTPError | OSError):
            cause = error.__cause__ if isinstance(error, openai.APIConnectionError) else error
            return Fault("failed", self._away(f"{type(cause or error).__name__}"))
        if isinstance(error, openai.APIError):  # an event of a stream
            return Fault("failed", self.bad_answer(f"an error inside it{self.code(error.body)}"))
        return Fault("failed", self.bad_answer(f"{type(error).__name__} while it was read"))

    def _explain_status(self, response: httpx2.Response) -> Fault:
        status = response.status_code
        body = _json_of(response)
        code = self.code(body)
        problem = f"{status} {response.reason_phrase}{code}"
        if hint := self._hint(status):
            problem += f": {hint}"
        if 200 <= status < 300:
            return Fault("failed", self.bad_answer("it is no JSON"))
        if (status == 429 and code.strip(" ()") not in _PERMANENT) or status in (503, 529):
            return Fault("busy", self._away(problem), _loading_s(body) or read_delay(response.headers))
        if status == 413:
            return Fault("size", self.refused(status, problem))
        if status in (400, 422):
            return Fault("item", self.refused(status, problem))
        if status in (408, 409, 424, 425) or status >= 500:
            return Fault("failed", self._away(problem))
        return Fault("refused", self.refused(status, problem))


def share_out(n_tokens: int, weights: Sequence[int]) -> list[int]:
    """Split what the server counted for all by what each is thought to have; the sum stays exact."""
    whole = max(1, sum(weights))
    ends = [round(n_tokens * before / whole) for before in accumulate(weights, initial=0)]
    return [end - start for start, end in pairwise(ends)]


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


def _json_of(response: httpx2.Response) -> object:
    try:
        return response.json()
    except (ValueError, httpx2.HTTPError, httpx2.StreamError):
        return None


def plain_word(value: object) -> str:
    """Return a value that is one word of a server's own; else nothing."""
    return value if isinstance(value, str) and re.fullmatch(r"[\w.-]{1,64}", value, re.ASCII) else ""


def _loading_s(body: object) -> float | None:
    """Return `estimated_time` of a model that is being loaded, within bounds, seconds."""
    seconds = body.get("estimated_time") if isinstance(body, dict) else None
    if not isinstance(seconds, int | float) or not math.isfinite(seconds):
        return None
    return min(max(float(seconds), 1.0), MAX_LOADING_S)
