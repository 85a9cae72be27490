"""A service, and a machine that looks at queues, with what `pip install penstock` brings: no Celery."""

import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator

import pytest
import redis

from penstock.keys import MODELS_KEY, RESULTS_KEY
from penstock_workers.command.local_redis import free_port
from tests import announced
from tests.deployment import ROOT, Server

ABSENT = ("amqp", "billiard", "celery", "kombu", "packaging", "vine")
PROLOGUE = f"import sys; sys.modules.update(dict.fromkeys({ABSENT!r})); "
MODEL = announced.model()
SEND = """
import os
from penstock import Client
with Client(os.environ["PENSTOCK_REDIS__BROKER_URL"]) as client:
    print(*client.models())
    job = client.submit_embed(["a", "b"], model="minilm")
    print(job.state())
    job.cancel()
    print(job.state())
"""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A Redis in which a model is announced."""
    with Server(free_port()).running() as running:
        with redis.Redis.from_url(running.broker_url) as client:
            client.hset(MODELS_KEY, MODEL.name, MODEL.to_json())
            client.set(RESULTS_KEY, "/1")
        yield running


def run(
    server: Server, code: str, *arguments: str, prologue: str = PROLOGUE
) -> subprocess.CompletedProcess[str]:
    """Run code in an interpreter that has no Celery."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PENSTOCK_")}
    return subprocess.run(
        [sys.executable, "-c", prologue + code, *arguments],
        env=environ
        | {
            "PENSTOCK_REDIS__BROKER_URL": server.broker_url,
            "PENSTOCK_REDIS__RESULTS_URL": server.results_url,
        },
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_client_needs_no_celery(server: Server) -> None:
    """It finds models, sends, asks and cancels."""
    done = run(server, f"exec({SEND!r})")

    assert done.stdout.split() == ["minilm", "waiting", "cancelled"], done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (("status",), 1, "minilm"),
        (("queues",), 0, "cpu.minilm"),
        (("dead", "list"), 0, "no dead letters"),
        (("dead", "requeue", "--all"), 0, "0 put back"),
        (("purge", "--all"), 0, "dropped"),
        (("config", "show"), 0, "redis.broker_url"),
        (("config", "env"), 0, "PENSTOCK_REDIS__BROKER_URL"),
        (("--version",), 0, "version"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_the_commands_that_look_need_no_celery(
    server: Server, arguments: tuple[str, ...], code: int, told: str
) -> None:
    """Whoever may look at queues need not be able to run a worker."""
    done = run(server, "from penstock_workers.cli import main; main()", *arguments)

    assert (done.returncode, told in done.stdout) == (code, True), done.stdout + done.stderr


@pytest.mark.parametrize(
    ("module", "arguments"),
    [("penstock_workers", ("worker",)), ("celery", ("-A", "penstock_workers", "worker"))],
    ids=["own command", "celery -A"],
)
def test_whoever_starts_a_worker_is_told_the_extra(
    server: Server, module: str, arguments: tuple[str, ...]
) -> None:
    """One line says what to install, on Celery's own command line too."""
    absent = "('packaging',)" if module == "celery" else repr(ABSENT)
    code = f"import runpy, sys; sys.modules.update(dict.fromkeys({absent}))"
    code += f"; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"

    done = run(server, code, *arguments, prologue="")

    assert done.returncode == os.EX_CONFIG, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.endswith('pip install ".[celery]"\n')


def test_the_names_that_other_programs_import(server: Server) -> None:
    """The serializer needs no Celery; the transport says that it does, once it is used."""
    uses = "from penstock.codec import decode_meta, encode_meta; import penstock.transport; print('named'); "
    done = run(server, uses + "penstock.transport.Transport")

    assert (done.returncode, done.stdout) == (1, "named\n")
    assert done.stderr.splitlines()[-1].startswith("ModuleNotFoundError: No module named 'kombu")


def test_the_transports_module_may_be_looked_at(server: Server) -> None:
    """`unittest` asks each module that is loaded for a name of its own, in a program without Celery too."""
    uses = "import unittest, warnings; import penstock.transport\n"
    uses += "with unittest.TestCase().assertWarns(UserWarning): warnings.warn('looked')"
    done = run(server, f"exec({uses!r})")

    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="tests a wheel: no project")
def test_the_base_install_asks_for_none_of_it() -> None:
    """A service keeps the Celery that it has, whatever its version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]

    assert not [line for line in project["dependencies"] if line.startswith(ABSENT)]
    assert [line.startswith(("celery", "kombu")) for line in extras["celery"]].count(True) == 2
    assert all("penstock[celery]" in extras[name] for name in ("workers", "remote", "flower"))
