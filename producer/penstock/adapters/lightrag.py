"""Functions for LightRAG that Penstock's workers answer; written against lightrag-hku 1.5.7.

What LightRAG does with its functions, and what these therefore do:

- it copies itself with all it was given: they are plain functions, and what they hold may be copied;
- it calls from one event loop or another: see `penstock.adapters.bridge`;
- it cancels a call after twice its timeout, and never calls again: they retry by themselves, give up a little
  earlier, and take the job of a cancelled call back;
- it puts a prefix into errors, by building them anew: theirs take one string;
- it hands over its storage and more besides: what is not an option of ours is left out.
"""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from penstock.adapters.bridge import UNTIL_LATE, Bridge, patiently, pieces
from penstock.client import DEFAULT_URL, AsyncClient
from penstock.conversation import ResponseFormat
from penstock.errors import (
    DeadlineExceededError,
    IncompleteOutputError,
    PenstockError,
    ResultTimeoutError,
    UnknownModelError,
    WrongTaskError,
)
from penstock.extras import how_to_install
from penstock.options import GenerateOptions
from penstock.registry import ModelInfo
from penstock.request import PriorityName, Task
from penstock.result import RerankResult, Vectors
from penstock.retry import WaitPolicy

try:
    from lightrag import LightRAG
    from lightrag.utils import EmbeddingFunc, TruncatedResponse
except ImportError as error:
    raise ImportError(f"LightRAG is missing: {how_to_install('lightrag')}") from error

logger = logging.getLogger(__name__)

CANCELLED_AT: Final = 2
"""LightRAG cancels a call after this many times its timeout (`priority_limit_async_func_call`)."""
BUDGET_SHARE: Final = 0.9
"""Share of that time that a call takes at most, all its attempts together."""

KEYWORDS: Final[ResponseFormat] = {
    "type": "json_schema",
    "json_schema": {
        "name": "keywords",
        "schema": {
            "type": "object",
            "properties": {
                kind: {"type": "array", "items": {"type": "string", "maxLength": 60}, "maxItems": 5}
                for kind in ("high_level_keywords", "low_level_keywords")
            },
            "required": ["high_level_keywords", "low_level_keywords"],
            "additionalProperties": False,
        },
    },
}
"""Format of the keywords that LightRAG reads of a query; bounded, so that any model comes to an end."""

_RENAMED: Final = {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens"}
_PASSED_ON: Final = frozenset(GenerateOptions.__annotations__) - {
    "system_prompt",
    "history",
    "response_format",
    "deadline_s",
    "wait",
}


class CallFailedError(PenstockError):
    """A call of LightRAG's has no answer; the text says why."""


class CallTimeoutError(CallFailedError):
    """A call of LightRAG's has no answer in the time that LightRAG gives it."""


class LightRAGModels(Bridge):
    """A client whose models serve one or more LightRAG instances.

    ```python
    with LightRAGModels("redis://localhost:6379/0", llm="chat", embedding="minilm") as models:
        rag = LightRAG(working_dir="rag", **models.arguments())
    ```

    Attributes:
        llm_model_func: LightRAG's argument of this name; answers with text, or with an async iterator of
            text where it is called with `stream=True`. An answer cut by its length limit is a
            `TruncatedResponse`, which LightRAG uses and does not cache.
        embedding_func: LightRAG's argument of this name; float32, shape (n_texts, dim). Queries go before
            other texts.
        rerank_model_func: LightRAG's argument of this name; the best first. None without `rerank`.

    Args:
        url: Redis that holds the queues; the models must have been announced by workers.
        results_url: Redis that holds the results, where that is another server.
        llm: model that generates.
        embedding: model that embeds.
        rerank: cross-encoder; None leaves the order of what was found.
        llm_options: options of each generation that does not set its own.
        tenant: tenant that all these jobs belong to; tenants take turns.
        wait: retries of what may pass, within LightRAG's time; None tries once.
        query_prompt_name: prompt of the embedding model that goes before queries.
        document_prompt_name: prompt that goes before other texts.
        llm_timeout_s: LightRAG's `default_llm_timeout`, seconds; None asks the calling instance.
        embedding_timeout_s: LightRAG's `default_embedding_timeout`, seconds; None takes LightRAG's own, which
            `EMBEDDING_TIMEOUT` sets.
        rerank_timeout_s: LightRAG's `default_rerank_timeout`, seconds; None takes LightRAG's own, which
            `RERANK_TIMEOUT` sets.

    Raises:
        UnknownModelError: no worker has announced one of the models.
        WrongTaskError: one of them does something else.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        results_url: str | None = None,
        llm: str,
        embedding: str,
        rerank: str | None = None,
        llm_options: GenerateOptions | None = None,
        tenant: str | None = None,
        wait: WaitPolicy | None = UNTIL_LATE,
        query_prompt_name: str | None = None,
        document_prompt_name: str | None = None,
        llm_timeout_s: float | None = None,
        embedding_timeout_s: float | None = None,
        rerank_timeout_s: float | None = None,
    ) -> None:
        super().__init__(url, results_url=results_url)
        self._llm = llm
        try:
            served = self.models()
            _find(served, llm, "generate")
            info = _find(served, embedding, "embed")
            if rerank is not None:
                _find(served, rerank, "rerank")
        except BaseException:
            self.close()
            raise
        prompts = {"query": query_prompt_name, "document": document_prompt_name}
        sending = {"tenant": tenant, "wait": wait}
        self.llm_model_func = _generation(self, llm, {**sending, **(llm_options or {})}, llm_timeout_s)
        self.embedding_func = EmbeddingFunc(
            embedding_dim=info.dim,
            max_token_size=info.max_tokens,
            model_name=embedding,
            supports_asymmetric=True,
            func=_embedding(
                self,
                embedding,
                prompts,
                sending,
                embedding_timeout_s or LightRAG.default_embedding_timeout,
            ),
        )
        self.rerank_model_func = (
            None
            if rerank is None
            else _reranking(self, rerank, sending, rerank_timeout_s or LightRAG.default_rerank_timeout)
        )

    def arguments(self) -> dict[str, Any]:
        """Return keyword arguments for `LightRAG`: the functions, and that queries go first.

        `role_llm_configs` replaces `llm_model_kwargs` for its roles: set options by `llm_options` instead.
        """
        return {
            "llm_model_func": self.llm_model_func,
            "llm_model_name": self._llm,
            "embedding_func": self.embedding_func,
            "rerank_model_func": self.rerank_model_func,
            "role_llm_configs": {
                "keyword": {"kwargs": {"priority": "interactive", "keyword_extraction": True}},
                "query": {"kwargs": {"priority": "interactive"}},
            },
        }


def _generation(
    client: Bridge, model: str, defaults: Mapping[str, Any], own_timeout_s: float | None
) -> Callable[..., Awaitable[str | AsyncIterator[str]]]:
    async def llm_model_func(
        prompt: str,
        system_prompt: str | None = None,
        history_messages: Sequence[Mapping[str, Any]] | None = None,
        *,
        stream: bool = False,
        timeout: float | None = None,
        hashing_kv: Any = None,
        **options: Any,
    ) -> str | AsyncIterator[str]:
        if options.get("image_inputs"):
            raise CallFailedError(f"{model} takes no images")
        config = getattr(hashing_kv, "global_config", {})
        timeout_s = own_timeout_s or timeout or config.get("default_llm_timeout")
        asked: dict[str, Any] = {
            **defaults,
            **_known_options(options),
            "model": model,
            "prompt": prompt,
            "system_prompt": system_prompt,
            "history": _turns(history_messages),
            "timeout_s": _budget_s(timeout_s or LightRAG.default_llm_timeout),
        }
        if stream:
            return _stream(client, asked)
        try:
            answer = await client.wait(lambda each: patiently(each, each.generate, **asked))
        except IncompleteOutputError as error:
            return _cut(error.text)
        except PenstockError as error:
            raise _told(error) from error
        logger.info(
            "answered",
            extra={
                "model": model,
                "queued_s": round(answer.timings.queued_s, 3),
                "computed_s": round(answer.timings.computed_s, 3),
                "n_tokens": answer.usage.total_tokens,
            },
        )
        return _cut(answer.text) if answer.finish_reason == "length" else answer.text

    return llm_model_func


def _embedding(
    client: Bridge,
    model: str,
    prompts: Mapping[str, str | None],
    sending: Mapping[str, Any],
    timeout_s: float,
) -> Callable[..., Awaitable[NDArray[np.float32]]]:
    async def embedding_func(texts: list[str], context: str = "document") -> NDArray[np.float32]:
        """Return shape (n_texts, dim)."""
        priority: PriorityName = "interactive" if context == "query" else "default"

        async def embed(each: AsyncClient) -> Vectors:
            return await patiently(
                each,
                each.embed,
                texts=list(texts),
                model=model,
                prompt_name=prompts.get(context),
                priority=priority,
                timeout_s=_budget_s(timeout_s),
                **sending,
            )

        try:
            vectors = await client.wait(embed)
        except PenstockError as error:
            raise _told(error) from error
        return vectors.astype(np.float32, copy=False)

    return embedding_func


def _reranking(
    client: Bridge, model: str, sending: Mapping[str, Any], timeout_s: float
) -> Callable[..., Awaitable[list[dict[str, float]]]]:
    async def rerank_model_func(
        query: str, documents: list[str], top_n: int | None = None, **_: Any
    ) -> list[dict[str, float]]:
        async def rerank(each: AsyncClient) -> RerankResult:
            return await patiently(
                each,
                each.rerank,
                query=query,
                documents=documents,
                model=model,
                top_n=top_n,
                priority="interactive",
                timeout_s=_budget_s(timeout_s),
                **sending,
            )

        try:
            found = await client.wait(rerank)
        except PenstockError as error:
            told = _told(error)
            # LightRAG goes on without and tells nobody.
            logger.warning("not reranked: %s", told, extra={"model": model})
            raise told from error
        return [{"index": i, "relevance_score": float(found.scores[i])} for i in found.order]

    return rerank_model_func


async def _stream(client: Bridge, asked: dict[str, Any]) -> AsyncIterator[str]:
    stream = client.iterate(lambda each: pieces(each, **asked))
    try:
        async with aclosing(stream) as arriving:  # else its job would go on until the loop finds the time
            async for piece in arriving:
                if piece.text:  # else it is what the model thinks, or the end
                    yield piece.text
    except PenstockError as error:
        raise _told(error) from error


def _told(error: PenstockError) -> CallFailedError:
    is_late = isinstance(error, ResultTimeoutError | DeadlineExceededError)
    return (CallTimeoutError if is_late else CallFailedError)(f"{type(error).__name__}: {error}")


def _known_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of LightRAG's keyword arguments is an option of a generation."""
    named = {_RENAMED.get(name, name): value for name, value in options.items() if value is not None}
    known = {name: value for name, value in named.items() if name in _PASSED_ON}
    if options.get("keyword_extraction"):
        known["response_format"] = KEYWORDS
    elif options.get("entity_extraction"):
        known["response_format"] = {"type": "json_object"}
    elif isinstance(options.get("response_format"), dict):
        known["response_format"] = options["response_format"]
    if "response_format" in known:
        known["stop"] = known["stop_token_ids"] = None  # the format says where the answer ends
    return known


def _cut(text: str) -> str:
    found: str = TruncatedResponse(text)  # LightRAG has no types
    return found


def _turns(history: Sequence[Mapping[str, Any]] | None) -> list[dict[str, str]]:
    return [{"role": turn["role"], "content": turn["content"]} for turn in history or ()]


def _budget_s(timeout_s: float) -> float:
    return BUDGET_SHARE * CANCELLED_AT * timeout_s


def _find(served: Mapping[str, ModelInfo], name: str, task: Task) -> ModelInfo:
    if name not in served:
        raise UnknownModelError(name, sorted(served))
    if served[name].task != task:
        raise WrongTaskError(name, served[name].task, task)
    return served[name]
