"""LlamaIndex's embedding and language models, answered by Penstock's workers; for llama-index-core 0.14."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import cached_property
from typing import Any, Final, cast

from pydantic import Field

from penstock.adapters.bridge import (
    CALLS_IN_TEXT,
    Sending,
    beside_calls,
    conversation,
    generate,
    patiently,
    pieces,
)
from penstock.client import AsyncClient
from penstock.conversation import ToolCall, parse_arguments
from penstock.errors import InvalidTextError
from penstock.extras import how_to_install
from penstock.job import RESULT_TIMEOUT_S
from penstock.result import GenerateResult
from penstock.stream import Piece

try:
    from llama_index.core.base.embeddings.base import BaseEmbedding, Embedding
    from llama_index.core.base.llms.types import (
        ChatMessage,
        ChatResponse,
        ChatResponseAsyncGen,
        ChatResponseGen,
        CompletionResponse,
        CompletionResponseAsyncGen,
        CompletionResponseGen,
        LLMMetadata,
        MessageRole,
        TextBlock,
        ToolCallBlock,
    )
    from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
    from llama_index.core.llms.function_calling import FunctionCallingLLM
    from llama_index.core.llms.llm import ToolSelection
    from llama_index.core.tools.types import BaseTool
except ImportError as error:
    raise ImportError(f"LlamaIndex is missing: {how_to_install('llama-index')}") from error

_ROLES: Final = {
    MessageRole.SYSTEM: "system",
    MessageRole.DEVELOPER: "system",
    MessageRole.USER: "user",
    MessageRole.ASSISTANT: "assistant",
    MessageRole.CHATBOT: "assistant",
    MessageRole.MODEL: "assistant",
    MessageRole.TOOL: "tool",
    MessageRole.FUNCTION: "tool",
}


class _Timed(Sending):
    timeout_s: float = Field(default=RESULT_TIMEOUT_S, gt=0)


class PenstockEmbedding(_Timed, BaseEmbedding):
    """An embedding model; queries go before texts. See `Sending` for what else it takes.

    Attributes:
        model_name: name it is served under.
        query_prompt_name: prompt of the model that goes before queries.
        text_prompt_name: prompt that goes before texts.
        embed_batch_size: texts that LlamaIndex hands over at a time, and so of one job.
        timeout_s: longest wait for an answer, seconds.
    """

    query_prompt_name: str | None = None
    text_prompt_name: str | None = None
    embed_batch_size: int = Field(default=256, gt=0, le=2048)

    @classmethod
    def class_name(cls) -> str:
        """Return what LlamaIndex stores it under."""
        return "PenstockEmbedding"

    def _get_query_embedding(self, query: str) -> Embedding:
        return self._client.call(lambda client: self._embed(client, [query], is_query=True))[0]

    async def _aget_query_embedding(self, query: str) -> Embedding:
        return (await self._client.wait(lambda client: self._embed(client, [query], is_query=True)))[0]

    def _get_text_embedding(self, text: str) -> Embedding:
        return self._get_text_embeddings([text])[0]

    async def _aget_text_embedding(self, text: str) -> Embedding:
        return (await self._aget_text_embeddings([text]))[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        return self._client.call(lambda client: self._embed(client, texts))

    async def _aget_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        return await self._client.wait(lambda client: self._embed(client, texts))

    async def _embed(
        self, client: AsyncClient, texts: Sequence[str], *, is_query: bool = False
    ) -> list[Embedding]:
        vectors = await patiently(
            client,
            client.embed,
            texts=list(texts),
            model=self.model_name,
            prompt_name=self.query_prompt_name if is_query else self.text_prompt_name,
            priority="interactive" if is_query else self.priority,
            tenant=self.tenant,
            wait=self.wait,
            timeout_s=self.timeout_s,
        )
        rows: list[Embedding] = vectors.tolist()
        return rows


class PenstockLLM(_Timed, FunctionCallingLLM):
    """A language model; see `Sending` for what else it takes.

    A call may name any option of `AsyncClient.generate`, `response_format` and `wait` among them.

    Attributes:
        model: name it is served under.
        temperature: 0 is greedy; None leaves it to the deployment.
        max_tokens: upper bound of the answer, tokens; None leaves it to the deployment.
        is_function_calling_model: tells LlamaIndex to use tools by calls; the model's chat template and
            tokenizer have to know them.
        timeout_s: longest wait for an answer, or for the next piece of one, seconds.
    """

    model: str
    temperature: float | None = None
    max_tokens: int | None = None
    is_function_calling_model: bool = False

    @classmethod
    def class_name(cls) -> str:
        """Return what LlamaIndex stores it under."""
        return "PenstockLLM"

    @cached_property
    def _limits(self) -> dict[str, int]:
        info = self._client.models().get(self.model)
        known = {"context_window": info.max_tokens if info else None, "num_output": self.max_tokens}
        return {name: value for name, value in known.items() if value is not None}

    @property
    def metadata(self) -> LLMMetadata:
        """Say what the model takes; its context window is the one that workers announced."""
        return LLMMetadata(
            model_name=self.model,
            is_chat_model=True,
            is_function_calling_model=self.is_function_calling_model,
            **self._limits,
        )

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer a conversation."""
        asked = self._ask(_talk(messages), kwargs)
        return _chat_response(self._client.call(lambda client: generate(client, **asked)))

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """See `chat`."""
        asked = self._ask(_talk(messages), kwargs)
        return _chat_response(await self._client.wait(lambda client: generate(client, **asked)))

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Answer a prompt."""
        asked = self._ask({"prompt": self._format(prompt, formatted)}, kwargs)
        return _completion_response(self._client.call(lambda client: generate(client, **asked)))

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """See `complete`."""
        asked = self._ask({"prompt": self._format(prompt, formatted)}, kwargs)
        return _completion_response(await self._client.wait(lambda client: generate(client, **asked)))

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """Answer a conversation piece by piece; leaving the loop cancels the job."""
        asked = self._ask(_talk(messages), kwargs)

        def read() -> ChatResponseGen:
            text = ""
            for piece in self._client.each(lambda client: pieces(client, **asked)):
                text += piece.text
                yield _chat_piece(text, piece)

        return read()

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        """See `stream_chat`."""
        asked = self._ask(_talk(messages), kwargs)

        async def read() -> ChatResponseAsyncGen:
            text = ""
            async with self._pieces(asked) as arriving:
                async for piece in arriving:
                    text += piece.text
                    yield _chat_piece(text, piece)

        return read()

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        """Answer a prompt piece by piece; leaving the loop cancels the job."""
        asked = self._ask({"prompt": self._format(prompt, formatted)}, kwargs)

        def read() -> CompletionResponseGen:
            text = ""
            for piece in self._client.each(lambda client: pieces(client, **asked)):
                text += piece.text
                yield CompletionResponse(text=text, delta=piece.text, additional_kwargs=_ending(piece))

        return read()

    @llm_completion_callback()
    async def astream_complete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponseAsyncGen:
        """See `stream_complete`."""
        asked = self._ask({"prompt": self._format(prompt, formatted)}, kwargs)

        async def read() -> CompletionResponseAsyncGen:
            text = ""
            async with self._pieces(asked) as arriving:
                async for piece in arriving:
                    text += piece.text
                    yield CompletionResponse(text=text, delta=piece.text, additional_kwargs=_ending(piece))

        return read()

    def _prepare_chat_with_tools(
        self,
        tools: Sequence[BaseTool],
        user_msg: str | ChatMessage | None = None,
        chat_history: list[ChatMessage] | None = None,
        verbose: bool = False,
        allow_parallel_tool_calls: bool = False,
        tool_required: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        del verbose, allow_parallel_tool_calls
        asked = [ChatMessage(role="user", content=user_msg) if isinstance(user_msg, str) else user_msg]
        return {
            "messages": [*(chat_history or []), *filter(None, asked)],
            "tools": [tool.metadata.to_openai_tool(skip_length_check=True) for tool in tools] or None,
            "tool_choice": "required" if tool_required else None,
            **kwargs,
        }

    def _validate_chat_with_tools_response(
        self,
        response: ChatResponse,
        tools: Sequence[BaseTool],
        allow_parallel_tool_calls: bool = False,
        **kwargs: Any,
    ) -> ChatResponse:
        """Leave one call, where LlamaIndex wants no more."""
        del tools, kwargs
        blocks = response.message.blocks
        for call in [block for block in blocks if isinstance(block, ToolCallBlock)][1:]:
            if not allow_parallel_tool_calls:
                blocks.remove(call)
        return response

    def get_tool_calls_from_response(
        self, response: ChatResponse, error_on_no_tool_call: bool = True, **kwargs: Any
    ) -> list[ToolSelection]:
        """Return the calls of an answer.

        Raises:
            ValueError: there is none, and there has to be one.
        """
        del kwargs
        calls = [block for block in response.message.blocks if isinstance(block, ToolCallBlock)]
        if error_on_no_tool_call and not calls:
            raise ValueError("the model called no tool")
        return [
            ToolSelection(
                tool_id=call.tool_call_id or "",
                tool_name=call.tool_name,
                tool_kwargs=cast("dict[str, Any]", call.tool_kwargs),  # it makes {} of what is no object
            )
            for call in calls
        ]

    def _pieces(self, asked: dict[str, Any]) -> aclosing[AsyncGenerator[Piece]]:
        return aclosing(self._client.iterate(lambda client: pieces(client, **asked)))

    def _format(self, prompt: str, is_formatted: bool) -> str:
        assert self.completion_to_prompt is not None  # it has a default
        return prompt if is_formatted else self.completion_to_prompt(prompt)

    def _ask(self, fields: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of a generation; it refuses what it does not know."""
        named = {"max_new_tokens" if name == "max_tokens" else name: options[name] for name in options}
        return {
            "model": self.model,
            "temperature": self.temperature,
            "max_new_tokens": self.max_tokens,
            "priority": self.priority,
            "tenant": self.tenant,
            "wait": self.wait,
            "timeout_s": self.timeout_s,
            **fields,
            **named,
        }


def _talk(messages: Sequence[ChatMessage]) -> dict[str, Any]:
    return conversation([_turn(index, message) for index, message in enumerate(messages)])


def _turn(index: int, message: ChatMessage) -> dict[str, Any]:
    """Return a message in OpenAI's form."""
    role = _ROLES.get(message.role)
    if role is None:
        raise InvalidTextError(index, f"is of role {message.role.value!r}; system, user, assistant, tool go")
    texts, calls = [], []
    for block in message.blocks:
        if isinstance(block, TextBlock):
            texts.append(block.text)
        elif isinstance(block, ToolCallBlock):
            function = {"name": block.tool_name, "arguments": block.tool_kwargs}
            calls.append({"function": function} | ({"id": block.tool_call_id} if block.tool_call_id else {}))
        else:
            raise InvalidTextError(index, f"holds a {type(block).__name__}; only text goes")
    told = message.additional_kwargs
    turn: dict[str, Any] = {"role": role, "content": "".join(texts)}
    if calls:
        turn["tool_calls"] = calls
        turn["content"] = beside_calls(turn["content"], calls, told)
    if role == "tool":
        turn |= {name: told[name] for name in ("tool_call_id", "name") if name in told}
    return turn


def _chat_response(answer: GenerateResult) -> ChatResponse:
    return ChatResponse(message=_message(answer.text, answer), raw=answer, additional_kwargs=_counts(answer))


def _completion_response(answer: GenerateResult) -> CompletionResponse:
    return CompletionResponse(text=answer.text, raw=answer, additional_kwargs=_counts(answer))


def _chat_piece(text: str, piece: Piece) -> ChatResponse:
    return ChatResponse(message=_message(text, piece), delta=piece.text, additional_kwargs=_ending(piece))


def _message(text: str, answer: GenerateResult | Piece) -> ChatMessage:
    calls = [_call_block(call) for call in answer.tool_calls or ()]
    return ChatMessage(
        role=MessageRole.ASSISTANT,
        blocks=[TextBlock(text=text), *calls],
        additional_kwargs={CALLS_IN_TEXT: True} if calls else {},
    )


def _call_block(call: ToolCall) -> ToolCallBlock:
    arguments: dict[str, Any] | str
    try:
        arguments = parse_arguments(call)
    except ValueError:
        arguments = call["function"]["arguments"]
    return ToolCallBlock(
        tool_call_id=call.get("id"), tool_name=call["function"]["name"], tool_kwargs=arguments
    )


def _ending(piece: Piece) -> dict[str, Any]:
    return {} if piece.finish_reason is None else _counts(piece)


def _counts(answer: GenerateResult | Piece) -> dict[str, Any]:
    """Return the names that LlamaIndex's counters of tokens read."""
    assert answer.usage is not None  # of a stream, asked for the last piece alone
    return {
        "prompt_tokens": answer.usage.prompt_tokens,
        "completion_tokens": answer.usage.completion_tokens,
        "total_tokens": answer.usage.total_tokens,
        "finish_reason": answer.finish_reason,
    }
