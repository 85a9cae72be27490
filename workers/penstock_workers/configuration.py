"""How a deployment is read: one TOML file, overridden by `PENSTOCK_*` variables, overridden by arguments.

Read once at an entry point and passed on; what can be set stands in `settings`. No other module reads a
setting from the environment. What belongs to the machine or to another program is read where it is used:
`XDG_CACHE_HOME`, `CUDA_VISIBLE_DEVICES`, `FLOWER_CONF`, `NO_COLOR`, `PENSTOCK_CPU`, the token of a remote
model, and Celery's own variables, which are refused.
"""

import difflib
import json
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, cast, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, EnvSettingsSource, SettingsConfigDict

from penstock.errors import ConfigError
from penstock.urls import mask_url
from penstock_workers.settings import Cpu, ModelSettings, Section, Settings, TenantSettings

PREFIX: Final = "PENSTOCK_"
CONFIG_VARIABLE: Final = "PENSTOCK_CONFIG"
CPU_VARIABLE: Final = "PENSTOCK_CPU"
"""Lets workers use no more of their CPU than one of an earlier kind has: to measure what that would do."""
_SEPARATOR: Final = "__"
_ARGUMENT: Final = "argument"
"""Origin of a value from the command line."""


class Loaded(NamedTuple):
    """Settings, and where each value came from.

    Attributes:
        settings: The checked values.
        origins: Dotted key -> `argument`, `PENSTOCK_...` or the file's path; no entry is a default.
    """

    settings: Settings
    origins: Mapping[str, str]


def load_settings(
    config: Path | None = None,
    *,
    arguments: Mapping[str, str] | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Loaded:
    """Read file, variables and arguments, the later ones winning.

    Args:
        config: A TOML file; None takes `PENSTOCK_CONFIG`, and where that is not set, none.
        arguments: Dotted key -> text from a command line; read as the variable of that key would be.
        environ: The process' environment.

    Raises:
        ConfigError: Everything that is wrong, one line each: where, key, value, what is allowed.
    """
    path = config or (Path(environ[CONFIG_VARIABLE]) if environ.get(CONFIG_VARIABLE) else None)
    from_arguments = {variable_name(key): text for key, text in (arguments or {}).items()}
    given = {name.upper() for name in environ if name.upper().startswith(PREFIX)}
    given -= {CONFIG_VARIABLE, CPU_VARIABLE}
    problems = [*_misspelled(given), *_unknown_cpu(environ)]
    problems += [*(f"{_ARGUMENT}: {line}" for line in _misspelled(from_arguments))]
    merged: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for origin, values in _sources(path, from_arguments, environ):
        _merge(merged, values)
        for key, _ in flatten(values):
            origins[key] = variable_name(key) if origin == PREFIX else origin
    try:
        settings = Settings.model_validate(merged)
        settings.redis.with_password(settings.redis.broker_url)
    except ValidationError as error:
        raise ConfigError([*problems, *_explain(error, origins)]) from None
    except (OSError, ValueError) as error:  # the error's text may hold the password
        origin = _origin("redis.password_file", origins)
        reason = getattr(error, "strerror", None) or type(error).__name__
        problems.append(f"{origin}: redis.password_file: {reason}")
    if problems:
        raise ConfigError(problems)
    return Loaded(settings, origins)


def _sources(
    path: Path | None, arguments: Mapping[str, str], environ: Mapping[str, str]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if path is not None:
        try:
            # With the mark that editors on Windows begin a file with, or without.
            yield str(path), tomllib.loads(path.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError) as error:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors
            raise ConfigError([f"{path}: {error}"]) from None
    yield PREFIX, _from_environment(environ)
    yield _ARGUMENT, _from_environment(arguments)


class _Variables(Settings, BaseSettings):
    """The settings, for pydantic-settings, which reads their fields from variables."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_nested_delimiter=_SEPARATOR)


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    class Source(EnvSettingsSource):
        def _load_env_vars(self) -> Mapping[str, str | None]:
            return {name.lower(): value for name, value in environ.items() if value != ""}

        def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:
            try:
                return super().decode_complex_value(field_name, field, value)
            except (ValueError, RecursionError):  # no JSON: refused below, with its key
                return value

    return Source(_Variables)()


def _merge(into: dict[str, Any], values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if isinstance(value, Mapping) and isinstance(into.get(name), dict):
            _merge(into[name], value)
        else:
            into[name] = dict(value) if isinstance(value, Mapping) else value


def variable_name(key: str) -> str:
    """Return the environment variable of a dotted key."""
    return PREFIX + key.upper().replace(".", _SEPARATOR)


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) for each leaf of nested mappings."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _misspelled(variables: Iterable[str]) -> Iterator[str]:
    for variable in sorted(variables):
        words = variable.removeprefix(PREFIX).lower().split(_SEPARATOR)
        if (unknown := _unknown_word(Settings, words)) is None:
            continue
        word, names = unknown
        if not word:
            yield f"{variable}: a section; set one of {', '.join(names).upper()} in it"
            continue
        yield f"{variable}: {_no_setting(word, names, str.upper)}"


def _unknown_key(place: Sequence[int | str]) -> str:
    """Say which setting may be meant by a key of the file that is none."""
    words = [str(word) for word in place]
    word, names = _unknown_word(Settings, words) or (words[-1], [])
    return _no_setting(word, names, str)


def _no_setting(word: str, names: Sequence[str], written: Callable[[str], str]) -> str:
    near = difflib.get_close_matches(word.lower(), names, n=1)
    known = f"; known: {written(', '.join(names))}" if names else ""
    return f"no setting {written(word)}{f'; is {written(near[0])} meant?' if near else known}"


def _unknown_word(model: type[BaseModel], words: list[str]) -> tuple[str, list[str]] | None:
    """Return the first word of a variable that names no setting, and those that would."""
    names = list(model.model_fields)
    if not words or words[0] not in names:
        return (words[0] if words else "", names)
    if model is Settings and words[0] in ("models", "tenants"):
        section = ModelSettings if words[0] == "models" else TenantSettings
        return _unknown_word(section, words[2:]) if len(words) > 2 else None
    annotation = model.model_fields[words[0]].annotation
    # One that may be missing can also be given as a whole.
    for inner in (annotation, *(get_args(annotation) if len(words) > 1 else ())):
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            return _unknown_word(inner, words[1:])
    return None if len(words) == 1 else (words[1], [])


def read_cpu_limit(environ: Mapping[str, str]) -> Cpu | None:
    """Return which kind of CPU `PENSTOCK_CPU` names; None if it is not set.

    Raises:
        ConfigError: It names none.
    """
    if problems := list(_unknown_cpu(environ)):
        raise ConfigError(problems)
    return cast("Cpu | None", environ.get(CPU_VARIABLE) or None)


def _unknown_cpu(environ: Mapping[str, str]) -> Iterator[str]:
    text = environ.get(CPU_VARIABLE)
    if text and text not in get_args(Cpu):
        yield f"{CPU_VARIABLE} = {text!r}: one of {', '.join(get_args(Cpu))}"


def _explain(error: ValidationError, origins: Mapping[str, str]) -> Iterator[str]:
    details = error.errors(include_url=False)
    for detail in details:
        key = ".".join(map(str, detail["loc"]))
        origin = _origin(key, origins)
        if detail["type"] == "extra_forbidden":
            if origin != _ARGUMENT and not origin.startswith(PREFIX):  # else told as a misspelled variable
                yield f"{origin}: {key}: {_unknown_key(detail['loc'])}"
            continue
        if detail["type"] == "too_short" and any(len(d["loc"]) > len(detail["loc"]) for d in details):
            continue  # pydantic counts the items that were right
        yield f"{origin}: {key}{_quote(key, detail['type'], detail['input'])}: {_plain(detail['msg'])}"


def _origin(key: str, origins: Mapping[str, str]) -> str:
    """Return where a value came from: its own entry, one below it, or the nearest beside it."""
    while key:
        if key in origins:
            return origins[key]
        for known, origin in origins.items():
            if known.startswith(f"{key}."):
                return origin
        key = key.rpartition(".")[0]
    return "default"


def _quote(key: str, kind: str, value: object) -> str:
    # Only what is known to be no secret: a password may stand under a misspelled key, or in half a URL.
    if (
        kind in ("extra_forbidden", "missing")
        or "password" in key
        or not isinstance(value, str | int | float)
    ):
        return ""
    if key.endswith(("token_env", "source")) and re.search(r"@|_env$", f"{value}{key}"):
        return ""  # the token itself, perhaps
    if key.startswith("redis"):
        text = mask_url(str(value)) if "://" in str(value) else ""
        return f" = {text!r}" if text else ""
    return f" = {str(value)[:80]!r}"


def _plain(message: str) -> str:
    return message.removeprefix("Value error, ")


def effective_values(loaded: Loaded) -> list[tuple[str, Any, str]]:
    """Return (dotted key, value, origin) of every setting; secrets are masked."""
    values = flatten(loaded.settings.model_dump(mode="json"))
    return [(key, _masked(key, value), loaded.origins.get(key, "default")) for key, value in values]


def _masked(key: str, value: Any) -> Any:
    return mask_url(value) if key.endswith("_url") else value


def sample_environment() -> str:
    """Return `.env.example`: every variable with its meaning and default, commented out."""
    lines = [
        "# Every variable that Penstock reads, with its default. A variable wins over the file that",
        f"# {CONFIG_VARIABLE} names; models are set the same way: {PREFIX}MODELS__NAME__SOURCE=...",
    ]
    for section, field in Settings.model_fields.items():
        if isinstance(field.default, Section):
            about = (type(field.default).__doc__ or "").splitlines()[:1]  # `python -OO` drops it
            lines += ["", *(f"# {line}" for line in about)]
            lines += _sample_section(section, field.default)
    return "\n".join(lines) + "\n"


def _sample_section(path: str, section: Section) -> Iterator[str]:
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from _sample_section(f"{path}.{name}", value)
        else:
            if field.description:  # it is read from the source, which may be packed away
                yield f"# {field.description}"
            text = "" if value is None else json.dumps(value) if isinstance(value, tuple) else value
            yield f"#{variable_name(f'{path}.{name}')}={text}"
