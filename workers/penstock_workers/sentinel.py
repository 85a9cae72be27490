"""Celery behind Sentinel: a URL of ours in the words of kombu and of Celery's result backend."""

from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import Any
from urllib.parse import quote

from celery.backends.redis import SentinelBackend

from penstock.sentinel import SentinelUrl, is_sentinel
from penstock_workers.results import ResultBackend


class SentinelResultBackend(ResultBackend, SentinelBackend):  # type: ignore[misc]  # Celery has no types
    """Stores results in the master that Sentinel names."""


def celery_url(url: str) -> str:
    """Return `url` as kombu and Celery take it: one URL for each sentinel, the rest in options."""
    if not is_sentinel(url):
        return url
    found = SentinelUrl.parse(url)
    user, password = (quote(part or "", safe="") for part in (found.username, found.password))
    # Only the first has the login: Celery shows the others as they are.
    login = f"{user}:{password}@" if user or password else ""
    hosts = [f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in found.sentinels]
    first, *others = [f"{host}/{found.db}" for host in hosts]
    return ";".join(f"sentinel://{part}" for part in (f"{login}{first}", *others))


def transport_options(url: str) -> dict[str, Any]:
    """Return what kombu and Celery must know besides `celery_url`; nothing without Sentinel."""
    if not is_sentinel(url):
        return {}
    found = SentinelUrl.parse(url)
    return {"master_name": found.master_name, "sentinel_kwargs": dict(found.sentinel_options)}


def result_backend(url: str) -> str:
    """Return Celery's setting of that name."""
    backend = SentinelResultBackend if is_sentinel(url) else ResultBackend
    return f"{backend.__module__}:{backend.__name__}+{celery_url(url)}"


def first_url(urls: Sequence[str]) -> Iterator[str]:
    """Return what kombu tries after a failure: the first URL again, which alone has the login.

    All sentinels are asked for each connection anyhow.
    """
    return repeat(urls[0])
