"""A server of hosted embeddings that allows so many requests a minute, and takes note of each."""

import json
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Final

MINUTE_S: Final = 60.0
DIM: Final = 8


@dataclass(slots=True)
class Hosted:
    """What the server allows, and what it saw; moments are of `time.monotonic`.

    Attributes:
        per_minute: requests in any 60 s; one more is a 429.
        url: OpenAI's base URL.
        accepted: when it answered a request.
        refused: when it refused one.
    """

    per_minute: int
    url: str = ""
    accepted: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    _window: deque[float] = field(default_factory=deque)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def allows(self) -> bool:
        """Count a request; any thread may call."""
        with self._lock:
            now = time.monotonic()
            while self._window and self._window[0] <= now - MINUTE_S:
                self._window.popleft()
            is_allowed = len(self._window) < self.per_minute
            if is_allowed:
                self._window.append(now)
            (self.accepted if is_allowed else self.refused).append(now)
            return is_allowed


@contextmanager
def hosting(per_minute: int) -> Iterator[Hosted]:
    """Serve on a free port of 127.0.0.1 while the block runs."""
    hosted = Hosted(per_minute)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if hosted.allows():
                self._reply(200, {"data": _vectors(body["input"]), "usage": {"prompt_tokens": 1}})
            else:
                self._reply(429, {"error": {"message": "too many requests"}})

        def do_GET(self) -> None:
            self._reply(404, {})

        def log_message(self, *args: object) -> None:
            pass

        def _reply(self, status: int, body: object) -> None:
            payload = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hosted.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hosted
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _vectors(texts: list[str]) -> list[dict[str, object]]:
    return [
        {"index": index, "embedding": [float(len(text) + i + 1) for i in range(DIM)]}
        for index, text in enumerate(texts)
    ]
