import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

import penstock
import penstock_workers
from penstock.errors import ConfigError
from penstock_workers import configuration
from penstock_workers.configuration import (
    effective_values,
    flatten,
    load_settings,
    sample_environment,
    variable_name,
)
from penstock_workers.settings import Settings
from tests.configured import MODEL, load, problems, values

CONFIGS = Path(__file__).parents[2] / "configs"


# Precedence


def test_later_sources_win_and_are_named(tmp_path: Path) -> None:
    """An argument wins over a variable, that over the file, that over the default; each is told."""
    toml = "[worker]\njobs_in_flight = 2\nstall_s = 3.0\ndrain_s = 4.0\n"

    loaded = load(
        tmp_path,
        toml,
        arguments={"worker.jobs_in_flight": "20"},
        WORKER__JOBS_IN_FLIGHT="200",
        WORKER__STALL_S="300",
    )

    found = values(loaded)
    assert found["worker.jobs_in_flight"] == (20, "argument")
    assert found["worker.stall_s"] == (300.0, "PENSTOCK_WORKER__STALL_S")
    assert found["worker.drain_s"] == (4.0, str(tmp_path / "penstock.toml"))
    assert found["worker.log_level"] == ("info", "default")


def test_nothing_given_is_all_defaults() -> None:
    """The defaults suit a laptop and need no file."""
    loaded = load_settings(environ={})

    assert loaded.settings == Settings()
    assert loaded.origins == {}
    assert {origin for _, origin in values(loaded).values()} == {"default"}


def test_variable_names_the_file(tmp_path: Path) -> None:
    """`PENSTOCK_CONFIG` names the file where no argument does."""
    first, second = tmp_path / "first.toml", tmp_path / "second.toml"
    first.write_text("[flower]\nport = 1\n")
    second.write_text("[flower]\nport = 2\n")
    environ = {"PENSTOCK_CONFIG": str(first)}

    assert load_settings(environ=environ).settings.flower.port == 1
    assert load_settings(second, environ=environ).settings.flower.port == 2
    assert load_settings(environ={"PENSTOCK_CONFIG": ""}).settings.flower.port == 5555


def test_a_variable_changes_one_value_of_a_table(tmp_path: Path) -> None:
    """What the file says of the same model, and of others, stays."""
    toml = MODEL + '[models.chat]\ntask = "generate"\nsource = "c"\ngeneration = { top_k = 5, seed = 1 }\n'

    loaded = load(tmp_path, toml, MODELS__CHAT__GENERATION__TOP_K="7", MODELS__MINILM__MAX_TEXTS="9")

    chat, minilm = loaded.settings.models["chat"], loaded.settings.models["minilm"]
    assert (chat.source, chat.generation.top_k, chat.generation.seed) == ("c", 7, 1)
    assert (minilm.source, minilm.max_texts) == ("a/b", 9)


def test_environment_of_others_is_ignored() -> None:
    """Only our own prefix is read."""
    loaded = load_settings(environ={"FLOWER_PORT": "1", "REDIS": "x", "PATH": "/bin", "PENSTOCK": "x"})

    assert loaded.settings == Settings()


# Variables


def test_every_section_is_reached_by_variables(tmp_path: Path) -> None:
    """Pools, models and their options are set by nested variables, converted to their types."""
    loaded = load(
        tmp_path,
        REDIS__BROKER_URL="rediss://r:6380/2",
        POOLS__CPU__PROCESSES="0",
        POOLS__GPU__DEVICE="cuda",
        MODELS__CHAT__TASK="generate",
        MODELS__CHAT__SOURCE="c",
        MODELS__CHAT__POOLS='["gpu", "cpu"]',
        MODELS__CHAT__DEADLINE_S="1.5",
        MODELS__CHAT__TRUST_REMOTE_CODE="true",
        MODELS__CHAT__GENERATION__TEMPERATURE="0.25",
        MODELS__CHAT__GENERATION__MAX_NEW_TOKENS="64",
        MODELS__CHAT__GENERATION__STOP='["END", "STOP"]',
        WORKER__HEARTBEAT_FILE="/run/ready",
    ).settings

    chat = loaded.models["chat"]
    assert loaded.redis.broker_url == "rediss://r:6380/2"
    assert (loaded.pools.cpu.processes, loaded.pools.gpu.device) == (0, "cuda")
    assert (chat.pools, chat.deadline_s, chat.trust_remote_code) == (("gpu", "cpu"), 1.5, True)
    assert (chat.generation.temperature, chat.generation.max_new_tokens) == (0.25, 64)
    assert chat.generation.stop == ("END", "STOP")
    assert loaded.worker.heartbeat_file == Path("/run/ready")


def test_empty_variable_is_no_value(tmp_path: Path) -> None:
    """Compose files pass unset variables on as empty ones."""
    loaded = load(tmp_path, "[flower]\nport = 7\n", FLOWER__PORT="", REDIS__PASSWORD="")

    assert loaded.settings.flower.port == 7
    assert loaded.settings.redis.password is None


@pytest.mark.parametrize(
    ("variable", "told"),
    [
        ("REDIS__BROKER_ULR", "no setting BROKER_ULR; is BROKER_URL meant?"),
        ("POOL__CPU__PROCESSES", "no setting POOL; is POOLS meant?"),
        ("POOLS__GPUS__PROCESSES", "no setting GPUS; is GPU meant?"),
        ("MODELS__CHAT__SORCE", "no setting SORCE; is SOURCE meant?"),
        ("MODELS__CHAT__GENERATION__TEMPERATUR", "no setting TEMPERATUR; is TEMPERATURE meant?"),
        ("NONSENSE", "no setting NONSENSE; known: REDIS, POOLS, MODELS, TENANTS, WORKER, FLOWER"),
        ("FLOWER__XYZ", "no setting XYZ; known: ADDRESS, PORT"),
    ],
)
def test_misspelled_variable_stops_the_start(tmp_path: Path, variable: str, told: str) -> None:
    """A variable that means nothing is an error, with the one that may be meant."""
    toml = '[models.chat]\ntask = "generate"\nsource = "c"\n'

    assert problems(tmp_path, toml, **{variable: "1"}) == [f"PENSTOCK_{variable}: {told}"]


@pytest.mark.parametrize(
    ("toml", "told"),
    [
        ('[models.minilm]\nsorce = "a"\n', "models.minilm.sorce: no setting sorce; is source meant?"),
        ('[models.m]\nSource = "a"\n', "models.m.Source: no setting Source; is source meant?"),
        ("[model.minilm]\n", "model: no setting model; is models meant?"),
        ("[pools.gpus]\n", "pools.gpus: no setting gpus; is gpu meant?"),
        ("[tenants.a]\nshares = 1\n", "tenants.a.shares: no setting shares; is share meant?"),
        ("[models.m.cache]\nttl = 1\n", "models.m.cache.ttl: no setting ttl; is ttl_s meant?"),
        ("[flower]\nxyz = 1\n", "flower.xyz: no setting xyz; known: address, port"),
    ],
)
def test_a_misspelled_key_of_the_file_is_told_as_a_variable_is(tmp_path: Path, toml: str, told: str) -> None:
    """A table or a key that means nothing is an error, with the one that may be meant."""
    assert f"FILE: {told}" in problems(tmp_path, toml)


def test_a_section_that_may_be_missing_is_set_by_variables(tmp_path: Path) -> None:
    """One of its values, or the whole as JSON."""
    one = load(tmp_path, MODEL, MODELS__MINILM__CACHE__TTL_S="5").settings.models["minilm"].cache
    whole = load(tmp_path, MODEL, MODELS__MINILM__CACHE='{"ttl_s": 5}').settings.models["minilm"].cache

    assert one is not None
    assert (one.ttl_s, whole) == (5, one)


def test_variable_name_is_what_is_read(tmp_path: Path) -> None:
    """The name that is shown for a key sets that key."""
    assert variable_name("pools.cpu.threads") == "PENSTOCK_POOLS__CPU__THREADS"
    name = variable_name("models.minilm.source").removeprefix("PENSTOCK_")

    assert load(tmp_path, MODEL, **{name: "x"}).settings.models["minilm"].source == "x"


# What is wrong


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    """One start tells every bad entry: where it stands, key, value, what is allowed."""
    toml = (
        '[pools.cpu]\nprocesses = -1\nthreads = 0\n[redis]\nbroker_url = "http://r"\ncolour = 1\n'
        '[models.chat]\ntask = "sing"\nsource = "c"\ngeneration = { temperature = 3, top_p = 0 }\n'
    )

    told = problems(tmp_path, toml, WORKER__STALL_S="0", FLOWER__PRT="1")

    assert sorted(told) == [
        "FILE: models.chat.generation.temperature = '3': Input should be less than or equal to 2",
        "FILE: models.chat.generation.top_p = '0': Input should be greater than 0",
        "FILE: models.chat.task = 'sing': Input should be 'embed', 'generate' or 'rerank'",
        "FILE: pools.cpu.processes = '-1': auto, or a number from 0 to 256",
        "FILE: pools.cpu.threads = '0': auto, or a number from 1 to 256",
        "FILE: redis.broker_url = 'http://r': a URL like redis://HOST:6379/0 or rediss://HOST:6379/0",
        "FILE: redis.colour: no setting colour; known: broker_url, results_url, password, password_file, "
        "result_ttl_s",
        "PENSTOCK_FLOWER__PRT: no setting PRT; is PORT meant?",
        "PENSTOCK_WORKER__STALL_S: worker.stall_s = '0': Input should be greater than 0",
    ]


def test_bad_argument_is_told_as_one() -> None:
    """A value from the command line is told from one of the file."""
    with pytest.raises(ConfigError) as caught:
        load_settings(arguments={"flower.port": "70000"}, environ={})

    assert caught.value.problems == (
        "argument: flower.port = '70000': Input should be less than or equal to 65535",
    )


@pytest.mark.parametrize("toml", ["[redis\n", "a = \n", "[redis]\n[redis]\n", "a = 1\na = 2\n"])
def test_broken_toml_is_told_with_its_line(tmp_path: Path, toml: str) -> None:
    """A file that is no TOML stops the start with one line."""
    (line,) = problems(tmp_path, toml)

    assert line.startswith("FILE: ")
    assert "line" in line


def test_a_file_from_windows_is_read(tmp_path: Path) -> None:
    """Editors there begin UTF-8 with a mark, and end lines with two characters."""
    config = tmp_path / "penstock.toml"
    config.write_bytes(b"\xef\xbb\xbf" + MODEL.replace("\n", "\r\n").encode())

    assert load_settings(config, environ={}).settings.models["minilm"].source == "a/b"


def test_other_encodings_are_told(tmp_path: Path) -> None:
    """TOML is UTF-8."""
    config = tmp_path / "penstock.toml"
    config.write_bytes('[flower]\naddress = "ü"'.encode("latin-1"))

    with pytest.raises(ConfigError, match=r"penstock\.toml: .*can't decode"):
        load_settings(config, environ={})


def test_missing_file_is_told(tmp_path: Path) -> None:
    """A file that was asked for must be there."""
    missing = tmp_path / "missing.toml"

    for given in ({"config": missing, "environ": {}}, {"environ": {"PENSTOCK_CONFIG": str(missing)}}):
        with pytest.raises(ConfigError, match=r"missing\.toml: .*No such file"):
            load_settings(**given)


def test_each_bad_item_is_told_once(tmp_path: Path) -> None:
    """A list with a bad item is not also too short."""
    (line,) = problems(tmp_path, '[models.m]\ntask = "embed"\nsource = "s"\npools = ["tpu"]\n')

    assert line == "FILE: models.m.pools.0 = 'tpu': Input should be 'gpu' or 'cpu'"


@pytest.mark.parametrize(
    ("variable", "text", "told"),
    [
        (
            "MODELS__MINILM__POOLS",
            "gpu,cpu",
            "models.minilm.pools = 'gpu,cpu': Input should be a valid tuple",
        ),
        (
            "MODELS__MINILM__POOLS",
            '["gpu"',
            "models.minilm.pools = '[\"gpu\"': Input should be a valid tuple",
        ),
        ("MODELS__MINILM", "x", "models.minilm = 'x': Input should be a valid dictionary"),
        ("MODELS", "[]", "models: Input should be a valid dictionary"),
    ],
)
def test_variable_that_is_no_json_is_told(tmp_path: Path, variable: str, text: str, told: str) -> None:
    """Lists and tables are JSON; anything else is one line with the variable, from wherever it came."""
    key = variable.lower().replace("__", ".")
    toml = MODEL if key.endswith("pools") else ""

    (line,) = problems(tmp_path, toml, **{variable: text})
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, toml, arguments={key: text})

    assert line.startswith(f"PENSTOCK_{variable}: {told}")
    assert caught.value.problems[0].startswith(f"argument: {told}")


@pytest.mark.parametrize("text", ["x", '{"broker_url": "redis://r"}', "null"])
def test_section_is_no_variable(tmp_path: Path, text: str) -> None:
    """Sections are set value by value, and the complaint names the values."""
    line, *_ = problems(tmp_path, REDIS=text)

    assert line.startswith("PENSTOCK_REDIS: a section; set one of BROKER_URL, RESULTS_URL, ")


def test_arguments_of_a_section_and_below_it_are_told() -> None:
    """Two arguments that exclude each other are an error."""
    with pytest.raises(ConfigError, match="a section; set one of BROKER_URL"):
        load_settings(arguments={"redis": "1", "redis.broker_url": "redis://r"}, environ={})


# Secrets


@pytest.mark.parametrize(("name", "told"), [("missing", "No such file"), ("", "Is a directory")])
def test_password_file_that_cannot_be_read_is_told(tmp_path: Path, name: str, told: str) -> None:
    """The start fails, not the first connection."""
    path = tmp_path / name

    (line,) = problems(tmp_path, REDIS__PASSWORD_FILE=str(path), FLOWER__PORT="0")

    assert line.startswith("PENSTOCK_REDIS__PASSWORD_FILE: redis.password_file: ")
    assert told in line


def test_passwords_are_not_shown(tmp_path: Path) -> None:
    """Neither the effective values nor the settings' own text hold a secret."""
    toml = '[redis]\nresults_url = "redis://me:hush2@r/1"\n'

    loaded = load(tmp_path, toml, REDIS__PASSWORD="hush1")

    assert "hush" not in str(effective_values(loaded))
    assert "hush1" not in repr(loaded.settings)
    assert values(loaded)["redis.results_url"][0] == "redis://me:***@r/1"
    assert values(loaded)["redis.password"] == ("**********", "PENSTOCK_REDIS__PASSWORD")


@pytest.mark.parametrize(
    "toml",
    [
        '[redis]\nbroker_url = "http://me:hush@r/0"\n',
        '[redis]\nbroker_url = "redis://:hush@"\n',
        '[redis]\npassword = ["hush"]\n',
        '[redis]\npassword = { value = "hush" }\n',
        '[redis]\npasswrd = "hush"\n',
        '[redis]\nbroker_url = "redis//:hush@r/0"\n',
        '[redis]\nbroker_url = "redis://:hush@[::1/0"\n',
        '[redis]\nbroker_url = "redis://:hush@r:99999/0"\n',
        'redis = "hush"\n',
        'redis = "redis://:hush@r"\n',
        'redis_password = "hush"\n',
    ],
)
def test_passwords_are_not_in_errors(tmp_path: Path, toml: str) -> None:
    """A configuration that is refused may be logged, wherever in it a password stands."""
    (line,) = problems(tmp_path, toml)

    assert "redis" in line
    assert "hush" not in line


def test_misspelled_passwords_are_not_in_errors(tmp_path: Path) -> None:
    """A variable or an argument is quoted no more than the file."""
    lines = problems(tmp_path, REDIS__PASSWRD="hush", PASSWORD="hush")
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, arguments={"redis.passwrd": "hush", "redis": "hush"})

    assert len(lines) == 2
    assert "is PASSWORD meant?" in lines[1]
    assert "hush" not in "".join(lines) + str(caught.value)


# What ships


def test_sample_environment_is_the_defaults() -> None:
    """Each line of `.env.example`, uncommented, is a variable that exists, with its default."""
    assignments = [line[1:] for line in sample_environment().splitlines() if line.startswith("#PENSTOCK_")]
    environ = dict(assignment.split("=", 1) for assignment in assignments)

    loaded = load_settings(environ=environ)

    assert loaded.settings == Settings()
    keys = [key for key, _ in flatten(Settings().model_dump()) if key not in ("models", "tenants")]
    assert list(environ) == [variable_name(key) for key in keys]


def test_sample_environment_explains_each_variable() -> None:
    """The line above each variable says what it is."""
    lines = sample_environment().splitlines()

    for above, line in pairwise(lines):
        if line.startswith("#PENSTOCK_"):
            assert above.startswith("# ")
            assert above.endswith(".")


@pytest.mark.parametrize("level", [0, 2])
def test_sample_environment_without_docstrings(level: int) -> None:
    """`python -OO` drops the headings of sections; what each variable is stays."""
    code = "from penstock_workers.configuration import sample_environment as f; print(f(), end='')"
    environ = {**os.environ, "PYTHONOPTIMIZE": str(level)}

    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=60
    )

    assert done.stderr == ""
    sections = [type(value) for _, value in Settings() if value]
    headings = {f"# {(section.__doc__ or '').splitlines()[0]}" for section in sections}
    wanted = sample_environment().splitlines()
    assert done.stdout.splitlines() == [line for line in wanted if level < 2 or line not in headings]


@pytest.mark.skipif(not CONFIGS.is_dir(), reason="an installed wheel has no configs")
@pytest.mark.parametrize("name", ["demo.toml", "penstock.toml"])
def test_shipped_configurations_load(name: str) -> None:
    """What users start from is right, and serves an embedding and a chat model."""
    settings = load_settings(CONFIGS / name, environ={}).settings

    assert {model.task for model in settings.models.values()} == {"embed", "generate"}


@pytest.mark.skipif(not CONFIGS.is_dir(), reason="an installed wheel has no configs")
def test_demo_needs_no_model_hub_and_no_redis() -> None:
    """`make demo` runs on a machine that reaches nothing."""
    loaded = load_settings(CONFIGS / "demo.toml", environ={})

    assert all(model.source.startswith("bundled:") for model in loaded.settings.models.values())
    assert "redis.broker_url" not in loaded.origins


def test_no_other_module_reads_a_setting_from_the_environment() -> None:
    """The variables of others that are read elsewhere are named where the settings are read."""
    read = re.compile(r"""environ(?:\.get\(|\[)\s*["'](\w+)["'][\])](?!\s*=[^=])""")
    here = Path(configuration.__file__)
    found = {
        variable
        for package in (penstock, penstock_workers)
        for file in Path(str(package.__file__)).parent.rglob("*.py")
        if file != here
        for variable in read.findall(file.read_text())
    }

    assert {"XDG_CACHE_HOME", "NO_COLOR"} <= found
    assert [variable for variable in sorted(found) if f"`{variable}`" not in str(configuration.__doc__)] == []
