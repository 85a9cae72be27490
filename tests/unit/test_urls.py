"""A URL means what redis-py's users mean by it, or is refused when the client is made."""

import asyncio
from pathlib import Path

import pytest
from redis.connection import parse_url

from penstock import AsyncClient, Client, ConfigError
from penstock.connections import connect, connect_sync
from penstock.urls import mask_url, plain_url
from penstock_workers.configuration import load_settings
from penstock_workers.serving.app import build_app

# Each with the form that all libraries are given.
READ = [
    ("redis://r", "redis://r/0"),
    ("redis://r:6379", "redis://r:6379/0"),
    ("redis://r:/1", "redis://r/1"),
    ("redis://r/2/", "redis://r/2"),
    ("redis://r?db=3", "redis://r/3"),
    ("redis://r/3?db=3", "redis://r/3"),
    (" REDIS://r/1\n", "redis://r/1"),
    ("valkey://r/1", "redis://r/1"),
    ("valkeys://r/1", "rediss://r/1"),
    ("redis://[::1]:7000/1", "redis://[::1]:7000/1"),
    ("redis://[fe80::1%25eth0]/1", "redis://[fe80::1%25eth0]/1"),
    ("redis://me@r/0", "redis://me@r/0"),
    ("redis://me:@r/0", "redis://me@r/0"),
    ("redis://:@r/0", "redis://r/0"),
    ("redis://:p%40ss%2Fw@r/0", "redis://:p%40ss%2Fw@r/0"),
    ("redis://:p@ss@r/0", "redis://:p%40ss@r/0"),
    ("redis://me:p:a;ss@r/0", "redis://me:p%3Aa%3Bss@r/0"),
    ("redis://:100%@r/0", "redis://:100%25@r/0"),
    ("redis://my_host-1.local/0", "redis://my_host-1.local/0"),
    ("redis://r/0?client_name=web&protocol=3", "redis://r/0?client_name=web&protocol=3"),
    ("rediss://r/0?ssl_cert_reqs=CERT_NONE", "rediss://r/0?ssl_cert_reqs=none"),
    ("rediss://r/0?ssl_check_hostname=False", "rediss://r/0?ssl_check_hostname=false"),
    ("rediss://r/0?ssl_ca_certs=/a%20b/ca.pem", "rediss://r/0?ssl_ca_certs=/a%20b/ca.pem"),
    ("unix:///run/r.sock", "unix:///run/r.sock?db=0"),
    ("unix://me:pw@/run/r.sock?db=2", "unix://me:pw@/run/r.sock?db=2"),
    ("redis+socket:///run/r.sock?virtual_host=2", "unix:///run/r.sock?db=2"),
]
REFUSED = [
    "",
    "   ",
    "localhost",
    "localhost:6379",
    "//r/0",
    "http://r/0",
    "amqp://r/0",
    "redis:r",
    "redis://",
    "redis:///1",
    "redis://:hush@",
    "redis://r/abc",
    "redis://r/-1",
    "redis://r/1/2",
    "redis://r/0x1",
    "redis://r/٣",
    "redis://r/0?db=1",
    "redis://r/?db=",
    "redis://r/?db=one",
    "redis://r/?db=1&db=2",
    "redis://r:0/0",
    "redis://r:99999/0",
    "redis://r:-1/0",
    "redis://r:port/0",
    "redis://::1:6379/0",
    "redis://[::1/0",
    "redis://[r]/0",
    "redis://a,b/0",
    "redis://a b/0",
    "redis://a\nb/0",
    "redis://r/0#1",
    "redis://r/0?decode_responses=true",
    "redis://r/0?socket_timeout=1",
    "redis://r/0?health_check_interval=30",
    "redis://r/0?max_connections=1",
    "redis://r/0?colour=red",
    "redis://r/0?protocol=4",
    "redis://r/0?ssl_cert_reqs=none",
    "rediss://r/0?ssl_cert_reqs=maybe",
    "rediss://r/0?ssl_min_version=1",
    "redis://r/0?password=hush",
    "redis://r/0?PASSWORD=hush",
    "redis://r/0?username=me",
    "redis://r/0?client_name",
    "unix://",
    "unix://run/r.sock",
    "unix:///run/r.sock?db=1&virtual_host=2",
    "sentinel://a",
    "sentinel://a;sentinel://b",
    "redis+sentinel://a/main/0",
]
# Passwords that ought to have been percent-encoded: `hush` stands for every part of them.
UNCLEAR = [
    "redis://:hush/hush@r:6379/0",
    "redis://:hush#hush@r:6379/0",
    "redis://:hush?hush@r:6379/0",
    "redis://hush:1/hush@r:6379/0",
    "redis://hush:1?hush@r:6379/0",
    "redis://:hush@hush/hush@r:6379/0",
    "redis://:hush hush@r:6379/0",
    "redis://:hush%2Fhush@r:port/0",
    "redis://r:6379/0?client_name=hush@hush",
    "redis://hush@r/abc",
    "redis://:hush",
    "redis//:hush@r/0",
    "unix://:hush/hush@/run/r.sock",
    "sentinel://:hush/hush@a/0?master_name=main",
]


@pytest.mark.parametrize(("url", "plain"), READ)
def test_a_url_is_read(url: str, plain: str) -> None:
    """Every way of writing comes to one form, which is read as itself."""
    assert plain_url(url) == plain
    assert plain_url(plain) == plain


@pytest.mark.parametrize("url", [url for url, _ in READ if url.startswith("redis") and "+" not in url])
def test_redis_py_would_mean_the_same(url: str) -> None:
    """Host, port, database and login are those that redis-py finds."""
    ours, theirs = (parse_url(each) for each in (plain_url(url), url))

    for name in ("host", "port", "username", "password"):
        assert ours.get(name) == theirs.get(name), name
    assert ours.get("db", 0) == theirs.get("db", 0)


@pytest.mark.parametrize("url", [*REFUSED, *UNCLEAR])
@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_what_cannot_be_meant_is_refused_at_once(kind: type[Client] | type[AsyncClient], url: str) -> None:
    """The client is not made; the error is one line, names the argument, and shows no password."""
    for arguments in ({"url": url}, {"results_url": url}):
        with pytest.raises(ConfigError) as caught:
            kind(**arguments)

        (line,) = str(caught.value).splitlines()
        assert line.startswith(next(iter(arguments)))
        assert "a URL like" in line
        assert "hush" not in line


@pytest.mark.parametrize("url", [url for url in (*REFUSED, *UNCLEAR) if url])  # an empty one is not set
@pytest.mark.parametrize("key", ["redis.broker_url", "redis.results_url"])
def test_settings_refuse_what_clients_refuse(key: str, url: str) -> None:
    """One reader serves both; what is quoted of a refused URL holds nothing of a password."""
    with pytest.raises(ConfigError) as caught:
        load_settings(arguments={key: url}, environ={})

    assert str(caught.value).startswith(f"argument: {key}")
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize("url", [None, 5, b"redis://r", Path("/run/r.sock"), ["redis://r"]])
def test_what_is_no_text_is_refused(url: object) -> None:
    """Another type than text is named, and nothing of it is shown."""
    if url is not None:
        with pytest.raises(ConfigError, match=f"results_url is of type {type(url).__name__}"):
            Client(results_url=url)  # type: ignore[arg-type]  # on purpose
    with pytest.raises(ConfigError, match=f"url is of type {type(url).__name__}"):
        Client(url)  # type: ignore[arg-type]  # on purpose


def test_an_option_is_refused_by_its_name() -> None:
    """Whoever has to change a URL is told which option of it."""
    for name in ("socket_timeout", "decode_responses", "colour", "ssl_min_version"):
        with pytest.raises(ConfigError, match=name):
            Client(f"rediss://r/0?{name}=1")


@pytest.mark.parametrize(
    "url", [*UNCLEAR, "redis://hush@r/0", "redis://:hush[hush@r/0", "redis://r/0?SSL_PASSWORD=hush", "hush"]
)
def test_no_part_of_a_password_is_shown(url: str) -> None:
    """Masking is by structure: what can be read in two ways is not shown at all."""
    assert "hush" not in mask_url(url)


def test_libraries_get_all_that_a_url_says() -> None:
    """Database, login, name and socket reach redis-py's two clients and Celery's results."""
    url = plain_url("unix://me:p%40ss@/run/a%20b.sock?db=4&client_name=web")
    waiting, blocking = connect(url), connect_sync(url)
    wanted = {"path": "/run/a b.sock", "db": 4, "username": "me", "password": "p@ss", "client_name": "web"}
    for client in (waiting, blocking):
        assert wanted.items() <= client.connection_pool.connection_kwargs.items()
    asyncio.run(waiting.aclose())

    app = build_app(
        load_settings(arguments={"redis.broker_url": url, "redis.results_url": url}, environ={}).settings
    )

    assert wanted.items() <= app.backend.connparams.items()
    shown = f"{app.connection().as_uri()} {app.backend.as_uri()} {app.conf.table(censored=True)}"
    assert "p@ss" not in shown
    assert "p%40ss" not in shown
