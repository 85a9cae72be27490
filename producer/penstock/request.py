"""Requests: their fields, the ranges of these, and what is refused before it is sent.

pydantic models, not dataclasses: the same classes read keyword arguments, queue messages and the
configuration file, and each range stands in one place.
"""

import re
import uuid
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Annotated, Any, ClassVar, Final, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from penstock.conversation import (
    MAX_FORMAT_BYTES,
    MAX_TOOLS_BYTES,
    Message,
    ResponseFormat,
    Tool,
    ToolCall,
    check_json,
)
from penstock.errors import InvalidMessageError, InvalidOptionError, InvalidTextError, RequestTooLargeError
from penstock.validation import explain

VERSION = 1
MAX_TEXT_BYTES = 1 << 20
"""One text or prompt, in UTF-8."""
MAX_REQUEST_BYTES = 16 << 20
"""All texts of a request together, in UTF-8; Redis and Celery copy a message several times."""
MAX_TURNS = 4096
"""Earlier turns of a conversation."""
MAX_CHOICES = 16
"""Answers to one request: as many as a batch has by default."""

Task = Literal["embed", "generate", "rerank"]
"""Kind of work that a model does."""
PoolName = Literal["gpu", "cpu"]
Precision = Literal["float32", "float16", "int8", "binary", "ubinary"]
Truncation = Literal["error", "oldest_turns", "middle"]
Mode = Literal["chat", "complete"]


class Priority(IntEnum):
    """Order of waiting jobs, urgent ones first; the numbers are those of Celery and kombu on Redis."""

    INTERACTIVE = 0
    DEFAULT = 3
    BATCH = 6


PriorityName = Literal["interactive", "default", "batch"]
TENANT: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
"""Names that a tenant may have."""


class Lane(NamedTuple):
    """Place of a job in a queue: its priority, and its tenant."""

    priority: Priority
    tenant: str = ""


class GenerationOptions(BaseModel):
    """How text is generated; None leaves the choice to the model's configuration.

    A call wins over the model's entry in the configuration file, which wins over the model's own
    `generation_config.json`.

    Attributes:
        max_new_tokens: upper bound of the answer, tokens.
        context_window: upper bound of prompt and answer together, tokens; never above the model's own.
        temperature: 0 is greedy.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the likeliest tokens whose probabilities reach this sum.
        min_p: drop tokens below this share of the likeliest one's probability.
        repetition_penalty: 1 is none; Keskar et al. 2019, arXiv:1909.05858, section 4.1.
        presence_penalty: taken from the logits of tokens that the answer already has; 0 is none.
        seed: makes sampling repeatable, whatever else is in the batch.
        stop: the answer ends before the first of these; at most 16, at most 256 characters each.
        stop_token_ids: tokens that end the answer, besides the model's own; at most 64.
        truncation: way to shorten a prompt that leaves no room for the answer: `oldest_turns` leaves turns
            out, `middle` the middle of the longest one of user or tool. The system prompt and the end of
            the last turn always stay.
        enable_thinking: let the model think before it answers, where its chat template has a switch.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    max_new_tokens: int | None = Field(default=None, ge=1, le=1 << 20)
    context_window: int | None = Field(default=None, ge=16, lt=1 << 31)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_k: int | None = Field(default=None, ge=0, lt=1 << 31)
    top_p: float | None = Field(default=None, gt=0, le=1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0, le=10)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    seed: int | None = Field(default=None, ge=0, lt=1 << 63)
    stop: tuple[Annotated[str, Field(min_length=1, max_length=256)], ...] | None = Field(
        default=None, max_length=16
    )
    stop_token_ids: tuple[Annotated[int, Field(ge=0, lt=1 << 31)], ...] | None = Field(
        default=None, max_length=64
    )
    truncation: Truncation | None = None
    enable_thinking: bool | None = None

    @field_validator("stop", "stop_token_ids", mode="before")
    @classmethod
    def _take_lists(cls, value: object) -> object:
        # JSON and TOML have lists; one string is what OpenAI's clients send.
        return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value

    def over(self, defaults: "GenerationOptions") -> "GenerationOptions":
        """Return these options, with `defaults` where this one is None."""
        mine = self.model_dump(exclude_none=True)
        return GenerationOptions.model_construct(**(defaults.model_dump(exclude_none=True) | mine))


class _Request(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    version: int = VERSION
    model: str = Field(min_length=1, max_length=200)
    sent_at: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    deadline: float | None = Field(default=None, ge=0, allow_inf_nan=False)

    @field_validator("version")
    @classmethod
    def _is_known(cls, version: int) -> int:
        if version != VERSION:
            raise InvalidMessageError(f"version {version}; version {VERSION} is read here")
        return version

    @classmethod
    def parse(cls, fields: Mapping[str, Any]) -> Self:
        """Check the fields of a call or of a message.

        Raises:
            RequestError: a field is wrong; the error tells which, its value, and what is allowed.
        """
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise explain(error.errors(include_url=False)[0], version=VERSION) from None

    def fields(self) -> dict[str, Any]:
        """Return what the message carries: JSON types, defaults left out."""
        return self.model_dump(mode="json", exclude_defaults=True) | {"version": self.version}

    def summary(self) -> str:
        """Say how much is asked, without a word of it: for logs and Flower."""
        return summarize(self.fields())


class EmbedRequest(_Request):
    """Texts to embed with one model; names are those of sentence-transformers' `encode`.

    Attributes:
        texts: any number up to the model's limit; an empty one gives an array of shape (0, dim).
        prompt_name: one of the prompts in the model's own configuration.
        prompt: put before each text; wins over `prompt_name`.
        normalize_embeddings: give rows unit L2 length, whatever the model does.
        truncate_dim: keep the first dimensions only (Matryoshka).
        precision: `float32`, `float16`; `int8`: each dimension in 256 steps of the model's range
            (`ModelInfo.int8_ranges`); `ubinary`: signs, eight dimensions in each uint8, the first in the
            highest bit; `binary`: the same less 128, int8. Cut and normalised before.
        sent_at: time at which the request left its sender, Unix seconds on the broker's clock.
        deadline: time after which the request is not worth computing, Unix seconds on the broker's clock.
    """

    task: ClassVar[Task] = "embed"

    texts: list[str]
    prompt_name: str | None = None
    prompt: str | None = None
    normalize_embeddings: bool = False
    truncate_dim: int | None = Field(default=None, ge=1)
    precision: Precision = "float32"

    @field_validator("texts")
    @classmethod
    def _within_limits(cls, texts: list[str]) -> list[str]:
        _check_bytes(texts)
        return texts

    @field_validator("prompt", "prompt_name")
    @classmethod
    def _can_be_sent(cls, text: str | None) -> str | None:
        _check_bytes([text] if text else [])
        return text

    @property
    def n_texts(self) -> int:
        """Number of texts, which the model's `max_texts` limits."""
        return len(self.texts)

    @property
    def n_characters(self) -> int:
        """Number of characters of all texts."""
        return sum(map(len, self.texts))


class GenerateRequest(_Request, GenerationOptions):
    """A conversation to go on with, or a text.

    Attributes:
        prompt: the user's turn to answer; None answers the last turn of `history`.
        system_prompt: instructions on how to answer.
        history: earlier turns, oldest first.
        tools: functions that the model may ask for.
        mode: `complete` goes on with the prompt as it is: no chat template, and control tokens that it holds
            are control tokens.
        stream: the text can be read while it is generated.
        n: number of answers. Each is drawn with a seed of its own that follows from `seed`, the first with
            `seed` itself; all are equal where `temperature` is 0. A stream has one.
        logprobs: tell the log-probability of each token of the answer: the model's own, before penalties,
            formats and temperature.
        top_logprobs: number of the likeliest tokens at each place to tell them of too; needs `logprobs`.
        response_format: form that the answer has to have. It alone then says where the answer ends, so a call
            that sets `stop` or `stop_token_ids` too is refused. The model's thoughts before it are free.
        sent_at: time at which the request left its sender, Unix seconds on the broker's clock.
        deadline: time after which the request is not worth computing, Unix seconds on the broker's clock.
    """

    task: ClassVar[Task] = "generate"

    prompt: str | None = Field(default=None, min_length=1)
    system_prompt: str | None = None
    history: Annotated[tuple[Message, ...], Field(max_length=MAX_TURNS)] = ()
    tools: Annotated[tuple[Tool, ...], Field(min_length=1)] | None = None
    mode: Mode = "chat"
    stream: bool = False
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    response_format: Annotated[ResponseFormat, Field(discriminator="type")] | None = None

    @field_validator("history", mode="before")
    @classmethod
    def _take_lists_of_turns(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("tools", mode="before")
    @classmethod
    def _take_lists_of_tools(cls, value: object) -> object:
        check_json("tools", value, MAX_TOOLS_BYTES)
        return tuple(value) if isinstance(value, list) else value

    @field_validator("response_format", mode="before")
    @classmethod
    def _is_plain(cls, wanted: object) -> object:
        check_json("response_format", wanted, MAX_FORMAT_BYTES)
        return wanted

    @model_validator(mode="after")
    def _has_something_to_answer(self) -> Self:
        if self.mode == "complete":
            for name in ("system_prompt", "history", "tools", "enable_thinking"):
                if getattr(self, name) not in (None, (), ""):
                    raise InvalidOptionError(name, "set", "mode 'complete' has no conversation")
        if self.prompt is None and (not self.history or self.history[-1].role not in ("user", "tool")):
            raise InvalidMessageError("field 'prompt' is missing, and history ends with no turn to answer")
        calls: Sequence[ToolCall] = ()
        for place, turn in enumerate(self.history):
            if turn.role != "tool":
                calls = turn.tool_calls or ()
            elif not calls or (turn.tool_call_id and turn.tool_call_id not in _ids(calls)):
                raise InvalidOptionError(
                    "history", f"of turn {place}", "a tool's turn answers a call just before"
                )
        return self

    @model_validator(mode="after")
    def _ends_one_way(self) -> Self:
        if self.response_format and self.response_format["type"] != "text":
            for name in ("stop", "stop_token_ids"):
                if getattr(self, name):
                    raise InvalidOptionError(name, "set", "response_format says where the answer ends")
        return self

    @model_validator(mode="after")
    def _does_not_contradict_itself(self) -> Self:
        if self.n > 1 and self.stream:
            raise InvalidOptionError("n", str(self.n), "a stream has one answer")
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidOptionError("top_logprobs", str(self.top_logprobs), "it needs logprobs")
        return self

    @model_validator(mode="after")
    def _within_limits(self) -> Self:
        turns = self.messages()
        _check_bytes([turn.content for turn in turns])
        _check_bytes(
            [text for turn in turns for text in (turn.reasoning, turn.tool_call_id, turn.name) if text]
        )
        return self

    def options(self) -> GenerationOptions:
        """Return the options this call set itself."""
        return GenerationOptions.model_construct(
            **{name: getattr(self, name) for name in GenerationOptions.model_fields}
        )

    def messages(self) -> list[Message]:
        """Return the whole conversation, system prompt first, the user's turn last."""
        system = [Message(role="system", content=self.system_prompt)] if self.system_prompt else []
        asked = [Message(role="user", content=self.prompt)] if self.prompt else []
        return [*system, *self.history, *asked]

    @property
    def n_texts(self) -> int:
        """Number of texts, which the model's `max_texts` limits; a conversation has none."""
        return 0

    @property
    def n_characters(self) -> int:
        """Number of characters of all turns."""
        return sum(len(turn.content) for turn in self.messages())


class RerankRequest(_Request):
    """Documents to bring into order by how well they answer a query, with a cross-encoder.

    Attributes:
        query: the question.
        documents: any number up to the model's limit.
        top_n: number of documents in the order, the best ones; None takes all.
        sent_at: time at which the request left its sender, Unix seconds on the broker's clock.
        deadline: time after which the request is not worth computing, Unix seconds on the broker's clock.
    """

    task: ClassVar[Task] = "rerank"

    query: str = Field(min_length=1)
    documents: list[str]
    top_n: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _within_limits(self) -> Self:
        _check_bytes([*self.documents, self.query])
        return self

    @property
    def n_texts(self) -> int:
        """Number of texts, which the model's `max_texts` limits."""
        return len(self.documents)

    @property
    def n_characters(self) -> int:
        """Number of characters of all documents, each with the query before it."""
        return sum(map(len, self.documents)) + len(self.documents) * len(self.query)


Request = EmbedRequest | GenerateRequest | RerankRequest


def summarize(fields: Mapping[str, Any]) -> str:
    """Say how much a message's fields ask, without a word of it; any shape may have come."""
    for name in ("texts", "documents"):
        if name in fields:
            items = fields[name] if isinstance(fields[name], list) else [fields[name]]
            return f"{len(items):,} {name}, {_n_characters(items):,} characters"
    turns = fields["history"] if isinstance(fields.get("history"), list) else []
    asked = [fields[name] for name in ("system_prompt", "prompt") if fields.get(name)]
    contents = [turn.get("content") for turn in turns if isinstance(turn, dict)]
    n_turns = max(1, len(asked) + len(turns))
    return f"{n_turns:,} turns, {_n_characters([*asked, *contents]):,} characters"


def _n_characters(values: Sequence[object]) -> int:
    return sum(len(value) for value in values if isinstance(value, str))


def new_job_id() -> str:
    """Return a fresh id; unguessable, since whoever knows it can read the result."""
    return str(uuid.uuid4())


def _check_bytes(texts: Sequence[str]) -> None:
    total = 0
    for index, text in enumerate(texts):
        try:
            total += (n_bytes := len(text.encode()))
        except UnicodeEncodeError:
            raise InvalidTextError(index, "holds a lone surrogate, which UTF-8 cannot carry") from None
        if n_bytes > MAX_TEXT_BYTES:
            raise RequestTooLargeError(f"text {index}", n_bytes, MAX_TEXT_BYTES)
    if total > MAX_REQUEST_BYTES:
        raise RequestTooLargeError("the request", total, MAX_REQUEST_BYTES)


def _ids(calls: Sequence[ToolCall]) -> list[str]:
    return [call["id"] for call in calls if "id" in call]
