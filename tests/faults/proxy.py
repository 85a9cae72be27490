"""A proxy in front of a server: it can fall silent as a broken network does, and it can speak TLS."""

import asyncio
import contextlib
import gc
import math
import ssl
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_CHUNK_BYTES = 1 << 16


class Proxy:
    """Forwards connections to a port of 127.0.0.1.

    Args:
        target_port: where to.
        tls: what it speaks; None for plain TCP.
        bytes_per_s: each direction of a connection carries no more.

    Attributes:
        port: where it listens; set when it runs.
    """

    def __init__(
        self, target_port: int, tls: ssl.SSLContext | None = None, *, bytes_per_s: float = math.inf
    ) -> None:
        self.port = 0
        self._bytes_per_s = bytes_per_s
        self._target_port, self._tls = target_port, tls
        self._is_silent = False
        self._links: list[_Link] = []
        self._accepted: list[asyncio.StreamWriter] = []
        self._carrying: list[asyncio.Future[list[None]]] = []

    @contextmanager
    def running(self) -> Iterator["Proxy"]:
        """Forward while the block runs."""
        ready = threading.Event()
        thread = threading.Thread(target=lambda: asyncio.run(self._serve(ready)), name="proxy", daemon=True)
        thread.start()
        assert ready.wait(10)
        try:
            yield self
        finally:
            self._loop.call_soon_threadsafe(self._stop.set)
            thread.join(10)
            # Whoever was connecting at that moment has left a connection that nobody can close.
            del self._loop, self._stop
            for kept in (self._links, self._accepted, self._carrying):
                kept.clear()
            with warnings.catch_warnings(action="ignore"):
                gc.collect()

    def swallow(self) -> None:
        """Let no byte through any more, and close nothing: both sides see silence.

        What is connected now stays silent for good, as after a router that forgot its connections.
        """
        self._is_silent = True
        for link in self._links:
            link.is_silent = True

    def forward(self) -> None:
        """Let the connections that are made from now on through again."""
        self._is_silent = False

    def lead_to(self, port: int) -> None:
        """Forward the connections that are made from now on to another server; leave the others be."""
        self._target_port = port

    def cut(self) -> None:
        """Close all connections, in the middle of what they carry."""

        def close() -> None:  # at one moment: those who connect again are not meant
            for link in self._links:
                link.close()

        self._loop.call_soon_threadsafe(close)

    async def _serve(self, ready: threading.Event) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0, ssl=self._tls)
        self.port = server.sockets[0].getsockname()[1]
        ready.set()
        await self._stop.wait()
        server.close()
        for link in self._links:
            link.close()
        await asyncio.gather(*self._carrying)
        for writer in self._accepted:  # also of those whose other side was not reached yet
            writer.close()
        await asyncio.gather(*(writer.wait_closed() for writer in self._accepted), return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._accepted.append(writer)
        there = await asyncio.open_connection("127.0.0.1", self._target_port)
        link = _Link((writer, there[1]), is_silent=self._is_silent, bytes_per_s=self._bytes_per_s)
        self._links.append(link)
        carrying = asyncio.gather(link.carry(reader, there[1]), link.carry(there[0], writer))
        self._carrying.append(carrying)
        await carrying


class _Link:
    """One connection that is forwarded."""

    def __init__(
        self, writers: tuple[asyncio.StreamWriter, ...], *, is_silent: bool, bytes_per_s: float
    ) -> None:
        self.is_silent, self._bytes_per_s = is_silent, bytes_per_s
        self._writers = writers

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry one direction until either side closes."""
        with contextlib.suppress(OSError):
            while data := await reader.read(_CHUNK_BYTES):
                if not self.is_silent:
                    writer.write(data)
                    await writer.drain()
                    await asyncio.sleep(len(data) / self._bytes_per_s)
        if not self.is_silent:  # else the other side never hears of it
            self.close()

    def close(self) -> None:
        """Close both sides."""
        for writer in self._writers:
            writer.close()
