"""Checks of the Redis servers, for commands and workers alike before they start: a wrong kind loses jobs."""

from typing import Any, Final

import redis
from redis.exceptions import ResponseError

from penstock.connections import connect_sync
from penstock.errors import ConfigError
from penstock.refusals import UnsuitableServerError, in_words
from penstock.urls import mask_url
from penstock_workers.settings import Settings

_ANSWER_S: Final = 5.0


def check_servers(settings: Settings) -> list[str]:
    """Return warnings about broker and result store, a line each; none about a server that is out of reach.

    Raises:
        ConfigError: A server cannot be used, and waiting changes nothing.
    """
    warnings = _warnings("broker", settings.broker_url)
    if not _is_same_server(settings.broker_url, settings.results_url):
        return warnings + _warnings("result store", settings.results_url)
    _ask(settings.results_url)  # its database may be missing
    return warnings


def _warnings(role: str, url: str) -> list[str]:
    info = _ask(url)
    policy, where = info.get("maxmemory_policy", "noeviction"), f"{role} {mask_url(url)}"
    found = []
    if policy != "noeviction":
        lost = "waiting jobs" if role == "broker" and policy.startswith("allkeys") else "results"
        found.append(f"{where}: maxmemory-policy {policy} drops {lost} in silence when full; set noeviction")
    if role == "broker" and info.get("aof_enabled") == 0:
        found.append(f"{where}: appendonly is off: a restart loses the jobs that no snapshot holds")
    return found


def _ask(url: str) -> dict[str, Any]:
    """Return the server's `INFO`; empty where it is out of reach, or where we have no right to ask.

    Raises:
        ConfigError: See `check_servers`.
    """
    try:
        with connect_sync(url, answer_timeout_s=_ANSWER_S, n_retries=0) as client:
            client.ping()
            found: Any = client.info()
            return dict(found)
    except UnsuitableServerError as error:
        raise ConfigError([f"{mask_url(url)} cannot be used: {in_words(error)}"]) from error
    except ResponseError as error:
        if "DB index" in str(error):
            raise ConfigError([f"{mask_url(url)} cannot be used: {in_words(error)}"]) from error
        return {}  # we have no right to ask, for one
    except (redis.RedisError, OSError):
        return {}


def _is_same_server(one: str, other: str) -> bool:
    return one.rpartition("/")[0] == other.rpartition("/")[0]
