"""Starts worker processes from one that has imported what they need: most of a start is imports.

Two servers fork, one for workers of models and one for those that must not need torch. They are those of
`penstock up`, whose side of the link needs an event loop; tests have threads. A start that is itself what is
tested, or has a variable that a library may read as it loads, comes from nothing.
"""

import atexit
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from itertools import count
from pathlib import Path
from typing import IO

from penstock_workers.command import forkserver

ROOT = Path(__file__).parent.parent
MODULES = {
    "celery": ("celery.__main__", "celery.bin.worker", "celery.apps.worker", "penstock_workers.serving.app"),
    "models": (
        "celery.__main__",
        "celery.bin.worker",
        "celery.apps.worker",
        "penstock_workers.serving.app",
        "sentence_transformers",
        "transformers.models.bert.modeling_bert",
        "transformers.models.llama.modeling_llama",
    ),
}
"""What each server imports. Nothing here reads the configuration."""
OURS = ("PENSTOCK_", "NOOP_", "LIGHT_", "UPSTREAM_", "NO_COLOR", "PYTEST_CURRENT_TEST")
"""Variables that only what is not imported yet reads."""
_MOST_BYTES = 1 << 16
_LINUX = sys.platform == "linux"


class Forked:
    """A process with what tests need of `subprocess.Popen`."""

    def __init__(self, server: "_ForkServer", pid: int) -> None:
        self._server, self.pid = server, pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return its exit code, minus the signal that ended it; None if it runs."""
        self._server.listen(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Return its exit code when it has ended."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            left_s = 1.0 if deadline is None else deadline - time.monotonic()
            if left_s <= 0:
                assert timeout is not None
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            self._server.listen(min(left_s, 1.0))
        return code

    def send_signal(self, number: int) -> None:
        """Send it a signal, if it runs."""
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


class _ForkServer:
    """The tests' side of one server."""

    def __init__(self, imports: str) -> None:
        self._numbers = count()
        self._living: dict[int, Forked] = {}
        self._lock = threading.RLock()
        self._link, its_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with its_end:
            self._process = subprocess.Popen(
                [sys.executable, "-m", forkserver.__name__, str(its_end.fileno()), *MODULES[imports]],
                cwd=ROOT,
                env=_environment,
                pass_fds=[its_end.fileno()],
            )
        atexit.register(self._close)

    def fork(self, arguments: Sequence[str], environment: Mapping[str, str], output: IO[bytes]) -> Forked:
        """Start `python -m`, then `arguments`, with more variables; return when it has been born."""
        with self._lock:
            number = next(self._numbers)
            order = {"number": number, "arguments": list(arguments), "environment": dict(environment)}
            socket.send_fds(self._link, [json.dumps(order).encode()], [output.fileno()])
            while (born := self._hear()) is None:
                pass
            self._living[number] = forked = Forked(self, born)
        return forked

    def listen(self, within_s: float) -> None:
        """Hear of processes that have ended."""
        with self._lock:
            while select.select([self._link], [], [], within_s)[0]:
                self._hear()
                within_s = 0

    def _hear(self) -> int | None:
        """Take a message; return the process that it says was born."""
        message = self._link.recv(_MOST_BYTES)
        assert message, "the fork server has died"
        told: dict[str, int] = json.loads(message)
        if "returncode" in told:
            self._living.pop(told["number"]).returncode = told["returncode"]
        return told.get("pid")

    def _close(self) -> None:
        self._link.close()
        self._process.wait()


_environment: dict[str, str] = {}
"""What servers are started in: no test has changed it."""


def begin() -> None:
    """Remember the environment, before any test."""
    _environment.update(os.environ)


@cache
def _server(imports: str) -> _ForkServer:
    return _ForkServer(imports)


Process = Forked | subprocess.Popen[bytes]


def start(
    command: Sequence[str], environment: Mapping[str, str], output: IO[bytes], *, imports: str | None
) -> Process:
    """Start a Python program in the repository's root, from a server if nothing is in the way.

    Args:
        command: what is run, with its interpreter.
        environment: all of its variables.
        output: its standard output and standard error.
        imports: what the server has, a name of `MODULES`; None for a start from nothing.
    """
    if imports is not None and _LINUX and tuple(command[:2]) == (sys.executable, "-m"):
        changed = environment.items() - _environment.items()
        # A server adds variables, and takes none away.
        if environment.keys() >= _environment.keys() and all(name.startswith(OURS) for name, _ in changed):
            return _server(imports).fork(command[2:], dict(changed), output)
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
