"""What each command is told by `--config` and `--set`, and the running stack that it means."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from penstock.errors import ConfigError
from penstock.stacks import RunningStack
from penstock.urls import mask_url
from penstock_workers.configuration import CONFIG_VARIABLE, Loaded, load_settings, variable_name
from penstock_workers.running_stack import load_with_stack


class Deployment:
    """The configuration a command was started with."""

    def __init__(self, config: Path | None, assignments: tuple[str, ...]) -> None:
        arguments = self._arguments = dict(_split(assignment) for assignment in assignments)
        self.config = config
        self.loaded: Loaded = load_settings(config, arguments=arguments)
        self.environment = _as_variables(arguments)
        self.stack: RunningStack | None = None

    def joined(self, *, only_here: bool = False) -> "Deployment":
        """Return it with the Redis of the stack that is meant; see `load_with_stack`."""
        self.loaded, self.stack, values = load_with_stack(self.config, self._arguments, only_here=only_here)
        self.environment |= _as_variables(values)
        return self

    @property
    def redis(self) -> str:
        """Say which Redis is asked, and why; without its password."""
        if self.stack is not None:
            return f"stack   {self.stack}"
        url = mask_url(self.loaded.settings.redis.broker_url)
        if "redis.broker_url" in self.loaded.origins:
            return f"Redis   {url}"
        return f"Redis   {url}, the default: no stack of `penstock up` runs for this user"


def _as_variables(values: Mapping[str, str]) -> dict[str, str]:
    """Return values by dotted key as children read the same texts."""
    return {variable_name(key): text for key, text in values.items()}


def _split(assignment: str) -> tuple[str, str]:
    key, equals, text = assignment.partition("=")
    if not equals or not key:
        raise ConfigError([f"--set {assignment!r}: KEY=VALUE, like --set pools.cpu.processes=4"])
    return key, text


def deployment_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the arguments `config` and `assignments`, which a `Deployment` is made of."""
    command = click.option(
        "--set",
        "assignments",
        multiple=True,
        metavar="KEY=VALUE",
        help="Set a value as its variable would; repeatable.",
    )(command)
    return click.option(
        "--config",
        type=click.Path(path_type=Path),
        help=f"The deployment's TOML file; else the one that {CONFIG_VARIABLE} names.",
    )(command)
