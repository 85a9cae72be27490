"""The deployment's settings win over what a process finds around it, or the start is refused by name."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from penstock import Client
from penstock_workers.command.local_redis import free_port
from tests.deployment import Server
from tests.eventually import eventually

BIN = Path(sys.executable).parent
MINILM = '[models.minilm]\ntask = "embed"\nsource = "bundled:minilm"\nengine = "torch"\n'
# Modules of what workers import, ours, and Python's own.
NAMES = (
    *("vine", "kombu", "billiard", "redis", "click", "tornado", "flower", "celery", "pydantic", "tenacity"),
    *("numpy", "torch", "transformers", "sentence_transformers", "huggingface_hub", "safetensors"),
    *(
        "json",
        "random",
        "secrets",
        "typing",
        "multiprocessing",
        "sitecustomize",
        "celeryconfig",
        "flowerconfig",
    ),
    *("penstock", "site_settings"),
)


def deployment(folder: Path, server: Server) -> Path:
    """Write the configuration."""
    config = folder / "deployment.toml"
    config.write_text(
        f'[redis]\nbroker_url = "{server.broker_url}"\nresults_url = "{server.results_url}"\n{MINILM}'
    )
    return config


def commands(config: Path) -> dict[str, list[str]]:
    """Return each way to start something that runs Celery."""
    options = ["--config", str(config)]
    celery = [str(BIN / "celery"), "-A", "penstock_workers"]
    return {
        "worker": [str(BIN / "penstock"), "worker", "--pool", "cpu", *options],
        "up": [str(BIN / "penstock"), "up", *options],
        "celery worker": [*celery, "worker", "-Q", "cpu.minilm", "-l", "info"],
        "celery flower": [*celery, "flower"],
    }


@pytest.mark.parametrize(
    ("command", "variable"),
    [
        ("worker", "CELERY_BROKER_URL"),
        ("up", "CELERY_RESULT_BACKEND"),
        ("celery worker", "CELERY_BROKER"),
        ("celery worker", "CELERY_WORKER_CONCURRENCY"),
        ("celery flower", "BROKER_URL"),
    ],
)
def test_a_variable_of_celerys_is_refused_by_name(
    server: Server, tmp_path: Path, command: str, variable: str
) -> None:
    """What would win over the settings ends the start with 78 and a line that names it, without its value."""
    config = deployment(tmp_path, server)
    value = "redis://:hush@127.0.0.1:1/0" if "CONCURRENCY" not in variable else "3"

    done = subprocess.run(
        commands(config)[command],
        cwd=tmp_path,
        env={**os.environ, "PENSTOCK_CONFIG": str(config), variable: value},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )

    refusals = [line for line in done.stderr.splitlines() if variable in line]
    assert done.returncode == os.EX_CONFIG, done.stderr
    assert len(refusals) == 1
    assert "hush" not in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "options",
    [
        ["-b", "redis://:hush@127.0.0.1:1/0", "worker"],
        ["--config", "celeryconfig", "worker"],
        ["worker", "broker.url=redis://:hush@127.0.0.1:1/0"],
    ],
    ids=lambda options: options[0] if options[0] != "worker" else options[-1].partition("=")[0],
)
def test_an_option_of_celerys_is_refused(server: Server, tmp_path: Path, options: list[str]) -> None:
    """Neither the broker, nor the results, nor any setting is changed on Celery's command line."""
    config = deployment(tmp_path, server)

    done = subprocess.run(
        [str(BIN / "celery"), "-A", "penstock_workers", *options, "-Q", "cpu.minilm"],
        cwd=tmp_path,
        env={**os.environ, "PENSTOCK_CONFIG": str(config)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )

    assert done.returncode == os.EX_CONFIG, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "hush" not in done.stderr + done.stdout


def test_an_empty_variable_is_none(own: Server, tmp_path: Path) -> None:
    """`CELERY_BROKER_URL=`, as Compose passes on what is not set, keeps nobody from starting."""
    config = deployment(tmp_path, own)
    environ = {**os.environ, "PENSTOCK_CONFIG": str(config), "CELERY_BROKER_URL": "", "BROKER_URL": ""}

    done = subprocess.run(
        [str(BIN / "celery"), "-A", "penstock_workers", "inspect", "conf", "--timeout", "0.1"],
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )

    assert done.returncode == os.EX_UNAVAILABLE  # there is no worker
    assert "No nodes replied" in done.stderr


@pytest.mark.parametrize(
    ("command", "wanted"),
    [("up", "Visit me at"), ("worker", "ready."), ("celery worker", "ready.")],
    ids=["up", "worker", "celery worker"],
)
def test_nothing_in_the_current_folder_is_run(
    server: Server, tmp_path: Path, command: str, wanted: str
) -> None:
    """Workers and Flower import what is installed, whatever lies where they are started, and work."""
    config, ran, port = deployment(tmp_path, server), tmp_path / "ran", free_port()
    # `celery -A` itself looks for the package that it is given in the current folder first.
    for name in (*NAMES, *([] if command == "celery worker" else ["penstock_workers"])):
        (tmp_path / f"{name}.py").write_text(f"open({str(ran)!r}, 'a').write({name + chr(10)!r})\n")
    (tmp_path / ".env").write_text(
        "PENSTOCK_MODELS__MINILM__SOURCE=nowhere\nCELERY_BROKER_URL=redis://nowhere\n"
    )
    environ = {
        **os.environ,
        "PENSTOCK_CONFIG": str(config),
        "PENSTOCK_FLOWER__PORT": str(port),
        "PENSTOCK_POOLS__CPU__PROCESSES": "2",  # forked; `penstock worker` is the other way to start
        "DJANGO_SETTINGS_MODULE": "site_settings",
        "FLOWER_PORT": "tcp://10.0.0.1:5555",  # what Kubernetes sets beside a service of that name
    }
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            commands(config)[command], cwd=tmp_path, env=environ, stdout=output, stderr=subprocess.STDOUT
        )

    try:
        eventually(lambda: process.poll() is not None or wanted in log.read_text(), within_s=100)
        assert process.poll() is None, log.read_text()
        with Client(server.broker_url) as client:
            eventually(client.models, within_s=60)
            assert client.embed(["a text"], model="minilm", timeout_s=60).shape == (1, 384)
    finally:
        process.terminate()
        process.wait(60)

    assert not ran.exists(), ran.read_text()
