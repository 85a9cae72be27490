"""Text to vectors at a server: what is sent in either protocol, and which vectors may come back."""

import asyncio
import base64
import hashlib
import json
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal

import httpx2
import numpy as np
import redis
from huggingface_hub import AsyncInferenceClient
from numpy.typing import NDArray

from penstock.errors import InvalidOptionError, ModelLoadError, PenstockError, UpstreamError
from penstock.request import EmbedRequest
from penstock.validation import describe
from penstock_workers.embedding.int8_ranges import read_ranges
from penstock_workers.remote.backlog import Limits
from penstock_workers.remote.faults import Fault
from penstock_workers.remote.server import CONNECT_S, Server
from penstock_workers.remote.token_estimates import share_out
from penstock_workers.remote.upstream import Upstream
from penstock_workers.settings import ModelSettings

START_S: Final = 60.0
"""How long the start waits for a server that has to be asked for the width of its vectors."""
REQUEST_TOKENS: Final = 32_768
"""Most tokens of one request, by estimate, unless the settings or the server say otherwise."""
_ROUTED: Final = "hf_routed"
"""Stands in for a token, and is never sent: a key with `hf_` makes the client use Hugging Face's router."""


@dataclass(slots=True, kw_only=True)
class Text:
    """One text to embed.

    Attributes:
        text: The text, as it is sent.
        n_tokens: Estimated tokens; once it is answered, its share of what the server counted.
    """

    text: str
    n_tokens: int

    @property
    def cost_tokens(self) -> int:
        """All of it."""
        return self.n_tokens


class RemoteEmbedder(Server):
    """An embedding model at a server.

    Attributes:
        dim: Width of a vector.
        max_tokens: Longest text, tokens; longer ones are cut. None if the server does not say.
        int8_ranges: Ranges of the dimensions, see `serving.formats.form`; None refuses int8.
        fingerprint: Hash of all that decides its vectors, as far as it is known here.
        protocol: Protocol that the server speaks.
    """

    def __init__(self, name: str, model: ModelSettings, broker_url: str) -> None:
        super().__init__(name, model, broker_url)
        tokens = model.max_batch_tokens or REQUEST_TOKENS
        self.limits = Limits(model.remote.max_request_texts, tokens)
        self.dim = model.remote.dim or 0
        self.max_tokens: int | None = None
        self.int8_ranges: NDArray[np.float32] | None = None
        self.protocol: Literal["openai", "tei", "hf"] = "openai"
        self.fingerprint = ""

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Upstream]:
        """See `dispatcher.Remote.open`."""
        async with super().open() as upstream:
            self._hub = _Hub(self.http, self.endpoint.provider)
            yield upstream

    async def find_out(self, upstream: Upstream) -> None:
        """Find out what the server speaks and takes, and the width of its vectors; see `Server.find_out`."""
        await self._find_protocol()
        if self.protocol == "openai" and not self.model_id:
            await self.find_model()
        if not self.dim:
            await self._find_dim(upstream)
        parts = (self.model.source, self.model_id, self.protocol, self.dim)
        self.fingerprint = hashlib.sha256(repr(parts).encode()).hexdigest()
        if self.model.int8_ranges is not None:
            try:
                self.int8_ranges = read_ranges(self.model.int8_ranges, self.dim)
            except (OSError, ValueError) as error:
                raise ModelLoadError(self.name, f"int8_ranges: {error}") from error

    def prepare(self, request: EmbedRequest) -> list[Text]:
        """Return a request's texts.

        Raises:
            InvalidOptionError: see `check`.
        """
        prompt = self.check(request) or ""
        texts = [prompt + text for text in request.texts]
        return [Text(text=text, n_tokens=self.tokens.estimate(text)) for text in texts]

    def check(self, request: EmbedRequest) -> str | None:
        """Return the prompt that goes before each text.

        Raises:
            InvalidOptionError: the server cannot give such vectors.
        """
        if request.prompt_name is not None:
            allowed = "a remote model's prompts have no names here: pass prompt"
            raise InvalidOptionError("prompt_name", describe(request.prompt_name), allowed)
        if request.truncate_dim is not None and request.truncate_dim > self.dim:
            raise InvalidOptionError("truncate_dim", str(request.truncate_dim), f"at most {self.dim}")
        if request.precision == "int8" and self.int8_ranges is None:
            raise InvalidOptionError("precision", "'int8'", "a remote model needs int8_ranges for it")
        return request.prompt

    async def call(
        self, items: Sequence[Text], on_piece: Callable[[str], None] | None = None
    ) -> list[NDArray[np.float32] | UpstreamError]:
        """Embed texts in one request; float32, shape (dim,) each, or why a vector is not usable.

        Raises:
            Fault: there is no answer.
        """
        del on_piece
        texts = [item.text for item in items]
        try:
            rows, n_tokens = await (
                self._ask_openai(texts) if self.protocol == "openai" else self._ask_hub(texts)
            )
        except Exception as error:
            raise self.errors.explain(error) from error
        if len(rows) != len(items):
            raise Fault("failed", self.errors.bad_answer(f"{len(rows)} vectors for {len(items)} texts"))
        self.dim = self.dim or len(rows[0])
        counted = self.tokens.counted(sum(len(text.encode()) for text in texts), n_tokens)
        if counted is not None:
            shares = share_out(counted, [item.n_tokens for item in items])
            for item, share in zip(items, shares, strict=True):
                item.n_tokens = share
        return [self._checked(row) for row in rows]

    def _checked(self, row: NDArray[np.float32]) -> NDArray[np.float32] | UpstreamError:
        if row.shape != (self.dim,):
            return self.errors.bad_answer(f"a vector of shape {row.shape}, not ({self.dim},)")
        norm = np.linalg.norm(row)
        if np.isfinite(norm) and norm > 0:
            return row
        return self.errors.bad_answer("a vector is zero or not finite")

    async def _ask_openai(self, texts: list[str]) -> tuple[list[NDArray[np.float32]], object]:
        reply = await self.api.embeddings.with_raw_response.create(
            model=self.model_id or "-", input=texts, encoding_format="base64"
        )
        body = json.loads(reply.http_response.content)
        if not isinstance(body, dict) or not isinstance(body.get("data"), list):
            raise self.errors.bad_answer(f"it is no list of vectors{self.errors.code(body)}")
        data = body["data"]
        found = {e.get("index", place): _read_vector(e["embedding"]) for place, e in enumerate(data)}
        if sorted(found) != list(range(len(data))):
            raise self.errors.bad_answer("its vectors are of other texts")
        usage = body.get("usage")
        counted = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        return [found[index] for index in range(len(found))], counted

    async def _ask_hub(self, texts: list[str]) -> tuple[list[NDArray[np.float32]], object]:
        model = self.model_id if self.endpoint.provider else self._embed_url
        # Too long texts are cut, as a local model does.
        rows = await self._hub.feature_extraction(texts, model=model, truncate=True)
        if rows.ndim != 2:
            problem = f"an array of shape {rows.shape}: one vector for each text is wanted"
            raise self.errors.bad_answer(problem)
        return list(rows), None

    async def _find_protocol(self) -> None:
        wanted = self.model.remote.protocol
        self._embed_url = self.model.source
        if self.endpoint.provider:
            wanted = "hf"
        if wanted in ("auto", "tei"):
            info = await self._tei_info()
            if info or wanted == "tei":
                self.protocol, self._embed_url = "tei", f"{self.endpoint.root}/embed"
                self.limits.items = min(self.limits.items, info.get("max_client_batch_size", 32))
                self.limits.tokens = min(self.limits.tokens, info.get("max_batch_tokens", math.inf))
                self.max_tokens = info.get("max_input_length")
        elif wanted == "hf":
            self.protocol = "hf"

    async def _tei_info(self) -> dict[str, Any]:
        """Return what TEI says of itself; empty where the server is another, or away."""
        try:
            async with asyncio.timeout(CONNECT_S):
                reply = await self.http.get(f"{self.endpoint.root}/info")
            info = reply.json() if reply.is_success else {}
        except (TimeoutError, httpx2.HTTPError, ValueError):
            return {}
        numbers = ("max_client_batch_size", "max_batch_tokens", "max_input_length")
        is_tei = isinstance(info, dict) and isinstance(info.get("max_client_batch_size"), int)
        return {name: info[name] for name in numbers if isinstance(info.get(name), int)} if is_tei else {}

    async def _find_dim(self, upstream: Upstream) -> None:
        text = Text(text="A penstock feeds a turbine.", n_tokens=8)
        until, problem = time.monotonic() + START_S, ""
        timeout_s = self.settings.timeout_s
        while time.monotonic() < until:
            try:
                permit = await upstream.ask(text.n_tokens, within_s=START_S, timeout_s=timeout_s)
                problem = permit.trouble or problem
                if not permit.is_granted:
                    await asyncio.sleep(min(permit.wait_s, until - time.monotonic()))
                    continue
                await asyncio.sleep(permit.wait_s)
                async with asyncio.timeout(timeout_s):
                    (found,) = await self.call([text])
                await upstream.answered()
                if isinstance(found, PenstockError):
                    raise ModelLoadError(self.name, str(found))
                return
            except Fault as fault:
                problem = str(fault.error)
                if fault.kind == "busy":
                    await upstream.hold(problem, fault.retry_after_s)
                elif fault.kind == "failed":
                    await upstream.failed(problem)
                    await asyncio.sleep(1.0)
                else:
                    raise ModelLoadError(self.name, problem) from None
            except TimeoutError:
                problem = f"no answer within {timeout_s:g} s"
            except (redis.RedisError, OSError) as error:
                problem = f"the broker's Redis is away: {type(error).__name__}"
                await asyncio.sleep(1.0)
        raise ModelLoadError(self.name, f"{problem}; to start without the server, set remote.dim")


class _Hub(AsyncInferenceClient):
    """Hugging Face's client over our connections: its own would send the user's token anywhere."""

    def __init__(self, http: httpx2.AsyncClient, provider: str | None) -> None:
        # With no key it looks for the user's.
        super().__init__(provider=provider, api_key=_ROUTED)  # type: ignore[arg-type]  # it checks the name itself
        self.http = http

    async def _get_async_client(self) -> httpx2.AsyncClient:
        return self.http


def _read_vector(found: object) -> NDArray[np.float32]:
    if isinstance(found, str):
        return np.frombuffer(base64.b64decode(found, validate=True), dtype="<f4").astype(np.float32)
    return np.asarray(found, dtype=np.float32)
