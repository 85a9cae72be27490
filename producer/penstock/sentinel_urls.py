"""A Redis behind Sentinel: the URL that names the sentinels, which know the server.

`sentinel://[user:password@]host[:26379],host2[:26379]/db?master_name=NAME[&sentinel_password=PASSWORD]`
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Self
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

EXAMPLE: Final = "sentinel://HOST:26379,HOST2:26379/0?master_name=NAME"
DEFAULT_PORT: Final = 26379
ANSWER_TIMEOUT_S: Final = 2.0
"""How long one sentinel is waited for, seconds, before the next one is asked."""

_HOST = re.compile(r"[\w.:-]+")
_OPTIONS: Final = {"master_name", "sentinel_password"}


@dataclass(frozen=True, slots=True, kw_only=True)
class SentinelUrl:
    """The parts of a `sentinel://` URL.

    Attributes:
        sentinels: host and port of each; the first that answers names the server.
        master_name: the sentinels' name of the server.
        db: database number.
        username: user at the server.
        password: password at the server.
        sentinel_password: password at the sentinels themselves.
    """

    sentinels: tuple[tuple[str, int], ...]
    master_name: str
    db: int
    username: str | None
    password: str | None = field(repr=False)
    sentinel_password: str | None = field(repr=False)

    @classmethod
    def parse(cls, url: str) -> Self:
        """Read a URL.

        Raises:
            ValueError: no connection could use it; the error tells how one looks.
        """
        try:
            parts = urlsplit(url)
            credentials, _, hosts = parts.netloc.rpartition("@")
            username, _, password = credentials.partition(":")
            options = dict(parse_qsl(parts.query, strict_parsing=True))
            is_fine = (
                is_sentinel(url)
                and "@" not in credentials
                and re.fullmatch(r"(/\d{0,5})?", parts.path)
                and not parts.fragment
                and options.get("master_name")
                and options.keys() <= _OPTIONS
            )
            if is_fine:
                return cls(
                    sentinels=tuple(_address(host) for host in hosts.split(",")),
                    master_name=options["master_name"],
                    db=int(parts.path.strip("/") or 0),
                    username=unquote(username) or None,
                    password=unquote(password) or None,
                    sentinel_password=options.get("sentinel_password"),
                )
        except ValueError:
            pass  # its text may hold the password
        raise ValueError(f"a URL like {EXAMPLE}")

    @property
    def url(self) -> str:
        """The URL again."""
        login = quote(self.username or "", safe="")
        if self.password:
            login += f":{quote(self.password, safe='')}"
        names = ((f"[{host}]" if ":" in host else host, port) for host, port in self.sentinels)
        hosts = (name if port == DEFAULT_PORT else f"{name}:{port}" for name, port in names)
        options = {"master_name": self.master_name}
        if self.sentinel_password:
            options["sentinel_password"] = self.sentinel_password
        return f"sentinel://{login}{'@' if login else ''}{','.join(hosts)}/{self.db}?{urlencode(options)}"

    @property
    def server(self) -> tuple[object, ...]:
        """Identity of this server: what tells it from others, however the sentinels are ordered."""
        return (frozenset(self.sentinels), self.master_name)

    @property
    def sentinel_options(self) -> Mapping[str, object]:
        """Options of connections to the sentinels themselves, for redis-py, kombu and Celery."""
        # Not asked twice: the next one is there for that. `None` says so to sync and async clients alike.
        options = {
            "retry": None,
            **dict.fromkeys(("socket_timeout", "socket_connect_timeout"), ANSWER_TIMEOUT_S),
        }
        return options | ({"password": self.sentinel_password} if self.sentinel_password else {})


def is_sentinel(url: str) -> bool:
    """Say whether `url` means a Redis behind Sentinel."""
    return url.partition("://")[0].lower() == "sentinel"


def _address(host: str) -> tuple[str, int]:
    parts = urlsplit(f"//{host}")
    if not parts.hostname or not _HOST.fullmatch(parts.hostname) or parts.port == 0:
        raise ValueError
    return parts.hostname, parts.port or DEFAULT_PORT
