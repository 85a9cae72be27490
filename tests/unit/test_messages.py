import json
from typing import Any

import pytest

from penstock.conversation import Message
from penstock.errors import InvalidMessageError, InvalidOptionError, InvalidTextError
from penstock.keys import queue_key, queue_name
from penstock.messages import TASK_NAMES, decode_request, encode_message
from penstock.request import EmbedRequest, GenerateRequest, Priority, Request

EMBED = EmbedRequest(model="minilm", texts=["Alpha bravo", "Грüße", ""], sent_at=1.5, deadline=2.5)
GENERATE = GenerateRequest(
    model="chat",
    prompt="Charlie?",
    system_prompt="Delta.",
    history=(Message(role="user", content="Echo"), Message(role="assistant", content="Foxtrot")),
    temperature=0.5,
    stop=("Golf",),
)


def sent(request: Request, priority: Priority = Priority.DEFAULT) -> dict[str, Any]:
    """Return the envelope of a message."""
    message = encode_message(
        request, job_id="job", queue="gpu.minilm", priority=priority, reply_to="reply", origin="me@here"
    )
    envelope: dict[str, Any] = json.loads(message)
    return envelope


def test_message_has_the_documented_fields() -> None:
    """Celery and kombu find what they need, and nothing else."""
    envelope = sent(EMBED, Priority.BATCH)

    body = json.loads(envelope.pop("body"))
    assert body == [[], EMBED.fields(), {"callbacks": None, "errbacks": None, "chain": None, "chord": None}]
    assert envelope == {
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {
            "lang": "py",
            "task": "penstock.embed",
            "id": "job",
            "root_id": "job",
            "parent_id": None,
            "group": None,
            "shadow": None,
            "eta": None,
            "expires": None,
            "retries": 0,
            "timelimit": [None, None],
            "argsrepr": "()",
            "kwargsrepr": "3 texts, 16 characters",
            "origin": "me@here",
            "ignore_result": False,
        },
        "properties": {
            "correlation_id": "job",
            "reply_to": "reply",
            "delivery_mode": 2,
            "delivery_info": {"exchange": "", "routing_key": "gpu.minilm"},
            "priority": 6,
            "body_encoding": "utf-8",
            "delivery_tag": "job",
        },
    }


def test_message_leaves_defaults_out() -> None:
    """A plain request is a short message, and always names its version."""
    fields = EmbedRequest(model="minilm", texts=["a"]).fields()

    assert fields == {"version": 1, "model": "minilm", "texts": ["a"]}


@pytest.mark.parametrize(
    "request_",
    [
        EMBED,
        GENERATE,
        EmbedRequest(model="m", texts=[]),
        EmbedRequest(model="m", texts=["\0 🌊 \u2028"], precision="float16", truncate_dim=1, prompt=""),
        GenerateRequest(model="m", prompt="p", temperature=0.1 + 0.2, seed=(1 << 63) - 1, stop=()),
    ],
    ids=str,
)
def test_message_decodes_to_the_request_that_was_sent(request_: Request) -> None:
    """A worker sees exactly what the caller asked."""
    envelope = sent(request_)

    args, kwargs, _ = json.loads(envelope["body"])
    assert decode_request(envelope["headers"]["task"], tuple(args), kwargs) == request_


@pytest.mark.parametrize("request_", [EMBED, GENERATE], ids=["embed", "generate"])
def test_summary_has_no_word_of_the_texts(request_: Request) -> None:
    """Logs and Flower show how much was asked, never what."""
    headers = json.dumps(sent(request_)["headers"], ensure_ascii=False)

    for word in ("Alpha", "bravo", "Грüße", "Charlie", "Delta", "Echo", "Foxtrot", "Golf"):
        assert word not in headers
        assert word not in request_.summary()


def test_summary_counts() -> None:
    """The summary says how many texts or turns, and how many characters."""
    assert EmbedRequest(model="m", texts=["ab"] * 1500).summary() == "1,500 texts, 3,000 characters"
    assert GENERATE.summary() == f"4 turns, {len('Delta.EchoFoxtrotCharlie?')} characters"


@pytest.mark.parametrize(
    ("task", "kwargs", "error", "text"),
    [
        ("embed", {}, InvalidMessageError, "field 'model' is missing"),
        ("embed", {"model": "m"}, InvalidMessageError, "field 'texts' is missing"),
        ("generate", {"model": "m"}, InvalidMessageError, "field 'prompt' is missing"),
        (
            "embed",
            {"model": "m", "texts": [], "txt": 1},
            InvalidOptionError,
            "txt is set; there is no option",
        ),
        ("generate", {"model": "m", "prompt": "p", "texts": []}, InvalidOptionError, "texts is set"),
        (
            "embed",
            {"model": "m", "texts": [], "version": 2},
            InvalidMessageError,
            "version 2; version 1 is read",
        ),
        ("embed", {"model": "m", "texts": [], "version": "1"}, InvalidMessageError, "version '1'; version 1"),
        (
            "embed",
            {"model": "m", "texts": [], "version": None},
            InvalidMessageError,
            "version None; version 1",
        ),
        (
            "embed",
            {"model": "m", "texts": [], "version": True},
            InvalidMessageError,
            "version True; version 1",
        ),
        ("embed", {"model": 5, "texts": []}, InvalidOptionError, "model is 5"),
        ("embed", {"model": "m", "texts": [5]}, InvalidTextError, "text 0 is a int, not a string"),
        ("embed", {"model": "m", "texts": [], "deadline": "soon"}, InvalidOptionError, "deadline is 'soon'"),
        ("embed", {"model": "m", "texts": [], "sent_at": float("nan")}, InvalidOptionError, "sent_at is nan"),
    ],
)
def test_wrong_messages_are_refused(
    task: str, kwargs: dict[str, Any], error: type[Exception], text: str
) -> None:
    """A foreign sender hears which field was wrong."""
    with pytest.raises(error) as caught:
        decode_request(f"penstock.{task}", (), kwargs)

    assert text in str(caught.value)


def test_positional_arguments_are_refused() -> None:
    """Fields have names; a sender that passes them by position is told so."""
    with pytest.raises(InvalidMessageError, match="2 positional arguments; all fields are keyword arguments"):
        decode_request("penstock.embed", ("minilm", ["a"]), {})


def test_message_without_version_is_version_1() -> None:
    """A plain Celery producer need not know of versions."""
    assert decode_request("penstock.embed", (), {"model": "m", "texts": ["a"]}).version == 1


def test_names_on_redis() -> None:
    """Queues are named after pool and model; priorities are kombu's lists behind them."""
    assert set(TASK_NAMES.values()) == {"penstock.embed", "penstock.generate", "penstock.rerank"}
    assert queue_name("gpu", "minilm") == "gpu.minilm"
    assert queue_key("gpu.minilm", Priority.INTERACTIVE) == "gpu.minilm"
    assert queue_key("gpu.minilm", Priority.DEFAULT) == "gpu.minilm\x06\x163"
    assert queue_key("gpu.minilm", Priority.BATCH) == "gpu.minilm\x06\x166"
