"""The client inside the processes that services are: forked, interrupted, and ended without care."""

import os
import signal
import subprocess
import sys
import textwrap

from penstock import Client
from tests.deployment import ROOT, Server, WorkerProcess


def start(program: str, server: Server) -> subprocess.Popen[str]:
    """Start a program that has `url` and `Client`."""
    head = f"from penstock import Client\nurl = {server.broker_url!r}\n"
    return subprocess.Popen(
        [sys.executable, "-c", head + textwrap.dedent(program)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_forked_child_starts_anew(client: Client) -> None:
    """A client that was used before a fork works in the child, and in the parent after it."""
    client.embed(["before"], model="minilm")

    child = os.fork()
    if child == 0:
        ok = client.embed(["in the child"], model="minilm", timeout_s=30).shape == (1, 384)
        os._exit(0 if ok else 1)

    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert client.embed(["after"], model="minilm").shape == (1, 384)


def test_a_process_may_end_without_closing(server: Server, worker: WorkerProcess) -> None:
    """A forgotten client keeps no process alive and prints nothing."""
    process = start(
        """
        client = Client(url)
        job = client.submit_embed(["not waited for"], model="minilm")
        print(client.embed(["a"], model="minilm").shape)
        """,
        server,
    )

    out, err = process.communicate(timeout=30)

    assert (process.returncode, out, err) == (0, "(1, 384)\n", "")


def test_ctrl_c_interrupts_a_wait(server: Server, worker: WorkerProcess) -> None:
    """Who waits for a result in a terminal gets away."""
    process = start(
        """
        with Client(url) as client:
            client.models()
            job = client.submit_embed(["slow " * 250] * 3000, model="minilm")
            try:
                print("waiting", flush=True)  # the signal may come at once after this
                job.result(timeout_s=300)
            except KeyboardInterrupt:
                job.cancel()
                print("interrupted")
        """,
        server,
    )
    assert process.stdout is not None
    process.stdout.readline()

    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=30)

    assert out == "interrupted\n"
    assert process.returncode == 0
