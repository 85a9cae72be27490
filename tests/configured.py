"""Configurations of a test: read from a file's content and variables."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from penstock.errors import ConfigError
from penstock_workers.configuration import Loaded, effective_values, load_settings

MODEL = '[models.minilm]\ntask = "embed"\nsource = "a/b"\n'


def load(
    tmp_path: Path, toml: str = "", *, arguments: Mapping[str, str] | None = None, **variables: str
) -> Loaded:
    """Read a file of this content under variables without their prefix."""
    config = tmp_path / "penstock.toml"
    config.write_text(toml, encoding="utf-8")
    environ = {f"PENSTOCK_{name}": value for name, value in variables.items()}
    return load_settings(config, arguments=arguments, environ=environ)


def problems(tmp_path: Path, toml: str = "", **variables: str) -> list[str]:
    """Return all that is wrong, with the file's name in place of its path."""
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, toml, **variables)
    return [line.replace(str(tmp_path / "penstock.toml"), "FILE") for line in caught.value.problems]


def values(loaded: Loaded) -> dict[str, tuple[Any, str]]:
    """Return value and origin by key."""
    return {key: (value, origin) for key, value, origin in effective_values(loaded)}
