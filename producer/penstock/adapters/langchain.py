"""LangChain's embedding and chat models, answered by Penstock's workers; against langchain-core 1.x."""

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing
from operator import itemgetter
from typing import Any, Final, Literal

import numpy as np
from pydantic import Field, PrivateAttr
from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from penstock.adapters.bridge import Bridge, conversation, shared
from penstock.client import DEFAULT_URL, AsyncClient
from penstock.errors import InvalidOptionError, InvalidTextError, PenstockError
from penstock.job import RESULT_TIMEOUT_S
from penstock.request import PriorityName, ResponseFormat
from penstock.result import GenerateResult, Usage
from penstock.stream import Piece

try:
    from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
    from langchain_core.embeddings import Embeddings
    from langchain_core.language_models import BaseChatModel, LanguageModelInput
    from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
    from langchain_core.messages.ai import UsageMetadata
    from langchain_core.output_parsers import BaseOutputParser, JsonOutputParser, PydanticOutputParser
    from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
    from langchain_core.runnables import Runnable, RunnableMap, RunnablePassthrough
    from langchain_core.utils.function_calling import convert_to_json_schema
    from langchain_core.utils.pydantic import is_basemodel_subclass
except ImportError as error:
    raise ImportError('LangChain is missing: pip install "penstock[langchain]"') from error

_ROLES: Final = {"system": "system", "human": "user", "ai": "assistant"}
_OPTIONS: Final = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "seed",
    "truncation",
    "response_format",
    "priority",
)
"""Options that a call may set by `bind` or `invoke`, besides `model`, `max_tokens` and `stop`."""
FIRST_WAIT_S: Final = 0.2
LONGEST_WAIT_S: Final = 5.0


class PenstockEmbeddings(Embeddings):
    """An embedding model.

    Args:
        model: name it is served under.
        url: Redis that holds the queues.
        query_prompt_name: prompt of the model that goes before queries.
        document_prompt_name: prompt that goes before documents.
        priority: of documents; queries are interactive.
        timeout: how long to wait for a query or for each job of documents, seconds.
    """

    def __init__(
        self,
        model: str,
        *,
        url: str = DEFAULT_URL,
        query_prompt_name: str | None = None,
        document_prompt_name: str | None = None,
        priority: PriorityName = "default",
        timeout: float = RESULT_TIMEOUT_S,
    ) -> None:
        self.model = model
        self._client = shared(url)
        self._query_prompt_name, self._document_prompt_name = query_prompt_name, document_prompt_name
        self._priority, self._timeout_s = priority, timeout

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Embed any number of texts."""
        parts = self._client.embed_many(
            texts,
            model=self.model,
            prompt_name=self._document_prompt_name,
            priority=self._priority,
            timeout_s=self._timeout_s,
        )
        return [row for part in parts for row in part.tolist()]

    def embed_query(self, text: str) -> list[float]:
        """Embed one text, before those that are not interactive."""
        return _only(self._client.call(lambda client: self._query(client, text)))

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        """See `embed_documents`."""
        parts = self._client.iterate(
            lambda client: client.embed_many(
                texts,
                model=self.model,
                prompt_name=self._document_prompt_name,
                priority=self._priority,
                timeout_s=self._timeout_s,
            )
        )
        return [row async for part in parts for row in part.tolist()]

    async def aembed_query(self, text: str) -> list[float]:
        """See `embed_query`."""
        return _only(await self._client.wait(lambda client: self._query(client, text)))

    async def _query(self, client: AsyncClient, text: str) -> Any:
        return await client.embed(
            [text],
            model=self.model,
            prompt_name=self._query_prompt_name,
            priority="interactive",
            timeout_s=self._timeout_s,
            deadline_s=self._timeout_s,
        )


class ChatPenstock(BaseChatModel):
    """A chat model.

    `with_structured_output` constrains the model's tokens by the schema, so that any model follows it.

    Attributes:
        model: name it is served under.
        url: Redis that holds the queues.
        temperature: 0 is greedy; None leaves it to the deployment, as for the other options.
        max_tokens: upper bound of the answer, tokens.
        stop: the answer ends before the first of these.
        priority: which waiting jobs go first.
        timeout: how long to wait for an answer, or for the next piece of one, seconds.
        max_retries: attempts after the first, for errors that may pass; a stream is not begun again.
    """

    model: str
    url: str = Field(default=DEFAULT_URL, repr=False)  # it may hold a password
    temperature: float | None = None
    max_tokens: int | None = None
    stop: list[str] | None = None
    priority: PriorityName = "default"
    timeout: float = RESULT_TIMEOUT_S
    max_retries: int = 2

    _client: Bridge = PrivateAttr()

    def model_post_init(self, context: Any, /) -> None:
        """Take the process' client of this URL; it connects at the first call."""
        super().model_post_init(context)
        self._client = shared(self.url)

    @property
    def _llm_type(self) -> str:
        return "penstock"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {"model": self.model, "temperature": self.temperature, "max_tokens": self.max_tokens}

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        del run_manager
        asked = self._ask(messages, stop, kwargs)
        return _result(self._client.call(lambda client: self._answer(client, asked)))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        del run_manager
        asked = self._ask(messages, stop, kwargs)
        return _result(await self._client.wait(lambda client: self._answer(client, asked)))

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        asked = self._ask(messages, stop, kwargs)
        for piece in self._client.stream(**asked, timeout_s=self.timeout):
            chunk = _chunk(piece, asked["model"])
            if run_manager:
                run_manager.on_llm_new_token(piece.text, chunk=chunk)
            yield chunk

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        asked = self._ask(messages, stop, kwargs)
        stream = self._client.iterate(lambda each: each.stream(**asked, timeout_s=self.timeout))
        async with aclosing(stream) as pieces:
            async for piece in pieces:
                chunk = _chunk(piece, asked["model"])
                if run_manager:
                    await run_manager.on_llm_new_token(piece.text, chunk=chunk)
                yield chunk

    def with_structured_output(
        self,
        schema: dict[str, Any] | type,
        *,
        include_raw: bool = False,
        method: Literal["json_schema", "function_calling", "json_mode"] = "json_schema",
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, Any]:
        """Return a model whose answers follow a schema.

        Args:
            schema: a pydantic class, a TypedDict or a JSON schema with a title; pydantic objects come back
                for the first, else dicts.
            include_raw: give a dict of `raw`, `parsed` and `parsing_error` instead.
            method: `json_schema` constrains the tokens by the schema, and `function_calling` is the same;
                `json_mode` constrains them to any JSON object.
            strict: without effect: a schema is always followed.
            **kwargs: none is known.
        """
        del strict
        if kwargs:
            raise InvalidOptionError(next(iter(kwargs)), "set", "with_structured_output has no such option")
        plain = convert_to_json_schema(schema)
        wanted: ResponseFormat = {"type": "json_object"}
        if method != "json_mode":
            wanted = {"type": "json_schema", "json_schema": {"name": plain["title"], "schema": plain}}
        llm = self.bind(
            response_format=wanted,
            ls_structured_output_format={"kwargs": {"method": method}, "schema": schema},
        )
        is_class = isinstance(schema, type) and is_basemodel_subclass(schema)
        parser: BaseOutputParser[Any]
        parser = PydanticOutputParser(pydantic_object=schema) if is_class else JsonOutputParser()
        if not include_raw:
            return llm | parser
        parsed = RunnablePassthrough.assign(parsed=itemgetter("raw") | parser, parsing_error=lambda _: None)
        unparsed = RunnablePassthrough.assign(parsed=lambda _: None)
        return RunnableMap(raw=llm) | parsed.with_fallbacks([unparsed], exception_key="parsing_error")

    def _ask(
        self, messages: Sequence[BaseMessage], stop: list[str] | None, options: dict[str, Any]
    ) -> dict[str, Any]:
        """Return the arguments of a generation."""
        own = {
            "model": self.model,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "stop": None if "response_format" in options else self.stop,
            "priority": self.priority,
        }
        asked = own | options | ({} if stop is None else {"stop": stop})
        known = {name: asked[name] for name in ("model", *_OPTIONS) if asked.get(name) is not None}
        turns = [_turn(index, message) for index, message in enumerate(messages)]
        return {
            **conversation(turns),
            **known,
            "max_new_tokens": asked["max_tokens"],
            "stop": asked["stop"] or None,
            "deadline_s": self.timeout,
        }

    async def _answer(self, client: AsyncClient, asked: dict[str, Any]) -> GenerateResult:
        retrying = AsyncRetrying(
            retry=retry_if_exception(lambda error: isinstance(error, PenstockError) and error.retryable),
            wait=wait_random_exponential(FIRST_WAIT_S, LONGEST_WAIT_S),
            stop=stop_after_attempt(1 + self.max_retries),
            reraise=True,
        )
        return await retrying(client.generate, **asked, timeout_s=self.timeout)


def _turn(index: int, message: BaseMessage) -> tuple[str, str]:
    role = _ROLES.get(message.type.removesuffix("MessageChunk").lower())
    if role is None:
        raise InvalidTextError(index, f"is a {type(message).__name__}; only system, human and AI messages go")
    blocks = [message.content] if isinstance(message.content, str) else message.content
    for block in blocks:
        if isinstance(block, dict) and block.get("type") != "text":
            raise InvalidTextError(index, f"holds a block of type {block.get('type')!r}; only text goes")
    return role, "".join(block if isinstance(block, str) else block["text"] for block in blocks)


def _result(answer: GenerateResult) -> ChatResult:
    message = AIMessage(
        content=answer.text,
        usage_metadata=_usage(answer.usage),
        response_metadata={"model_name": answer.model, "finish_reason": answer.finish_reason},
    )
    return ChatResult(generations=[ChatGeneration(message=message)])


def _chunk(piece: Piece, model: str) -> ChatGenerationChunk:
    if piece.finish_reason is None or piece.usage is None:
        return ChatGenerationChunk(message=AIMessageChunk(content=piece.text))
    message = AIMessageChunk(
        content=piece.text,
        usage_metadata=_usage(piece.usage),
        response_metadata={"model_name": model, "finish_reason": piece.finish_reason},
        chunk_position="last",
    )
    return ChatGenerationChunk(message=message)


def _usage(usage: Usage) -> UsageMetadata:
    return UsageMetadata(
        input_tokens=usage.prompt_tokens,
        output_tokens=usage.completion_tokens,
        total_tokens=usage.total_tokens,
    )


def _only(vectors: "np.ndarray[Any, np.dtype[Any]]") -> list[float]:
    """Return the row of an array of shape (1, dim)."""
    (row,) = vectors.tolist()
    return [float(x) for x in row]
