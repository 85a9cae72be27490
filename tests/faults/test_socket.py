"""Client, worker and results over a socket in the file system."""

import subprocess
from pathlib import Path

from penstock import Client
from penstock.connections import connect_sync, get_large
from penstock_workers.command.local_redis import free_port, wait_until_ready
from tests.deployment import Server, server_command
from tests.faults.light import MODEL, LightWorker


class SocketServer(Server):
    """A Valkey that clients and workers reach by its socket, with a password that wants quoting."""

    def __init__(self, folder: Path) -> None:
        super().__init__(free_port(), "p@s/s")
        self.path = folder / "a b.sock"

    def url(self, database: int) -> str:
        """Return the URL of a database behind the socket."""
        return f"unix://:p%40s%2Fs@{str(self.path).replace(' ', '%20')}?db={database}"


def test_a_job_goes_through_a_socket(tmp_path: Path) -> None:
    """`unix://` is all that client and worker need; results come the same way."""
    server = SocketServer(tmp_path)
    command = [*server_command(port=server.port, password=server.password), "--unixsocket", str(server.path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until_ready(server.broker_url, within_s=10)
        worker = LightWorker(tmp_path, server, broker_url=server.url(0), results_url=server.url(1))
        with worker.running() as light, Client(server.url(0)) as client:
            assert client.embed(["a 0", "b 0"], model=MODEL, timeout_s=60).shape == (2, 3)
            with connect_sync(server.url(1)) as results:
                results.set("large", b"x" * (1 << 20))
                assert get_large(results, "large") == b"x" * (1 << 20)
            assert "p@s/s" not in light.log
            assert "p%40s" not in light.log
    finally:
        process.kill()
        process.wait()
