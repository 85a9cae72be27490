"""Options of the client's calls: their names and types, what requests they make, and how jobs are sent."""

import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, TypedDict

from penstock.conversation import Message, ResponseFormat, Tool
from penstock.errors import InvalidOptionError
from penstock.request import TENANT, Lane, Mode, Precision, Priority, PriorityName, Truncation
from penstock.retry import WaitPolicy
from penstock.validation import is_number


class SendOptions(TypedDict, total=False):
    """Options of every job.

    `priority` says which waiting jobs go first; after `deadline_s` seconds the job is not worth computing.
    Jobs of a `tenant` take turns with those of others, by the shares of the deployment's settings.

    With `wait` a call is tried again if the queue is full, or if a worker or Redis fails for a while; without
    it the first error is raised.
    """

    priority: PriorityName
    tenant: str | None
    deadline_s: float | None
    wait: WaitPolicy | None


OF_SENDING: Final = frozenset(SendOptions.__annotations__)
"""Options that say how a job is sent; the others are fields of its request."""


class EmbedOptions(SendOptions, total=False):
    """Options of an embedding job; `penstock.request.EmbedRequest` explains them."""

    prompt_name: str | None
    prompt: str | None
    normalize_embeddings: bool
    truncate_dim: int | None
    precision: Precision


class GenerateOptions(SendOptions, total=False):
    """Options of a generation job; `penstock.request.GenerateRequest` explains them."""

    system_prompt: str | None
    history: Sequence[Message | Mapping[str, Any]] | None
    tools: Sequence[Tool] | None
    mode: Mode
    max_new_tokens: int | None
    context_window: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    seed: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    truncation: Truncation | None
    enable_thinking: bool | None
    n: int
    logprobs: bool
    top_logprobs: int | None
    response_format: ResponseFormat | None


class RerankOptions(SendOptions, total=False):
    """Options of a reranking job; `penstock.request.RerankRequest` explains them."""

    top_n: int | None


def embed_fields(texts: Sequence[str], model: str, options: EmbedOptions) -> dict[str, object]:
    """Return the fields of an `EmbedRequest`, and the options of sending it."""
    return {**options, "model": model, "texts": list(texts) if isinstance(texts, tuple) else texts}


def generate_fields(
    prompt: str | None, model: str, options: GenerateOptions, *, is_stream: bool = False
) -> dict[str, object]:
    """Return the fields of a `GenerateRequest`, and the options of sending it."""
    fields: dict[str, object] = {**options, "model": model, "prompt": prompt, "stream": is_stream}
    turns = fields.pop("history", None)
    if isinstance(turns, Iterable) and not isinstance(turns, str | bytes | Mapping):
        turns = [turn.model_dump(exclude_none=True) if isinstance(turn, Message) else turn for turn in turns]
    if turns is not None:
        fields["history"] = turns
    if isinstance(tools := fields.get("tools"), tuple):
        fields["tools"] = list(tools)
    if is_stream and fields.get("seed") is None:
        fields["seed"] = secrets.randbits(63)  # a run that begins anew says the same
    return fields


def rerank_fields(
    query: str, documents: Sequence[str], model: str, options: RerankOptions
) -> dict[str, object]:
    """Return the fields of a `RerankRequest`, and the options of sending it."""
    listed = list(documents) if isinstance(documents, tuple) else documents
    return {**options, "model": model, "query": query, "documents": listed}


def read_lane(priority: object, tenant: object) -> Lane:
    """Return where in a queue jobs of these options wait.

    Raises:
        InvalidOptionError: there is no such priority, or no tenant can have this name.
    """
    return Lane(_priority(priority), _tenant(tenant))


def read_deadline_s(seconds: object) -> float | None:
    """Return the time that a job has, seconds; None where its caller set none.

    Raises:
        InvalidOptionError: it is no number of seconds above 0.
    """
    if seconds is None:
        return None
    if not (is_number(seconds) and 0 < seconds <= 1e300):
        raise InvalidOptionError("deadline_s", repr(seconds)[:80], "a number of seconds above 0")
    return float(seconds)


def _priority(name: object) -> Priority:
    try:
        return Priority[str(name).upper()]
    except KeyError:
        allowed = ", ".join(priority.name.lower() for priority in Priority)
        raise InvalidOptionError("priority", repr(name)[:80], f"one of {allowed}") from None


def _tenant(name: object) -> str:
    if name is None:
        return ""
    if not (isinstance(name, str) and TENANT.fullmatch(name)):
        raise InvalidOptionError("tenant", repr(name)[:80], "up to 64 of a-z A-Z 0-9 . _ @ -")
    return name
