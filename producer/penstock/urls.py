"""URLs of Redis, read in one place for clients, workers, settings and results alike.

A URL means what redis-py's users mean by it, or is refused before anything connects. No message quotes
a part of a URL that is refused: if a password was not percent-encoded, any part may belong to it.
"""

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Literal, Self
from urllib.parse import parse_qsl, quote, unquote

from penstock.errors import ConfigError
from penstock.sentinel_urls import SentinelUrl, is_sentinel

EXAMPLE: Final = "a URL like redis://HOST:6379/0 or rediss://HOST:6379/0"
DEFAULT_PORT: Final = 6379

_Scheme = Literal["redis", "rediss", "unix"]
_SCHEMES: Final[Mapping[str, _Scheme]] = {
    "redis": "redis",
    "rediss": "rediss",
    "valkey": "redis",
    "valkeys": "rediss",
    "unix": "unix",
    "redis+socket": "unix",  # kombu's and Celery's name of it
}
_HOST: Final = re.compile(r"[\w.-]{1,253}")
_DATABASE: Final = re.compile(r"\d{1,5}", re.ASCII)
_FILES: Final = ("ssl_ca_certs", "ssl_ca_path", "ssl_certfile", "ssl_keyfile")
_CERTIFICATES: Final = ("none", "optional", "required")
_TRUTH: Final = {"true": "true", "yes": "true", "1": "true", "false": "false", "no": "false", "0": "false"}
_OURS: Final = frozenset(
    (
        "decode_responses",
        "encoding",
        "encoding_errors",
        "health_check_interval",
        "max_connections",
        "retry_on_error",
        "retry_on_timeout",
        "socket_connect_timeout",
        "socket_keepalive",
        "socket_read_size",
        "socket_timeout",
        "timeout",
    )
)
"""Options of redis-py that Penstock sets itself: limits of time and of connections depend on each other."""
_SECRET: Final = re.compile(r"pass|pw|secret|token|key|auth|cred|user", re.IGNORECASE)
_SERVER: Final = re.compile(r"(\[[0-9a-zA-Z:.%]+\]|[\w.%-]*)(:\d{0,5})?", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerUrl:
    """The parts of a `redis://`, `rediss://` or `unix://` URL.

    Attributes:
        scheme: `redis`, `rediss` over TLS, or `unix` for a socket in the file system.
        host: name or address; empty for `unix`.
        port: None for Redis' own.
        path: path of the socket; empty unless `unix`.
        db: database number.
        username: None where the URL names none.
        password: None where the URL names none.
        options: `client_name`, `protocol`, and those of TLS by redis-py's names.
    """

    scheme: _Scheme
    host: str = ""
    port: int | None = None
    path: str = ""
    db: int = 0
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    options: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, url: str) -> Self:
        """Read a URL; spaces and line ends around it are left out.

        Raises:
            ValueError: no connection could use it, or it could mean two things; tells what is wrong with it.
        """
        name, mark, rest = url.strip().partition("://")
        scheme = _SCHEMES.get(name.lower())
        if not mark or scheme is None:
            raise ValueError(EXAMPLE)
        if re.search(r"[\s\x00-\x1f\x7f]", rest):
            raise _refused("a space or a control character is in it")
        authority, tail = _split(rest)
        path, _, query = tail.partition("?")
        if "#" in tail or "@" in query or ("@" in path and scheme != "unix"):
            raise _refused("a / ? # or @ is in its login or an option: percent-encode it")
        login, _, server = authority.rpartition("@")
        options = _options(query)
        if scheme == "unix":
            if server or not path.strip("/"):
                raise _refused("after unix:// comes the path of the socket, /run/redis.sock")
            host, port = "", None
        else:
            host, port = _address(server)
        username, _, password = login.partition(":")
        return cls(
            scheme=scheme,
            host=host,
            port=port,
            path=unquote(path) if scheme == "unix" else "",
            db=_database("" if scheme == "unix" else path, options),
            username=unquote(username) or None,
            password=unquote(password) or None,
            options=_checked(options, is_tls=scheme == "rediss"),
        )

    @property
    def url(self) -> str:
        """The URL again, in the one form that all libraries read alike."""
        login = quote(self.username or "", safe="")
        if self.password:
            login += f":{quote(self.password, safe='')}"
        login += "@" if login else ""
        options = dict(self.options)
        if self.scheme == "unix":
            place = quote(self.path)
            options = {"db": str(self.db), **options}
        else:
            host = f"[{self.host.replace('%', '%25')}]" if ":" in self.host else self.host
            place = f"{host}{f':{self.port}' if self.port else ''}/{self.db}"
        query = "&".join(f"{name}={quote(value, safe='/,-')}" for name, value in options.items())
        return f"{self.scheme}://{login}{place}{'?' if query else ''}{query}"

    @property
    def server(self) -> tuple[object, ...]:
        """Identity of this server: what tells it from others."""
        return (self.path,) if self.scheme == "unix" else (self.host.lower(), self.port or DEFAULT_PORT)


def read_url(url: str) -> ServerUrl | SentinelUrl:
    """Read a URL of any kind.

    Raises:
        ValueError: see `ServerUrl.parse` and `SentinelUrl.parse`.
    """
    return SentinelUrl.parse(url.strip()) if is_sentinel(url.strip()) else ServerUrl.parse(url)


def plain_url(url: str) -> str:
    """Return `url` in the form that all libraries read alike.

    Raises:
        ValueError: see `read_url`.
    """
    return read_url(url).url


def checked_url(name: str, url: object) -> str:
    """Return the URL that a caller gave as `name` in the form that all libraries read alike.

    Raises:
        ConfigError: no connection could use it; the error tells what is wrong.
    """
    if not isinstance(url, str):
        raise ConfigError([f"{name} is of type {type(url).__name__}: {EXAMPLE}"])
    try:
        return plain_url(url)
    except ValueError as error:
        raise ConfigError([f"{name}: {error}"]) from None


def announce_results(broker_url: str, results_url: str) -> str:
    """Return where results are kept as clients are told: no credentials, and relative where it can be.

    Relative, because a client may reach the same server under another name than the workers do. Without
    certificate files too: their paths are of the worker's machine.
    """
    results = read_url(results_url)
    if read_url(broker_url).server == results.server:
        return f"/{results.db}"
    if isinstance(results, SentinelUrl):
        return replace(results, username=None, password=None, sentinel_password=None).url
    options = {name: value for name, value in results.options.items() if name not in _FILES}
    return replace(results, username=None, password=None, options=options).url


def locate_results(broker_url: str, announced: str) -> str:
    """Return the result store's URL for a client that reaches the broker at `broker_url`.

    Only a database of the broker's own server is taken: whoever can write the registry could name any
    server, and have the logins of all clients sent there.

    Raises:
        ConfigError: results are kept at another server, which the client has to be told itself.
    """
    broker = read_url(broker_url)
    database = announced.removeprefix("/")
    if announced.startswith("/") and _DATABASE.fullmatch(database):
        return replace(broker, db=int(database)).url
    try:
        named = read_url(announced)
    except ValueError:
        told = "the workers name no place that can be read"
    else:
        if named.server == broker.server and type(named) is type(broker):
            return replace(broker, db=named.db).url
        told = f"the workers keep results at {mask_url(named.url)[:200]}, another server than the broker"
    raise ConfigError([f"results_url: {told}; name it, with its login: Client(url, results_url=...)"])


def mask_url(url: str) -> str:
    """Return `url` without its password; a list with semicolons, as Celery takes it, without any password.

    Nothing is shown of a URL whose structure can be read in two ways.
    """
    return ";".join(map(_mask, re.split(r";(?=sentinel://)", url)))


def _mask(url: str) -> str:
    scheme, mark, rest = url.partition("://")
    authority, tail = _split(rest)
    tail, _, fragment = tail.partition("#")
    path, _, query = tail.partition("?")
    login, at, servers = authority.rpartition("@")
    is_clear = (
        mark
        and re.fullmatch(r"[\w+.-]+", scheme)
        and "@" not in f"{query}#{fragment}"
        and ("@" not in path or not authority)
        and all(_SERVER.fullmatch(server) for server in servers.rpartition("@")[2].split(","))
    )
    if not is_clear:
        return "(not a URL)"  # whatever it holds, it may hold a password
    user, colon, password = login.partition(":")
    if at:
        # Without the colon a password stands in place of the user's name.
        user = f"{user}:***" if password else user if colon else "***"
    options = "&".join(map(_mask_option, query.split("&")))
    return f"{scheme}://{user}{at}{servers}{path}{'?' if query else ''}{options}{'#***' if fragment else ''}"


def _mask_option(item: str) -> str:
    name, equals, _ = item.partition("=")
    if not equals:
        return "***" if item else ""
    return f"{name}=***" if _SECRET.search(unquote(name)) else item


def _split(rest: str) -> tuple[str, str]:
    """Return what is before and after the end of login and host."""
    end = re.search(r"[/?#]|$", rest)
    assert end is not None
    return rest[: end.start()], rest[end.start() :]


def _refused(problem: str) -> ValueError:
    return ValueError(f"{problem}: {EXAMPLE}")


def _address(server: str) -> tuple[str, int | None]:
    bracketed = re.fullmatch(r"\[([^\]]*)\](?::(.*))?", server)
    name, port = bracketed.groups() if bracketed else (server.partition(":")[0], server.partition(":")[2])
    name = unquote(name)
    if bracketed:
        try:
            ipaddress.IPv6Address(name)
        except ValueError:
            raise _refused("no IPv6 address is in its brackets") from None
    elif server.count(":") > 1 or "[" in server or "]" in server:
        raise _refused("its host has several colons: an IPv6 address stands in brackets")
    elif not name:
        raise _refused("no host is in it")
    elif not _HOST.fullmatch(name):
        raise _refused("its host is no name")
    if port and not (_DATABASE.fullmatch(port) and 0 < int(port) < 1 << 16):
        raise _refused("its port is no number from 1 to 65535")
    return name, int(port) if port else None


def _database(path: str, options: dict[str, str]) -> int:
    """Return the database that the path names, or an option; takes the option out."""
    named = [path.strip("/")] if path.strip("/") else []
    named += [options.pop(name) for name in ("db", "virtual_host") if name in options]
    if not all(_DATABASE.fullmatch(each.strip("/")) for each in named):
        raise _refused("its database is no number")
    numbers = {int(each.strip("/")) for each in named}
    if len(numbers) > 1:
        raise _refused("it names two databases")
    return numbers.pop() if numbers else 0


def _options(query: str) -> dict[str, str]:
    """Read options; each has a name, a value, and stands there once."""
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True) if query else []
    except ValueError:
        raise _refused("its options are no name=value&name=value") from None
    found: dict[str, str] = {}
    for name, value in pairs:
        if name in found:
            raise _refused(f"option {_shown(name)} stands in it twice")
        found[name] = value
    return found


def _checked(options: Mapping[str, str], *, is_tls: bool) -> dict[str, str]:
    """Return options as libraries take them; what has no effect or no place is refused by name."""
    found = {}
    for name, value in options.items():
        text = value.lower().removeprefix("cert_")
        is_fine: object
        if name.startswith("ssl_") and not is_tls:
            raise _refused(f"option {_shown(name)} is for rediss:// alone")
        if name in _OURS:
            raise _refused(f"option {name} is none of Penstock, which sets it itself")
        if name in _FILES or name == "client_name":
            is_fine = re.fullmatch(r"[!-~]+" if name == "client_name" else r".+", value)
            text = value
        elif name == "ssl_cert_reqs":
            is_fine = text in _CERTIFICATES
        elif name == "ssl_check_hostname":
            text = _TRUTH.get(text, "")
            is_fine = text
        elif name == "protocol":
            is_fine = text in ("2", "3")
        elif _SECRET.search(name):
            raise _refused(
                f"option {_shown(name)} has no place in it: user and password stand before the host"
            )
        else:
            raise _refused(f"option {_shown(name)} is unknown")
        if not is_fine:
            raise _refused(f"option {name} has a value that it cannot have")
        found[name] = text
    return found


def _shown(name: str) -> str:
    # An odd name may be a piece of a password that was not encoded.
    return repr(name) if re.fullmatch(r"[a-z_]{1,32}", name) else "of an odd name"
