import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from penstock.settings import sample_environment
from penstock_workers.cli import cli, main
from penstock_workers.local_redis import free_port

CLOSED = "redis.broker_url=redis://:hush@127.0.0.1:{}/0"


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Take our variables away, and work in an empty folder."""
    for name in os.environ:
        if name.startswith("PENSTOCK_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def run(*arguments: str) -> Result:
    """Run the command line, which must succeed."""
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


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
    lines = run("config", "show", "--set", "redis.broker_url=redis://me:hush@r:6379/0").output.splitlines()
    rows = json.loads(run("config", "show", "--json").output)

    assert [line.split(" ")[0] for line in lines] == list(rows)
    assert lines[0].split() == ["redis.broker_url", "=", "redis://me:***@r:6379/0", "(argument)"]


def test_config_env_is_the_sample_file() -> None:
    """`penstock config env > .env` is how one starts."""
    assert run("config", "env").output == sample_environment()


@pytest.mark.parametrize(
    ("assignment", "key", "value"),
    [
        ("worker.jobs_in_flight=4", "worker.jobs_in_flight", 4),
        ("worker.stall_s=1.5", "worker.stall_s", 1.5),
        ("worker.log_level=debug", "worker.log_level", "debug"),
        ('worker.log_level="debug"', "worker.log_level", "debug"),
        ("redis.broker_url=redis://r/0?a=b", "redis.broker_url", "redis://r/0?a=b"),
        ("flower.address=0.0.0.0", "flower.address", "0.0.0.0"),
        ("worker.heartbeat_file=/run/ready", "worker.heartbeat_file", "/run/ready"),
    ],
)
def test_set_takes_toml_values_and_plain_words(assignment: str, key: str, value: object) -> None:
    """Quotes are not needed where the shell would eat them."""
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
        (["worker", "--pool", "gpu"], "pool gpu serves no model"),
        (["worker", "--pool", "cpu", "--model", "x"], "pool cpu does not serve 'x'"),
        (["up", "--set", "redis.broker_url=redis://r/0"], "nothing to start"),
        (["status", "--set", "redis.colour=1"], "argument: redis.colour = '1': "),
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
    assert lines[0].startswith(told)


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


@pytest.mark.parametrize(
    "command", [[], ["up"], ["worker"], ["status"], ["config"], ["config", "show"], ["demo"]]
)
def test_every_command_explains_itself(command: list[str]) -> None:
    """`-h` works everywhere."""
    assert "Usage: " in run(*command, "-h").output
