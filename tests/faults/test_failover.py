"""A failover behind one address: new connections reach the new primary, old ones a server that lives on."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis

from penstock import Client, JobCancelledError
from penstock.keys import WORKERS_KEY
from penstock_workers.command.local_redis import free_port
from tests.deployment import Server
from tests.eventually import eventually
from tests.faults.light import MODEL, LightWorker
from tests.faults.proxy import Proxy


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two servers, one behind the address that all use.

    Attributes:
        old: the first primary.
        new: its replica, which becomes the primary.
        link: the address.
    """

    old: redis.Redis
    new: redis.Redis
    link: Proxy

    def url(self, database: int) -> str:
        """Return the URL that all use."""
        return f"redis://127.0.0.1:{self.link.port}/{database}"

    def fail_over(self, *, follows: bool) -> None:
        """Make the other one the primary.

        Args:
            follows: the old one replicates the new one; else it is cut off.
        """
        eventually(lambda: self.new.info("replication")["master_link_status"] == "up", within_s=60)
        self.new.replicaof("NO", "ONE")
        port = self.new.connection_pool.connection_kwargs["port"] if follows else 1
        self.old.replicaof("127.0.0.1", port)
        self.link.lead_to(self.new.connection_pool.connection_kwargs["port"])

    def n_commands_of_others(self) -> int:
        """Count commands of connections to the old server that are not this test's or a replica's."""
        clients: Any = self.old.client_list()
        mine = self.old.client_id()
        others = [one for one in clients if int(one["id"]) != mine and not set("MS") & set(one["flags"])]
        return len([one for one in others if float(one["idle"]) < 3])


@pytest.fixture
def pair() -> Iterator[Pair]:
    """Two servers, and a network before them."""
    with ExitStack() as stack:
        old, new = (stack.enter_context(Server(free_port()).running()) for _ in range(2))
        admins = [stack.enter_context(redis.Redis(port=server.port)) for server in (old, new)]
        for admin in admins:  # no file in this folder, which the next server would read
            admin.config_set("repl-diskless-load", "swapdb")
        admins[1].replicaof("127.0.0.1", old.port)
        link = stack.enter_context(Proxy(old.port).running())
        yield Pair(old=admins[0], new=admins[1], link=link)


@contextmanager
def light_worker(pair: Pair, server: Server, folder: Path) -> Iterator[LightWorker]:
    """A worker at that address; its book lies elsewhere."""
    worker = LightWorker(folder, server, broker_url=pair.url(0), results_url=pair.url(1))
    with worker.starting():
        eventually(lambda: worker.process.is_ready, within_s=60)
        eventually(lambda: pair.old.hexists("penstock:models", MODEL), within_s=60)
        yield worker


@pytest.mark.parametrize("follows", [True, False], ids=["the old one follows", "the old one is cut off"])
def test_all_find_the_new_primary(pair: Pair, own: Server, tmp_path: Path, follows: bool) -> None:
    """What runs, what is awaited, idle clients, cancelling, heartbeat, leases: all go on there."""
    with (
        light_worker(pair, own, tmp_path) as worker,
        Client(pair.url(0)) as idle,
        Client(pair.url(0)) as client,
    ):
        idle.embed(["warm 0"], model=MODEL)
        running = client.submit_embed(["running inf"], model=MODEL)
        eventually(lambda: worker.runs()["running"], within_s=30)
        results: list[Any] = []
        waiting = threading.Thread(target=lambda: results.append(running.result(timeout_s=120)))
        waiting.start()
        pair.fail_over(follows=follows)

        after = idle.submit_embed(["idle 0"], model=MODEL)
        worker.book.set("running", 1)
        waiting.join(90)
        assert [result.shape for result in results] == [(1, 3)]
        assert after.result(timeout_s=60).shape == (1, 3)
        cancelled = client.submit_embed(["cancelled inf"], model=MODEL)
        eventually(lambda: worker.runs()["cancelled"], within_s=60)
        assert cancelled.cancel()
        worker.book.set("cancelled", 1)
        with pytest.raises(JobCancelledError):
            cancelled.result(timeout_s=30)
        assert idle.embed(["after 0"], model=MODEL, timeout_s=60).shape == (1, 3)
        eventually(lambda: not pair.new.hlen("unacked"), within_s=60)

        pair.new.delete(WORKERS_KEY)
        eventually(lambda: pair.new.hlen(WORKERS_KEY), within_s=60)
        eventually(lambda: not pair.n_commands_of_others(), within_s=60)
        assert worker.process.process.poll() is None
        assert worker.runs()["running"] == 1
