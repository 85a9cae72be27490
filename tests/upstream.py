"""A server of hosted models over real HTTP: speaks OpenAI's protocol and TEI's, misbehaves on command."""

import hashlib
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

DIM = 8
TOKEN = "hf_swordfish_0123456789"
ANSWER = ["Ada ", "knows ", "the ", "turbine."]


def vector_of(text: str, dim: int = DIM) -> list[float]:
    """Return the vector that the server has for a text, of length 1."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
    vector = np.random.default_rng(seed).normal(size=dim).astype(np.float32)
    return [float(x) for x in vector / np.linalg.norm(vector)]


@dataclass(frozen=True, slots=True)
class Seen:
    """A request that came in."""

    path: str
    headers: Mapping[str, str]
    body: dict[str, Any]
    at: float

    @property
    def texts(self) -> list[str]:
        """Its texts, in either protocol."""
        found = self.body.get("input", self.body.get("inputs", []))
        return [found] if isinstance(found, str) else list(found)


Act = Callable[["Handler", dict[str, Any]], None]


@dataclass(slots=True)
class Upstream:
    """What the server does, and what it saw.

    Attributes:
        url: its address.
        seen: requests, in the order they came, but for GET.
        gets: paths of GET requests.
        plan: what it does to the next requests, one each; then it behaves.
        always: what it does to all, if set; None lets one pass.
        info: what TEI's `/info` says; None: there is no such path.
        models: what `/v1/models` says.
        max_texts: of one request; more is 413.
        per_minute: requests allowed in any minute, else 429; None: as many as one likes.
        n_abandoned: requests whose sender left before the answer.
    """

    url: str = ""
    seen: list[Seen] = field(default_factory=list)
    gets: list[str] = field(default_factory=list)
    plan: deque[Act] = field(default_factory=deque)
    always: Callable[[Seen], Act | None] | None = None
    info: dict[str, Any] | None = None
    models: list[dict[str, Any]] = field(default_factory=lambda: [{"id": "upstream-model"}])
    max_texts: int = 1 << 30
    per_minute: int | None = None
    refused_at: list[float] = field(default_factory=list)
    n_abandoned: int = 0
    in_flight: int = 0
    most_in_flight: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def texts(self) -> list[str]:
        """All texts that it was sent."""
        with self.lock:
            return [text for seen in self.seen for text in seen.texts]

    @contextmanager
    def running(self) -> Iterator["Upstream"]:
        """Serve while the block runs."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"upstream": self}))
        server.daemon_threads = True
        self.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    upstream: Upstream

    def log_message(self, *args: object) -> None:
        """Be quiet."""

    def do_GET(self) -> None:
        """Say what is served."""
        self.upstream.gets.append(self.path)
        if self.path == "/info" and self.upstream.info is not None:
            return self.reply(200, self.upstream.info)
        if self.path == "/v1/models":
            return self.reply(200, {"object": "list", "data": self.upstream.models})
        if self.path.startswith("/api/models/"):  # the hub's own, where providers are looked up
            mapping = {"status": "live", "providerId": "their-name", "task": "feature-extraction"}
            return self.reply(200, {"id": "org/name", "inferenceProviderMapping": {"together": mapping}})
        return self.reply(404, {"error": "no such path"})

    def do_POST(self) -> None:
        """Answer, or do what is planned."""
        body = json.loads(self.rfile.read(int(self.headers.get("content-length", 0))))
        upstream = self.upstream
        seen = Seen(self.path, {k.lower(): v for k, v in self.headers.items()}, body, time.monotonic())
        with upstream.lock:
            upstream.seen.append(seen)
            upstream.in_flight += 1
            upstream.most_in_flight = max(upstream.most_in_flight, upstream.in_flight)
            act = upstream.plan.popleft() if upstream.plan else None
            if act is None and upstream.always is not None:
                act = upstream.always(seen)
            recent = sum(one.at > seen.at - 60 for one in upstream.seen)
            is_over = upstream.per_minute is not None and recent > upstream.per_minute
            if is_over:
                upstream.refused_at.append(seen.at)
        try:
            if is_over:
                self.reply(429, {"error": {"code": "rate_limit_exceeded"}}, {"Retry-After": "1"})
            elif act is not None:
                act(self, body)
            elif len(seen.texts) > upstream.max_texts:
                self.reply(413, {"error": "too many", "error_type": "Validation"})
            else:
                self.answer(body)
        except OSError:
            with upstream.lock:
                upstream.n_abandoned += 1
            self.close_connection = True
        finally:
            with upstream.lock:
                upstream.in_flight -= 1

    def answer(self, body: dict[str, Any]) -> None:
        """Answer as it should be."""
        if self.path.endswith("/embed") or "/pipeline/" in self.path:
            return self.reply(200, [vector_of(text) for text in body["inputs"]])
        if self.path.endswith("/embeddings"):
            return self.reply(200, embeddings(body["input"]))
        if self.path.endswith("/chat/completions"):
            return self.stream(ANSWER, "stop") if body.get("stream") else self.reply(200, chat(ANSWER))
        return self.reply(404, {"error": "no such path"})

    def reply(self, status: int, body: object, headers: Mapping[str, str] | None = None) -> None:
        """Send an answer; a str goes as it is."""
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def stream(self, pieces: list[str], reason: str | None) -> None:
        """Send an answer piece by piece; without a reason the connection ends in its middle."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for piece in pieces:
            self.event({"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]})
        if reason is None:
            self.close_connection = True
            return self.connection.close()
        self.event({"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})
        self.event({"choices": [], "usage": USAGE})
        self.chunk(b"data: [DONE]\n\n")
        return self.chunk(b"")

    def event(self, fields: dict[str, Any]) -> None:
        """Send one event of a stream."""
        known = {"id": "x", "object": "chat.completion.chunk", "created": 0, "model": "m"}
        self.chunk(f"data: {json.dumps(known | fields)}\n\n".encode())

    def chunk(self, data: bytes) -> None:
        """Send one chunk."""
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()


USAGE = {"prompt_tokens": 11, "completion_tokens": 4, "total_tokens": 15}


def embeddings(texts: list[str]) -> dict[str, Any]:
    """Return OpenAI's answer; a token is a word."""
    data = [{"object": "embedding", "index": i, "embedding": vector_of(text)} for i, text in enumerate(texts)]
    n_tokens = sum(len(text.split()) for text in texts)
    return {"object": "list", "data": data[::-1], "model": "m", "usage": {"prompt_tokens": n_tokens}}


def chat(pieces: list[str], reason: str = "stop") -> dict[str, Any]:
    """Return OpenAI's answer in one piece."""
    message = {"role": "assistant", "content": "".join(pieces)}
    choices = [{"index": 0, "message": message, "finish_reason": reason}]
    known = {"id": "x", "object": "chat.completion", "created": 0, "model": "m"}
    return known | {"choices": choices, "usage": USAGE}


def says(status: int, body: object = "{}", **headers: str) -> Act:
    """Answer with a status; underscores in headers' names are dashes."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda handler, _: handler.reply(status, body, named)


def cut_off(handler: Handler, body: dict[str, Any]) -> None:
    """Close the connection in the middle of the body."""
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"data": [')
    handler.wfile.flush()
    handler.close_connection = True
    handler.connection.close()


def changed(change: Callable[[dict[str, Any]], object]) -> Act:
    """Answer an embedding request with something else made of the right answer."""
    return lambda handler, body: handler.reply(200, change(embeddings(body.get("input") or body["inputs"])))


def with_first_vector(vector: object) -> Act:
    """Replace the vector of the first text."""

    def change(answer: dict[str, Any]) -> object:
        answer["data"][-1]["embedding"] = vector  # they come in reverse
        return answer

    return changed(change)


def dies_after(n_pieces: int) -> Act:
    """Stream so many pieces and close the connection."""
    return lambda handler, _: handler.stream(ANSWER[:n_pieces], None)


def waits_for(event: threading.Event) -> Act:
    """Answer when the event is set; notices when the sender has left."""

    def act(handler: Handler, body: dict[str, Any]) -> None:
        handler.connection.settimeout(0.05)
        while not event.is_set():
            try:
                if handler.connection.recv(1) == b"":
                    raise BrokenPipeError
            except TimeoutError:
                pass
        handler.connection.settimeout(None)
        handler.answer(body)

    return act
