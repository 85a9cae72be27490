"""Who this process is: a name that no other process has.

Host name and process id are not enough: in containers that share a host name, process ids are the same.
"""

import os
import secrets
import socket
from typing import Final

_TOKEN_BYTES: Final = 6

_token = secrets.token_hex(_TOKEN_BYTES)


def process_token() -> str:
    """Return what tells this process from all others; drawn when it started, and anew after a fork."""
    return _token


def process_name() -> str:
    """Return host name, process id and token, for people and for Redis."""
    return f"{socket.gethostname()}:{os.getpid()}:{_token}"


def _draw() -> None:
    global _token  # the one thing that a fork must not share with its parent
    _token = secrets.token_hex(_TOKEN_BYTES)


if hasattr(os, "register_at_fork"):  # not everywhere
    os.register_at_fork(after_in_child=_draw)
