"""Variables that Celery and kombu would read behind our settings, for commands and workers alike.

Imports neither Celery nor kombu: commands do without them.
"""

from collections.abc import Mapping
from typing import Final, NamedTuple

from penstock.errors import ConfigError


class _Foreign(NamedTuple):
    """Variables with one effect: the name that Celery reads, and those of its command line."""

    names: tuple[str, ...]
    problem: str


_BROKER: Final = "would be Celery's broker, as -b would; redis.broker_url decides"
_LOG: Final = "would have kombu write messages to the log, with texts and prompts"
_FOREIGN: Final = (
    # Source: celery/app/utils.py, `Settings`; celery/bin/celery.py, the options of `celery`.
    _Foreign(("BROKER_URL", "CELERY_BROKER", "CELERY_BROKER_URL"), _BROKER),
    _Foreign(("CELERY_BROKER_READ_URL",), _BROKER),
    _Foreign(("CELERY_BROKER_WRITE_URL",), _BROKER),
    _Foreign(
        ("RESULT_BACKEND", "CELERY_RESULT_BACKEND"),
        "would be Celery's result backend, as --result-backend would; redis.results_url decides",
    ),
    _Foreign(
        ("CONFIG_MODULE", "CELERY_CONFIG", "CELERY_CONFIG_MODULE"),
        "would be Celery's settings, as --config would; the deployment's configuration decides",
    ),
    _Foreign(("LOADER", "CELERY_LOADER"), "would be Celery's loader, as --loader would; ours decides"),
    # Source: kombu/connection.py, kombu/__init__.py.
    _Foreign(("KOMBU_LOG_DEBUG",), _LOG),
    _Foreign(("KOMBU_LOG_CHANNEL",), _LOG),
    _Foreign(("KOMBU_LOG_CONNECTION",), _LOG),
)


def refuse_variables(environ: Mapping[str, str]) -> None:
    """Refuse an environment whose variables would win over the settings.

    Raises:
        ConfigError: Names each variable, without its value.
    """
    problems = []
    for foreign in _FOREIGN:
        if found := [name for name in foreign.names if environ.get(name)]:
            problems.append(f"{', '.join(found)}: {foreign.problem}; unset it")
    if problems:
        raise ConfigError(problems)
