"""Flower for `__main__` alone, which starts it: without a login it answers to names of this machine only.

A page from elsewhere that an operator opens can have its own name point to 127.0.0.1, and would then read
what Flower shows: DNS rebinding.
"""

import ipaddress
from typing import Any

from flower.app import Flower
from tornado.web import ErrorHandler

from penstock_workers.settings import is_loopback


def guard() -> None:
    """Have all of Flower refuse foreign names: it has no option for that."""
    find = Flower.find_handler

    def find_handler(page: Any, request: Any, **options: Any) -> Any:
        if _is_open(page.options) and not _is_plain(request.host_name):
            return page.get_handler_delegate(request, ErrorHandler, {"status_code": 403})
        return find(page, request, **options)

    Flower.find_handler = find_handler


def _is_open(options: Any) -> bool:
    """Whether being on this machine is all that it takes to see the page."""
    return is_loopback(options.address) and not (options.basic_auth or options.auth)


def _is_plain(host: str) -> bool:
    """Whether no name server can have said where the host is."""
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return host == "localhost"
    return True
