"""One client for the callbacks of a framework, whichever thread or event loop it makes them in."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from functools import cache
from typing import Any, Self, TypeVar, cast

from penstock.blocking import Client
from penstock.client import AsyncClient
from penstock.errors import InvalidTextError

T = TypeVar("T")


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

    async def iterate(self, work: Callable[[AsyncClient], AsyncIterator[T]]) -> AsyncGenerator[T]:
        """Yield what `work` yields; closing it closes that."""
        items = cast("AsyncGenerator[T]", work(self._started()))
        using = asyncio.Lock()  # a step that was cancelled here takes its time to end there

        async def next_item() -> tuple[T, ...]:
            async with using:
                return (item,) if (item := await anext(items, None)) is not None else ()

        async def leave() -> None:
            async with using:
                await items.aclose()

        try:
            while found := await self._wait(next_item()):
                yield found[0]
        finally:
            await self._wait(leave())

    async def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        assert self._loop is not None
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))


@cache
def shared(url: str) -> Bridge:
    """Return this process' client of a URL, for objects that nobody closes."""
    return Bridge(url)


def conversation(turns: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Return what `generate` takes of a conversation.

    Args:
        turns: role (`system`, `user` or `assistant`) and text, oldest first; the last one is answered.

    Raises:
        InvalidTextError: the last turn is not the user's, so there is nothing to answer.
    """
    if not turns or turns[-1][0] != "user":
        raise InvalidTextError(max(len(turns) - 1, 0), "is not the user's: the last turn is what is answered")
    *history, (_, prompt) = turns
    fields: dict[str, Any] = {"prompt": prompt}
    if history and history[0][0] == "system":
        fields["system_prompt"] = history.pop(0)[1]
    return fields | {"history": [{"role": role, "content": text} for role, text in history]}
