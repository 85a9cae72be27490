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

from penstock.conversation import Tool
from penstock.request import new_job_id
from penstock_workers.settings import ModelSettings, RateLimit, RemoteSettings

DIM = 8
TOKEN = "hf_swordfish_0123456789"
ARGUMENTS = '{"city": "Paris"}'
TOOLS: list[Tool] = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
    for name in ("weather", "time")
]
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
        if self.path.endswith("/completions"):
            if not body.get("stream"):
                return self.reply(200, chat(body=body))
            return self.stream(ANSWER, "tool_calls" if calls_for(body) else "stop", body)
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

    def stream(self, pieces: list[str], reason: str | None, body: Mapping[str, Any] | None = None) -> None:
        """Send an answer piece by piece; without a reason the connection ends in its middle."""
        body = body or {"messages": []}
        self.event_stream()
        for piece in pieces:
            said = {"delta": {"content": piece}} if "messages" in body else {"text": piece}
            choice = {"index": 0, "logprobs": likelihoods([piece], body), "finish_reason": None}
            self.event({"choices": [choice | said]})
        for index, call in enumerate(calls_for(body)):
            name, arguments = call["function"].values()
            self.call_piece({"index": index, "id": call["id"], "function": {"name": name, "arguments": ""}})
            for start in range(0, len(arguments), 4):
                self.call_piece({"index": index, "function": {"arguments": arguments[start : start + 4]}})
        if reason is None:
            self.close_connection = True
            return self.connection.close()
        return self.end(reason, body)

    def event_stream(self) -> None:
        """Begin an answer that comes in events."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def end(self, reason: str, body: Mapping[str, Any]) -> None:
        """Send the last events."""
        last = {"delta": {}} if "messages" in body else {"text": ""}
        self.event({"choices": [last | {"index": 0, "finish_reason": reason}]})
        self.event({"choices": [], "usage": USAGE})
        self.chunk(b"data: [DONE]\n\n")
        self.chunk(b"")

    def call_piece(self, piece: dict[str, Any]) -> None:
        """Send a part of a call."""
        self.event({"choices": [{"index": 0, "delta": {"tool_calls": [piece]}, "finish_reason": None}]})

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


def chat(
    pieces: list[str] = ANSWER, reason: str = "stop", body: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return OpenAI's answer in one piece, with all that the request asks for; the last choice first."""
    body = body or {"messages": []}
    choices = []
    for index in range(body.get("n", 1)):
        said = [*pieces[:-1], f"{pieces[-1]}{'!' * index}"]
        choice = {"index": index, "finish_reason": reason, "logprobs": likelihoods(said, body)}
        if "prompt" in body:
            choices.append(choice | {"text": "".join(said)})
        elif calls := calls_for(body):
            message = {"role": "assistant", "content": None, "tool_calls": calls}
            choices.append(choice | {"message": message, "finish_reason": "tool_calls"})
        else:
            choices.append(choice | {"message": {"role": "assistant", "content": "".join(said)}})
    known = {"id": "x", "object": "chat.completion", "created": 0, "model": "m"}
    return known | {"choices": choices[::-1], "usage": USAGE}


def calls_for(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a call of each tool, unless the last turn is a tool's answer."""
    tools = body.get("tools", ())
    if tools and body["messages"][-1]["role"] == "tool":
        return []
    return [
        {
            "id": f"call_{index}",
            "type": "function",
            "function": {"name": tool["function"]["name"], "arguments": ARGUMENTS},
        }
        for index, tool in enumerate(tools)
    ]


def likelihoods(pieces: list[str], body: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return log-probabilities in either shape, unlikely tokens first; a piece is a token."""
    wanted = body.get("logprobs")
    if wanted is None:
        return None
    n = wanted if "prompt" in body else body.get("top_logprobs", 0)
    tops = [{piece + "~" * rank: logprob_of(piece) - rank for rank in range(n)[::-1]} for piece in pieces]
    if "prompt" in body:
        values = [logprob_of(piece) for piece in pieces]
        return {"tokens": pieces, "token_logprobs": values, "top_logprobs": tops if n else None}
    return {
        "content": [
            token(piece, logprob_of(piece)) | {"top_logprobs": [token(*pair) for pair in top.items()]}
            for piece, top in zip(pieces, tops, strict=True)
        ]
    }


def logprob_of(piece: str) -> float:
    """Return how likely the server finds a token."""
    return -len(piece) / 8


def token(text: str, logprob: float) -> dict[str, Any]:
    """Return a token as the newer shape has it."""
    return {"token": text, "bytes": list(text.encode()), "logprob": logprob}


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


def answers(change: Callable[[dict[str, Any]], object]) -> Act:
    """Answer a chat or a completion with something that was changed in the right answer."""

    def act(handler: Handler, body: dict[str, Any]) -> None:
        answer = chat(body=body)
        change(answer)
        handler.reply(200, answer)

    return act


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


def remote_settings(source: str, task: str = "embed", **remote: object) -> ModelSettings:
    """Return a remote model's settings; each test's limits are its own, since its model's id is."""
    limit = RateLimit.model_validate(remote.pop("rate_limit", {}))
    fields = {"model": new_job_id(), "dim": DIM if task == "embed" else None, "protocol": "openai"} | remote
    return ModelSettings(
        task=task,  # type: ignore[arg-type]  # a Literal
        engine="remote",
        source=source,
        remote=RemoteSettings.model_validate(fields),
        rate_limit=limit,
    )
