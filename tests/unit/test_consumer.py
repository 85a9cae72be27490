import json
import random
from typing import Any

import pytest

from penstock.conversation import Message
from penstock.request import EmbedRequest, GenerateRequest, Request, RerankRequest, summarize

SECRET = "swordfish"
FIELDS = ("texts", "prompt", "system_prompt", "query", "documents", "model")


def anything(rng: random.Random, depth: int = 3) -> Any:
    """Return any value that JSON can hold."""
    kinds = ["null", "bool", "int", "float", "text", "list", "dict"]
    match rng.choice(kinds if depth else kinds[:5]):
        case "null":
            return None
        case "bool":
            return rng.random() < 0.5
        case "int":
            return rng.randint(-5, 5)
        case "float":
            return rng.choice((0.0, 1.5, float("nan"), float("inf")))
        case "text":
            return SECRET * rng.randint(0, 3)
        case "list":
            return [anything(rng, depth - 1) for _ in range(rng.randint(0, 4))]
        case _:
            keys = ("role", "content", SECRET)
            return {rng.choice(keys): anything(rng, depth - 1) for _ in range(rng.randint(0, 3))}


@pytest.mark.parametrize(
    ("request_", "summary"),
    [
        (EmbedRequest(model="m", texts=[]), "0 texts, 0 characters"),
        (EmbedRequest(model="m", texts=["a", "bc"]), "2 texts, 3 characters"),
        (GenerateRequest(model="m", prompt="p"), "1 turns, 1 characters"),
        (
            GenerateRequest(
                model="m", prompt="p", system_prompt="be brief", history=(Message(role="user", content="hi"),)
            ),
            "3 turns, 11 characters",
        ),
        (
            GenerateRequest(model="m", prompt=None, history=(Message(role="user", content="hi"),)),
            "1 turns, 2 characters",
        ),
        (RerankRequest(model="m", query="who?", documents=[]), "0 documents, 0 characters"),
        (RerankRequest(model="m", query="who?", documents=["a", "bc"]), "2 documents, 3 characters"),
    ],
)
def test_summary_of_a_message_is_the_requests_own(request_: Request, summary: str) -> None:
    """A foreign sender's job looks in Flower as one of ours."""
    assert summarize(request_.fields()) == request_.summary() == summary


@pytest.mark.parametrize(
    ("kwargs", "summary"),
    [
        ({}, "1 turns, 0 characters"),
        ({"texts": "one string"}, "1 texts, 10 characters"),
        ({"texts": None}, "1 texts, 0 characters"),
        ({"texts": ["a", 5, None, ["deep"]]}, "4 texts, 1 characters"),
        ({"query": "q", "documents": "one string"}, "1 documents, 10 characters"),
        ({"query": ["q"], "documents": ["a", 5, None]}, "3 documents, 1 characters"),
        ({"prompt": ["p"]}, "1 turns, 0 characters"),
        ({"prompt": "p", "history": ["turn", {"content": 5}, {"content": "abc"}]}, "4 turns, 4 characters"),
        ({"prompt": "p", "history": {"a": "b"}, "system_prompt": "s"}, "2 turns, 2 characters"),
        ({"prompt": "p", "history": "text", "system_prompt": "s"}, "2 turns, 2 characters"),
        ({"prompt": "p", "history": 5, "system_prompt": "s"}, "2 turns, 2 characters"),
    ],
)
def test_summary_of_other_shapes(kwargs: dict[str, Any], summary: str) -> None:
    """What is wrong is counted as far as it can be."""
    assert summarize(kwargs) == summary


def test_summary_of_anything_has_no_word_of_it() -> None:
    """Whatever lies in a message, its summary is made and quotes nothing."""
    rng = random.Random(11)
    for _ in range(3000):
        kwargs = {name: anything(rng) for name in FIELDS if rng.random() < 0.6}
        if rng.random() < 0.6:
            kwargs["history"] = [anything(rng) for _ in range(rng.randint(0, 4))]

        summary = summarize(kwargs)

        assert SECRET not in summary, json.dumps(kwargs)
        assert summary.endswith(" characters")
