import inspect
from collections.abc import Iterator

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
