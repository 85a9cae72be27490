"""Rewrite JSON schemas in the words that llguidance knows.

Keywords that do not bind the answer are left out; others are replaced by equal ones. An answer may be bound
more narrowly than its schema asks, never less. llguidance enforces or refuses what is left.
"""

import re
from collections.abc import Mapping
from typing import Any, Final

# Enforced by llguidance itself.
_FORMATS: Final = frozenset(
    ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid")
)
# Each string of the second format is one of the first.
_NARROWER: Final = {
    "idn-email": "email",
    "idn-hostname": "hostname",
    "iri": "uri",
    "iri-reference": "uri",
    "uri-reference": "uri",
    **dict.fromkeys(("ipvanyaddress", "ipvanynetwork", "ipvanyinterface"), "ipv4"),
    **dict.fromkeys(("ipv4network", "ipv4interface"), "ipv4"),
    **dict.fromkeys(("ipv6network", "ipv6interface"), "ipv6"),
}
_BASE64: Final = "^(?:[A-Za-z0-9{0}]{{4}})*(?:[A-Za-z0-9{0}]{{2}}==|[A-Za-z0-9{0}]{{3}}=)?$"
_UUID: Final = "^[0-9a-f]{{8}}-[0-9a-f]{{4}}-{0}[0-9a-f]{{3}}-[89ab][0-9a-f]{{3}}-[0-9a-f]{{12}}$"
_PATTERNS: Final = {
    **dict.fromkeys(("base64", "byte"), _BASE64.format("+/")),
    "base64url": _BASE64.format("_-"),
    **{f"uuid{version}": _UUID.format(version) for version in range(1, 9)},
}
_LOOK_AROUND: Final = re.compile(r"\(\?<?[=!]")
# Source: `get_decimal_pattern` of pydantic 2.12, which looks ahead for a digit and counts digits so.
_DECIMAL: Final = "^(?!^[-+.]*$)[+-]?0*"
_DECIMAL_PLACES: Final = re.compile(r"\\\.\??\\d\{0,(\d+)\}")
_DECIMAL_DIGITS: Final = re.compile(r"\(\?:\\d\{0,(\d+)\}\|")

_SCHEMAS_BY_NAME: Final = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTS_OF_SCHEMAS: Final = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_SCHEMAS: Final = (
    "items",
    "additionalItems",
    "additionalProperties",
    "not",
    "if",
    "then",
    "else",
    "contains",
    "propertyNames",
    "unevaluatedItems",
    "unevaluatedProperties",
)
_NAME_KEYS: Final = frozenset(("type", "title", "description", "enum", "const", "pattern"))
_COMBINATIONS: Final = ("$ref", "allOf", "anyOf", "oneOf", "if")
# "x-guidance" is how a schema sets llguidance's own options: those are ours.
_NOTES: Final = ("x-guidance", "contentSchema", "contentMediaType", "contentEncoding")


def simplify(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return a schema whose every answer is one of `schema`, without what has no effect on answers."""
    plain = {key: value for key, value in schema.items() if key not in _NOTES}
    for key in _SCHEMAS_BY_NAME:
        if isinstance(named := plain.get(key), dict):
            plain[key] = {name: _simplify(inner) for name, inner in named.items()}
    for key in _LISTS_OF_SCHEMAS:
        if isinstance(listed := plain.get(key), list):
            plain[key] = [_simplify(inner) for inner in listed]
    for key in _SCHEMAS:
        if isinstance(inner := plain.get(key), dict):
            plain[key] = simplify(inner)
    _simplify_string(plain)
    _simplify_array(plain)
    _simplify_object(plain)
    return plain


def _simplify(schema: Any) -> Any:
    return simplify(schema) if isinstance(schema, dict) else schema


def _simplify_string(schema: dict[str, Any]) -> None:
    name, pattern = schema.get("format"), schema.get("pattern")
    if isinstance(name, str):
        name = _NARROWER.get(name, name)
        if name in _FORMATS:
            schema["format"] = name
        else:  # a note to whoever reads the answer: "password", "path", "binary", names of one's own
            del schema["format"]
            if pattern is None and name in _PATTERNS:
                schema["pattern"] = _PATTERNS[name]
    if isinstance(pattern, str) and _LOOK_AROUND.search(pattern):
        if pattern.startswith(_DECIMAL):
            schema["pattern"] = _decimal(pattern)
        elif schema.get("format") in _FORMATS:  # zod says formats twice
            del schema["pattern"]


def _decimal(pattern: str) -> str:
    """Return a plainer pattern of decimal numbers, within the digits that pydantic's allows."""
    places, digits = _DECIMAL_PLACES.search(pattern), _DECIMAL_DIGITS.search(pattern)
    n_before = "+" if digits is None else f"{{1,{max(1, int(digits[1]))}}}"
    n_behind = "{1,1}" if digits is not None else "+"
    n_behind = n_behind if places is None else f"{{1,{places[1]}}}"
    if digits is not None and places is None:  # all digits may stand before the point
        return f"^[+-]?[0-9]{n_before}$"
    before = "0" if digits is not None and digits[1] == "0" else f"[0-9]{n_before}"
    return f"^[+-]?{before}$" if places and places[1] == "0" else f"^[+-]?{before}(\\.[0-9]{n_behind})?$"


def _simplify_array(schema: dict[str, Any]) -> None:
    if schema.get("uniqueItems") is False or schema.get("maxItems") in (0, 1):
        schema.pop("uniqueItems", None)


def _simplify_object(schema: dict[str, Any]) -> None:
    names = schema.get("propertyNames")
    if names is True or (isinstance(names, dict) and names.keys() <= {"type", "title", "description"}):
        del schema["propertyNames"]
    elif isinstance(names, dict):
        _bind_names(schema, names)
    if schema.get("unevaluatedProperties") is False and not schema.keys() & {*_COMBINATIONS}:
        del schema["unevaluatedProperties"]
        schema.setdefault("additionalProperties", False)
    for key in ("dependentRequired", "dependentSchemas", "dependencies"):
        if schema.get(key) == {}:
            del schema[key]


def _bind_names(schema: dict[str, Any], names: Mapping[str, Any]) -> None:
    """Say with a pattern of properties what their names are to be."""
    if schema.get("properties") or schema.get("patternProperties") or names.keys() - _NAME_KEYS:
        return
    choices = names.get("enum", [names["const"]] if "const" in names else [])
    if choices and ("pattern" in names or not all(isinstance(choice, str) for choice in choices)):
        return
    inner = schema.get("additionalProperties", True)
    del schema["propertyNames"]
    if choices:
        schema["properties"] = dict.fromkeys(choices, inner)
    else:
        schema["patternProperties"] = {names["pattern"]: inner}
    schema["additionalProperties"] = False
