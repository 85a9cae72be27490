"""One client for the callbacks of a framework, whichever thread or event loop it makes them in."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from typing import Any, Self, TypeVar, cast

from penstock.blocking import Client
from penstock.client import AsyncClient

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

    async def wait(self, work: Callable[[AsyncClient], Coroutine[Any, Any, T]]) -> T:
        """Return what `work` returns; it runs in the client's loop, this waits in the caller's."""
        return await self._wait(work(self._started()))

    async def iterate(self, work: Callable[[AsyncClient], AsyncIterator[T]]) -> AsyncIterator[T]:
        """Yield what `work` yields; leaving the loop closes it."""
        items = cast("AsyncGenerator[T]", work(self._started()))

        async def next_item() -> tuple[T, ...]:
            return (item,) if (item := await anext(items, None)) is not None else ()

        async def leave() -> None:
            await items.aclose()

        try:
            while found := await self._wait(next_item()):
                yield found[0]
        finally:
            await self._wait(leave())

    async def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        assert self._loop is not None
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))
