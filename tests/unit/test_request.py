import traceback
import uuid
from typing import Any

import pytest
from pydantic import ValidationError

from penstock.errors import (
    InvalidMessageError,
    InvalidOptionError,
    InvalidTextError,
    RequestError,
    RequestTooLargeError,
)
from penstock.request import (
    MAX_REQUEST_BYTES,
    MAX_TEXT_BYTES,
    EmbedRequest,
    GenerateRequest,
    GenerationOptions,
    new_job_id,
)

SECRET = "swordfish"


def embed(**fields: Any) -> EmbedRequest:
    """Return a request of one text, with other fields as given."""
    return EmbedRequest.parse({"model": "minilm", "texts": ["a"], **fields})


def generate(**fields: Any) -> GenerateRequest:
    """Return a request of one prompt, with other fields as given."""
    return GenerateRequest.parse({"model": "chat", "prompt": "p", **fields})


# Options

ACCEPTED: list[tuple[str, object]] = [
    ("max_new_tokens", 1),
    ("max_new_tokens", 1 << 20),
    ("context_window", 16),
    ("context_window", (1 << 31) - 1),
    ("temperature", 0),
    ("temperature", 0.0),
    ("temperature", 2.0),
    ("top_k", 0),
    ("top_k", (1 << 31) - 1),
    ("top_p", 1e-9),
    ("top_p", 1),
    ("min_p", 0.0),
    ("min_p", 1.0),
    ("repetition_penalty", 1e-9),
    ("repetition_penalty", 10.0),
    ("presence_penalty", -2.0),
    ("presence_penalty", 2.0),
    ("seed", 0),
    ("seed", (1 << 63) - 1),
    ("stop", []),
    ("stop", ["x" * 256] * 16),
    ("stop_token_ids", [0, 5]),
    ("stop_token_ids", [(1 << 31) - 1] * 64),
    ("truncation", "error"),
    ("truncation", "oldest_turns"),
    ("truncation", "middle"),
    ("enable_thinking", False),
]
REFUSED: list[tuple[str, object, str]] = [
    ("max_new_tokens", 0, "is 0; input should be greater than or equal to 1"),
    ("max_new_tokens", (1 << 20) + 1, "is 1048577; input should be less than or equal to 1048576"),
    ("max_new_tokens", "1", "is '1'; input should be a valid integer"),
    ("max_new_tokens", True, "is True; input should be a valid integer"),
    ("max_new_tokens", 1.0, "is 1.0; input should be a valid integer"),
    ("context_window", 15, "is 15; input should be greater than or equal to 16"),
    ("context_window", 1 << 31, "is 2147483648; input should be less than 2147483648"),
    ("temperature", -0.1, "is -0.1; input should be greater than or equal to 0"),
    ("temperature", 2.1, "is 2.1; input should be less than or equal to 2"),
    ("temperature", float("nan"), "is nan; input should be less than or equal to 2"),
    ("temperature", float("inf"), "is inf; input should be less than or equal to 2"),
    ("temperature", "0.5", "is '0.5'; input should be a valid number"),
    ("temperature", True, "is True; input should be a valid number"),
    ("top_k", -1, "is -1; input should be greater than or equal to 0"),
    ("top_k", 1 << 31, "is 2147483648; input should be less than 2147483648"),
    ("top_k", 10**30, "input should be less than 2147483648"),
    ("top_k", 1.5, "is 1.5; input should be a valid integer"),
    ("top_p", 0.0, "is 0.0; input should be greater than 0"),
    ("top_p", 1.01, "is 1.01; input should be less than or equal to 1"),
    ("top_p", float("nan"), "is nan; input should be"),
    ("min_p", -0.01, "is -0.01; input should be greater than or equal to 0"),
    ("min_p", 1.01, "is 1.01; input should be less than or equal to 1"),
    ("repetition_penalty", 0, "is 0; input should be greater than 0"),
    ("repetition_penalty", 10.5, "is 10.5; input should be less than or equal to 10"),
    ("presence_penalty", -2.5, "is -2.5; input should be greater than or equal to -2"),
    ("presence_penalty", 2.5, "is 2.5; input should be less than or equal to 2"),
    ("seed", -1, "is -1; input should be greater than or equal to 0"),
    ("seed", 1 << 63, "is 9223372036854775808; input should be less than 9223372036854775808"),
    ("seed", False, "is False; input should be a valid integer"),
    ("stop", ["x"] * 17, "tuple should have at most 16 items"),
    ("stop", ["x" * 257], "string should have at most 256 characters"),
    ("stop", "", "stop.0 is ''; string should have at least 1 character"),
    ("stop", ["a", 5], "stop.1 is 5; input should be a valid string"),
    ("stop", 5, "is 5; input should be a valid tuple"),
    ("stop_token_ids", [-1], "stop_token_ids.0 is -1; input should be greater than or equal to 0"),
    ("stop_token_ids", ["a"], "stop_token_ids.0 is 'a'; input should be a valid integer"),
    ("stop_token_ids", [1] * 65, "tuple should have at most 64 items"),
    ("enable_thinking", 1, "is 1; input should be a valid boolean"),
    ("truncation", "newest", "is 'newest'; input should be 'error', 'oldest_turns' or 'middle'"),
    ("truncation", 1, "is 1; input should be 'error', 'oldest_turns' or 'middle'"),
]


@pytest.mark.parametrize(("option", "value"), ACCEPTED)
def test_options_inside_their_range_are_accepted(option: str, value: object) -> None:
    """Both ends of each documented range are usable."""
    given = getattr(generate(**{option: value}), option)

    assert (list(given) if isinstance(given, tuple) else given) == value


@pytest.mark.parametrize(("option", "value", "text"), REFUSED)
def test_options_outside_their_range_are_refused(option: str, value: object, text: str) -> None:
    """A caller hears option, value and range, in that order, and nothing is converted in silence."""
    with pytest.raises(InvalidOptionError) as caught:
        generate(**{option: value})

    assert caught.value.option.split(".")[0] == option
    assert str(caught.value).startswith(option)
    assert text in str(caught.value)


def test_every_option_is_in_the_tables() -> None:
    """A new option comes with its range tested."""
    options = set(GenerationOptions.model_fields)

    assert {option for option, _ in ACCEPTED} == {option for option, *_ in REFUSED} == options


@pytest.mark.parametrize(
    ("option", "value", "text"),
    [
        ("truncate_dim", 0, "truncate_dim is 0; input should be greater than or equal to 1"),
        ("truncate_dim", True, "truncate_dim is True; input should be a valid integer"),
        ("truncate_dim", "8", "truncate_dim is '8'; input should be a valid integer"),
        (
            "precision",
            "int4",
            "precision is 'int4'; input should be 'float32', 'float16', 'int8', 'binary' or 'ubinary'",
        ),
        ("normalize_embeddings", 1, "normalize_embeddings is 1; input should be a valid boolean"),
        ("normalize_embeddings", "true", "normalize_embeddings is 'true'; input should be a valid boolean"),
        ("model", "", "model is ''; string should have at least 1 character"),
        ("model", None, "model is None; input should be a valid string"),
        ("deadline", float("inf"), "deadline is inf; input should be a finite number"),
        ("deadline", -1.0, "deadline is -1.0; input should be greater than or equal to 0"),
        ("batch_size", 32, "batch_size is set; there is no option of that name"),
    ],
)
def test_embedding_options_are_checked(option: str, value: object, text: str) -> None:
    """Options of embedding jobs are checked as strictly."""
    with pytest.raises(InvalidOptionError) as caught:
        embed(**{option: value})

    assert str(caught.value) == text


def test_unknown_option_is_refused() -> None:
    """A misspelled option is an error, never dropped."""
    with pytest.raises(InvalidOptionError, match="max_tokens is set; there is no option of that name"):
        generate(max_tokens=64)


@pytest.mark.parametrize("version", [0, 2, -1, True, 1.0, "1", None, [1]])
def test_other_versions_are_refused(version: object) -> None:
    """A message of another version is told from one with a wrong field."""
    with pytest.raises(InvalidMessageError, match="version 1 is read here"):
        embed(version=version)


def test_one_stop_string_may_come_alone() -> None:
    """OpenAI's clients send one string where it is one."""
    assert generate(stop="END").stop == ("END",)


def test_requests_cannot_be_changed() -> None:
    """Whoever holds a request, holds what was checked."""
    request = embed()

    with pytest.raises(ValidationError):
        request.model = "other"


# Texts


@pytest.mark.parametrize(
    "text", ["", " ", "\0", "a\0b", "\ufeff", "\u2028", "🌊", "e\u0301", "\uffff", "\r\n"]
)
def test_any_unicode_text_is_accepted(text: str) -> None:
    """Whatever UTF-8 can carry goes to the model unchanged."""
    assert embed(texts=[text]).texts == [text]
    assert generate(prompt=f"{text}?").prompt == f"{text}?"


@pytest.mark.parametrize("surrogate", ["\ud800", "a\udfff", "ok \udc80"])
def test_lone_surrogates_are_refused(surrogate: str) -> None:
    """A text that UTF-8 cannot carry is refused before it is sent, with its place."""
    with pytest.raises(InvalidTextError, match="text 2 holds a lone surrogate, which UTF-8 cannot carry"):
        embed(texts=["a", "b", surrogate])
    for option in ("prompt", "prompt_name"):
        with pytest.raises(InvalidTextError, match="text 0 holds a lone surrogate"):
            embed(**{option: surrogate})
    with pytest.raises(InvalidTextError, match="text 0"):
        generate(prompt=surrogate)
    with pytest.raises(InvalidTextError, match="text 0 holds a lone surrogate"):
        generate(system_prompt=surrogate)
    with pytest.raises(InvalidTextError, match="text 1 holds a lone surrogate"):
        generate(history=[{"role": "user", "content": "a"}, {"role": "assistant", "content": surrogate}])


@pytest.mark.parametrize("unit", ["a", "é", "🌊"])
def test_text_of_1_mib_is_accepted_and_one_byte_more_is_not(unit: str) -> None:
    """The limit of a text counts bytes of UTF-8, not characters."""
    text = unit * (MAX_TEXT_BYTES // len(unit.encode()))

    assert embed(texts=["a", text]).texts[1] == text
    assert generate(prompt=text).prompt == text
    for make, name in [
        (lambda: embed(texts=["a", text + "a"]), "text 1"),
        (lambda: embed(prompt=text + "a"), "text 0"),
        (lambda: generate(prompt=text + "a"), "text 0"),
        (lambda: generate(system_prompt=text + "a"), "text 0"),
        (lambda: generate(history=[{"role": "user", "content": text + "a"}]), "text 0"),
    ]:
        with pytest.raises(RequestTooLargeError) as caught:
            make()
        assert str(caught.value) == f"{name} has 1048577 bytes, the limit is 1048576"


def test_whole_request_has_a_limit() -> None:
    """All texts together have a limit too, and reaching it is allowed."""
    full = ["a" * MAX_TEXT_BYTES] * (MAX_REQUEST_BYTES // MAX_TEXT_BYTES)

    assert len(embed(texts=full).texts) == 16
    with pytest.raises(RequestTooLargeError, match="the request has 16777217 bytes, the limit is 16777216"):
        embed(texts=[*full, "a"])


def test_whole_conversation_has_the_limit_of_a_request() -> None:
    """System prompt, earlier turns and prompt count together."""
    text = "a" * MAX_TEXT_BYTES
    turns = [{"role": "user", "content": text}] * (MAX_REQUEST_BYTES // MAX_TEXT_BYTES - 1)

    assert len(generate(history=turns, prompt=text).messages()) == 16
    for fields in ({"prompt": text, "system_prompt": "a"}, {"prompt": "a", "system_prompt": text}):
        with pytest.raises(RequestTooLargeError, match="the request has 16777217 bytes"):
            generate(history=turns, **fields)


@pytest.mark.parametrize(
    ("texts", "text"),
    [
        ("one string", "text 0 came as a str: pass a list of strings"),
        (b"bytes", "text 0 came as a bytes: pass a list of strings"),
        (("a", "b"), "text 0 came as a tuple: pass a list of strings"),
        (None, "text 0 came as a NoneType: pass a list of strings"),
        ({"a": 1}, "text 0 came as a dict: pass a list of strings"),
        (["a", None], "text 1 is a NoneType, not a string"),
        (["a", b"b"], "text 1 is a bytes, not a string"),
        ([["a"]], "text 0 is a list, not a string"),
    ],
)
def test_texts_of_another_type_are_refused(texts: object, text: str) -> None:
    """A single string is not taken for a list of characters; bytes are not decoded by guess."""
    with pytest.raises(InvalidTextError) as caught:
        embed(texts=texts)

    assert str(caught.value) == text


def test_no_texts_are_a_request() -> None:
    """An empty list is computed like any other; the array has shape (0, dim)."""
    assert embed(texts=[]).texts == []


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("", "text 0 is empty"),
        (0, "text 0 is a int, not a string"),
        (["a"], "text 0 is a list, not a string"),
    ],
)
def test_prompt_must_be_a_text(prompt: object, text: str) -> None:
    """There is no answer to nothing."""
    with pytest.raises(InvalidTextError) as caught:
        generate(prompt=prompt)

    assert str(caught.value) == text


# Precedence


def test_options_of_a_call_win_over_the_defaults() -> None:
    """What a call sets stays; what it leaves open comes from the defaults."""
    call = generate(temperature=0.0, top_k=0, stop=[]).options()
    defaults = GenerationOptions(temperature=0.7, top_k=40, stop=("END",), top_p=0.9, max_new_tokens=512)

    options = call.over(defaults)

    assert (options.temperature, options.top_k, options.stop) == (0.0, 0, ())
    assert (options.top_p, options.max_new_tokens) == (0.9, 512)
    assert (options.seed, options.min_p, options.truncation) == (None, None, None)


def test_over_changes_neither_side() -> None:
    """The model's defaults are shared by all calls."""
    call, defaults = GenerationOptions(seed=1), GenerationOptions(seed=2, top_k=3)

    call.over(defaults)

    assert call == GenerationOptions(seed=1)
    assert defaults == GenerationOptions(seed=2, top_k=3)


# What is told


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": f"{SECRET}\ud800"},
        {"prompt": [SECRET]},
        {"prompt": {SECRET: 1}},
        {"prompt": SECRET + "a" * MAX_TEXT_BYTES},
        {"system_prompt": f"{SECRET}\ud800"},
        {"system_prompt": [SECRET]},
        {"system_prompt": SECRET + "a" * MAX_TEXT_BYTES},
        {"history": SECRET},
        {"history": {SECRET: SECRET}},
        {"history": [SECRET]},
        {"history": [{"role": "user", "content": [SECRET]}]},
        {"history": [{"role": "user", "content": f"{SECRET}\udc00"}]},
        {"history": [{"role": SECRET, "content": SECRET}]},
        {"history": [{"content": SECRET}]},
        {"texts": SECRET},
        {"texts": [[SECRET]]},
        {"texts": {SECRET: SECRET}},
        {"texts": ["a", f"{SECRET}\ud800"]},
        {"texts": [SECRET + "a" * MAX_TEXT_BYTES]},
    ],
    ids=lambda fields: str(fields)[:48],
)
def test_errors_never_quote_a_text(fields: dict[str, object]) -> None:
    """Errors are logged and stored; what the caller wrote is not."""
    make = embed if "texts" in fields else generate

    with pytest.raises(RequestError) as caught:
        make(**fields)

    assert SECRET not in str(caught.value)
    assert SECRET not in repr(caught.value.args)
    assert SECRET not in "".join(traceback.format_exception(caught.value))  # pydantic quotes its input


def test_job_ids_are_fresh_and_random() -> None:
    """Nobody can guess another job's id."""
    ids = [uuid.UUID(new_job_id()) for _ in range(100)]

    assert len(set(ids)) == 100
    assert {id_.version for id_ in ids} == {4}


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"n": 0}, "n is 0"),
        ({"n": 17}, "n is 17"),
        ({"n": 2, "stream": True}, "n is 2; a stream has one answer"),
        ({"top_logprobs": 2}, "top_logprobs is 2; it needs logprobs"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs is 21"),
    ],
    ids=str,
)
def test_several_answers_and_log_probabilities_have_limits(fields: dict[str, Any], problem: str) -> None:
    """What cannot be answered is refused before it is sent."""
    with pytest.raises(InvalidOptionError, match=problem):
        GenerateRequest.parse({"model": "chat", "prompt": "Who?", **fields})
