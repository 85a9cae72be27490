"""Complaints of pydantic as our errors: they quote numbers and names of options, never a text."""

import re
from typing import Final, TypeGuard

from pydantic_core import ErrorDetails

from penstock.errors import InvalidMessageError, InvalidOptionError, InvalidTextError, PenstockError

_OPTION: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_WORD: Final = re.compile(r"[A-Za-z0-9_.-]{0,16}")


def explain(detail: ErrorDetails, *, version: int) -> PenstockError:
    """Turn a complaint of pydantic about a request into the error that its caller gets.

    Args:
        detail: pydantic's complaint of one field.
        version: version of the messages that are read here.
    """
    name, *rest = [_path_part(part) for part in detail["loc"]] or ["request"]
    kind = detail["type"]
    path = ".".join([name, *rest])
    if kind == "missing":
        return InvalidMessageError(f"field {path!r} is missing")
    if kind == "extra_forbidden":
        return InvalidOptionError(path, "set", "there is no option of that name")
    if name == "version":
        # Unlike an option's value, this stands in logs.
        asked = detail["input"]
        told = (
            repr(asked) if isinstance(asked, str) and re.fullmatch(r"[0-9.]{1,8}", asked) else describe(asked)
        )
        return InvalidMessageError(f"version {told}; version {version} is read here")
    if name in ("texts", "documents", "query", "prompt", "system_prompt", "history", "prompt_name"):
        index = int(rest[0]) if rest and rest[0].isdigit() else 0
        problem = {
            "string_type": f"is a {type(detail['input']).__name__}, not a string",
            "string_too_short": "is empty",
            "string_unicode": "holds a lone surrogate, which UTF-8 cannot carry",
            "list_type": f"came as a {type(detail['input']).__name__}: pass a list of strings",
        }.get(kind, detail["msg"].removeprefix("Value error, "))
        return InvalidTextError(index, problem if name != "history" else f"of history: {problem} ({path})")
    if kind == "union_tag_invalid":  # whose sentence quotes the tag
        allowed = f"its type does not match any of the expected tags: {detail['ctx']['expected_tags']}"
        return InvalidOptionError(path, _quote(detail["input"]), allowed)
    return InvalidOptionError(path, _quote(detail["input"]), detail["msg"].lower())


def _quote(value: object) -> str:
    """Tell a value: short words, where a choice or a number was asked for, as they are; no text."""
    is_word = isinstance(value, str) and _WORD.fullmatch(value)
    return repr(value) if is_word else describe(value)


def _path_part(part: int | str) -> str:
    """Return a part of a field's path; a key that a caller made up may hold anything."""
    return str(part) if isinstance(part, int) or _OPTION.fullmatch(part) else "..."


def describe(value: object) -> str:
    """Tell a value of unknown origin without a word of it: numbers as they are, others by type and length."""
    if value is None or isinstance(value, bool | float) or (isinstance(value, int) and abs(value) < 1 << 64):
        return repr(value)
    if isinstance(value, str):
        return f"a string of {len(value):,} characters"
    if isinstance(value, dict | list | tuple):
        return f"a {type(value).__name__} of {len(value):,} items"
    return f"a {type(value).__name__}"


def is_number(value: object) -> TypeGuard[float]:
    """Tell numbers from other values; a bool, which is an int in Python, is none."""
    return isinstance(value, int | float) and not isinstance(value, bool)
