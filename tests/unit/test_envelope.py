"""What is refused of a list's entry before anything is built from it."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.envelope import MAX_ENTRY_BYTES, EntryError, ReturnAddress, is_clean, open_entry, printable
from penstock.errors import RequestTooLargeError
from penstock.messages import encode_message
from penstock.request import MAX_REQUEST_BYTES, EmbedRequest, Priority
from penstock.validation import describe
from tests.messages import message

NAMES = ("id", "task", "root_id", "parent_id", "group", "lang", "origin", "shadow", "eta", "expires")
UNCLEAN = (
    "",
    "a\nb",
    "a\x1b[31mb",
    "\x00",
    "\u2028",
    "\u202e",
    "\ud800",
    "x" * 257,
    True,
    5,
    1.5,
    {},
    [],
    [["x"]],
)


def envelope(**changes: Any) -> dict[str, Any]:
    """Return a message of our client, with changes at `section__name`."""
    return message(tenant="acme", n_tokens=3, **changes)


def refusal(made: Any) -> EntryError:
    """Return why an entry is refused."""
    with pytest.raises(EntryError) as caught:
        open_entry(made if isinstance(made, bytes) else json.dumps(made).encode())
    return caught.value


def test_our_own_messages_pass() -> None:
    """What our client sends, and what Celery adds to it, is returned as it is."""
    made = envelope(
        headers__stamps={"a": ["b"]}, headers__stamped_headers=["a"], headers__custom={"any": [1]}
    )

    assert open_entry(json.dumps(made).encode()) == made


@pytest.mark.parametrize("value", UNCLEAN, ids=ascii)
@pytest.mark.parametrize("name", NAMES)
def test_a_header_that_is_no_clean_text_is_refused(name: str, value: object) -> None:
    """Control characters, halves of surrogate pairs, other types and what is too long; nothing is quoted."""
    error = refusal(envelope(**{f"headers__{name}": value}))

    assert name in error.problem
    assert error.problem.isprintable()
    assert error.sender == (
        None if name == "id" else ReturnAddress(job_id="job", reply_to="penstock:reply:1")
    )


@pytest.mark.parametrize("value", [value for value in UNCLEAN if value != ""], ids=ascii)
@pytest.mark.parametrize("name", ["reply_to", "correlation_id", "delivery_tag"])
def test_a_property_that_is_no_clean_text_is_refused(name: str, value: object) -> None:
    """The sender is told by its id alone where its reply channel is what is wrong."""
    error = refusal(envelope(**{f"properties__{name}": value}))

    assert name in error.problem
    assert error.sender is not None
    assert error.sender.reply_to == (None if name == "reply_to" else "penstock:reply:1")


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"headers__tenant": "a\nb"}, "tenant"),
        ({"headers__tenant": "a\x06\x17b"}, "tenant"),
        ({"headers__tenant": 3}, "tenant"),
        ({"headers__tenant": "x" * 65}, "tenant"),
        ({"headers__retries": -1}, "retries"),
        ({"headers__retries": True}, "retries"),
        ({"headers__retries": 10**400}, "retries"),
        ({"headers__timelimit": [1]}, "timelimit"),
        ({"headers__timelimit": ["a", None]}, "timelimit"),
        ({"headers__timelimit": [-1, None]}, "timelimit"),
        ({"headers__ignore_result": "no"}, "ignore_result"),
        ({"headers__stamps": []}, "stamps"),
        ({"headers__compression": "application/x-bz2"}, "compressed"),
        ({"headers__compression": ["gzip"]}, "compressed"),
        ({"headers__custom": [[[[[[[[[[1]]]]]]]]]]}, "deeper"),
        ({"headers__cust\nom": 1}, "name of a header"),
        ({"headers__custom": "\udfff"}, "surrogate"),
        ({"properties__priority": 256}, "priority"),
        ({"properties__priority": 1.0}, "priority"),
        ({"properties__delivery_info": []}, "delivery_info"),
        ({"properties__delivery_info": {"exchange": 3}}, "exchange"),
        ({"properties__body_encoding": "bz2"}, "body_encoding"),
        ({"properties__body_encoding": ["base64"]}, "body_encoding"),
        ({"content_type": "application/x-python-serialize"}, "only JSON"),
        ({"content_type": "application/data"}, "only JSON"),
        ({"content_type": "a\x1b]0;b\x07"}, "only JSON"),
        ({"content_type": None}, "only JSON"),
        ({"content_encoding": "bz2"}, "content encoding"),
        ({"content_encoding": {"a": 1}}, "content encoding"),
        ({"body": None}, "body"),
        ({"body": {"a": 1}}, "body"),
        ({"body": "\ud800"}, "surrogate"),
    ],
    ids=str,
)
def test_what_else_is_refused(changes: dict[str, Any], word: str) -> None:
    """Each refusal names what is wrong, and its sender is told."""
    error = refusal(envelope(**changes))

    assert word in error.problem
    assert error.problem.isprintable()
    assert error.sender == ReturnAddress(job_id="job", reply_to="penstock:reply:1")


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\xff",
        b"{",
        b"7",
        b"[]",
        b"null",
        b"{}",
        b"\xef\xbb\xbf{}",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"headers": {}, "properties": {"a": NaN}}',
        b'{"headers": {}, "properties": {"a": -Infinity}}',
        b'{"headers": {}, "properties": {"a": ' + b"9" * 5000 + b"}}",
        b'{"headers": [], "properties": {}}',
        b'{"headers": {}, "properties": "x"}',
        json.dumps(envelope()).encode().replace(b'"delivery_tag": "job', b'"delivery_tag": "\xff'),
    ],
    ids=lambda raw: ascii(raw[:40]),
)
def test_what_is_no_message(raw: bytes) -> None:
    """No strict JSON object in UTF-8, or no headers and properties in it: nobody is told."""
    error = refusal(raw)

    assert not error.is_message
    assert error.sender is None


def test_a_giant_is_refused_before_it_is_decoded() -> None:
    """The bound is four bytes for each of text; who sent too much is told, by its end alone too."""
    made = json.dumps(envelope()).encode()
    giant = made.replace(b'"body": "', b'"body": "' + b"x" * MAX_ENTRY_BYTES)

    whole = refusal(giant)
    cut = refusal(b"\0%d\n" % len(giant) + giant[-1000:])

    assert MAX_ENTRY_BYTES > 4 * MAX_REQUEST_BYTES
    assert whole.problem == cut.problem == f"it has {len(giant):,} bytes, the limit is {MAX_ENTRY_BYTES:,}"
    assert whole.sender == cut.sender == ReturnAddress(job_id="job", reply_to="penstock:reply:1")


def test_a_text_cannot_pose_as_the_sender_of_a_giant() -> None:
    """Quotes in a body are escaped, so what a caller wrote is not taken for the message's id."""
    text = json.dumps({"id": "victim", "reply_to": "penstock:reply:victim"})
    made = json.dumps(envelope(body=json.dumps([text]))).encode()

    assert refusal(b"\0999999999\n" + made).sender == ReturnAddress(job_id="job", reply_to="penstock:reply:1")


def test_what_is_shown_stays_on_its_line() -> None:
    """Whatever a sender wrote is printable, and a value of theirs is told without a word of it."""
    assert printable("a\nb\x1b]0;c\x07\ud800\u202e") == r"a\nb\x1b]0;c\x07\ud800\u202e"
    assert printable("x" * 300).endswith("x...")
    assert [describe(value) for value in ("secret", ["secret"], {"secret": 1}, 3, None, 10**30)] == [
        "a string of 6 characters",
        "a list of 1 items",
        "a dict of 1 items",
        "3",
        "None",
        "a int",
    ]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
SECTIONS = st.sampled_from(["headers", "properties"])
FIELDS = st.sampled_from([*NAMES, "tenant", "retries", "timelimit", "reply_to", "correlation_id", "priority"])


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(SECTIONS, FIELDS, JSON), max_size=3))
def test_what_passes_is_clean(changes: list[tuple[str, str, Any]]) -> None:
    """Whatever headers and properties hold is refused, or all that keys are made of is clean text."""
    made = envelope()
    for section, name, value in changes:
        made[section][name] = value

    try:
        opened = open_entry(json.dumps(made).encode())
    except EntryError:
        return
    json.dumps(opened, ensure_ascii=False, allow_nan=False).encode()
    assert all(opened["headers"].get(name) is None or is_clean(opened["headers"][name]) for name in NAMES)
    assert is_clean(opened["headers"]["id"])


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_refused(raw: bytes) -> None:
    """Bytes that are no message raise the one error, whatever they are."""
    assert refusal(raw).problem


def test_our_client_hears_of_a_message_above_the_bound() -> None:
    """Texts of control characters take seven bytes each: they are refused before they are sent."""
    request = EmbedRequest(model="m", texts=["\0" * (1 << 20)] * 10)

    with pytest.raises(RequestTooLargeError, match="the message has"):
        encode_message(
            request, job_id="job", queue="cpu.m", priority=Priority.DEFAULT, reply_to="", origin="tests"
        )
