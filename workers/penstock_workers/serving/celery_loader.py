"""A Celery app that takes nothing from its surroundings: no Celery settings, no module of the current folder.

By itself, Celery takes its broker from `CELERY_BROKER_URL` before it looks at an app's settings, and finds
modules in the current folder before those that are installed.
"""

import importlib
import os
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any, Final, NoReturn

import click
from celery import Celery
from celery.loaders.app import AppLoader
from click.core import ParameterSource

from penstock.errors import ConfigError
from penstock_workers.celery_variables import refuse_variables


class Loader(AppLoader):  # type: ignore[misc]  # Celery has no types
    """Celery's loader, which reads neither a module of settings nor the current folder."""

    def read_configuration(self, *_: object, **__: object) -> dict[str, Any]:
        """Return no configuration: what our settings do not say keeps Celery's default."""
        return {}

    def import_from_cwd(self, module: str, imp: Any = None, package: str | None = None) -> ModuleType:
        """Import a module as Python does."""
        return (imp or importlib.import_module)(module, package=package)

    def cmdline_config_parser(self, args: Any, *_: object, **__: object) -> NoReturn:
        """Refuse `celery worker KEY=VALUE`, which would win over the settings."""
        keys = ", ".join(str(argument).partition("=")[0] for argument in args)  # a value may be a secret
        sys.stderr.write(f"{keys}: settings of Celery are not taken from a command line; {_INSTEAD}\n")
        sys.exit(os.EX_CONFIG)


def new_app(name: str, *, broker_url: str, environ: Mapping[str, str] = os.environ) -> Celery:
    """Return an app with the settings it is given, whatever the environment holds.

    Raises:
        ConfigError: A variable would win over them; the message names it.
    """
    refuse_variables(environ)
    # No fix-ups: Celery's would import the Django project that DJANGO_SETTINGS_MODULE names.
    return Celery(name, broker=broker_url, loader=Loader, fixups=())


def refuse_options_from_variables() -> None:
    """Refuse options of `celery worker` that were not typed: each can be given as `CELERY_WORKER_...`.

    Raises:
        ConfigError: Names the variables.
    """
    context = click.get_current_context(silent=True)
    if context is None or context.auto_envvar_prefix is None:
        return
    found = [
        f"{context.auto_envvar_prefix}_{name.upper()}"
        for name in context.params
        if context.get_parameter_source(name) is ParameterSource.ENVIRONMENT
    ]
    if found:
        raise ConfigError([f"{', '.join(found)}: options of Celery are not taken from variables; {_INSTEAD}"])


_INSTEAD: Final = "`penstock config show` tells what decides instead"
