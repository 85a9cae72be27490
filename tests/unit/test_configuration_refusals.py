"""Configurations that are wrong in rarer ways: always a `ConfigError` that says something."""

from pathlib import Path

import pytest

from penstock.errors import ConfigError, WorkerError, rebuild_error
from penstock.urls import mask_url
from penstock_workers.configuration import load_settings
from penstock_workers.hardware.machine import cpu_flags


def refused(config: Path | None = None, **given: dict[str, str]) -> str:
    """Return what is told of a configuration that cannot be used."""
    with pytest.raises(ConfigError) as caught:
        load_settings(config, **{"environ": {}, **given})
    assert caught.value.problems
    return str(caught.value)


def test_unknown_key_in_a_file_of_any_name(tmp_path: Path) -> None:
    """A file need not end in .toml for its errors to be told."""
    config = tmp_path / "penstock.conf"
    config.write_text("colour = 1\n")

    assert "colour" in refused(config)


@pytest.mark.parametrize(
    "environ",
    [
        {"penstock_redis__broker_urll": "x"},
        {"PENSTOCK_REDIS__PASSWORD_FILE": "\0"},
        {"PENSTOCK_REDIS__PASSWORD": "\udcff"},
        {"PENSTOCK_MODELS": "[" * 100_000},
    ],
)
def test_strange_variables_are_config_errors(environ: dict[str, str]) -> None:
    """Lower case, NUL, bytes that are no text, and bottomless JSON."""
    assert "redis" in refused(environ=environ).lower() or "models" in refused(environ=environ)


def test_a_password_file_of_bytes_is_not_quoted(tmp_path: Path) -> None:
    """A secret file that is no text is refused without a byte of it."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"hush\xff")

    assert "hush" not in refused(environ={"PENSTOCK_REDIS__PASSWORD_FILE": str(secret)})


def test_a_file_is_not_blamed_for_a_variable(tmp_path: Path) -> None:
    """What replaced a table of the file is named, not the file."""
    config = tmp_path / "penstock.toml"
    config.write_text('[models.m]\ntask = "embed"\nsource = "s"\n')

    assert refused(config, environ={"PENSTOCK_MODELS__M": "x"}).startswith("PENSTOCK_MODELS__M")


@pytest.mark.parametrize("arguments", [{"redis.colour": "1"}, {"config": "other.toml"}])
def test_an_argument_is_named_as_one(arguments: dict[str, str]) -> None:
    """A misspelled `--set` is told as an argument."""
    assert refused(arguments=arguments).startswith("argument: ")


def test_a_password_in_a_query_is_masked() -> None:
    """redis-py takes a password from the query too."""
    assert "hush" not in mask_url("redis://r:6379/0?password=hush")


def test_an_error_of_impossible_numbers_is_still_an_error() -> None:
    """Fields that cannot be shown do not hide the failure."""
    assert isinstance(rebuild_error("ResultTimeoutError", ["job", 10**400]), WorkerError)


def test_an_unknown_cpu_is_refused() -> None:
    """Among all else that is wrong; a known one, or none, is no setting that would be missing."""
    with pytest.raises(ConfigError) as raised:
        load_settings(environ={"PENSTOCK_CPU": "mmx", "PENSTOCK_REDS": "a"})

    assert "PENSTOCK_CPU = 'mmx': one of avx2, avx512, avx512_bf16, amx" in str(raised.value)
    assert "PENSTOCK_REDS" in str(raised.value)
    assert load_settings(environ={"PENSTOCK_CPU": "avx2"}).settings == load_settings(environ={}).settings


def test_a_cpu_can_do_no_more_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kind has what the kinds before it have."""
    has = []
    for kind in ("avx2", "avx512", "avx512_bf16", "amx"):
        monkeypatch.setenv("PENSTOCK_CPU", kind)
        has.append(cpu_flags())

    assert not [flag for flag in has[0] if flag.startswith(("avx512", "amx"))]
    assert "avx512_bf16" not in has[1]
    assert has[0] <= has[1] <= has[2] <= has[3]
    monkeypatch.delenv("PENSTOCK_CPU")
    assert cpu_flags() == has[3]
