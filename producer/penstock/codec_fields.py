"""Checks that what the codec reads from the result store holds what its types say.

Annotations are no checks: a store that is broken, or not ours, could put any JSON into any field, and
callers would meet it somewhere in their own code.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np

from penstock.errors import ResultDecodeError
from penstock.result import Choice, EmbedResult, GenerateResult, Logprobs, RerankResult, Timings, Usage

_Check = Callable[[Any], bool]

VECTOR_TYPES: Final = ("float32", "float16", "int8", "uint8")
_MOST: Final = 1 << 63


def _is_number(value: object) -> bool:
    """Whether a value is a number that can be computed with and printed."""
    return type(value) is float or (type(value) is int and abs(value) < _MOST)


def is_timings(value: object) -> bool:
    """Whether a value holds a job's times as errors carry them: seconds by name."""
    return isinstance(value, dict) and all(map(_is_number, value.values()))


def build_object(name: str, fields: Mapping[str, Any]) -> Any:
    """Return an object of the type that has this name.

    Raises:
        KeyError: there is none of this name, or it has no such field.
        TypeError: a field is missing.
        ResultDecodeError: a field is of another type.
    """
    cls = TYPES[name]
    checks = CHECKS[cls]
    for field, value in fields.items():
        if not checks[field](value):
            kind = "no array" if field in ("vectors", "scores") else "of another type"
            raise ResultDecodeError(f"its {field} are {kind}")
    made = cls(**fields)
    if isinstance(made, Logprobs) and not _fit(made):
        raise ResultDecodeError("its log-probabilities lack tokens")
    return made


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < _MOST


def _is_text(value: object) -> bool:
    return type(value) is str


def _is_finish(value: object) -> bool:
    return value in ("stop", "length")


def _optional(check: _Check) -> _Check:
    return lambda value: value is None or check(value)


def _list_of(check: _Check) -> _Check:
    return lambda value: type(value) is list and all(map(check, value))


def _array(n_axes: int, *types: str) -> _Check:
    return lambda value: type(value) is np.ndarray and value.ndim == n_axes and value.dtype.name in types


def _is_a(cls: type) -> _Check:
    return lambda value: type(value) is cls


def _is_bytes_by_id(value: object) -> bool:
    return type(value) is dict and all(type(text) is str and _is_latin(text) for text in value.values())


def _is_latin(text: str) -> bool:
    return text.isascii() or max(text) <= "\xff"


def _is_call(value: object) -> bool:
    if type(value) is not dict:
        return False
    function = value.get("function")
    return (
        type(function) is dict
        and type(function.get("name")) is str
        and type(function.get("arguments")) in (str, dict)
    )


def _fit(found: Logprobs) -> bool:
    """Whether every place has a token that was chosen, and every token its bytes."""
    ids = found.ids
    if ids.shape != found.values.shape or not ids.shape[1]:
        return False
    return bool((ids[:, 0] >= 0).all()) and all(
        str(token) in found.tokens for token in np.unique(ids[ids >= 0]).tolist()
    )


_USAGE: Final[dict[str, _Check]] = {"usage": _is_a(Usage), "timings": _is_a(Timings), "model": _is_text}
_ANSWER: Final[dict[str, _Check]] = {
    "text": _is_text,
    "finish_reason": _is_finish,
    "reasoning": _optional(_is_text),
    "tool_calls": _optional(_list_of(_is_call)),
    "logprobs": _optional(_is_a(Logprobs)),
}
CHECKS: Final[Mapping[type, Mapping[str, _Check]]] = {
    Timings: dict.fromkeys(("queued_s", "prepared_s", "batched_s", "computed_s"), _is_number),
    Usage: {
        "prompt_tokens": _is_count,
        "completion_tokens": _is_count,
        "cut_tokens": _optional(_is_count),
    },
    EmbedResult: {**_USAGE, "vectors": _array(2, *VECTOR_TYPES)},
    Logprobs: {"ids": _array(2, "int32"), "values": _array(2, "float32"), "tokens": _is_bytes_by_id},
    Choice: {**_ANSWER, "index": _is_count},
    GenerateResult: {**_USAGE, **_ANSWER, "others": _optional(_list_of(_is_a(Choice)))},
    RerankResult: {**_USAGE, "scores": _array(1, "float32"), "order": _list_of(_is_count)},
}
"""What a result is made of: what each field must hold, by type."""
TYPES: Final[Mapping[str, type]] = {cls.__name__: cls for cls in CHECKS}
"""These types by the names that stand in a result's bytes."""
