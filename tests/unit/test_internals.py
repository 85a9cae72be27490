import inspect
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import kombu
import pytest

from penstock.errors import ConfigError
from penstock_workers.delivery import backend, consumer, internals, polling, pool, qos, transport
from penstock_workers.delivery.internals import DIGESTS, check_versions, digest

LIBRARIES = ("celery", "kombu")
NAME = "kombu.transport.redis:Channel._brpop_read"


@pytest.fixture
def newer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let both libraries be of versions that were never read."""
    monkeypatch.setattr(internals, "version", lambda library: f"5.7.9{len(library)}")


def replaced() -> Iterator[str]:
    """Name the functions of Celery and kombu that a class of ours overrides."""
    for module in (backend, consumer, polling, pool, qos, transport):
        for _, ours in inspect.getmembers(module, inspect.isclass):
            for name in vars(ours) if ours.__module__ == module.__name__ else ():
                yield from of_libraries(ours, name)


def of_libraries(ours: type, name: str) -> Iterator[str]:
    """Name what a method of ours overrides."""
    for base in ours.__mro__[1:]:
        if base.__module__.split(".")[0] in LIBRARIES and inspect.isfunction(vars(base).get(name)):
            yield f"{base.__module__}:{base.__qualname__}.{name}"
            return


def test_all_that_is_replaced_is_watched() -> None:
    """A method that overrides one of Celery's or kombu's counts on what it replaces."""
    assert set(replaced()) - DIGESTS.keys() == set()
    assert {name: digest(name) for name in DIGESTS} == DIGESTS


@pytest.mark.usefixtures("newer")
def test_a_release_that_changes_nothing_here_works_at_once() -> None:
    """A version number alone says nothing of what was replaced."""
    check_versions()


@pytest.mark.usefixtures("newer")
def test_a_release_that_changes_something_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody finds out from a lost message; whoever starts a worker is told what to install."""
    gone = "celery.worker.request:Request.no_more"
    monkeypatch.setattr(internals, "DIGESTS", DIGESTS | {NAME: "another", gone: "0"})

    with pytest.raises(ConfigError) as caught:
        check_versions()

    assert list(caught.value.problems) == [
        f"celery 5.7.96 changed {gone}; supported: 5.7.0, pip install celery==5.7.0",
        f"kombu 5.7.95 changed {NAME}; supported: 5.7.0, pip install kombu==5.7.0",
    ]


@pytest.mark.usefixtures("newer")
def test_a_worker_starts_with_what_is_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    """The transport asks before it takes kombu's place."""
    monkeypatch.setattr(internals, "DIGESTS", DIGESTS | {NAME: "another"})

    with pytest.raises(ConfigError, match=r"kombu 5.7.95 changed"):
        transport.install()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a checkout of kombu that is installed as editable: its version lies apart from its source."""
    shutil.copytree(Path(kombu.__file__).parent, tmp_path / "checkout/kombu")
    metadata = tmp_path / "site/kombu-5.7.9.dist-info/METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: kombu\nVersion: 5.7.9\n")
    return tmp_path / "checkout"


def run(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python where kombu is that checkout."""
    path = os.pathsep.join([str(checkout), str(checkout.parent / "site"), *filter(None, sys.path)])
    environ = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, *arguments], env=environ, capture_output=True, text=True, timeout=60
    )


def test_a_checkout_that_changes_nothing_here_works(checkout: Path) -> None:
    """The source is read where Python finds it, as for `pip install --editable`."""
    done = run(checkout, "-c", "from penstock_workers.delivery import transport; transport.install()")

    assert (done.returncode, done.stderr) == (0, "")


def test_a_checkout_that_decorates_something_is_refused(checkout: Path) -> None:
    """A method that becomes a property has the same lines, and is another."""
    redis = checkout / "kombu/transport/redis.py"
    redis.write_text(redis.read_text().replace("    def _brpop_read(", "    @property\n    def _brpop_read("))

    done = run(checkout, "-m", "penstock_workers", "report")

    assert (done.returncode, f"changed {NAME};" in done.stderr) == (os.EX_CONFIG, True), done.stderr


def test_a_version_without_a_name_that_is_imported_is_told_by_its_version(checkout: Path) -> None:
    """Where the import fails first, the line still says what changed, and what to install."""
    redis, connection = checkout / "kombu/transport/redis.py", checkout / "kombu/connection.py"
    redis.write_text(redis.read_text().replace("def _brpop_read(self", "def _brpop_read(self, more=None"))
    connection.write_text(connection.read_text().replace("failover_strategies", "strategies_of_failover"))

    done = run(checkout, "-m", "penstock_workers", "report")

    assert done.returncode == os.EX_CONFIG
    assert done.stderr == f"kombu 5.7.9 changed {NAME}; supported: 5.7.0, pip install kombu==5.7.0\n"
