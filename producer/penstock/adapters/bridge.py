"""One client for the callbacks of a framework, whichever thread or event loop it makes them in."""

import asyncio
import json
import math
import time
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import aclosing
from dataclasses import replace
from functools import cache
from typing import Any, Final, Self, TypeVar, cast
from uuid import uuid4

from pydantic import BaseModel, Field, PrivateAttr

from penstock.blocking import Client
from penstock.client import DEFAULT_URL, AsyncClient
from penstock.conversation import ResponseFormat, Tool, ToolCall
from penstock.errors import InvalidOptionError, InvalidTextError
from penstock.request import PriorityName
from penstock.result import GenerateResult
from penstock.retry import WaitPolicy, try_again
from penstock.stream import Piece

T = TypeVar("T")

UNTIL_LATE: Final = WaitPolicy(max_wait_s=math.inf, attempts=None)
"""Tries again for as long as the call has time: the frameworks' own retries know no queue."""
CALLS_IN_TEXT: Final = "calls_in_text"
"""Marks a message of ours whose text may have its calls too, as the model wrote them."""
_LEAST_S: Final = 0.001


class Bridge(Client):
    """A client that may be used from any event loop, and that is the same when it is copied.

    Frameworks copy what they are given, and call from loops that come and go without telling. So all its
    connections belong to the one loop of the client's own thread, and each call waits for an answer from
    there; a call that is cancelled is cancelled there too.
    """

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def call(self, work: Callable[[AsyncClient], Coroutine[Any, Any, T]]) -> T:
        """Return what `work` returns; it runs in the client's loop, this blocks."""
        return self._run(work(self._started()))

    async def wait(self, work: Callable[[AsyncClient], Coroutine[Any, Any, T]]) -> T:
        """Return what `work` returns; it runs in the client's loop, this waits in the caller's."""
        return await self._wait(work(self._started()))

    def each(self, work: Callable[[AsyncClient], AsyncIterator[T]]) -> Iterator[T]:
        """Yield what `work` yields; closing it closes that."""
        return self._iterate(work(self._started()))

    async def iterate(self, work: Callable[[AsyncClient], AsyncIterator[T]]) -> AsyncGenerator[T]:
        """See `each`."""
        items = cast("AsyncGenerator[T]", work(self._started()))
        using = asyncio.Lock()  # a step that was cancelled here takes its time to end there

        async def next_item() -> tuple[T, ...]:
            async with using:
                return (item,) if (item := await anext(items, None)) is not None else ()

        async def leave() -> None:
            async with using:
                await items.aclose()

        running = self._running_here()
        try:
            while found := await running.wait(next_item()):
                yield found[0]
        finally:
            await running.wait(leave())

    async def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return await self._running_here().wait(work)


@cache
def shared(url: str, results_url: str | None = None) -> Bridge:
    """Return this process' client of these URLs, for objects that nobody closes."""
    return Bridge(url, results_url=results_url)


class Sending(BaseModel):
    """Common part of the models for frameworks that build on pydantic.

    Attributes:
        url: Redis that holds the queues.
        results_url: Redis that holds the results, where that is another server.
        priority: order among waiting jobs.
        tenant: tenant that the jobs belong to; tenants take turns.
        wait: retries of what may pass, all within the time of one call; None tries once.
    """

    url: str = Field(default=DEFAULT_URL, repr=False, exclude=True)  # it may hold a password
    results_url: str | None = Field(default=None, repr=False, exclude=True)
    priority: PriorityName = "default"
    tenant: str | None = None
    wait: WaitPolicy | None = UNTIL_LATE

    _client: Bridge = PrivateAttr()

    def model_post_init(self, context: Any, /) -> None:
        """Take the process' client of this URL; it connects at the first call."""
        super().model_post_init(context)
        self._client = shared(self.url, self.results_url)


async def patiently(
    client: AsyncClient,
    call: Callable[..., Awaitable[T]],
    *,
    wait: WaitPolicy | None,
    timeout_s: float | None,
    deadline_s: float | None = None,
    **asked: Any,
) -> T:
    """Return what a method of the client returns, and try again as `wait` says.

    All attempts share the time of one, and each is told what is left of it: a framework has one limit for a
    call. The client's own `wait` would give `timeout_s` to each attempt, and none to finding the model.

    Args:
        client: client that has the method.
        call: method of the client.
        wait: None calls once.
        timeout_s: time limit of all attempts together; None waits for as long as it takes.
        deadline_s: another such limit; the shorter of the two counts.
        **asked: other arguments of the method.

    Raises:
        PenstockError: the last attempt failed.
    """
    limits = [limit_s for limit_s in (timeout_s, deadline_s) if limit_s is not None]
    ends_at = time.monotonic() + min(limits) if limits else None

    async def attempt() -> T:
        left_s = None if ends_at is None else max(ends_at - time.monotonic(), _LEAST_S)
        return await call(**asked, timeout_s=left_s, deadline_s=left_s)

    return await try_again(wait, attempt, left_s=min(limits, default=None), broker=client._sender.broker)


async def generate(client: AsyncClient, *, tool_choice: object = None, **asked: Any) -> GenerateResult:
    """Return what the client's `generate` returns; see `patiently`.

    Args:
        client: client that is asked.
        tool_choice: OpenAI's option. Where it requires a call, the answer is that call, without text.
        **asked: arguments of `generate` and `patiently`.
    """
    asked, is_forced = _choose(asked, tool_choice)
    found = await patiently(client, client.generate, **asked)
    return replace(found, text="", tool_calls=[_read_call(found.text)]) if is_forced else found


async def pieces(client: AsyncClient, *, tool_choice: object = None, **asked: Any) -> AsyncGenerator[Piece]:
    """Yield what its `stream` yields; until there is a first piece it tries again. See `generate`."""
    asked, is_forced = _choose(asked, tool_choice)

    async def begin(**fields: Any) -> tuple[AsyncGenerator[Piece], Piece]:
        begun = cast("AsyncGenerator[Piece]", client.stream(**fields))
        return begun, await anext(begun)

    stream, piece = await patiently(client, begin, **asked)
    said = ""
    async with aclosing(stream):
        while piece.finish_reason is None:
            said += piece.text
            if not is_forced:
                yield piece
            piece = await anext(stream)
    yield replace(piece, text="", tool_calls=[_read_call(said + piece.text)]) if is_forced else piece


def conversation(turns: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what `generate` takes of a conversation.

    Args:
        turns: turns in OpenAI's form, oldest first; the last one is answered.

    Raises:
        InvalidTextError: the last turn is neither the user's nor a tool's, so there is nothing to answer.
    """
    if not turns or turns[-1]["role"] not in ("user", "tool"):
        raise InvalidTextError(
            max(len(turns) - 1, 0), "is neither the user's nor a tool's: the last turn is what is answered"
        )
    history = list(turns)
    fields: dict[str, Any] = {"prompt": history.pop()["content"] if turns[-1]["role"] == "user" else None}
    if history and history[0]["role"] == "system":
        fields["system_prompt"] = history.pop(0)["content"]
    return fields | {"history": history}


def beside_calls(text: str, calls: Sequence[dict[str, Any]], told: Mapping[str, Any]) -> str:
    """Return what goes back into a prompt of a text beside its calls: nothing, where it has them itself.

    Remote models tell their calls apart from the text; those served here write them into it.
    """
    has_calls = told.get(CALLS_IN_TEXT) and all(call["function"]["name"] in text for call in calls)
    return "" if has_calls else text


def _choose(asked: dict[str, Any], choice: object) -> tuple[dict[str, Any], bool]:
    """Return the arguments with which the model makes its choice, and whether that has to be a call."""
    if choice in (None, False, "auto"):
        return asked, False
    if choice == "none":
        return asked | {"tools": None}, False
    if asked.get("response_format"):
        raise InvalidOptionError("response_format", "set", "a call that is required has its own")
    if isinstance(choice, dict):
        choice = choice.get("function", {}).get("name")
    tools = asked.get("tools") or ()
    wanted = [tool for tool in tools if choice in (True, "any", "required", tool["function"]["name"])]
    if not wanted:
        names = ", ".join(tool["function"]["name"] for tool in tools)
        raise InvalidOptionError("tool_choice", repr(choice)[:80], f"auto, none, any, or one of: {names}")
    # The format says where the answer ends.
    return asked | {"response_format": _call_format(wanted), "stop": None, "stop_token_ids": None}, True


def _call_format(tools: Sequence[Tool]) -> ResponseFormat:
    """Return the format of a call of one of these and nothing else."""
    forms = []
    for place, tool in enumerate(tools):
        arguments = tool["function"].get("parameters", {"type": "object", "properties": {}})
        if "properties" in arguments:  # what a schema leaves open, a model may never end
            arguments = {"additionalProperties": False} | arguments
        # What its parts refer to is no longer at the root.
        moved = f'"$ref": "#/anyOf/{place}/properties/arguments/'
        form = {
            "type": "object",
            "properties": {
                "name": {"const": tool["function"]["name"]},
                "arguments": json.loads(json.dumps(arguments).replace('"$ref": "#/', moved)),
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        forms.append(form)
    return {"type": "json_schema", "json_schema": {"name": "call", "schema": {"anyOf": forms}}}


def _read_call(text: str) -> ToolCall:
    said = json.loads(text)
    arguments = json.dumps(said["arguments"], ensure_ascii=False)
    # Nine letters and digits, as workers' own.
    return {
        "id": uuid4().hex[:9],
        "type": "function",
        "function": {"name": said["name"], "arguments": arguments},
    }
