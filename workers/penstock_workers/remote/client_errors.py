"""Errors of the two clients and of servers' answers, turned into faults. Quotes nothing that was sent."""

import math
import re
from typing import Final

import httpx2
import openai

from penstock.errors import (
    PenstockError,
    UpstreamAnswerError,
    UpstreamError,
    UpstreamRefusedError,
    UpstreamUnavailableError,
)
from penstock_workers.remote.endpoint import Endpoint
from penstock_workers.remote.faults import Fault
from penstock_workers.remote.rate_headers import read_delay
from penstock_workers.remote.upstream import MAX_LOADING_S
from penstock_workers.settings import RemoteSettings

_HINTS: Final = {
    401: "the token is not accepted",
    402: "its credits are used up",
    403: "the token has no right to this model",
    404: "there is no such model or path",
    410: "this address is no longer served",
    413: "one input alone is too large",
    422: "the input is not accepted",
}
_PERMANENT: Final = frozenset(("insufficient_quota", "budget_exceeded"))  # a 429 that does not heal


class ClientErrors:
    """Errors of one model's server.

    Args:
        name: Name that the model is served under.
        endpoint: Its server.
        settings: Its settings, which say where the token comes from.
    """

    def __init__(self, name: str, endpoint: Endpoint, settings: RemoteSettings) -> None:
        self._name, self._host, self._token = name, endpoint.host, endpoint.token
        self._token_source = settings.token_env or settings.token_file

    def refused(self, status: int, problem: str) -> UpstreamRefusedError:
        """Return the error of what no request would do better; status 0: there was no answer."""
        return UpstreamRefusedError(self._name, self._host, status, problem)

    def bad_answer(self, problem: str) -> UpstreamAnswerError:
        """Return the error of an answer that cannot be used."""
        return UpstreamAnswerError(self._name, self._host, problem)

    def _away(self, problem: str) -> UpstreamUnavailableError:
        return UpstreamUnavailableError(self._name, self._host, problem)

    def hint(self, status: int) -> str:
        """Return what a status means here; empty if its name says enough."""
        hint = _HINTS.get(status, "")
        if status in (401, 403):
            hint += f" ({self._token_source or 'none is configured'})"
        return hint

    def code(self, body: object) -> str:
        """Return the server's own word for what is wrong, in brackets; no sentence, which may quote input."""
        fields = body if isinstance(body, dict) else {}
        inner = fields.get("error")
        for holder in (inner if isinstance(inner, dict) else {}, fields):
            for name in ("code", "error_type", "type"):
                word = plain_word(holder.get(name))
                if word and not (self._token and (word in self._token or self._token in word)):
                    return f" ({word})"
        return ""

    def explain(self, error: Exception) -> Fault:
        """Turn an error that a client raised into a fault."""
        if isinstance(error, Fault):
            return error
        if isinstance(error, UpstreamRefusedError):
            return Fault("refused", error)
        if isinstance(error, UpstreamError):
            return Fault("failed", error)
        if isinstance(error, PenstockError):
            return Fault("refused", error)
        if isinstance(error.__cause__, PenstockError | Fault):  # of ours, in a client's clothes
            return self.explain(error.__cause__)
        response = getattr(error, "response", None)
        if isinstance(response, httpx2.Response):
            return self.explain_status(response)
        if isinstance(error, openai.APIConnectionError | httpx2.HTTPError | OSError):
            cause = error.__cause__ if isinstance(error, openai.APIConnectionError) else error
            return Fault("failed", self._away(f"{type(cause or error).__name__}"))
        if isinstance(error, openai.APIError):  # an event of a stream
            return Fault("failed", self.bad_answer(f"an error inside it{self.code(error.body)}"))
        return Fault("failed", self.bad_answer(f"{type(error).__name__} while it was read"))

    def explain_status(self, response: httpx2.Response) -> Fault:
        """Turn the status of an answer into a fault."""
        status = response.status_code
        body = _json_of(response)
        code = self.code(body)
        problem = f"{status} {response.reason_phrase}{code}"
        if hint := self.hint(status):
            problem += f": {hint}"
        if 200 <= status < 300:
            return Fault("failed", self.bad_answer("it is no JSON"))
        if (status == 429 and code.strip(" ()") not in _PERMANENT) or status in (503, 529):
            return Fault("busy", self._away(problem), _loading_s(body) or read_delay(response.headers))
        if status == 413:
            return Fault("size", self.refused(status, problem))
        if status in (400, 422):
            return Fault("item", self.refused(status, problem))
        if status in (408, 409, 424, 425) or status >= 500:
            return Fault("failed", self._away(problem))
        return Fault("refused", self.refused(status, problem))


def _json_of(response: httpx2.Response) -> object:
    try:
        return response.json()
    except (ValueError, httpx2.HTTPError, httpx2.StreamError):
        return None


def plain_word(value: object) -> str:
    """Return a value that is one word of a server's own; else nothing."""
    return value if isinstance(value, str) and re.fullmatch(r"[\w.-]{1,64}", value, re.ASCII) else ""


def _loading_s(body: object) -> float | None:
    """Return `estimated_time` of a model that is being loaded, within bounds, seconds."""
    seconds = body.get("estimated_time") if isinstance(body, dict) else None
    if not isinstance(seconds, int | float) or not math.isfinite(seconds):
        return None
    return min(max(float(seconds), 1.0), MAX_LOADING_S)
