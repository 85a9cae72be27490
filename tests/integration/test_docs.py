"""What the documentation shows can be done: its site is built, its blocks of code are run."""

import ast
import asyncio
import inspect
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import penstock
from penstock_workers.cli import cli
from tests.deployment import Server, WorkerProcess
from tests.documents import PAGES, ROOT, blocks, commands, name

LOOKING = ("status", "queues", "dead list", "config show", "config env")
"""Commands that change nothing, so that they are run as they stand."""
SHOWN = [page for page in PAGES if page.name not in ("design.md", "CHANGELOG.md")]


def test_the_site_is_built(tmp_path: Path) -> None:
    """Strictly: pages are in the navigation, links and anchors lead somewhere, names have docstrings."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]

    # No proxy answers there: whatever were fetched would fail.
    environment = {**os.environ, "https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    assert built.returncode == 0, built.stdout + built.stderr
    assert "embed_many" in (tmp_path / "reference" / "python.html").read_text()
    _check_names((tmp_path / "reference" / "python.html").read_text())
    assert 'class="mermaid"' in (tmp_path / "understand" / "batching.html").read_text()
    assert (tmp_path / "repository" / "compose.yaml.txt").read_text() == (ROOT / "compose.yaml").read_text()


def _check_names(html: str) -> None:
    """Check that the page has what programs import and call, and nothing that only this package calls."""
    shown = set(re.findall(r'id="penstock\.([\w.]+)"', html))

    def members(of: str) -> set[str]:
        return {found.removeprefix(f"{of}.") for found in shown if found.startswith(f"{of}.")}

    names = {found for found in penstock.__all__ if not found.endswith("Error")}
    assert names <= shown
    assert members("AsyncClient") == members("Client")
    assert members("AsyncJob") | {"id"} == members("Job")
    assert {found for found in shown if found.endswith(("_json", ".pause_s", ".read"))} == set()
    assert {"result.Vectors", "registry.Registry", "registry.WorkerInfo"} <= shown


@pytest.mark.parametrize("page", [page for page in SHOWN if [*blocks(page, "python")]], ids=name)
def test_python_runs(page: Path, server: Server, worker: WorkerProcess) -> None:
    """A page's blocks of Python run one after the other, each with the names of those before it."""
    del worker
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page, "python"):
        if block.reason:
            continue
        text = block.text.replace("redis://localhost:6379/", f"redis://127.0.0.1:{server.port}/")
        code = compile(
            "\n" * (block.line - 1) + text, str(page), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        )
        result = eval(code, names)
        if inspect.iscoroutine(result):
            asyncio.run(result)


@pytest.mark.parametrize("page", [page for page in SHOWN if [*commands(page)]], ids=name)
def test_commands_that_look_run(page: Path, worker: WorkerProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands that change nothing do what the page says, against a worker that is ready."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PENSTOCK_CONFIG", str(worker.config))
    for line in commands(page):
        words = shlex.split(line.replace("deployment.toml", str(worker.config)), comments=True)
        if line.startswith(LOOKING) and "operator" not in line:
            result = CliRunner().invoke(cli, words)
            assert result.exit_code == 0, (line, result.output)
