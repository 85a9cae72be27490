import json
import os
import socket
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from penstock_workers.cli import cli, main
from penstock_workers.command.deployment import Deployment
from penstock_workers.command.local_redis import free_port
from penstock_workers.command.up import own_command
from penstock_workers.configuration import load_settings, sample_environment, variable_name
from penstock_workers.embedding import c_library

CLOSED = "redis.broker_url=redis://:hush@127.0.0.1:{}/0"


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Take our variables away, and work in an empty folder."""
    for name in os.environ:
        if name.startswith("PENSTOCK_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PYTHONSAFEPATH", "")  # which `main` sets for all that this process starts
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONSAFEPATH", "1")  # `main` sets it; taken away again afterwards


def run(*arguments: str) -> Result:
    """Run the command line, which must succeed."""
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def shown(*options: str) -> dict[str, dict[str, object]]:
    """Return what `penstock config show` tells of each key."""
    rows: dict[str, dict[str, object]] = json.loads(run("config", "show", "--json", *options).output)
    return rows


def fail(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[object, list[str]]:
    """Run the command line as the shell does; return its exit code and what it wrote as an error."""
    monkeypatch.setattr("sys.argv", ["penstock", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    output = capsys.readouterr()
    assert output.out == ""
    return caught.value.code, output.err.splitlines()


def test_the_program_is_named_as_the_shell_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its name where its folder is on the PATH, else as it was typed."""
    typed = tmp_path / "bin/penstock"
    typed.parent.mkdir()
    typed.touch(mode=0o755)
    monkeypatch.setattr("sys.argv", ["bin/penstock", "up"])

    monkeypatch.setenv("PATH", str(tmp_path))
    assert own_command() == "bin/penstock"
    monkeypatch.setenv("PATH", str(typed.parent))
    assert own_command() == "penstock"


def test_config_show_tells_values_and_origins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever wonders where a value comes from can read it."""
    (tmp_path / "penstock.toml").write_text("[worker]\nstall_s = 7.5\n")
    monkeypatch.setenv("PENSTOCK_FLOWER__PORT", "0")

    result = run("config", "show", "--json", "--config", "penstock.toml", "--set", "pools.cpu.processes=4")

    rows = json.loads(result.output)
    assert rows["worker.stall_s"] == {"value": 7.5, "origin": "penstock.toml"}
    assert rows["flower.port"] == {"value": 0, "origin": "PENSTOCK_FLOWER__PORT"}
    assert rows["pools.cpu.processes"] == {"value": 4, "origin": "argument"}
    assert rows["worker.drain_s"] == {"value": 30.0, "origin": "default"}


def test_config_show_has_a_line_per_value() -> None:
    """The table for people has the same rows, and no secret."""
    lines = run("config", "show", "--set", "redis.broker_url=redis://me:hush@r:6379/0").stdout.splitlines()
    rows = json.loads(run("config", "show", "--json").output)

    assert [line.split(" ")[0] for line in lines] == list(rows)
    assert lines[0].split() == ["redis.broker_url", "=", "redis://me:***@r:6379/0", "(argument)"]


def test_config_show_tells_what_auto_means_here() -> None:
    """The numbers that `penstock up` would take stand beside `auto`, for pools that serve a model."""
    model = ("--set", "models.m.task=embed", "--set", "models.m.source=bundled:minilm")

    rows = shown(*model)
    lines = run("config", "show", *model).output

    assert rows["pools.cpu.threads"] == {"value": "auto", "origin": "default", "here": 1}
    assert rows["pools.cpu.processes"]["here"] >= 1  # type: ignore[operator]  # a number
    assert "here" not in rows["pools.gpu.processes"]
    assert "auto, here 1 " in lines


def test_config_show_tells_what_an_install_without_a_compiler_is_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever looks at a deployment finds out, where the CPU could do more; the table stays as it is."""
    with_it = run("config", "show").stdout
    monkeypatch.setattr(c_library, "cpu_flags", lambda: {"avx2", "fma"})
    monkeypatch.setattr(c_library, "compiled_path", lambda: tmp_path / "kernels-0.so")

    told, without = run("config", "show").stderr, run("config", "show").stdout
    as_json = run("config", "show", "--json").output
    monkeypatch.setattr(c_library, "cpu_flags", set)
    elsewhere = run("config", "show").stderr

    assert without == with_it
    assert len(told.splitlines()) == 1
    assert "1.4 times as long" in told
    assert "install its wheel" in told
    assert json.loads(as_json)
    assert elsewhere == ""


def test_config_env_is_the_sample_file() -> None:
    """`penstock config env > .env` is how one starts."""
    assert run("config", "env").output == sample_environment()


def test_config_env_is_accepted_as_it_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each printed line, uncommented, is read, as a variable and as an assignment, and changes nothing."""
    before = shown()
    lines = [line[1:] for line in run("config", "env").output.splitlines() if line.startswith("#PENSTOCK_")]
    pairs = [line.split("=", 1) for line in lines]
    keys = [name.removeprefix("PENSTOCK_").replace("__", ".").lower() for name, _ in pairs]
    given = {key for key, (_, text) in zip(keys, pairs, strict=True) if text}
    options = [
        part for key, (_, text) in zip(keys, pairs, strict=True) for part in ("--set", f"{key}={text}")
    ]

    as_arguments = shown(*options)
    for name, text in pairs:
        monkeypatch.setenv(name, text)
    as_variables = shown()

    assert set(keys) == set(before) - {"models", "tenants"}
    assert {key: row["value"] for key, row in as_arguments.items()} == {
        key: row["value"] for key, row in as_variables.items()
    }
    assert [row["value"] for row in as_variables.values()] == [row["value"] for row in before.values()]
    assert {key for key, row in as_arguments.items() if row["origin"] == "argument"} == given
    assert {key for key, row in as_variables.items() if row["origin"] == variable_name(key)} == given


@pytest.mark.parametrize(
    ("assignment", "key", "value"),
    [
        ("worker.jobs_in_flight=4", "worker.jobs_in_flight", 4),
        ("worker.stall_s=1.5", "worker.stall_s", 1.5),
        ("worker.log_level=debug", "worker.log_level", "debug"),
        ("redis.broker_url=redis://r/0?protocol=3", "redis.broker_url", "redis://r/0?protocol=3"),
        ("flower.address=0.0.0.0", "flower.address", "0.0.0.0"),
        ("worker.heartbeat_file=/run/ready", "worker.heartbeat_file", "/run/ready"),
        ("worker.heartbeat_file=2024", "worker.heartbeat_file", "2024"),
        ("Flower.Address=true", "flower.address", "true"),
    ],
)
def test_set_takes_what_a_variable_would_take(assignment: str, key: str, value: object) -> None:
    """Text is plain text, even where it looks like a number, and numbers are read where they are wanted."""
    rows = json.loads(run("config", "show", "--json", "--set", assignment).output)

    assert rows[key] == {"value": value, "origin": "argument"}


def test_set_can_describe_a_whole_model() -> None:
    """A deployment needs no file."""
    assignments = (
        "models.chat.task=generate",
        "models.chat.source=a/b",
        'models.chat.pools=["gpu", "cpu"]',
        "models.chat.generation.temperature=0.5",
    )
    options = [part for assignment in assignments for part in ("--set", assignment)]

    rows = json.loads(run("config", "show", "--json", *options).output)

    assert rows["models.chat.source"]["value"] == "a/b"
    assert rows["models.chat.pools"]["value"] == ["gpu", "cpu"]
    assert rows["models.chat.generation.temperature"]["value"] == 0.5


@pytest.mark.parametrize(
    "assignments",
    [
        ("redis.broker_url=redis://:hush@r:6379/0", "redis.password=123456"),
        ('models.m.pools=["gpu", "cpu"]', "models.m.revision=1234567"),
        ("models.m.generation.stop=END", "models.m.generation.temperature=0.5"),
        ('models={"n": {"task": "generate", "source": "s"}}', "pools.cpu.processes=3"),
        ("redis.password=", "worker.heartbeat_file="),
    ],
    ids=" ".join,
)
def test_children_read_what_set_says(assignments: tuple[str, ...]) -> None:
    """A child process that gets the assignments as variables has the same settings."""
    deployment = Deployment(None, ("models.m.task=embed", "models.m.source=s", *assignments))

    again = load_settings(environ=deployment.environment)

    assert again.settings == deployment.loaded.settings
    assert again.origins.keys() == deployment.loaded.origins.keys()


@pytest.mark.parametrize("assignment", ["worker", "=4", ""])
def test_set_without_key_or_value_is_told(
    assignment: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A slip of the fingers is one line, with how it should look."""
    code, lines = fail(monkeypatch, capsys, "config", "show", "--set", assignment)

    assert code == os.EX_CONFIG
    assert lines == [f"--set {assignment!r}: KEY=VALUE, like --set pools.cpu.processes=4"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["config", "show", "--config", "missing.toml"], "missing.toml: "),
        (["config", "show", "--set", "flower.port=x"], "argument: flower.port = 'x': "),
        (["config", "show", "--set", 'worker.log_level="info"'], "argument: worker.log_level = '\"info\"': "),
        (["worker", "--pool", "gpu"], "pool gpu serves no model"),
        (["worker", "--pool", "cpu", "--model", "x"], "pool cpu does not serve 'x'"),
        (["up", "--set", "redis.broker_url=redis://r/0"], "nothing to start"),
        (["status", "--set", "redis.colour=1"], "no setting COLOUR; known: BROKER_URL"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_configuration_exits_with_78_and_one_line(
    arguments: list[str], told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A service manager learns that starting it again changes nothing; nobody sees a traceback."""
    code, lines = fail(monkeypatch, capsys, *arguments)

    assert code == os.EX_CONFIG == 78
    assert len(lines) == 1
    assert told in lines[0]


def test_every_problem_has_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All that is wrong is told at once."""
    monkeypatch.setenv("PENSTOCK_FLOWER__PRT", "1")

    code, lines = fail(monkeypatch, capsys, "config", "show", "--set", "flower.port=-1")

    assert code == os.EX_CONFIG
    assert len(lines) == 2


def test_unreachable_redis_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`penstock status` says which Redis is out of reach, without its password."""
    code, lines = fail(monkeypatch, capsys, "status", "--set", CLOSED.format(free_port()))

    assert code == 1
    assert len(lines) == 1
    assert lines[0].startswith("Redis at redis://:***@127.0.0.1:")
    assert "is out of reach" in lines[0]


def test_who_has_started_nothing_is_told_what_to_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Without a stack, and with nothing where one would be, the second line says what to do."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", 6379)) == 0:
            pytest.skip("a Redis runs on this machine")

    for command in (["status"], ["queues"], ["dead", "list"]):
        code, lines = fail(monkeypatch, capsys, *command)

        assert code == 1
        assert lines[0].startswith("Redis at redis://127.0.0.1:6379/0 is out of reach: ")
        assert lines[1:] == [
            "no stack of this user runs: `penstock up` starts one; "
            "--set redis.broker_url=redis://HOST:PORT/0 names another Redis"
        ]


@pytest.mark.parametrize(
    "command", [[], ["up"], ["worker"], ["status"], ["config"], ["config", "show"], ["demo"]]
)
def test_every_command_explains_itself(command: list[str]) -> None:
    """`-h` works everywhere."""
    assert "Usage: " in run(*command, "-h").output
