"""Conversations in OpenAI's form: turns, tools, calls of tools, and response formats."""

import contextlib
import json
from typing import Annotated, Any, Literal, NotRequired, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator, with_config
from typing_extensions import TypedDict  # pydantic takes typing's from Python 3.12 on

from penstock.errors import InvalidOptionError, RequestTooLargeError

MAX_FORMAT_BYTES = 64 << 10
"""Most bytes of a response format, as JSON in UTF-8."""
MAX_TOOLS_BYTES = 256 << 10
"""Most bytes of a request's tools together, or of a turn's calls, as JSON in UTF-8."""
MAX_FORMAT_DEPTH = 64
"""Most objects and lists inside each other in a response format, tools or calls."""

_exact = with_config(ConfigDict(extra="forbid", strict=True))
_Name = Annotated[str, Field(min_length=1, max_length=128)]


@_exact
class ToolFunction(TypedDict):
    """A function that the model may call; `strict` is without effect."""

    name: _Name
    description: NotRequired[str]
    parameters: NotRequired[dict[str, Any]]
    strict: NotRequired[bool | None]


@_exact
class Tool(TypedDict):
    """A tool in OpenAI's form."""

    type: Literal["function"]
    function: ToolFunction


@_exact
class CalledFunction(TypedDict):
    """A function and its arguments: a JSON object, or the text of one, as OpenAI has it."""

    name: _Name
    arguments: str | dict[str, Any]


@_exact
class ToolCall(TypedDict):
    """A call of a tool in an assistant's turn, in OpenAI's form."""

    function: CalledFunction
    type: NotRequired[Literal["function"]]
    id: NotRequired[str]


class Message(BaseModel):
    """One turn of a conversation, in OpenAI's form.

    Attributes:
        role: the speaker; `tool` is a function that answers a call of the assistant.
        content: the text; a message may leave it out beside `tool_calls`.
        reasoning: the assistant's thoughts before the text; many templates leave them out of older turns.
        tool_calls: calls that the assistant makes.
        tool_call_id: id of the call that a tool's turn answers.
        name: name of the function whose turn it is.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    role: Literal["system", "user", "assistant", "tool"]
    content: str
    reasoning: str | None = None
    tool_calls: Annotated[tuple[ToolCall, ...], Field(min_length=1)] | None = None
    tool_call_id: str | None = None
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _content_beside_calls(cls, value: object) -> object:
        if not isinstance(value, dict) or not (calls := value.get("tool_calls")):
            return value
        check_json("tool_calls", calls, MAX_TOOLS_BYTES)
        calls = tuple(calls) if isinstance(calls, list) else calls
        return {**value, "content": value.get("content") or "", "tool_calls": calls}

    @model_validator(mode="after")
    def _suits_its_role(self) -> Self:
        roles = {"tool_calls": "assistant", "reasoning": "assistant", "tool_call_id": "tool", "name": "tool"}
        for name, role in roles.items():
            if getattr(self, name) is not None and self.role != role:
                raise ValueError(f"only a turn of role {role} has {name}")
        for call in self.tool_calls or ():
            parse_arguments(call)
        return self


def parse_arguments(call: ToolCall) -> dict[str, Any]:
    """Return the arguments of a call.

    Raises:
        ValueError: they are not a JSON object.
    """
    arguments: object = call["function"]["arguments"]
    with contextlib.suppress(ValueError, RecursionError):
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    if not isinstance(arguments, dict):
        raise ValueError("the arguments of a call are a JSON object")
    return arguments


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
    """One of several texts."""

    type: Literal["choice"]
    choices: Annotated[list[str], Field(min_length=1)]


ResponseFormat = PlainFormat | JsonSchemaFormat | RegexFormat | ChoiceFormat


def check_json(name: str, wanted: object, limit: int) -> None:
    """Check what is passed on as JSON.

    Raises:
        InvalidOptionError: the value is not plain JSON, or is nested too deep.
        RequestTooLargeError: the value has more than `limit` bytes in UTF-8.
    """
    too_deep = InvalidOptionError(name, "too deep", f"at most {MAX_FORMAT_DEPTH} levels")
    try:
        n_bytes = len(json.dumps(wanted, ensure_ascii=False, allow_nan=False).encode())
    except RecursionError:
        raise too_deep from None
    except (TypeError, ValueError):  # a lone surrogate is a ValueError too
        raise InvalidOptionError(name, "set", "it has to be plain JSON in UTF-8") from None
    if n_bytes > limit:
        raise RequestTooLargeError(name, n_bytes, limit)
    level: list[object] = [wanted]
    for _ in range(MAX_FORMAT_DEPTH):
        nested = [node for node in level if isinstance(node, dict | list)]
        level = [item for node in nested for item in (node.values() if isinstance(node, dict) else node)]
    if level:
        raise too_deep
