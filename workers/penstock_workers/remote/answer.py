"""What an answer of OpenAI's kind says: text, thoughts, calls and log-probabilities, whole or in pieces."""

import json
from collections.abc import Iterable, Mapping
from typing import Any, Final
from uuid import uuid4

import numpy as np

from penstock.conversation import Message, ToolCall
from penstock.errors import PenstockError
from penstock.result import FinishReason, Logprobs
from penstock_workers.batching.feed import Answer

FINISH: Final[Mapping[str, FinishReason]] = {
    "stop": "stop",
    "eos_token": "stop",  # TGI's word
    "stop_sequence": "stop",
    "tool_calls": "stop",
    "length": "length",
}
"""What servers call the ends that are ours."""
_NOT_JOINED: Final = frozenset(("finish_reason", "id", "role", "type"))  # some servers repeat them


class UnusableError(Exception):
    """An answer lacks what was asked for: the model's fault, or something that the server ignores."""


def whole_text(answer: Answer) -> str:
    """Return all that the model wrote."""
    calls = json.dumps(answer.tool_calls) if answer.tool_calls else ""
    return f"{answer.reasoning or ''}{answer.text}{calls}"


def read_choice(choice: Mapping[str, Any], *, has_tools: bool, n_top_logprobs: int | None) -> Answer:
    """Read one of a server's choices, which has ended in one of `FINISH`.

    Args:
        choice: Choice of a chat, whole or joined from pieces, or of a completion.
        has_tools: True if the model may ask for calls.
        n_top_logprobs: See `Prompt`.

    Raises:
        UnusableError: what was asked for is not there.
        Exception: whatever comes of a choice of another shape.
    """
    ended = FINISH[choice["finish_reason"]]
    said = {"content": choice["text"]} if "text" in choice else choice.get("message") or choice["delta"]
    thought, asked = thought_of(said), said.get("tool_calls") if has_tools else None
    text = said.get("content")
    if text is None and (thought or asked):
        text = ""
    if not isinstance(text, str):
        raise UnusableError("it holds no text")
    return Answer(
        text=text,
        finish_reason=ended,
        reasoning=thought,
        tool_calls=_read_calls(asked or (), is_cut=ended == "length") or None,
        logprobs=None
        if n_top_logprobs is None
        else _read_logprobs(choice.get("logprobs"), text, n_top_logprobs),
    )


def thought_of(said: Mapping[str, Any]) -> str | None:
    """Return the reasoning of a message or a piece of one, by either of its names."""
    thought = said.get("reasoning_content") or said.get("reasoning")
    return thought if isinstance(thought, str) else None


def join(whole: dict[str, Any], piece: Mapping[str, Any]) -> None:
    """Add an event's choice to those before: texts and lists go on, calls do by their `index`."""
    for name, new in piece.items():
        old = whole.get(name)
        if new is None:
            continue
        if name == "tool_calls":
            calls = whole.setdefault(name, [])
            for call in new:
                known = next((one for one in calls if one["index"] == call["index"]), None)
                if known is None:
                    calls.append(call)
                else:
                    join(known, call)
        elif isinstance(old, dict):
            join(old, new)
        elif isinstance(old, list):
            old.extend(new)
        elif isinstance(old, str) and name not in _NOT_JOINED:
            whole[name] = old + new
        else:
            whole[name] = new


def _read_calls(asked: Iterable[Mapping[str, Any]], *, is_cut: bool) -> list[ToolCall]:
    """Return calls that are ready for `history`; of an answer that was cut, those that are whole."""
    calls: list[ToolCall] = []
    for call in asked:
        function = call["function"]
        arguments = function.get("arguments") or "{}"  # what some have for no arguments
        own: ToolCall = {
            "id": call.get("id") or uuid4().hex[:9],
            "type": "function",
            "function": {
                "name": function["name"],
                "arguments": arguments
                if isinstance(arguments, str)
                else json.dumps(arguments, ensure_ascii=False),
            },
        }
        try:
            Message.model_validate({"role": "assistant", "tool_calls": [own]})
        except (ValueError, PenstockError):
            if not is_cut:
                raise UnusableError("a tool call has no name, or arguments that are no JSON object") from None
        else:
            calls.append(own)
    return calls


_Token = tuple[bytes, float]


def _read_logprobs(found: Mapping[str, Any] | None, text: str, n_top_logprobs: int) -> Logprobs:
    """Return log-probabilities in our form; a token's id is its place among the different ones."""
    places = _places(found or {})
    width = 1 + n_top_logprobs
    if (text and not places) or (n_top_logprobs and places and max(map(len, places)) == 1):
        raise UnusableError("its log-probabilities are missing")
    known: dict[bytes, int] = {}
    ids = np.full((len(places), width), -1, dtype=np.int32)
    values = np.full((len(places), width), -np.inf, dtype=np.float32)
    for row, place in enumerate(places):
        for column, (token, value) in enumerate(place[:width]):
            ids[row, column] = known.setdefault(token, len(known))
            values[row, column] = value
    if np.isnan(values).any():
        raise UnusableError("a log-probability is no number")
    tokens = {str(token_id): token.decode("latin-1") for token, token_id in known.items()}
    return Logprobs(ids=ids, values=values, tokens=tokens)


def _places(found: Mapping[str, Any]) -> list[list[_Token]]:
    """Return, for each place of an answer, the token that was chosen, then the likeliest ones."""
    if "tokens" not in found:
        told = found.get("content") or ()
        return [[_token(one), *_likeliest(map(_token, one.get("top_logprobs") or ()))] for one in told]
    # The older shape has texts where the newer one has bytes.
    tokens, values = found["tokens"], found["token_logprobs"]
    tops = found.get("top_logprobs") or [None] * len(tokens)
    return [
        [(_bytes(token), value), *_likeliest((_bytes(one), x) for one, x in (top or {}).items())]
        for token, value, top in zip(tokens, values, tops, strict=True)
    ]


def _token(one: Mapping[str, Any]) -> _Token:
    content = one.get("bytes")
    return _bytes(one["token"]) if content is None else bytes([*content]), one["logprob"]


def _bytes(token: str) -> bytes:
    return token.encode(errors="replace")


def _likeliest(tokens: Iterable[_Token]) -> list[_Token]:
    return sorted(tokens, key=lambda token: -token[1])
