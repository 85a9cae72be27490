import asyncio
from itertools import islice
from pathlib import Path

import pytest
from kombu import Connection

from penstock.connections import connect, connect_sync
from penstock.errors import ConfigError
from penstock.sentinel_urls import SentinelUrl
from penstock.urls import announce_results, locate_results, mask_url
from penstock_workers.configuration import effective_values, load_settings
from penstock_workers.delivery.celery_urls import celery_url, first_url, result_backend, transport_options
from penstock_workers.serving.app import build_app
from penstock_workers.settings import Settings

PLAIN = "sentinel://a,b:26380/0?master_name=main"
FULL = "sentinel://me:p%40ss@a:1,b:2,c/3?master_name=main&sentinel_password=hu%26sh"


def settings(url: str) -> Settings:
    """Return a deployment whose broker and results are behind `url`."""
    arguments = {"redis.broker_url": url, "redis.results_url": url}
    return load_settings(arguments=arguments, environ={}).settings


# Reading


def test_every_part_of_a_url_is_read() -> None:
    """Sentinels, master, database, login and the sentinels' own password all stand in one URL."""
    assert SentinelUrl.parse(FULL) == SentinelUrl(
        sentinels=(("a", 1), ("b", 2), ("c", 26379)),
        master_name="main",
        db=3,
        username="me",
        password="p@ss",
        sentinel_password="hu&sh",
    )


def test_what_is_left_out_has_a_default() -> None:
    """A host and a name are enough: Sentinel's port, database 0, no login."""
    assert SentinelUrl.parse("sentinel://a?master_name=main") == SentinelUrl(
        sentinels=(("a", 26379),),
        master_name="main",
        db=0,
        username=None,
        password=None,
        sentinel_password=None,
    )


def test_addresses_may_be_numbers() -> None:
    """Sentinels of both internet protocols are named by address."""
    url = SentinelUrl.parse("sentinel://[::1]:1,10.0.0.1:2/0?master_name=main")

    assert url.sentinels == (("::1", 1), ("10.0.0.1", 2))


@pytest.mark.parametrize(
    "url",
    [
        "sentinel://a:26379/0",
        "sentinel://a:26379/0?master_name=",
        "sentinel:///0?master_name=main",
        "sentinel://a,,b/0?master_name=main",
        "sentinel://a:0/0?master_name=main",
        "sentinel://a:99999/0?master_name=main",
        "sentinel://a:port/0?master_name=main",
        "sentinel://a/main?master_name=main",
        "sentinel://a/0?master_name=main&colour=red",
        "sentinel://:hush@a,:hush@b/0?master_name=main",
        "sentinel://:hush@a;sentinel://:hush@b/0?master_name=main",
        "sentinel://:hu#sh@a/0?master_name=main",
        "sentinel://:hush@[::1/0?master_name=main",
    ],
)
def test_broken_url_is_told_without_its_password(url: str) -> None:
    """A URL that no connection could use is one line with how one looks."""
    with pytest.raises(ConfigError) as caught:
        settings(url)

    told = str(caught.value).splitlines()[0]
    assert told.startswith("argument: redis.broker_url")
    assert told.endswith("a URL like sentinel://HOST:26379,HOST2:26379/0?master_name=NAME")
    assert "hush" not in str(caught.value)


# Secrets


@pytest.mark.parametrize(
    ("url", "masked"),
    [
        (PLAIN, PLAIN),
        (FULL, "sentinel://me:***@a:1,b:2,c/3?master_name=main&sentinel_password=***"),
        ("sentinel://:pw@a,:pw@b/0", "sentinel://:***@b/0"),
        ("sentinel://:pw@a/0;sentinel://x:pw@b/0", "sentinel://:***@a/0;sentinel://x:***@b/0"),
        ("redis://:p;w@r:6379/0", "redis://:***@r:6379/0"),
    ],
)
def test_passwords_of_every_part_are_masked(url: str, masked: str) -> None:
    """Neither the server's password nor the sentinels' is shown, also of a URL that is refused."""
    assert mask_url(url) == masked


def test_configured_password_is_the_servers(tmp_path: Path) -> None:
    """A password that is kept apart completes the URL, and is shown nowhere."""
    secret = tmp_path / "password"
    secret.write_text("hush\n")
    loaded = load_settings(
        arguments={"redis.broker_url": PLAIN, "redis.password_file": str(secret)}, environ={}
    )

    assert SentinelUrl.parse(loaded.settings.broker_url).password == "hush"
    assert "hush" not in str(effective_values(loaded))


# Where results are kept


@pytest.mark.parametrize(
    ("results", "announced"),
    [
        ("sentinel://:pw@b:26380,a/1?master_name=main", "/1"),
        ("sentinel://a,b:26380?master_name=main&sentinel_password=pw", "/0"),
        ("sentinel://:pw@a,b:26380/1?master_name=other", "sentinel://a,b:26380/1?master_name=other"),
        ("sentinel://:pw@c/1?sentinel_password=pw&master_name=main", "sentinel://c/1?master_name=main"),
        ("redis://:pw@r/1", "redis://r/1"),
    ],
)
def test_results_are_announced_without_credentials(results: str, announced: str) -> None:
    """Clients hear a path behind the same master, or another address, and never a password."""
    assert announce_results(PLAIN, results) == announced


def test_clients_find_results_behind_their_own_sentinels() -> None:
    """A client's login and its password for the sentinels are kept."""
    assert locate_results(FULL, "/1") == (
        "sentinel://me:p%40ss@a:1,b:2,c/1?master_name=main&sentinel_password=hu%26sh"
    )


@pytest.mark.parametrize("announced", ["sentinel://d/1?master_name=other", "redis://a:1/1"])
def test_other_sentinels_have_to_be_named_by_the_client(announced: str) -> None:
    """No login goes to a server that the registry names."""
    with pytest.raises(ConfigError, match="results_url"):
        locate_results(FULL, announced)


# In the words of the libraries


def test_redis_clients_are_of_the_named_master() -> None:
    """Both clients ask all sentinels for the master, with the login and database of the URL."""
    waiting, blocking = connect(FULL), connect_sync(FULL)

    for client in (waiting, blocking):
        pool = client.connection_pool
        assert pool.service_name == "main"
        assert {"db": 3, "username": "me", "password": "p@ss"}.items() <= pool.connection_kwargs.items()
        sentinels = [s.connection_pool.connection_kwargs for s in pool.sentinel_manager.sentinels]
        assert [(kw["host"], kw["port"], kw["password"]) for kw in sentinels] == [
            ("a", 1, "hu&sh"),
            ("b", 2, "hu&sh"),
            ("c", 26379, "hu&sh"),
        ]
    asyncio.run(waiting.aclose())


def test_celery_gets_one_url_for_each_sentinel() -> None:
    """The first holds the login; the name of the master goes into the options."""
    assert celery_url(FULL) == "sentinel://me:p%40ss@a:1/3;sentinel://b:2/3;sentinel://c:26379/3"
    assert celery_url("redis://r:6379/0") == "redis://r:6379/0"
    assert transport_options(FULL)["master_name"] == "main"
    assert transport_options("redis://r:6379/0") == {}
    assert result_backend("redis://r/1") == "penstock_workers.delivery.backend:ResultBackend+redis://r/1"


def test_kombu_keeps_the_login_when_it_tries_again() -> None:
    """After a failure kombu takes the first URL again, and with it the broker that leases are held on."""
    connection = Connection(celery_url(FULL), failover_strategy=first_url)

    connection.maybe_switch_next()

    assert (connection.userid, connection.password, connection.virtual_host) == ("me", "p@ss", "3")
    assert (connection.hostname, connection.port) == ("a", 1)
    assert list(islice(connection.cycle, 2)) == ["sentinel://me:p%40ss@a:1/3"] * 2


def test_the_app_is_configured_for_sentinel_and_shows_no_password() -> None:
    """The worker's app reads the URL; what Celery prints of its broker and results holds no secret."""
    app = build_app(settings(FULL))

    params = app.backend.connparams
    assert [(host["host"], host["port"]) for host in params["hosts"]] == [("a", 1), ("b", 2), ("c", 26379)]
    assert (params["username"], params["password"], params["db"]) == ("me", "p@ss", 3)
    assert app.connection_for_read().alt == celery_url(FULL).split(";")
    shown = f"{app.connection().as_uri()} {app.backend.as_uri()} {app.conf.table(censored=True)}"
    assert not [secret for secret in ("p@ss", "p%40ss", "hu&sh", "hu%26sh") if secret in shown]
