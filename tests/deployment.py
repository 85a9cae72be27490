"""Real servers and real worker processes for the tests."""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import quote

import pytest

from penstock.errors import ConfigError
from penstock_workers.command.local_redis import free_port, local_redis_command, wait_until_ready
from tests import warm
from tests.eventually import eventually

ROOT = Path(__file__).parent.parent


def server_command(*, port: int, folder: Path | None = None, password: str | None = None) -> list[str]:
    """See `local_redis_command`; skips the test on a machine without a server, unless that is CI's."""
    try:
        return local_redis_command(port=port, folder=folder, password=password)
    except ConfigError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


class Server:
    """A Valkey of our own, broker and result store in one."""

    def __init__(self, port: int, password: str | None = None) -> None:
        self.port, self.password = port, password
        user = f":{quote(password, safe='')}@" if password else ""
        self.broker_url = f"redis://{user}127.0.0.1:{port}/0"
        self.results_url = f"redis://{user}127.0.0.1:{port}/1"

    @contextmanager
    def running(self) -> Iterator["Server"]:
        """Run it while the block runs; keeps nothing."""
        command = server_command(port=self.port, password=self.password)
        # A folder of its own: a test may let it write files, and the next server here must not read them.
        with TemporaryDirectory() as folder:
            process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder
            )
            try:
                eventually(self._is_listening, within_s=30)
                wait_until_ready(self.broker_url, within_s=30)
                yield self
            finally:
                process.kill()
                process.wait()

    def _is_listening(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0


class WorkerProcess:
    """A worker as people start it, its log in a file.

    `under` is a command that runs it, `program` what runs Celery. Its imports were made before it was
    started, unless `is_warm` says otherwise or its environment might change them.
    """

    def __init__(
        self,
        folder: Path,
        server: Server,
        *,
        toml: str,
        queues: str,
        options: tuple[str, ...] = (),
        under: tuple[str, ...] = (),
        program: tuple[str, ...] = ("-m", "celery"),
        environment: Mapping[str, str] | None = None,
        is_warm: bool = True,
    ) -> None:
        self.config = folder / f"deployment-{free_port()}.toml"
        self.config.write_text(
            f'[redis]\nbroker_url = "{server.broker_url}"\nresults_url = "{server.results_url}"\n{toml}'
        )
        self._log = self.config.with_suffix(".log")
        self.heartbeat_file = self.config.with_suffix(".ready")
        self.environment = {
            **os.environ,
            "PENSTOCK_CONFIG": str(self.config),
            "PENSTOCK_WORKER__HEARTBEAT_FILE": str(self.heartbeat_file),
            "NO_COLOR": "1",
            **(environment or {}),
        }
        command = [*under, sys.executable, *program, "-A", "penstock_workers", "worker", "-Q", queues]
        # No mingle, as `penstock up` starts workers: each would wait a second for answers of others.
        command += ["-n", f"{self.config.stem}@%h", "-l", "info", "--without-mingle", *options]
        needs_torch = re.search(r'source = "(?!http)', toml) is not None
        with self._log.open("wb") as log:
            self.process = warm.start(
                command,
                self.environment,
                log,
                imports=("models" if needs_torch else "celery") if is_warm else None,
            )

    @property
    def log(self) -> str:
        """What it wrote so far."""
        return self._log.read_text(errors="replace")

    @property
    def node(self) -> str:
        """Its name among Celery's nodes, unless `options` say otherwise."""
        return f"{self.config.stem}@{socket.gethostname()}"

    def wait_until_ready(self, within_s: float = 90) -> None:
        """Return when it takes jobs."""
        eventually(lambda: self.heartbeat_file.exists() or self._must_live(), within_s=within_s)

    def wait(self, within_s: float = 60) -> int:
        """Return its exit code."""
        return self.process.wait(within_s)

    def stop(self) -> None:
        """End it, the hard way if it must be."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def _must_live(self) -> bool:
        assert self.process.poll() is None, self.log
        return False


BUNDLED = """
[models.minilm]
task = "embed"
source = "bundled:minilm"
engine = "torch"  # loads in half the time

[models.chat]
task = "generate"
source = "bundled:tiny-chat"
generation = { max_new_tokens = 64 }
"""
