"""Turns, tools and response formats, as requests carry them."""

import json
from typing import Any

import pytest

from penstock.conversation import MAX_FORMAT_BYTES, MAX_FORMAT_DEPTH, Message
from penstock.errors import (
    InvalidMessageError,
    InvalidOptionError,
    InvalidTextError,
    PenstockError,
    RequestError,
    RequestTooLargeError,
)
from penstock.request import MAX_TURNS, GenerateRequest


def generate(**fields: Any) -> GenerateRequest:
    """Return a request of one prompt, with other fields as given."""
    return GenerateRequest.parse({"model": "chat", "prompt": "p", **fields})


# Response formats


def nested(levels: int) -> dict[str, Any]:
    """Return a response format with objects inside each other, itself counted."""
    inner: dict[str, Any] = {}
    for _ in range(levels - 3):
        inner = {"items": inner}
    return {"type": "json_schema", "json_schema": {"schema": inner}}


@pytest.mark.parametrize(
    "wanted",
    [
        {"type": "text"},
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": {"type": "integer"}}},
        {"type": "regex", "pattern": "a+"},
        {"type": "choice", "choices": ["yes", "no", ""]},
        nested(MAX_FORMAT_DEPTH),
    ],
    ids=lambda value: str(value)[:40],
)
def test_response_formats_survive_the_message(wanted: dict[str, Any]) -> None:
    """Each form goes to the worker as it was given, the order of properties kept."""
    fields = json.loads(json.dumps(generate(response_format=wanted).fields()))

    assert GenerateRequest.parse(fields).response_format == wanted


LOOP: dict[str, Any] = {}
LOOP["self"] = LOOP


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        ("json", "response_format is 'json'; input should be"),
        ({}, "unable to extract tag"),
        ({"type": "xml"}, "does not match any of the expected tags"),
        ({"type": "json_object", "schema": {}}, "there is no option of that name"),
        ({"type": "json_schema"}, "is missing"),
        ({"type": "json_schema", "json_schema": {"schema": True}}, "should be a valid dictionary"),
        ({"type": "choice", "choices": []}, "at least 1 item"),
        ({"type": "regex", "pattern": ""}, "at least 1 character"),
        (nested(MAX_FORMAT_DEPTH + 1), f"at most {MAX_FORMAT_DEPTH} levels"),
        (nested(100_000), f"at most {MAX_FORMAT_DEPTH} levels"),
        ({"type": "json_schema", "json_schema": {"schema": LOOP}}, "plain JSON"),
        ({"type": "json_schema", "json_schema": {"schema": {"const": object()}}}, "plain JSON"),
        ({"type": "json_schema", "json_schema": {"schema": {"const": float("nan")}}}, "plain JSON"),
        ({"type": "regex", "pattern": "\ud800"}, ""),
    ],
)
def test_response_formats_are_checked(wanted: object, text: str) -> None:
    """What is no response format is refused in one sentence, before it is sent."""
    with pytest.raises(RequestError) as caught:
        generate(response_format=wanted)

    assert text in str(caught.value)
    assert "response_format" in str(caught.value)


def test_large_response_formats_are_refused() -> None:
    """A format has a limit in bytes of its own."""
    with pytest.raises(RequestTooLargeError, match=f"response_format has .* limit is {MAX_FORMAT_BYTES}"):
        generate(response_format={"type": "choice", "choices": ["ü" * 100] * 400})


@pytest.mark.parametrize("option", [{"stop": "END"}, {"stop_token_ids": [5]}])
def test_stops_contradict_a_response_format(option: dict[str, Any]) -> None:
    """The format says where the answer ends; `text` is none."""
    with pytest.raises(InvalidOptionError, match="response_format says where the answer ends"):
        generate(response_format={"type": "json_object"}, **option)

    assert generate(response_format={"type": "text"}, **option)


# Turns


@pytest.mark.parametrize(
    ("history", "error"),
    [
        ("text", InvalidTextError),
        ({"role": "user", "content": "a"}, InvalidTextError),
        (["text"], InvalidTextError),
        ([{"role": "function", "content": "a"}], InvalidTextError),
        ([{"role": "tool", "content": "a"}], InvalidOptionError),
        ([{"role": "user", "content": 5}], InvalidTextError),
        ([{"role": "user", "content": None}], InvalidTextError),
        ([{"role": "user"}], InvalidMessageError),
        ([{"content": "a"}], InvalidMessageError),
        ([{"role": "user", "content": "a", "name": "b"}], InvalidTextError),
    ],
)
def test_turns_of_another_shape_are_refused(history: object, error: type[PenstockError]) -> None:
    """A turn is a known role and a text, and the error names its place."""
    with pytest.raises(error, match="history"):
        generate(history=history)


def call(arguments: object = "{}", id_: str = "c1") -> dict[str, object]:
    """Return a call as OpenAI has it."""
    return {"id": id_, "type": "function", "function": {"name": "weather", "arguments": arguments}}


def asked(*calls: object, **fields: object) -> dict[str, object]:
    return {"role": "assistant", "content": None, "tool_calls": list(calls), **fields}


def told(id_: str = "c1") -> dict[str, object]:
    return {"role": "tool", "content": "rain", "tool_call_id": id_}


def test_calls_and_their_answers_are_turns() -> None:
    """A call without content, and its answer as the last turn: the prompt may then be missing."""
    user = {"role": "user", "content": "Rain?"}
    request = GenerateRequest.parse(
        {"model": "chat", "history": [user, asked(call('{"at": "Ulm"}')), told()]}
    )

    assert request.messages() == list(request.history)
    assert request.history[1].content == ""
    assert GenerateRequest.parse(request.fields()) == request
    assert GenerateRequest.parse({"model": "chat", "history": [user]}).messages()[-1].role == "user"


@pytest.mark.parametrize(
    ("history", "error", "text"),
    [
        ([asked(call("not JSON")), told()], InvalidTextError, "the arguments of a call are a JSON object"),
        ([asked(call("[1]")), told()], InvalidTextError, "the arguments of a call are a JSON object"),
        ([asked(call()), told("c2")], InvalidOptionError, "a tool's turn answers a call just before"),
        ([asked(call()), {"role": "user", "content": "a"}, told()], InvalidOptionError, "of turn 2"),
        ([asked(call(), role="user")], InvalidTextError, "only a turn of role assistant has tool_calls"),
        ([asked()], InvalidTextError, "history"),
        ([asked({"function": {"name": "a"}})], InvalidMessageError, "arguments"),
        ([asked(call("[" * 100_000))], InvalidTextError, "JSON object"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_calls_that_do_not_fit_are_refused(history: object, error: type[PenstockError], text: str) -> None:
    """Turns of tools follow the calls they answer, and calls are what templates can show."""
    with pytest.raises(error, match=text):
        generate(history=history)


@pytest.mark.parametrize(
    ("tools", "error"),
    [
        ([], InvalidOptionError),
        ("weather", InvalidOptionError),
        ([{"type": "function"}], InvalidMessageError),
        ([{"type": "function", "function": {"name": ""}}], InvalidOptionError),
        ([{"type": "web_search", "function": {"name": "a"}}], InvalidOptionError),
        ([{"type": "function", "function": {"name": "a", "parameters": {"a": {1, 2}}}}], InvalidOptionError),
        (
            [{"type": "function", "function": {"name": "a", "description": "a" * 300_000}}],
            RequestTooLargeError,
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_tools_of_another_shape_are_refused(tools: object, error: type[PenstockError]) -> None:
    """A tool is a function with a name, as OpenAI has it."""
    with pytest.raises(error, match="tools"):
        generate(tools=tools)


@pytest.mark.parametrize(
    "fields",
    [{"system_prompt": "a"}, {"history": [{"role": "user", "content": "a"}]}, {"enable_thinking": False}],
    ids=str,
)
def test_a_text_to_complete_has_no_conversation(fields: dict[str, object]) -> None:
    """What only a chat template could use is refused beside `mode="complete"`."""
    with pytest.raises(InvalidOptionError, match="mode 'complete' has no conversation"):
        generate(mode="complete", **fields)


def test_a_conversation_needs_a_turn_to_answer() -> None:
    """Without a prompt, the last turn has to be the user's or a tool's."""
    for history in ([], [{"role": "assistant", "content": "a"}]):
        with pytest.raises(InvalidMessageError, match="field 'prompt' is missing"):
            generate(prompt=None, history=history)


def test_messages_are_the_whole_conversation_in_order() -> None:
    """The model sees system prompt, earlier turns oldest first, and the prompt last."""
    request = generate(
        system_prompt="s",
        history=[{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}],
        prompt="3",
    )

    assert [(turn.role, turn.content) for turn in request.messages()] == [
        ("system", "s"),
        ("user", "1"),
        ("assistant", "2"),
        ("user", "3"),
    ]


@pytest.mark.parametrize("system_prompt", [None, ""])
def test_no_system_prompt_is_no_turn(system_prompt: str | None) -> None:
    """An empty system prompt is none."""
    assert generate(system_prompt=system_prompt).messages() == [Message(role="user", content="p")]


def test_turns_have_a_number() -> None:
    """Empty turns count no bytes, so their number is bounded too."""
    history = [{"role": "user", "content": ""}] * (MAX_TURNS + 1)

    with pytest.raises(InvalidTextError, match=f"at most {MAX_TURNS} items"):
        GenerateRequest.parse({"model": "m", "prompt": "a", "history": history})
