import json
from pathlib import Path

import pytest

from penstock.errors import ConfigError
from penstock_workers.configuration import load_settings
from penstock_workers.remote.endpoint import read_token
from tests.configured import MODEL, load, problems


@pytest.mark.parametrize("value", ["257", "1.0", "true", '"two"', '""', '"Auto"', "-0"])
def test_counts_of_a_pool_are_checked(tmp_path: Path, value: str) -> None:
    """One line names the key, the value and what is allowed."""
    (line,) = problems(tmp_path, f"[pools.gpu]\nthreads = {value}\n")

    quoted = {"true": "True", "-0": "0"}.get(value, value.strip('"'))
    assert line == f"FILE: pools.gpu.threads = '{quoted}': auto, or a number from 1 to 256"


@pytest.mark.parametrize(("text", "count"), [("auto", "auto"), ("0", 0), ("256", 256)])
def test_counts_of_a_pool_are_numbers_or_auto(tmp_path: Path, text: str, count: object) -> None:
    """A variable's text becomes a number."""
    assert load(tmp_path, POOLS__CPU__PROCESSES=text).settings.pools.cpu.processes == count


@pytest.mark.parametrize("name", ["a", "minilm", "qwen2-5", "a_b", "0", "x" * 64, "a-b_c--d_"])
def test_model_names_that_fit_a_queue(tmp_path: Path, name: str) -> None:
    """Names may hold what model names usually hold."""
    loaded = load(tmp_path, f'[models."{name}"]\ntask = "embed"\nsource = "s"\n')

    assert list(loaded.settings.models) == [name]


@pytest.mark.parametrize(
    "name", ["", "A", "a b", "a/b", "a,b", "_a", "-a", ".a", "a.b", "a__b", "ä", "x" * 65, "a\\n"]
)
def test_model_names_that_do_not_fit_a_queue(tmp_path: Path, name: str) -> None:
    """Names that would break a queue, a variable or Celery's command line are refused."""
    (line,) = problems(tmp_path, f'[models."{name}"]\ntask = "embed"\nsource = "s"\n')

    assert line.startswith("FILE: models: names [")
    assert line.endswith("]: up to 64 of a-z 0-9 - _, no __, a-z 0-9 first")


def test_every_bad_model_name_is_told(tmp_path: Path) -> None:
    """One start tells all names that must be changed."""
    models = "".join(f'[models."{name}"]\ntask = "embed"\nsource = "s"\n' for name in ("A", "b", "c.d"))

    (line,) = problems(tmp_path, models)

    assert "names ['A', 'c.d']: " in line


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ('task = "embed"\nsource = ""', "models.m.source = ''"),
        ('task = "embed"\nsource = "s"\npools = []', "models.m.pools: "),
        ('task = "embed"\nsource = "s"\npools = ["cpu", "cpu"]', "models.m.pools: each pool once"),
        ('task = "embed"\nsource = "s"\npools = ["tpu"]', "models.m.pools.0 = 'tpu'"),
        ('task = "embed"\nsource = "s"\ndtype = "int8"', "models.m.dtype = 'int8'"),
        ('task = "embed"\nsource = "s"\ndeadline_s = 0', "models.m.deadline_s = '0'"),
        ('task = "embed"\nsource = "s"\nmax_batch_tokens = 15', "models.m.max_batch_tokens = '15'"),
        ('task = "embed"\nsource = "s"\ngeneration = { topk = 1 }', "models.m.generation.topk: no "),
        ('source = "s"', "models.m.task: Field required"),
        ("", "models.m.task: Field required"),
    ],
)
def test_model_entries_are_checked(tmp_path: Path, entry: str, told: str) -> None:
    """Each field of a model has a range, and the complaint names the field."""
    line, *_ = problems(tmp_path, f"[models.m]\n{entry}\n")

    assert line.startswith(f"FILE: {told}")


@pytest.mark.parametrize(
    "url",
    [
        "",
        "r:6379",
        "//r",
        "http://r/0",
        "redis://",
        "redis://[::1/0",
        "redis://r:port/0",
        "redis://r:99999/0",
        "redis://r:0/0",
    ],
)
def test_broken_url_is_told(tmp_path: Path, url: str) -> None:
    """A URL that no connection could use is one line with what is wanted."""
    (line,) = problems(tmp_path, f'[redis]\nbroker_url = "{url}"\n')

    assert line.startswith("FILE: redis.broker_url")
    assert line.endswith(": a URL like redis://HOST:6379/0 or rediss://HOST:6379/0")


def test_password_completes_urls_that_have_none(tmp_path: Path) -> None:
    """One password serves both URLs, quoted as URLs need it, and never replaces another."""
    toml = '[redis]\nbroker_url = "redis://me@r:6379/0"\nresults_url = "rediss://:own@s:6379/1"\n'

    settings = load(tmp_path, toml, REDIS__PASSWORD="p@ss/word").settings

    assert settings.broker_url == "redis://me:p%40ss%2Fword@r:6379/0"
    assert settings.results_url == "rediss://:own@s:6379/1"


def test_password_is_read_from_its_file(tmp_path: Path) -> None:
    """A mounted secret may end with a newline."""
    secret = tmp_path / "password"
    secret.write_text("hush\n")

    settings = load(tmp_path, REDIS__PASSWORD_FILE=str(secret)).settings

    assert settings.broker_url == "redis://:hush@127.0.0.1:6379/0"
    assert settings.results_url == "redis://:hush@127.0.0.1:6379/1"


def test_password_wins_over_its_file(tmp_path: Path) -> None:
    """Where both are set, the file is not even read."""
    missing = str(tmp_path / "missing")

    settings = load(tmp_path, REDIS__PASSWORD="hush", REDIS__PASSWORD_FILE=missing).settings

    assert settings.broker_url == "redis://:hush@127.0.0.1:6379/0"


def test_embedding_models_are_not_spread_over_gpus() -> None:
    """`device_map` is for generation models."""
    models = '{"minilm": {"task": "embed", "source": "bundled:minilm", "device_map": "auto"}}'

    with pytest.raises(ConfigError, match=r"device_map.*for generation models"):
        load_settings(arguments={"models": models}, environ={})


# Remote models

REMOTE = '[models.m]\ntask = "embed"\nengine = "remote"\n'


def test_a_remote_model_is_read(tmp_path: Path) -> None:
    """Limits and requests have tables of their own, and variables."""
    toml = f'{REMOTE}source = "https://host/v1"\nrate_limit = {{ requests_per_minute = 60 }}\n'

    model = load(tmp_path, toml, MODELS__M__REMOTE__TOKEN_ENV="KEY").settings.models["m"]

    assert (model.rate_limit.requests_per_minute, model.remote.token_env) == (60, "KEY")
    token = read_token(model.remote, {"KEY": " hush\n"})
    assert token is not None
    assert token.get_secret_value() == "hush"
    assert "hush" not in repr(token)


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        ('source = "org/name"', "models.m.source = 'org/name': a URL like"),
        ('source = "ftp://host"', "models.m.source = 'ftp://host': a URL like"),
        ('source = "https://hush@host/v1"', "models.m.source: a URL like"),
        ('source = "https://host/v1?key=hush"', "a URL like"),
        ('source = "provider:together"\nremote = { dim = 8 }', "models.m.remote: providers have many models"),
        ('source = "https://h"\nremote = { token_env = "hf_hush" }', "models.m.remote.token_env: the name"),
        ('source = "https://h"\nremote = { token = "hush" }', "models.m.remote.token: no setting token"),
        ('source = "https://h"\nrate_limit = { requests_per_minute = 0 }', "requests_per_minute = '0'"),
    ],
)
def test_a_wrong_remote_model_is_refused_without_its_secret(
    tmp_path: Path, entry: str, complaint: str
) -> None:
    """Key and what is allowed, never what may be a token."""
    text = "\n".join(problems(tmp_path, f"{REMOTE}{entry}\n"))

    assert complaint in text
    assert "hf_hush" not in text
    assert "hush@" not in text


def test_local_models_have_no_remote_settings(tmp_path: Path) -> None:
    """Limits that would have no effect are told."""
    (line,) = problems(tmp_path, MODEL + "rate_limit = { requests_per_minute = 1 }\n")

    assert line == 'FILE: models.minilm.rate_limit: of models with engine = "remote" only'


@pytest.mark.parametrize("field", ["token_env", "token_file"])
@pytest.mark.parametrize(
    ("source", "is_fine"),
    [
        ("https://host/v1", True),
        ("http://localhost:8000/v1", True),
        ("http://127.0.0.1/v1", True),
        ("http://127.9.9.9/v1", True),
        ("http://[::1]:80/v1", True),
        ("provider:together", True),
        ("http://host/v1", False),
        ("HTTP://host/v1", False),
        ("http://10.0.0.1/v1", False),
        ("http://0.0.0.0/v1", False),
        ("http://localhost.example/v1", False),
        ("http://127.0.0.1.example/v1", False),
        ("http://[2001:db8::1]/v1", False),
    ],
)
def test_a_token_is_not_sent_in_plain_text(source: str, is_fine: bool, field: str) -> None:
    """Over http a remote model has no token, unless its server is on this machine."""
    remote = {"model": "m", field: "TOKEN"}
    models = {"m": {"task": "embed", "engine": "remote", "source": source, "remote": remote}}

    def load() -> object:
        return load_settings(arguments={"models": json.dumps(models)}, environ={})

    if is_fine:
        assert load()
        return
    with pytest.raises(ConfigError, match=r"models\.m\.remote: a token is not sent over http"):
        load()
    del remote[field]
    assert load()
