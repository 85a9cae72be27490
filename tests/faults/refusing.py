"""A server that refuses for a while, in the ways that Redis has."""

import contextlib
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import redis

from penstock_workers.command.local_redis import free_port, wait_until_ready
from tests.deployment import Server, server_command
from tests.eventually import eventually

ADMIN = "admin"
Refusal = Callable[["RefusingServer"], None]


class RefusingServer(Server):
    """A Valkey whose default user can be refused; `admin` never is.

    Attributes:
        admin: that user's connection.
    """

    admin: redis.Redis

    def __init__(self) -> None:
        super().__init__(free_port())

    @contextmanager
    def running_in(self, folder: Path) -> Iterator["RefusingServer"]:
        """Run it while the block runs; it cannot save, since a folder is where its file would be."""
        command = [*server_command(port=self.port), "--enable-debug-command", "yes"]
        command += ["--dir", str(folder), "--dbfilename", "taken", "--busy-reply-threshold", "50"]
        command += ["--user", ADMIN, "on", "nopass", "~*", "&*", "+@all"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            wait_until_ready(self.broker_url, within_s=30)
            (folder / "taken" / "by").mkdir(parents=True)
            with redis.Redis(port=self.port, username=ADMIN, password="any") as self.admin:
                yield self
        finally:
            process.kill()
            process.wait()

    def set(self, name: str, value: object) -> None:
        """Change its configuration."""
        self.admin.config_set(name, str(value))

    def kill_connections(self) -> None:
        """Close all connections but the administrator's own."""
        for kind in ("pubsub", "normal"):
            self.admin.client_kill_filter(_type=kind, skipme=True)

    def n_refused(self) -> int:
        """Count the refusals since `CONFIG RESETSTAT`; those for being too many come before a command."""
        stats: Any = self.admin.info("errorstats")
        refused = sum(entry["count"] for name, entry in stats.items() if name != "errorstat_NOSCRIPT")
        rejected: Any = self.admin.info("stats")
        commands: Any = self.admin.info("commandstats")  # a replica is left after its greeting
        greeted = commands.get("cmdstat_hello", {"calls": 0})["calls"]
        return int(refused) + int(rejected["rejected_connections"]) + int(greeted)

    @contextmanager
    def refusing(self, kind: str, *, is_cut: bool = False) -> Iterator[None]:
        """Refuse while the block runs; cut connections, if asked for, so that each has to begin anew."""
        self.admin.config_resetstat()
        with REFUSALS[kind](self):
            if is_cut and kind != "BUSY":
                self.kill_connections()
            yield


@contextmanager
def _setting(server: RefusingServer, name: str, value: object, after: object) -> Iterator[None]:
    server.set(name, value)
    try:
        yield
    finally:
        server.set(name, after)


@contextmanager
def _user(server: RefusingServer, *rules: str) -> Iterator[None]:
    server.admin.execute_command("ACL", "SETUSER", "default", *rules)
    server.kill_connections()
    try:
        yield
    finally:
        server.admin.execute_command("ACL", "SETUSER", "default", "nopass", "~*", "&*", "+@all")


@contextmanager
def _replica(server: RefusingServer) -> Iterator[None]:
    server.admin.replicaof("127.0.0.1", 1)
    try:
        yield
    finally:
        server.admin.replicaof("NO", "ONE")


@contextmanager
def _cut_off_replica(server: RefusingServer) -> Iterator[None]:
    with _setting(server, "replica-serve-stale-data", "no", "yes"), _replica(server):
        yield


@contextmanager
def _cannot_save(server: RefusingServer) -> Iterator[None]:
    server.admin.set("changed", 1)
    with _setting(server, "save", "3600 1", ""):
        server.admin.bgsave()
        eventually(lambda: server.admin.info("persistence")["rdb_last_bgsave_status"] == "err", 30)
        yield


@contextmanager
def _long_script(server: RefusingServer) -> Iterator[None]:
    def run() -> None:
        with (
            redis.Redis(port=server.port, username=ADMIN, password="any") as other,
            contextlib.suppress(redis.RedisError),
        ):
            other.eval("while true do end", 0)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    time.sleep(0.2)
    try:
        yield
    finally:
        server.admin.script_kill()
        thread.join()


@contextmanager
def _full_of_clients(server: RefusingServer) -> Iterator[None]:
    with _setting(server, "maxclients", 1, 10000):
        server.kill_connections()
        yield


REFUSALS: dict[str, Callable[[RefusingServer], contextlib.AbstractContextManager[None]]] = {
    "READONLY": _replica,
    "MASTERDOWN": _cut_off_replica,
    "NOREPLICAS": lambda server: _setting(server, "min-replicas-to-write", 1, 0),
    "OOM": lambda server: _setting(server, "maxmemory", 1 << 20, 0),
    "MISCONF": _cannot_save,
    "BUSY": _long_script,
    "NOAUTH": lambda server: _user(server, "resetpass", ">another"),
    "NOPERM": lambda server: _user(server, "-@all"),
    "NOPERM of keys": lambda server: _user(server, "resetkeys"),
    "NOPERM of channels": lambda server: _user(server, "resetchannels"),
    "max number of clients": _full_of_clients,
}
