"""What the fault tests ask for by name."""

from collections.abc import Iterator
from pathlib import Path

import kombu.transport
import pytest
from celery import Celery

from penstock_workers.command.local_redis import free_port
from penstock_workers.delivery.transport import install
from tests.faults.fleet import Broker, Fleet
from tests.integration.noop_app import build_noop_app


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    """A broker of its own, and no worker yet."""
    broker = Broker(tmp_path / "broker", free_port())
    broker.start()
    running = Fleet(tmp_path, broker)
    try:
        yield running
    finally:
        running.stop()
        broker.kill()


@pytest.fixture
def sender(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> Iterator[Celery]:
    """A Celery producer with our transport."""
    monkeypatch.setattr(kombu.transport, "TRANSPORT_ALIASES", dict(kombu.transport.TRANSPORT_ALIASES))
    monkeypatch.setattr(kombu.transport, "_transport_cache", {})
    install()
    with build_noop_app(**fleet.settings) as app:
        yield app
