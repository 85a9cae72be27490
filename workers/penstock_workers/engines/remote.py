"""Text to vectors and answers at a server: what is sent, what may come back, and what is wrong with it.

One of two well-kept clients speaks: `openai` with servers of OpenAI's kind, `huggingface_hub` with TEI, with
endpoints that take `inputs`, and with Inference Providers. Both without retries and secrets of their own: the
connections are ours, and send the token to one server alone.
"""

import asyncio
import base64
import hashlib
import json
import logging
import math
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal, Self
from urllib.parse import urlsplit

import httpx2
import numpy as np
import openai
import redis
from huggingface_hub import AsyncInferenceClient, constants
from numpy.typing import NDArray

from penstock.broker import connect
from penstock.errors import (
    IncompleteOutputError,
    InvalidFormatError,
    InvalidOptionError,
    ModelLoadError,
    PenstockError,
    UpstreamAnswerError,
    UpstreamError,
    UpstreamRefusedError,
    UpstreamUnavailableError,
)
from penstock.request import EmbedRequest, GenerateRequest, GenerationOptions
from penstock.result import FinishReason, Vectors
from penstock.settings import PROVIDER, ModelSettings
from penstock_workers.calling import Limits
from penstock_workers.engines.formats import form, read_ranges
from penstock_workers.upstream import MAX_LOADING_S, Fault, Upstream, read_delay, read_spent

logger = logging.getLogger(__name__)
for chatty in ("httpx2", "httpcore2", "openai"):  # a line for each request, and texts in those for debugging
    logging.getLogger(chatty).setLevel(logging.WARNING)

START_S: Final = 60.0
"""How long the start waits for a server that has to be asked for the width of its vectors."""
CONNECT_S: Final = 10.0
REQUEST_TOKENS: Final = 32_768
"""Of the texts of one request, by estimate, unless the settings or the server say otherwise."""
BYTES_PER_TOKEN: Final = 4.0
"""Until the server has counted."""
DEFAULTS: Final = GenerationOptions(max_new_tokens=256, truncation="error")

_SENT_HEADERS: Final = frozenset(
    {"accept", "accept-encoding", "connection", "content-length", "content-type", "host", "user-agent"}
    | {"x-stainless-raw-response"}  # a note of `openai` to itself
)
"""All that goes along: the clients would add accounts and projects that they find in the environment."""
_ROUTED: Final = "hf_routed"
"""In place of a token: what begins like one of Hugging Face's goes to its router. Never sent."""
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


@dataclass(slots=True, kw_only=True)
class Text:
    """One text to embed.

    Attributes:
        text: as it is sent.
        n_tokens: by estimate; its share of what the server counted once it is answered.
    """

    text: str
    n_tokens: int

    @property
    def cost_tokens(self) -> int:
        """All of it."""
        return self.n_tokens


@dataclass(slots=True, kw_only=True)
class Turns:
    """One conversation to go on with.

    Attributes:
        fields: what is sent, but for the model's id.
        n_tokens: of the prompt; by estimate, then as the server counted.
        n_new_tokens: the most there may be, then those there are.
        has_format: the answer has to be JSON.
        cut_tokens: always 0; nothing is cut here.
        n_choices: always 1.
        n_likeliest: always None; no log-probabilities.
    """

    fields: Mapping[str, Any]
    n_tokens: int
    n_new_tokens: int
    has_format: bool
    cut_tokens: int = 0
    n_choices: int = 1
    n_likeliest: None = None

    def choices(self) -> list[Self]:
        """Return what is asked for each answer."""
        return [self]

    @property
    def cost_tokens(self) -> int:
        """Prompt and answer."""
        return self.n_tokens + self.n_new_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the model said.

    Attributes:
        text: the new text alone.
        finish_reason: `stop` or `length`.
        n_tokens: new tokens, as the server counted.
        reasoning: what it thought before, where the server tells it apart.
        tool_calls: none: tools are refused.
        logprobs: none, likewise.
    """

    text: str
    finish_reason: FinishReason
    n_tokens: int
    reasoning: str | None = None
    tool_calls: None = None
    logprobs: None = None


class Server:
    """A server of one model: how it is reached and what its refusals mean.

    Attributes:
        name: the name the model is served under.
        server: its host, for errors.
        limits: what one request may hold.
        timeout_s: how long one may take.
        patience_s: how long a job without a deadline waits.
        max_concurrency: requests under way.
    """

    def __init__(self, name: str, model: ModelSettings, broker_url: str) -> None:
        self.name, self._model, self._broker_url = name, model, broker_url
        self.timeout_s, self.patience_s = model.remote.timeout_s, model.remote.patience_s
        self.max_concurrency = model.remote.max_concurrency
        self.model_id = model.remote.model or ""
        self._bytes_per_token = BYTES_PER_TOKEN
        try:
            token = model.remote.token()
        except ValueError as error:
            raise ModelLoadError(name, f"remote.{error}") from error
        self._token = token.get_secret_value() if token else None
        self._provider = model.source.removeprefix(PROVIDER) if model.source.startswith(PROVIDER) else None
        if self._provider and not self.model_id:
            raise ModelLoadError(name, "providers have many models: name one with remote.model")
        router = constants.INFERENCE_PROXY_TEMPLATE.format(provider="v1")
        self._url = router if self._provider else model.source.rstrip("/")
        parts = urlsplit(self._url)
        if parts.path in ("", "/"):
            self._url = f"{self._url}/v1"
        self.server = parts.netloc
        self._root = self._url.removesuffix("/v1")

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Upstream]:
        """See `calling.Remote.open`."""
        store = connect(self._broker_url)
        limit = self._model.rate_limit
        self._upstream = Upstream(store, self._root, self.model_id, self._token, limit)
        try:
            async with self._connect() as self._http:
                self._openai = openai.AsyncOpenAI(
                    api_key="-", base_url=self._url, max_retries=0, timeout=None, http_client=self._http
                )
                self._hub = _Hub(self._http, self._provider)
                yield self._upstream
        finally:
            await store.aclose()

    def _connect(self) -> httpx2.AsyncClient:
        own = httpx2.URL(self._url)

        async def guard(request: httpx2.Request) -> None:
            url = request.url
            if (url.scheme, url.host, url.port) != (own.scheme, own.host, own.port):
                raise self._refused(0, f"a request to {url.host} was about to be sent")
            for name in set(request.headers) - _SENT_HEADERS:
                del request.headers[name]
            if self._token:
                request.headers["Authorization"] = f"Bearer {self._token}"

        async def note(response: httpx2.Response) -> None:
            if response.is_success and (spent_s := read_spent(response.headers)):
                try:
                    await self._upstream.hold("its allowance is used up", spent_s)
                except (redis.RedisError, OSError):
                    logger.warning("%s: other workers do not hear that its allowance is used up", self.name)
            elif response.is_redirect:
                raise self._refused(response.status_code, "it redirects, which is not followed")
            elif response.is_error and int(response.headers.get("content-length", 0)) < 1 << 20:
                await response.aread()

        return httpx2.AsyncClient(
            event_hooks={"request": [guard], "response": [note]},
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
                reply = await self._http.get(f"{self._url}/models")
            if reply.status_code in (401, 403):
                raise ModelLoadError(self.name, str(self._refused(reply.status_code, self._hint(401))))
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

    def _estimate(self, text: str) -> int:
        return max(1, math.ceil(len(text.encode()) / self._bytes_per_token))

    def _counted(self, n_bytes: int, n_tokens: object) -> int | None:
        """Learn from what the server counted; None where it did not."""
        if not isinstance(n_tokens, int) or n_tokens < 1:
            return None
        self._bytes_per_token += 0.1 * (n_bytes / n_tokens - self._bytes_per_token)
        return n_tokens

    def _refused(self, status: int, problem: str) -> UpstreamRefusedError:
        return UpstreamRefusedError(self.name, self.server, status, problem)

    def _bad_answer(self, problem: str) -> UpstreamAnswerError:
        return UpstreamAnswerError(self.name, self.server, problem)

    def _away(self, problem: str) -> UpstreamUnavailableError:
        return UpstreamUnavailableError(self.name, self.server, problem)

    def _hint(self, status: int) -> str:
        hint = _HINTS.get(status, "")
        where = self._model.remote.token_env or self._model.remote.token_file
        if status in (401, 403):
            hint += f" ({where or 'none is configured'})"
        return hint

    def _explain(self, error: Exception) -> Fault:
        """Turn whatever a client raised into what is to be done about it. Quotes nothing that was sent."""
        if isinstance(error, Fault):
            return error
        if isinstance(error, UpstreamRefusedError):
            return Fault("refused", error)
        if isinstance(error, UpstreamError):
            return Fault("failed", error)
        if isinstance(error, PenstockError):
            return Fault("refused", error)
        if isinstance(error.__cause__, PenstockError):  # of ours, in a client's clothes
            return self._explain(error.__cause__)
        response = getattr(error, "response", None)
        if isinstance(response, httpx2.Response):
            return self._explain_status(response)
        if isinstance(error, openai.APIConnectionError | httpx2.HTTPError | OSError):
            cause = error.__cause__ if isinstance(error, openai.APIConnectionError) else error
            return Fault("failed", self._away(f"{type(cause or error).__name__}"))
        if isinstance(error, openai.APIError):  # an event of a stream
            return Fault("failed", self._bad_answer(f"an error inside it{_code(error.body, self._token)}"))
        return Fault("failed", self._bad_answer(f"{type(error).__name__} while it was read"))

    def _explain_status(self, response: httpx2.Response) -> Fault:
        status = response.status_code
        body = _json_of(response)
        code = _code(body, self._token)
        problem = f"{status} {response.reason_phrase}{code}"
        if hint := self._hint(status):
            problem += f": {hint}"
        if 200 <= status < 300:
            return Fault("failed", self._bad_answer("it is no JSON"))
        if (status == 429 and code.strip(" ()") not in _PERMANENT) or status in (503, 529):
            return Fault("busy", self._away(problem), _loading_s(body) or read_delay(response.headers))
        if status == 413:
            return Fault("size", self._refused(status, problem))
        if status in (400, 422):
            return Fault("item", self._refused(status, problem))
        if status in (408, 409, 424, 425) or status >= 500:
            return Fault("failed", self._away(problem))
        return Fault("refused", self._refused(status, problem))


class RemoteEmbedder(Server):
    """An embedding model at a server.

    Attributes:
        dim: width of a vector.
        max_tokens: longer texts are cut; None where the server does not say.
        int8_ranges: see `formats.form`; None: int8 is refused.
        fingerprint: of what decides its vectors, as far as it is known here.
        protocol: what the server speaks.
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

    @classmethod
    def load(cls, name: str, model: ModelSettings, broker_url: str) -> Self:
        """Find out what the server speaks and takes, and the width of its vectors.

        Raises:
            ModelLoadError: one line that says why.
        """
        engine = cls(name, model, broker_url)
        asyncio.run(engine._find_out(model))
        parts = (model.source, engine.model_id, engine.protocol, engine.dim)
        engine.fingerprint = hashlib.sha256(repr(parts).encode()).hexdigest()
        if model.int8_ranges is not None:
            try:
                engine.int8_ranges = read_ranges(model.int8_ranges, engine.dim)
            except (OSError, ValueError) as error:
                raise ModelLoadError(name, f"int8_ranges: {error}") from error
        return engine

    def prepare(self, request: EmbedRequest) -> list[Text]:
        """Return a request's texts.

        Raises:
            InvalidOptionError: see `check`.
        """
        prompt = self.check(request) or ""
        texts = [prompt + text for text in request.texts]
        return [Text(text=text, n_tokens=self._estimate(text)) for text in texts]

    def check(self, request: EmbedRequest) -> str | None:
        """Return the prompt that goes before each text.

        Raises:
            InvalidOptionError: such vectors are not to be had here.
        """
        if request.prompt_name is not None:
            allowed = "a remote model's prompts have no names here: pass prompt"
            raise InvalidOptionError("prompt_name", repr(request.prompt_name)[:80], allowed)
        if request.truncate_dim is not None and request.truncate_dim > self.dim:
            raise InvalidOptionError("truncate_dim", str(request.truncate_dim), f"at most {self.dim}")
        if request.precision == "int8" and self.int8_ranges is None:
            raise InvalidOptionError("precision", "'int8'", "a remote model needs int8_ranges for it")
        return request.prompt

    def finish(self, request: EmbedRequest, vectors: Sequence[NDArray[np.float32]]) -> Vectors:
        """Return a request's vectors in the form it asked for; see `formats.form`."""
        found = np.stack(vectors) if vectors else np.zeros((0, self.dim), dtype=np.float32)
        return form(found, request, self.int8_ranges)

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
            raise self._explain(error) from error
        if len(rows) != len(items):
            raise Fault("failed", self._bad_answer(f"{len(rows)} vectors for {len(items)} texts"))
        self.dim = self.dim or len(rows[0])
        _share_out(items, self._counted(sum(len(text.encode()) for text in texts), n_tokens))
        return [self._checked(row) for row in rows]

    def _checked(self, row: NDArray[np.float32]) -> NDArray[np.float32] | UpstreamError:
        if row.shape != (self.dim,):
            return self._bad_answer(f"a vector of shape {row.shape}, not ({self.dim},)")
        norm = np.linalg.norm(row)
        return row if np.isfinite(norm) and norm > 0 else self._bad_answer("a vector is zero or not finite")

    async def _ask_openai(self, texts: list[str]) -> tuple[list[NDArray[np.float32]], object]:
        reply = await self._openai.embeddings.with_raw_response.create(
            model=self.model_id or "-", input=texts, encoding_format="base64"
        )
        body = json.loads(reply.http_response.content)
        if not isinstance(body, dict) or not isinstance(body.get("data"), list):
            raise self._bad_answer(f"it is no list of vectors{_code(body, self._token)}")
        data = body["data"]
        found = {e.get("index", place): _read_vector(e["embedding"]) for place, e in enumerate(data)}
        if sorted(found) != list(range(len(data))):
            raise self._bad_answer("its vectors are of other texts")
        usage = body.get("usage")
        counted = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        return [found[index] for index in range(len(found))], counted

    async def _ask_hub(self, texts: list[str]) -> tuple[list[NDArray[np.float32]], object]:
        model = self.model_id if self._provider else self._embed_url
        # Too long texts are cut, as a local model does.
        rows = await self._hub.feature_extraction(texts, model=model, truncate=True)
        if rows.ndim != 2:
            raise self._bad_answer(f"an array of shape {rows.shape}: one vector for each text is wanted")
        return list(rows), None

    async def _find_out(self, model: ModelSettings) -> None:
        async with self.open() as upstream:
            await self._find_protocol(model)
            if self.protocol == "openai" and not self.model_id:
                await self.find_model()
            if not self.dim:
                await self._find_dim(upstream)

    async def _find_protocol(self, model: ModelSettings) -> None:
        wanted = model.remote.protocol
        self._embed_url = model.source
        if self._provider:
            wanted = "hf"
        if wanted in ("auto", "tei"):
            info = await self._tei_info()
            if info or wanted == "tei":
                self.protocol, self._embed_url = "tei", f"{self._root}/embed"
                self.limits.items = min(self.limits.items, info.get("max_client_batch_size", 32))
                self.limits.tokens = min(self.limits.tokens, info.get("max_batch_tokens", math.inf))
                self.max_tokens = info.get("max_input_length")
        elif wanted == "hf":
            self.protocol = "hf"

    async def _tei_info(self) -> dict[str, Any]:
        """Return what TEI says of itself; empty where the server is another, or away."""
        try:
            async with asyncio.timeout(CONNECT_S):
                reply = await self._http.get(f"{self._root}/info")
            info = reply.json() if reply.is_success else {}
        except (TimeoutError, httpx2.HTTPError, ValueError):
            return {}
        numbers = ("max_client_batch_size", "max_batch_tokens", "max_input_length")
        is_tei = isinstance(info, dict) and isinstance(info.get("max_client_batch_size"), int)
        return {name: info[name] for name in numbers if isinstance(info.get(name), int)} if is_tei else {}

    async def _find_dim(self, upstream: Upstream) -> None:
        text = Text(text="A penstock feeds a turbine.", n_tokens=8)
        until, problem = time.monotonic() + START_S, ""
        while time.monotonic() < until:
            try:
                leave = await upstream.ask(text.n_tokens, within_s=START_S, timeout_s=self.timeout_s)
                problem = leave.trouble or problem
                if not leave.may_leave:
                    await asyncio.sleep(min(leave.wait_s, until - time.monotonic()))
                    continue
                await asyncio.sleep(leave.wait_s)
                async with asyncio.timeout(self.timeout_s):
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
                problem = f"no answer within {self.timeout_s:g} s"
            except (redis.RedisError, OSError) as error:
                problem = f"the broker's Redis is away: {type(error).__name__}"
                await asyncio.sleep(1.0)
        raise ModelLoadError(self.name, f"{problem}; to start without the server, set remote.dim")


class RemoteGenerator(Server):
    """A chat model at a server of OpenAI's kind.

    Attributes:
        context_window: prompt and answer together, tokens; None where the server does not say.
    """

    def __init__(self, name: str, model: ModelSettings, broker_url: str) -> None:
        super().__init__(name, model, broker_url)
        self.limits = Limits(1, math.inf)
        self.context_window: int | None = None
        self._defaults = model.generation.over(DEFAULTS)
        if self._provider and self._provider != "auto":
            self.model_id = f"{self.model_id}:{self._provider}"  # as the router names it

    @classmethod
    def load(cls, name: str, model: ModelSettings, broker_url: str) -> Self:
        """Look whether the server knows token and model, as far as it tells without an answer to pay for.

        Raises:
            ModelLoadError: one line that says why.
        """
        engine = cls(name, model, broker_url)

        async def look() -> None:
            async with engine.open():
                engine.context_window = await engine.find_model()

        asyncio.run(look())
        return engine

    def prepare(self, request: GenerateRequest) -> Turns:
        """Turn a request into what is sent.

        Raises:
            InvalidOptionError: it cannot be done without the model's tokenizer.
            InvalidFormatError: not one of OpenAI's formats.
        """
        options = request.options().over(self._defaults)
        if options.truncation in ("oldest_turns", "middle") or options.context_window is not None:
            name = "context_window" if options.context_window is not None else "truncation"
            raise InvalidOptionError(name, "set", "a remote model's tokens cannot be counted here")
        has_calls = any(turn.tool_calls or turn.role == "tool" for turn in request.history)
        foreign = {
            "mode": request.mode == "complete",
            "tools": request.tools or has_calls,
            "n": request.n > 1,
            "logprobs": request.logprobs,
        }
        for name in (name for name, is_set in foreign.items() if is_set):
            raise InvalidOptionError(name, "set", "remote models are asked for one plain answer to turns")
        wanted = request.response_format
        if wanted and wanted["type"] in ("regex", "choice"):
            raise InvalidFormatError(
                f"{wanted['type']} is none of OpenAI's formats, which remote models have"
            )
        has_format = wanted is not None and wanted["type"] != "text"
        stop = [] if has_format else [*(options.stop or ())]
        known = {
            "max_tokens": options.max_new_tokens,
            "temperature": options.temperature,
            "top_p": options.top_p,
            "presence_penalty": options.presence_penalty,
            "seed": options.seed,
            "stop": stop or None,
            "response_format": _openai_format(request) if has_format else None,
        }
        extra = {
            "top_k": options.top_k,
            "min_p": options.min_p,
            "repetition_penalty": options.repetition_penalty,
            "stop_token_ids": None if has_format else options.stop_token_ids,
            "chat_template_kwargs": _thinking(options),
        }
        fields: dict[str, Any] = {name: value for name, value in known.items() if value is not None}
        fields["messages"] = [{"role": turn.role, "content": turn.content} for turn in request.messages()]
        if extra := {name: value for name, value in extra.items() if value is not None}:
            fields["extra_body"] = extra  # not OpenAI's: vLLM and others take them
        return Turns(
            fields=fields,
            n_tokens=sum(self._estimate(turn.content) + 4 for turn in request.messages()),
            n_new_tokens=options.max_new_tokens or 1,
            has_format=has_format,
        )

    async def call(
        self, items: Sequence[Turns], on_piece: Callable[[str], None] | None
    ) -> list[Answer | UpstreamError]:
        """Answer one conversation, piece by piece if somebody listens.

        Raises:
            Fault: there is no answer; `broken` if a part of it was passed on.
        """
        (turns,) = items
        heard: list[str] = []

        def pass_on(piece: str) -> None:
            assert on_piece is not None
            heard.append(piece)
            on_piece(piece)

        try:
            answer = await (self._ask(turns) if on_piece is None else self._stream(turns, pass_on))
        except Exception as error:
            fault = self._explain(error)
            if heard and fault.kind in ("busy", "failed"):
                problem = getattr(fault.error, "problem", str(fault.error))
                after = f"it ended after {sum(map(len, heard))} characters: {problem}"
                raise Fault("broken", self._bad_answer(after)) from error
            raise fault from error
        if turns.has_format and not _is_json(answer.text):
            problem = self._bad_answer("it does not follow response_format")
            if heard:
                raise Fault("refused", problem)
            return [problem]
        return [answer]

    async def _ask(self, turns: Turns) -> Answer:
        reply = await self._openai.chat.completions.with_raw_response.create(
            model=self.model_id, **turns.fields
        )
        body = json.loads(reply.http_response.content)
        if not isinstance(body, dict) or not body.get("choices"):
            raise self._bad_answer(f"it is no answer{_code(body, self._token)}")
        choice = body["choices"][0]
        said = choice["message"]
        thought = said.get("reasoning_content") or said.get("reasoning")
        return self._answer(turns, said["content"], choice["finish_reason"], body.get("usage"), thought)

    async def _stream(self, turns: Turns, pass_on: Callable[[str], None]) -> Answer:
        text, reason, usage = [], None, None
        stream = await self._openai.chat.completions.create(
            model=self.model_id, stream=True, stream_options={"include_usage": True}, **turns.fields
        )
        async with stream:
            async for chunk in stream:
                usage = chunk.usage.model_dump() if chunk.usage else usage
                for choice in chunk.choices or ():
                    if choice.delta and choice.delta.content:
                        text.append(choice.delta.content)
                        pass_on(choice.delta.content)
                    reason = choice.finish_reason or reason
        if reason is None:
            raise self._bad_answer("the stream ended before the answer did")
        return self._answer(turns, "".join(text), reason, usage)

    def _answer(
        self, turns: Turns, text: object, reason: object, usage: object, thought: object = None
    ) -> Answer:
        if not isinstance(text, str):
            raise self._bad_answer("it holds no text")
        counted = usage if isinstance(usage, dict) else {}
        n_bytes = sum(len(turn["content"].encode()) for turn in turns.fields["messages"])
        turns.n_tokens = self._counted(n_bytes, counted.get("prompt_tokens")) or turns.n_tokens
        n_new = counted.get("completion_tokens")
        turns.n_new_tokens = n_new if isinstance(n_new, int) else self._estimate(text)
        ended = _FINISH.get(str(reason))
        if ended is None:
            raise self._refused(200, f"the answer was ended by {_word(reason) or 'something unknown'}")
        if turns.has_format and ended == "length":
            raise IncompleteOutputError(turns.n_new_tokens, text)
        return Answer(
            text=text,
            finish_reason=ended,
            n_tokens=turns.n_new_tokens,
            reasoning=thought if isinstance(thought, str) else None,
        )


_FINISH: Final[dict[str, FinishReason]] = {
    "stop": "stop",
    "eos_token": "stop",  # TGI's word
    "stop_sequence": "stop",
    "length": "length",
}


class _Hub(AsyncInferenceClient):
    """Hugging Face's client over our connections: its own would send the user's token anywhere."""

    def __init__(self, http: httpx2.AsyncClient, provider: str | None) -> None:
        # With no key it looks for the user's.
        super().__init__(provider=provider, api_key=_ROUTED)  # type: ignore[arg-type]  # it checks the name itself
        self._http = http

    async def _get_async_client(self) -> httpx2.AsyncClient:
        return self._http


def _read_vector(found: object) -> NDArray[np.float32]:
    if isinstance(found, str):
        return np.frombuffer(base64.b64decode(found, validate=True), dtype="<f4").astype(np.float32)
    return np.asarray(found, dtype=np.float32)


def _share_out(items: Sequence[Text], n_tokens: int | None) -> None:
    """Give each text its share of what the server counted for all; the sum stays exact."""
    estimated = sum(item.n_tokens for item in items)
    if n_tokens is None:
        return
    before = given = 0
    for item in items:
        before += item.n_tokens
        share = round(n_tokens * before / estimated) - given
        given += share
        item.n_tokens = share


def _thinking(options: GenerationOptions) -> dict[str, bool] | None:
    return None if options.enable_thinking is None else {"enable_thinking": options.enable_thinking}


def _openai_format(request: GenerateRequest) -> dict[str, Any]:
    wanted: dict[str, Any] = json.loads(json.dumps(request.response_format))
    if wanted["type"] == "json_schema":
        wanted["json_schema"] = {"name": "answer", "strict": True} | wanted["json_schema"]
    return wanted


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _json_of(response: httpx2.Response) -> object:
    try:
        return response.json()
    except (ValueError, httpx2.HTTPError, httpx2.StreamError):
        return None


def _code(body: object, token: str | None) -> str:
    """Return a server's own word for what is wrong, in brackets; no sentence, which may quote the input."""
    fields = body if isinstance(body, dict) else {}
    inner = fields.get("error")
    for holder in (inner if isinstance(inner, dict) else {}, fields):
        for name in ("code", "error_type", "type"):
            word = _word(holder.get(name))
            if word and not (token and (word in token or token in word)):
                return f" ({word})"
    return ""


def _word(value: object) -> str:
    return value if isinstance(value, str) and re.fullmatch(r"[\w.-]{1,64}", value, re.ASCII) else ""


def _loading_s(body: object) -> float | None:
    """Return `estimated_time` of a model that is being loaded, within bounds, seconds."""
    seconds = body.get("estimated_time") if isinstance(body, dict) else None
    if not isinstance(seconds, int | float) or not math.isfinite(seconds):
        return None
    return min(max(float(seconds), 1.0), MAX_LOADING_S)
