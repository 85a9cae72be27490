"""Schemas as pydantic, zod and OpenAI's clients write them: answers are what they ask for."""

import datetime as dt
import ipaddress
import json
import random
import re
import uuid
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
from pydantic import (
    AnyUrl,
    Base64Str,
    BaseModel,
    Field,
    IPvAnyAddress,
    PostgresDsn,
    SecretBytes,
    SecretStr,
    TypeAdapter,
    conint,
    conlist,
    constr,
)

from penstock.errors import InvalidFormatError
from penstock_workers.generation.grammar import Grammars
from penstock_workers.generation.schemas import simplify
from tests.models.odd_tokenizers import TOKENIZERS, byte_level


class Colour(Enum):
    """A closed set."""

    RED = "red"
    BLUE = "blue"


class Cat(BaseModel):
    """One of two."""

    kind: Literal["cat"]
    lives: int = 9


class Dog(BaseModel):
    """The other."""

    kind: Literal["dog"]
    name: str | None = Field(None, title="Name", examples=["Rex"], deprecated=True)


class Node(BaseModel):
    """Of itself."""

    value: int
    next: "Node | None" = None


TYPES: dict[str, Any] = {
    "datetime": dt.datetime,
    "date": dt.date,
    "time": dt.time,
    "timedelta": dt.timedelta,
    "UUID": uuid.UUID,
    "IPv4Address": ipaddress.IPv4Address,
    "IPv6Address": ipaddress.IPv6Address,
    "IPv4Network": ipaddress.IPv4Network,
    "IPvAnyAddress": IPvAnyAddress,
    "Enum": Colour,
    "Literal": Literal["a", 1, True, None],
    "discriminated": Annotated[Cat | Dog, Field(discriminator="kind")],
    "union": Cat | Dog,
    "numbers": int | float | str,
    "constr": constr(min_length=2, max_length=5, pattern="^[a-z]+$"),
    "conint": conint(gt=3, le=9, multiple_of=3),
    "conlist": conlist(int, min_length=1, max_length=3),
    "dict": dict[str, int],
    "dict of known names": dict[Literal["a", "b"], int],
    "tuple": tuple[int, str],
    "Optional": int | None,
    "Decimal": Decimal,
    "Path": Path,
    "bytes": bytes,
    "SecretStr": SecretStr,
    "SecretBytes": SecretBytes,
    "AnyUrl": AnyUrl,
    "PostgresDsn": PostgresDsn,
    "Base64Str": Base64Str,
    "Pattern": re.Pattern,
    "nested": list[dict[str, Cat | None]],
    "recursive": Node,
    "notes": Annotated[
        str,
        Field(json_schema_extra={"x-foo": 1, "readOnly": True, "$comment": "c", "contentEncoding": "base64"}),
    ],
}
GUESSED = {
    "PostgresDsn",
    "Base64Str",
    "Pattern",
    "AnyUrl",
    "datetime",
    "date",
    "timedelta",
    "Decimal",
    "dict",
}
"""Types that check more than their schemas say: no year 0, no number of a thousand digits."""
END = 1
CLOSING = 0.3
"""How likely what ends a value comes where it may."""


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    """Return what compiles formats for a byte-level tokenizer."""
    tokenizer = byte_level()
    return Grammars(tokenizer, len(tokenizer), [1])


def write(grammars: Grammars, schema: dict[str, Any], seed: int) -> str | None:
    """Return a random text that follows a schema; None if it became too long."""
    grammar = grammars.compile({"type": "json_schema", "json_schema": {"schema": schema}})
    assert grammar is not None
    draw = random.Random(seed)
    said, words = b"", np.zeros((1, grammar.n_words), dtype=np.int32)
    for _ in range(400):
        if grammar.is_over or (grammar.is_complete and draw.random() < 0.5):
            grammar.check(said.decode())
            return said.decode()
        grammar.fill(words, 0)
        allowed = np.flatnonzero(np.unpackbits(words.view("u1"), bitorder="little")).tolist()
        tokens = {token: grammars.token_bytes(token) or b"" for token in allowed if token != END}
        closing = [token for token, text in tokens.items() if text in (b'"', b"}", b"]")]
        token = draw.choice(closing if closing and draw.random() < CLOSING else [*tokens])
        grammar.take(token)
        said += tokens[token]
    return None


def as_field(kind: Any) -> dict[str, Any]:
    """Return the schema of an object with a field of a type, as pydantic writes it."""
    inner = TypeAdapter(kind).json_schema(ref_template="#/properties/x/$defs/{model}")
    return {"type": "object", "properties": {"x": inner}, "required": ["x"], "title": "It"}


@pytest.mark.parametrize("name", TYPES)
def test_models_of_pydantic_are_followed(grammars: Grammars, name: str) -> None:
    """What is written by the schema of a field is JSON, and what the field takes."""
    n_whole = 0
    for seed in range(6):
        text = write(grammars, as_field(TYPES[name]), seed)
        if text is None:
            continue
        n_whole += 1
        value = json.dumps(json.loads(text)["x"])
        if name not in GUESSED:
            TypeAdapter(TYPES[name]).validate_json(value)
    assert n_whole


ZOD = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "properties": {
        "email": {
            "type": "string",
            "format": "email",
            "pattern": r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]"
            r"@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$",
        },
        "id": {"type": "string", "format": "cuid2"},
        "map": {
            "type": "object",
            "propertyNames": {"type": "string"},
            "additionalProperties": {"type": "number"},
        },
        "pair": {"type": "array", "prefixItems": [{"type": "string"}, {"type": "integer"}], "items": False},
        "safe": {"type": "integer", "minimum": -9007199254740991, "maximum": 9007199254740991},
        "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    },
    "required": ["email", "id", "map", "pair", "safe", "maybe"],
    "additionalProperties": False,
}
OPENAI = {
    "type": "object",
    "properties": {
        "steps": {"type": "array", "items": {"$ref": "#/$defs/step"}},
        "final": {"type": "string"},
    },
    "$defs": {
        "step": {
            "type": "object",
            "properties": {"said": {"type": "string", "format": "markdown"}},
            "required": ["said"],
            "additionalProperties": False,
        }
    },
    "required": ["steps", "final"],
    "additionalProperties": False,
    "strict": True,
}


@pytest.mark.parametrize("schema", [ZOD, OPENAI], ids=["zod", "OpenAI"])
def test_schemas_of_others_are_followed(grammars: Grammars, schema: dict[str, Any]) -> None:
    """Properties come in their order, whatever notes stand beside them."""
    texts = [text for seed in range(8) if (text := write(grammars, schema, seed)) is not None]

    assert texts
    assert all(list(json.loads(text)) == schema["required"] for text in texts)


# As pydantic 2.12 writes them.
DECIMALS = {
    r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$": ["1", "-12.5"],
    r"^(?!^[-+.]*$)[+-]?0*(?:\d{0,4}|(?=[\d.]{1,7}0*$)\d{0,4}\.\d{0,2}0*$)$": ["1234", "0.25"],
    r"^(?!^[-+.]*$)[+-]?0*(?:\d{0,3}|(?=[\d.]{1,4}0*$)\d*\.\d*0*$)$": ["123"],
    r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d{0,2}0*$": ["1234567.25"],
}


@pytest.mark.parametrize("pattern", DECIMALS)
def test_decimals_are_numbers_within_their_digits(grammars: Grammars, pattern: str) -> None:
    """The plainer pattern allows nothing that pydantic's, which looks ahead, does not."""
    plain = simplify({"type": "string", "pattern": pattern})["pattern"]

    for seed in range(20):
        text = write(grammars, {"type": "string", "pattern": pattern}, seed)
        assert text is None or re.search(pattern, json.loads(text))
    assert all(re.search(plain, number) for number in DECIMALS[pattern])


@pytest.mark.parametrize(
    ("schema", "plain"),
    [
        ({"format": "password"}, {}),
        ({"properties": {"format": {"format": "path"}}}, {"properties": {"format": {}}}),
        ({"enum": [{"format": "path"}]}, {"enum": [{"format": "path"}]}),
        ({"anyOf": [{"format": "uuid"}, True]}, {"anyOf": [{"format": "uuid"}, True]}),
        ({"uniqueItems": False}, {}),
        ({"uniqueItems": True, "maxItems": 1}, {"maxItems": 1}),
        (
            {"propertyNames": {"pattern": "^a"}},
            {"patternProperties": {"^a": True}, "additionalProperties": False},
        ),
        ({"propertyNames": {"minLength": 2}}, {"propertyNames": {"minLength": 2}}),
        ({"unevaluatedProperties": False}, {"additionalProperties": False}),
        ({"format": 5, "pattern": None}, {"format": 5, "pattern": None}),
    ],
    ids=str,
)
def test_only_what_has_no_effect_goes(schema: dict[str, Any], plain: dict[str, Any]) -> None:
    """Notes are left out where they are notes; what cannot be said otherwise stays, to be refused."""
    assert simplify(schema) == plain


@pytest.mark.parametrize("kind", ["unigram", "unigram, nothing stripped", "byte fallback", "letters"])
def test_formats_are_for_all_tokenizers_that_write_tokens_alike(kind: str) -> None:
    """Spaces at the beginning included."""
    tokenizer = TOKENIZERS[kind]()
    end = tokenizer.convert_tokens_to_ids("</s>")
    grammar = Grammars(tokenizer, len(tokenizer), [end]).compile(
        {"type": "choice", "choices": [" a b", "ab"]}
    )

    assert grammar is not None
    grammar.check(" a b")
    grammar.check("ab")


@pytest.mark.parametrize("kind", ["word ends", "repeats are one", "bytes, in Python"])
def test_other_tokenizers_take_no_formats(kind: str) -> None:
    """They say why, in a line."""
    tokenizer = TOKENIZERS[kind]()

    with pytest.raises(
        InvalidFormatError, match="takes no formats: what its tokens say depends on their neigh"
    ):
        Grammars(tokenizer, len(tokenizer), [1]).compile({"type": "json_object"})


def test_what_tokens_cannot_say_is_refused() -> None:
    """A choice with a letter that the model has no token for."""
    tokenizer = TOKENIZERS["unigram"]()

    with pytest.raises(InvalidFormatError, match="nothing matches it that the model's tokens can say"):
        Grammars(tokenizer, len(tokenizer), [2]).compile({"type": "choice", "choices": ["q"]})


@pytest.mark.parametrize(
    "key", ["items", "properties", "patternProperties", "prefixItems", "allOf", "anyOf", "oneOf"]
)
def test_a_schema_is_as_deep_as_its_definitions_lead(grammars: Grammars, key: str) -> None:
    """Definitions that lead through two thousand levels are followed: a thread's usual stack has no room."""

    def around(inner: dict[str, Any]) -> dict[str, Any]:
        if key.endswith("roperties"):
            return {key: {"a": inner}}
        return {key: inner if key == "items" else [inner]}

    definitions: dict[str, Any] = {"70": {"type": "null"}}
    for n in range(70):
        definitions[str(n)] = {"$ref": f"#/$defs/{n + 1}"}
        for _ in range(28):
            definitions[str(n)] = around(definitions[str(n)])
    deep = {"$ref": "#/$defs/0", "$defs": definitions}
    grammar = grammars.compile({"type": "json_schema", "json_schema": {"schema": deep}})

    assert grammar is not None
    grammar.fill(np.zeros((1, grammar.n_words), dtype=np.int32), 0)
