"""A URL of ours in the words of kombu and of Celery's result backend: one server, a socket, or Sentinel."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import repeat
from typing import Any
from urllib.parse import quote, urlsplit

from celery.backends.redis import SentinelBackend
from redis.sentinel import SentinelManagedConnection

from penstock.urls import ServerUrl, read_url
from penstock_workers.delivery.backend import ResultBackend


class SentinelResultBackend(ResultBackend, SentinelBackend):  # type: ignore[misc]  # Celery has no types
    """Stores results in the master that Sentinel names."""

    connection_class = SentinelManagedConnection


def celery_url(url: str) -> str:
    """Return `url` as kombu takes it: one URL for each sentinel, and the rest in `transport_options`."""
    found = read_url(url)
    if isinstance(found, ServerUrl):
        # Of the query kombu knows TLS alone; anything else would be an argument that it does not take.
        tls = {name: value for name, value in found.options.items() if name.startswith("ssl_")}
        return _socket_url(found) or replace(found, options=tls).url
    user, password = (quote(part or "", safe="") for part in (found.username, found.password))
    # Only the first has the login: Celery shows the others as they are.
    login = f"{user}:{password}@" if user or password else ""
    hosts = [f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in found.sentinels]
    first, *others = [f"{host}/{found.db}" for host in hosts]
    return ";".join(f"sentinel://{part}" for part in (f"{login}{first}", *others))


def transport_options(url: str) -> dict[str, Any]:
    """Return what kombu and Celery must know besides `celery_url`."""
    found = read_url(url)
    if isinstance(found, ServerUrl):
        return {name: value for name, value in found.options.items() if name == "client_name"}
    return {"master_name": found.master_name, "sentinel_kwargs": dict(found.sentinel_options)}


def result_backend(url: str) -> str:
    """Return Celery's setting of that name."""
    found = read_url(url)
    if isinstance(found, ServerUrl):
        place = _socket_url(found).removeprefix("redis+") or found.url
        return f"{ResultBackend.__module__}:{ResultBackend.__name__}+{place}"
    return f"{SentinelResultBackend.__module__}:{SentinelResultBackend.__name__}+{celery_url(url)}"


def _socket_url(found: ServerUrl) -> str:
    """Return Celery's form of a socket's URL; empty for what is none."""
    if found.scheme != "unix":
        return ""
    parts = urlsplit(replace(found, db=0).url)
    options = parts.query.removeprefix("db=0")
    return f"redis+socket://{parts.netloc}{parts.path}?virtual_host={found.db}{options}"


def first_url(urls: Sequence[str]) -> Iterator[str]:
    """Return what kombu tries after a failure: the first URL again, which alone has the login.

    All sentinels are asked for each connection anyhow.
    """
    return repeat(urls[0])
