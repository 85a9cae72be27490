"""LangChain's embedding and chat models, answered by Penstock's workers; against langchain-core 1.x."""

import json
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from operator import itemgetter
from typing import Any, Final, Literal

import numpy as np

from penstock.adapters.bridge import (
    CALLS_IN_TEXT,
    UNTIL_LATE,
    Sending,
    beside_calls,
    conversation,
    generate,
    patiently,
    pieces,
    shared,
)
from penstock.client import DEFAULT_URL, AsyncClient
from penstock.conversation import ResponseFormat
from penstock.errors import InvalidOptionError, InvalidTextError
from penstock.extras import how_to_install
from penstock.job import RESULT_TIMEOUT_S
from penstock.options import EmbedOptions
from penstock.request import PriorityName
from penstock.result import GenerateResult, Usage
from penstock.retry import WaitPolicy
from penstock.stream import Piece

try:
    from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
    from langchain_core.embeddings import Embeddings
    from langchain_core.language_models import BaseChatModel, LanguageModelInput
    from langchain_core.messages import (
        AIMessage,
        AIMessageChunk,
        BaseMessage,
        ToolMessage,
        message_chunk_to_message,
    )
    from langchain_core.messages.ai import UsageMetadata
    from langchain_core.messages.tool import tool_call_chunk
    from langchain_core.output_parsers import BaseOutputParser, JsonOutputParser, PydanticOutputParser
    from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
    from langchain_core.runnables import Runnable, RunnableMap, RunnablePassthrough
    from langchain_core.tools import BaseTool
    from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
    from langchain_core.utils.pydantic import is_basemodel_subclass
except ImportError as error:
    raise ImportError(f"LangChain is missing: {how_to_install('langchain')}") from error

_ROLES: Final = {"system": "system", "human": "user", "ai": "assistant", "tool": "tool"}
_CALLS: Final = ("tool_use", "tool_call")  # blocks that messages have in `tool_calls` too
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
    "tools",
    "tool_choice",
    "priority",
    "tenant",
    "wait",
)
"""Options that a call may set by `bind` or `invoke`, besides `model`, `max_tokens` and `stop`."""


class PenstockEmbeddings(Embeddings):
    """An embedding model.

    Args:
        model: name it is served under.
        url: Redis that holds the queues.
        results_url: Redis that holds the results, where that is another server.
        query_prompt_name: prompt of the model that goes before queries.
        document_prompt_name: prompt that goes before documents.
        priority: priority of documents; queries are interactive.
        tenant: tenant that the jobs belong to; tenants take turns.
        wait: retries of what may pass, within `timeout`; None tries once.
        timeout: longest wait for a query, or for each job of documents, seconds.
    """

    def __init__(
        self,
        model: str,
        *,
        url: str = DEFAULT_URL,
        results_url: str | None = None,
        query_prompt_name: str | None = None,
        document_prompt_name: str | None = None,
        priority: PriorityName = "default",
        tenant: str | None = None,
        wait: WaitPolicy | None = UNTIL_LATE,
        timeout: float = RESULT_TIMEOUT_S,
    ) -> None:
        self.model = model
        self._client = shared(url, results_url)
        self._query_prompt_name = query_prompt_name
        self._tenant, self._wait, self._timeout_s = tenant, wait, timeout
        self._of_documents = EmbedOptions(
            prompt_name=document_prompt_name,
            priority=priority,
            tenant=tenant,
            wait=wait and replace(wait, max_wait_s=min(wait.max_wait_s, timeout)),
        )

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Embed any number of texts."""
        parts = self._client.embed_many(
            texts, model=self.model, timeout_s=self._timeout_s, **self._of_documents
        )
        return [row for part in parts for row in part.tolist()]

    def embed_query(self, text: str) -> list[float]:
        """Embed one text, before those that are not interactive."""
        return _only(self._client.call(lambda client: self._query(client, text)))

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        """See `embed_documents`."""
        parts = self._client.iterate(
            lambda client: client.embed_many(
                texts, model=self.model, timeout_s=self._timeout_s, **self._of_documents
            )
        )
        return [row async for part in parts for row in part.tolist()]

    async def aembed_query(self, text: str) -> list[float]:
        """See `embed_query`."""
        return _only(await self._client.wait(lambda client: self._query(client, text)))

    async def _query(self, client: AsyncClient, text: str) -> Any:
        return await patiently(
            client,
            client.embed,
            texts=[text],
            model=self.model,
            prompt_name=self._query_prompt_name,
            priority="interactive",
            tenant=self._tenant,
            wait=self._wait,
            timeout_s=self._timeout_s,
        )


class ChatPenstock(Sending, BaseChatModel):
    """A chat model; see `Sending` for what else it takes.

    `with_structured_output` constrains the model's tokens by the schema, so that any model follows it.

    Attributes:
        model: name it is served under.
        temperature: 0 is greedy; None leaves it to the deployment, as for the other options.
        max_tokens: upper bound of the answer, tokens.
        stop: the answer ends before the first of these.
        timeout: longest wait for an answer, or for the next piece of one, seconds.
    """

    model: str
    temperature: float | None = None
    max_tokens: int | None = None
    stop: list[str] | None = None
    timeout: float = RESULT_TIMEOUT_S

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
        return _result(self._client.call(lambda client: generate(client, **asked)))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        del run_manager
        asked = self._ask(messages, stop, kwargs)
        return _result(await self._client.wait(lambda client: generate(client, **asked)))

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        asked = self._ask(messages, stop, kwargs)
        for piece in self._client.each(lambda client: pieces(client, **asked)):
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
        stream = self._client.iterate(lambda client: pieces(client, **asked))
        async with aclosing(stream) as arriving:
            async for piece in arriving:
                chunk = _chunk(piece, asked["model"])
                if run_manager:
                    await run_manager.on_llm_new_token(piece.text, chunk=chunk)
                yield chunk

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: str | dict[str, Any] | bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Return a model that may ask for tools, where its chat template and tokenizer know them.

        Args:
            tools: tools that the model may call.
            tool_choice: None or `auto` lets the model choose; `any`, `required` or True makes it call one, a
                name this one: the tokens are then constrained by the schemas of the arguments, and there is
                one call. `none` allows no call.
            **kwargs: see `bind`.
        """
        listed = [convert_to_openai_tool(tool) for tool in tools]
        return self.bind(tools=listed or None, tool_choice=tool_choice, **kwargs)

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
            strict: has no effect; a schema is always followed.
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
            "tenant": self.tenant,
            "wait": self.wait,
        }
        asked = own | options | ({} if stop is None else {"stop": stop})
        known = {name: asked[name] for name in ("model", *_OPTIONS) if asked.get(name) is not None}
        turns = [_turn(index, message) for index, message in enumerate(messages)]
        return {
            **conversation(turns),
            "wait": None,
            **known,
            "max_new_tokens": asked["max_tokens"],
            "stop": asked["stop"] or None,
            "timeout_s": self.timeout,
        }


def _turn(index: int, message: BaseMessage) -> dict[str, Any]:
    """Return a message in OpenAI's form."""
    role = _ROLES.get(message.type.removesuffix("MessageChunk").lower())
    if role is None:
        raise InvalidTextError(
            index, f"is a {type(message).__name__}; only system, human, AI and tool ones go"
        )
    calls = message.tool_calls if isinstance(message, AIMessage) else []
    texts = []
    for block in [message.content] if isinstance(message.content, str) else message.content:
        if isinstance(block, str):
            texts.append(block)
        elif block.get("type") == "text":
            texts.append(block["text"])
        elif not (calls and block.get("type") in _CALLS):
            raise InvalidTextError(index, f"holds a block of type {block.get('type')!r}; only text goes")
    turn: dict[str, Any] = {"role": role, "content": "".join(texts)}
    if calls:
        turn["tool_calls"] = [
            {"function": {"name": call["name"], "arguments": call["args"]}}
            | ({"id": call["id"]} if call["id"] else {})
            for call in calls
        ]
        turn["content"] = beside_calls(turn["content"], turn["tool_calls"], message.response_metadata)
    if isinstance(message, ToolMessage):
        turn |= {"tool_call_id": message.tool_call_id, "name": message.name}
    return turn


def _result(answer: GenerateResult) -> ChatResult:
    message = message_chunk_to_message(_last(answer, answer.model))
    return ChatResult(generations=[ChatGeneration(message=message)])


def _chunk(piece: Piece, model: str) -> ChatGenerationChunk:
    is_last = piece.finish_reason is not None
    return ChatGenerationChunk(message=_last(piece, model) if is_last else AIMessageChunk(content=piece.text))


def _last(answer: GenerateResult | Piece, model: str) -> AIMessageChunk:
    """Return what ends a message, or is the whole of it."""
    assert answer.usage is not None  # of a stream, asked for the last piece alone
    calls = answer.tool_calls or ()
    return AIMessageChunk(
        content=answer.text,
        tool_call_chunks=[
            tool_call_chunk(
                name=call["function"]["name"],
                args=_text(call["function"]["arguments"]),
                id=call.get("id"),
                index=place,
            )
            for place, call in enumerate(calls)
        ],
        usage_metadata=_usage(answer.usage),
        response_metadata={"model_name": model, "finish_reason": answer.finish_reason}
        | ({CALLS_IN_TEXT: True} if calls else {}),
        chunk_position="last",
    )


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


def _text(arguments: str | dict[str, Any]) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
