"""LlamaIndex's embedding and language models, answered by Penstock's workers; for llama-index-core 0.14."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import cached_property
from typing import Any, Final

from pydantic import Field, PrivateAttr

from penstock.adapters.bridge import Bridge, conversation, shared
from penstock.client import DEFAULT_URL, AsyncClient
from penstock.errors import InvalidTextError
from penstock.job import RESULT_TIMEOUT_S
from penstock.request import PriorityName
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
    )
    from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
    from llama_index.core.llms.llm import LLM
except ImportError as error:
    raise ImportError('LlamaIndex is missing: pip install "penstock[llama-index]"') from error

_ROLES: Final = {
    MessageRole.SYSTEM: "system",
    MessageRole.DEVELOPER: "system",
    MessageRole.USER: "user",
    MessageRole.ASSISTANT: "assistant",
    MessageRole.CHATBOT: "assistant",
    MessageRole.MODEL: "assistant",
}


class PenstockEmbedding(BaseEmbedding):
    """An embedding model; queries go before texts.

    Attributes:
        model_name: name it is served under.
        url: Redis that holds the queues.
        query_prompt_name: prompt of the model that goes before queries.
        text_prompt_name: prompt that goes before texts.
        embed_batch_size: texts that LlamaIndex hands over at a time, and so of one job.
        priority: of texts.
        timeout_s: how long to wait for an answer, seconds.
    """

    url: str = Field(default=DEFAULT_URL, repr=False, exclude=True)  # it may hold a password
    query_prompt_name: str | None = None
    text_prompt_name: str | None = None
    embed_batch_size: int = Field(default=256, gt=0, le=2048)
    priority: PriorityName = "default"
    timeout_s: float = Field(default=RESULT_TIMEOUT_S, gt=0)

    _client: Bridge = PrivateAttr()

    def model_post_init(self, context: Any, /) -> None:
        """Take the process' client of this URL; it connects at the first call."""
        super().model_post_init(context)
        self._client = shared(self.url)

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
        vectors = await client.embed(
            list(texts),
            model=self.model_name,
            prompt_name=self.query_prompt_name if is_query else self.text_prompt_name,
            priority="interactive" if is_query else self.priority,
            timeout_s=self.timeout_s,
            deadline_s=self.timeout_s,
        )
        rows: list[Embedding] = vectors.tolist()
        return rows


class PenstockLLM(LLM):
    """A language model. A call may name any option of `AsyncClient.generate`, `response_format` among them.

    Attributes:
        model: name it is served under.
        url: Redis that holds the queues.
        temperature: 0 is greedy; None leaves it to the deployment.
        max_tokens: upper bound of the answer, tokens; None leaves it to the deployment.
        priority: which waiting jobs go first.
        timeout_s: how long to wait for an answer, or for the next piece of one, seconds.
    """

    model: str
    url: str = Field(default=DEFAULT_URL, repr=False, exclude=True)  # it may hold a password
    temperature: float | None = None
    max_tokens: int | None = None
    priority: PriorityName = "default"
    timeout_s: float = Field(default=RESULT_TIMEOUT_S, gt=0)

    _client: Bridge = PrivateAttr()

    def model_post_init(self, context: Any, /) -> None:
        """Take the process' client of this URL; it connects at the first call."""
        super().model_post_init(context)
        self._client = shared(self.url)

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
        return LLMMetadata(model_name=self.model, is_chat_model=True, **self._limits)

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer a conversation."""
        asked = self._ask(_talk(messages), kwargs)
        return _chat_response(self._client.generate(**asked))

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """See `chat`."""
        asked = self._ask(_talk(messages), kwargs)
        return _chat_response(await self._client.wait(lambda client: client.generate(**asked)))

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Answer a prompt."""
        asked = self._ask({"prompt": self._format(prompt, formatted)}, kwargs)
        return _completion_response(self._client.generate(**asked))

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """See `complete`."""
        asked = self._ask({"prompt": self._format(prompt, formatted)}, kwargs)
        return _completion_response(await self._client.wait(lambda client: client.generate(**asked)))

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """Answer a conversation piece by piece; leaving the loop cancels the job."""
        asked = self._ask(_talk(messages), kwargs)

        def pieces() -> ChatResponseGen:
            text = ""
            for piece in self._client.stream(**asked):
                text += piece.text
                yield _chat_piece(text, piece)

        return pieces()

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        """See `stream_chat`."""
        asked = self._ask(_talk(messages), kwargs)

        async def pieces() -> ChatResponseAsyncGen:
            text = ""
            async with self._pieces(asked) as read:
                async for piece in read:
                    text += piece.text
                    yield _chat_piece(text, piece)

        return pieces()

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        """Answer a prompt piece by piece; leaving the loop cancels the job."""
        asked = self._ask({"prompt": self._format(prompt, formatted)}, kwargs)

        def pieces() -> CompletionResponseGen:
            text = ""
            for piece in self._client.stream(**asked):
                text += piece.text
                yield CompletionResponse(text=text, delta=piece.text, additional_kwargs=_ending(piece))

        return pieces()

    @llm_completion_callback()
    async def astream_complete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponseAsyncGen:
        """See `stream_complete`."""
        asked = self._ask({"prompt": self._format(prompt, formatted)}, kwargs)

        async def pieces() -> CompletionResponseAsyncGen:
            text = ""
            async with self._pieces(asked) as read:
                async for piece in read:
                    text += piece.text
                    yield CompletionResponse(text=text, delta=piece.text, additional_kwargs=_ending(piece))

        return pieces()

    def _pieces(self, asked: dict[str, Any]) -> aclosing[AsyncGenerator[Piece]]:
        return aclosing(self._client.iterate(lambda client: client.stream(**asked)))

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
            "timeout_s": self.timeout_s,
            "deadline_s": self.timeout_s,
            **fields,
            **named,
        }


def _talk(messages: Sequence[ChatMessage]) -> dict[str, Any]:
    return conversation([_turn(index, message) for index, message in enumerate(messages)])


def _turn(index: int, message: ChatMessage) -> tuple[str, str]:
    role = _ROLES.get(message.role)
    if role is None:
        raise InvalidTextError(index, f"is of role {message.role.value!r}; system, user and assistant go")
    texts = []
    for block in message.blocks:
        if not isinstance(block, TextBlock):
            raise InvalidTextError(index, f"holds a {type(block).__name__}; only text goes")
        texts.append(block.text)
    return role, "".join(texts)


def _chat_response(answer: GenerateResult) -> ChatResponse:
    message = ChatMessage(role=MessageRole.ASSISTANT, content=answer.text)
    return ChatResponse(message=message, raw=answer, additional_kwargs=_counts(answer))


def _completion_response(answer: GenerateResult) -> CompletionResponse:
    return CompletionResponse(text=answer.text, raw=answer, additional_kwargs=_counts(answer))


def _chat_piece(text: str, piece: Piece) -> ChatResponse:
    message = ChatMessage(role=MessageRole.ASSISTANT, content=text)
    return ChatResponse(message=message, delta=piece.text, additional_kwargs=_ending(piece))


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
