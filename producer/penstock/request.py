"""What a caller asks: the fields of a request, their ranges, and what is refused before it is sent.

pydantic models, not dataclasses: the same classes read keyword arguments, queue messages and the
configuration file, and each range stands in one place.
"""

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Annotated, Any, Final, Literal, NamedTuple, NotRequired, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
    with_config,
)
from pydantic_core import ErrorDetails
from typing_extensions import TypedDict  # pydantic takes typing's from Python 3.12 on

from penstock.errors import (
    InvalidMessageError,
    InvalidOptionError,
    InvalidTextError,
    PenstockError,
    RequestTooLargeError,
)

VERSION = 1
MAX_TEXT_BYTES = 1 << 20
"""One text or prompt, in UTF-8."""
MAX_REQUEST_BYTES = 16 << 20
"""All texts of a request together, in UTF-8; Redis and Celery copy a message several times."""
MAX_FORMAT_BYTES = 64 << 10
"""A response format, as JSON in UTF-8."""
MAX_FORMAT_DEPTH = 64
"""Objects and lists inside each other in a response format."""

Task = Literal["embed", "generate"]
PoolName = Literal["gpu", "cpu"]
Precision = Literal["float32", "float16", "int8", "binary", "ubinary"]
Truncation = Literal["error", "oldest_turns"]


class Priority(IntEnum):
    """Which waiting jobs go first; the number is the one that Celery and kombu use on Redis."""

    INTERACTIVE = 0
    DEFAULT = 3
    BATCH = 6


PriorityName = Literal["interactive", "default", "batch"]
TENANT: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
"""What a tenant may be called."""


class Lane(NamedTuple):
    """Where in a queue a job waits."""

    priority: Priority
    tenant: str = ""


class Message(BaseModel):
    """One turn of a conversation, in OpenAI's form."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    role: Literal["system", "user", "assistant"]
    content: str


_exact = with_config(ConfigDict(extra="forbid", strict=True))


@_exact
class PlainFormat(TypedDict):
    """Any text, as without a format, or any JSON object."""

    type: Literal["text", "json_object"]


@_exact
class NamedSchema(TypedDict):
    """A JSON schema as OpenAI wraps it; all but the schema is without effect, and it is always strict."""

    schema: dict[str, Any]
    name: NotRequired[str]
    description: NotRequired[str]
    strict: NotRequired[bool | None]


@_exact
class JsonSchemaFormat(TypedDict):
    """JSON that follows a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


@_exact
class RegexFormat(TypedDict):
    """Text that a regular expression matches as a whole, in Rust's syntax: no look-around, no references."""

    type: Literal["regex"]
    pattern: Annotated[str, Field(min_length=1)]


@_exact
class ChoiceFormat(TypedDict):
    """One of some texts."""

    type: Literal["choice"]
    choices: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]


ResponseFormat = PlainFormat | JsonSchemaFormat | RegexFormat | ChoiceFormat


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
        seed: makes sampling repeatable, alone and in company.
        stop: the answer ends before the first of these; at most 16, at most 256 characters each.
        stop_token_ids: tokens that end the answer, besides the model's own; at most 64.
        truncation: what to do with a prompt that leaves no room for the answer.
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
            RequestError: which field, its value, and what is allowed.
        """
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise _explain(error.errors(include_url=False)[0]) from None

    def fields(self) -> dict[str, Any]:
        """Return what the message carries: JSON types, defaults left out."""
        return self.model_dump(mode="json", exclude_defaults=True) | {"version": self.version}


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
        sent_at: when the request left its sender, Unix seconds on its clock.
        deadline: after this the request is not worth computing, Unix seconds.
    """

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
    def n_characters(self) -> int:
        """Of all texts."""
        return sum(map(len, self.texts))

    def summary(self) -> str:
        """Say how much is asked, without a word of it: for logs and Flower."""
        return f"{len(self.texts):,} texts, {self.n_characters:,} characters"


class GenerateRequest(_Request, GenerationOptions):
    """A conversation to go on with.

    Attributes:
        prompt: the user's turn to answer.
        system_prompt: how to answer.
        history: earlier turns, oldest first.
        stream: the text can be read while it is generated.
        response_format: what the answer has to be; it alone then says where the answer ends, so a call that
            sets `stop` or `stop_token_ids` too is refused.
        sent_at: when the request left its sender, Unix seconds on its clock.
        deadline: after this the request is not worth computing, Unix seconds.
    """

    prompt: str = Field(min_length=1)
    system_prompt: str | None = None
    history: tuple[Message, ...] = ()
    stream: bool = False
    response_format: Annotated[ResponseFormat, Field(discriminator="type")] | None = None

    @field_validator("history", mode="before")
    @classmethod
    def _take_lists_of_turns(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("response_format", mode="before")
    @classmethod
    def _is_plain(cls, wanted: object) -> object:
        _check_format(wanted)
        return wanted

    @model_validator(mode="after")
    def _ends_one_way(self) -> Self:
        if self.response_format and self.response_format["type"] != "text":
            for name in ("stop", "stop_token_ids"):
                if getattr(self, name):
                    raise InvalidOptionError(name, "set", "response_format says where the answer ends")
        return self

    @model_validator(mode="after")
    def _within_limits(self) -> Self:
        _check_bytes([turn.content for turn in self.messages()])
        return self

    def options(self) -> GenerationOptions:
        """Return the options this call set itself."""
        return GenerationOptions.model_construct(
            **{name: getattr(self, name) for name in GenerationOptions.model_fields}
        )

    def messages(self) -> list[Message]:
        """Return the whole conversation, system prompt first, the user's turn last."""
        system = [Message(role="system", content=self.system_prompt)] if self.system_prompt else []
        return [*system, *self.history, Message(role="user", content=self.prompt)]

    @property
    def n_characters(self) -> int:
        """Of all turns."""
        return sum(len(turn.content) for turn in self.messages())

    def summary(self) -> str:
        """Say how much is asked, without a word of it: for logs and Flower."""
        return f"{len(self.messages()):,} turns, {self.n_characters:,} characters"


Request = EmbedRequest | GenerateRequest


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


def _check_format(wanted: object) -> None:
    too_deep = InvalidOptionError("response_format", "too deep", f"at most {MAX_FORMAT_DEPTH} levels")
    try:
        n_bytes = len(json.dumps(wanted, ensure_ascii=False, allow_nan=False).encode())
    except RecursionError:
        raise too_deep from None
    except (TypeError, ValueError):  # a lone surrogate is a ValueError too
        raise InvalidOptionError("response_format", "set", "it has to be plain JSON in UTF-8") from None
    if n_bytes > MAX_FORMAT_BYTES:
        raise RequestTooLargeError("response_format", n_bytes, MAX_FORMAT_BYTES)
    level: list[object] = [wanted]
    for _ in range(MAX_FORMAT_DEPTH):
        nested = [node for node in level if isinstance(node, dict | list)]
        level = [item for node in nested for item in (node.values() if isinstance(node, dict) else node)]
    if level:
        raise too_deep


def _explain(detail: ErrorDetails) -> PenstockError:
    """Turn pydantic's first complaint into ours; never quotes a text."""
    name, *rest = [str(part) for part in detail["loc"]] or ["request"]
    kind = detail["type"]
    path = ".".join([name, *rest])
    if kind == "missing":
        return InvalidMessageError(f"field {path!r} is missing")
    if kind == "extra_forbidden":
        return InvalidOptionError(path, "set", "there is no option of that name")
    if name == "version":
        return InvalidMessageError(f"version {detail['input']!r:.40}; version {VERSION} is read here")
    if name in ("texts", "prompt", "system_prompt", "history", "prompt_name"):
        index = int(rest[0]) if rest and rest[0].isdigit() else 0
        problem = {
            "string_type": f"is a {type(detail['input']).__name__}, not a string",
            "string_too_short": "is empty",
            "string_unicode": "holds a lone surrogate, which UTF-8 cannot carry",
            "list_type": f"came as a {type(detail['input']).__name__}: pass a list of strings",
        }.get(kind, detail["msg"])
        return InvalidTextError(index, problem if name != "history" else f"of history: {problem} ({path})")
    return InvalidOptionError(path, repr(detail["input"])[:80], detail["msg"].lower())
