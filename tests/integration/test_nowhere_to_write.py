"""A worker of a read-only container, for a user that the machine does not know."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from penstock import Client
from tests.deployment import Server, WorkerProcess

TOML = """
[models.minilm]
task = "embed"
source = "bundled:minilm"
[models.chat]
task = "generate"
source = "bundled:tiny-chat"
"""
# All but one folder is read-only, and a user without name or home sees it; reading is still allowed.
READ_ONLY = """
for place in / /tmp /var/tmp /usr/tmp /dev/shm /root "$HOME" "$PWD"; do
    mount --bind "$place" "$place" 2>/dev/null && mount -o remount,ro,bind "$place" || true
done
mount --bind "$0" "$0" && mount -o remount,rw,bind "$0" || exit 1
caps=dac_read_search
exec setpriv --reuid=12345 --regid=12345 --clear-groups --inh-caps=+$caps --ambient-caps=+$caps \
    env -u HOME -u XDG_CACHE_HOME -u TMPDIR "$@"
"""
CONTAINED = ("unshare", "--mount", "sh", "-c", READ_ONLY)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The one folder that can be written; skips the test where none can be kept from it."""
    if shutil.which("unshare") is None or shutil.which("setpriv") is None or os.geteuid() != 0:
        pytest.skip("only root can mount")
    tmp_path.chmod(0o777)
    probe = subprocess.run([*CONTAINED, str(tmp_path), "true"], check=False, capture_output=True, cwd="/")
    if probe.returncode != 0:
        pytest.skip("nothing can be mounted here")
    return tmp_path


def test_models_are_served_where_nothing_can_be_written(server: Server, folder: Path) -> None:
    """Without home, cache and temporary files; one warning says what it costs."""
    worker = WorkerProcess(
        folder, server, toml=TOML, queues="cpu.minilm,cpu.chat", under=(*CONTAINED, str(folder))
    )
    try:
        worker.wait_until_ready(180)
        with Client(server.broker_url, results_url=server.results_url) as client:
            assert client.embed(["a text"], model="minilm", timeout_s=120).shape == (1, 384)
            assert client.generate("1 + 1?", model="chat", timeout_s=120).text
        told = [line for line in worker.log.splitlines() if "starts take longer" in line]
    finally:
        worker.stop()

    assert len(told) == 1
    assert "no folder takes temporary files" in told[0]
    assert "no home folder" in told[0]
